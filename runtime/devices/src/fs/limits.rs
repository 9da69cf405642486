//! How much of the host one guest may occupy through its file system, and how much of that it does.

use rustix::process::{Resource, getrlimit};

/// Most files and directories the guest may know at once, by default. One takes about 300 bytes.
const INODES: usize = 1 << 19;
/// Most descriptors on files the guest has not opened, however many the process may have. Each keeps an inode in the host's
/// memory, and one that is missed costs two system calls.
const MOST_DESCRIPTORS: usize = 1 << 14;
/// Most open files, however many descriptors the process may have.
const MOST_OPEN: usize = 1 << 16;
/// Fewest descriptors of either kind that a guest can work with.
const FEWEST_DESCRIPTORS: usize = 64;

/// Bounds of what a guest may make the device hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FsLimits {
    /// Most files and directories the guest may know at once; one more is refused with ENFILE.
    pub inodes: usize,
    /// Most descriptors kept on files the guest knows but has not opened. Beyond it the least used are closed and found
    /// again by name when they are needed.
    pub descriptors: usize,
    /// Most files and directories the guest may have open at once; one more is refused with ENFILE.
    pub open: usize,
}

impl FsLimits {
    /// Bounds that leave a fifth of this process's descriptors (soft limit) to everything else it does.
    pub fn for_this_process() -> Self {
        let all = getrlimit(Resource::Nofile)
            .current
            .and_then(|n| usize::try_from(n).ok())
            .unwrap_or(usize::MAX);
        let each = all / 5 * 2;
        Self {
            inodes: INODES,
            descriptors: each.clamp(FEWEST_DESCRIPTORS, MOST_DESCRIPTORS),
            open: each.clamp(FEWEST_DESCRIPTORS, MOST_OPEN),
        }
    }

    /// The number of known files from which the guest is asked to forget some: three quarters of [`FsLimits::inodes`].
    pub(super) fn high_water(&self) -> usize {
        self.inodes - self.inodes / 4
    }

    /// The number of known files below which the guest may be asked again: half of [`FsLimits::inodes`].
    pub(super) fn low_water(&self) -> usize {
        self.inodes / 2
    }
}

/// What a guest makes the device hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FsUsage {
    /// Files and directories the guest knows, the root included.
    pub inodes: usize,
    /// Those of them on which the device keeps a descriptor.
    pub descriptors: usize,
    /// Files and directories the guest has open; each is a descriptor of its own.
    pub open: usize,
}
