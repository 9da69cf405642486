//! A container's mounts, kept until nothing is under way in them.
//!
//! What a process reads ahead, and the closing of its files, goes on after its end. Linux waits for that when the shared directory itself
//! is unmounted, but not when a mount of the host's below it is, such as a container's root, which is a file system of its own in the guest
//! (`FUSE_ATTR_SUBMOUNT`; `virtio_kill_sb` in fs/fuse/virtio_fs.c, Linux 6.12): the answer then finds a file system that is gone, and the
//! kernel dies of it. So a container's mounts must not go with its last process.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use cloison_agent_api::SHARED_DIR;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::stat::minor;
use nix::sys::statfs::statfs;
use nix::unistd::Pid;

/// Where the kernel tells of its connections to FUSE servers (Documentation/filesystems/fuse.rst).
const CONNECTIONS: &str = "/sys/fs/fuse/connections";

/// Most round trips to the host that are waited for: other containers may always have something under way, and each round trip is
/// after what was under way before it.
const MAX_ROUND_TRIPS: usize = 1000;

/// The mounts in a process's namespace; dropping them lets go of it.
pub struct Mounts {
    _namespace: File,
}

impl Mounts {
    /// Those of the process `init`.
    pub fn of(init: Pid) -> io::Result<Self> {
        let namespace = File::open(format!("/proc/{init}/ns/mnt"))?;
        Ok(Self {
            _namespace: namespace,
        })
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        if let Err(error) = settle(Path::new(SHARED_DIR)) {
            eprintln!("cannot wait for what is under way in the shared directory: {error}");
        }
    }
}

/// Waits until nothing is under way between the guest and the host in `shared`.
fn settle(shared: &Path) -> io::Result<()> {
    match mount(
        Some("fusectl"),
        CONNECTIONS,
        Some("fusectl"),
        MsFlags::empty(),
        None::<&str>,
    ) {
        Ok(()) | Err(Errno::EBUSY) => {}
        Err(errno) => return Err(errno.into()),
    }
    let connection = minor(fs::metadata(shared)?.dev()).to_string();
    let waiting = Path::new(CONNECTIONS).join(connection).join("waiting");
    for _ in 0..MAX_ROUND_TRIPS {
        if fs::read_to_string(&waiting)?.trim() == "0" {
            break;
        }
        statfs(shared)?;
    }
    Ok(())
}
