//! The contract between a device and whatever drives it: virtio-mmio under KVM, vhost-user under QEMU, or a test.
//! A device is logic over queues and configuration space; it never learns how its queues were set up, how the guest is
//! interrupted, or what a container is. The driver never learns what a request means.

use std::os::fd::BorrowedFd;

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;

/// Most queues any device here has; a [`QueueMask`] holds one bit for each.
pub const MAX_QUEUES: usize = 32;

/// Set of queues, as bits: those into whose used ring a call has put something.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QueueMask(u32);

impl QueueMask {
    /// No queue.
    pub const NONE: Self = Self(0);

    /// Adds queue `index`; an index of [`MAX_QUEUES`] or more is a programming error and is ignored.
    pub fn insert(&mut self, index: usize) {
        if index < MAX_QUEUES {
            self.0 |= 1 << index;
        }
    }

    /// Adds all of `others`.
    pub fn insert_all(&mut self, others: Self) {
        self.0 |= others.0;
    }

    /// Whether queue `index` is in the set.
    pub fn contains(self, index: usize) -> bool {
        index < MAX_QUEUES && self.0 & (1 << index) != 0
    }

    /// Whether no queue is in the set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// What a device may touch while it handles one event: guest memory and its own queues, in the order of
/// [`Device::queue_sizes`]. A queue the guest has not made ready answers `ready() == false` and must be left alone.
pub struct Context<'a, 'q> {
    /// All of the guest's memory.
    pub memory: &'a GuestMemoryMmap,
    /// The device's queues.
    pub queues: &'a mut [&'q mut Queue],
}

/// The guest did what no driver may. The one that drives the device sets DEVICE_NEEDS_RESET (virtio 1.3 §2.1.1) where
/// its transport can say so, and sends the device no further event until the guest has reset it.
#[derive(Debug, thiserror::Error)]
#[error("the guest broke the protocol of its {device} device: {what}")]
pub struct Broken {
    /// The device's name, for people: "fs", "vsock".
    pub device: &'static str,
    /// What was wrong.
    pub what: String,
}

/// A virtio device (virtio 1.3 §2, modern only).
///
/// Calls come from one thread at a time. No call blocks on the guest, and none panics whatever guest memory holds.
pub trait Device: Send {
    /// Device ID, virtio 1.3 §5.
    fn device_type(&self) -> u32;

    /// The largest size of each queue; its length is the number of queues (at most [`MAX_QUEUES`]).
    fn queue_sizes(&self) -> &[u16];

    /// Feature bits offered, transport features (VERSION_1, EVENT_IDX, INDIRECT_DESC) included.
    fn features(&self) -> u64;

    /// Feature bits the guest accepted, a subset of [`Device::features`]; called before the first event.
    fn set_acked_features(&mut self, features: u64);

    /// Fills `data` from configuration space at `offset`; bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes to configuration space; what the device does not let the guest write is ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// A number that is another one each time configuration space has changed by itself (virtio 1.3 §2.5.1). Whoever drives
    /// the device compares it after every [`Device::host_event`], and where it differs tells the guest by a configuration
    /// change notification.
    fn config_generation(&self) -> u32 {
        0
    }

    /// The guest has notified queue `index`. Returns the queues whose used ring has grown.
    ///
    /// # Errors
    /// [`Broken`] when the guest broke the protocol; the device then waits for [`Device::reset`].
    fn queue_event(&mut self, ctx: &mut Context<'_, '_>, index: usize)
    -> Result<QueueMask, Broken>;

    /// A descriptor that becomes readable when the device has work that does not come from the guest, or `None`. It stays the
    /// same for the device's life, so that it can be watched before the device's process locks itself in.
    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// [`Device::host_fd`] is readable. Returns the queues whose used ring has grown.
    ///
    /// # Errors
    /// As for [`Device::queue_event`].
    fn host_event(&mut self, _ctx: &mut Context<'_, '_>) -> Result<QueueMask, Broken> {
        Ok(QueueMask::NONE)
    }

    /// Back to the state before the first event: all that belongs to the guest's use of the device is dropped,
    /// what was configured by the host stays.
    fn reset(&mut self);
}
