//! What QEMU and its guest say: the guest's console, which becomes the kernel's log, and QEMU's own complaints.

use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::ChildStderr;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::transcript::Transcript;
use crate::kernel_log::KernelLog;
use crate::machine::Watch;

/// Bytes of console or standard error taken at a time.
const CHUNK: usize = 8 << 10;

/// How long a guest may take to boot that is to become a template: far beyond what it takes on a loaded host.
const BOOT_PATIENCE: Duration = Duration::from_secs(60);

/// The pipes that both come by, and what came.
pub(super) struct Output {
    console: PipeReader,
    stderr: ChildStderr,
    log: KernelLog,
    said: Transcript,
}

impl Output {
    pub(super) fn new(
        console: PipeReader,
        stderr: ChildStderr,
        log: KernelLog,
    ) -> io::Result<Self> {
        for reader in [console.as_fd(), stderr.as_fd()] {
            fcntl(reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        }
        Ok(Self {
            console,
            stderr,
            log,
            said: Transcript::default(),
        })
    }

    pub(super) fn console(&self) -> BorrowedFd<'_> {
        self.console.as_fd()
    }

    pub(super) fn stderr(&self) -> BorrowedFd<'_> {
        self.stderr.as_fd()
    }

    /// What the guest's kernel has said.
    pub(super) fn log(&self) -> &KernelLog {
        &self.log
    }

    /// The last that QEMU has said.
    pub(super) fn said(&self) -> String {
        self.said.tail()
    }

    /// Takes all that is there.
    pub(super) fn drain(&mut self) {
        while self.read_console() == Took::Something {}
        while self.read_stderr() == Took::Something {}
    }

    /// Waits until the guest has written `line` to its console.
    pub(super) fn await_line(&mut self, line: &str) -> io::Result<()> {
        let line = format!("{line}\n");
        let deadline = Instant::now() + BOOT_PATIENCE;
        while !self.log.tail(CHUNK).contains(&line) {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = PollTimeout::try_from(left).map_err(io::Error::other)?;
            let mut fds = [PollFd::new(self.console.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, left) {
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            if self.read_console() == Took::End {
                while self.read_stderr() == Took::Something {}
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }

    pub(super) fn read_console(&mut self) -> Took {
        take_some(&mut self.console, |bytes| self.log.push(bytes))
    }

    pub(super) fn read_stderr(&mut self) -> Took {
        take_some(&mut self.stderr, |bytes| {
            tracing::debug!("QEMU: {}", String::from_utf8_lossy(bytes).trim_end());
            self.said.push(bytes);
        })
    }
}

/// What came of reading from QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Took {
    Something,
    Nothing,
    /// There will never be more.
    End,
}

impl From<Took> for Watch {
    fn from(took: Took) -> Self {
        match took {
            Took::Something | Took::Nothing => Self::Keep,
            Took::End => Self::Drop,
        }
    }
}

/// Takes what is there, at most [`CHUNK`] bytes.
fn take_some(from: &mut impl Read, take: impl FnOnce(&[u8])) -> Took {
    let mut chunk = [0; CHUNK];
    match from.read(&mut chunk) {
        Ok(0) => Took::End,
        Ok(length) => {
            take(&chunk[..length]);
            Took::Something
        }
        Err(error) => match error.kind() {
            io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => Took::Nothing,
            _ => Took::End,
        },
    }
}
