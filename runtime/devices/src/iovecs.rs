//! Pieces of guest memory in the form in which system calls take them, so that bytes move straight between a host descriptor and
//! guest memory. Making one is safe: only the kernel ever follows its pointers, as it would for the guest's own accesses.

use std::marker::PhantomData;

use vm_memory::VolatileSlice;

use crate::segments::Segments;

/// Most pieces in one system call. A frame of Linux's has at most 19 (a header, and a page each); longer transfers take more calls.
pub(crate) const MAX_IOVECS: usize = 64;

/// Up to [`MAX_IOVECS`] pieces of memory that is mapped for `'m`.
pub(crate) struct Iovecs<'m> {
    iovecs: [libc::iovec; MAX_IOVECS],
    count: usize,
    memory: PhantomData<&'m [u8]>,
}

impl<'m> Iovecs<'m> {
    /// The first pieces of `segments`.
    pub(crate) fn new(segments: &Segments<'m>) -> Self {
        let mut iovecs = Self::empty();
        iovecs.append(segments);
        iovecs
    }

    /// The first pieces of all of `segments`, one after the other.
    pub(crate) fn gather<'s>(segments: impl Iterator<Item = &'s Segments<'m>>) -> Self
    where
        'm: 's,
    {
        let mut iovecs = Self::empty();
        segments.for_each(|segments| iovecs.append(segments));
        iovecs
    }

    /// `front`, which only a system call that reads memory may be given, and the first pieces of `segments`.
    pub(crate) fn behind(front: &'m [u8], segments: &Segments<'m>) -> Self {
        let mut iovecs = Self::empty();
        iovecs.iovecs[0] = libc::iovec {
            iov_base: front.as_ptr().cast_mut().cast(),
            iov_len: front.len(),
        };
        iovecs.count = 1;
        iovecs.append(segments);
        iovecs
    }

    pub(crate) fn as_ptr(&self) -> *const libc::iovec {
        self.iovecs.as_ptr()
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut libc::iovec {
        self.iovecs.as_mut_ptr()
    }

    /// How many there are; at most [`MAX_IOVECS`].
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    fn empty() -> Self {
        let iovec = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        Self {
            iovecs: [iovec; MAX_IOVECS],
            count: 0,
            memory: PhantomData,
        }
    }

    fn append(&mut self, segments: &Segments<'m>) {
        let free = &mut self.iovecs[self.count..];
        for (iovec, piece) in free.iter_mut().zip(segments.pieces()) {
            *iovec = iovec_of(piece);
            self.count += 1;
        }
    }
}

fn iovec_of(piece: &VolatileSlice<'_>) -> libc::iovec {
    libc::iovec {
        iov_base: piece.ptr_guard_mut().as_ptr().cast(),
        iov_len: piece.len(),
    }
}
