//! A person's terminal: raw while a process in a guest has it, and what it was again afterwards, however that ends.

use std::io;

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::Error;

/// A terminal in raw mode; dropping it restores the terminal.
pub struct RawTerminal {
    saved: Termios,
}

impl RawTerminal {
    /// Makes the terminal at standard input raw.
    ///
    /// # Errors
    /// When it is none.
    pub fn enter() -> Result<Self, Error> {
        let stdin = io::stdin();
        let saved = tcgetattr(&stdin)
            .map_err(io::Error::from)
            .map_err(Error::system("read the terminal's settings"))?;
        let mut raw = saved.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&stdin, SetArg::TCSANOW, &raw)
            .map_err(io::Error::from)
            .map_err(Error::system("make the terminal raw"))?;
        Ok(Self { saved })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nothing can be done for a terminal that is gone.
        let _ = tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.saved);
    }
}
