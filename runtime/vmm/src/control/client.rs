//! The asking side of the control socket. Calls block until the VM process has answered, which it does at once unless
//! something is very wrong with it; then they fail after [`REPLY_TIMEOUT`].

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nix::sys::socket::{MsgFlags, SockType, setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use super::{DeviceKind, Reply, Request, Status};
use crate::nic::Plugged;
use crate::packet::{self, MAX_PACKET, Received};

/// Seconds after which a VM process that does not answer is given up.
const REPLY_TIMEOUT: i64 = 10;

/// A connection to a VM process. One request is under way at a time; threads that share a client take turns.
#[derive(Debug)]
pub struct ControlClient {
    socket: OwnedFd,
    /// Held from a request to its reply. Whether every request so far has had its reply: after one that has not, a late
    /// reply could be taken for that of the next.
    in_step: Mutex<bool>,
}

/// Why a VM process could not be asked, or what it said no with.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// No VM process listens there.
    #[error("cannot reach the VM process at {}", path.display())]
    Connect {
        /// The control socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The VM process ended before or while it was asked.
    #[error("the VM process has gone away")]
    Gone,
    /// The VM process is there and does not answer.
    #[error("the VM process does not answer (is it stopped?)")]
    Silent,
    /// The connection failed in some other way.
    #[error("cannot talk to the VM process")]
    Io(#[source] io::Error),
    /// The VM process speaks another language.
    #[error("the VM process gave an answer that makes no sense here (is it of another version?)")]
    Nonsense(#[source] Option<serde_json::Error>),
    /// The VM process understood and refused.
    #[error("the VM process refused: {0}")]
    Refused(String),
}

impl ControlClient {
    /// Connects to the control socket at `path`; works from the moment [`crate::launch`] has returned.
    ///
    /// # Errors
    /// [`ControlError::Connect`].
    pub fn connect(path: &Path) -> Result<Self, ControlError> {
        let connect = || {
            let socket = packet::connect_to(path, SockType::SeqPacket)?;
            setsockopt(
                &socket,
                sockopt::ReceiveTimeout,
                &TimeVal::seconds(REPLY_TIMEOUT),
            )?;
            setsockopt(
                &socket,
                sockopt::SendTimeout,
                &TimeVal::seconds(REPLY_TIMEOUT),
            )?;
            Ok(socket)
        };
        let socket = connect().map_err(|source| ControlError::Connect {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            socket,
            in_step: Mutex::new(true),
        })
    }

    /// How the VM is.
    ///
    /// # Errors
    /// As for every request: see [`ControlError`].
    pub fn status(&self) -> Result<Status, ControlError> {
        match self.ask(&Request::Status {}, &[])? {
            Reply::Status(status) => Ok(status),
            _ => Err(ControlError::Nonsense(None)),
        }
    }

    /// Attaches a stream to a host port of the VM process's choice, and returns the port: what the guest sends there goes to
    /// `write`, what `read` yields goes to the guest, and `done` is closed when the stream is over. The descriptors stay the
    /// caller's; the VM process gets copies. A stream that the guest has not taken up goes with this client.
    ///
    /// # Errors
    /// See [`ControlError`]; a descriptor that is blocking and no file, or too many streams, is [`ControlError::Refused`].
    pub fn attach(
        &self,
        read: Option<BorrowedFd<'_>>,
        write: Option<BorrowedFd<'_>>,
        done: Option<BorrowedFd<'_>>,
    ) -> Result<u32, ControlError> {
        let request = Request::Attach {
            read: read.is_some(),
            write: write.is_some(),
            done: done.is_some(),
        };
        let fds: Vec<RawFd> = [read, write, done]
            .iter()
            .flatten()
            .map(AsRawFd::as_raw_fd)
            .collect();
        match self.ask(&request, &fds)? {
            Reply::Attached { port } => Ok(port),
            _ => Err(ControlError::Nonsense(None)),
        }
    }

    /// The last part of what the guest's kernel has written to its console.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub fn kernel_log(&self) -> Result<String, ControlError> {
        match self.ask(&Request::KernelLog {}, &[])? {
            Reply::KernelLog { text } => Ok(text),
            _ => Err(ControlError::Nonsense(None)),
        }
    }

    /// Stops the guest's vCPUs; returns when they have stopped. A VM that is paused stays so.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub fn pause(&self) -> Result<(), ControlError> {
        self.tell(&Request::Pause {})
    }

    /// Lets a paused guest go on.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub fn resume(&self) -> Result<(), ControlError> {
        self.tell(&Request::Resume {})
    }

    /// Lets the guest use `vcpus` vCPUs, 1 to [`Status::max_vcpus`]. The agent is to start those that come, afterwards, and to stop
    /// those that go, before.
    ///
    /// # Errors
    /// See [`ControlError`]; [`ControlError::Refused`] on an engine that cannot, and for a number out of range.
    pub fn resize_vcpus(&self, vcpus: u8) -> Result<(), ControlError> {
        self.tell(&Request::ResizeVcpus { vcpus })
    }

    /// Lets the guest have `memory_mib` MiB, what it was started with to [`Status::max_memory_mib`]. Its kernel takes up and gives back
    /// memory in its own time, and gives back no more than it can spare: [`Status::memory_mib`] says how far it is, and the VM process's
    /// copy of `done` is closed when it has just that, or is told another size.
    ///
    /// # Errors
    /// See [`ControlError`]; [`ControlError::Refused`] on an engine that cannot, and for a size out of range.
    pub fn resize_memory(
        &self,
        memory_mib: u32,
        done: Option<BorrowedFd<'_>>,
    ) -> Result<(), ControlError> {
        let request = Request::ResizeMemory {
            memory_mib,
            done: done.is_some(),
        };
        let fds: Vec<RawFd> = done.iter().map(AsRawFd::as_raw_fd).collect();
        match self.ask(&request, &fds)? {
            Reply::Done {} => Ok(()),
            _ => Err(ControlError::Nonsense(None)),
        }
    }

    /// Gives the guest one more device, made from `file` if it needs one. Answers where it is: unless it was
    /// [`Plugged::present`], the agent is to look there.
    ///
    /// # Errors
    /// See [`ControlError`]; [`ControlError::Refused`] on an engine that cannot, when no slot is empty, and for a file that the
    /// device cannot be made from.
    pub fn plug(
        &self,
        device: DeviceKind,
        file: Option<BorrowedFd<'_>>,
    ) -> Result<Plugged, ControlError> {
        let fds: Vec<RawFd> = file.iter().map(AsRawFd::as_raw_fd).collect();
        match self.ask(&Request::Plug { device }, &fds)? {
            Reply::Plugged(plugged) => Ok(plugged),
            _ => Err(ControlError::Nonsense(None)),
        }
    }

    /// Takes a device away that came by [`ControlClient::plug`], or a network device, that the agent has let go of.
    ///
    /// # Errors
    /// See [`ControlError`]; [`ControlError::Refused`] when there is no such device.
    pub fn unplug(&self, slot: u32) -> Result<(), ControlError> {
        self.tell(&Request::Unplug { slot })
    }

    /// Ends the VM at once. Returns when the VM process has agreed to it, not when it is gone.
    ///
    /// # Errors
    /// See [`ControlError`]; [`ControlError::Gone`] means that there is nothing left to kill.
    pub fn kill(&self) -> Result<(), ControlError> {
        self.tell(&Request::Kill {})
    }

    /// Asks for something to which there is no answer but that it is done.
    fn tell(&self, request: &Request) -> Result<(), ControlError> {
        match self.ask(request, &[])? {
            Reply::Done {} => Ok(()),
            _ => Err(ControlError::Nonsense(None)),
        }
    }

    fn ask(&self, request: &Request, fds: &[RawFd]) -> Result<Reply, ControlError> {
        let text = serde_json::to_vec(request).map_err(|error| ControlError::Io(error.into()))?;
        let mut in_step = self.in_step.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::replace(&mut *in_step, false) {
            return Err(ControlError::Silent);
        }
        packet::send(self.socket.as_fd(), &text, fds, MsgFlags::empty()).map_err(failed)?;
        let mut buffer = vec![0; MAX_PACKET];
        let received =
            packet::receive(self.socket.as_fd(), &mut buffer, MsgFlags::empty()).map_err(failed)?;
        *in_step = true;
        match received {
            Received::Closed => Err(ControlError::Gone),
            Received::TooLong => Err(ControlError::Nonsense(None)),
            Received::Packet(packet) => match serde_json::from_slice(&packet.bytes) {
                Ok(Reply::Error { message }) => Err(ControlError::Refused(message)),
                Ok(reply) => Ok(reply),
                Err(error) => Err(ControlError::Nonsense(Some(error))),
            },
        }
    }
}

/// The socket itself: it hangs up when the VM process is gone. Reading or writing it would break the conversation.
impl AsFd for ControlClient {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn failed(error: io::Error) -> ControlError {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ControlError::Gone,
        io::ErrorKind::WouldBlock => ControlError::Silent,
        _ => ControlError::Io(error),
    }
}
