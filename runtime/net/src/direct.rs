//! Netlink without a runtime. The kernel handles what is sent before the sending returns, so that every answer is there by then: whoever
//! sends waits for the kernel, and for nothing else.

use std::io;

use rtnetlink::packet_core::NetlinkBuffer;
use rtnetlink::sys::{Socket, SocketAddr};

use crate::{Error, Result};

/// Most bytes of answers in a datagram: what the kernel puts into one of a dump (NLMSG_GOODSIZE, or 32 KiB).
const DATAGRAM: usize = 1 << 16;

/// A socket to the kernel's side of the calling thread's namespace.
pub(crate) fn open(protocol: isize) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    // Whoever answers a request does not send it back.
    socket.set_cap_ack(true)?;
    // Of more answers than there is room for, the first are what matters.
    socket.set_no_enobufs(true)?;
    Ok(socket)
}

/// Sends a datagram, and passes on those that come back.
pub(crate) fn send(
    socket: &Socket,
    bytes: &[u8],
    what: &str,
    mut read: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    socket.send(bytes, 0).map_err(Error::system(what))?;
    let mut buffer = Vec::with_capacity(DATAGRAM);
    loop {
        buffer.clear();
        match socket.recv(&mut buffer, libc::MSG_DONTWAIT) {
            Ok(_) => read(&buffer)?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(Error::system(what)(error)),
        }
    }
}

/// Calls `read` with the type, the sequence number and the payload of each message.
pub(crate) fn each(
    mut bytes: &[u8],
    mut read: impl FnMut(u16, u32, &[u8]) -> Result<()>,
) -> Result<()> {
    while !bytes.is_empty() {
        let message = NetlinkBuffer::new_checked(bytes).map_err(|_| nonsense())?;
        read(
            message.message_type(),
            message.sequence_number(),
            message.payload(),
        )?;
        let length = usize::try_from(message.length()).unwrap_or(usize::MAX);
        let next = length.next_multiple_of(4).min(bytes.len());
        bytes = &bytes[next..];
    }
    Ok(())
}

/// What the kernel answers cannot be.
pub(crate) fn nonsense() -> Error {
    let source = io::Error::from(io::ErrorKind::InvalidData);
    Error::system("understand what the kernel answers")(source)
}
