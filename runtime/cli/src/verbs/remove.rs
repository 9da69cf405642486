//! `cloison rm` and `cloison prune`: after either, nothing of a container is left.

use std::fs;
use std::io::{self, Write};

use anyhow::{Context, Result, bail};
use cloison_image::Store;
use cloison_sandbox::Home;

use crate::args::{Prune, Rm};
use crate::container::{Life, SANDBOX_LINK, all};
use crate::network;
use crate::verbs::{each, print};

/// Removes each container.
pub fn rm(home: &Home, args: &Rm) -> Result<()> {
    each(home, &args.on.containers, |container| {
        // One that is damaged, or half removed, is removed whole.
        if let Ok((Life::Running | Life::Creating, record)) = container.life()
            && !args.force
        {
            bail!(
                "container {} is running: stop it first (cloison stop), or remove it with -f",
                record.name
            );
        }
        container.remove()?;
        print(container.id().short());
        Ok(())
    })
}

/// Removes every container that does not run, and what crashes left.
pub fn prune(home: &Home, args: &Prune) -> Result<()> {
    if !args.force && !confirmed()? {
        return Ok(());
    }
    let mut failed = Vec::new();
    for container in all(home)? {
        if matches!(container.life(), Ok((Life::Running | Life::Creating, _))) {
            continue;
        }
        match container.remove() {
            Ok(()) => print(container.id().short()),
            Err(error) => failed.push(error),
        }
    }
    failed.extend(prune_orphans(home).err());
    failed.extend(network::prune(home).err());
    failed.extend(prune_templates(home).err());
    failed.extend(Store::open(home.data()).err().map(anyhow::Error::from));
    let Some(last) = failed.pop() else {
        return Ok(());
    };
    for error in failed {
        eprintln!("cloison: {error:#}");
    }
    Err(last)
}

fn confirmed() -> Result<bool> {
    eprint!("This removes all stopped containers. Go on? [y/N] ");
    io::stderr().flush().context("cannot ask")?;
    let mut answer = String::new();
    io::stdin()
        .read_line(&mut answer)
        .context("cannot read the answer")?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// Removes all templates: the next VM of each kind makes another.
fn prune_templates(home: &Home) -> Result<()> {
    let dir = home.templates();
    match fs::remove_dir_all(&dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Removes writable layers whose containers are gone: the run directory is empty after a reboot of the host, the data directory
/// is not.
fn prune_orphans(home: &Home) -> Result<()> {
    let dir = home.containers();
    let entries = match fs::read_dir(&dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.with_context(|| format!("cannot list {}", dir.display()))?,
    };
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot list {}", dir.display()))?;
        // The sandbox's directory is made before this one and removed after it.
        let link = entry.path().join(SANDBOX_LINK);
        if link.is_symlink() && !link.exists() {
            cloison_image::remove_tree(&entry.path())
                .with_context(|| format!("cannot remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}
