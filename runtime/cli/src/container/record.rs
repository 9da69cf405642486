//! A container's record: what it was asked to be and what became of it.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use cloison_sandbox::{Id, Name};
use cloison_vmm::{Engine, Origin};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::network::NetworkRecord;
use crate::values::Volume;

/// Layout of the record; another number is another release's.
const VERSION: u32 = 1;

/// The time, in the form that records hold.
pub fn now() -> OffsetDateTime {
    OffsetDateTime::from(SystemTime::now())
}

/// All that is kept of a container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// [`VERSION`].
    version: u32,
    /// ID.
    pub id: Id,
    /// Name.
    pub name: Name,
    /// The image as it was asked for.
    pub image: String,
    /// The image's digest.
    pub image_id: String,
    /// Command and arguments.
    pub command: Vec<String>,
    /// When it was made.
    #[serde(with = "time::serde::rfc3339")]
    pub created: OffsetDateTime,
    /// What runs its VM.
    pub engine: Engine,
    /// Why this engine, in words.
    pub engine_reason: String,
    /// The VM's memory, MiB.
    pub vm_memory_mib: u32,
    /// The VM's vCPUs.
    pub vcpus: u8,
    /// What its guest began as, once that is known.
    #[serde(default)]
    pub vm_origin: Option<Origin>,
    /// Bind mounts.
    pub volumes: Vec<Volume>,
    /// Its network.
    #[serde(default)]
    pub network: NetworkRecord,
    /// Whether it goes when it stops.
    pub auto_remove: bool,
    /// Whether its process has a terminal.
    pub tty: bool,
    /// The signal that stops it.
    pub stop_signal: i32,
    /// Where it is in its life.
    pub state: State,
}

/// Where a container is in its life, as its monitor last said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "lowercase")]
pub enum State {
    /// Being made.
    Creating,
    /// Its process runs.
    Running {
        /// Since when.
        #[serde(with = "time::serde::rfc3339")]
        started: OffsetDateTime,
        /// The VM process.
        pid: u32,
    },
    /// Its process has ended, or could not be started.
    Exited {
        /// Since when it had run.
        #[serde(with = "time::serde::rfc3339::option")]
        started: Option<OffsetDateTime>,
        /// When it ended.
        #[serde(with = "time::serde::rfc3339")]
        finished: OffsetDateTime,
        /// Exit code.
        code: u8,
        /// Whether it ran into its memory limit.
        oom_killed: bool,
        /// What went wrong on our side.
        error: Option<String>,
    },
}

impl Record {
    /// A record of the current layout, with everything that its maker does not say left empty.
    pub fn new(id: Id, name: Name, engine: Engine) -> Self {
        Self {
            version: VERSION,
            id,
            name,
            image: String::new(),
            image_id: String::new(),
            command: Vec::new(),
            created: now(),
            engine,
            engine_reason: String::new(),
            vm_memory_mib: 0,
            vcpus: 1,
            vm_origin: None,
            volumes: Vec::new(),
            network: NetworkRecord::none(),
            auto_remove: false,
            tty: false,
            stop_signal: nix::libc::SIGTERM,
            state: State::Creating,
        }
    }
}

/// Reads a JSON file.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    #[derive(Deserialize)]
    struct Versioned {
        version: Option<u32>,
    }
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let broken = || format!("{} is damaged", path.display());
    let version = serde_json::from_slice::<Versioned>(&text)
        .ok()
        .and_then(|v| v.version);
    ensure!(
        version.is_none_or(|v| v == VERSION),
        "{} was written by another release of cloison",
        path.display()
    );
    serde_json::from_slice(&text).with_context(broken)
}

/// Replaces a JSON file, so that a reader sees the old or the whole new one.
pub(super) fn write(path: &Path, value: &impl Serialize) -> Result<()> {
    let temporary = path.with_extension("tmp");
    let failed = || format!("cannot write {}", path.display());
    let text = serde_json::to_vec(value).with_context(failed)?;
    let written = File::create(&temporary).and_then(|mut file| file.write_all(&text));
    written
        .and_then(|()| fs::rename(&temporary, path))
        .with_context(failed)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn record(name: &str) -> Record {
        Record::new(
            Id::random().unwrap(),
            name.parse().unwrap(),
            Engine::Software,
        )
    }

    #[test]
    fn a_record_survives_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("container.json");
        let mut record = record("x");
        record.state = State::Exited {
            started: Some(now()),
            finished: now(),
            code: 137,
            oom_killed: true,
            error: None,
        };
        write(&path, &record).unwrap();
        let back: Record = read(&path).unwrap();
        assert_eq!((back.state, back.id), (record.state, record.id));
    }

    #[test]
    fn another_releases_record_is_refused_as_such() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("container.json");
        fs::write(&path, "{\"version\":2,\"shape\":\"unknown\"}").unwrap();
        assert!(
            read::<Record>(&path)
                .unwrap_err()
                .to_string()
                .contains("another release")
        );
    }
}
