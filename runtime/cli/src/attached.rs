//! A process in a guest and the front end it runs in the foreground of: signals go in, the terminal's size goes in, the exit
//! status comes out when the last byte of output has.

use std::io;
use std::os::fd::AsFd;

use anyhow::Result;
use cloison_sandbox::{Attached, Error, ExitStatus, HostStream, Signals, Streams, Wiring};

use crate::args::ProcessOptions;

/// How many requests to end a front end passes on before it ends without the container's consent, as docker's does.
const PATIENCE: u32 = 3;

/// How it ended for the front end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The process ended.
    Exited(ExitStatus),
    /// The person insisted; the signal that did it.
    Abandoned(i32),
}

/// Passes signals on until the process has ended and its output has arrived.
///
/// # Errors
/// When the agent is lost.
pub async fn wait(
    attached: &Attached<'_>,
    wiring: Wiring,
    signals: &mut Signals,
) -> Result<Outcome> {
    let mut asked = 0;
    let ended = attached.ended(wiring);
    tokio::pin!(ended);
    loop {
        tokio::select! {
            biased;
            ended = &mut ended => return Ok(Outcome::Exited(ended.map_err(agents_own)?)),
            event = signals.next() => {
                if let Some(number) = event.insists() {
                    asked += 1;
                    if asked >= PATIENCE {
                        return Ok(Outcome::Abandoned(number));
                    }
                }
                attached.pass_on(event).await;
            }
        }
    }
}

/// The agent's error as such, for who wants to know what kind of failure it is.
fn agents_own(error: Error) -> anyhow::Error {
    match error {
        Error::Agent(error) => error.into(),
        other => other.into(),
    }
}

/// The front end's own stdio, as far as the process is to have it.
///
/// # Errors
/// When a descriptor of ours cannot be used.
pub fn foreground_streams(options: &ProcessOptions) -> Result<Streams> {
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    let stdin = options
        .interactive
        .then(|| HostStream::input(stdin.as_fd()))
        .transpose()?;
    let stderr = (!options.tty)
        .then(|| HostStream::output(stderr.as_fd()))
        .transpose()?;
    Ok(Streams {
        stdin,
        stdout: Some(HostStream::output(stdout.as_fd())?),
        stderr,
        terminal: options.tty,
        ..Streams::default()
    })
}
