//! `cloison kill` and `cloison stop`.

use std::time::Duration;

use anyhow::{Result, bail};
use cloison_sandbox::{Agent, Failure, Home};
use nix::libc;

use crate::args::{Kill, Stop};
use crate::container::{Container, Life};
use crate::verbs::{each, print, runtime};

/// Sends a signal to each container's process.
pub fn kill(home: &Home, args: &Kill) -> Result<()> {
    let runtime = runtime()?;
    each(home, &args.on.containers, |container| {
        require_running(container)?;
        let sent = runtime.block_on(async {
            let agent = container.sandbox().connect_agent()?;
            agent
                .signal(container.id().as_str(), "", args.signal, false)
                .await?;
            anyhow::Ok(())
        });
        match sent {
            // A guest that does not answer can still be ended.
            Err(_) if args.signal == libc::SIGKILL => container.sandbox().kill()?,
            other => other?,
        }
        if args.signal == libc::SIGKILL {
            container.wait()?;
        }
        print(container.id().short());
        Ok(())
    })
}

fn require_running(container: &Container) -> Result<()> {
    match container.life()? {
        (Life::Running, _) => Ok(()),
        (_, record) => bail!("container {} is not running", record.name),
    }
}

/// Stops each container.
pub fn stop(home: &Home, args: &Stop) -> Result<()> {
    let runtime = runtime()?;
    each(home, &args.on.containers, |container| {
        let (life, record) = container.life()?;
        if matches!(life, Life::Running) {
            let patience = Duration::from_secs(args.time.into());
            let stopped = runtime.block_on(async {
                let agent = container.sandbox().connect_agent()?;
                ask_to_stop(
                    &agent,
                    container.id().as_str(),
                    record.stop_signal,
                    patience,
                )
                .await
            });
            if stopped.is_err() {
                // Either it has just ended, or only the end of its VM will end it.
                container.sandbox().kill()?;
            }
            container.wait()?;
        }
        print(container.id().short());
        Ok(())
    })
}

async fn ask_to_stop(agent: &Agent, id: &str, signal: i32, patience: Duration) -> Result<()> {
    match agent.signal(id, "", signal, false).await {
        Err(error) if error.failure == Failure::NotFound => return Ok(()),
        other => other?,
    }
    if let Ok(ended) = tokio::time::timeout(patience, agent.wait(id, "")).await {
        ended?;
    } else {
        agent.signal(id, "", libc::SIGKILL, false).await?;
    }
    Ok(())
}
