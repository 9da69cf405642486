//! What the host says of a file: which one it is, of what type, and in which version.

use std::ffi::CStr;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{AtFlags, FileType, OFlags, Statx, StatxFlags, statx};
use rustix::time::{ClockId, clock_gettime};

/// Open only as a place in the file system: nothing is read, no device is opened, no link is followed.
pub const PLACE: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// What the host knows a file by. The mount is part of it: one directory may be shared twice, once of them read-only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileId {
    /// Mount ID (`stx_mnt_id`).
    pub mount: u64,
    dev: (u32, u32),
    ino: u64,
}

impl FileId {
    /// The identity in `stat`.
    pub fn of(stat: &Statx) -> Self {
        Self {
            mount: stat.stx_mnt_id,
            dev: (stat.stx_dev_major, stat.stx_dev_minor),
            ino: stat.stx_ino,
        }
    }
}

/// The type in `stat`.
pub fn kind(stat: &Statx) -> FileType {
    FileType::from_raw_mode(u32::from(stat.stx_mode))
}

/// Everything the host says about the file that `fd` is.
///
/// # Errors
/// Those of statx(2).
pub fn stat_fd(fd: impl AsFd) -> io::Result<Statx> {
    stat_at(fd, c"")
}

/// Everything the host says about `name` in the directory `dir`, a link not followed; about `dir` itself if it is empty.
///
/// # Errors
/// Those of statx(2).
pub fn stat_at(dir: impl AsFd, name: &CStr) -> io::Result<Statx> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let mask = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    Ok(statx(dir, name, flags, mask)?)
}

/// How long ago a file must have been modified for its time to tell the next modification from that one, in seconds. Clocks
/// of file systems go in steps, of two seconds at most (FAT).
const SETTLED: i64 = 2;

/// When and how large a file was: if neither has changed, what the guest has cached of it still holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    modified: (i64, u32),
    size: u64,
}

impl Version {
    /// The version in `stat`, or `None` if the file may yet be modified without a sign of it.
    pub fn of(stat: &Statx) -> Option<Self> {
        let modified = (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec);
        let now = clock_gettime(ClockId::RealtimeCoarse).tv_sec;
        (modified.0.saturating_add(SETTLED) < now).then_some(Self {
            modified,
            size: stat.stx_size,
        })
    }
}
