//! How any thread of a VM process ends the VM, and how such threads are started. The first verdict counts; what comes later is
//! only the noise of things falling over.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::thread;

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::end::EndReason;

/// Bytes of stack for a thread; they cost memory only once touched.
const STACK_SIZE: usize = 512 << 10;

/// Why the VM must end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) reason: EndReason,
    /// One sentence for people.
    pub(crate) message: String,
}

/// The means of ending one VM; cloned to all that may have to.
#[derive(Debug, Clone)]
pub(crate) struct Stop {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    verdict: OnceLock<Verdict>,
    bell: EventFd,
}

impl Stop {
    pub(crate) fn new() -> io::Result<Self> {
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self {
            shared: Arc::new(Shared {
                verdict: OnceLock::new(),
                bell,
            }),
        })
    }

    /// Ends the VM, unless it is being ended already.
    pub(crate) fn stop(&self, reason: EndReason, message: impl Into<String>) {
        let message = message.into();
        tracing::info!(?reason, "{message}");
        if self.shared.verdict.set(Verdict { reason, message }).is_ok()
            && let Err(errno) = self.shared.bell.write(1)
        {
            // A counter of one cannot overflow, and the descriptor is ours: this cannot be, and without the bell the VM
            // would hang.
            tracing::error!("cannot ring the main loop's bell: {errno}");
            std::process::abort();
        }
    }

    /// The verdict, once there is one.
    pub(crate) fn verdict(&self) -> Option<&Verdict> {
        self.shared.verdict.get()
    }

    /// Readable from the moment there is a verdict.
    pub(crate) fn bell(&self) -> BorrowedFd<'_> {
        self.shared.bell.as_fd()
    }

    /// Starts a thread that the VM cannot live without: when it fails or panics, the VM ends, and the thread has nothing to give.
    pub(crate) fn spawn<T: Send + 'static, E: std::error::Error>(
        &self,
        name: &str,
        body: impl FnOnce() -> Result<T, E> + Send + 'static,
    ) -> io::Result<thread::JoinHandle<Option<T>>> {
        let stop = self.clone();
        let label = name.to_owned();
        thread::Builder::new()
            .name(label.clone())
            .stack_size(STACK_SIZE)
            .spawn(move || match catch_unwind(AssertUnwindSafe(body)) {
                Ok(Ok(result)) => Some(result),
                Ok(Err(error)) => {
                    let message = format!("the {label} thread failed: {}", chain(&error));
                    stop.stop(EndReason::EngineFailed, message);
                    None
                }
                Err(panic) => {
                    let message = format!("the {label} thread panicked: {}", panic_text(&*panic));
                    stop.stop(EndReason::EngineFailed, message);
                    None
                }
            })
    }
}

/// An error and all its sources, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(no message)")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rings(stop: &Stop) -> bool {
        let mut fds = [nix::poll::PollFd::new(
            stop.bell(),
            nix::poll::PollFlags::POLLIN,
        )];
        nix::poll::poll(&mut fds, nix::poll::PollTimeout::ZERO).unwrap() == 1
    }

    #[test]
    fn the_first_verdict_counts() {
        let stop = Stop::new().unwrap();
        assert!(stop.verdict().is_none() && !rings(&stop));
        stop.stop(EndReason::Killed, "asked");
        stop.stop(EndReason::EngineFailed, "fell over");
        assert_eq!(stop.verdict().unwrap().reason, EndReason::Killed);
        assert!(rings(&stop));
    }

    #[test]
    fn a_thread_that_panics_ends_the_vm() {
        let stop = Stop::new().unwrap();
        let thread = stop.spawn("fs", || -> Result<(), io::Error> {
            panic!("out of {}", "luck")
        });
        thread.unwrap().join().unwrap();
        let verdict = stop.verdict().unwrap();
        assert_eq!(verdict.reason, EndReason::EngineFailed);
        assert_eq!(verdict.message, "the fs thread panicked: out of luck");
    }

    #[test]
    fn a_thread_that_fails_ends_the_vm_and_one_that_is_done_does_not() {
        let stop = Stop::new().unwrap();
        stop.spawn("a", || Ok::<(), io::Error>(()))
            .unwrap()
            .join()
            .unwrap();
        assert!(stop.verdict().is_none());
        let failing = stop.spawn("b", || Err::<(), _>(io::Error::other("no luck")));
        failing.unwrap().join().unwrap();
        assert_eq!(
            stop.verdict().unwrap().message,
            "the b thread failed: no luck"
        );
    }
}
