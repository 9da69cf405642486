//! Directories under construction. A staging directory's name says what it will become, and its lock says that somebody is
//! at work on it: whoever else wants the same thing waits for the lock, and a directory without a lock is a dead
//! process's. What is complete is moved to its place in one step.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::remove::remove_at;
use crate::root::open_child;

/// A locked staging directory. Dropping it removes it, unless it has been published.
#[derive(Debug)]
pub(super) struct Staging {
    tmp: OwnedFd,
    name: String,
    /// Open and locked.
    dir: OwnedFd,
    published: bool,
}

/// Who makes what was asked for.
pub(super) enum Staged {
    /// The caller must.
    Ours(Staging),
    /// Somebody else has, and it is there.
    Present,
}

impl Staging {
    /// Enters the staging directory `name` in `tmp`, empty, unless `target` exists by the time that whoever else is at work on
    /// it is done. `waiting` is called before waiting for somebody.
    pub(super) fn enter(
        tmp: &Path,
        name: &str,
        target: &Path,
        waiting: &mut dyn FnMut(),
    ) -> io::Result<Staged> {
        let tmp = open_dir(tmp)?;
        loop {
            match rustix::fs::mkdirat(&tmp, name, Mode::from_raw_mode(0o700)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(e.into()),
            }
            let dir = match open_child(&tmp, Path::new(name), OFlags::RDONLY | OFlags::DIRECTORY) {
                Err(Errno::NOENT) => continue,
                other => other?,
            };
            match rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => {
                    waiting();
                    lock(&dir)?;
                }
                other => other?,
            }
            // While this process waited, the directory may have become the target or have been removed.
            if !is_at(&dir, &tmp, name)? {
                if target.is_dir() {
                    return Ok(Staged::Present);
                }
                continue;
            }
            let staging = Staging {
                tmp,
                name: name.to_owned(),
                dir,
                published: false,
            };
            if target.is_dir() {
                return Ok(Staged::Present);
            }
            staging.clear()?;
            return Ok(Staged::Ours(staging));
        }
    }

    /// Makes an empty directory in it, root's and mode 0755, as a container's root is.
    pub(super) fn make_dir(&self, name: &str) -> io::Result<OwnedFd> {
        rustix::fs::mkdirat(&self.dir, name, Mode::from_raw_mode(0o755))?;
        let dir = open_child(
            &self.dir,
            Path::new(name),
            OFlags::RDONLY | OFlags::DIRECTORY,
        )?;
        rustix::fs::fchmod(&dir, Mode::from_raw_mode(0o755))?;
        Ok(dir)
    }

    /// Writes a file in it.
    pub(super) fn write(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.dir, name, flags, Mode::from_raw_mode(0o600))?;
        File::from(file).write_all(content)
    }

    /// Makes it what it was made for. It is on the disk before it has its name, so that a power failure cannot leave half of
    /// it there.
    pub(super) fn publish(mut self, target: &Path) -> io::Result<()> {
        rustix::fs::syncfs(&self.dir)?;
        rustix::fs::renameat(&self.tmp, &self.name, CWD, target)?;
        self.published = true;
        Ok(())
    }

    /// Removes what a dead process has left in it.
    fn clear(&self) -> io::Result<()> {
        for entry in Dir::read_from(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if !matches!(name, b"." | b"..") {
                use std::os::unix::ffi::OsStrExt;
                remove_at(&self.dir, Path::new(std::ffi::OsStr::from_bytes(name)))?;
            }
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.published {
            return;
        }
        if let Err(error) = remove_at(&self.tmp, Path::new(&self.name)) {
            tracing::warn!(name = self.name, %error, "cannot remove a staging directory; it will be tried again");
        }
    }
}

/// Removes staging directories that nobody is at work on. What cannot be removed is left for the next time: nobody needs it
/// gone.
pub(super) fn sweep(tmp: &Path) {
    let swept = open_dir(tmp).and_then(|dir| {
        for entry in std::fs::read_dir(tmp)? {
            let name = entry?.file_name();
            let Some(name) = name.to_str() else { continue };
            match sweep_one(&dir, name) {
                Ok(()) => {}
                Err(error) => {
                    tracing::warn!(name, %error, "cannot remove what a dead process left")
                }
            }
        }
        Ok(())
    });
    if let Err(error) = swept {
        tracing::warn!(dir = %tmp.display(), %error, "cannot look for what dead processes left");
    }
}

fn sweep_one(tmp: &OwnedFd, name: &str) -> io::Result<()> {
    let dir = match open_child(tmp, Path::new(name), OFlags::RDONLY | OFlags::DIRECTORY) {
        Err(Errno::NOENT) => return Ok(()),
        // Nothing but directories is ever made here.
        Err(Errno::NOTDIR | Errno::LOOP) => return Ok(remove_at(tmp, Path::new(name))?),
        other => other?,
    };
    match rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Ok(()),
        Err(e) => Err(e.into()),
        Ok(()) if is_at(&dir, tmp, name)? => Ok(remove_at(tmp, Path::new(name))?),
        Ok(()) => Ok(()),
    }
}

fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Waits for a lock.
fn lock(dir: &OwnedFd) -> rustix::io::Result<()> {
    loop {
        match rustix::fs::flock(dir, FlockOperation::LockExclusive) {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// Whether an open directory still has its name.
fn is_at(dir: &OwnedFd, parent: &OwnedFd, name: &str) -> rustix::io::Result<bool> {
    let same = |a: Stat, b: Stat| (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino);
    match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => Ok(false),
        Err(e) => Err(e),
        Ok(there) => Ok(same(rustix::fs::fstat(dir)?, there)),
    }
}
