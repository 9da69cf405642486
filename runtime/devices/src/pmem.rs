//! Persistent memory (virtio 1.3 §5.19) over a file that is mapped read-only and shared: the guest reads the host's page cache,
//! with no copy and, with DAX, no page cache of its own. The mapping into guest memory is made by whoever runs the VM; this is
//! the queue and the configuration. Nothing the guest does reaches the file, so that there is never anything to flush.

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::chains::Chain;
use crate::requests::{Common, Requests};
use crate::segments::Segments;
use crate::{Device, config};

/// The kernel has a request for each thread that waits for a flush.
const QUEUE_SIZE: u16 = 16;
/// The unit in which Linux maps such memory, bytes.
const ALIGNMENT: u64 = 2 << 20;
/// VIRTIO_PMEM_REQ_TYPE_FLUSH (§5.19.6).
const FLUSH: [u8; 4] = 0u32.to_le_bytes();
/// Answers to a flush (§5.19.6.1).
const DONE: [u8; 4] = 0u32.to_le_bytes();
const FAILED: [u8; 4] = (-1i32).to_le_bytes();
/// Version of [`PmemState`].
const STATE_VERSION: u32 = 1;

/// Why there is no persistent memory.
#[derive(Debug, thiserror::Error)]
pub enum PmemError {
    /// The system refused something the device cannot be without.
    #[error("creating an eventfd for the pmem device failed")]
    Setup(#[source] Errno),
    /// No place for it.
    #[error(
        "persistent memory of {length:#x} bytes cannot be at guest address {start:#x}: \
         both must be multiples of {ALIGNMENT:#x}, and its end an address"
    )]
    Range {
        /// Guest physical address.
        start: u64,
        /// Length in bytes.
        length: u64,
    },
    /// A saved state is not of this version.
    #[error(
        "the saved state of the pmem device has version {0}; this program knows version {STATE_VERSION}"
    )]
    StateVersion(u32),
    /// A saved state is of memory elsewhere.
    #[error(
        "the saved state is of {:#x} bytes of persistent memory at guest address {:#x}, not of {:#x} at {:#x}",
        .saved.1, .saved.0, .present.1, .present.0
    )]
    StateRange {
        /// Address and length in the state.
        saved: (u64, u64),
        /// Those of this device.
        present: (u64, u64),
    },
}

/// What is needed to give a restored guest the same device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmemState {
    version: u32,
    acked_features: u64,
    start: u64,
    length: u64,
}

/// A virtio persistent memory device.
#[derive(Debug)]
pub struct Pmem {
    start: GuestAddress,
    length: u64,
    common: Common,
}

impl Pmem {
    /// Memory of `length` bytes that is mapped at `start`.
    ///
    /// # Errors
    /// [`PmemError::Range`] unless both are multiples of 2 MiB, [`PmemError::Setup`].
    pub fn new(start: GuestAddress, length: u64) -> Result<Self, PmemError> {
        let aligned = start.0.is_multiple_of(ALIGNMENT) && length.is_multiple_of(ALIGNMENT);
        if !aligned || length == 0 || start.0.checked_add(length).is_none() {
            let start = start.0;
            return Err(PmemError::Range { start, length });
        }
        Ok(Self {
            start,
            length,
            common: Common::new().map_err(PmemError::Setup)?,
        })
    }

    /// The state from which [`Pmem::restore`] makes the same device.
    pub fn state(&self) -> PmemState {
        PmemState {
            version: STATE_VERSION,
            acked_features: self.common.acked_features,
            start: self.start.0,
            length: self.length,
        }
    }

    /// Takes on `state`.
    ///
    /// # Errors
    /// [`PmemError::StateVersion`], [`PmemError::StateRange`].
    pub fn restore(&mut self, state: &PmemState) -> Result<(), PmemError> {
        if state.version != STATE_VERSION {
            return Err(PmemError::StateVersion(state.version));
        }
        let (saved, present) = ((state.start, state.length), (self.start.0, self.length));
        if saved != present {
            return Err(PmemError::StateRange { saved, present });
        }
        self.set_acked_features(state.acked_features);
        Ok(())
    }
}

/// Answers the request that `chain` is.
fn answer<'m>(memory: &'m GuestMemoryMmap, chain: Chain<'m>) -> u32 {
    let Ok((request, room)) = Segments::of_request(memory, chain) else {
        return 0;
    };
    let mut kind = [0; FLUSH.len()];
    let answer = match request.copy_to(&mut kind) {
        4 if kind == FLUSH => DONE,
        _ => FAILED,
    };
    if room.len() < answer.len() {
        return 0;
    }
    // Four.
    room.copy_from(&answer) as u32
}

impl Requests for Pmem {
    const NAME: &'static str = "pmem";
    const ID: u32 = VIRTIO_ID_PMEM;
    const QUEUE_SIZES: &'static [u16] = &[QUEUE_SIZE];
    const BATCH: usize = 64;

    fn common(&self) -> &Common {
        &self.common
    }

    fn common_mut(&mut self) -> &mut Common {
        &mut self.common
    }

    /// `struct virtio_pmem_config` (§5.19.4): where it is, and how long.
    fn config(&self, offset: u64, data: &mut [u8]) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.start.0.to_le_bytes());
        bytes[8..].copy_from_slice(&self.length.to_le_bytes());
        config::read(&bytes, offset, data);
    }

    fn answer<'m>(&mut self, memory: &'m GuestMemoryMmap, chain: Chain<'m>) -> u32 {
        answer(memory, chain)
    }
}

#[cfg(test)]
mod tests;
