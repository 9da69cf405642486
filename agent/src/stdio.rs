//! A process's standard streams, and what else it has open from its start: which streams to the host there are, what the process gets
//! in their place, and the pumps between the two. It gets a socket only where its caller had one: pipes and terminals can be opened
//! again through /dev/stdout, sockets cannot.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::{Uid, fchown, pipe2};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::connect::Connect;
use crate::dirs;
use crate::error::{Doing, Result};
use crate::preserved::Descriptor;
use crate::pump;
use crate::report::ChildStdio;
use crate::spawn::Handed;
use crate::sys;

/// What a stream's socket takes from the host before it is read, bytes.
pub const SOCKET_BUFFER: u64 = 1 << 20;

/// Size of a pipe between a process and its pump, bytes. More needs CAP_SYS_RESOURCE and gains nothing.
const PIPE_BUFFER: i32 = 1 << 20;

/// Host ports of a process's streams; 0: no stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ports {
    pub stdin: u32,
    pub stdout: u32,
    pub stderr: u32,
    /// What it has beside these, from number 3 on.
    pub preserved: Vec<Descriptor>,
}

/// Descriptors of a process that does not exist yet, with their streams connected.
pub struct Stdio {
    standard: Standard,
    preserved: Vec<End>,
}

enum Standard {
    /// Standard input, output and error.
    Separate([End; 3]),
    Terminal {
        socket: Option<OwnedFd>,
        listener: UnixListener,
        path: ConsolePath,
    },
}

/// One descriptor of a process.
struct End {
    /// What the process gets: the far end of a pipe or a pair of sockets, or a file.
    far: OwnedFd,
    stream: Option<Stream>,
}

/// What a pump moves bytes between.
struct Stream {
    kind: Kind,
    near: OwnedFd,
    socket: OwnedFd,
}

#[derive(Clone, Copy)]
enum Kind {
    Input,
    Output,
    Socket,
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
        let standard = if terminal {
            let socket = stream(connect, ports.stdin).await?;
            let (listener, path) = console().doing(|| "making the console's socket".into())?;
            Standard::Terminal {
                socket,
                listener,
                path,
            }
        } else {
            let stdin = End::standard(connect, ports.stdin, Kind::Input, owner).await?;
            let stdout = End::standard(connect, ports.stdout, Kind::Output, owner).await?;
            let stderr = End::standard(connect, ports.stderr, Kind::Output, owner).await?;
            Standard::Separate([stdin, stdout, stderr])
        };
        let mut preserved = Vec::with_capacity(ports.preserved.len());
        for wanted in &ports.preserved {
            preserved.push(End::preserved(connect, wanted, owner).await?);
        }
        Ok(Self {
            standard,
            preserved,
        })
    }

    /// What to tell the helper.
    pub fn for_helper(&self) -> ChildStdio {
        match &self.standard {
            Standard::Separate(_) => ChildStdio::Handed,
            Standard::Terminal { path, .. } => ChildStdio::Terminal(path.0.clone()),
        }
    }

    /// How many descriptors the process has beside stdio.
    pub fn preserved(&self) -> usize {
        self.preserved.len()
    }

    /// What to hand to the helper.
    pub fn handed(&self) -> Handed<'_> {
        Handed {
            preserved: self.preserved.iter().map(End::far).collect(),
            standard: match &self.standard {
                Standard::Separate(ends) => ends.iter().map(End::far).collect(),
                Standard::Terminal { .. } => Vec::new(),
            },
        }
    }

    /// Starts the pumps. The process exists: it has its descriptors, or its terminal waits at the console socket.
    pub fn start(self) -> Result<Streams> {
        let mut streams = Streams::new();
        match self.standard {
            Standard::Separate(ends) => streams.pump(ends),
            Standard::Terminal {
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
        streams.pump(self.preserved);
        Ok(streams)
    }
}

impl End {
    fn far(&self) -> BorrowedFd<'_> {
        self.far.as_fd()
    }

    /// /dev/null without a stream.
    async fn standard(
        connect: &dyn Connect,
        port: u32,
        kind: Kind,
        owner: Option<u32>,
    ) -> Result<Self> {
        match stream(connect, port).await? {
            Some(socket) => Self::carried(socket, kind, owner),
            None => {
                let far = null(matches!(kind, Kind::Input));
                let far = far.doing(|| "opening /dev/null".into())?;
                Ok(Self { far, stream: None })
            }
        }
    }

    async fn preserved(
        connect: &dyn Connect,
        wanted: &Descriptor,
        owner: Option<u32>,
    ) -> Result<Self> {
        let (port, kind) = match wanted {
            Descriptor::Input(port) => (*port, Kind::Input),
            Descriptor::Output(port) => (*port, Kind::Output),
            Descriptor::Socket(port) => (*port, Kind::Socket),
            Descriptor::Opened(file) => {
                let far = file.open();
                let far = far.doing(|| format!("opening {}", file.path().display()))?;
                return Ok(Self { far, stream: None });
            }
        };
        Self::carried(connected(connect, port).await?, kind, owner)
    }

    fn carried(socket: OwnedFd, kind: Kind, owner: Option<u32>) -> Result<Self> {
        let ends = match kind {
            Kind::Input => pipe(true, owner),
            Kind::Output => pipe(false, owner),
            Kind::Socket => pair(),
        };
        let (far, near) = ends.doing(|| "making a pipe".into())?;
        let stream = Stream { kind, near, socket };
        Ok(Self {
            far,
            stream: Some(stream),
        })
    }
}

/// The stream from a port of the host; none for port 0.
pub async fn stream(connect: &dyn Connect, port: u32) -> Result<Option<OwnedFd>> {
    match port {
        0 => Ok(None),
        _ => connected(connect, port).await.map(Some),
    }
}

async fn connected(connect: &dyn Connect, port: u32) -> Result<OwnedFd> {
    let socket = connect.connect(port).await;
    socket.doing(|| format!("connecting to the host's port {port} for a stream"))
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

/// A connected socket for the process, and the one that it is connected with.
fn pair() -> nix::Result<(OwnedFd, OwnedFd)> {
    let (far, near) = socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
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
    let terminal = sys::receive_descriptor(&socket)?;
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

    /// Starts the pumps of a process that has its ends.
    fn pump(&mut self, ends: impl IntoIterator<Item = End>) {
        for Stream { kind, near, socket } in ends.into_iter().filter_map(|end| end.stream) {
            match kind {
                Kind::Input => self.spawn(pump::input(socket, near)),
                Kind::Output => {
                    let ending = self.ending();
                    self.spawn(pump::output(near, socket, ending));
                }
                Kind::Socket => {
                    let ending = self.ending();
                    self.spawn(pump::socket(near, socket, ending));
                }
            }
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
