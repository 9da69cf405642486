//! `delete`: nothing of a container is left.

use anyhow::{Result, bail};
use cloison_sandbox::Home;

use crate::args::Delete;
use crate::container::{Container, Status};
use crate::hooks;
use crate::log::Log;

/// Deletes a container.
pub fn delete(home: &Home, log: &Log, args: &Delete) -> Result<()> {
    let container = match Container::find(home, &args.container) {
        Err(_) if args.force => return Ok(()),
        other => other?,
    };
    let _verb = container.lock()?;
    match container.status() {
        // Whatever is left of a container that was never finished can go.
        Err(_) if args.force => {}
        Err(error) => return Err(error),
        Ok((Status::Stopped | Status::Created, _)) => {}
        Ok((status, _)) if !args.force => bail!(
            "cannot delete container {} that is not stopped: {}",
            container.id(),
            status.word()
        ),
        Ok(_) => {}
    }
    destroy(&container, log)
}

/// Ends a container, runs its last hooks and removes all there is of it.
///
/// # Errors
/// Naming what could not be removed; it can be tried again.
pub fn destroy(container: &Container, log: &Log) -> Result<()> {
    container.end()?;
    if let (Ok(record), Ok(spec)) = (container.record(), container.spec()) {
        let poststop = spec
            .hooks()
            .as_ref()
            .and_then(|hooks| hooks.poststop().clone());
        let state = container.state(Status::Stopped, &record, &spec);
        for error in hooks::run_all("poststop", poststop.as_ref(), &state) {
            log.warn(format!("{error:#}"));
        }
    }
    container.remove()
}
