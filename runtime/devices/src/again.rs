//! How a device that stops in the middle of a busy queue asks to be called once more, so that one guest's flood does not keep the
//! thread that drives it from everything else.

use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

/// A descriptor that is readable from [`Again::ask`] to [`Again::asked`]; a device's [`crate::Device::host_fd`].
#[derive(Debug)]
pub(crate) struct Again(EventFd);

impl Again {
    pub(crate) fn new() -> Result<Self, Errno> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        EventFd::from_flags(flags).map(Self)
    }

    /// Asks for another call.
    pub(crate) fn ask(&self) {
        // Fails only when the counter is full, and then the descriptor is readable already.
        let _ = self.0.write(1);
    }

    /// The call has come.
    pub(crate) fn asked(&self) {
        // Fails only when nothing was asked for.
        let _ = self.0.read();
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
