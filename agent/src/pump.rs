//! Moves bytes between a process and its streams to the host. Pipes are spliced: the agent never sees what goes through
//! them. Every direction ends by itself: at the end of its source, when its sink refuses, or when it is dropped.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::pin::pin;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, splice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, Shutdown, recv, send, shutdown};
use nix::unistd::{read, write};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::sys;

/// Most bytes moved by one splice(2): a whole pipe.
const SPLICE: usize = 1 << 20;

/// Buffer of each direction of a terminal, bytes. A terminal's own buffer holds 4 KiB (n_tty).
const TERMINAL_BUFFER: usize = 16 << 10;

/// Buffer of each direction of a socket, bytes.
const SOCKET_BUFFER: usize = 64 << 10;

/// Tells an output pump that its process has ended, and tells others that the pump has sent all the process wrote.
pub struct Ending {
    /// Becomes true when the process has ended.
    pub exited: watch::Receiver<bool>,
    /// Set when everything written before that has been handed to the stream. Dropped with the pump.
    pub drained: watch::Sender<bool>,
}

impl Ending {
    /// For what moves nothing that a process has written.
    fn nobodys() -> Self {
        Self {
            exited: watch::Sender::new(false).subscribe(),
            drained: watch::Sender::new(false),
        }
    }

    /// To be called when the source has nothing to read; `exited` is looked at before that is known.
    fn note(&self, exited: bool) {
        if exited {
            self.drained.send_replace(true);
        }
    }
}

/// Moves the host's bytes into a process's standard input, until either side wants no more.
pub async fn input(socket: OwnedFd, pipe: OwnedFd) -> io::Result<()> {
    let socket = sys::register(socket, Interest::READABLE)?;
    let pipe = sys::register(pipe, Interest::WRITABLE | Interest::ERROR)?;
    loop {
        match splice_once(socket.get_ref(), pipe.get_ref()) {
            // The end of input; closing the pipe passes it on.
            Ok(0) => return Ok(()),
            Ok(_) => tokio::task::coop::consume_budget().await,
            Err(Errno::EAGAIN) => tokio::select! {
                result = Ready::of(&socket, &pipe)?.both(&socket, &pipe) => result?,
                // Every reader is gone: nobody will read what still comes.
                result = pipe.ready(Interest::ERROR) => {
                    result?.retain_ready();
                    return Ok(());
                }
            },
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Moves what a process writes into a pipe to the host, until every writer is gone or the host wants no more.
pub async fn output(pipe: OwnedFd, socket: OwnedFd, ending: Ending) -> io::Result<()> {
    let pipe = sys::register(pipe, Interest::READABLE)?;
    let socket = sys::register(socket, Interest::WRITABLE)?;
    let mut exited = ending.exited.clone();
    let mut refused = pin!(refused(&socket));
    loop {
        let over = *exited.borrow_and_update();
        match splice_once(pipe.get_ref(), socket.get_ref()) {
            Ok(0) => return Ok(()),
            Ok(_) => tokio::task::coop::consume_budget().await,
            Err(Errno::EAGAIN) => {
                let ready = Ready::of(&pipe, &socket)?;
                if !ready.from {
                    ending.note(over);
                }
                tokio::select! {
                    result = ready.both(&pipe, &socket) => result?,
                    result = &mut refused => return result,
                    Ok(()) = exited.changed() => {}
                }
            }
            Err(Errno::EINTR) => {}
            // EPIPE: the host reads no more. Closing the pipe tells the writer.
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Moves bytes both ways between a terminal and one stream, until no process has the terminal open or the host
/// reads no more: then the terminal is hung up. The end of the host's input is no end for a terminal.
pub async fn terminal(
    terminal: Arc<AsyncFd<OwnedFd>>,
    socket: OwnedFd,
    ending: Ending,
) -> io::Result<()> {
    let socket = sys::register(socket, Interest::READABLE | Interest::WRITABLE)?;
    let output = terminal_output(&terminal, &socket, ending);
    let input = async {
        // Input that fails is over; the terminal lives as long as somebody wants its output.
        let _ = terminal_input(&socket, &terminal).await;
        refused(&socket).await
    };
    let result = tokio::select! {
        result = output => result,
        result = input => result,
    };
    // What was sent stays in order before the end of the stream.
    let _ = shutdown(socket.as_raw_fd(), Shutdown::Write);
    result
}

/// Moves bytes both ways between a process's socket, by the one that it is connected with, and one stream. Each direction ends by itself,
/// and its end is passed on; when the process has closed its socket, nobody is there to take what still comes, and both have ended.
pub async fn socket(near: OwnedFd, socket: OwnedFd, ending: Ending) -> io::Result<()> {
    let near = sys::register(near, Interest::READABLE | Interest::WRITABLE)?;
    let socket = sys::register(socket, Interest::READABLE | Interest::WRITABLE)?;
    let (output, input) = tokio::join!(
        direction(&near, &socket, ending),
        direction(&socket, &near, Ending::nobodys())
    );
    output.and(input)
}

/// One direction between two sockets, to its end.
async fn direction(
    from: &AsyncFd<OwnedFd>,
    to: &AsyncFd<OwnedFd>,
    ending: Ending,
) -> io::Result<()> {
    let result = tokio::select! {
        result = carry(from, to, &ending) => result,
        // Nobody will read what still comes.
        result = refused(to) => result,
    };
    // Either's other end may be gone.
    let _ = shutdown(to.as_raw_fd(), Shutdown::Write);
    let _ = shutdown(from.as_raw_fd(), Shutdown::Read);
    result
}

async fn carry(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>, ending: &Ending) -> io::Result<()> {
    let mut buffer = vec![0; SOCKET_BUFFER];
    let mut exited = ending.exited.clone();
    loop {
        let over = *exited.borrow_and_update();
        match recv(from.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(0) => return Ok(()),
            Ok(count) => send_all(to, &buffer[..count]).await?,
            Err(Errno::EAGAIN) => {
                forget(from, Interest::READABLE);
                ending.note(over);
                tokio::select! {
                    result = again(from, Interest::READABLE, PollFlags::POLLIN) => result?,
                    Ok(()) = exited.changed() => {}
                }
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

async fn send_all(socket: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let sent = socket.async_io(Interest::WRITABLE, |socket| {
            Ok(send(socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL)?)
        });
        bytes = &bytes[sent.await?..];
    }
    Ok(())
}

/// Reads a terminal that has no stream, so that its processes neither stall nor are hung up.
pub async fn discard(terminal: Arc<AsyncFd<OwnedFd>>) -> io::Result<()> {
    let mut buffer = vec![0; TERMINAL_BUFFER];
    loop {
        match read(terminal.get_ref(), &mut buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => tokio::task::coop::consume_budget().await,
            Err(Errno::EAGAIN) => {
                forget(&terminal, Interest::READABLE);
                again(&terminal, Interest::READABLE, PollFlags::POLLIN).await?;
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

async fn terminal_output(
    terminal: &AsyncFd<OwnedFd>,
    socket: &AsyncFd<OwnedFd>,
    ending: Ending,
) -> io::Result<()> {
    let mut buffer = vec![0; TERMINAL_BUFFER];
    let mut exited = ending.exited.clone();
    loop {
        let over = *exited.borrow_and_update();
        match read(terminal.get_ref(), &mut buffer) {
            // EIO: no process has the other side open.
            Ok(0) | Err(Errno::EIO) => return Ok(()),
            Ok(count) => send_all(socket, &buffer[..count]).await?,
            Err(Errno::EAGAIN) => {
                forget(terminal, Interest::READABLE);
                ending.note(over);
                tokio::select! {
                    result = again(terminal, Interest::READABLE, PollFlags::POLLIN) => result?,
                    Ok(()) = exited.changed() => {}
                }
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

async fn terminal_input(socket: &AsyncFd<OwnedFd>, terminal: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut buffer = vec![0; TERMINAL_BUFFER];
    loop {
        let count = socket
            .async_io(Interest::READABLE, |socket| {
                Ok(recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?)
            })
            .await?;
        if count == 0 {
            return Ok(());
        }
        let mut rest = &buffer[..count];
        while !rest.is_empty() {
            match write(terminal.get_ref(), rest) {
                Ok(written) => rest = &rest[written..],
                Err(Errno::EAGAIN) => {
                    forget(terminal, Interest::WRITABLE);
                    again(terminal, Interest::WRITABLE, PollFlags::POLLOUT).await?;
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

fn splice_once(from: &OwnedFd, to: &OwnedFd) -> nix::Result<usize> {
    let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
    splice(from, None, to, None, SPLICE, flags)
}

/// Which sides of a splice were ready. After EAGAIN splice(2) does not say which was not.
#[derive(Clone, Copy)]
struct Ready {
    from: bool,
    to: bool,
}

impl Ready {
    fn of(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<Self> {
        let mut set = [
            PollFd::new(from.get_ref().as_fd(), PollFlags::POLLIN),
            PollFd::new(to.get_ref().as_fd(), PollFlags::POLLOUT),
        ];
        poll(&mut set, PollTimeout::ZERO)?;
        let ready = set.map(|fd| fd.any().unwrap_or(true));
        if !ready[0] {
            forget(from, Interest::READABLE);
        }
        if !ready[1] {
            forget(to, Interest::WRITABLE);
        }
        let [from, to] = ready;
        Ok(Self { from, to })
    }

    /// Waits for the sides that were not.
    async fn both(self, from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<()> {
        if !self.from {
            again(from, Interest::READABLE, PollFlags::POLLIN).await?;
        }
        if !self.to {
            again(to, Interest::WRITABLE, PollFlags::POLLOUT).await?;
        }
        Ok(())
    }
}

/// Makes tokio forget that a descriptor was ready. To be called as soon as the kernel has said that it is not, before
/// anything is awaited: what becomes ready later must not be forgotten.
fn forget(fd: &AsyncFd<OwnedFd>, interest: Interest) {
    let _: io::Result<()> = fd.try_io(interest, |_| Err(io::ErrorKind::WouldBlock.into()));
}

/// Waits until a descriptor that was not ready, and was forgotten, may be ready.
async fn again(fd: &AsyncFd<OwnedFd>, interest: Interest, flags: PollFlags) -> io::Result<()> {
    let mut ready = fd.ready(interest).await?;
    ready.retain_ready();
    let state = ready.ready();
    if !state.is_read_closed() && !state.is_write_closed() {
        return Ok(());
    }
    // Tokio never forgets that a side was closed, and would say so at once for ever; but a terminal can be opened
    // again, and a socket whose peer sends no more can still be full.
    let changes = Changes::of(fd, EpollFlags::from_bits_truncate(flags.bits().into()))?;
    loop {
        let mut set = [PollFd::new(fd.get_ref().as_fd(), flags)];
        if poll(&mut set, PollTimeout::ZERO)? > 0 {
            return Ok(());
        }
        changes.next().await?;
    }
}

/// Waits until the peer of a socket takes nothing more.
async fn refused(socket: &AsyncFd<OwnedFd>) -> io::Result<()> {
    // That a peer reads no more has no event of its own, but everything it does to its side wakes a reader; and then a
    // send fails, an empty one too.
    let changes = Changes::of(socket, EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP)?;
    loop {
        match send(socket.as_raw_fd(), &[], MsgFlags::MSG_NOSIGNAL) {
            Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => changes.next().await?,
            Err(_) => return Ok(()),
        }
    }
}

/// Every change of a descriptor's state, beside what tokio remembers of it.
struct Changes {
    epoll: Epoll,
    watch: AsyncFd<OwnedFd>,
}

impl Changes {
    fn of(fd: &AsyncFd<OwnedFd>, events: EpollFlags) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(
            fd.get_ref(),
            EpollEvent::new(events | EpollFlags::EPOLLET, 0),
        )?;
        let watch = sys::register(epoll.0.try_clone()?, Interest::READABLE)?;
        Ok(Self { epoll, watch })
    }

    /// The next change; the state at the beginning is the first, if there is any.
    async fn next(&self) -> io::Result<()> {
        self.watch.readable().await?.clear_ready();
        self.epoll
            .wait(&mut [EpollEvent::empty()], EpollTimeout::ZERO)?;
        Ok(())
    }
}
