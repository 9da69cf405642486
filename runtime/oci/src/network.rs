//! The network namespace that a container's processes on the host are in.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns, unshare};

/// Where it comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// Made for the container; it is gone with the container's processes.
    Fresh,
    /// The caller's.
    At(PathBuf),
}

impl Network {
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

/// Moves this process, which has no other thread, into the network namespace at `path`.
///
/// # Errors
/// When there is none.
pub fn enter(path: &Path) -> Result<()> {
    let failed = || format!("cannot enter the network namespace {}", path.display());
    let namespace = File::open(path).with_context(failed)?;
    setns(namespace, CloneFlags::CLONE_NEWNET).with_context(failed)
}
