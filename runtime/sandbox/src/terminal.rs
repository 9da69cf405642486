//! A person's terminal: raw while a process in a guest has it, and what it was again afterwards, however that ends.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::Error;

/// A terminal in raw mode; dropping it restores the terminal.
pub struct RawTerminal {
    terminal: OwnedFd,
    saved: Termios,
}

impl RawTerminal {
    /// Makes this process's terminal raw: that at standard input, output or error, or the one that controls it.
    ///
    /// # Errors
    /// When there is none.
    pub fn enter() -> Result<Self, Error> {
        let terminal = own().map_err(Error::system("find a terminal to join the process's to"))?;
        let saved = tcgetattr(&terminal)
            .map_err(io::Error::from)
            .map_err(Error::system("read the terminal's settings"))?;
        let mut raw = saved.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&terminal, SetArg::TCSANOW, &raw)
            .map_err(io::Error::from)
            .map_err(Error::system("make the terminal raw"))?;
        Ok(Self { terminal, saved })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nothing can be done for a terminal that is gone.
        let _ = tcsetattr(&self.terminal, SetArg::TCSADRAIN, &self.saved);
    }
}

fn own() -> io::Result<OwnedFd> {
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    let standard = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()];
    match standard.into_iter().find(IsTerminal::is_terminal) {
        Some(terminal) => terminal.try_clone_to_owned(),
        None => Ok(File::open("/dev/tty")?.into()),
    }
}
