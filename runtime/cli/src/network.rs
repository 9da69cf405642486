//! `--network`: where a container's network comes from.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use cloison_net::Namespace;

/// `--network`'s value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkArg {
    /// Loopback only.
    None,
    /// The interfaces of a network namespace that somebody prepared.
    Namespace(PathBuf),
}

impl FromStr for NetworkArg {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        if let Some(path) = text.strip_prefix("ns:") {
            if path.is_empty() {
                bail!("give the namespace's path: ns:PATH");
            }
            return Ok(Self::Namespace(path.into()));
        }
        match text {
            "none" => Ok(Self::None),
            "host" => bail!(
                "a container in a VM cannot be on the host's network: its kernel is another; use -p for the ports it serves"
            ),
            _ => bail!("there is no network {text}"),
        }
    }
}

impl NetworkArg {
    /// Opens the namespace the guest's interfaces are in.
    ///
    /// # Errors
    /// When it is none.
    pub fn namespace(&self) -> Result<Option<Namespace>> {
        match self {
            Self::None => Ok(None),
            Self::Namespace(path) => {
                let namespace = Namespace::open(path).context("cannot use the network")?;
                Ok(Some(namespace))
            }
        }
    }
}
