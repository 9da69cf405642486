//! Containers of the standalone front door as they are on disk: a record that is replaced whole, a lock that the container's
//! monitor holds as long as it lives, and a name that only one container has.
//!
//! The lock is the truth about life and death. It is gone with the monitor, whatever ended it, so no pid is ever guessed at, and
//! waiting for a container is waiting for its lock.

mod find;
mod record;

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cloison_sandbox::{Home, Id, Name, Sandbox};
use oci_spec::runtime::Spec;

use crate::network;

pub use cloison_sandbox::MonitorLock;
pub use find::{all, find};
pub use record::{Record, State, now};

/// A container that exists on disk.
#[derive(Debug, Clone)]
pub struct Container {
    home: Home,
    id: Id,
}

/// In a container's data directory, the link to its sandbox's directory. Without a target, the container is gone.
pub const SANDBOX_LINK: &str = "sandbox";
/// How long a monitor may take to go after its VM has ended, milliseconds.
const MONITOR_PATIENCE_MS: u16 = 10_000;

/// A container's life as others see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Life {
    /// Its monitor prepares it.
    Creating,
    /// Its process runs.
    Running,
    /// Its process has ended, in an orderly way.
    Exited,
    /// Its monitor was killed before it could say how things ended.
    Dead,
}

impl Container {
    /// Claims a name and makes the container's directories, for the process that will be its monitor.
    ///
    /// # Errors
    /// When the name is taken, or a directory cannot be written.
    pub fn create(home: &Home, record: &Record) -> Result<(Self, MonitorLock)> {
        let container = Self {
            home: home.clone(),
            id: record.id.clone(),
        };
        // Until the lock is there a directory looks abandoned, and a prune may take it away once.
        let lock = loop {
            Sandbox::create(home, &record.id)?;
            if let Some(lock) = MonitorLock::take(&container.sandbox_dir())? {
                break lock;
            }
        };
        let made = (|| {
            container.save(record)?;
            container.create_data_dir()?;
            // The name comes last: whoever finds one finds a record behind it.
            container.claim(&record.name)
        })();
        match made {
            Ok(()) => Ok((container, lock)),
            Err(error) => {
                // The first error is the one to tell.
                let _ = container.erase();
                Err(error)
            }
        }
    }

    /// Makes the data directory, with a link that says which run directory its container belongs to: several may share a data
    /// directory.
    fn create_data_dir(&self) -> Result<()> {
        create_dir(&self.data_dir())?;
        let link = self.data_dir().join(SANDBOX_LINK);
        std::os::unix::fs::symlink(self.sandbox_dir(), &link)
            .with_context(|| format!("cannot create the link {}", link.display()))
    }

    fn claim(&self, name: &Name) -> Result<()> {
        let names = self.home.names();
        create_dir(&names)?;
        let link = names.join(name.as_str());
        loop {
            match std::os::unix::fs::symlink(self.id.as_str(), &link) {
                Ok(()) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => {
                    return Err(e).with_context(|| {
                        format!("cannot write the container's name to {}", link.display())
                    });
                }
            }
            let owner = fs::read_link(&link)
                .ok()
                .and_then(|id| id.to_str()?.parse::<Id>().ok());
            if let Some(owner) = owner
                && self.home.sandbox(&owner).exists()
            {
                bail!(
                    "the container name \"{name}\" is in use by container {}: remove that one first (cloison rm -f {name}), or choose another name",
                    owner.short()
                );
            }
            // Left behind by a container that was removed halfway.
            remove_file(&link)?;
        }
    }

    /// The container's ID.
    pub fn id(&self) -> &Id {
        &self.id
    }

    /// Where cloison keeps what it knows.
    pub fn home(&self) -> &Home {
        &self.home
    }

    /// The sandbox it runs in.
    pub fn sandbox(&self) -> Sandbox {
        Sandbox::open(&self.home, &self.id)
    }

    fn sandbox_dir(&self) -> PathBuf {
        self.home.sandbox(&self.id)
    }

    /// What it keeps on disk: its writable layer and its log.
    pub fn data_dir(&self) -> PathBuf {
        self.home.container(&self.id)
    }

    /// Its log.
    pub fn log_file(&self) -> PathBuf {
        self.data_dir().join("log.json")
    }

    /// Reads its record.
    ///
    /// # Errors
    /// When there is none, or it is not one.
    pub fn record(&self) -> Result<Record> {
        record::read(&self.sandbox_dir().join("container.json"))
    }

    /// Replaces its record.
    ///
    /// # Errors
    /// When it cannot be written; the old one then stays whole.
    pub fn save(&self, record: &Record) -> Result<()> {
        record::write(&self.sandbox_dir().join("container.json"), record)
    }

    /// Reads the spec its process was made from, as the guest sees it.
    ///
    /// # Errors
    /// When the container has not come that far.
    pub fn spec(&self) -> Result<Spec> {
        record::read(&self.sandbox_dir().join("config.json"))
    }

    /// Writes the spec its process is made from.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save_spec(&self, spec: &Spec) -> Result<()> {
        record::write(&self.sandbox_dir().join("config.json"), spec)
    }

    /// Whether its monitor lives, and what its record says.
    ///
    /// # Errors
    /// When either cannot be read.
    pub fn life(&self) -> Result<(Life, Record)> {
        // In this order: a monitor saves its last record before it lets go of the lock.
        let monitored = MonitorLock::holder(&self.sandbox_dir())?.is_some();
        let record = self.record()?;
        let life = match (&record.state, monitored) {
            (State::Exited { .. }, _) => Life::Exited,
            (State::Creating, true) => Life::Creating,
            (State::Running { .. }, true) => Life::Running,
            (_, false) => Life::Dead,
        };
        Ok((life, record))
    }

    /// Waits until its monitor is gone, and says how its process ended. `None` when it was removed meanwhile.
    ///
    /// # Errors
    /// When its record cannot be read.
    pub fn wait(&self) -> Result<Option<Record>> {
        MonitorLock::wait(&self.sandbox_dir())?;
        if !self.sandbox_dir().exists() {
            return Ok(None);
        }
        self.record().map(Some)
    }

    /// Ends what still runs of it and removes all there is of it.
    ///
    /// # Errors
    /// Naming what could not be removed; it can be tried again.
    pub fn remove(&self) -> Result<()> {
        if let Some(monitor) = MonitorLock::holder(&self.sandbox_dir())? {
            self.sandbox().kill()?;
            // A monitor whose VM has ended records that and goes, or removes the container itself.
            end_process(monitor)?;
        }
        match MonitorLock::seize(&self.sandbox_dir())? {
            Some(_lock) => {
                // Its monitor has seen to that unless it was killed.
                if let Ok(record) = self.record()
                    && !matches!(record.state, State::Exited { .. })
                {
                    self.sandbox().kill()?;
                    network::release(&self.sandbox_dir(), &record.network)?;
                }
                self.erase()
            }
            None => Ok(()),
        }
    }

    /// Removes all there is of it; for its monitor.
    ///
    /// # Errors
    /// As for [`Container::remove`].
    pub fn erase(&self) -> Result<()> {
        // The VM first, since it uses the rest; the sandbox's directory last, since it is what the rest is found by.
        self.sandbox().kill()?;
        network::detach(&self.home, &self.id)?;
        cloison_image::remove_tree(&self.data_dir()).with_context(|| {
            format!(
                "cannot remove the container's writable layer and log in {}",
                self.data_dir().display()
            )
        })?;
        if let Ok(record) = self.record() {
            let link = self.home.names().join(record.name.as_str());
            if fs::read_link(&link).is_ok_and(|target| target.as_os_str() == self.id.as_str()) {
                remove_file(&link)?;
            }
        }
        self.sandbox().remove()?;
        Ok(())
    }
}

/// Waits for a process that is about to end, and kills it when it does not.
fn end_process(pid: i32) -> Result<()> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::sys::signal::{Signal, kill};

    let Some(pid) = (pid > 0).then(|| nix::unistd::Pid::from_raw(pid)) else {
        return Ok(());
    };
    let Ok(pidfd) = cloison_sandbox::pidfd(pid) else {
        return Ok(());
    };
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    let patience = PollTimeout::from(MONITOR_PATIENCE_MS);
    if poll(&mut fds, patience).context("cannot wait for the container's monitor")? == 0 {
        // It may end between the two calls.
        let _ = kill(pid, Signal::SIGKILL);
    }
    Ok(())
}

fn create_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir)
        .with_context(|| format!("cannot create the directory {}", dir.display()))
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::record::tests::record;

    fn home() -> (tempfile::TempDir, Home) {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::new(dir.path().join("run"), dir.path().join("data"));
        (dir, home)
    }

    #[test]
    fn a_name_belongs_to_one_container_until_that_is_removed() {
        let (_dir, home) = home();
        let first = record("web");
        let (container, lock) = Container::create(&home, &first).unwrap();
        let second = record("web");
        let error = Container::create(&home, &second).unwrap_err().to_string();
        assert!(error.contains("\"web\" is in use"), "{error}");
        assert!(
            !home.sandbox(&second.id).exists() && !home.container(&second.id).exists(),
            "the loser left something behind"
        );

        assert_eq!(container.life().unwrap().0, Life::Creating);
        drop(lock);
        assert_eq!(container.life().unwrap().0, Life::Dead);
        container.remove().unwrap();
        assert!(!home.sandbox(&first.id).exists() && !home.container(&first.id).exists());
        Container::create(&home, &second).unwrap();
    }

    #[test]
    fn a_name_whose_container_is_gone_is_free() {
        let (_dir, home) = home();
        fs::create_dir_all(home.names()).unwrap();
        for (name, target) in [("gone", "feedface"), ("broken", "../../etc")] {
            std::os::unix::fs::symlink(target, home.names().join(name)).unwrap();
            Container::create(&home, &record(name)).unwrap();
        }
    }

    #[test]
    fn containers_are_found_by_name_by_id_and_by_the_start_of_an_id() {
        let (_dir, home) = home();
        let mut one = record("one");
        one.id = "aa11".parse().unwrap();
        let mut two = record("aa1");
        two.id = "aa22".parse().unwrap();
        let _locks = [
            Container::create(&home, &one).unwrap(),
            Container::create(&home, &two).unwrap(),
        ];
        let id = |text: &str| find(&home, text).map(|c| c.id().to_string());
        assert_eq!(id("one").unwrap(), "aa11");
        assert_eq!(
            id("aa1").unwrap(),
            "aa22",
            "a name goes before the start of an ID"
        );
        assert_eq!(id("aa11").unwrap(), "aa11");
        assert_eq!(id("aa2").unwrap(), "aa22");
        assert!(id("aa").unwrap_err().to_string().contains("more than one"));
        for missing in ["b", "", "../run", "aa111"] {
            assert!(
                id(missing)
                    .unwrap_err()
                    .to_string()
                    .contains("no such container"),
                "{missing}"
            );
        }
        assert_eq!(all(&home).unwrap().len(), 2);
    }

    #[test]
    fn a_broken_record_is_an_error_that_names_its_file() {
        let (_dir, home) = home();
        let (container, lock) = Container::create(&home, &record("x")).unwrap();
        drop(lock);
        for text in ["", "{", "[]", "{\"version\":99}", "\0"] {
            fs::write(container.sandbox_dir().join("container.json"), text).unwrap();
            let error = format!("{:#}", container.record().unwrap_err());
            assert!(error.contains("container.json"), "{error}");
        }
        container.remove().unwrap();
    }
}
