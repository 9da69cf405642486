//! A monitor's work for a container in the VM of another: it makes the container in the guest that runs, and stands for its init. The VM
//! goes on without it; what is left of the container in the guest goes with its lifeline, however this process ends.

use std::os::unix::net::UnixStream;

use anyhow::{Context, Result};
use cloison_sandbox::{Agent, Error, ExitStatus, Failure, Joined, Lifeline, Sandbox, Signals};

use crate::channel::{Order, ProcessEnd};
use crate::container::{Container, Record};
use crate::monitor::{Ready, Told};
use crate::pod::Membership;

/// Status of a container whose VM has ended: it was killed with it, as by the end of a PID namespace.
const KILLED: u8 = 128 + nix::libc::SIGKILL as u8;

/// The container's life.
///
/// # Errors
/// When it cannot be made.
pub async fn run(
    mut ready: Ready,
    membership: &Membership,
    container: &Container,
    record: &Record,
    channel: UnixStream,
    told: &mut Told,
) -> Result<ExitStatus> {
    let mut signals = Signals::of_a_stand_in()?;
    let mut channel = ProcessEnd::new(channel)?;
    let vm = membership.vm();
    let agent = reach(&vm, membership).await?;
    channel.expect(&Order::Charged).await?;
    // The hooks of the host have run.
    channel.expect(&Order::GoOn).await?;
    let lifeline = Lifeline::attach(vm.control()?)?;
    let wiring = std::mem::take(&mut ready.streams).attach(vm.control()?)?;
    let joined = Joined {
        namespaces: membership.namespaces.clone(),
        lifeline: &lifeline,
    };
    forget(&agent, &ready.id).await?;
    ready
        .make(
            &agent,
            &wiring,
            Some(joined),
            container,
            record,
            &mut channel,
        )
        .await?;
    told.verb = None;
    let lived = ready
        .stand_in(&agent, wiring, &mut channel, &mut signals, told)
        .await;
    match lived {
        Ok(status) => {
            // Whatever it has left running. A guest that is gone has nothing.
            if let Err(error) = forget(&agent, &ready.id).await {
                ready.log.debug(format!("{error:#}"));
            }
            Ok(status)
        }
        Err(error) if is_lost(&error) => {
            let owner = membership.owner.id();
            ready.log.warn(format!(
                "the container has ended with the VM that it was in, that of container {owner}: {error:#}"
            ));
            Ok(ExitStatus {
                code: KILLED,
                oom_killed: false,
            })
        }
        Err(error) => Err(error),
    }
}

async fn reach(vm: &Sandbox, membership: &Membership) -> Result<Agent> {
    let owner = membership.owner.id();
    let failed =
        || format!("cannot reach the VM of container {owner}, which the container is to join");
    let agent = vm.connect_agent().with_context(failed)?;
    agent
        .hello()
        .await
        .map_err(Error::from)
        .with_context(failed)?;
    Ok(agent)
}

/// Removes from the guest a container that has ended, or that of a monitor which was killed a moment ago.
async fn forget(agent: &Agent, id: &str) -> Result<()> {
    match agent.delete(id).await {
        Err(error) if error.failure != Failure::NotFound => Err(Error::from(error).into()),
        _ => Ok(()),
    }
}

/// Whether it is the guest that is gone, and not something that it said.
fn is_lost(error: &anyhow::Error) -> bool {
    let agent = error.downcast_ref::<Error>().and_then(Error::agent);
    agent.is_some_and(|agent| agent.failure == Failure::Other)
}
