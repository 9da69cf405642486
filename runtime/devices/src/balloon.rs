//! The memory balloon (virtio 1.3 §5.5): pages the guest gives back because it was asked to (inflation), and pages it happens not to
//! use (free page reporting). Both are the guest's own memory, and what it gives back it can have again by touching it, so
//! that a guest that lies about them harms itself alone. How pages go back to the host is the business of a [`Reclaim`].

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use tracing::debug;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Address, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use crate::chains::{self, Chain};
use crate::knob::Knob;
use crate::segments::{Direction, MAX_DESCRIPTORS, Segments};
use crate::{Broken, Context, Device, QueueMask, config};

const NAME: &str = "balloon";
/// Queues (§5.5.2). The standard numbers five; but one that belongs to a feature the device does not offer has no number in any
/// driver, so that with neither statistics nor free page hints reporting is the third.
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const REPORT: usize = 2;
const QUEUE_SIZES: [u16; 3] = [128, 128, 32];
/// Features (§5.5.3).
const F_DEFLATE_ON_OOM: u32 = 2;
const F_PAGE_REPORTING: u32 = 5;
/// Size of the pages of the balloon, bytes, whatever the guest's own are (§5.5.6).
const PAGE: u64 = 4 << 10;
/// Most page numbers in one chain; Linux sends 256. More are left where they are.
const MAX_PAGES: usize = 1 << 10;
/// Most chains handled in one call.
const BATCH: usize = 32;
/// Where `actual` is in configuration space (§5.5.4).
const ACTUAL: u64 = 4;
/// Version of [`BalloonState`].
const STATE_VERSION: u32 = 1;

/// Gives guest memory back to the host.
pub trait Reclaim: Send {
    /// Frees what is behind `length` bytes of guest memory from `start` on. They are whole pages of 4 KiB in one region of
    /// guest memory, and stay readable and writable; what they hold afterwards does not matter.
    ///
    /// # Errors
    /// The system's. The pages are then simply not freed.
    fn discard(&mut self, start: GuestAddress, length: u64) -> io::Result<()>;
}

/// A saved state is not of this version.
#[derive(Debug, thiserror::Error)]
#[error(
    "the saved state of the balloon has version {0}; this program knows version {STATE_VERSION}"
)]
pub struct BalloonStateVersion(u32);

/// What is needed to give a restored guest the same device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    version: u32,
    acked_features: u64,
    target: u32,
    actual: u32,
}

/// The memory balloon.
pub struct Balloon {
    reclaim: Box<dyn Reclaim>,
    acked_features: u64,
    shared: Arc<Shared>,
}

/// What a device and its handles share.
#[derive(Debug)]
struct Shared {
    /// Pages the host wants.
    target: Knob,
    /// Pages the guest says it has given.
    actual: AtomicU32,
}

/// Squeezes a guest from other threads.
#[derive(Debug, Clone)]
pub struct BalloonHandle(Arc<Shared>);

impl BalloonHandle {
    /// Asks the guest to have `bytes` of its memory in the balloon, rounded down to whole pages; it complies when and as far as it
    /// likes.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        self.0.target.set(pages.into());
    }

    /// How many bytes the guest was asked to give.
    pub fn target(&self) -> u64 {
        self.0.target.get() * PAGE
    }

    /// How many bytes the guest says it has given. It may lie.
    pub fn actual(&self) -> u64 {
        u64::from(self.0.actual.load(Ordering::Relaxed)) * PAGE
    }
}

impl Balloon {
    /// An empty balloon, out of which pages go back to the host through `reclaim`.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn new(reclaim: Box<dyn Reclaim>) -> Result<Self, Errno> {
        Ok(Self {
            reclaim,
            acked_features: 0,
            shared: Arc::new(Shared {
                target: Knob::new(0)?,
                actual: AtomicU32::new(0),
            }),
        })
    }

    /// A way to squeeze the guest.
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle(Arc::clone(&self.shared))
    }

    /// The state from which [`Balloon::restore`] makes the same device.
    pub fn state(&self) -> BalloonState {
        BalloonState {
            version: STATE_VERSION,
            acked_features: self.acked_features,
            target: self.target(),
            actual: self.shared.actual.load(Ordering::Relaxed),
        }
    }

    /// Takes on `state`.
    ///
    /// # Errors
    /// When it is of another version.
    pub fn restore(&mut self, state: &BalloonState) -> Result<(), BalloonStateVersion> {
        if state.version != STATE_VERSION {
            return Err(BalloonStateVersion(state.version));
        }
        self.acked_features = state.acked_features & self.features();
        self.shared.target.set(state.target.into());
        self.shared.actual.store(state.actual, Ordering::Relaxed);
        Ok(())
    }

    /// In pages.
    fn target(&self) -> u32 {
        // It was made from a u32.
        self.shared.target.get() as u32
    }

    fn drain(&mut self, ctx: &mut Context<'_, '_>, index: usize) -> Result<QueueMask, Broken> {
        let reclaim = &mut *self.reclaim;
        let again = self.shared.target.again();
        chains::serve(NAME, ctx, index, BATCH, again, |memory, chain| {
            match index {
                INFLATE => inflate(reclaim, memory, chain),
                REPORT => report(reclaim, memory, chain),
                // Pages come back to a guest by being touched.
                _ => {}
            }
            0
        })
    }
}

/// Frees the pages whose numbers are in `chain`.
fn inflate<'m>(reclaim: &mut dyn Reclaim, memory: &'m GuestMemoryMmap, chain: Chain<'m>) {
    let numbers = match Segments::new(memory, chain, Direction::Readable) {
        Ok(numbers) => numbers,
        Err(reason) => return debug!(%reason, "dropping pages of the balloon"),
    };
    let mut bytes = vec![0; numbers.len().min(4 * MAX_PAGES)];
    let length = numbers.copy_to(&mut bytes);
    let mut pages: Vec<u64> = bytes[..length]
        .chunks_exact(4)
        .map(|n| u64::from(u32::from_le_bytes([n[0], n[1], n[2], n[3]])))
        .collect();
    pages.sort_unstable();
    pages.dedup();
    for run in pages.chunk_by(|one, next| one + 1 == *next) {
        discard(reclaim, memory, run[0] * PAGE, run.len() as u64 * PAGE);
    }
}

/// Frees the memory that the buffers of `chain` are. Their content is neither read nor written.
fn report<'m>(reclaim: &mut dyn Reclaim, memory: &'m GuestMemoryMmap, chain: Chain<'m>) {
    for buffer in chain.writable().take(MAX_DESCRIPTORS) {
        discard(reclaim, memory, buffer.addr().0, buffer.len().into());
    }
}

/// Frees the whole pages among `length` bytes from `start` on, as far as they are in guest memory.
fn discard(reclaim: &mut dyn Reclaim, memory: &GuestMemoryMmap, start: u64, length: u64) {
    let whole = |address: u64| address - address % PAGE;
    let Some(end) = start.checked_add(length).map(whole) else {
        return;
    };
    let Some(mut at) = start.checked_next_multiple_of(PAGE) else {
        return;
    };
    while at < end {
        let Some(region) = memory.find_region(GuestAddress(at)) else {
            return;
        };
        let piece = end.min(whole(region.last_addr().raw_value().saturating_add(1)));
        if piece <= at {
            return;
        }
        if let Err(error) = reclaim.discard(GuestAddress(at), piece - at) {
            debug!(%error, at, "cannot free memory of the guest's");
        }
        at = piece;
    }
}

impl Device for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << F_DEFLATE_ON_OOM
            | 1 << F_PAGE_REPORTING
    }

    fn set_acked_features(&mut self, features: u64) {
        self.acked_features = features & self.features();
    }

    /// `struct virtio_balloon_config` (§5.5.4): the pages wanted, and the pages given.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&self.target().to_le_bytes());
        let actual = self.shared.actual.load(Ordering::Relaxed);
        bytes[4..].copy_from_slice(&actual.to_le_bytes());
        config::read(&bytes, offset, data);
    }

    /// The guest says how many pages it has given.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL, Ok(bytes)) = (offset, data.try_into()) {
            let actual = u32::from_le_bytes(bytes);
            self.shared.actual.store(actual, Ordering::Relaxed);
        }
    }

    fn config_generation(&self) -> u32 {
        self.shared.target.generation()
    }

    fn queue_event(
        &mut self,
        ctx: &mut Context<'_, '_>,
        index: usize,
    ) -> Result<QueueMask, Broken> {
        match index {
            INFLATE | DEFLATE | REPORT => self.drain(ctx, index),
            _ => Ok(QueueMask::NONE),
        }
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.shared.target.fd())
    }

    fn host_event(&mut self, ctx: &mut Context<'_, '_>) -> Result<QueueMask, Broken> {
        self.shared.target.again().asked();
        let mut used = QueueMask::NONE;
        for index in [INFLATE, DEFLATE, REPORT] {
            used.insert_all(self.drain(ctx, index)?);
        }
        Ok(used)
    }

    fn reset(&mut self) {
        self.acked_features = 0;
        self.shared.actual.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
