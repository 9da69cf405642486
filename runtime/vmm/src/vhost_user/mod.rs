//! Serves one of our devices to QEMU over a connected vhost-user socket, on one thread: protocol messages, the guest's kicks
//! and the device's own events all come to the same epoll, so that no lock is ever waited for. QEMU is believed about where
//! guest memory is; whatever is in guest memory is the guest's word.

mod backend;
mod early;
mod ring;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cloison_devices::Device;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{EpollEvent, EpollFlags, EpollTimeout};
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

use backend::Backend;
use early::Enable;

/// Epoll keys below are the numbers of queues.
const SOCKET: u64 = 1 << 32;
const HOST: u64 = SOCKET + 1;

/// Most events taken from one wait: every queue of a large device, its socket and its host descriptor.
const EVENTS: usize = 16;

/// How long after the last event every queue is looked at once more, milliseconds. A guest with one processor is translated without the
/// barriers of its `lock`ed instructions (TCG's CF_PARALLEL), so that what it last wrote may still be on its way to memory when it reads
/// whether to notify, or to expect an interrupt: either can be lost. A processor keeps a write to itself for far less than this.
const SETTLING: u16 = 1;

/// How long QEMU may take to die after it has hung up, milliseconds. It is generous: only a QEMU that hangs up and lives
/// makes anyone wait for it.
const DYING: u16 = 5000;

/// Why a device can no longer be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    /// The kernel refused something.
    #[error("cannot {what}")]
    System {
        what: &'static str,
        #[source]
        errno: Errno,
    },
    /// The socket failed.
    #[error("cannot use QEMU's socket")]
    Io(#[source] io::Error),
    /// The device asks for a queue that cannot be.
    #[error("cannot make a queue")]
    Queue(#[source] virtio_queue::Error),
    /// QEMU said something over vhost-user that cannot be honoured.
    #[error("cannot do what QEMU asked for")]
    Protocol(#[source] VhostError),
    /// QEMU closed the socket and did not end.
    #[error("QEMU has let go of the device")]
    HungUp,
}

fn system(what: &'static str) -> impl Fn(Errno) -> ServeError {
    move |errno| ServeError::System { what, errno }
}

/// A device with QEMU's socket, ready to be served.
pub(crate) struct Service {
    requests: BackendReqHandler<Mutex<Backend>>,
    backend: Arc<Mutex<Backend>>,
    /// The same socket, for requests that come too early.
    early: Option<UnixStream>,
    /// Readable when QEMU has ended.
    qemu: OwnedFd,
}

impl Service {
    /// `running` is set when the guest's driver has taken the device.
    pub(crate) fn new(
        device: Box<dyn Device>,
        socket: UnixStream,
        qemu: OwnedFd,
        running: Arc<AtomicBool>,
    ) -> Result<Self, ServeError> {
        let backend = Backend::new(device, running)?;
        let watch = |fd: BorrowedFd<'_>, key| {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, key);
            backend
                .epoll()
                .add(fd, event)
                .map_err(system("watch a device"))
        };
        watch(socket.as_fd(), SOCKET)?;
        if let Some(fd) = backend.host_fd() {
            watch(fd, HOST)?;
        }
        let early = match backend.expects_early() {
            true => Some(socket.try_clone().map_err(ServeError::Io)?),
            false => None,
        };
        let backend = Arc::new(Mutex::new(backend));
        let requests = BackendReqHandler::from_stream(socket, Arc::clone(&backend));
        Ok(Self {
            requests,
            backend,
            early,
            qemu,
        })
    }

    /// Serves until QEMU has ended.
    pub(crate) fn run(mut self) -> Result<(), ServeError> {
        let epoll = Arc::clone(self.lock().epoll());
        let mut events = [EpollEvent::empty(); EVENTS];
        let mut patience = EpollTimeout::NONE;
        loop {
            let ready = match epoll.wait(&mut events, patience) {
                Ok(0) => {
                    self.lock().look_again();
                    patience = EpollTimeout::NONE;
                    continue;
                }
                Ok(ready) => ready,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(system("wait for events")(errno)),
            };
            patience = EpollTimeout::from(SETTLING);
            for event in events.iter().take(ready) {
                match event.data() {
                    SOCKET if self.take_early()? => {}
                    SOCKET => match self.requests.handle_request() {
                        Ok(()) => {}
                        Err(error) if is_hang_up(&error) => return self.see_qemu_off(),
                        Err(error) => return Err(ServeError::Protocol(error)),
                    },
                    HOST => self.lock().host_event(),
                    queue => self.lock().kicked(queue as usize),
                }
            }
        }
    }

    fn take_early(&self) -> Result<bool, ServeError> {
        let mut backend = self.lock();
        let Some(socket) = self.early.as_ref().filter(|_| backend.expects_early()) else {
            return Ok(false);
        };
        match early::take(socket).map_err(ServeError::Io)? {
            Some(Enable { ring, enable }) => {
                let enabled = backend.enable(ring, enable);
                enabled.map(|()| true).map_err(ServeError::Protocol)
            }
            None => Ok(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Backend> {
        // Only this thread ever takes the lock, and a panic ends it.
        self.backend.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A QEMU that ends closes its sockets a moment before it is gone; one that closes a socket and goes on would leave the
    /// guest with a dead device.
    fn see_qemu_off(&self) -> Result<(), ServeError> {
        let mut fds = [PollFd::new(self.qemu.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(DYING)) {
            Ok(0) => Err(ServeError::HungUp),
            Ok(_) => Ok(()),
            Err(errno) => Err(system("wait for QEMU to end")(errno)),
        }
    }
}

/// Waits until QEMU connects to `listener`; `None` when it has ended instead.
pub(crate) fn accept(
    listener: &UnixListener,
    qemu: BorrowedFd<'_>,
) -> Result<Option<UnixStream>, ServeError> {
    loop {
        let mut fds = [
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(qemu, PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(system("wait for QEMU's connection")(errno)),
        }
        match listener.accept() {
            Ok((socket, _)) => return Ok(Some(socket)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(ServeError::Io(e)),
        }
        if fds[1].any() == Some(true) {
            return Ok(None);
        }
    }
}

fn is_hang_up(error: &VhostError) -> bool {
    matches!(
        error,
        VhostError::Disconnected
            | VhostError::PartialMessage
            | VhostError::SocketBroken(_)
            | VhostError::SocketError(_)
    )
}

#[cfg(test)]
mod tests;
