//! From what a person types to the container that is meant.

use std::fs;
use std::io;

use anyhow::{Context, Result, bail};
use cloison_sandbox::{Home, Id, Name};

use super::Container;

/// Every container there is, in no order.
///
/// # Errors
/// When the run directory cannot be read.
pub fn all(home: &Home) -> Result<Vec<Container>> {
    let dir = home.sandboxes();
    let entries = match fs::read_dir(&dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => {
            other.with_context(|| format!("cannot list the containers in {}", dir.display()))?
        }
    };
    let mut containers = Vec::new();
    for entry in entries {
        let entry =
            entry.with_context(|| format!("cannot list the containers in {}", dir.display()))?;
        if let Some(Ok(id)) = entry.file_name().to_str().map(str::parse::<Id>) {
            containers.push(Container {
                home: home.clone(),
                id,
            });
        }
    }
    Ok(containers)
}

/// Finds a container by its name, its ID, or the start of its ID when no other has the same.
///
/// # Errors
/// When there is none, or more than one.
pub fn find(home: &Home, text: &str) -> Result<Container> {
    if let Ok(name) = text.parse::<Name>()
        && let Ok(target) = fs::read_link(home.names().join(name.as_str()))
        && let Some(Ok(id)) = target.to_str().map(str::parse::<Id>)
        && home.sandbox(&id).exists()
    {
        return Ok(Container {
            home: home.clone(),
            id,
        });
    }
    let mut matching = all(home)?;
    matching.retain(|container| !text.is_empty() && container.id.as_str().starts_with(text));
    if let Some(exact) = matching
        .iter()
        .position(|container| container.id.as_str() == text)
    {
        return Ok(matching.swap_remove(exact));
    }
    match (matching.pop(), matching.len()) {
        (Some(container), 0) => Ok(container),
        (Some(_), others) => bail!(
            "\"{text}\" is the start of more than one container's ID ({}): give more of it",
            others + 1
        ),
        (None, _) => bail!("no such container: {text}"),
    }
}
