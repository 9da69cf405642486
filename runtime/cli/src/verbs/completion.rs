//! `cloison completion`.

use std::io;

use anyhow::Result;
use clap::CommandFactory;
use clap_complete::{Shell, generate};

use crate::args::Cli;

/// Prints a completion script.
pub fn completion(shell: Shell) -> Result<()> {
    generate(shell, &mut Cli::command(), "cloison", &mut io::stdout());
    Ok(())
}
