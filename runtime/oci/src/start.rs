//! `start`: the container's process runs.

use anyhow::{Result, bail};
use cloison_sandbox::Home;

use crate::container::{Container, Phase, Status};
use crate::log::Log;
use crate::{hooks, rendezvous, runtime};

/// Starts a created container's process.
pub fn start(home: &Home, log: &Log, id: &str) -> Result<()> {
    let container = Container::find(home, id)?;
    let _verb = container.lock()?;
    let (status, mut record) = container.status()?;
    match status {
        Status::Created => {}
        Status::Stopped => bail!("cannot start a container that has stopped"),
        Status::Creating => bail!("cannot start a container that is being created"),
        Status::Running | Status::Paused => bail!("cannot start an already running container"),
    }
    // The network of all containers in a VM is that of the first.
    rendezvous::await_ready(container.vm(&record).dir())?;
    runtime()?.block_on(async {
        let agent = container.vm(&record).connect_agent()?;
        agent.hello().await?;
        agent.start(id).await?;
        anyhow::Ok(())
    })?;
    record.phase = Phase::Running;
    container.save(&record)?;
    let spec = container.spec()?;
    let poststart = spec
        .hooks()
        .as_ref()
        .and_then(|hooks| hooks.poststart().clone());
    let state = container.state(Status::Running, &record, &spec);
    if let Err(error) = hooks::run("poststart", poststart.as_ref(), &state) {
        if let Err(error) = container.end() {
            log.warn(format!("{error:#}"));
        }
        return Err(error);
    }
    Ok(())
}
