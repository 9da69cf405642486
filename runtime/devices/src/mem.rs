//! Memory that grows and shrinks while the guest runs (virtio 1.3 §5.15): a region of the guest's address space in blocks, each of
//! which the guest has plugged or not. The host says how much the guest should have; the guest plugs and unplugs blocks, never
//! more than that. What is behind a block is the business of a [`HotMemory`].

mod blocks;
mod request;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestAddress;

use crate::knob::Knob;
use crate::{Broken, Context, Device, QueueMask, chains, config};
use blocks::{Blocks, Run};

const NAME: &str = "mem";
const QUEUE: usize = 0;
/// The kernel has one request under way at a time.
const QUEUE_SIZE: u16 = 8;
/// Most requests handled in one call.
const BATCH: usize = 16;
/// Size of a block, bytes: a huge page, and the least in which Linux can plug memory on x86.
pub const BLOCK: u64 = 2 << 20;
/// Largest region, bytes. Its blocks take 64 KiB to remember.
const MAX_REGION: u64 = 1 << 40;
/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE (§5.15.3): the guest must not touch memory it has not plugged.
const F_UNPLUGGED_INACCESSIBLE: u32 = 1;
/// Version of [`MemState`].
const STATE_VERSION: u32 = 1;

/// What is behind the region. Ranges are whole blocks inside it.
pub trait HotMemory: Send {
    /// The guest is to use `length` bytes from `start` on, which it has not used since they were last unplugged.
    ///
    /// # Errors
    /// The system's; the guest is then told to try again later.
    fn plug(&mut self, start: GuestAddress, length: u64) -> io::Result<()>;

    /// The guest no longer uses `length` bytes from `start` on. What they held is lost.
    ///
    /// # Errors
    /// The system's; the blocks then stay plugged, and the guest is told to try again later.
    fn unplug(&mut self, start: GuestAddress, length: u64) -> io::Result<()>;
}

/// Why there is no such memory, or not as much as was asked for.
#[derive(Debug, thiserror::Error)]
pub enum MemError {
    /// The system refused something the device cannot be without.
    #[error("creating an eventfd for the mem device failed")]
    Setup(#[source] Errno),
    /// No place for it.
    #[error(
        "a region of {length:#x} bytes for memory to be plugged cannot be at guest address {start:#x}: \
         both must be multiples of {BLOCK:#x}, its end an address, and its length at most {MAX_REGION:#x}"
    )]
    Region {
        /// Guest physical address.
        start: u64,
        /// Length in bytes.
        length: u64,
    },
    /// The guest cannot have as much.
    #[error(
        "the guest cannot have {bytes} more bytes of memory: give a multiple of {BLOCK}, at most {most}"
    )]
    Request {
        /// What was asked for.
        bytes: u64,
        /// Length of the region.
        most: u64,
    },
    /// A saved state is not of this version.
    #[error(
        "the saved state of the mem device has version {0}; this program knows version {STATE_VERSION}"
    )]
    StateVersion(u32),
    /// A saved state is of another region, or of no region at all.
    #[error("the saved state is not of memory in {length:#x} bytes at guest address {start:#x}")]
    StateRegion {
        /// Guest physical address of this device's region.
        start: u64,
        /// Its length in bytes.
        length: u64,
    },
    /// What was plugged cannot be plugged again.
    #[error("memory that the guest had plugged cannot be had")]
    StatePlug(#[source] io::Error),
}

/// What is needed to give a restored guest the same device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemState {
    version: u32,
    acked_features: u64,
    start: u64,
    length: u64,
    requested: u64,
    plugged: Vec<Run>,
}

/// A virtio memory device.
pub struct Mem {
    start: GuestAddress,
    blocks: Blocks,
    memory: Box<dyn HotMemory>,
    acked_features: u64,
    shared: Arc<Shared>,
}

/// What a device and its handles share.
#[derive(Debug)]
struct Shared {
    /// Length of the region, bytes.
    length: u64,
    /// Bytes the guest should have plugged.
    requested: Knob,
    /// Bytes it has.
    plugged: AtomicU64,
    /// Closed when the guest has what was asked for last.
    done: Mutex<Option<OwnedFd>>,
}

impl Shared {
    /// Lets go of the descriptor that is waited on, if there is nothing left to wait for.
    fn settle(&self) {
        let mut done = self.waiting();
        if self.plugged.load(Ordering::Acquire) == self.requested.get() {
            drop(done.take());
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        // A descriptor and nothing else is behind the lock.
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives memory to a guest, and asks for it back, from other threads.
#[derive(Debug, Clone)]
pub struct MemHandle(Arc<Shared>);

impl MemHandle {
    /// Asks the guest to have `bytes` plugged; it can at once plug no more than that, and unplugs what is more as far as it can.
    /// `done` is closed when it has just that, or is asked for something else.
    ///
    /// # Errors
    /// [`MemError::Request`].
    pub fn request(&self, bytes: u64, done: Option<OwnedFd>) -> Result<(), MemError> {
        let most = self.0.length;
        if bytes > most || !bytes.is_multiple_of(BLOCK) {
            return Err(MemError::Request { bytes, most });
        }
        // Both at once, or else what was asked for before could settle what waits for this.
        let mut waiting = self.0.waiting();
        *waiting = done;
        self.0.requested.set(bytes);
        drop(waiting);
        // Where nothing is to change, nothing will tell of it.
        self.0.settle();
        Ok(())
    }

    /// How many bytes the guest should have plugged.
    pub fn requested(&self) -> u64 {
        self.0.requested.get()
    }

    /// How many bytes the guest has plugged.
    pub fn plugged(&self) -> u64 {
        self.0.plugged.load(Ordering::Relaxed)
    }
}

impl Mem {
    /// A region of `length` bytes at `start`, nothing of which is plugged or asked for. Linux on x86 uses memory in pieces of
    /// 128 MiB, and leaves unused what is not in a whole one.
    ///
    /// # Errors
    /// [`MemError::Region`], [`MemError::Setup`].
    pub fn new(
        start: GuestAddress,
        length: u64,
        memory: Box<dyn HotMemory>,
    ) -> Result<Self, MemError> {
        let aligned = start.0.is_multiple_of(BLOCK) && length.is_multiple_of(BLOCK);
        let fits = (BLOCK..=MAX_REGION).contains(&length) && start.0.checked_add(length).is_some();
        if !aligned || !fits {
            let start = start.0;
            return Err(MemError::Region { start, length });
        }
        Ok(Self {
            start,
            blocks: Blocks::new((length / BLOCK) as u32),
            memory,
            acked_features: 0,
            shared: Arc::new(Shared {
                length,
                requested: Knob::new(0).map_err(MemError::Setup)?,
                plugged: AtomicU64::new(0),
                done: Mutex::default(),
            }),
        })
    }

    /// A way to give the guest memory.
    pub fn handle(&self) -> MemHandle {
        MemHandle(Arc::clone(&self.shared))
    }

    /// The state from which [`Mem::restore`] makes the same device.
    pub fn state(&self) -> MemState {
        MemState {
            version: STATE_VERSION,
            acked_features: self.acked_features,
            start: self.start.0,
            length: self.shared.length,
            requested: self.shared.requested.get(),
            plugged: self.blocks.plugged_runs().collect(),
        }
    }

    /// Takes on `state`, with [`HotMemory::plug`] of all that was plugged.
    ///
    /// # Errors
    /// [`MemError::StateVersion`], [`MemError::StateRegion`], [`MemError::StatePlug`].
    pub fn restore(&mut self, state: &MemState) -> Result<(), MemError> {
        if state.version != STATE_VERSION {
            return Err(MemError::StateVersion(state.version));
        }
        let (start, length) = (self.start.0, self.shared.length);
        let other = || MemError::StateRegion { start, length };
        let mut blocks = Blocks::new(self.blocks.len());
        for &run in &state.plugged {
            if !blocks.contains(run) || blocks.any_plugged(run) {
                return Err(other());
            }
            blocks.plug(run);
        }
        let same = (state.start, state.length) == (start, length);
        if !same || state.requested > length || !state.requested.is_multiple_of(BLOCK) {
            return Err(other());
        }
        for &run in &state.plugged {
            let (start, length) = self.range(run);
            self.memory
                .plug(start, length)
                .map_err(MemError::StatePlug)?;
        }
        self.blocks = blocks;
        self.acked_features = state.acked_features & self.features();
        self.shared.requested.set(state.requested);
        self.publish();
        Ok(())
    }

    /// Address and length of `run`.
    fn range(&self, run: Run) -> (GuestAddress, u64) {
        let start = GuestAddress(self.start.0 + u64::from(run.first) * BLOCK);
        (start, u64::from(run.count) * BLOCK)
    }

    fn plugged(&self) -> u64 {
        u64::from(self.blocks.plugged()) * BLOCK
    }

    /// Tells the handles how much is plugged.
    fn publish(&self) {
        self.shared.plugged.store(self.plugged(), Ordering::Release);
        self.shared.settle();
    }

    fn drain(&mut self, ctx: &mut Context<'_, '_>) -> Result<QueueMask, Broken> {
        let shared = Arc::clone(&self.shared);
        let again = shared.requested.again();
        let used = chains::serve(NAME, ctx, QUEUE, BATCH, again, |memory, chain| {
            self.answer(memory, chain)
        });
        self.publish();
        used
    }
}

impl Device for Mem {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << F_UNPLUGGED_INACCESSIBLE
    }

    fn set_acked_features(&mut self, features: u64) {
        self.acked_features = features & self.features();
    }

    /// `struct virtio_mem_config` (§5.15.4). All of the region is usable at any time.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut bytes = [0; 56];
        let words = [
            BLOCK,
            // node_id, which takes a feature that is not offered.
            0,
            self.start.0,
            self.shared.length,
            // usable_region_size.
            self.shared.length,
            self.plugged(),
            self.shared.requested.get(),
        ];
        for (bytes, word) in bytes.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        config::read(&bytes, offset, data);
    }

    fn config_generation(&self) -> u32 {
        self.shared.requested.generation()
    }

    fn queue_event(
        &mut self,
        ctx: &mut Context<'_, '_>,
        index: usize,
    ) -> Result<QueueMask, Broken> {
        match index {
            QUEUE => self.drain(ctx),
            _ => Ok(QueueMask::NONE),
        }
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.shared.requested.fd())
    }

    fn host_event(&mut self, ctx: &mut Context<'_, '_>) -> Result<QueueMask, Broken> {
        self.shared.requested.again().asked();
        self.drain(ctx)
    }

    /// Blocks stay as they are (§5.15.5): the memory is the guest's, whatever becomes of its driver.
    fn reset(&mut self) {
        self.acked_features = 0;
    }
}

#[cfg(test)]
mod tests;
