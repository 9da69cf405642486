//! `state`: what a container is doing, as JSON.

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::Result;
use cloison_sandbox::Home;
use serde::Serialize;
use time::format_description::well_known::Rfc3339;

use crate::container::{Container, OCI_VERSION, Status};
use crate::print;

/// A container as runc's `state` and `list` print it.
#[derive(Debug, Serialize)]
pub struct Shown {
    #[serde(rename = "ociVersion")]
    oci_version: &'static str,
    pub id: String,
    pub pid: i32,
    pub status: Status,
    pub bundle: PathBuf,
    rootfs: PathBuf,
    pub created: String,
    #[serde(skip_serializing_if = "HashMap::is_empty")]
    annotations: HashMap<String, String>,
    /// The user who made it: only root can.
    pub owner: &'static str,
}

impl Shown {
    /// # Errors
    /// When what is on disk of it cannot be read.
    pub fn of(container: &Container) -> Result<Self> {
        let (status, record) = container.status()?;
        let spec = container.spec()?;
        Ok(Self {
            oci_version: OCI_VERSION,
            id: container.id().to_string(),
            pid: if status == Status::Stopped {
                0
            } else {
                record.pid
            },
            status,
            bundle: record.bundle,
            rootfs: record.rootfs,
            created: record.created.format(&Rfc3339)?,
            annotations: spec.annotations().clone().unwrap_or_default(),
            owner: "root",
        })
    }
}

/// Prints a container's state.
pub fn state(home: &Home, id: &str) -> Result<()> {
    let shown = Shown::of(&Container::find(home, id)?)?;
    print(serde_json::to_string_pretty(&shown)?);
    Ok(())
}
