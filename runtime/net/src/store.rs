//! What is known of networks and of the sandboxes on them, in two files: networks last, sandboxes end with the host's uptime. Both
//! are changed under one lock and replaced as wholes, so that a reader finds one state or the next. A sandbox's record is written
//! before anything it speaks of is made, and goes when all that is gone: it is the lease of its addresses and ports too.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::network::Network;
use crate::sandbox::Record;
use crate::{Error, Result};

/// Where the two files are.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    networks: PathBuf,
    sandboxes: PathBuf,
}

/// Everything that is known.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct State {
    /// By name.
    pub(crate) networks: BTreeMap<String, Network>,
    /// By ID.
    pub(crate) sandboxes: BTreeMap<String, Record>,
}

/// The state, and the right to change it. What is not written is forgotten.
#[derive(Debug)]
pub(crate) struct Locked {
    store: Store,
    /// The lock is let go of when this is closed, however that happens.
    _lock: File,
    written: State,
    pub(crate) state: State,
}

impl Store {
    pub(crate) fn new(run: &Path, data: &Path) -> Self {
        Self {
            networks: data.join("networks.json"),
            sandboxes: run.join("leases.json"),
        }
    }

    /// The state as it was a moment ago.
    pub(crate) fn read(&self) -> Result<State> {
        Ok(State {
            networks: read(&self.networks)?,
            sandboxes: read(&self.sandboxes)?,
        })
    }

    /// Waits until nobody else changes the state.
    pub(crate) async fn lock(&self) -> Result<Locked> {
        // A thread that waits costs more than all the rest, and mostly there is nobody to wait for.
        if let Some(locked) = self.lock_file(|file| match file.try_lock() {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(error),
        })? {
            return Ok(locked);
        }
        let store = self.clone();
        let locked = tokio::task::spawn_blocking(move || store.lock_blocking());
        locked
            .await
            .map_err(|e| Error::system("wait for a lock")(e.into()))?
    }

    /// [`Store::lock`], for a thread that may wait.
    pub(crate) fn lock_blocking(&self) -> Result<Locked> {
        loop {
            if let Some(locked) = self.lock_file(|file| file.lock().map(|()| true))? {
                return Ok(locked);
            }
        }
    }

    /// The state, if `lock` gets the file's lock.
    fn lock_file(&self, lock: impl FnOnce(&File) -> io::Result<bool>) -> Result<Option<Locked>> {
        // With the networks: several run directories may share them.
        let path = self.networks.with_extension("lock");
        let opened: io::Result<(File, bool)> = (|| {
            for file in [&self.networks, &self.sandboxes] {
                if let Some(directory) = file.parent() {
                    fs::create_dir_all(directory)?;
                }
            }
            let file = File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)?;
            let taken = lock(&file)?;
            Ok((file, taken))
        })();
        let (file, taken) = opened.map_err(Error::system(format!("lock {}", path.display())))?;
        if !taken {
            return Ok(None);
        }
        let state = self.read()?;
        Ok(Some(Locked {
            _lock: file,
            written: state.clone(),
            state,
            store: self.clone(),
        }))
    }
}

impl Locked {
    /// Makes the changes last. The lock stays.
    pub(crate) fn write(&mut self) -> Result<()> {
        if self.state.networks != self.written.networks {
            write(&self.store.networks, &self.state.networks)?;
        }
        if self.state.sandboxes != self.written.sandboxes {
            write(&self.store.sandboxes, &self.state.sandboxes)?;
        }
        self.written = self.state.clone();
        Ok(())
    }
}

fn read<T: DeserializeOwned + Default>(path: &Path) -> Result<T> {
    let text = match fs::read(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(T::default()),
        read => read.map_err(Error::system(format!("read {}", path.display())))?,
    };
    serde_json::from_slice(&text).map_err(|source| Error::Damaged {
        path: path.to_owned(),
        source,
    })
}

fn write<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let fresh = path.with_extension("new");
    let written: io::Result<()> = (|| {
        let mut file = File::create(&fresh)?;
        file.write_all(&serde_json::to_vec_pretty(value)?)?;
        // The name must never come to stand for a file whose content is still under way.
        file.sync_all()?;
        fs::rename(&fresh, path)
    })();
    written.map_err(Error::system(format!("write {}", path.display())))
}
