//! Attributes of files, and of the file system they are on.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

use fuse_backend_rs::abi::fuse_abi::{Attr, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::SetattrValid;
use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, Statx, Timespec, Timestamps, Uid, chmodat, chownat, ftruncate,
    utimensat,
};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::file::stat_fd;
use super::handles::HandleId;
use super::identity::Unprivileged;
use super::inodes::NodeId;
use super::tree::Tree;

impl Tree {
    /// The attributes of `node`, by `handle` if the guest has it open.
    ///
    /// # Errors
    /// Those of [`Inodes::get`], [`Handles::get`] and statx(2).
    pub fn getattr(&mut self, node: NodeId, handle: Option<HandleId>) -> io::Result<stat64> {
        let stat = match handle {
            Some(handle) => stat_fd(self.handles.get(handle, node)?)?,
            None => stat_fd(self.inodes.get(node)?.0)?,
        };
        self.inodes.identify(node, &stat);
        Ok(attributes(&stat))
    }

    /// Changes the attributes of `node` that `valid` names to those in `new`; answers all of them.
    ///
    /// # Errors
    /// Those of fchmodat(2), fchownat(2), ftruncate(2), utimensat(2).
    pub fn setattr(
        &mut self,
        node: NodeId,
        new: &stat64,
        handle: Option<HandleId>,
        valid: SetattrValid,
    ) -> io::Result<stat64> {
        let (fd, kind) = self.inodes.get(node)?;
        if valid.contains(SetattrValid::MODE) {
            let mode = Mode::from_raw_mode(new.st_mode & 0o7777);
            chmodat(
                self.descriptors(),
                DecInt::from_fd(&fd),
                mode,
                AtFlags::empty(),
            )?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let uid = valid.contains(SetattrValid::UID).then_some(new.st_uid);
            let gid = valid.contains(SetattrValid::GID).then_some(new.st_gid);
            if uid == Some(u32::MAX) || gid == Some(u32::MAX) {
                return Err(Errno::INVAL.into());
            }
            let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
            chownat(&fd, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let size = u64::try_from(new.st_size).map_err(|_| Errno::FBIG)?;
            let _unprivileged = Unprivileged::when(valid.contains(SetattrValid::KILL_SUIDGID))?;
            match handle {
                Some(handle) => ftruncate(self.handles.file(handle, node)?.0, size)?,
                None => ftruncate(self.reopen(&fd, kind, OFlags::WRONLY)?, size)?,
            }
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let times = Timestamps {
                last_access: time(
                    valid.contains(SetattrValid::ATIME),
                    valid.contains(SetattrValid::ATIME_NOW),
                    new.st_atime,
                    new.st_atime_nsec,
                )?,
                last_modification: time(
                    valid.contains(SetattrValid::MTIME),
                    valid.contains(SetattrValid::MTIME_NOW),
                    new.st_mtime,
                    new.st_mtime_nsec,
                )?,
            };
            utimensat(
                self.descriptors(),
                DecInt::from_fd(&fd),
                &times,
                AtFlags::empty(),
            )?;
        }
        self.getattr(node, None)
    }

    /// The room on the file system that `node` is on.
    ///
    /// # Errors
    /// Those of statvfs(3).
    pub fn statfs(&mut self, node: NodeId) -> io::Result<statvfs64> {
        let (fd, _) = self.inodes.get(node)?;
        let mut out = MaybeUninit::<statvfs64>::zeroed();
        // SAFETY: `out` is room for the kernel to fill, and `fd` is open until the end of this function.
        let result = unsafe { libc::fstatvfs64(fd.as_raw_fd(), out.as_mut_ptr()) };
        nix::errno::Errno::result(result)?;
        // SAFETY: every field of a `statvfs64` may be zero, and all were before the call.
        Ok(unsafe { out.assume_init() })
    }
}

/// A time to set: none, the present, or the one given.
///
/// # Errors
/// EINVAL when `nsec` is not below a second (some values beyond have a meaning of their own to the kernel).
fn time(set: bool, now: bool, sec: i64, nsec: i64) -> io::Result<Timespec> {
    let nsec = match (set, now) {
        (false, _) => libc::UTIME_OMIT,
        (true, true) => libc::UTIME_NOW,
        (true, false) if (0..1_000_000_000).contains(&nsec) => nsec,
        (true, false) => return Err(Errno::INVAL.into()),
    };
    Ok(Timespec {
        tv_sec: sec,
        tv_nsec: nsec,
    })
}

/// Attributes as fuse-backend-rs takes them.
pub fn attributes(stat: &Statx) -> stat64 {
    let (major, minor) = (stat.stx_rdev_major, stat.stx_rdev_minor);
    stat64::from(Attr {
        ino: stat.stx_ino,
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        atime: stat.stx_atime.tv_sec.cast_unsigned(),
        mtime: stat.stx_mtime.tv_sec.cast_unsigned(),
        ctime: stat.stx_ctime.tv_sec.cast_unsigned(),
        atimensec: stat.stx_atime.tv_nsec,
        mtimensec: stat.stx_mtime.tv_nsec,
        ctimensec: stat.stx_ctime.tv_nsec,
        mode: u32::from(stat.stx_mode),
        nlink: stat.stx_nlink,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        // As `new_encode_dev` in the kernel's include/linux/kdev_t.h.
        rdev: (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12),
        blksize: stat.stx_blksize,
        flags: 0,
    })
}
