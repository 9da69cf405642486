//! Signals: their names, and those that reach a process of ours on their way to a process in a guest.

use std::pin::Pin;
use std::task::Poll;

use nix::libc;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::Error;

/// The first real-time signal that C libraries leave to programs.
const RT_MIN: i32 = 34;
/// The last signal there is.
const RT_MAX: i32 = 64;

/// What a front end passes on. Not here: what it needs itself (SIGCHLD, SIGPIPE, SIGWINCH), what stops and continues it as a job
/// of its shell, and what cannot be caught.
const OF_A_FRONT_END: [i32; 7] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
];

/// What a process that stands for one in a guest passes on beside the real-time signals: all but SIGWINCH and what cannot be caught
/// or speaks of this process itself.
const OF_A_STAND_IN: [i32; 22] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTRAP,
    libc::SIGABRT,
    libc::SIGBUS,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGPIPE,
    libc::SIGALRM,
    libc::SIGTERM,
    libc::SIGSTKFLT,
    libc::SIGCONT,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
    libc::SIGURG,
    libc::SIGXCPU,
    libc::SIGXFSZ,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
];

/// No signal has this name or number.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not a signal: give a name such as TERM, or a number from 1 to {RT_MAX}")]
pub struct UnknownSignal(String);

/// A signal by name ("TERM", "SIGTERM", "RTMIN+1") or number.
///
/// # Errors
/// When there is no such signal.
pub fn signal_number(text: &str) -> Result<i32, UnknownSignal> {
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Ok(signal) = format!("SIG{name}").parse::<nix::sys::signal::Signal>() {
        return Ok(signal as i32);
    }
    let distance = |rest: &str, sign: char| match rest.strip_prefix(sign) {
        Some(digits) => digits.parse::<u8>().ok().map(i32::from),
        None => rest.is_empty().then_some(0),
    };
    let number = if let Some(rest) = name.strip_prefix("RTMIN") {
        distance(rest, '+').map(|n| RT_MIN + n)
    } else if let Some(rest) = name.strip_prefix("RTMAX") {
        distance(rest, '-')
            .map(|n| RT_MAX - n)
            .filter(|n| *n >= RT_MIN)
    } else {
        name.parse().ok()
    };
    match number {
        Some(number @ 1..=RT_MAX) => Ok(number),
        _ => Err(UnknownSignal(text.to_owned())),
    }
}

/// Something that happened to the process.
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
    /// Catches those that a person's front end passes on; must be called inside a tokio runtime, like [`Signals::of_a_stand_in`].
    ///
    /// # Errors
    /// When the system refuses a handler.
    pub fn of_a_front_end() -> Result<Self, Error> {
        Self::catch(OF_A_FRONT_END)
    }

    /// Catches all that can be meant for a process in a guest when they are sent to the process that stands for it on the host.
    ///
    /// # Errors
    /// When the system refuses a handler.
    pub fn of_a_stand_in() -> Result<Self, Error> {
        Self::catch(OF_A_STAND_IN.into_iter().chain(RT_MIN..=RT_MAX))
    }

    fn catch(forwarded: impl IntoIterator<Item = i32>) -> Result<Self, Error> {
        let forwarded = forwarded
            .into_iter()
            .map(|number| (Event::Forward(number), number));
        let all = forwarded.chain([(Event::Resized, libc::SIGWINCH)]);
        let caught = all.map(|(event, number)| Ok((event, signal(SignalKind::from_raw(number))?)));
        caught
            .collect::<std::io::Result<_>>()
            .map(Self)
            .map_err(Error::system("catch signals"))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, number) in [
            ("TERM", 15),
            ("SIGKILL", 9),
            ("hup", 1),
            ("2", 2),
            ("RTMIN+3", 37),
            ("SIGRTMAX-1", 63),
            ("64", 64),
        ] {
            assert_eq!(signal_number(text), Ok(number), "{text}");
        }
        for text in [
            "",
            "0",
            "65",
            "-9",
            "NOPE",
            "SIG",
            "RTMIN+99",
            "RTMIN-5",
            "RTMAX-60",
            "RTMIN\u{e9}",
            "RTMIN+",
        ] {
            assert!(signal_number(text).is_err(), "{text}");
        }
    }
}
