//! The guest kernel's console (virtio 1.3 §5.3): one port, from the guest to the host. What the guest writes goes to a function;
//! nothing is ever sent to the guest. The device keeps none of it, so that a flood costs time but no memory.

use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Bytes, GuestMemoryMmap};

use crate::again::Again;
use crate::chains::{self, Chain};
use crate::{Broken, Context, Device, QueueMask};

const NAME: &str = "console";
/// Port 0's queues: to the guest, and from it (virtio 1.3 §5.3.2).
const TRANSMIT: usize = 1;
/// The kernel writes a line at a time and waits for it, so more would lie idle.
const QUEUE_SIZE: u16 = 16;
/// Bytes copied out of guest memory at once.
const PIECE: usize = 1 << 10;
/// Most bytes taken from one chain; Linux writes at most a page at a time. The rest of a longer one is dropped.
const MOST_OF_A_CHAIN: usize = 64 << 10;
/// Most chains handled in one call.
const BATCH: usize = 64;
/// Version of [`ConsoleState`].
const STATE_VERSION: u32 = 1;

/// What takes the guest's output; called with at most a few KiB at a time, in order.
pub type Sink = Box<dyn FnMut(&[u8]) + Send>;

/// A saved state is not of this version.
#[derive(Debug, thiserror::Error)]
#[error(
    "the saved state of the console has version {0}; this program knows version {STATE_VERSION}"
)]
pub struct ConsoleStateVersion(u32);

/// What is needed to give a restored guest the same console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    version: u32,
    acked_features: u64,
}

/// The console.
pub struct Console {
    sink: Sink,
    acked_features: u64,
    again: Again,
}

impl Console {
    /// A console whose output goes to `sink`.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn new(sink: Sink) -> Result<Self, Errno> {
        Ok(Self {
            sink,
            acked_features: 0,
            again: Again::new()?,
        })
    }

    /// The state from which [`Console::restore`] makes the same device.
    pub fn state(&self) -> ConsoleState {
        ConsoleState {
            version: STATE_VERSION,
            acked_features: self.acked_features,
        }
    }

    /// Takes on `state`.
    ///
    /// # Errors
    /// When it is of another version.
    pub fn restore(&mut self, state: &ConsoleState) -> Result<(), ConsoleStateVersion> {
        if state.version != STATE_VERSION {
            return Err(ConsoleStateVersion(state.version));
        }
        self.acked_features = state.acked_features & self.features();
        Ok(())
    }

    fn drain(&mut self, ctx: &mut Context<'_, '_>) -> Result<QueueMask, Broken> {
        let sink = &mut self.sink;
        chains::serve(NAME, ctx, TRANSMIT, BATCH, &self.again, |memory, chain| {
            pass_on(memory, chain, sink);
            0
        })
    }
}

/// Passes on what is readable of `chain`, up to what is not in guest memory.
fn pass_on(memory: &GuestMemoryMmap, chain: Chain<'_>, sink: &mut Sink) {
    let mut buffer = [0; PIECE];
    let mut room = MOST_OF_A_CHAIN;
    for descriptor in chain.readable() {
        let mut address = descriptor.addr();
        let mut left = (descriptor.len() as usize).min(room);
        room -= left;
        while left > 0 {
            let piece = &mut buffer[..left.min(PIECE)];
            if memory.read_slice(piece, address).is_err() {
                return;
            }
            sink(piece);
            left -= piece.len();
            let Some(next) = address.0.checked_add(piece.len() as u64) else {
                return;
            };
            address.0 = next;
        }
        if room == 0 {
            return;
        }
    }
}

impl Device for Console {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn set_acked_features(&mut self, features: u64) {
        self.acked_features = features;
    }

    /// Neither a size nor more ports are offered (§5.3.3), so that all of the configuration space reads as zero.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn queue_event(
        &mut self,
        ctx: &mut Context<'_, '_>,
        index: usize,
    ) -> Result<QueueMask, Broken> {
        match index {
            TRANSMIT => self.drain(ctx),
            _ => Ok(QueueMask::NONE),
        }
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.again.fd())
    }

    fn host_event(&mut self, ctx: &mut Context<'_, '_>) -> Result<QueueMask, Broken> {
        self.again.asked();
        self.drain(ctx)
    }

    fn reset(&mut self) {
        self.acked_features = 0;
    }
}

#[cfg(test)]
mod tests;
