//! Devices with one queue of requests, each answered before the next is looked at: all that they have in common.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use nix::errno::Errno;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestMemoryMmap;

use crate::again::Again;
use crate::chains::{self, Chain};
use crate::{Broken, Context, Device, QueueMask};

/// Features of the transport, which every such device offers.
const TRANSPORT: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// What every such device is made of, beside its own.
#[derive(Debug)]
pub(crate) struct Common {
    /// The features the guest accepted.
    pub(crate) acked_features: u64,
    again: Arc<Again>,
}

impl Common {
    pub(crate) fn new() -> Result<Self, Errno> {
        Ok(Self {
            acked_features: 0,
            again: Arc::new(Again::new()?),
        })
    }
}

/// A device that is nothing but its answers.
pub(crate) trait Requests: Send {
    /// For people.
    const NAME: &'static str;
    /// Device ID, virtio 1.3 §5.
    const ID: u32;
    /// The largest size of each queue.
    const QUEUE_SIZES: &'static [u16];
    /// The queue with the requests.
    const QUEUE: usize = 0;
    /// Most requests answered in one call.
    const BATCH: usize;

    fn common(&self) -> &Common;

    fn common_mut(&mut self) -> &mut Common;

    /// Feature bits beside the transport's.
    fn own_features(&self) -> u64 {
        0
    }

    /// As [`Device::read_config`]; none unless said otherwise.
    fn config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    /// Does what the chain asks for, and says how many bytes were written to it.
    fn answer<'m>(&mut self, memory: &'m GuestMemoryMmap, chain: Chain<'m>) -> u32;

    /// As [`Device::queue_event`] for the queues that are not for requests; what is in them is left there unless said otherwise.
    ///
    /// # Errors
    /// [`Broken`] when the guest broke the protocol.
    fn other_event(
        &mut self,
        _ctx: &mut Context<'_, '_>,
        _index: usize,
    ) -> Result<QueueMask, Broken> {
        Ok(QueueMask::NONE)
    }

    /// Answers the next requests.
    fn answer_all(&mut self, ctx: &mut Context<'_, '_>) -> Result<QueueMask, Broken> {
        let again = Arc::clone(&self.common().again);
        let (name, queue, batch) = (Self::NAME, Self::QUEUE, Self::BATCH);
        chains::serve(name, ctx, queue, batch, &again, |memory, chain| {
            self.answer(memory, chain)
        })
    }
}

impl<T: Requests> Device for T {
    fn device_type(&self) -> u32 {
        Self::ID
    }

    fn queue_sizes(&self) -> &[u16] {
        Self::QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        TRANSPORT | self.own_features()
    }

    fn set_acked_features(&mut self, features: u64) {
        self.common_mut().acked_features = features & self.features();
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config(offset, data);
    }

    fn queue_event(
        &mut self,
        ctx: &mut Context<'_, '_>,
        index: usize,
    ) -> Result<QueueMask, Broken> {
        if index == Self::QUEUE {
            self.answer_all(ctx)
        } else {
            self.other_event(ctx, index)
        }
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.common().again.fd())
    }

    fn host_event(&mut self, ctx: &mut Context<'_, '_>) -> Result<QueueMask, Broken> {
        self.common().again.asked();
        self.answer_all(ctx)
    }

    fn reset(&mut self) {
        self.common_mut().acked_features = 0;
    }
}
