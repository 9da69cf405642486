//! How a VM ended, and the file that says so: `end.json` in the sandbox's directory, written by the VM process as its last
//! act. The file is locked for as long as the VM process lives, so that a reader can tell a VM that still runs from one whose
//! process was killed before it could write, without trusting any process ID.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The file's name inside the sandbox's directory.
pub const END_FILE: &str = "end.json";

/// Most bytes of `end.json` that are read back: a message, and a kernel log tail with every byte escaped.
const MAX_END_FILE: u64 = 1 << 20;

/// Why a VM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndReason {
    /// The guest shut itself down in an orderly way.
    Shutdown,
    /// Someone asked for it over the control socket.
    Killed,
    /// The process that the VM was tied to is gone.
    OwnerGone,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The guest was reset without a word. On the software engine a triple fault is one too.
    GuestReset,
    /// The guest's processor could not go on: a fault while it handled a fault while it handled a fault.
    TripleFault,
    /// KVM could not go on with the guest: an instruction it cannot emulate, an event it cannot deliver.
    KvmInternalError,
    /// What runs the guest could not start, died, or failed in some other way.
    EngineFailed,
    /// The VM process itself was killed; nobody was left to say more.
    ProcessKilled,
}

/// The last word about a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Why, for programs.
    pub reason: EndReason,
    /// Why, for people: one sentence, then at most a few lines of what the engine itself said.
    pub message: String,
    /// The last lines of the guest kernel's log; empty when it said nothing.
    pub kernel_log_tail: String,
}

impl End {
    pub(crate) fn process_killed() -> Self {
        Self {
            reason: EndReason::ProcessKilled,
            message: "the VM process was killed".into(),
            kernel_log_tail: String::new(),
        }
    }
}

/// Why `end.json` could not be made or read.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}", path.display())]
pub struct EndFileError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// How the VM of the sandbox directory `dir` ended; `None` while its VM process lives, or when there never was one.
///
/// # Errors
/// When the file is there but cannot be read or makes no sense.
pub fn read_end(dir: &Path) -> Result<Option<End>, EndFileError> {
    read(dir, |file| match file.try_lock_shared() {
        Ok(()) => Ok(true),
        Err(std::fs::TryLockError::WouldBlock) => Ok(false),
        Err(std::fs::TryLockError::Error(error)) => Err(error),
    })
}

/// As [`read_end`], but blocks until the VM process is gone. `None` when there never was one.
///
/// # Errors
/// As for [`read_end`].
pub fn await_end(dir: &Path) -> Result<Option<End>, EndFileError> {
    read(dir, |file| file.lock_shared().map(|()| true))
}

fn read(
    dir: &Path,
    is_gone: impl FnOnce(&File) -> io::Result<bool>,
) -> Result<Option<End>, EndFileError> {
    let path = dir.join(END_FILE);
    let failed = |what| {
        let path = path.clone();
        move |source| EndFileError { what, path, source }
    };
    let file = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(failed("open"))?,
    };
    if !is_gone(&file).map_err(failed("lock"))? {
        return Ok(None);
    }
    let mut text = Vec::new();
    file.take(MAX_END_FILE)
        .read_to_end(&mut text)
        .map_err(failed("read"))?;
    if text.is_empty() {
        return Ok(Some(End::process_killed()));
    }
    let end = serde_json::from_slice(&text).map_err(|error| failed("understand")(error.into()))?;
    Ok(Some(end))
}

/// Makes the file anew in `dir`, empty, and locks it: the lock lasts until every copy of the descriptor is closed.
pub(crate) fn create(dir: &Path) -> Result<OwnedFd, EndFileError> {
    let path = dir.join(END_FILE);
    let failed = |what| {
        let path = path.clone();
        move |source| EndFileError { what, path, source }
    };
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(failed("create"))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => {
            let living = io::Error::new(
                io::ErrorKind::AddrInUse,
                "another VM process lives in this directory",
            );
            return Err(failed("lock")(living));
        }
        Err(std::fs::TryLockError::Error(error)) => return Err(failed("lock")(error)),
    }
    file.set_len(0).map_err(failed("empty"))?;
    Ok(file.into())
}

/// Writes `end` and lets go of the file, and so of the lock.
pub(crate) fn write(file: OwnedFd, end: &End) -> io::Result<()> {
    File::from(file).write_all(&serde_json::to_vec(end)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_never_had_a_vm_has_no_end() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read_end(dir.path()).unwrap(), None);
        assert_eq!(await_end(dir.path()).unwrap(), None);
    }

    #[test]
    fn a_vm_that_still_runs_has_no_end_and_its_directory_takes_no_second_one() {
        let dir = tempfile::tempdir().unwrap();
        let held = create(dir.path()).unwrap();
        assert_eq!(read_end(dir.path()).unwrap(), None);
        assert!(create(dir.path()).is_err());
        drop(held);
    }

    #[test]
    fn a_process_that_is_gone_without_a_word_was_killed() {
        let dir = tempfile::tempdir().unwrap();
        drop(create(dir.path()).unwrap());
        let end = read_end(dir.path()).unwrap().unwrap();
        assert_eq!(end.reason, EndReason::ProcessKilled);
    }

    #[test]
    fn what_was_written_is_read_back_and_a_new_vm_forgets_it() {
        let dir = tempfile::tempdir().unwrap();
        let end = End {
            reason: EndReason::GuestPanic,
            message: "the guest panicked: \"out of \u{1}ideas\"".into(),
            kernel_log_tail: "line\nline\n".into(),
        };
        write(create(dir.path()).unwrap(), &end).unwrap();
        assert_eq!(await_end(dir.path()).unwrap(), Some(end));
        drop(create(dir.path()).unwrap());
        let end = read_end(dir.path()).unwrap().unwrap();
        assert_eq!(end.reason, EndReason::ProcessKilled);
    }

    #[test]
    fn a_file_that_makes_no_sense_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(END_FILE), "{\"reason\":\"bored\"}").unwrap();
        let error = read_end(dir.path()).unwrap_err();
        assert!(error.to_string().contains("end.json"), "{error}");
    }
}
