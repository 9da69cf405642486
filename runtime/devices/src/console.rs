//! The guest kernel's console (virtio 1.3 §5.3): one port, from the guest to the host. What the guest writes goes to a function;
//! nothing is ever sent to the guest. The device keeps none of it, so that a flood costs time but no memory.

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vm_memory::{Bytes, GuestMemoryMmap};

use crate::Device;
use crate::chains::Chain;
use crate::requests::{Common, Requests};

/// The kernel writes a line at a time and waits for it, so more would lie idle.
const QUEUE_SIZE: u16 = 16;
/// Bytes copied out of guest memory at once.
const PIECE: usize = 1 << 10;
/// Most bytes taken from one chain; Linux writes at most a page at a time. The rest of a longer one is dropped.
const MOST_OF_A_CHAIN: usize = 64 << 10;
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
    common: Common,
}

impl Console {
    /// A console whose output goes to `sink`.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn new(sink: Sink) -> Result<Self, Errno> {
        Ok(Self {
            sink,
            common: Common::new()?,
        })
    }

    /// The state from which [`Console::restore`] makes the same device.
    pub fn state(&self) -> ConsoleState {
        ConsoleState {
            version: STATE_VERSION,
            acked_features: self.common.acked_features,
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
        self.set_acked_features(state.acked_features);
        Ok(())
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

impl Requests for Console {
    const NAME: &'static str = "console";
    const ID: u32 = VIRTIO_ID_CONSOLE;
    /// Port 0's queues: to the guest, and from it (virtio 1.3 §5.3.2).
    const QUEUE_SIZES: &'static [u16] = &[QUEUE_SIZE; 2];
    const QUEUE: usize = 1;
    const BATCH: usize = 64;

    fn common(&self) -> &Common {
        &self.common
    }

    fn common_mut(&mut self) -> &mut Common {
        &mut self.common
    }

    // Neither a size nor more ports are offered (§5.3.3), so that all of the configuration space reads as zero.

    fn answer<'m>(&mut self, memory: &'m GuestMemoryMmap, chain: Chain<'m>) -> u32 {
        pass_on(memory, chain, &mut self.sink);
        0
    }
}

#[cfg(test)]
mod tests;
