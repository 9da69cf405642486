//! ID-mapped mounts: files that belong to others through a mount than on their file system (mount_setattr(2), MOUNT_ATTR_IDMAP). The
//! kernel takes the mapping from a user namespace, which needs a process for as long as it is being made.

use std::fmt::Write;
use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::waitpid;
use nix::unistd::pipe2;

use crate::host::split;

/// A range of IDs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    /// The first one on the file system.
    pub inside: u32,
    /// Whom that one belongs to through the mount.
    pub outside: u32,
    /// How many there are.
    pub count: u32,
}

/// A mapping of users and groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMap {
    /// Users.
    pub users: Vec<IdRange>,
    /// Groups.
    pub groups: Vec<IdRange>,
    /// For what is mounted below, as well.
    pub recursive: bool,
}

impl IdMap {
    /// Applies it to a mount that is nowhere yet. Refused to a process with several threads.
    ///
    /// # Errors
    /// When the kernel refuses the mapping, or a file system cannot have one.
    pub(crate) fn apply(&self, tree: &OwnedFd) -> io::Result<()> {
        let namespace = self.namespace()?;
        let attributes = libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_IDMAP,
            attr_clr: 0,
            propagation: 0,
            userns_fd: u64::try_from(namespace.as_raw_fd()).map_err(io::Error::other)?,
        };
        let below = if self.recursive {
            libc::AT_RECURSIVE
        } else {
            0
        };
        // SAFETY: the path is an empty string that ends in NUL, and the kernel reads one mount_attr of the size it is told from its
        // address; both descriptors are open.
        let answer = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                tree.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH | below,
                &raw const attributes,
                size_of::<libc::mount_attr>(),
            )
        };
        match (answer, Errno::last()) {
            (0, _) => Ok(()),
            (_, Errno::EINVAL) => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "its file system, or one that is mounted below, cannot be ID-mapped on this host",
            )),
            (_, errno) => Err(errno.into()),
        }
    }

    /// A user namespace with this mapping.
    fn namespace(&self) -> io::Result<File> {
        let (mut made, tell) = pipe2(OFlag::O_CLOEXEC).map(|(r, w)| (File::from(r), w))?;
        let (wait, done) = pipe2(OFlag::O_CLOEXEC)?;
        let Some(child) = split()? else {
            drop((made, done));
            let entered = unshare(CloneFlags::CLONE_NEWUSER).is_ok();
            if entered {
                // Nobody reads it who would not wait for this process.
                let _ = File::from(tell).write_all(b"x");
                let _ = File::from(wait).read(&mut [0]);
            }
            // SAFETY: ends the process at once, and with it nothing of its parent's.
            unsafe { libc::_exit(0) }
        };
        drop((tell, wait));
        let opened = made
            .read_exact(&mut [0])
            .map_err(|_| io::Error::other("the host gives no user namespace"))
            .and_then(|()| {
                let of = |file: &str| PathBuf::from(format!("/proc/{child}/{file}"));
                fs::write(of("uid_map"), lines(&self.users))?;
                fs::write(of("gid_map"), lines(&self.groups))?;
                File::open(of("ns/user"))
            });
        drop(done);
        waitpid(child, None)?;
        opened
    }
}

/// As user_namespaces(7) has it.
fn lines(ranges: &[IdRange]) -> String {
    ranges.iter().fold(String::new(), |mut text, range| {
        let IdRange {
            inside,
            outside,
            count,
        } = range;
        // A string takes all that is written to it.
        let _ = writeln!(text, "{inside} {outside} {count}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_lines_of_three_numbers() {
        let range = |inside, outside, count| IdRange {
            inside,
            outside,
            count,
        };
        let two = [range(0, 100_000, 1000), range(1000, 5, 1)];
        assert_eq!(lines(&two), "0 100000 1000\n1000 5 1\n");
        assert_eq!(lines(&[]), "");
    }
}
