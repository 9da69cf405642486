//! Where `start` meets the monitor: a socket in the sandbox's directory. Callers may bring interfaces into the container's namespace
//! after its creation (docker does from release 28 on), and its process must find them when it starts; only the monitor knows when
//! the guest has them.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result};
use tokio::net::UnixListener;

use crate::channel::{ProcessEnd, Report, VerbEnd};

const SOCKET: &str = "monitor.sock";

/// The monitor's side.
pub struct Rendezvous(UnixListener);

/// A `start` that waits for its answer.
pub struct Waiting(ProcessEnd);

/// Runs `with` on the socket's path, by way of a descriptor: the path itself may be longer than a socket's address can be.
fn near<T>(dir: &Path, with: impl FnOnce(String) -> std::io::Result<T>) -> std::io::Result<T> {
    let dir = File::open(dir)?;
    with(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd()))
}

impl Rendezvous {
    /// Waits in the sandbox's directory `dir`; to be called once, in a tokio runtime.
    ///
    /// # Errors
    /// When there can be no socket.
    pub fn at(dir: &Path) -> Result<Self> {
        let listener = near(dir, UnixListener::bind);
        listener
            .map(Self)
            .with_context(|| format!("cannot listen on {}", dir.join(SOCKET).display()))
    }

    /// The next `start`. Nothing is lost when the future is dropped.
    ///
    /// # Errors
    /// When there can be no more.
    pub async fn next(&self) -> Result<Waiting> {
        let failed = "cannot hear from the command that starts the container";
        let (stream, _) = self.0.accept().await.context(failed)?;
        Ok(Waiting(ProcessEnd::new(stream.into_std()?)?))
    }
}

impl Waiting {
    /// Lets it go on, or tells it why it cannot. One that has gone needs no answer.
    pub async fn answer(mut self, ready: Result<()>) {
        let report = match ready {
            Ok(()) => Report::Ready,
            Err(error) => Report::Failed(format!("{error:#}")),
        };
        let _ = self.0.tell(&report).await;
    }
}

/// Waits until the guest of the sandbox in `dir` has all that its caller has brought.
///
/// # Errors
/// When it cannot have that, or the monitor is gone.
pub fn await_ready(dir: &Path) -> Result<()> {
    let stream = near(dir, UnixStream::connect);
    let stream = stream.with_context(|| {
        let socket = dir.join(SOCKET);
        format!(
            "cannot reach the container's monitor at {}",
            socket.display()
        )
    })?;
    VerbEnd::new(stream).expect_ready()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(ready: impl FnOnce() -> Result<()>) -> Result<()> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        let runtime = crate::runtime().unwrap();
        let _entered = runtime.enter();
        let rendezvous = Rendezvous::at(&path).unwrap();
        let start = std::thread::spawn(move || await_ready(&path));
        runtime.block_on(async {
            let waiting = rendezvous.next().await.unwrap();
            waiting.answer(ready()).await;
        });
        start.join().unwrap()
    }

    #[test]
    fn a_start_goes_on_when_the_guest_is_ready_and_fails_with_the_monitors_reason() {
        asked(|| Ok(())).unwrap();
        let error = asked(|| anyhow::bail!("no room")).unwrap_err();
        assert_eq!(error.to_string(), "no room");
    }

    #[test]
    fn a_start_without_a_monitor_is_an_error_and_one_that_has_gone_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let error = format!("{:#}", await_ready(dir.path()).unwrap_err());
        assert!(error.contains("monitor.sock"), "{error}");
        let runtime = crate::runtime().unwrap();
        runtime.block_on(async {
            let rendezvous = Rendezvous::at(dir.path()).unwrap();
            drop(near(dir.path(), UnixStream::connect).unwrap());
            rendezvous.next().await.unwrap().answer(Ok(())).await;
        });
    }
}
