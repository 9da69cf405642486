//! Unpacking one layer into a directory of its own, in the form overlayfs understands. The archive is hostile and the
//! directory is nobody else's: no entry can reach outside it, and entries do what docker and containerd make of them.

mod entry;
mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::io::{BufReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, OFlags, Timespec, Timestamps};
use rustix::io::Errno;

use crate::error::LayerError;
use crate::limits::{MAX_DEPTH, MAX_PATH};
use crate::root::Root;
use crate::tarball::{Archive, Time};
pub(crate) use tree::OPAQUE;

/// Bytes of directory names remembered while one layer is unpacked; at sixty bytes each, half a million directories.
const MAX_DIRECTORY_BYTES: usize = 64 << 20;

/// What remembering one directory takes beside its name, roughly, bytes.
const DIRECTORY_OVERHEAD: usize = 64;

/// What an image says nothing about: directories that entries lie in and that have none of their own. They are root's, mode
/// 0755. Relative to the layer and sorted; the layer's own root is the empty path.
pub(crate) type Implied = BTreeSet<PathBuf>;

/// Unpacks the tar archive that `content` yields into `dir`, an empty directory, reading `content` to its end.
pub(crate) fn unpack(content: impl Read, dir: OwnedFd) -> Result<Implied, LayerError> {
    let mut archive = Archive::new(BufReader::with_capacity(1 << 16, content));
    let mut layer = Layer::new(dir);
    while let Some(entry) = archive.next()? {
        layer.apply(&entry, &mut archive)?;
    }
    // The digest covers what follows the archive's end, too.
    let mut rest = archive.into_inner();
    std::io::copy(&mut rest, &mut std::io::sink()).map_err(LayerError::Read)?;
    layer.finish()
}

struct Layer {
    root: Root,
    /// When the directories that have an entry were modified, set when nothing changes them any more.
    modified: BTreeMap<PathBuf, Time>,
    implied: Implied,
    directory_bytes: usize,
    /// The directory that the last entry lay in, by its name in the archive.
    last: Option<(PathBuf, tree::Place)>,
    buffer: Vec<u8>,
}

impl Layer {
    fn new(dir: OwnedFd) -> Layer {
        Layer {
            root: Root::from(dir),
            modified: BTreeMap::new(),
            implied: Implied::from([PathBuf::new()]),
            directory_bytes: 0,
            last: None,
            buffer: vec![0; 1 << 17],
        }
    }

    /// Accounts for a directory that has an entry of its own.
    fn remember(&mut self, path: &Path, modified: Time) -> Result<(), LayerError> {
        self.implied.remove(path);
        self.account(path)?;
        self.modified.insert(path.to_owned(), modified);
        Ok(())
    }

    /// Accounts for a directory that has been made because something lies in it.
    fn imply(&mut self, path: &Path) -> Result<(), LayerError> {
        self.modified.remove(path);
        self.account(path)?;
        self.implied.insert(path.to_owned());
        Ok(())
    }

    fn account(&mut self, path: &Path) -> Result<(), LayerError> {
        self.directory_bytes += path.as_os_str().len() + DIRECTORY_OVERHEAD;
        if self.directory_bytes > MAX_DIRECTORY_BYTES {
            return Err(LayerError::TooMany {
                what: "bytes of directory names",
                limit: MAX_DIRECTORY_BYTES as u64,
            });
        }
        Ok(())
    }

    /// Does what had to wait until all entries were there.
    fn finish(self) -> Result<Implied, LayerError> {
        for (path, modified) in &self.modified {
            let Some(dir) = self.directory(path)? else {
                continue;
            };
            rustix::fs::futimens(&dir, &timestamps(*modified))
                .map_err(|e| write_error("set the time of", path, e))?;
        }
        let mut implied = Implied::new();
        for path in &self.implied {
            if self.directory(path)?.is_some() {
                implied.insert(path.clone());
            }
        }
        Ok(implied)
    }

    /// A directory, unless a later entry has put something else in its place.
    fn directory(&self, path: &Path) -> Result<Option<OwnedFd>, LayerError> {
        match self
            .root
            .open_physical(path, OFlags::RDONLY | OFlags::DIRECTORY)
        {
            Ok(dir) => Ok(Some(dir)),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(e) => Err(write_error("open", path, e)),
        }
    }
}

/// An entry's name as a relative path of plain components; empty for the layer's root.
fn normal(name: &[u8]) -> Result<PathBuf, LayerError> {
    let mut path = PathBuf::new();
    let mut depth = 0;
    for component in name.split(|b| *b == b'/') {
        match component {
            b"" | b"." => {}
            b".." => return Err(refused(name, "its path goes up with \"..\"")),
            _ => {
                path.push(OsStr::from_bytes(component));
                depth += 1;
            }
        }
    }
    if depth > MAX_DEPTH {
        return Err(refused(
            name,
            format!("it lies more than {MAX_DEPTH} directories deep"),
        ));
    }
    if path.as_os_str().len() > MAX_PATH {
        return Err(refused(
            name,
            format!("its path is longer than {MAX_PATH} bytes"),
        ));
    }
    Ok(path)
}

fn timestamps(time: Time) -> Timestamps {
    let time = Timespec {
        tv_sec: time.seconds,
        tv_nsec: time.nanoseconds.into(),
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

/// Sets the time of a name in a directory, not following it.
fn set_time(dir: impl AsFd, name: &Path, time: Time) -> rustix::io::Result<()> {
    rustix::fs::utimensat(dir, name, &timestamps(time), AtFlags::SYMLINK_NOFOLLOW)
}

fn refused(entry: impl AsRef<[u8]>, reason: impl Into<String>) -> LayerError {
    LayerError::Refused {
        entry: shown(entry),
        reason: reason.into(),
    }
}

fn write_error(action: &'static str, entry: &Path, errno: Errno) -> LayerError {
    LayerError::Write {
        action,
        entry: shown(entry.as_os_str().as_bytes()),
        source: errno.into(),
    }
}

/// A name for an error message, with its end cut off if it is very long.
fn shown(name: impl AsRef<[u8]>) -> String {
    String::from_utf8_lossy(name.as_ref())
        .chars()
        .take(200)
        .collect()
}

#[cfg(test)]
mod tests;
