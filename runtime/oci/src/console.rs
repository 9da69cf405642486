//! A terminal whose far end is a caller's. The caller gets the master of a terminal of the host; bytes go between its other end and
//! the guest's terminal, which alone interprets them. The process that stands for the guest's is in charge of the host's terminal, so
//! that it learns of a new size and of the caller's hanging up.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result};
use cloison_agent_api::agent::TtySize;
use cloison_sandbox::{HostStream, Streams};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::{Winsize, openpty};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};

/// The near end of a caller's terminal.
pub struct Console {
    slave: OwnedFd,
}

impl Console {
    /// Makes a terminal, takes charge of it, and hands its master to whoever listens on `socket`. For a session leader without a
    /// terminal.
    ///
    /// # Errors
    /// When nobody listens, or the system has no room for another terminal.
    pub fn hand_over(socket: &Path, size: Option<(u16, u16)>) -> Result<Self> {
        let size = size.map(|(columns, rows)| Winsize {
            ws_col: columns,
            ws_row: rows,
            ws_xpixel: 0,
            ws_ypixel: 0,
        });
        let pty = openpty(size.as_ref(), None).context("cannot make a terminal")?;
        let mut raw = tcgetattr(&pty.slave).context("cannot read a terminal's settings")?;
        cfmakeraw(&mut raw);
        tcsetattr(&pty.slave, SetArg::TCSANOW, &raw).context("cannot make a terminal raw")?;
        let failed = || {
            format!(
                "cannot hand the terminal to the console socket {}",
                socket.display()
            )
        };
        let stream = UnixStream::connect(socket).with_context(failed)?;
        let name = b"/dev/ptmx";
        let descriptors = [pty.master.as_raw_fd()];
        sendmsg::<()>(
            stream.as_raw_fd(),
            &[IoSlice::new(name)],
            &[ControlMessage::ScmRights(&descriptors)],
            MsgFlags::empty(),
            None,
        )
        .with_context(failed)?;
        // Not before: the end of a master that nobody has taken would be the end of this process, and its error untold.
        cloison_sandbox::take_charge(pty.slave.as_fd())
            .context("cannot take charge of a terminal")?;
        let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK;
        fcntl(&pty.slave, FcntlArg::F_SETFL(flags)).context("cannot set up a terminal")?;
        Ok(Self { slave: pty.slave })
    }

    /// The streams of a process with this terminal.
    ///
    /// # Errors
    /// When the system has no room for another descriptor.
    pub fn streams(&self) -> Result<Streams> {
        let end = || {
            self.slave
                .try_clone()
                .context("cannot duplicate a descriptor")
        };
        Ok(Streams {
            stdin: Some(HostStream::ready(end()?)),
            stdout: Some(HostStream::ready(end()?)),
            terminal: true,
            ..Streams::default()
        })
    }

    /// Its size.
    pub fn size(&self) -> Option<TtySize> {
        size(self.slave.as_fd())
    }
}

/// A terminal's size; `None` for what is none, or has none.
pub fn size(terminal: impl AsFd) -> Option<TtySize> {
    cloison_sandbox::terminal_size(terminal.as_fd()).map(|(columns, rows)| TtySize {
        columns: columns.into(),
        rows: rows.into(),
        ..Default::default()
    })
}

/// The streams of a process that has what its caller gave this one.
///
/// # Errors
/// When a descriptor of ours cannot be used.
pub fn inherited_streams(stdio: &[OwnedFd; 3], terminal: bool) -> Result<Streams> {
    let [stdin, stdout, stderr] = stdio;
    let stderr = (!terminal)
        .then(|| HostStream::output(stderr.as_fd()))
        .transpose()?;
    Ok(Streams {
        stdin: Some(HostStream::input(stdin.as_fd())?),
        stdout: Some(HostStream::output(stdout.as_fd())?),
        stderr,
        terminal,
        ..Streams::default()
    })
}

/// The size of the terminal that `stdio` has, if it has one.
pub fn inherited_size(stdio: &[OwnedFd; 3]) -> Option<TtySize> {
    stdio.iter().find_map(size)
}
