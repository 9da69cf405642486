//! One process the host knows by name: a container's init or an exec. From its start to its end and beyond, as long as
//! somebody may ask how it ended.

use std::sync::Arc;

use nix::unistd::Pid;
use tokio::sync::watch;

use crate::cgroup::Cgroup;
use crate::error::{Doing, Error, Result};
use crate::lifeline::Lifeline;
use crate::reaper::{Exit, ExitWatch, ended};
use crate::stdio::Streams;
use crate::sys;

/// Highest signal number of Linux (signal(7): SIGRTMAX).
const MAX_SIGNAL: u32 = 64;

const KILL: u32 = libc::SIGKILL as u32;

/// How a process ended, and why.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    pub exit: Exit,
    /// The OOM killer hit the container while the process ran.
    pub oom_killed: bool,
}

/// A process of a container.
pub struct Process {
    pid: Pid,
    streams: Streams,
    outcome: watch::Receiver<Option<Outcome>>,
}

impl Process {
    /// A process that was just made in `cgroup`.
    pub fn new(pid: Pid, exit: ExitWatch, streams: Streams, cgroup: Arc<Cgroup>) -> Arc<Self> {
        let (sender, outcome) = watch::channel(None);
        let process = Arc::new(Self {
            pid,
            streams,
            outcome,
        });
        let weak = Arc::downgrade(&process);
        let before = cgroup.oom_kills();
        tokio::spawn(async move {
            let mut exit = exit;
            if let Some(exit) = ended(&mut exit).await {
                let oom_killed = cgroup.oom_kills() > before;
                sender.send_replace(Some(Outcome { exit, oom_killed }));
                if let Some(process) = weak.upgrade() {
                    process.streams.process_ended();
                }
            }
        });
        process
    }

    /// Kills the process when the host's end of `lifeline` is closed, whatever else comes through it.
    pub fn tie(process: &Arc<Self>, mut lifeline: Lifeline) {
        let process = Arc::clone(process);
        tokio::spawn(async move {
            tokio::select! {
                () = lifeline.cut() => {
                    // It may have ended at the same moment.
                    let _ = process.signal(KILL);
                }
                _ = process.ended() => {}
            }
        });
    }

    pub fn pid(&self) -> Pid {
        self.pid
    }

    pub fn has_ended(&self) -> bool {
        self.outcome.borrow().is_some()
    }

    /// Waits until the process has ended.
    pub async fn ended(&self) -> Result<Outcome> {
        let mut outcome = self.outcome.clone();
        let known = outcome
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|outcome| *outcome);
        known.ok_or(Error::Ended)
    }

    /// Waits until the process has ended and its output has been sent.
    pub async fn wait(&self) -> Result<Outcome> {
        let outcome = self.ended().await?;
        self.streams.drained().await;
        Ok(outcome)
    }

    /// Sends a signal, 0 only to see whether it could be sent.
    pub fn signal(&self, number: u32) -> Result<()> {
        // Not reaped yet, so the PID is still this process's.
        if self.has_ended() {
            return Err(Error::Ended);
        }
        send(self.pid, number)
    }

    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let terminal = self.streams.terminal().ok_or(Error::NoTerminal)?;
        let terminal = std::os::fd::AsFd::as_fd(terminal.get_ref());
        sys::set_window(terminal, columns, rows).doing(|| "setting the terminal's size".into())
    }
}

/// Sends a signal to a process that is known to exist or to have been one's child.
pub fn send(pid: Pid, number: u32) -> Result<()> {
    let number = i32::try_from(number)
        .ok()
        .filter(|n| (0..=MAX_SIGNAL.cast_signed()).contains(n));
    let Some(number) = number else {
        return Err(Error::Invalid {
            what: "signal",
            why: format!("its number must be at most {MAX_SIGNAL}"),
        });
    };
    match sys::kill(pid, number) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Err(Error::Ended),
        result => result.doing(|| format!("sending signal {number} to process {pid}")),
    }
}
