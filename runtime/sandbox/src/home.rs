//! Where cloison keeps what it knows: a run directory whose content ends with the machine's uptime, and a data directory whose
//! content lasts. Both can be moved.

use std::path::{Path, PathBuf};

use cloison_agent_api::{TEMPLATE_ARGUMENT, TEMPLATE_READY};
use cloison_vmm::Template;

use crate::Id;

/// The two roots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home {
    run: PathBuf,
    data: PathBuf,
}

impl Home {
    /// Run directory when nobody says otherwise.
    pub const DEFAULT_RUN: &str = "/run/cloison";
    /// Data directory when nobody says otherwise.
    pub const DEFAULT_DATA: &str = "/var/lib/cloison";

    /// Uses the given roots; neither needs to exist yet.
    pub fn new(run: impl Into<PathBuf>, data: impl Into<PathBuf>) -> Self {
        Self {
            run: run.into(),
            data: data.into(),
        }
    }

    /// The data directory.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// The run directory.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// Holds one directory per sandbox.
    pub fn sandboxes(&self) -> PathBuf {
        self.run.join("sandboxes")
    }

    /// A sandbox's directory under the run directory.
    pub fn sandbox(&self, id: &Id) -> PathBuf {
        self.sandboxes().join(id.as_str())
    }

    /// Holds one directory per container that keeps something on disk.
    pub fn containers(&self) -> PathBuf {
        self.data.join("containers")
    }

    /// A container's directory under the data directory: its writable layer and its log.
    pub fn container(&self, id: &Id) -> PathBuf {
        self.containers().join(id.as_str())
    }

    /// Holds the templates of guests.
    pub fn templates(&self) -> PathBuf {
        self.data.join("templates")
    }

    /// Has a VM start from a template of an agent that is ready, and makes one where there is none.
    pub fn template(&self) -> Template {
        Template {
            dir: self.templates(),
            word: TEMPLATE_ARGUMENT.into(),
            ready: TEMPLATE_READY.into(),
        }
    }

    /// Holds one link per container name, pointing at the ID.
    pub fn names(&self) -> PathBuf {
        self.run.join("names")
    }
}
