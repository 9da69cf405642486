//! System calls that move bytes straight between a host descriptor and guest memory, without a copy of ours between. None of
//! them blocks on a socket or on a descriptor with O_NONBLOCK; none is given an address that did not come out of a checked
//! [`Segments`].

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::iovecs::Iovecs;
use crate::segments::Segments;

/// How a descriptor is to be read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// `recvmsg` and `sendmsg`, which can be told not to block and not to raise SIGPIPE.
    Socket,
    /// `readv` and `writev`. A pipe without readers raises SIGPIPE, which the process must ignore (a Rust `main` does).
    File,
}

/// Reads once from `fd` into the front of `to`; answers how many bytes came, zero at the end.
///
/// # Errors
/// The system's; `WouldBlock` when nothing is there yet. Never `Interrupted`.
pub(super) fn read_into(fd: BorrowedFd<'_>, way: Way, to: &Segments<'_>) -> io::Result<usize> {
    transfer(fd, way, to, libc::readv, |fd, message| {
        // SAFETY: `message` names iovecs that `transfer` keeps alive and that point into mapped guest memory; see there.
        unsafe { libc::recvmsg(fd, message, libc::MSG_DONTWAIT) }
    })
}

/// Writes once from the front of `from` to `fd`; answers how many bytes went.
///
/// # Errors
/// The system's; `WouldBlock` when there is no room. Never `Interrupted`.
pub(super) fn write_from(fd: BorrowedFd<'_>, way: Way, from: &Segments<'_>) -> io::Result<usize> {
    transfer(fd, way, from, libc::writev, |fd, message| {
        // SAFETY: as in `read_into`.
        unsafe { libc::sendmsg(fd, message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) }
    })
}

/// `readv` or `writev`.
type Vectored = unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int) -> isize;

fn transfer(
    fd: BorrowedFd<'_>,
    way: Way,
    segments: &Segments<'_>,
    vectored: Vectored,
    socket: impl Fn(libc::c_int, &mut libc::msghdr) -> isize,
) -> io::Result<usize> {
    let mut iovecs = Iovecs::new(segments);
    loop {
        let result = match way {
            // SAFETY: the first `count` of `iovecs` are filled in. Each points into a mapping of guest memory that `segments`
            // borrows for longer than this call, with a length checked against that mapping. Only the kernel goes through
            // the pointer, as it would for the guest's own accesses, so that no Rust reference to shared memory exists.
            Way::File => unsafe {
                // At most MAX_IOVECS.
                vectored(
                    fd.as_raw_fd(),
                    iovecs.as_ptr(),
                    iovecs.count() as libc::c_int,
                )
            },
            Way::Socket => {
                // SAFETY: `msghdr` is plain data for which all zeroes (no name, no control data, no flags) is a value.
                let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
                message.msg_iov = iovecs.as_mut_ptr();
                message.msg_iovlen = iovecs.count();
                socket(fd.as_raw_fd(), &mut message)
            }
        };
        match usize::try_from(result) {
            Ok(done) => return Ok(done),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// Writes once from memory of ours, `front` and then `back`; answers how many bytes went.
///
/// # Errors
/// As for [`write_from`].
pub(super) fn write_slices(
    fd: BorrowedFd<'_>,
    way: Way,
    front: &[u8],
    back: &[u8],
) -> io::Result<usize> {
    use nix::sys::socket::{MsgFlags, UnixAddr, sendmsg};
    let slices = [io::IoSlice::new(front), io::IoSlice::new(back)];
    loop {
        let result = match way {
            Way::File => nix::sys::uio::writev(fd.as_fd(), &slices),
            Way::Socket => {
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                sendmsg::<UnixAddr>(fd.as_raw_fd(), &slices, &[], flags, None)
            }
        };
        match result {
            Err(nix::errno::Errno::EINTR) => {}
            other => return Ok(other?),
        }
    }
}
