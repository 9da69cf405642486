//! A process in a guest and the front end it runs in the foreground of: signals go in, the terminal's size goes in, the exit
//! status comes out when the last byte of output has.

use std::io;
use std::os::fd::AsFd;

use anyhow::Result;
use cloison_sandbox::{Agent, AgentError, ExitStatus, Failure, HostStream, Streams, Wiring};

use crate::args::ProcessOptions;
use crate::signals::{Event, Signals};
use crate::terminal;

/// How many requests to end a front end passes on before it ends without the container's consent, as docker's does.
const PATIENCE: u32 = 3;

/// A process that has been started.
pub struct Attached<'a> {
    pub agent: &'a Agent,
    pub container: &'a str,
    /// Empty for the container's init.
    pub exec_id: &'a str,
    pub terminal: bool,
}

/// How it ended for the front end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The process ended.
    Exited(ExitStatus),
    /// The person insisted; the signal that did it.
    Abandoned(i32),
}

impl Attached<'_> {
    /// Passes signals on until the process has ended and its output has arrived.
    ///
    /// # Errors
    /// When the agent is lost.
    pub async fn wait(&self, wiring: Wiring, signals: &mut Signals) -> Result<Outcome> {
        let mut status = None;
        let mut asked = 0;
        let process = self.agent.wait(self.container, self.exec_id);
        let output = async {
            let ended = process.await;
            match ended {
                Ok(ended) => {
                    status = Some(ended);
                    wiring
                        .finished()
                        .await
                        .map(|()| ended)
                        .map_err(anyhow::Error::from)
                }
                Err(lost) => Err(lost.into()),
            }
        };
        tokio::pin!(output);
        loop {
            tokio::select! {
                biased;
                ended = &mut output => return ended.map(Outcome::Exited),
                event = signals.next() => {
                    if let Some(number) = event.insists() {
                        asked += 1;
                        if asked >= PATIENCE {
                            return Ok(Outcome::Abandoned(number));
                        }
                    }
                    self.pass_on(event).await;
                }
            }
        }
    }

    /// A process that has just ended takes no signal, and a lost agent shows where its answer is waited for.
    async fn pass_on(&self, event: Event) {
        let passed = match event {
            Event::Forward(number) => {
                self.agent
                    .signal(self.container, self.exec_id, number, false)
                    .await
            }
            Event::Resized => self.resize().await,
        };
        if let Err(error) = passed
            && error.failure != Failure::NotFound
        {
            tracing::debug!("{error}");
        }
    }

    async fn resize(&self) -> Result<(), AgentError> {
        match terminal::size().filter(|_| self.terminal) {
            Some(size) => self.agent.resize(self.container, self.exec_id, size).await,
            None => Ok(()),
        }
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
    })
}
