//! Whole messages with file descriptors over Unix SOCK_SEQPACKET sockets: what launches a VM process, and what talks to one.
//! Every received descriptor is owned at once and close-on-exec, and a message that does not fit is reported as such, never
//! cut short in silence.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::cmsg_space;
use nix::fcntl::{OFlag, open};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
    UnixAddr, bind, connect, listen, recvmsg, sendmsg, socket,
};
use nix::sys::stat::{Mode, fchmod};

/// The longest message, bytes.
pub(crate) const MAX_PACKET: usize = 64 << 10;

/// The most descriptors in one message: Linux takes 253 (SCM_MAX_FD).
pub(crate) const MAX_FDS: usize = 253;

/// One message.
#[derive(Debug)]
pub(crate) struct Packet {
    pub(crate) bytes: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

/// What came of waiting for a message.
#[derive(Debug)]
pub(crate) enum Received {
    Packet(Packet),
    /// A message of more than [`MAX_PACKET`] bytes, or with more descriptors than there was room for; it is gone.
    TooLong,
    /// The other side has closed its end.
    Closed,
}

/// Sends one message; `flags` beyond MSG_NOSIGNAL are the caller's.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[RawFd],
    flags: MsgFlags,
) -> io::Result<()> {
    let rights = [ControlMessage::ScmRights(fds)];
    let rights = if fds.is_empty() { &[][..] } else { &rights };
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(bytes)],
        rights,
        flags | MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

/// Receives one message into `buffer`, which bounds its length.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    flags: MsgFlags,
) -> io::Result<Received> {
    let mut space = cmsg_space!([RawFd; MAX_FDS]);
    let mut iov = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut iov,
        Some(&mut space),
        flags | MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // SAFETY: the kernel has just made these descriptors for this message and told nobody else of them.
            fds.extend(
                raw.into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    let length = message.bytes;
    if message
        .flags
        .intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC)
    {
        return Ok(Received::TooLong);
    }
    if length == 0 && fds.is_empty() {
        return Ok(Received::Closed);
    }
    let bytes = buffer.get(..length).unwrap_or_default().to_vec();
    Ok(Received::Packet(Packet { bytes, fds }))
}

/// Binds and listens at `dir`/`name`, replacing a socket left there by a dead process; nobody but the owner may connect.
/// The directory's path may be of any length.
pub(crate) fn listen_at(dir: &Path, name: &str, kind: SockType) -> io::Result<OwnedFd> {
    let path = dir.join(name);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, kind, flags, None)?;
    // The mode of the unbound socket becomes that of the file, so that it is never open to others, however briefly.
    fchmod(&listener, Mode::S_IRUSR | Mode::S_IWUSR)?;
    with_address(dir, name, |address| bind(listener.as_raw_fd(), address))?;
    listen(&listener, Backlog::MAXCONN)?;
    Ok(listener)
}

/// Connects to the socket at `path`, which may be of any length.
pub(crate) fn connect_to(path: &Path, kind: SockType) -> io::Result<OwnedFd> {
    let stream = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)?;
    let (dir, name) = match (
        path.parent(),
        path.file_name().and_then(|name| name.to_str()),
    ) {
        (Some(dir), Some(name)) => (dir, name),
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    with_address(dir, name, |address| connect(stream.as_raw_fd(), address))?;
    Ok(stream)
}

/// Addresses of Unix sockets hold 108 bytes; going through a descriptor of the directory makes any path short.
fn with_address(
    dir: &Path,
    name: &str,
    call: impl FnOnce(&UnixAddr) -> nix::Result<()>,
) -> io::Result<()> {
    let dir = if dir.as_os_str().is_empty() {
        Path::new(".")
    } else {
        dir
    };
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let dir = open(dir, flags, Mode::empty())?;
    let short = format!("/proc/self/fd/{}/{name}", dir.as_raw_fd());
    Ok(call(&UnixAddr::new(short.as_str())?)?)
}
