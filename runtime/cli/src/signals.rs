//! Signals that reach a front end while a container runs in its foreground, on their way to the container.

use std::pin::Pin;
use std::task::Poll;

use anyhow::{Context, Result};
use nix::libc;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// What is passed on. Not here: what a front end needs itself (SIGCHLD, SIGPIPE, SIGWINCH), what stops and continues it as a job
/// of its shell, and what cannot be caught.
const FORWARDED: [i32; 7] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
];

/// Something that happened to the front end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A signal for the container.
    Forward(i32),
    /// The terminal has a new size.
    Resized,
}

impl Event {
    /// The signal, if its meaning is that whatever runs shall end.
    pub fn ends(self) -> Option<i32> {
        match self {
            Self::Forward(
                number @ (libc::SIGHUP | libc::SIGINT | libc::SIGQUIT | libc::SIGTERM),
            ) => Some(number),
            _ => None,
        }
    }

    /// The signal, if it is how a person or a service manager insists.
    pub fn insists(self) -> Option<i32> {
        self.ends()
            .filter(|number| matches!(*number, libc::SIGINT | libc::SIGTERM))
    }
}

/// The signals, from the moment this exists.
pub struct Signals(Vec<(Event, Signal)>);

impl Signals {
    /// Catches them from here on; must be called inside a tokio runtime.
    ///
    /// # Errors
    /// When the system refuses a handler.
    pub fn catch() -> Result<Self> {
        let forwarded = FORWARDED.map(|number| (Event::Forward(number), number));
        let all = forwarded
            .into_iter()
            .chain([(Event::Resized, libc::SIGWINCH)]);
        let caught = all.map(|(event, number)| Ok((event, signal(SignalKind::from_raw(number))?)));
        caught
            .collect::<std::io::Result<_>>()
            .map(Self)
            .context("cannot catch signals")
    }

    /// The next one.
    pub async fn next(&mut self) -> Event {
        std::future::poll_fn(|context| {
            let ready = self.0.iter_mut().find_map(|(event, signal)| {
                match Pin::new(signal).poll_recv(context) {
                    Poll::Ready(Some(())) => Some(*event),
                    _ => None,
                }
            });
            ready.map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}
