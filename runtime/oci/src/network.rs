//! The network namespace that a container's processes on the host are in.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns, unshare};

/// Why a container without a network namespace of its own is refused.
pub const HOSTS_NETWORK: &str = "the container would have the host's network, which a VM cannot have: give it a network of its own";

/// Where it comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// Made for the container; it is gone with the container's processes.
    Fresh,
    /// The caller's.
    At(PathBuf),
}

impl Network {
    /// Refuses the namespace that this process is in, or the host's first one: its interfaces are the host's own, and what would come
    /// in through them would go to the guest.
    ///
    /// # Errors
    /// When it is one of these, or there is no such namespace.
    pub fn refuse_the_hosts(&self) -> Result<()> {
        let Self::At(path) = self else { return Ok(()) };
        let theirs = identity(path)?;
        for hosts in ["/proc/self/ns/net", "/proc/1/ns/net"] {
            if identity(Path::new(hosts)).is_ok_and(|hosts| hosts == theirs) {
                bail!("{HOSTS_NETWORK}");
            }
        }
        Ok(())
    }

    /// Whether it is the namespace at this path.
    ///
    /// # Errors
    /// When one of the two is not there.
    pub fn is_at(&self, path: &Path) -> Result<bool> {
        match self {
            Self::Fresh => Ok(false),
            Self::At(ours) => Ok(identity(ours)? == identity(path)?),
        }
    }

    /// Moves this process, which has no other thread, into it.
    ///
    /// # Errors
    /// When there is no such namespace.
    pub fn enter(&self) -> Result<()> {
        match self {
            Self::Fresh => unshare(CloneFlags::CLONE_NEWNET)
                .context("cannot make a network namespace (are you root?)"),
            Self::At(path) => enter(path),
        }
    }
}

fn identity(path: &Path) -> Result<(u64, u64)> {
    let found = fs::metadata(path).map(|found| (found.dev(), found.ino()));
    found.with_context(|| format!("cannot find the network namespace {}", path.display()))
}

/// Moves this process, which has no other thread, into the network namespace at `path`.
///
/// # Errors
/// When there is none.
pub fn enter(path: &Path) -> Result<()> {
    let failed = || format!("cannot enter the network namespace {}", path.display());
    let namespace = File::open(path).with_context(failed)?;
    setns(namespace, CloneFlags::CLONE_NEWNET).with_context(failed)
}
