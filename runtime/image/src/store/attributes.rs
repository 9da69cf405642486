//! What directories look like that lie in a layer only because something lies in them. An image may bring `tmp/file` without
//! saying anything of `tmp`; unpacked for overlayfs, the layer has a `tmp` all the same, and its attributes would replace
//! those that a lower layer gives to it (containerd copies them from below while unpacking, which a layer that is shared by
//! images cannot do). So a stack of layers where that matters gets one more layer on top, with nothing in it but
//! directories that look right.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, Stat, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;

use super::staging::{Staged, Staging};
use super::{ROOTFS, Store, make_private_dir, read_implied};
use crate::digest::{Algorithm, Digest};
use crate::error::{Error, Result};
use crate::layer::{Implied, OPAQUE};
use crate::root::Root;

/// Extended attributes copied with a directory; the others that an image may set mean nothing on one.
const COPIED_XATTRS: [&str; 2] = ["system.posix_acl_access", "system.posix_acl_default"];

/// Most look-ups spent on one stack: directories without an entry, times layers. Images have some hundred.
const MAX_LOOKUPS: usize = 1 << 22;

impl Store {
    /// The directories to stack for layers given bottom first: topmost first, none twice, with one more on top if needed.
    pub(super) fn stack<'a>(
        &self,
        diff_ids: impl DoubleEndedIterator<Item = &'a Digest>,
    ) -> Result<Vec<PathBuf>> {
        let mut layers: Vec<PathBuf> = Vec::new();
        for diff_id in diff_ids.rev() {
            let dir = self.layer_dir(diff_id);
            // Overlayfs takes no directory twice, and what a layer does once more below itself is invisible.
            if layers.contains(&dir) {
                continue;
            }
            let opaque = is_opaque(&dir.join(ROOTFS)).map_err(|e| broken(&dir, e))?;
            layers.push(dir);
            // Of the mark on a layer's root overlayfs takes no notice.
            if opaque {
                break;
            }
        }
        let mut chain = Vec::new();
        for dir in &layers {
            let name = dir.strip_prefix(&self.dir).unwrap_or(dir);
            chain.extend_from_slice(name.as_os_str().as_bytes());
            chain.push(b'\n');
        }
        let chain = Digest::of(Algorithm::Sha256, &chain);
        let mut stack: Vec<PathBuf> = layers.iter().map(|dir| dir.join(ROOTFS)).collect();
        if stack.len() != 1 {
            stack.splice(0..0, self.attributes(&chain, &layers)?);
        }
        Ok(stack)
    }

    /// The layer to put on top of a stack, if it needs one. The answer is kept.
    fn attributes(&self, chain: &Digest, layers: &[PathBuf]) -> Result<Option<PathBuf>> {
        let parent = self.attributes_dir().join(chain.algorithm().name());
        let target = parent.join(chain.hex());
        let top = target.join(ROOTFS);
        if !target.is_dir() {
            let prepared = make_private_dir(&parent).and_then(|()| {
                let name = format!("attributes-{}", chain.hex());
                match Staging::enter(&self.tmp_dir(), &name, &target, &mut || {})? {
                    Staged::Present => Ok(()),
                    Staged::Ours(staging) => {
                        prepare(&staging, layers)?;
                        staging.publish(&target)
                    }
                }
            });
            prepared.map_err(|source| broken(&target, source))?;
        }
        Ok(top.is_dir().then_some(top))
    }
}

fn broken(path: &Path, source: impl Into<io::Error>) -> Error {
    Error::DataDir {
        action: "prepare the layers of",
        path: path.to_owned(),
        source: source.into(),
    }
}

/// Fills a staging directory with the top layer of a stack, if it needs one. A stack of nothing needs an empty one.
fn prepare(staging: &Staging, layers: &[PathBuf]) -> io::Result<()> {
    let stack = layers
        .iter()
        .map(|dir| View::open(dir))
        .collect::<io::Result<Vec<View>>>()?;
    let wanted: Implied = stack
        .iter()
        .flat_map(|view| view.implied.iter().cloned())
        .collect();
    if wanted.len().saturating_mul(stack.len()) > MAX_LOOKUPS {
        return Err(io::Error::other(
            "its layers have too many directories that it says nothing about",
        ));
    }
    let mut looks: BTreeMap<PathBuf, Look> = BTreeMap::new();
    for path in &wanted {
        if !overridden(&stack, path)? {
            continue;
        }
        for ancestor in path.ancestors() {
            if !looks.contains_key(ancestor) {
                looks.insert(ancestor.to_owned(), look(&stack, ancestor)?);
            }
        }
    }
    if looks.is_empty() && !stack.is_empty() {
        return Ok(());
    }
    let root = Root::from(staging.make_dir(ROOTFS)?);
    // Parents sort before what lies in them.
    for (path, look) in &looks {
        if let (Some(parent), Some(name)) = (path.parent(), path.file_name()) {
            let parent = root.open_physical(parent, OFlags::RDONLY | OFlags::DIRECTORY)?;
            rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o700))?;
        }
        look.apply(&root.open_physical(path, OFlags::RDONLY | OFlags::DIRECTORY)?)?;
    }
    for (path, look) in looks.iter().rev() {
        rustix::fs::futimens(
            root.open_physical(path, OFlags::RDONLY | OFlags::DIRECTORY)?,
            &look.times,
        )?;
    }
    Ok(())
}

/// Whether a directory that the image describes in one layer would look different because of a layer above it.
fn overridden(stack: &[View], path: &Path) -> rustix::io::Result<bool> {
    let mut topmost = None;
    for (n, view) in stack.iter().enumerate() {
        let seen = view.see(path)?;
        if let Some(dir) = seen.dir {
            let here = Look::of(&dir)?;
            let (first, shown) = topmost.get_or_insert((n, here.clone()));
            if !view.implied.contains(path) {
                return Ok(n > *first && !shown.same(&here, path));
            }
        }
        if seen.last {
            break;
        }
    }
    Ok(false)
}

/// What a directory should look like: as in the topmost layer that has an entry for it, or as in the topmost one at all.
fn look(stack: &[View], path: &Path) -> rustix::io::Result<Look> {
    let mut look = None;
    for view in stack {
        let seen = view.see(path)?;
        if let Some(dir) = seen.dir {
            let here = Look::of(&dir)?;
            if !view.implied.contains(path) {
                return Ok(here);
            }
            look.get_or_insert(here);
        }
        if seen.last {
            break;
        }
    }
    look.ok_or(Errno::NOENT)
}

/// One layer of a stack.
struct View {
    root: Root,
    implied: Implied,
}

/// A directory in one layer.
struct Seen {
    dir: Option<OwnedFd>,
    /// Whether this layer hides what the layers below have under that path.
    last: bool,
}

impl View {
    fn open(layer: &Path) -> io::Result<View> {
        Ok(View {
            root: Root::open(&layer.join(ROOTFS))?,
            implied: read_implied(layer)?,
        })
    }

    fn see(&self, path: &Path) -> rustix::io::Result<Seen> {
        let mut at = PathBuf::new();
        let mut last = false;
        let mut dir = self
            .root
            .open_physical(&at, OFlags::RDONLY | OFlags::DIRECTORY)?;
        for name in path {
            at.push(name);
            dir = match self
                .root
                .open_physical(&at, OFlags::RDONLY | OFlags::DIRECTORY)
            {
                Ok(dir) => dir,
                Err(Errno::NOENT) => return Ok(Seen { dir: None, last }),
                // Something else hides the directory, and be it a whiteout.
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    return Ok(Seen {
                        dir: None,
                        last: true,
                    });
                }
                Err(e) => return Err(e),
            };
            last |= has_xattr(&dir, OPAQUE.0)?;
        }
        Ok(Seen {
            dir: Some(dir),
            last,
        })
    }
}

/// How a directory looks.
#[derive(Clone)]
struct Look {
    mode: u32,
    uid: u32,
    gid: u32,
    times: Timestamps,
    xattrs: Vec<(&'static str, Vec<u8>)>,
}

impl Look {
    fn of(dir: &OwnedFd) -> rustix::io::Result<Look> {
        let stat: Stat = rustix::fs::fstat(dir)?;
        let mut xattrs = Vec::new();
        for name in COPIED_XATTRS {
            if let Some(value) = xattr(dir, name)? {
                xattrs.push((name, value));
            }
        }
        let modified = Timespec {
            tv_sec: stat.st_mtime,
            tv_nsec: stat.st_mtime_nsec.cast_signed(),
        };
        Ok(Look {
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            times: Timestamps {
                last_access: modified,
                last_modification: modified,
            },
            xattrs,
        })
    }

    /// Whether nobody could tell the two apart at `path`. Nobody looks at the time of the root itself, which many images leave
    /// out; other times matter to programs that keep an index of a directory (fontconfig).
    fn same(&self, other: &Look, path: &Path) -> bool {
        let is_root = path.as_os_str().is_empty();
        (self.mode, self.uid, self.gid, &self.xattrs)
            == (other.mode, other.uid, other.gid, &other.xattrs)
            && (is_root || self.times.last_modification == other.times.last_modification)
    }

    fn apply(&self, dir: &OwnedFd) -> rustix::io::Result<()> {
        rustix::fs::fchown(
            dir,
            crate::root::owner(self.uid),
            crate::root::group(self.gid),
        )?;
        rustix::fs::fchmod(dir, Mode::from_raw_mode(self.mode))?;
        for (name, value) in &self.xattrs {
            rustix::fs::fsetxattr(dir, *name, value, XattrFlags::empty())?;
        }
        Ok(())
    }
}

fn is_opaque(dir: &Path) -> rustix::io::Result<bool> {
    let dir = rustix::fs::open(
        dir,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    has_xattr(&dir, OPAQUE.0)
}

fn has_xattr(dir: &OwnedFd, name: &str) -> rustix::io::Result<bool> {
    Ok(xattr(dir, name)?.is_some())
}

/// An extended attribute's value. The store is root's alone, so nobody makes it grow between the two calls.
fn xattr(dir: &OwnedFd, name: &str) -> rustix::io::Result<Option<Vec<u8>>> {
    let size = match rustix::fs::fgetxattr_query(dir, name) {
        Err(Errno::NODATA | Errno::OPNOTSUPP) => return Ok(None),
        other => other?,
    };
    let mut value = vec![0; size];
    let length = rustix::fs::fgetxattr(dir, name, &mut value)?;
    value.truncate(length);
    Ok(Some(value))
}
