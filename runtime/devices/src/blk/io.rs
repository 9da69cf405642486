//! Moving data between a file and guest memory, all of it or an error.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::iovecs::Iovecs;
use crate::segments::Segments;

/// When what is written must be on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Durability {
    /// When the guest flushes.
    Cached,
    /// When the call returns.
    Through,
}

/// Fills all of `to` from `fd` at `offset`.
///
/// # Errors
/// The system's; `UnexpectedEof` when the file ends before.
pub(super) fn read_at(fd: BorrowedFd<'_>, to: Segments<'_>, offset: u64) -> io::Result<()> {
    transfer(to, offset, |iovecs, offset| {
        // SAFETY: every iovec points into a mapping of guest memory that `to` borrows for longer than this call, with a length
        // that was checked against it. Only the kernel goes through the pointers, so that no Rust reference to shared
        // memory exists.
        unsafe { libc::preadv(fd.as_raw_fd(), iovecs.as_ptr(), count(iovecs), offset) }
    })
}

/// Writes all of `from` to `fd` at `offset`.
///
/// # Errors
/// The system's.
pub(super) fn write_at(
    fd: BorrowedFd<'_>,
    from: Segments<'_>,
    offset: u64,
    durability: Durability,
) -> io::Result<()> {
    let flags = match durability {
        Durability::Cached => 0,
        Durability::Through => libc::RWF_DSYNC,
    };
    transfer(from, offset, |iovecs, offset| {
        // SAFETY: as in `read_at`.
        unsafe {
            libc::pwritev2(
                fd.as_raw_fd(),
                iovecs.as_ptr(),
                count(iovecs),
                offset,
                flags,
            )
        }
    })
}

/// At most `MAX_IOVECS`.
fn count(iovecs: &Iovecs<'_>) -> libc::c_int {
    iovecs.count() as libc::c_int
}

fn transfer(
    mut segments: Segments<'_>,
    mut offset: u64,
    call: impl Fn(&Iovecs<'_>, libc::off_t) -> isize,
) -> io::Result<()> {
    while segments.len() > 0 {
        let at = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        match usize::try_from(call(&Iovecs::new(&segments), at)) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(done) => {
                segments.advance(done);
                offset += done as u64;
            }
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}
