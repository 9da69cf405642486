//! Entropy for the guest (virtio 1.3 §5.4), from the host kernel's generator. The device holds no state of its own, and none of
//! what it hands out.

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::{Bytes, GuestMemoryMmap};

use crate::Device;
use crate::chains::Chain;
use crate::requests::{Common, Requests};

/// The kernel has one request under way at a time.
const QUEUE_SIZE: u16 = 8;
/// Most bytes given to one chain. The device may give fewer than there is room for (§5.4.6.1); Linux asks for 64.
const MOST_OF_A_CHAIN: usize = 256;
/// Version of [`RngState`].
const STATE_VERSION: u32 = 1;

/// A saved state is not of this version.
#[derive(Debug, thiserror::Error)]
#[error(
    "the saved state of the entropy device has version {0}; this program knows version {STATE_VERSION}"
)]
pub struct RngStateVersion(u32);

/// What is needed to give a restored guest the same device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {
    version: u32,
    acked_features: u64,
}

/// The entropy device.
#[derive(Debug)]
pub struct Rng {
    common: Common,
}

impl Rng {
    /// An entropy device.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn new() -> Result<Self, Errno> {
        Ok(Self {
            common: Common::new()?,
        })
    }

    /// The state from which [`Rng::restore`] makes the same device.
    pub fn state(&self) -> RngState {
        RngState {
            version: STATE_VERSION,
            acked_features: self.common.acked_features,
        }
    }

    /// Takes on `state`.
    ///
    /// # Errors
    /// When it is of another version.
    pub fn restore(&mut self, state: &RngState) -> Result<(), RngStateVersion> {
        if state.version != STATE_VERSION {
            return Err(RngStateVersion(state.version));
        }
        self.set_acked_features(state.acked_features);
        Ok(())
    }
}

/// Fills the first writable bytes of `chain`, up to what is not in guest memory; answers how many.
fn give(memory: &GuestMemoryMmap, chain: Chain<'_>) -> u32 {
    let mut entropy = [0; MOST_OF_A_CHAIN];
    let mut given = 0;
    for descriptor in chain.writable() {
        let wanted = (descriptor.len() as usize).min(MOST_OF_A_CHAIN - given);
        let bytes = &mut entropy[given..given + wanted];
        if !fill(bytes) || memory.write_slice(bytes, descriptor.addr()).is_err() {
            break;
        }
        given += wanted;
        if given == MOST_OF_A_CHAIN {
            break;
        }
    }
    // At most MOST_OF_A_CHAIN.
    given as u32
}

/// Fills `bytes`, of which there are at most 256, so that the kernel neither stops half-way nor is interrupted (getrandom(2)).
fn fill(bytes: &mut [u8]) -> bool {
    let wanted = bytes.len();
    rustix::rand::getrandom(bytes, rustix::rand::GetRandomFlags::empty()) == Ok(wanted)
}

impl Requests for Rng {
    const NAME: &'static str = "rng";
    const ID: u32 = VIRTIO_ID_RNG;
    const QUEUE_SIZES: &'static [u16] = &[QUEUE_SIZE];
    const BATCH: usize = 16;

    fn common(&self) -> &Common {
        &self.common
    }

    fn common_mut(&mut self) -> &mut Common {
        &mut self.common
    }

    fn answer<'m>(&mut self, memory: &'m GuestMemoryMmap, chain: Chain<'m>) -> u32 {
        give(memory, chain)
    }
}

#[cfg(test)]
mod tests;
