//! `run`: create, start, and, in the foreground, wait and delete.

use anyhow::Result;
use cloison_sandbox::{Home, RawTerminal, Signals};
use nix::sys::signal::Signal;
use oci_spec::runtime::Process;

use crate::args::Run;
use crate::container::Container;
use crate::create::{Made, make};
use crate::delete::destroy;
use crate::handed::Handed;
use crate::log::Log;
use crate::start::start;
use crate::{fork, runtime};

/// Runs a container; the status is its own.
pub fn run(home: &Home, log: &Log, systemd: bool, args: &Run, handed: Handed) -> Result<u8> {
    let made = make(home, log, systemd, &args.create, args.detach, handed)?;
    let Made { container, monitor } = made;
    let begun = raw_terminal(args, &container).and_then(|raw| {
        start(home, log, &args.create.container)?;
        Ok(raw)
    });
    let raw = match begun {
        Ok(raw) => raw,
        Err(error) => {
            let _ = destroy(&container, log);
            return Err(error);
        }
    };
    if args.detach {
        return Ok(0);
    }
    let status = wait(monitor)?;
    drop(raw);
    if !args.keep {
        destroy(&container, log)?;
    }
    Ok(status)
}

/// The caller's terminal, for a container in the foreground that has one; without, the caller's stays as it is.
fn raw_terminal(args: &Run, container: &Container) -> Result<Option<RawTerminal>> {
    if args.detach || args.create.console_socket.is_some() {
        return Ok(None);
    }
    let spec = container.spec()?;
    let terminal = spec.process().as_ref().and_then(Process::terminal);
    Ok((terminal == Some(true))
        .then(RawTerminal::enter)
        .transpose()?)
}

/// Passes signals on to the monitor, which passes them on, until it has ended.
fn wait(monitor: fork::Child) -> Result<u8> {
    let pid = monitor.pid;
    runtime()?.block_on(async {
        let mut signals = Signals::of_a_front_end()?;
        let ended = tokio::task::spawn_blocking(move || monitor.wait());
        tokio::pin!(ended);
        loop {
            tokio::select! {
                biased;
                ended = &mut ended => return ended?,
                event = signals.next() => {
                    let signal = match event {
                        cloison_sandbox::Event::Forward(number) => Signal::try_from(number).ok(),
                        cloison_sandbox::Event::Resized => Some(Signal::SIGWINCH),
                    };
                    // It may end at the same moment.
                    let _ = nix::sys::signal::kill(pid, signal);
                }
            }
        }
    })
}
