//! A reader of tar archives that believes nothing: every size is checked before it is used, extension headers and sparse
//! maps are bounded, and an archive that could be read in two ways is refused. It knows ustar, GNU and PAX archives as
//! GNU tar and Go's archive/tar write them; what it reads is never a path yet, only bytes.

mod header;
mod pax;
mod sparse;

use std::io::{self, ErrorKind, Read};

use crate::error::LayerError;
use crate::limits::MAX_PATH;
use header::BLOCK;
use pax::Extensions;
pub(crate) use sparse::Chunk;

/// Longest PAX extended header, bytes. It holds one entry's extended attributes, of which the kernel takes 64 KiB each.
const MAX_EXTENSION: u64 = 1 << 20;

/// What an archive is read from.
pub(crate) trait Input: Read + Sized {
    /// Passes over `count` bytes.
    fn skip(&mut self, count: u64) -> io::Result<()> {
        let passed = io::copy(&mut self.by_ref().take(count), &mut io::sink())?;
        if passed < count {
            Err(ErrorKind::UnexpectedEof.into())
        } else {
            Ok(())
        }
    }
}

impl Input for &[u8] {}
impl<R: Read> Input for io::BufReader<R> {}

/// Seconds and nanoseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Time {
    pub(crate) seconds: i64,
    /// Less than 1,000,000,000.
    pub(crate) nanoseconds: u32,
}

/// What kind of file an entry makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Content follows, to be put where the chunks say: in order, not overlapping, none beyond `size`.
    File {
        size: u64,
        chunks: Vec<Chunk>,
    },
    /// Another name for an earlier entry.
    HardLink(Vec<u8>),
    Symlink(Vec<u8>),
    Directory,
    Fifo,
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
}

/// One file as the archive describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// At most [`MAX_PATH`] bytes, no NUL; otherwise as it is in the archive.
    pub(crate) path: Vec<u8>,
    pub(crate) kind: Kind,
    /// Permissions with set-user-ID, set-group-ID and sticky bit.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) modified: Time,
    /// Names and values.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// An archive being read, entry by entry.
pub(crate) struct Archive<I> {
    input: I,
    /// Bytes taken from the input.
    position: u64,
    /// Content of the current entry that has not been read, without padding.
    content: u64,
    /// Padding after it.
    padding: u64,
}

impl<I: Input> Archive<I> {
    pub(crate) fn new(input: I) -> Archive<I> {
        Archive {
            input,
            position: 0,
            content: 0,
            padding: 0,
        }
    }

    /// Bytes of the archive before what is read next.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// Bytes of content of the current entry that are in the archive and have not been read.
    pub(crate) fn content(&self) -> u64 {
        self.content
    }

    pub(crate) fn into_inner(self) -> I {
        self.input
    }

    /// The next entry, passing over what is left of the one before; `None` at the end.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, LayerError> {
        let mut extensions = Extensions::default();
        let (mut long_path, mut long_link) = (None, None);
        loop {
            self.skip(self.content + self.padding)?;
            (self.content, self.padding) = (0, 0);
            let described = extensions.is_set() || long_path.is_some() || long_link.is_some();
            let Some(block) = self.header()? else {
                return if described {
                    Err(broken("it ends after an extended header"))
                } else {
                    Ok(None)
                };
            };
            let header = header::parse(&block)?;
            match header.type_flag {
                b'g' => self.expect(header.size)?,
                b'x' => {
                    let text = self.extension(header.size, MAX_EXTENSION)?;
                    extensions.parse(&text)?;
                }
                b'L' => set_once(&mut long_path, self.long_name(header.size)?)?,
                b'K' => set_once(&mut long_link, self.long_name(header.size)?)?,
                _ => {
                    return self
                        .entry(&block, header, extensions, long_path, long_link)
                        .map(Some);
                }
            }
        }
    }

    /// Reads content of the current entry; 0 at its end.
    pub(crate) fn read_content(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let want = buf
            .len()
            .min(usize::try_from(self.content).unwrap_or(usize::MAX));
        if want == 0 {
            return Ok(0);
        }
        let n = self.input.read(&mut buf[..want])?;
        if n == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.position += n as u64;
        self.content -= n as u64;
        Ok(n)
    }

    fn entry(
        &mut self,
        block: &[u8; BLOCK],
        header: header::Fields,
        extensions: Extensions,
        long_path: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Entry, LayerError> {
        let path = long_path.or(extensions.path).unwrap_or(header.path);
        let link = long_link.or(extensions.link).unwrap_or(header.link);
        let size = extensions.size.unwrap_or(header.size);
        let sparse = extensions.sparse;
        let path = sparse.name.clone().unwrap_or(path);
        checked_name(&path)?;
        checked_name(&link)?;
        let kind = match header.type_flag {
            // Before ustar a directory was a file whose name ends with a slash.
            0 if path.ends_with(b"/") => Kind::Directory,
            0 | b'0' | b'7' => {
                self.expect(size)?;
                if sparse.is_sparse() {
                    let map = sparse.map(self)?;
                    Kind::File {
                        size: map.size,
                        chunks: map.chunks,
                    }
                } else {
                    Kind::File {
                        size,
                        chunks: vec![Chunk {
                            offset: 0,
                            length: size,
                        }],
                    }
                }
            }
            b'S' => {
                let map = sparse::gnu_map(block, size, self)?;
                self.expect(size)?;
                Kind::File {
                    size: map.size,
                    chunks: map.chunks,
                }
            }
            // The rest have no content, whatever their size field says: some archivers put the size of a link's target or
            // of a directory there, and Go's reader, which docker and containerd share, goes by the type as well.
            b'1' => Kind::HardLink(link),
            b'2' => Kind::Symlink(link),
            b'3' => Kind::CharDevice {
                major: header.major,
                minor: header.minor,
            },
            b'4' => Kind::BlockDevice {
                major: header.major,
                minor: header.minor,
            },
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => {
                return Err(broken(format!(
                    "entry {:?} has the unknown type {:?}",
                    String::from_utf8_lossy(&path),
                    char::from(other)
                )));
            }
        };
        Ok(Entry {
            path,
            kind,
            mode: header.mode & 0o7777,
            uid: extensions.uid.map_or(header.uid, Ok)?,
            gid: extensions.gid.map_or(header.gid, Ok)?,
            modified: extensions.modified.unwrap_or(header.modified),
            xattrs: extensions.xattrs,
        })
    }

    /// Announces content of the given size, which is read or passed over.
    fn expect(&mut self, size: u64) -> Result<(), LayerError> {
        // A file's size is a signed number in the kernel.
        if size > i64::MAX as u64 {
            return Err(broken("an entry is larger than any file can be"));
        }
        self.content = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        Ok(())
    }

    /// All of an extension's content.
    fn extension(&mut self, size: u64, limit: u64) -> Result<Vec<u8>, LayerError> {
        if size > limit {
            return Err(LayerError::TooMany {
                what: "bytes in one extended header",
                limit,
            });
        }
        self.expect(size)?;
        let mut text = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            match self.read_content(&mut chunk).map_err(LayerError::Read)? {
                0 => return Ok(text),
                n => text.extend_from_slice(&chunk[..n]),
            }
        }
    }

    fn long_name(&mut self, size: u64) -> Result<Vec<u8>, LayerError> {
        let mut name = self.extension(size, MAX_PATH as u64 + 1)?;
        if let Some(end) = name.iter().position(|b| *b == 0) {
            name.truncate(end);
        }
        Ok(name)
    }

    /// The next block that is a header; `None` at the end of the archive.
    fn header(&mut self) -> Result<Option<[u8; BLOCK]>, LayerError> {
        let Some(block) = self.block()? else {
            return Ok(None);
        };
        if block.iter().any(|b| *b != 0) {
            return Ok(Some(block));
        }
        // Two blocks of zeros are the end. Other readers differ on what follows a single one.
        match self.block()? {
            Some(next) if next.iter().any(|b| *b != 0) => {
                Err(broken("something follows a lone block of zeros"))
            }
            _ => Ok(None),
        }
    }

    /// The next block of 512 bytes; `None` if the input ends before it.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, LayerError> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.input.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(LayerError::Read(ErrorKind::UnexpectedEof.into())),
                Ok(n) => filled += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(LayerError::Read(e)),
            }
        }
        self.position += BLOCK as u64;
        Ok(Some(block))
    }

    fn skip(&mut self, count: u64) -> Result<(), LayerError> {
        if count > 0 {
            self.input.skip(count).map_err(LayerError::Read)?;
            self.position += count;
        }
        Ok(())
    }
}

fn broken(reason: impl Into<String>) -> LayerError {
    LayerError::Archive(reason.into())
}

fn set_once(slot: &mut Option<Vec<u8>>, name: Vec<u8>) -> Result<(), LayerError> {
    match slot.replace(name) {
        None => Ok(()),
        Some(_) => Err(broken("two long names describe one entry")),
    }
}

fn checked_name(name: &[u8]) -> Result<(), LayerError> {
    if name.len() > MAX_PATH {
        return Err(LayerError::TooMany {
            what: "bytes in a path",
            limit: MAX_PATH as u64,
        });
    }
    if name.contains(&0) {
        return Err(broken("a path contains a NUL byte"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
