//! The host's side of the device: the one epoll instance behind its host descriptor, the socket that clients connect to, the
//! paths the guest's connections lead to, and the descriptors of streams. It makes the host's half of a stream; what is
//! said to the guest is not its business.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use tracing::warn;

use super::VsockError;
use super::attachment::Waiting;
use super::connection::Host;
use super::descriptor::{Checked, Watched};
use super::handshake::{Handshake, MAX_HANDSHAKES, Progress};
use super::stream::{Sink, Source};

/// Most events taken in one go, so that the queues are served between.
const EVENTS_PER_CALL: usize = 32;

/// Most clients let in in one go, for the same reason.
const ACCEPTS_PER_CALL: usize = 16;

/// What an epoll event is about. Numbers of streams and of clients are never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Token {
    /// The device has left itself something to do.
    Kick,
    Listener,
    Client(u64),
    Source(u64),
    Sink(u64),
}

impl Token {
    fn to_data(self) -> u64 {
        match self {
            Self::Kick => 0,
            Self::Listener => 1,
            Self::Client(id) => id << 3 | 2,
            Self::Source(id) => id << 3 | 3,
            Self::Sink(id) => id << 3 | 4,
        }
    }

    fn from_data(data: u64) -> Self {
        match (data & 7, data >> 3) {
            (1, _) => Self::Listener,
            (2, id) => Self::Client(id),
            (3, id) => Self::Source(id),
            (4, id) => Self::Sink(id),
            _ => Self::Kick,
        }
    }
}

/// An event: what it is about, and whether the other end has hung up for good.
#[derive(Debug, Clone, Copy)]
pub(super) struct Event {
    pub token: Token,
    pub hung_up: bool,
}

/// A client that has said which guest port it wants.
#[derive(Debug)]
pub(super) struct Client {
    handshake: Handshake,
    pub port: u32,
}

impl Client {
    pub(super) fn refuse(self, reason: &str) {
        self.handshake.refuse(reason);
    }
}

/// All of the host's side.
#[derive(Debug)]
pub(super) struct HostSide {
    epoll: Arc<Epoll>,
    kick: EventFd,
    listener: Option<UnixListener>,
    /// Clients in the middle of their line, the oldest first.
    handshakes: BTreeMap<u64, Handshake>,
    listen_prefix: Option<PathBuf>,
    next_id: u64,
}

impl HostSide {
    pub(super) fn new(
        listener: Option<UnixListener>,
        listen_prefix: Option<PathBuf>,
    ) -> Result<Self, VsockError> {
        let failed = |what| move |source: Errno| VsockError::Setup { what, source };
        if let Some(prefix) = &listen_prefix {
            // The longest path that will be used. What `connect` would refuse later is refused here.
            UnixAddr::new(&path_of(prefix, u32::MAX)).map_err(|source| VsockError::Prefix {
                prefix: prefix.clone(),
                source,
            })?;
        }
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map_err(failed("creating an epoll instance"))?;
        let kick = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(failed("creating an eventfd"))?;
        let edge = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        epoll
            .add(&kick, EpollEvent::new(edge, Token::Kick.to_data()))
            .map_err(failed("watching an eventfd"))?;
        if let Some(listener) = &listener {
            listener
                .set_nonblocking(true)
                .map_err(|e| failed("making the listening socket non-blocking")(errno(&e)))?;
            epoll
                .add(listener, EpollEvent::new(edge, Token::Listener.to_data()))
                .map_err(failed("watching the listening socket"))?;
        }
        Ok(Self {
            epoll: Arc::new(epoll),
            kick,
            listener,
            handshakes: BTreeMap::new(),
            listen_prefix,
            next_id: 0,
        })
    }

    /// What becomes readable when [`HostSide::events`] has something.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    /// Makes [`HostSide::fd`] readable.
    pub(super) fn kick(&self) {
        // It fails only when the counter is full, and a full counter has made the descriptor readable. The event is
        // edge-triggered, so that the counter need not be read.
        let _ = self.kick.write(1);
    }

    /// Some of what has happened; more of it keeps [`HostSide::fd`] readable.
    pub(super) fn events(&self) -> impl Iterator<Item = Event> + use<> {
        let mut events = [EpollEvent::empty(); EVENTS_PER_CALL];
        // With a valid instance and no time to wait there is nothing that can fail.
        let count = self
            .epoll
            .wait(&mut events, EpollTimeout::ZERO)
            .unwrap_or(0);
        events.into_iter().take(count).map(|event| Event {
            token: Token::from_data(event.data()),
            hung_up: event.events().contains(EpollFlags::EPOLLHUP),
        })
    }

    /// A number for a stream or a client.
    pub(super) fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Lets clients in.
    pub(super) fn accept(&mut self) {
        for _ in 0..ACCEPTS_PER_CALL {
            let Some(listener) = &self.listener else {
                return;
            };
            let client = match listener.accept() {
                Ok((client, _)) => Checked::socket(client.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    warn!(%error, "a client of the guest's vsock could not be let in");
                    return;
                }
            };
            let id = self.next_id();
            let token = Token::Client(id).to_data();
            match Watched::new(client, &self.epoll, token, EpollFlags::EPOLLIN) {
                Ok(client) => {
                    if self.handshakes.len() >= MAX_HANDSHAKES
                        && let Some((_, oldest)) = self.handshakes.pop_first()
                    {
                        oldest.refuse("too many clients are connecting");
                    }
                    self.handshakes.insert(id, Handshake::new(client));
                }
                Err(error) => warn!(%error, "a client of the guest's vsock could not be watched"),
            }
        }
        // There may be more, and the edge is spent.
        self.kick_accept();
    }

    /// Has the listener reported again.
    fn kick_accept(&self) {
        if let Some(listener) = &self.listener {
            let edge = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
            let mut event = EpollEvent::new(edge, Token::Listener.to_data());
            if let Err(error) = self.epoll.modify(listener, &mut event) {
                warn!(%error, "the listening socket could not be watched again");
            }
        }
    }

    /// Hears client `id` out; answers it when it wants a stream.
    pub(super) fn hear(&mut self, id: u64) -> Option<Client> {
        let progress = self.handshakes.get_mut(&id)?.advance();
        if progress == Progress::Waiting {
            return None;
        }
        let handshake = self.handshakes.remove(&id)?;
        match progress {
            Progress::Connect(port) => return Some(Client { handshake, port }),
            Progress::Refused(reason) => handshake.refuse(reason),
            Progress::Gone | Progress::Waiting => {}
        }
        None
    }

    /// The host's half of stream `id` for a client.
    pub(super) fn join_client(&self, id: u64, client: &Client) -> io::Result<Host> {
        self.join_socket(id, client.handshake.as_fd().try_clone_to_owned()?)
    }

    /// The host's half of stream `id` for a connection of the guest's to `port` with nothing attached.
    pub(super) fn join_path(&self, id: u64, port: u32) -> io::Result<Host> {
        let prefix = self.listen_prefix.as_ref().ok_or(Errno::ECONNREFUSED)?;
        let address = UnixAddr::new(&path_of(prefix, port))?;
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        // A Unix socket connects at once or not at all; with a full backlog the answer is EAGAIN.
        connect(fd.as_raw_fd(), &address)?;
        self.join_socket(id, fd)
    }

    fn join_socket(&self, id: u64, socket: OwnedFd) -> io::Result<Host> {
        let write = socket.try_clone()?;
        self.join_attached(
            id,
            Waiting {
                read: Some(Checked::socket(socket)),
                write: Some(Checked::socket(write)),
                one_socket: true,
                done: None,
                first_output: None,
            },
        )
    }

    /// The host's half of stream `id` for what was attached.
    pub(super) fn join_attached(&self, id: u64, waiting: Waiting) -> io::Result<Host> {
        let Waiting {
            read,
            write,
            one_socket,
            done,
            first_output,
        } = waiting;
        let watch = |checked, token: Token, events| {
            Watched::new(checked, &self.epoll, token.to_data(), events)
        };
        let source = read.map(|read| watch(read, Token::Source(id), EpollFlags::EPOLLIN));
        let sink = write.map(|write| watch(write, Token::Sink(id), EpollFlags::empty()));
        Ok(Host {
            source: source.transpose()?.map(|fd| Source::new(fd, one_socket)),
            sink: sink
                .transpose()?
                .map(|fd| Sink::new(fd, one_socket, first_output)),
            done,
        })
    }
}

/// `<prefix>_<port>`
fn path_of(prefix: &Path, port: u32) -> PathBuf {
    let mut path = prefix.as_os_str().to_owned();
    path.push(format!("_{port}"));
    PathBuf::from(path)
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}
