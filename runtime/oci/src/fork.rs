//! Going on in a child process that stands for a process in a guest, and what both sides need for that.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, setsid};

use crate::container::replace;

/// Which side of the split this process is, and its end of the channel between the two.
pub enum Side {
    Parent(Child),
    Child(UnixStream),
}

/// The child as its parent sees it.
pub struct Child {
    pub pid: Pid,
    pub channel: UnixStream,
}

/// Goes on in two processes. The child is in a session of its own, so that neither a terminal's signals nor its end are the
/// caller's to share.
///
/// # Errors
/// When the system has no room for another.
pub fn split() -> Result<Side> {
    let failed = "cannot start the process that stands for the container's";
    let (ours, theirs) = UnixStream::pair().context(failed)?;
    match cloison_sandbox::split().context(failed)? {
        Some(pid) => Ok(Side::Parent(Child { pid, channel: ours })),
        None => {
            drop(ours);
            setsid().context(failed)?;
            chdir("/").context(failed)?;
            Ok(Side::Child(theirs))
        }
    }
}

/// Standard input, output and error as descriptors of their own, which are /dev/null from here on: whoever holds them holds up
/// everybody who waits for their end.
///
/// # Errors
/// When the system has no room for another descriptor.
pub fn take_stdio() -> Result<[OwnedFd; 3]> {
    let failed = "cannot take over standard input and output";
    let taken = || -> io::Result<[OwnedFd; 3]> {
        let taken = [
            io::stdin().as_fd().try_clone_to_owned()?,
            io::stdout().as_fd().try_clone_to_owned()?,
            io::stderr().as_fd().try_clone_to_owned()?,
        ];
        let null = File::options().read(true).write(true).open("/dev/null")?;
        dup2_stdin(&null)?;
        dup2_stdout(&null)?;
        dup2_stderr(&null)?;
        Ok(taken)
    };
    taken().context(failed)
}

impl Child {
    /// Waits for its end and gives its status as a shell would.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn wait(&self) -> Result<u8> {
        loop {
            match waitpid(self.pid, None) {
                Err(nix::errno::Errno::EINTR) => {}
                Ok(WaitStatus::Exited(_, code)) => return Ok(u8::try_from(code).unwrap_or(u8::MAX)),
                Ok(WaitStatus::Signaled(_, signal, _)) => {
                    return Ok(u8::try_from(128 + signal as i32).unwrap_or(u8::MAX));
                }
                Ok(_) => {}
                Err(errno) => bail!("cannot wait for process {}: {errno}", self.pid),
            }
        }
    }
}

/// Writes a pid where a caller waits for it.
///
/// # Errors
/// When it cannot be written.
pub fn write_pid(file: Option<&Path>, pid: Pid) -> Result<()> {
    match file {
        Some(file) => {
            replace(file, pid.to_string().as_bytes()).context("cannot write the pid file")
        }
        None => Ok(()),
    }
}
