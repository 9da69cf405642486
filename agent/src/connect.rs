//! Connections to and from the host. The agent proper sees only descriptors of connected stream sockets; here is where
//! they come from. Over vsock (virtio 1.3 §5.10) in a guest; tests bring Unix sockets.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use async_trait::async_trait;
use cloison_agent_api::HOST_CID;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, Shutdown, SockFlag, SockType, VsockAddr, accept4, bind,
    connect, getsockopt, listen, recv, send, shutdown, socket, sockopt,
};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

use crate::{stdio, sys};

/// Every address of this machine, for a listener (vsock(7)).
const ANY_CID: u32 = u32::MAX;

/// Connections not accepted yet that the kernel keeps.
const BACKLOG: i32 = 64;

/// Makes connections to the host, one for each stream of a process.
#[async_trait]
pub trait Connect: Send + Sync {
    /// A connected, non-blocking stream socket to a port of the host.
    async fn connect(&self, port: u32) -> io::Result<OwnedFd>;
}

/// The host, over vsock.
pub struct Host;

#[async_trait]
impl Connect for Host {
    async fn connect(&self, port: u32) -> io::Result<OwnedFd> {
        let socket = connected(dial(port)?).await?;
        sys::set_vsock_buffer(socket.as_fd(), stdio::SOCKET_BUFFER)?;
        Ok(socket)
    }
}

const FLAGS: SockFlag = SockFlag::SOCK_NONBLOCK.union(SockFlag::SOCK_CLOEXEC);

/// Begins to connect to a port of the host, without waiting.
pub fn dial(port: u32) -> io::Result<OwnedFd> {
    let socket = socket(AddressFamily::Vsock, SockType::Stream, FLAGS, None)?;
    match connect(socket.as_raw_fd(), &VsockAddr::new(HOST_CID, port)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(socket),
        Err(errno) => Err(errno.into()),
    }
}

/// Waits until a socket that `dial` returned is connected.
pub async fn connected(socket: OwnedFd) -> io::Result<OwnedFd> {
    let socket = sys::register(socket, Interest::WRITABLE)?;
    socket.writable().await?.clear_ready();
    match getsockopt(socket.get_ref(), sockopt::SocketError)? {
        0 => Ok(socket.into_inner()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// A listening vsock socket.
pub struct Listener(AsyncFd<OwnedFd>);

impl Listener {
    /// Listens on a port of the guest. Must be called within a tokio runtime.
    pub fn bind(port: u32) -> io::Result<Self> {
        let socket = socket(AddressFamily::Vsock, SockType::Stream, FLAGS, None)?;
        bind(socket.as_raw_fd(), &VsockAddr::new(ANY_CID, port))?;
        listen(&socket, Backlog::new(BACKLOG)?)?;
        Ok(Self(sys::register(socket, Interest::READABLE)?))
    }

    /// The next connection.
    pub async fn accept(&self) -> io::Result<OwnedFd> {
        self.0
            .async_io(Interest::READABLE, |socket| Ok(accept4_owned(socket)?))
            .await
    }
}

fn accept4_owned(socket: &OwnedFd) -> nix::Result<OwnedFd> {
    let number = accept4(socket.as_raw_fd(), FLAGS)?;
    // SAFETY: accept4(2) has just made this descriptor for us, and nobody else knows its number.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(number) })
}

/// A connected stream socket as tokio's reader and writer.
pub struct Stream(AsyncFd<OwnedFd>);

impl Stream {
    /// `socket` must be connected and non-blocking.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self(sys::register(
            socket,
            Interest::READABLE | Interest::WRITABLE,
        )?))
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(context))?;
            let space = buffer.initialize_unfilled();
            let read =
                guard.try_io(|socket| Ok(recv(socket.as_raw_fd(), space, MsgFlags::empty())?));
            if let Ok(result) = read {
                buffer.advance(result?);
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(context))?;
            let written =
                guard.try_io(|socket| Ok(send(socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL)?));
            if let Ok(result) = written {
                return Poll::Ready(result);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(shutdown(self.0.as_raw_fd(), Shutdown::Write)?))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn stream(socket: UnixStream) -> Stream {
        socket.set_nonblocking(true).unwrap();
        Stream::new(socket.into()).unwrap()
    }

    #[tokio::test]
    async fn a_stream_carries_bytes_and_half_close_both_ways() {
        let (near, far) = UnixStream::pair().unwrap();
        let (mut near, mut far) = (stream(near), stream(far));
        let sent = vec![7; 1 << 20];
        let copy = sent.clone();
        let sender = tokio::spawn(async move {
            near.write_all(&copy).await.unwrap();
            near.shutdown().await.unwrap();
            let mut answer = String::new();
            near.read_to_string(&mut answer).await.unwrap();
            answer
        });
        let mut received = Vec::new();
        far.read_to_end(&mut received).await.unwrap();
        assert!(received == sent);
        far.write_all(b"done").await.unwrap();
        drop(far);
        assert_eq!(sender.await.unwrap(), "done");
    }

    #[tokio::test]
    async fn writing_to_a_closed_peer_is_an_error_and_no_signal() {
        let (near, far) = UnixStream::pair().unwrap();
        let mut near = stream(near);
        drop(far);
        assert!(near.write_all(b"x").await.is_err());
    }
}
