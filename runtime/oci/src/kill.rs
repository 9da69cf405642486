//! `kill`: a signal for a container's init, or for all of its processes.

use anyhow::{Result, bail};
use cloison_sandbox::{AgentError, Failure, Home};

use crate::args::Kill;
use crate::container::{Container, Status};
use crate::runtime;

/// Sends a signal.
pub fn kill(home: &Home, args: &Kill) -> Result<()> {
    let container = Container::find(home, &args.container)?;
    let (status, record) = container.status()?;
    match status {
        // All of its processes have got it: there are none.
        Status::Stopped if args.all => return Ok(()),
        Status::Stopped => bail!("container not running"),
        Status::Creating => bail!("container is being created"),
        Status::Created | Status::Running | Status::Paused => {}
    }
    let sent = runtime()?.block_on(async {
        let agent = container.vm(&record).connect_agent()?;
        agent.hello().await?;
        let id = container.id().as_str();
        agent.signal(id, "", args.signal, args.all).await?;
        anyhow::Ok(())
    });
    match sent {
        Err(error) if args.signal == nix::libc::SIGKILL && is_lost(&error) => {
            // A guest that does not answer is as good as its container.
            container.end()
        }
        // Its process has ended, which is all that could be asked for; its VM may be there a little longer.
        Err(error) if args.signal == nix::libc::SIGKILL && has_ended(&error) => Ok(()),
        other => other,
    }
}

fn has_ended(error: &anyhow::Error) -> bool {
    let agent = error.downcast_ref::<AgentError>();
    agent.is_some_and(|agent| agent.failure == Failure::NotFound)
}

fn is_lost(error: &anyhow::Error) -> bool {
    let agent = error.downcast_ref::<AgentError>();
    agent.is_none_or(|agent| agent.failure == Failure::Other)
}
