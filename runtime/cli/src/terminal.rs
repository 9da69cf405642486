//! The person's terminal.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;

use anyhow::{Result, ensure};
use cloison_agent_api::agent::TtySize;

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
