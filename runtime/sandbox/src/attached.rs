//! A process in a guest and the process on the host that stands for it: signals go in, a terminal's size goes in, and the exit status
//! comes out when the last byte of output has.

use cloison_agent_api::agent::TtySize;

use crate::{Agent, AgentError, Error, Event, ExitStatus, Failure, Wiring};

/// A process that has been made.
pub struct Attached<'a> {
    /// The agent.
    pub agent: &'a Agent,
    /// The container's ID.
    pub container: &'a str,
    /// Empty for the container's init.
    pub exec_id: &'a str,
    /// The size of its terminal on the host; `None` for a process without one.
    pub size: &'a dyn Fn() -> Option<TtySize>,
}

impl Attached<'_> {
    /// Waits until the process has ended and its output has arrived.
    ///
    /// # Errors
    /// When the agent is lost.
    pub async fn ended(&self, wiring: Wiring) -> Result<ExitStatus, Error> {
        let status = self.agent.wait(self.container, self.exec_id).await?;
        wiring.finished().await?;
        Ok(status)
    }

    /// Passes on what happened to the host's process. A process that has just ended takes no signal, and a lost agent shows where its
    /// answer is waited for.
    pub async fn pass_on(&self, event: Event) {
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
        match (self.size)() {
            Some(size) => self.agent.resize(self.container, self.exec_id, size).await,
            None => Ok(()),
        }
    }
}
