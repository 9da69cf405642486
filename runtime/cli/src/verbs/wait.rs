//! `cloison wait`.

use anyhow::{Result, bail};
use cloison_sandbox::Home;

use crate::args::Containers;
use crate::container::{Container, Life, State};
use crate::verbs::{each, print, runtime};

/// Prints each container's exit code when it has stopped.
pub fn wait(home: &Home, args: &Containers) -> Result<()> {
    let runtime = runtime()?;
    each(home, &args.containers, |container| {
        // The agent is asked as well: a container that is removed when it stops leaves nobody else to say how it ended.
        let heard = match container.life()? {
            (Life::Running, _) => runtime.block_on(async {
                let agent = container.sandbox().connect_agent()?;
                anyhow::Ok(agent.wait(container.id().as_str(), "").await?.code)
            }),
            _ => Ok(0),
        };
        print(exit_code(container, heard)?);
        Ok(())
    })
}

fn exit_code(container: &Container, heard: Result<u8>) -> Result<u8> {
    let Some(record) = container.wait()? else {
        return heard;
    };
    match record.state {
        State::Exited { code, .. } => Ok(code),
        _ => bail!(
            "container {} died without an exit code: its monitor was killed",
            record.name
        ),
    }
}
