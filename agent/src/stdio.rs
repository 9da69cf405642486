//! A process's standard streams: which streams to the host there are, what the process gets in their place, and the
//! pumps between the two. The process never gets a socket: pipes and terminals can be opened again through
//! /dev/stdout, sockets cannot.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::{fs, os::fd::AsRawFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{Uid, fchown, pipe2};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::connect::Connect;
use crate::dirs;
use crate::error::{Doing, Result};
use crate::pump;
use crate::report::ChildStdio;
use crate::sys;

/// What a stream's socket takes from the host before it is read, bytes.
pub const SOCKET_BUFFER: u64 = 1 << 20;

/// Size of a pipe between a process and its pump, bytes. More needs CAP_SYS_RESOURCE and gains nothing.
const PIPE_BUFFER: i32 = 1 << 20;

/// Host ports of a process's streams; 0: no stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ports {
    pub stdin: u32,
    pub stdout: u32,
    pub stderr: u32,
}

/// Streams that are connected, for a process that does not exist yet.
pub enum Stdio {
    Pipes {
        /// What the process gets: the pipes' far ends, or /dev/null.
        child: [OwnedFd; 3],
        /// Socket and pipe, where there is a stream.
        near: [Option<(OwnedFd, OwnedFd)>; 3],
    },
    Terminal {
        socket: Option<OwnedFd>,
        listener: UnixListener,
        path: ConsolePath,
    },
}

/// The path of a console socket; the file goes with it.
pub struct ConsolePath(PathBuf);

impl Drop for ConsolePath {
    fn drop(&mut self) {
        // Whatever is left is on a tmpfs nobody else looks at.
        let _ = fs::remove_file(&self.0);
    }
}

impl Stdio {
    /// Connects a process's streams to the host. `owner` is the user the pipes belong to, so that the process can open
    /// them again; a user without an ID in the guest has none.
    pub async fn open(
        connect: &dyn Connect,
        ports: Ports,
        terminal: bool,
        owner: Option<u32>,
    ) -> Result<Self> {
        if terminal {
            let socket = stream(connect, ports.stdin).await?;
            let (listener, path) = console().doing(|| "making the console's socket".into())?;
            return Ok(Self::Terminal {
                socket,
                listener,
                path,
            });
        }
        let mut child = Vec::with_capacity(3);
        let mut near = [None, None, None];
        let streams = [
            (ports.stdin, true),
            (ports.stdout, false),
            (ports.stderr, false),
        ];
        for (slot, (port, input)) in near.iter_mut().zip(streams) {
            let Some(socket) = stream(connect, port).await? else {
                child.push(null(input).doing(|| "opening /dev/null".into())?);
                continue;
            };
            let (far, pipe) = pipe(input, owner).doing(|| "making a pipe".into())?;
            child.push(far);
            *slot = Some((socket, pipe));
        }
        match <[OwnedFd; 3]>::try_from(child) {
            Ok(child) => Ok(Self::Pipes { child, near }),
            Err(_) => unreachable!("one descriptor was pushed for each of three streams"),
        }
    }

    /// What to tell the helper.
    pub fn for_helper(&self) -> ChildStdio {
        match self {
            Self::Pipes { child, .. } => {
                ChildStdio::Descriptors(child.each_ref().map(|fd| fd.as_raw_fd()))
            }
            Self::Terminal { path, .. } => ChildStdio::Terminal(path.0.clone()),
        }
    }

    /// What the helper must inherit.
    pub fn inherited(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Self::Pipes { child, .. } => child.iter().map(AsFd::as_fd).collect(),
            Self::Terminal { .. } => Vec::new(),
        }
    }

    /// Starts the pumps. The process exists: it has its pipes, or its terminal waits at the console socket.
    pub fn start(self) -> Result<Streams> {
        let mut streams = Streams::new();
        match self {
            Self::Pipes { child, near } => {
                drop(child);
                let [stdin, stdout, stderr] = near;
                if let Some((socket, pipe)) = stdin {
                    streams.spawn(pump::input(socket, pipe));
                }
                for (socket, pipe) in [stdout, stderr].into_iter().flatten() {
                    let ending = streams.ending();
                    streams.spawn(pump::output(pipe, socket, ending));
                }
            }
            Self::Terminal {
                socket,
                listener,
                path,
            } => {
                let terminal = receive(&listener).doing(|| "receiving the terminal".into())?;
                drop((listener, path));
                let terminal = Arc::new(terminal);
                streams.terminal = Arc::downgrade(&terminal);
                match socket {
                    Some(socket) => {
                        let ending = streams.ending();
                        streams.spawn(pump::terminal(terminal, socket, ending));
                    }
                    None => streams.spawn(pump::discard(terminal)),
                }
            }
        }
        Ok(streams)
    }
}

/// The stream from a port of the host; none for port 0.
pub async fn stream(connect: &dyn Connect, port: u32) -> Result<Option<OwnedFd>> {
    if port == 0 {
        return Ok(None);
    }
    let socket = connect.connect(port).await;
    socket
        .map(Some)
        .doing(|| format!("connecting to the host's port {port} for a stream"))
}

fn null(input: bool) -> io::Result<OwnedFd> {
    Ok(fs::File::options()
        .read(input)
        .write(!input)
        .open("/dev/null")?
        .into())
}

/// A pipe's far end, for the process, and its near end, for the pump.
fn pipe(input: bool, owner: Option<u32>) -> nix::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    // Both ends are one inode.
    fchown(&read, owner.map(Uid::from_raw), None)?;
    // A smaller pipe is slower and nothing else.
    let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(PIPE_BUFFER));
    let (far, near) = if input { (read, write) } else { (write, read) };
    // Of the near end alone: the two ends have flags of their own, and the process expects a blocking one.
    fcntl(&near, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((far, near))
}

fn console() -> io::Result<(UnixListener, ConsolePath)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    fs::create_dir_all(dirs::CONSOLES)?;
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = PathBuf::from(format!("{}/{number}", dirs::CONSOLES));
    let listener = UnixListener::bind(&path)?;
    Ok((listener, ConsolePath(path)))
}

/// The process has connected and sent before it was reported to exist, so this does not wait.
fn receive(listener: &UnixListener) -> io::Result<AsyncFd<OwnedFd>> {
    listener.set_nonblocking(true)?;
    let (socket, _) = listener.accept()?;
    socket.set_nonblocking(true)?;
    let terminal = sys::receive_descriptor(socket.as_fd())?;
    fcntl(
        &terminal,
        FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK),
    )?;
    sys::register(terminal, Interest::READABLE | Interest::WRITABLE)
}

/// The running pumps of a process. They end by themselves; dropping this ends them at once.
pub struct Streams {
    exited: watch::Sender<bool>,
    drained: Vec<watch::Receiver<bool>>,
    pumps: Vec<AbortHandle>,
    terminal: Weak<AsyncFd<OwnedFd>>,
}

impl Streams {
    fn new() -> Self {
        Self {
            exited: watch::Sender::new(false),
            drained: Vec::new(),
            pumps: Vec::new(),
            terminal: Weak::new(),
        }
    }

    fn ending(&mut self) -> pump::Ending {
        let drained = watch::Sender::new(false);
        self.drained.push(drained.subscribe());
        pump::Ending {
            exited: self.exited.subscribe(),
            drained,
        }
    }

    fn spawn(&mut self, pump: impl Future<Output = io::Result<()>> + Send + 'static) {
        let task = tokio::spawn(async move {
            // Both sides learn of the end from the closed descriptors; there is nobody else to tell.
            let _ = pump.await;
        });
        self.pumps.push(task.abort_handle());
    }

    /// To be called when the process has ended.
    pub fn process_ended(&self) {
        self.exited.send_replace(true);
    }

    /// Waits until all the process wrote before it ended has been handed to its streams.
    pub async fn drained(&self) {
        for drained in &self.drained {
            // An error means that the pump is gone, and with it what it could have sent.
            let _ = drained.clone().wait_for(|done| *done).await;
        }
    }

    /// The process's terminal, if it has one that is still open.
    pub fn terminal(&self) -> Option<Arc<AsyncFd<OwnedFd>>> {
        self.terminal.upgrade()
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        for pump in &self.pumps {
            pump.abort();
        }
    }
}

#[cfg(test)]
#[path = "stdio/tests.rs"]
mod tests;
