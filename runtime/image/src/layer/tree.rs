//! Directories of a layer under construction: where an entry's parent is, making it when it is missing, and making room
//! for an entry. A path through a link leads to where it would lead in the container if the layer were all there is.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

use super::{Layer, refused, write_error};
use crate::error::LayerError;
use crate::limits::MAX_DEPTH;
use crate::remove::remove_at;
use crate::root::{group, open_child, owner};

/// By which overlayfs knows a directory that hides all below it (kernel Documentation/filesystems/overlayfs.rst, "whiteouts
/// and opaque directories").
pub(crate) const OPAQUE: (&str, &[u8]) = ("trusted.overlay.opaque", b"y");

/// Overlayfs's mark for a name that does not exist although it does in a layer below: a character device 0:0.
pub(crate) const WHITEOUT_DEVICE: u64 = 0;

/// An open directory of the layer.
#[derive(Clone)]
pub(super) struct Place {
    /// Its path in the layer, without links.
    pub(super) path: PathBuf,
    pub(super) dir: Rc<OwnedFd>,
}

/// What stands at a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Present {
    Nothing,
    Directory,
    Whiteout,
    Other,
}

impl Layer {
    /// The directory named `path` in the archive. What is missing of it is made.
    pub(super) fn parent(&mut self, path: &Path) -> Result<Place, LayerError> {
        match &self.last {
            Some((last, place)) if last == path => return Ok(place.clone()),
            _ => {}
        }
        let place = match self
            .root
            .open_physical(path, OFlags::RDONLY | OFlags::DIRECTORY)
        {
            Ok(dir) => Place {
                path: path.to_owned(),
                dir: Rc::new(dir),
            },
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => self.make_parents(path)?,
            Err(e) => return Err(write_error("open", path, e)),
        };
        self.last = Some((path.to_owned(), place.clone()));
        Ok(place)
    }

    /// The directory named `path` in the archive, if there is one.
    pub(super) fn existing_parent(&self, path: &Path) -> Result<Option<OwnedFd>, LayerError> {
        if let Some(dir) = self.directory(path)? {
            return Ok(Some(dir));
        }
        let physical = self
            .root
            .resolve(path)
            .map_err(|e| write_error("find", path, e))?;
        self.directory(&physical)
    }

    fn make_parents(&mut self, path: &Path) -> Result<Place, LayerError> {
        let physical = self
            .root
            .resolve(path)
            .map_err(|e| write_error("find", path, e))?;
        if physical.components().count() > MAX_DEPTH {
            return Err(refused(
                path.as_os_str().as_bytes(),
                format!("links lead it more than {MAX_DEPTH} directories deep"),
            ));
        }
        let mut place = Place {
            path: PathBuf::new(),
            dir: Rc::new(
                self.root
                    .open_physical(Path::new(""), OFlags::RDONLY | OFlags::DIRECTORY)
                    .map_err(|e| write_error("open", path, e))?,
            ),
        };
        for name in &physical {
            let name = Path::new(name);
            let child = place.path.join(name);
            match present(&*place.dir, name).map_err(|e| write_error("look at", &child, e))? {
                Present::Directory => {}
                Present::Other => {
                    return Err(refused(
                        path.as_os_str().as_bytes(),
                        "something lies in it that is no directory",
                    ));
                }
                found @ (Present::Nothing | Present::Whiteout) => {
                    make_dir(&*place.dir, name, found)
                        .map_err(|e| write_error("make", &child, e))?;
                    self.imply(&child)?;
                }
            }
            let dir = open_child(&*place.dir, name, OFlags::RDONLY | OFlags::DIRECTORY)
                .map_err(|e| write_error("open", &child, e))?;
            place = Place {
                path: child,
                dir: Rc::new(dir),
            };
        }
        Ok(place)
    }

    /// Makes sure that nothing stands at a name; says what was there.
    pub(super) fn clear(&mut self, place: &Place, name: &Path) -> Result<Present, LayerError> {
        let path = || place.path.join(name);
        let found = present(&*place.dir, name).map_err(|e| write_error("look at", &path(), e))?;
        if found != Present::Nothing {
            // What is remembered of the last parent may lead through here.
            self.last = None;
            remove_at(&*place.dir, name).map_err(|e| write_error("replace", &path(), e))?;
        }
        Ok(found)
    }
}

/// Makes a directory, root's and mode 0755 whatever the umask, in place of nothing or of a whiteout. The whiteout hid what
/// lies below, so the directory must, too.
pub(super) fn make_dir(parent: impl AsFd, name: &Path, found: Present) -> rustix::io::Result<()> {
    if found == Present::Whiteout {
        rustix::fs::unlinkat(&parent, name, AtFlags::empty())?;
    }
    rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o700))?;
    let dir = open_child(&parent, name, OFlags::RDONLY | OFlags::DIRECTORY)?;
    // The group may have come from the parent.
    rustix::fs::fchown(&dir, owner(0), group(0))?;
    rustix::fs::fchmod(&dir, Mode::from_raw_mode(0o755))?;
    if found == Present::Whiteout {
        make_opaque(&dir)
    } else {
        Ok(())
    }
}

/// Makes a directory hide what lies below it.
pub(super) fn make_opaque(dir: impl AsFd) -> rustix::io::Result<()> {
    rustix::fs::fsetxattr(dir, OPAQUE.0, OPAQUE.1, XattrFlags::empty())
}

/// Looks at a name without following it.
pub(super) fn present(dir: impl AsFd, name: &Path) -> rustix::io::Result<Present> {
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => Ok(Present::Nothing),
        Err(e) => Err(e),
        Ok(stat) => Ok(match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Present::Directory,
            FileType::CharacterDevice if stat.st_rdev == WHITEOUT_DEVICE => Present::Whiteout,
            _ => Present::Other,
        }),
    }
}
