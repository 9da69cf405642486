//! A number in a device's configuration space that the host turns while the guest runs.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use nix::errno::Errno;

use crate::again::Again;

/// The number, how often it has changed, and a descriptor that says so; shared by a device and its handle. The descriptor is the
/// device's [`crate::Device::host_fd`] too.
#[derive(Debug)]
pub(crate) struct Knob {
    value: AtomicU64,
    generation: AtomicU32,
    again: Again,
}

impl Knob {
    pub(crate) fn new(value: u64) -> Result<Self, Errno> {
        Ok(Self {
            value: AtomicU64::new(value),
            generation: AtomicU32::new(0),
            again: Again::new()?,
        })
    }

    pub(crate) fn get(&self) -> u64 {
        self.value.load(Ordering::Acquire)
    }

    /// Sets the number; where that changes it, the device is asked to tell its guest.
    pub(crate) fn set(&self, value: u64) {
        if self.value.swap(value, Ordering::AcqRel) != value {
            self.generation.fetch_add(1, Ordering::AcqRel);
            self.again.ask();
        }
    }

    /// [`crate::Device::config_generation`].
    pub(crate) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn again(&self) -> &Again {
        &self.again
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.again.fd()
    }
}
