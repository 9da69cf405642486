//! Collects every child of PID 1: the processes somebody waits for and every orphan of the guest. Nothing else in the
//! agent may wait for a process, so a PID stays valid until its exit has been published here.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0..=255; 128+n when ended by signal n.
    pub code: u32,
    /// 0 when the process exited by itself.
    pub signal: u32,
    /// Wall clock when it was reaped, nanoseconds since the epoch.
    pub at_ns: u64,
}

/// Becomes `Some` once, when the process has ended.
pub type ExitWatch = watch::Receiver<Option<Exit>>;

/// Waits for a process; `None` if it can no longer end because the reaper is gone, which only a test sees.
pub async fn ended(watch: &mut ExitWatch) -> Option<Exit> {
    watch
        .wait_for(Option::is_some)
        .await
        .ok()
        .and_then(|exit| *exit)
}

#[derive(Default)]
struct State {
    watched: HashMap<Pid, watch::Sender<Option<Exit>>>,
    /// Children that are being made and whose PIDs are not known yet. While there are any, unknown children stay
    /// zombies: their PIDs cannot be reused and their statuses are not lost.
    expected: usize,
}

/// The collector.
pub struct Reaper(Mutex<State>);

impl Reaper {
    /// Starts to collect. Must be called within a tokio runtime, once per process.
    pub fn start() -> std::io::Result<Arc<Self>> {
        let reaper = Arc::new(Self(Mutex::default()));
        let mut children = signal(SignalKind::child())?;
        let collector = Arc::clone(&reaper);
        tokio::spawn(async move {
            while children.recv().await.is_some() {
                collector.lock().collect();
            }
        });
        Ok(reaper)
    }

    /// Announces a child whose PID will be known later. Take this before the child is made.
    pub fn expect(self: &Arc<Self>) -> Expectation {
        self.lock().expected += 1;
        Expectation(Arc::clone(self))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics with the lock held; and a map left half-way is still a map.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// While it lives, no unknown child is reaped.
pub struct Expectation(Arc<Reaper>);

impl Expectation {
    /// Watches the child that was made.
    pub fn watch(&self, pid: Pid) -> ExitWatch {
        let mut state = self.0.lock();
        let (sender, receiver) = watch::channel(None);
        state.watched.insert(pid, sender);
        state.collect_one(pid);
        receiver
    }
}

impl Drop for Expectation {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.expected -= 1;
        state.collect();
    }
}

impl State {
    fn collect(&mut self) {
        if self.expected > 0 {
            let known: Vec<Pid> = self.watched.keys().copied().collect();
            for pid in known {
                self.collect_one(pid);
            }
            return;
        }
        // One child per turn; the kernel has finitely many and the loop ends with "none" or "no more zombies".
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                break;
            }
            self.publish(status);
        }
    }

    fn collect_one(&mut self, pid: Pid) {
        match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
            Ok(status) => self.publish(status),
            // Still the helper's child: it becomes ours, and SIGCHLD comes, when the helper has ended.
            Err(Errno::ECHILD) => {}
            Err(_) => {}
        }
    }

    fn publish(&mut self, status: WaitStatus) {
        let (pid, code, signal) = match status {
            WaitStatus::Exited(pid, code) => (pid, code.cast_unsigned() & 0xff, 0),
            WaitStatus::Signaled(pid, signal, _) => {
                let signal = (signal as i32).cast_unsigned();
                (pid, 128 + signal, signal)
            }
            _ => return,
        };
        if let Some(watch) = self.watched.remove(&pid) {
            watch.send_replace(Some(Exit {
                code,
                signal,
                at_ns: now(),
            }));
        }
    }
}

fn now() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
