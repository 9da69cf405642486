//! The guest kernel's console (virtio 1.3 §5.3): one port. What the guest writes goes to a function; the device keeps none of it, so that a
//! flood costs time but no memory. What is sent to the guest is what the host has said before: a line, if anything.

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vm_memory::{Bytes, GuestMemoryMmap};

use crate::chains::{self, Chain};
use crate::requests::{Common, Requests};
use crate::{Broken, Context, Device, QueueMask};

/// Port 0's queue to the guest (§5.3.2).
const TO_GUEST: usize = 0;
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
    /// What the guest has yet to be sent.
    line: Vec<u8>,
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
            line: Vec::new(),
            common: Common::new()?,
        })
    }

    /// Has the guest read `line`, once it has made room for it in the queue and said so.
    pub fn say(&mut self, line: &[u8]) {
        self.line.extend_from_slice(line);
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

/// Moves as much of `line` as there is room for to what is writable of `chain`; answers how much that was.
fn send(memory: &GuestMemoryMmap, chain: Chain<'_>, line: &mut Vec<u8>) -> u32 {
    let mut sent = 0;
    for descriptor in chain.writable() {
        let piece = &line[sent..line.len().min(sent + descriptor.len() as usize)];
        if piece.is_empty() || memory.write_slice(piece, descriptor.addr()).is_err() {
            break;
        }
        sent += piece.len();
    }
    line.drain(..sent);
    sent as u32
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

    fn other_event(
        &mut self,
        ctx: &mut Context<'_, '_>,
        index: usize,
    ) -> Result<QueueMask, Broken> {
        if index != TO_GUEST || self.line.is_empty() {
            return Ok(QueueMask::NONE);
        }
        let Some(chain) = chains::next(Self::NAME, ctx, index)? else {
            return Ok(QueueMask::NONE);
        };
        let head = chain.head_index();
        let sent = send(ctx.memory, chain, &mut self.line);
        chains::give_back(Self::NAME, ctx, index, head, sent)?;
        let mut used = QueueMask::NONE;
        used.insert(index);
        Ok(used)
    }

    // Neither a size nor more ports are offered (§5.3.3), so that all of the configuration space reads as zero.

    fn answer<'m>(&mut self, memory: &'m GuestMemoryMmap, chain: Chain<'m>) -> u32 {
        pass_on(memory, chain, &mut self.sink);
        0
    }
}

#[cfg(test)]
mod tests;
