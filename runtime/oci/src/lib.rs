//! The OCI front door: runc's command line on top of a sandbox. A caller that knows runc (docker, podman, containerd's shim for runc)
//! finds every verb, flag, file and message that it relies on; behind each of them is a VM.
//!
//! A container's init and each exec are stood for on the host by a process of ours (`monitor`, `exec`): its pid is what the caller
//! gets, its life is the process's in the guest, and its exit status too.

mod args;
mod capabilities;
mod channel;
mod console;
mod container;
mod create;
mod delete;
mod events;
mod exec;
mod features;
mod fork;
mod handed;
mod hooks;
mod join;
mod kill;
mod list;
mod log;
mod monitor;
mod network;
mod pause;
mod pod;
mod ps;
mod rendezvous;
mod run;
mod standin;
mod start;
mod state;
mod template;
mod translate;
mod update;

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use clap::error::ErrorKind;
use cloison_sandbox::Home;

use crate::args::{Cli, Verb};
use crate::handed::Handed;
use crate::log::Log;

/// The name by which the executable is this front door.
pub const NAME: &str = "cloison-runtime";
/// Status of a command that failed, as runc has it.
const FAILED: u8 = 1;
/// Status of an exec that did not come to run anything, as runc has it.
const EXEC_FAILED: u8 = 255;

/// The OCI front door.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help is what was asked for; a reader that has gone away is none of our business.
            let _ = error.print();
            return match error.kind() {
                ErrorKind::DisplayHelp => ExitCode::SUCCESS,
                _ => ExitCode::from(FAILED),
            };
        }
    };
    let handed = Handed::take(cli.verb.as_ref());
    if cli.version {
        print(features::version());
        return ExitCode::SUCCESS;
    }
    let log = Log::new(&cli);
    log.debug(format!("{:?}", cli.verb));
    let failed = match cli.verb {
        Some(Verb::Exec(_)) => EXEC_FAILED,
        _ => FAILED,
    };
    match handed.and_then(|handed| serve(cli, &log, handed)) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            log.fatal(&error);
            ExitCode::from(failed)
        }
    }
}

fn serve(cli: Cli, log: &Log, handed: Handed) -> Result<u8> {
    let root = std::path::absolute(&cli.root)
        .with_context(|| format!("cannot use the directory {}", cli.root.display()))?;
    // Of a container nothing is there. Templates of guests are, for all roots.
    let data = std::env::var_os("CLOISON_DATA_DIR");
    let data = data.unwrap_or_else(|| Home::DEFAULT_DATA.into());
    let home = Home::new(&root, data);
    let Some(verb) = cli.verb else {
        anyhow::bail!("no command was given: see {NAME} --help");
    };
    let done = match verb {
        Verb::Create(create) => create::create(&home, log, cli.systemd_cgroup, &create, handed),
        Verb::Run(run) => return run::run(&home, log, cli.systemd_cgroup, &run, handed),
        Verb::Start(id) => start::start(&home, log, &id.container),
        Verb::State(id) => state::state(&home, &id.container),
        Verb::Kill(kill) => kill::kill(&home, &kill),
        Verb::Delete(delete) => delete::delete(&home, log, &delete),
        Verb::Exec(exec) => return exec::exec(&home, log, &exec, handed),
        Verb::Ps(ps) => ps::ps(&home, &ps),
        Verb::List(list) => list::list(&home, &list),
        Verb::Pause(id) => pause::pause(&home, &id.container),
        Verb::Resume(id) => pause::resume(&home, &id.container),
        Verb::Update(update) => update::update(&home, log, &update),
        Verb::Events(events) => events::events(&home, &events),
        Verb::Features => features::features(),
        Verb::Spec(spec) => template::spec(&spec),
        Verb::Checkpoint(_) | Verb::Restore(_) => Err(anyhow::anyhow!(
            "checkpoint and restore are not supported: a container's processes are inside its VM, where CRIU cannot reach them"
        )),
    };
    done.map(|()| 0)
}

/// Prints a line of what was asked for. A reader that has gone away is none of our business.
fn print(line: impl std::fmt::Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// The runtime for calls to agents: one thread, since there is one thing to do.
fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the asynchronous runtime")
}
