//! Where an image's bytes are: a file of a layout, or a stretch of an archive. Whatever stands at a path, opening it never
//! blocks; a document is read once, into memory, and checked there.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::OFlags;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::limits::MAX_DOCUMENT;
use crate::tarball::Input;

/// Where a blob is.
#[derive(Debug, Clone)]
pub(crate) enum Place {
    /// A file of its own.
    File(PathBuf),
    /// A member of an archive.
    Member {
        archive: Arc<File>,
        path: PathBuf,
        offset: u64,
        size: u64,
    },
}

impl Place {
    /// The file that a person would look at.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Place::File(path) | Place::Member { path, .. } => path,
        }
    }

    /// Opens it; `what` names it in errors.
    pub(crate) fn open(&self, what: &str) -> Result<BlobReader> {
        match self {
            Place::File(path) => {
                let missing = |source| Error::MissingBlob {
                    what: what.to_owned(),
                    path: path.clone(),
                    source,
                };
                let file = open_regular(path).map_err(missing)?;
                let size = file.metadata().map_err(missing)?.len();
                Ok(BlobReader {
                    file: Arc::new(file),
                    offset: 0,
                    left: size,
                })
            }
            Place::Member {
                archive,
                offset,
                size,
                ..
            } => Ok(BlobReader {
                file: Arc::clone(archive),
                offset: *offset,
                left: *size,
            }),
        }
    }

    /// All of a document, checked against what is known of it.
    pub(crate) fn read_document(
        &self,
        what: &str,
        digest: Option<&Digest>,
        size: Option<u64>,
    ) -> Result<Vec<u8>> {
        let reader = self.open(what)?;
        let path = || self.path().to_owned();
        if let Some(expected) = size.filter(|size| *size != reader.left) {
            return Err(Error::WrongSize {
                what: what.to_owned(),
                path: path(),
                expected,
                actual: reader.left,
            });
        }
        let mut content = Vec::new();
        reader
            .take(MAX_DOCUMENT + 1)
            .read_to_end(&mut content)
            .map_err(|source| Error::Io {
                action: "read",
                path: path(),
                source,
            })?;
        let length = content.len() as u64;
        if length > MAX_DOCUMENT {
            let what = what.to_owned();
            return Err(Error::TooLarge {
                what,
                path: path(),
                size: length,
                limit: MAX_DOCUMENT,
            });
        }
        if let Some(expected) = digest {
            let actual = Digest::of(expected.algorithm(), &content);
            if actual != *expected {
                let (what, expected) = (what.to_owned(), expected.clone());
                return Err(Error::WrongDigest {
                    what,
                    path: path(),
                    expected,
                    actual,
                });
            }
        }
        Ok(content)
    }
}

/// Opens a file for reading if it is a regular one.
pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    // Without O_NONBLOCK, opening a FIFO would wait for somebody to write to it.
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not a regular file",
        ))
    }
}

/// Reads a blob from its beginning to its end.
#[derive(Debug)]
pub(crate) struct BlobReader {
    file: Arc<File>,
    offset: u64,
    left: u64,
}

impl BlobReader {
    /// All of a file.
    pub(crate) fn whole(file: Arc<File>) -> io::Result<BlobReader> {
        let left = file.metadata()?.len();
        Ok(BlobReader {
            file,
            offset: 0,
            left,
        })
    }

    /// Bytes not read yet.
    pub(crate) fn left(&self) -> u64 {
        self.left
    }

    /// The first bytes of what is left, without reading them.
    pub(crate) fn peek<const N: usize>(&self) -> io::Result<Vec<u8>> {
        let mut start = Vec::with_capacity(N);
        let ahead = BlobReader {
            file: Arc::clone(&self.file),
            ..*self
        };
        ahead.take(N as u64).read_to_end(&mut start)?;
        Ok(start)
    }
}

impl Read for BlobReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let want = buf
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let n = self.file.read_at(&mut buf[..want], self.offset)?;
        self.offset += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

impl Input for BlobReader {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        if count > self.left {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.offset += count;
        self.left -= count;
        Ok(())
    }
}
