//! Containers of the OCI front door as they are on disk: the sandbox's directory, with a record, the spec that the caller gave, and
//! the lock that the container's monitor holds as long as it lives.
//!
//! Only verbs write the record, each under the lock on `verb.lock`. Whether the container lives is asked of the monitor's lock.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};
use cloison_sandbox::{CgroupPlace, Home, HostCgroup, Id, MonitorLock, Sandbox};
use cloison_vmm::Engine;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use oci_spec::runtime::Spec;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

/// Layout of the record; another number is another release's.
const VERSION: u32 = 1;
/// Release of the OCI runtime specification that states follow.
pub const OCI_VERSION: &str = "1.2.0";

/// A container that may or may not exist.
#[derive(Debug, Clone)]
pub struct Container {
    home: Home,
    id: Id,
}

/// All that is kept of a container beside its spec.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// Absolute.
    pub bundle: PathBuf,
    /// The root file system on the host.
    pub rootfs: PathBuf,
    /// When it was made.
    #[serde(with = "time::serde::rfc3339")]
    pub created: OffsetDateTime,
    /// What runs its VM.
    pub engine: Engine,
    /// Why this engine, in words.
    pub engine_reason: String,
    /// The cgroup of its processes on the host.
    pub cgroup: CgroupPlace,
    /// How far it has come.
    pub phase: Phase,
    /// The process that stands for its init; 0 while there is none.
    pub pid: i32,
    /// Where it is, if not in a VM of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub joined: Option<Joined>,
    /// How much of the CPUs' time it may use.
    #[serde(default)]
    pub cpu_time: CpuTime,
    /// Its shared memory, if that is the host's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shm: Option<SharedMemory>,
}

/// A quota of CPU time, as a container has it by now: an update names what of it changes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuTime {
    /// Microseconds in a period; negative for no limit.
    pub quota: Option<i64>,
    /// Microseconds.
    pub period: Option<u64>,
}

/// A file system of the host's that callers bind to /dev/shm, to have it in common for containers with one IPC namespace.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SharedMemory {
    /// On the host.
    pub source: PathBuf,
    /// In the guest.
    pub in_guest: PathBuf,
}

/// The place of a container in the VM of another.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Joined {
    /// The container whose VM it is.
    pub vm: Id,
    /// Where the guest finds its files. Not its own ID, which it may have again when it is gone and made anew.
    pub place: Id,
}

/// How far a container has come, as its last verb left it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Being made.
    Creating,
    /// Waits for its start.
    Created,
    /// Started.
    Running,
    /// Started, and suspended.
    Paused,
}

/// What a container is doing, under runc's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Being made.
    Creating,
    /// Waits for its start.
    Created,
    /// Its process runs.
    Running,
    /// Its process is suspended.
    Paused,
    /// Its process has ended.
    Stopped,
}

impl Status {
    /// runc's word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// A container's state as the specification has it, for its caller and its hooks.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OciState<'a> {
    /// Release of the specification.
    pub oci_version: &'static str,
    /// Its ID.
    pub id: &'a str,
    /// What it is doing.
    pub status: Status,
    /// The process that stands for its init.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    /// Absolute.
    pub bundle: &'a Path,
    /// Its spec's.
    #[serde(skip_serializing_if = "HashMap::is_empty")]
    pub annotations: HashMap<String, String>,
}

/// Held while a verb changes a container.
pub struct VerbLock {
    _file: File,
}

impl Container {
    /// Makes a container's directory. The caller is to fill it, and to remove it when it cannot.
    ///
    /// # Errors
    /// When there is one with this ID.
    pub fn create(home: &Home, id: &str, record: &Record, spec: &[u8]) -> Result<Self> {
        let container = Self {
            home: home.clone(),
            id: id.parse()?,
        };
        match Sandbox::create(home, &container.id) {
            Err(cloison_sandbox::Error::Exists { .. }) => {
                bail!("container with given ID already exists: {id}")
            }
            other => other?,
        };
        let filled = fs::write(container.dir().join("config.json"), spec)
            .context("cannot write the container's spec")
            .and_then(|()| container.save(record));
        if let Err(error) = filled {
            // The first error is the one to tell.
            let _ = container.sandbox().remove();
            return Err(error);
        }
        Ok(container)
    }

    /// The container with this ID.
    ///
    /// # Errors
    /// When there is none, in the words that runc's callers look for.
    pub fn find(home: &Home, id: &str) -> Result<Self> {
        // What is no ID is no container's.
        let container = id.parse().ok().map(|id| Self {
            home: home.clone(),
            id,
        });
        container
            .filter(|container| container.dir().exists())
            .with_context(|| format!("container {id:?} does not exist"))
    }

    /// Every container there is, in the order of their IDs.
    ///
    /// # Errors
    /// When the state directory cannot be read.
    pub fn all(home: &Home) -> Result<Vec<Self>> {
        let dir = home.sandboxes();
        let failed = || format!("cannot list the containers in {}", dir.display());
        let entries = match fs::read_dir(&dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.with_context(failed)?,
        };
        let mut all = Vec::new();
        for entry in entries {
            let name = entry.with_context(failed)?.file_name();
            if let Some(Ok(id)) = name.to_str().map(str::parse::<Id>) {
                all.push(Self {
                    home: home.clone(),
                    id,
                });
            }
        }
        all.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(all)
    }

    /// Its ID.
    pub fn id(&self) -> &Id {
        &self.id
    }

    /// Its sandbox.
    pub fn sandbox(&self) -> Sandbox {
        Sandbox::open(&self.home, &self.id)
    }

    /// The sandbox whose VM it is in.
    pub fn vm(&self, record: &Record) -> Sandbox {
        let id = record.joined.as_ref().map_or(&self.id, |joined| &joined.vm);
        Sandbox::open(&self.home, id)
    }

    /// Its directory.
    pub fn dir(&self) -> PathBuf {
        self.home.sandbox(&self.id)
    }

    /// Its record.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn record(&self) -> Result<Record> {
        let path = self.dir().join("record.json");
        let record: Record = read(&path)?;
        ensure!(
            record.version == VERSION,
            "{} was written by another release of cloison",
            path.display()
        );
        Ok(record)
    }

    /// Replaces its record.
    ///
    /// # Errors
    /// When it cannot be written; the old one then stays whole.
    pub fn save(&self, record: &Record) -> Result<()> {
        let text = serde_json::to_vec(record)?;
        replace(&self.dir().join("record.json"), &text)
    }

    /// The spec its caller gave.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn spec(&self) -> Result<Spec> {
        read(&self.dir().join("config.json"))
    }

    /// Keeps other verbs from changing the container meanwhile.
    ///
    /// # Errors
    /// When the lock cannot be waited for.
    pub fn lock(&self) -> Result<VerbLock> {
        let path = self.dir().join("verb.lock");
        let failed = || format!("cannot wait for the lock {}", path.display());
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path);
        let file = match file {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                bail!("container {:?} does not exist", self.id.as_str())
            }
            other => other.with_context(failed)?,
        };
        file.lock().with_context(failed)?;
        // It may have been deleted meanwhile.
        Self::find(&self.home, self.id.as_str())?;
        Ok(VerbLock { _file: file })
    }

    /// The process that holds the monitor's lock.
    ///
    /// # Errors
    /// When the lock cannot be tried.
    pub fn monitor(&self) -> Result<Option<i32>> {
        Ok(MonitorLock::holder(&self.dir())?)
    }

    /// What it is doing, and its record.
    ///
    /// # Errors
    /// When either cannot be learnt.
    pub fn status(&self) -> Result<(Status, Record)> {
        let monitored = self.monitor()?.is_some();
        let record = self.record()?;
        let status = match (record.phase, monitored) {
            (_, false) => Status::Stopped,
            (Phase::Creating, true) => Status::Creating,
            (Phase::Created, true) => Status::Created,
            (Phase::Running, true) => Status::Running,
            (Phase::Paused, true) => Status::Paused,
        };
        Ok((status, record))
    }

    /// Its state as the specification has it.
    pub fn state<'a>(&'a self, status: Status, record: &'a Record, spec: &Spec) -> OciState<'a> {
        OciState {
            oci_version: OCI_VERSION,
            id: self.id.as_str(),
            status,
            pid: (status != Status::Stopped && record.pid > 0).then_some(record.pid),
            bundle: &record.bundle,
            annotations: spec.annotations().clone().unwrap_or_default(),
        }
    }

    /// Ends the VM, waits for the monitor's end, and removes all there is of the container.
    ///
    /// # Errors
    /// Naming what could not be removed; it can be tried again.
    pub fn remove(&self) -> Result<()> {
        self.end()?;
        // A record that cannot be read is of a container that never had a cgroup.
        if let Ok(record) = self.record() {
            HostCgroup::at(&record.cgroup)?.remove()?;
            if let Some(joined) = &record.joined {
                let vm = self.vm(&record);
                let monitor = MonitorLock::holder(vm.dir())?.filter(|pid| *pid > 0);
                vm.withdraw(&self.sandbox(), &joined.place, monitor)?;
            }
        }
        Ok(self.sandbox().remove()?)
    }

    /// Ends the VM and waits for the monitor's end.
    ///
    /// # Errors
    /// When one of them stays.
    pub fn end(&self) -> Result<()> {
        self.sandbox().kill()?;
        if let Some(pid) = self.monitor()?.filter(|pid| *pid > 0) {
            // One whose VM has ended goes by itself; one that has none yet is told.
            let pid = nix::unistd::Pid::from_raw(pid);
            let watched = cloison_sandbox::pidfd(pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            MonitorLock::wait(&self.dir())?;
            // It lets go of the lock a little before it is gone from its cgroup.
            if let Ok(watched) = watched {
                let mut fds = [PollFd::new(watched.as_fd(), PollFlags::POLLIN)];
                poll(&mut fds, PollTimeout::NONE).context("cannot wait for the monitor's end")?;
            }
            // It may have launched a VM in the meantime, which follows it.
            self.sandbox().kill()?;
        }
        Ok(())
    }
}

impl Record {
    /// A record of a container that is about to be made.
    pub fn new(
        bundle: PathBuf,
        rootfs: PathBuf,
        cgroup: CgroupPlace,
        engine: Engine,
        engine_reason: String,
    ) -> Self {
        Self {
            version: VERSION,
            bundle,
            rootfs,
            created: OffsetDateTime::from(SystemTime::now()),
            engine,
            engine_reason,
            cgroup,
            phase: Phase::Creating,
            pid: 0,
            joined: None,
            cpu_time: CpuTime::default(),
            shm: None,
        }
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is damaged", path.display()))
}

/// Replaces a file, so that a reader sees the old or the whole new one.
///
/// # Errors
/// When it cannot be written.
pub fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.{}", std::process::id()));
    File::create(&temporary)
        .and_then(|mut file| file.write_all(content))
        .and_then(|()| fs::rename(&temporary, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home() -> (tempfile::TempDir, Home) {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::new(dir.path(), dir.path());
        (dir, home)
    }

    fn record() -> Record {
        Record::new(
            "/b".into(),
            "/b/rootfs".into(),
            CgroupPlace::Path("/c".into()),
            Engine::Software,
            "x".into(),
        )
    }

    #[test]
    fn an_id_is_one_containers_until_that_is_removed() {
        let (_dir, home) = home();
        let one = Container::create(&home, "one", &record(), b"{}").unwrap();
        let error = Container::create(&home, "one", &record(), b"{}").unwrap_err();
        assert!(error.to_string().contains("already exists"), "{error}");
        assert_eq!(one.status().unwrap().0, Status::Stopped);
        one.remove().unwrap();
        Container::create(&home, "one", &record(), b"{}").unwrap();
        assert_eq!(Container::all(&home).unwrap().len(), 1);
    }

    #[test]
    fn a_container_that_is_not_there_is_missing_in_runcs_words() {
        let (_dir, home) = home();
        for id in ["gone", "", "../x", "a/b", "-x"] {
            let error = Container::find(&home, id).unwrap_err().to_string();
            assert!(error.contains("does not exist"), "{error}");
        }
        assert!(Container::all(&home).unwrap().is_empty());
    }

    #[test]
    fn a_held_lock_is_what_makes_a_container_live() {
        let (_dir, home) = home();
        let mut record = record();
        record.phase = Phase::Running;
        let one = Container::create(&home, "one", &record, b"{}").unwrap();
        let lock = MonitorLock::take(&one.dir()).unwrap().unwrap();
        assert_eq!(one.status().unwrap().0, Status::Running);
        drop(lock);
        assert_eq!(one.status().unwrap().0, Status::Stopped);
    }

    #[test]
    fn a_broken_record_is_an_error_that_names_its_file() {
        let (_dir, home) = home();
        let one = Container::create(&home, "one", &record(), b"{}").unwrap();
        for text in ["", "{", "[]", "\0"] {
            fs::write(one.dir().join("record.json"), text).unwrap();
            let error = format!("{:#}", one.status().unwrap_err());
            assert!(error.contains("record.json"), "{error}");
        }
        one.remove().unwrap();
    }
}
