//! Host descriptors that a stream reads from or writes to: which are fit for it, and how they are watched. Nothing here
//! changes a descriptor's flags, since its open file description may be shared with a person's shell.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{SockType, getsockopt, sockopt};
use nix::sys::stat::{SFlag, fstat};

use super::io::Way;

/// Why a descriptor cannot carry a stream.
#[derive(Debug, thiserror::Error)]
pub enum Unsuitable {
    /// A read of it could stop the whole device, and O_NONBLOCK is not the device's to set.
    #[error(
        "it would block; pass a pipe, FIFO or terminal that was opened with O_NONBLOCK, a socket, or a regular file"
    )]
    Blocking,
    /// Not open for reading (or not open for writing).
    #[error("it is not open for {0}")]
    Access(&'static str),
    /// A socket that keeps messages apart, or that listens.
    #[error("it is a socket, but not a connected stream socket")]
    NotAStream,
    /// A directory, or a descriptor that only names a file.
    #[error("it is neither a file, pipe, socket nor device")]
    NotData,
    /// The system refused to say what it is.
    #[error("it cannot be examined")]
    Examine(#[from] Errno),
}

/// What a descriptor is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    Read,
    Write,
}

/// A descriptor found fit for a stream, and how to use it.
#[derive(Debug)]
pub(super) struct Checked {
    pub fd: OwnedFd,
    pub way: Way,
    /// Whether epoll can say when it is ready; otherwise it always is.
    pub pollable: bool,
}

impl Checked {
    /// Takes `fd` if it can be read (or written) as a stream of bytes without blocking.
    pub(super) fn new(fd: OwnedFd, purpose: Purpose) -> Result<Self, Unsuitable> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        if flags.contains(OFlag::O_PATH) {
            return Err(Unsuitable::NotData);
        }
        match (purpose, flags & OFlag::O_ACCMODE) {
            (Purpose::Read, OFlag::O_WRONLY) => return Err(Unsuitable::Access("reading")),
            (Purpose::Write, OFlag::O_RDONLY) => return Err(Unsuitable::Access("writing")),
            _ => {}
        }
        match file_type(&fd)? {
            SFlag::S_IFDIR | SFlag::S_IFLNK => Err(Unsuitable::NotData),
            SFlag::S_IFREG | SFlag::S_IFBLK => Ok(Self {
                fd,
                way: Way::File,
                pollable: false,
            }),
            SFlag::S_IFSOCK => {
                let stream = getsockopt(&fd, sockopt::SockType)? == SockType::Stream;
                if !stream || getsockopt(&fd, sockopt::AcceptConn)? {
                    return Err(Unsuitable::NotAStream);
                }
                Ok(Self {
                    fd,
                    way: Way::Socket,
                    pollable: true,
                })
            }
            _ => {
                let pollable = pollable(&fd)?;
                if pollable && !flags.contains(OFlag::O_NONBLOCK) {
                    return Err(Unsuitable::Blocking);
                }
                Ok(Self {
                    fd,
                    way: Way::File,
                    pollable,
                })
            }
        }
    }

    /// A connected stream socket that came from this device's own `accept` or `connect`.
    pub(super) fn socket(fd: OwnedFd) -> Self {
        Self {
            fd,
            way: Way::Socket,
            pollable: true,
        }
    }
}

fn file_type(fd: &OwnedFd) -> Result<SFlag, Errno> {
    Ok(SFlag::from_bits_truncate(fstat(fd)?.st_mode) & SFlag::S_IFMT)
}

/// Whether epoll takes the descriptor. It refuses those that are always ready, /dev/null for one.
fn pollable(fd: &OwnedFd) -> Result<bool, Errno> {
    let scratch = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    match scratch.add(fd, EpollEvent::empty()) {
        Ok(()) => Ok(true),
        Err(Errno::EPERM) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether both are the same socket, so that the end of one direction has to be said with `shutdown`: closing one of two
/// descriptors of a socket says nothing.
pub(super) fn same_socket(a: &OwnedFd, b: &OwnedFd) -> Result<bool, Errno> {
    let (x, y) = (fstat(a)?, fstat(b)?);
    let socket = file_type(a)? == SFlag::S_IFSOCK;
    Ok(socket && (x.st_dev, x.st_ino) == (y.st_dev, y.st_ino))
}

/// A descriptor that an epoll instance watches, edge-triggered, for as long as this lives.
#[derive(Debug)]
pub(super) struct Watched {
    fd: OwnedFd,
    way: Way,
    token: u64,
    epoll: Option<Arc<Epoll>>,
}

impl Watched {
    /// Watches `checked` for `events`, to be reported with `token`. What epoll cannot watch is not watched.
    pub(super) fn new(
        checked: Checked,
        epoll: &Arc<Epoll>,
        token: u64,
        events: EpollFlags,
    ) -> io::Result<Self> {
        let epoll = if checked.pollable {
            epoll.add(
                &checked.fd,
                EpollEvent::new(events | EpollFlags::EPOLLET, token),
            )?;
            Some(Arc::clone(epoll))
        } else {
            None
        };
        Ok(Self {
            fd: checked.fd,
            way: checked.way,
            token,
            epoll,
        })
    }

    /// Watches for other events, and has those reported that are there already.
    pub(super) fn watch_for(&self, events: EpollFlags) -> io::Result<()> {
        if let Some(epoll) = &self.epoll {
            let mut event = EpollEvent::new(events | EpollFlags::EPOLLET, self.token);
            epoll.modify(&self.fd, &mut event)?;
        }
        Ok(())
    }

    pub(super) fn way(&self) -> Way {
        self.way
    }

    /// Tells a socket's other end that a direction is over.
    pub(super) fn shutdown(&self, how: nix::sys::socket::Shutdown) {
        // The other end may be gone already, and then there is nobody to tell.
        let _ = nix::sys::socket::shutdown(self.fd.as_raw_fd(), how);
    }
}

impl AsFd for Watched {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // Closing alone would not do: epoll forgets a file when its last descriptor is closed, and others may hold some.
        if let Some(epoll) = &self.epoll {
            let _ = epoll.delete(&self.fd);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    fn read(fd: impl Into<OwnedFd>) -> Result<Checked, Unsuitable> {
        Checked::new(fd.into(), Purpose::Read)
    }

    fn write(fd: impl Into<OwnedFd>) -> Result<Checked, Unsuitable> {
        Checked::new(fd.into(), Purpose::Write)
    }

    #[test]
    fn a_blocking_pipe_is_refused_and_its_flags_are_left_alone() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let kept = reader.try_clone().unwrap();
        assert!(matches!(read(reader), Err(Unsuitable::Blocking)));
        assert!(matches!(write(writer), Err(Unsuitable::Blocking)));
        assert_eq!(
            fcntl(&kept, FcntlArg::F_GETFL).unwrap() & libc::O_NONBLOCK,
            0
        );
    }

    #[test]
    fn a_pipe_end_of_the_other_direction_is_refused() {
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_NONBLOCK).unwrap();
        assert!(matches!(write(reader), Err(Unsuitable::Access("writing"))));
        assert!(matches!(read(writer), Err(Unsuitable::Access("reading"))));
    }

    #[test]
    fn a_blocking_socket_is_taken() {
        let (a, b) = UnixStream::pair().unwrap();
        assert_eq!(read(a).unwrap().way, Way::Socket);
        assert!(write(b).unwrap().pollable);
    }

    #[test]
    fn sockets_that_are_not_connected_streams_are_refused() {
        let (datagram, _other) = UnixDatagram::pair().unwrap();
        assert!(matches!(read(datagram), Err(Unsuitable::NotAStream)));
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        assert!(matches!(read(listener), Err(Unsuitable::NotAStream)));
    }

    #[test]
    fn files_and_the_null_device_are_always_ready() {
        assert!(!read(tempfile::tempfile().unwrap()).unwrap().pollable);
        assert!(!read(File::open("/dev/null").unwrap()).unwrap().pollable);
        assert!(!write(File::create("/dev/null").unwrap()).unwrap().pollable);
    }

    #[test]
    fn a_directory_and_a_mere_name_of_a_file_are_refused() {
        assert!(matches!(
            read(File::open("/").unwrap()),
            Err(Unsuitable::NotData)
        ));
        let name = nix::fcntl::open("/dev/null", OFlag::O_PATH, nix::sys::stat::Mode::empty());
        assert!(matches!(read(name.unwrap()), Err(Unsuitable::NotData)));
    }

    #[test]
    fn a_blocking_terminal_is_refused_and_a_non_blocking_one_taken() {
        let pty = nix::pty::openpty(None, None).unwrap();
        assert!(matches!(
            read(pty.slave.try_clone().unwrap()),
            Err(Unsuitable::Blocking)
        ));
        fcntl(&pty.slave, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        assert!(read(pty.slave).unwrap().pollable);
    }

    #[test]
    fn a_socket_is_the_same_as_its_duplicate_only() {
        let (a, b) = UnixStream::pair().unwrap();
        let (a, b) = (OwnedFd::from(a), OwnedFd::from(b));
        assert!(same_socket(&a, &a.try_clone().unwrap()).unwrap());
        assert!(!same_socket(&a, &b).unwrap());
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        assert!(!same_socket(&file, &file.try_clone().unwrap()).unwrap());
    }
}
