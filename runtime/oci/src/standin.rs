//! What every process that stands for one in a guest does while that runs: it passes signals and sizes on, and takes its exit status.

use anyhow::Result;
use cloison_agent_api::agent::TtySize;
use cloison_sandbox::{Attached, ExitStatus, Signals, Wiring};

use crate::console::Console;

/// The terminal that a process's size comes from.
pub enum Sizes {
    /// It has none.
    None,
    /// The caller's, of which this process has the near end.
    Console(Console),
    /// The one that this process was started with.
    Inherited([std::os::fd::OwnedFd; 3]),
}

impl Sizes {
    /// The size it has.
    pub fn size(&self) -> Option<TtySize> {
        match self {
            Self::None => None,
            Self::Console(console) => console.size(),
            Self::Inherited(stdio) => crate::console::inherited_size(stdio),
        }
    }
}

/// Waits until the process has ended and its output has arrived.
///
/// # Errors
/// When the agent is lost.
pub async fn wait(
    attached: &Attached<'_>,
    wiring: Wiring,
    signals: &mut Signals,
) -> Result<ExitStatus, cloison_sandbox::Error> {
    let ended = attached.ended(wiring);
    tokio::pin!(ended);
    loop {
        tokio::select! {
            biased;
            ended = &mut ended => return ended,
            event = signals.next() => attached.pass_on(event).await,
        }
    }
}
