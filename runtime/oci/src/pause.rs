//! `pause` and `resume`: the guest's kernel freezes the container's cgroup. The VM itself runs on.

use anyhow::{Result, bail};
use cloison_sandbox::Home;

use crate::container::{Container, Phase, Status};
use crate::runtime;

/// Suspends a container's processes.
pub fn pause(home: &Home, id: &str) -> Result<()> {
    change(home, id, Phase::Paused)
}

/// Lets a container's processes go on.
pub fn resume(home: &Home, id: &str) -> Result<()> {
    change(home, id, Phase::Running)
}

fn change(home: &Home, id: &str, phase: Phase) -> Result<()> {
    let container = Container::find(home, id)?;
    let _verb = container.lock()?;
    let (status, mut record) = container.status()?;
    match (status, phase) {
        (Status::Running, Phase::Paused) | (Status::Paused, Phase::Running) => {}
        (_, Phase::Running) => bail!("container not paused"),
        (status, _) => bail!("container not running: it is {}", status.word()),
    }
    runtime()?.block_on(async {
        let agent = container.vm(&record).connect_agent()?;
        agent.hello().await?;
        match phase {
            Phase::Paused => agent.pause(id).await?,
            _ => agent.resume(id).await?,
        }
        anyhow::Ok(())
    })?;
    record.phase = phase;
    container.save(&record)
}
