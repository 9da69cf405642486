//! Names that come, go and move. Whatever is created belongs to the guest's user from the first moment; the device keeps up
//! with where files are, so that it can find them again.

use std::io;
use std::os::fd::OwnedFd;

use fuse_backend_rs::api::filesystem::{Entry, OpenOptions};
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RenameFlags, linkat, makedev, mkdirat, mknodat, openat,
    renameat_with, symlinkat, unlinkat,
};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::file::{PLACE, kind, stat_at, stat_fd};
use super::handles::HandleId;
use super::identity::{Creator, Umask, Unprivileged};
use super::inodes::NodeId;
use super::names::Name;
use super::tree::{Tree, open_flags};

/// Who creates a file in the guest.
#[derive(Debug, Clone, Copy)]
pub struct By {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permissions not to be given.
    pub umask: u32,
}

impl By {
    /// Runs `create` as this user.
    fn run<T>(self, create: impl FnOnce() -> rustix::io::Result<T>) -> io::Result<T> {
        let _umask = Umask::new(self.umask);
        let _creator = Creator::new(self.uid, self.gid)?;
        Ok(create()?)
    }
}

/// The bits of a mode that a file can be created with.
fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o7777)
}

impl Tree {
    /// Creates a directory.
    ///
    /// # Errors
    /// Those of mkdirat(2) and [`Tree::lookup`].
    pub fn mkdir(
        &mut self,
        parent: NodeId,
        name: Name<'_>,
        mode: u32,
        by: By,
    ) -> io::Result<Entry> {
        let dir = self.inodes.dir(parent)?;
        by.run(|| mkdirat(&dir, name.as_c_str(), permissions(mode)))?;
        self.lookup(parent, name)
    }

    /// Creates a file of any type but a directory or a link. A device node is a name for the guest's own device: the host's
    /// is never opened.
    ///
    /// # Errors
    /// EINVAL for another type; those of mknodat(2) and [`Tree::lookup`].
    pub fn mknod(
        &mut self,
        parent: NodeId,
        name: Name<'_>,
        mode: u32,
        rdev: u32,
        by: By,
    ) -> io::Result<Entry> {
        let kind = FileType::from_raw_mode(mode);
        if matches!(
            kind,
            FileType::Directory | FileType::Symlink | FileType::Unknown
        ) {
            return Err(Errno::INVAL.into());
        }
        // As `new_decode_dev` in the kernel's include/linux/kdev_t.h.
        let dev = makedev(
            (rdev & 0x000f_ff00) >> 8,
            (rdev & 0xff) | ((rdev >> 12) & 0x000f_ff00),
        );
        let dir = self.inodes.dir(parent)?;
        by.run(|| mknodat(&dir, name.as_c_str(), kind, permissions(mode), dev))?;
        self.lookup(parent, name)
    }

    /// Creates a symbolic link to `target`, which is only ever a string here.
    ///
    /// # Errors
    /// Those of symlinkat(2) and [`Tree::lookup`].
    pub fn symlink(
        &mut self,
        parent: NodeId,
        name: Name<'_>,
        target: &std::ffi::CStr,
        by: By,
    ) -> io::Result<Entry> {
        let dir = self.inodes.dir(parent)?;
        by.run(|| symlinkat(target, &dir, name.as_c_str()))?;
        self.lookup(parent, name)
    }

    /// Opens the regular file `name`, creating it if it is not there.
    ///
    /// # Errors
    /// EEXIST when it is there and `flags` has O_EXCL; those of openat(2), [`Tree::reopen`] and [`Tree::enter`].
    pub fn create(
        &mut self,
        parent: NodeId,
        name: Name<'_>,
        mode: u32,
        flags: u32,
        unprivileged: bool,
        by: By,
    ) -> io::Result<(Entry, HandleId, OpenOptions)> {
        self.handles.room()?;
        let exclusive = OFlags::from_bits_retain(flags).contains(OFlags::EXCL);
        let flags = open_flags(flags)?;
        let dir = self.inodes.dir(parent)?;
        // With O_EXCL no link is followed and nothing that exists is opened.
        let creation = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let created = by.run(|| openat(&dir, name.as_c_str(), creation, permissions(mode)));
        let (place, file) = match created {
            Ok(file) => {
                let place = self.open_descriptor(&file, OFlags::PATH)?;
                (place, file)
            }
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) && !exclusive => {
                let place = openat(&dir, name.as_c_str(), PLACE, Mode::empty())?;
                let stat = stat_fd(&place)?;
                let _unprivileged = Unprivileged::when(unprivileged)?;
                let file = self.reopen(&place, kind(&stat), flags)?;
                (place, file)
            }
            Err(e) => return Err(e),
        };
        let stat = stat_fd(&file)?;
        let entry = self.enter(parent, name, place)?;
        match self.opened(entry.inode, file, flags, &stat) {
            Ok((handle, options)) => Ok((entry, handle, options)),
            Err(e) => {
                self.forget(entry.inode, 1);
                Err(e)
            }
        }
    }

    /// Gives `node` another name.
    ///
    /// # Errors
    /// Those of linkat(2) and [`Tree::lookup`].
    pub fn link(&mut self, node: NodeId, parent: NodeId, name: Name<'_>) -> io::Result<Entry> {
        let (fd, _) = self.inodes.get(node)?;
        let dir = self.inodes.dir(parent)?;
        // By its descriptor's link rather than AT_EMPTY_PATH, which needs CAP_DAC_READ_SEARCH.
        linkat(
            self.descriptors(),
            DecInt::from_fd(&fd),
            &dir,
            name.as_c_str(),
            AtFlags::SYMLINK_FOLLOW,
        )?;
        self.inodes.identify(node, &stat_fd(&fd)?);
        self.lookup(parent, name)
    }

    /// Removes the name of a file, or of a directory if `flags` has AT_REMOVEDIR.
    ///
    /// # Errors
    /// Those of unlinkat(2).
    pub fn unlink(&mut self, parent: NodeId, name: Name<'_>, flags: AtFlags) -> io::Result<()> {
        let dir = self.inodes.dir(parent)?;
        let node = self.hold(&dir, name);
        unlinkat(&dir, name.as_c_str(), flags)?;
        if let Some(node) = node {
            self.inodes.displace(node);
        }
        Ok(())
    }

    /// Moves a name, replacing the other or exchanging the two.
    ///
    /// # Errors
    /// Those of renameat2(2).
    pub fn rename(
        &mut self,
        old_parent: NodeId,
        old: Name<'_>,
        new_parent: NodeId,
        new: Name<'_>,
        flags: u32,
    ) -> io::Result<()> {
        let flags = RenameFlags::from_bits_retain(flags);
        let old_dir = self.inodes.dir(old_parent)?;
        let new_dir = self.inodes.dir(new_parent)?;
        let moved = self.hold(&old_dir, old);
        let other = self.hold(&new_dir, new);
        renameat_with(&old_dir, old.as_c_str(), &new_dir, new.as_c_str(), flags)?;
        // Two names of one file: the kernel has done nothing.
        if moved == other && moved.is_some() {
            return Ok(());
        }
        if let Some(other) = other {
            match flags.contains(RenameFlags::EXCHANGE) {
                true => self.settle(other, old_parent, old),
                false => self.inodes.displace(other),
            }
        }
        if let Some(moved) = moved {
            self.settle(moved, new_parent, new);
        }
        Ok(())
    }

    /// The known file that `name` in `dir` is. It gets a descriptor if it has none: once the name is gone it could not be
    /// found any more.
    fn hold(&mut self, dir: &OwnedFd, name: Name<'_>) -> Option<NodeId> {
        let node = self.inodes.known(&stat_at(dir, name.as_c_str()).ok()?)?;
        // If it cannot be had, the guest's next use of the file fails with ESTALE, as if the host had removed it.
        let _ = self.inodes.get(node);
        Some(node)
    }

    /// `node` has become `name` in the directory `parent`.
    fn settle(&mut self, node: NodeId, parent: NodeId, name: Name<'_>) {
        if let Ok((fd, _)) = self.inodes.get(node)
            && let Ok(stat) = stat_fd(&fd)
        {
            self.inodes.identify(node, &stat);
        }
        self.inodes.place(node, parent, name.as_c_str());
    }
}
