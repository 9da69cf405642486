//! What each verb does, a file each.

mod completion;
mod doctor;
mod exec;
mod inspect;
mod install;
mod logs;
mod network;
mod ps;
mod remove;
mod run;
mod signal;
mod wait;

use std::fmt::Display;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use clap::error::ErrorKind;
use cloison_sandbox::Home;

use crate::args::{Cli, Global, Verb};
use crate::container::{Container, find};
use crate::exit::{self, Failed};

/// The standalone front door. `began` is the program's first moment, by [`cloison_vmm::monotonic`].
pub fn main(began: u64) -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and the version are what was asked for; a reader that has gone away is none of our business.
            let _ = error.print();
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
                _ => ExitCode::from(exit::OURS),
            };
        }
    };
    if cli.global.debug {
        tracing_subscriber::fmt()
            .with_writer(std::io::stderr)
            .with_max_level(tracing::Level::DEBUG)
            .init();
    }
    let global = &cli.global;
    let home = match home(global) {
        Ok(home) => home,
        Err(error) => return Failed::from(error).report(global.debug),
    };
    let done = match cli.verb {
        Verb::Run(run) => run::run(global, &home, *run, began),
        Verb::Exec(exec) => exec::exec(&home, &exec),
        Verb::Ps(ps) => general(ps::ps(&home, &ps)),
        Verb::Kill(kill) => general(signal::kill(&home, &kill)),
        Verb::Stop(stop) => general(signal::stop(&home, &stop)),
        Verb::Wait(wait) => general(wait::wait(&home, &wait)),
        Verb::Rm(rm) => general(remove::rm(&home, &rm)),
        Verb::Prune(prune) => general(remove::prune(&home, &prune)),
        Verb::Logs(logs) => general(logs::logs(&home, &logs)),
        Verb::Inspect(inspect) => general(inspect::inspect(&home, &inspect)),
        Verb::Network(verb) => general(network::network(&home, &verb)),
        Verb::Doctor => general(doctor::doctor(global, &home)),
        Verb::Install(args) => general(install::install(&args)),
        Verb::Uninstall(args) => general(install::uninstall(&args)),
        Verb::Completion { shell } => general(completion::completion(shell)),
    };
    match done {
        Ok(status) => ExitCode::from(status),
        Err(failed) => failed.report(global.debug),
    }
}

/// Prints a line of what was asked for. A reader that has gone away is none of our business.
pub fn print(line: impl Display) {
    let _ = writeln!(io::stdout(), "{line}");
}

/// Absolute, since a monitor leaves the directory it was started in.
fn home(global: &Global) -> Result<Home> {
    let absolute = |dir: &Path| {
        std::path::absolute(dir)
            .with_context(|| format!("cannot use the directory {}", dir.display()))
    };
    Ok(Home::new(
        absolute(&global.run_dir)?,
        absolute(&global.data_dir)?,
    ))
}

fn general(result: Result<()>) -> Result<u8, Failed> {
    result.map(|()| 0).map_err(Failed::general)
}

/// Does the same to several containers, in order: one that fails is told of and does not keep the others from their turn.
fn each(
    home: &Home,
    containers: &[String],
    mut action: impl FnMut(&Container) -> Result<()>,
) -> Result<()> {
    let mut failed = Vec::new();
    for text in containers {
        if let Err(error) = find(home, text).and_then(|container| action(&container)) {
            failed.push(error);
        }
    }
    let Some(last) = failed.pop() else {
        return Ok(());
    };
    for error in failed {
        eprintln!("cloison: {error:#}");
    }
    Err(last)
}

/// The runtime for calls to agents: one thread, since there is one thing to do.
pub fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the asynchronous runtime")
}
