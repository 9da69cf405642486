//! The answering side of the control socket, driven by the VM process's main loop. It never blocks: a client that does not
//! take its reply is hung up on, and no request, however malformed, does more than earn its sender an error.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, SockFlag, accept4};

use super::{DeviceKind, Reply, Request, Status};
use crate::nic::Plugged;
use crate::packet::{self, MAX_PACKET, Packet, Received};

/// The most clients at a time; one more is told so and hung up on.
pub(crate) const MAX_CLIENTS: usize = 64;

/// The most bytes of kernel log in one reply. In JSON they become at most twice as many, for control characters other than
/// tab and newline have been taken out, and that fits into a packet.
const MAX_LOG_REPLY: usize = MAX_PACKET / 2 - 256;

/// What the server needs of the VM process.
pub(crate) trait Host {
    fn status(&self) -> Status;

    /// Connects a port to the descriptors, or says why not.
    fn attach(
        &mut self,
        read: Option<OwnedFd>,
        write: Option<OwnedFd>,
        done: Option<OwnedFd>,
    ) -> Result<u32, String>;

    /// Takes a stream back that the guest has not taken up; one that it has stays.
    fn detach(&mut self, port: u32);

    /// At most the last `limit` bytes of the kernel's log.
    fn kernel_log(&self, limit: usize) -> String;

    /// Stops the guest, or says why not; so do those below.
    fn pause(&mut self) -> Result<(), String>;

    fn resume(&mut self) -> Result<(), String>;

    fn resize_vcpus(&mut self, vcpus: u8) -> Result<(), String>;

    /// Closes the descriptor when the guest has that much.
    fn resize_memory(&mut self, mib: u32, done: Option<OwnedFd>) -> Result<(), String>;

    /// Answers where the device is.
    fn plug(&mut self, device: DeviceKind, file: Option<OwnedFd>) -> Result<Plugged, String>;

    fn unplug(&mut self, slot: u32) -> Result<(), String>;

    /// Ends the VM as soon as the request has been answered.
    fn kill(&mut self);
}

/// A client, and the ports it has attached streams to. Streams that the guest has not taken up go with the client: nobody is
/// left who would tell the guest of them, and their other ends must see that.
#[derive(Debug)]
struct Client {
    socket: OwnedFd,
    ports: Vec<u32>,
}

/// The listening socket and its clients.
#[derive(Debug)]
pub(crate) struct Server {
    listener: OwnedFd,
    clients: BTreeMap<RawFd, Client>,
    /// Room for one packet, made when the first client comes.
    buffer: Vec<u8>,
}

impl Server {
    /// `listener` is a non-blocking SOCK_SEQPACKET socket that listens already.
    pub(crate) fn new(listener: OwnedFd) -> Self {
        Self {
            listener,
            clients: BTreeMap::new(),
            buffer: Vec::new(),
        }
    }

    /// The socket to watch for [`Server::accept`], edge-triggered: on a level, running out of descriptors would become a
    /// busy loop.
    pub(crate) fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Takes in all waiting clients, and shows each to `watch`.
    pub(crate) fn accept(
        &mut self,
        host: &mut dyn Host,
        mut watch: impl FnMut(BorrowedFd<'_>) -> io::Result<()>,
    ) {
        loop {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let client = match accept4(self.listener.as_raw_fd(), flags) {
                // SAFETY: accept4 has just made this descriptor, and nothing else knows of it.
                Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
                Err(Errno::EINTR | Errno::ECONNABORTED) => continue,
                Err(Errno::EAGAIN) => return,
                Err(errno) => {
                    tracing::warn!("cannot accept a client on the control socket: {errno}");
                    return;
                }
            };
            if self.clients.len() >= MAX_CLIENTS {
                self.forget_the_gone(host);
            }
            if self.clients.len() >= MAX_CLIENTS {
                let message = format!("the VM process has {MAX_CLIENTS} clients already");
                answer(client.as_fd(), &Reply::Error { message });
            } else if let Err(error) = watch(client.as_fd()) {
                tracing::warn!("cannot watch a client of the control socket: {error}");
            } else {
                let ports = Vec::new();
                self.clients.insert(
                    client.as_raw_fd(),
                    Client {
                        socket: client,
                        ports,
                    },
                );
            }
        }
    }

    /// Makes room: those who have hung up may not have had their turn yet.
    fn forget_the_gone(&mut self, host: &mut dyn Host) {
        self.clients.retain(|_, client| {
            let mut fds = [PollFd::new(client.socket.as_fd(), PollFlags::empty())];
            let there = poll(&mut fds, PollTimeout::ZERO) == Ok(0);
            if !there {
                client.ports.drain(..).for_each(|port| host.detach(port));
            }
            there
        });
    }

    /// The client `fd` has sent something, or has gone: handles one packet.
    pub(crate) fn serve(&mut self, fd: RawFd, host: &mut dyn Host) {
        let Some(Client { socket, ports }) = self.clients.get_mut(&fd) else {
            return;
        };
        self.buffer.resize(MAX_PACKET, 0);
        let keep = match packet::receive(socket.as_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(Received::Packet(packet)) => {
                let reply = handle(packet, host);
                if let Reply::Attached { port } = reply {
                    ports.push(port);
                }
                answer(socket.as_fd(), &reply)
            }
            Ok(Received::TooLong) => {
                let message = format!("a request is at most {MAX_PACKET} bytes");
                answer(socket.as_fd(), &Reply::Error { message })
            }
            Ok(Received::Closed) => false,
            Err(error) => matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            ),
        };
        if !keep && let Some(client) = self.clients.remove(&fd) {
            client.ports.into_iter().for_each(|port| host.detach(port));
        }
    }
}

/// Sends `reply`; whether the client can be kept.
fn answer(client: BorrowedFd<'_>, reply: &Reply) -> bool {
    let sent = serde_json::to_vec(reply)
        .map_err(io::Error::from)
        .and_then(|text| packet::send(client, &text, &[], MsgFlags::MSG_DONTWAIT));
    if let Err(error) = &sent {
        tracing::warn!(
            "hanging up on a client of the control socket that does not take its reply: {error}"
        );
    }
    sent.is_ok()
}

pub(super) fn handle(packet: Packet, host: &mut dyn Host) -> Reply {
    let refuse = |message: String| Reply::Error { message };
    let request = match serde_json::from_slice(&packet.bytes) {
        Ok(request) => request,
        Err(error) => return refuse(format!("this request makes no sense: {error}")),
    };
    let expected = match &request {
        Request::Attach { read, write, done } => {
            [read, write, done].into_iter().filter(|&&x| x).count()
        }
        Request::ResizeMemory { done, .. } => (*done).into(),
        Request::Plug { device } => device.has_descriptor().into(),
        _ => 0,
    };
    if packet.fds.len() != expected {
        let got = packet.fds.len();
        return refuse(format!(
            "this request comes with {expected} descriptors, not {got}"
        ));
    }
    let mut fds = packet.fds.into_iter();
    let done = |result: Result<(), String>| result.map_or_else(refuse, |()| Reply::Done {});
    match request {
        Request::Status {} => Reply::Status(host.status()),
        Request::Attach { read, write, done } => {
            let mut take = |wanted: bool| wanted.then(|| fds.next()).flatten();
            match host.attach(take(read), take(write), take(done)) {
                Ok(port) => Reply::Attached { port },
                Err(why) => refuse(why),
            }
        }
        Request::KernelLog {} => Reply::KernelLog {
            text: host.kernel_log(MAX_LOG_REPLY),
        },
        Request::Pause {} => done(host.pause()),
        Request::Resume {} => done(host.resume()),
        Request::ResizeVcpus { vcpus } => done(host.resize_vcpus(vcpus)),
        Request::ResizeMemory { memory_mib, .. } => {
            done(host.resize_memory(memory_mib, fds.next()))
        }
        Request::Plug { device } => match host.plug(device, fds.next()) {
            Ok(plugged) => Reply::Plugged(plugged),
            Err(why) => refuse(why),
        },
        Request::Unplug { slot } => done(host.unplug(slot)),
        Request::Kill {} => {
            host.kill();
            Reply::Done {}
        }
    }
}
