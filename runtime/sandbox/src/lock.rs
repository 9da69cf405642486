//! The lock that says whether a container's monitor lives. Its file holds the monitor's pid, which is right as long as the lock is
//! held.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::Error;

/// Held by a container's monitor, or by whoever removes a container that has none; the kernel lets go of it when its holder is
/// gone, however that happened.
#[derive(Debug)]
pub struct MonitorLock {
    _file: File,
}

fn path(dir: &Path) -> PathBuf {
    dir.join("monitor.lock")
}

impl MonitorLock {
    /// Takes the lock of a container that the caller has just made. `None` when somebody removed the container before the lock was
    /// there to protect it.
    ///
    /// # Errors
    /// When the lock cannot be written.
    pub fn take(dir: &Path) -> Result<Option<Self>, Error> {
        let path = path(dir);
        let taken: io::Result<File> = (|| {
            let mut file = File::create_new(&path)?;
            file.lock()?;
            write!(file, "{}", std::process::id())?;
            Ok(file)
        })();
        match taken {
            Ok(file) => Ok(is_at(&file, &path).then_some(Self { _file: file })),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists
                ) =>
            {
                Ok(None)
            }
            Err(e) => Err(Error::path("take the lock", path)(e)),
        }
    }

    /// Waits until no monitor holds the lock and takes it, to remove the container. `None` when the container is gone.
    ///
    /// # Errors
    /// When the lock cannot be waited for.
    pub fn seize(dir: &Path) -> Result<Option<Self>, Error> {
        let path = path(dir);
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path);
        match file.and_then(|file| file.lock().map(|()| file)) {
            Ok(file) => Ok(is_at(&file, &path).then_some(Self { _file: file })),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::path("wait for the lock", path)(e)),
        }
    }

    /// The pid of the monitor that holds the lock; `None` when nobody does.
    ///
    /// # Errors
    /// When the lock cannot be tried.
    pub fn holder(dir: &Path) -> Result<Option<i32>, Error> {
        let path = path(dir);
        let file = match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(Error::path("open", &path))?,
        };
        match file.try_lock_shared() {
            Ok(()) => Ok(None),
            // Empty for the moment between the taking of the lock and the writing of the pid.
            Err(TryLockError::WouldBlock) => Ok(Some(
                io::read_to_string(file)
                    .ok()
                    .and_then(|pid| pid.parse().ok())
                    .unwrap_or(0),
            )),
            Err(TryLockError::Error(e)) => Err(Error::path("try the lock", path)(e)),
        }
    }

    /// Blocks until no monitor holds the lock.
    ///
    /// # Errors
    /// When the lock cannot be waited for.
    pub fn wait(dir: &Path) -> Result<(), Error> {
        let path = path(dir);
        match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(Error::path("open", path)(e)),
            Ok(file) => file
                .lock_shared()
                .map_err(Error::path("wait for the lock", path)),
        }
    }
}

/// Whether `file` is still what `path` names.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_lock_names_its_holder_and_a_dropped_one_nobody() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(MonitorLock::holder(dir.path()).unwrap(), None);
        let lock = MonitorLock::take(dir.path()).unwrap().unwrap();
        assert_eq!(
            MonitorLock::holder(dir.path()).unwrap(),
            i32::try_from(std::process::id()).ok()
        );
        drop(lock);
        assert_eq!(MonitorLock::holder(dir.path()).unwrap(), None);
        MonitorLock::wait(dir.path()).unwrap();
    }

    #[test]
    fn whoever_seizes_a_lock_first_keeps_a_maker_from_taking_it() {
        let dir = tempfile::tempdir().unwrap();
        let seized = MonitorLock::seize(dir.path()).unwrap();
        assert!(seized.is_some());
        assert!(MonitorLock::take(dir.path()).unwrap().is_none());
        assert!(
            MonitorLock::take(&dir.path().join("gone"))
                .unwrap()
                .is_none()
        );
        assert!(
            MonitorLock::seize(&dir.path().join("gone"))
                .unwrap()
                .is_none()
        );
    }
}
