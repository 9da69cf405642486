//! The person's terminal: raw while a container has it, and what it was again afterwards, however that ends.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;

use anyhow::{Context, Result, ensure};
use cloison_agent_api::agent::TtySize;
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// A terminal in raw mode; dropping it restores the terminal.
pub struct Raw {
    saved: Termios,
}

impl Raw {
    /// Makes the terminal at standard input raw.
    ///
    /// # Errors
    /// When it is none.
    pub fn enter() -> Result<Self> {
        let stdin = io::stdin();
        let saved = tcgetattr(&stdin).context("cannot read the terminal's settings")?;
        let mut raw = saved.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&stdin, SetArg::TCSANOW, &raw).context("cannot make the terminal raw")?;
        Ok(Self { saved })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Nothing can be done for a terminal that is gone.
        let _ = tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.saved);
    }
}

/// Checks that `-it` has a terminal to be joined to.
///
/// # Errors
/// When standard input is none.
pub fn require() -> Result<()> {
    ensure!(
        io::stdin().is_terminal(),
        "the input device is not a terminal: leave -t away, or run this in a terminal"
    );
    Ok(())
}

/// The terminal's size; `None` when standard output is none.
pub fn size() -> Option<TtySize> {
    cloison_sandbox::terminal_size(io::stdout().as_fd()).map(|(columns, rows)| TtySize {
        columns: columns.into(),
        rows: rows.into(),
        ..Default::default()
    })
}
