//! The block device (virtio 1.3 §5.2): a raw file or a block device of the host's, whole, as the guest's disk. Data moves between
//! the file and guest memory without a copy here. Requests are carried out one after the other by the thread that drives the
//! device, which waits for the disk; it should drive no device that must not.

mod io;
mod request;

use std::fs::File;
use std::io::Seek;
use std::os::unix::fs::FileTypeExt;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::GuestMemoryMmap;

use crate::chains::Chain;
use crate::requests::{Common, Requests};
use crate::segments::MAX_DESCRIPTORS;
use crate::{Device, config};
use request::{MAX_RANGE_SECTORS, MAX_RANGES};

const QUEUE_SIZE: u16 = 128;
/// Most requests carried out in one call.
const BATCH: usize = 16;
/// The unit of capacity and addresses, in bytes, whatever the block size (§5.2.4).
const SECTOR: u64 = 512;
/// Most buffers of data in one request: a chain also has a header and a status.
const SEG_MAX: u32 = MAX_DESCRIPTORS as u32 - 2;
/// Most bytes in one buffer of data.
const SIZE_MAX: u32 = 64 << 10;
/// Length of the disk's name, in bytes.
const ID_LENGTH: usize = VIRTIO_BLK_ID_BYTES as usize;
/// Version of [`BlkState`].
const STATE_VERSION: u32 = 1;

/// Why there is no block device.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    /// The system refused something the device cannot be without.
    #[error("{what} for the block device failed")]
    Setup {
        /// What was being done.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The descriptor is of something else, or opened in a way that cannot work.
    #[error("a block device cannot be made of {0}")]
    Unsuitable(&'static str),
    /// Not a number of whole sectors.
    #[error(
        "a disk of {0} bytes cannot be given to a guest: a disk is a positive multiple of {SECTOR} bytes"
    )]
    Size(u64),
    /// The name does not fit.
    #[error("the disk name {0:?} must have at most {ID_LENGTH} bytes of printable ASCII")]
    Id(String),
    /// A saved state is not of this version.
    #[error(
        "the saved state of the block device has version {0}; this program knows version {STATE_VERSION}"
    )]
    StateVersion(u32),
    /// A saved state is of another disk.
    #[error(
        "the saved state is of a disk with {saved} sectors, not {present}, or differs in being read-only"
    )]
    StateDisk {
        /// Sectors of the disk in the state.
        saved: u64,
        /// Sectors of this one.
        present: u64,
    },
}

/// What is needed to give a restored guest the same device, together with the same disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkState {
    version: u32,
    acked_features: u64,
    sectors: u64,
    read_only: bool,
}

/// A virtio block device.
#[derive(Debug)]
pub struct Blk {
    file: File,
    read_only: bool,
    /// Capacity.
    sectors: u64,
    /// The disk's name, filled up with NULs.
    id: [u8; ID_LENGTH],
    common: Common,
}

impl Blk {
    /// The disk that `file` is, a regular file or a block device. `id` is what the guest finds in `/sys/block/*/serial`.
    ///
    /// # Errors
    /// [`BlkError`]: the file has a wrong type, size, or access mode; the name is too long.
    pub fn new(mut file: File, read_only: bool, id: &str) -> Result<Self, BlkError> {
        let setup = |what| move |source| BlkError::Setup { what, source };
        let kind = file.metadata().map_err(setup("fstat"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(BlkError::Unsuitable(
                "what is neither a regular file nor a block device",
            ));
        }
        let flags = fcntl(&file, FcntlArg::F_GETFL).map_err(|e| setup("fcntl")(e.into()))?;
        let flags = OFlag::from_bits_retain(flags);
        match flags & OFlag::O_ACCMODE {
            OFlag::O_RDWR => {}
            OFlag::O_RDONLY if read_only => {}
            _ => {
                return Err(BlkError::Unsuitable(
                    "a file that is not open for what the guest may do",
                ));
            }
        }
        if flags.intersects(OFlag::O_APPEND | OFlag::O_DIRECT | OFlag::O_PATH) {
            return Err(BlkError::Unsuitable(
                "a file opened with O_APPEND, O_DIRECT or O_PATH",
            ));
        }
        // The length of a block device is where it ends, not what fstat says.
        let length = file
            .seek(std::io::SeekFrom::End(0))
            .map_err(setup("lseek"))?;
        if length == 0 || !length.is_multiple_of(SECTOR) {
            return Err(BlkError::Size(length));
        }
        if id.len() > ID_LENGTH || !id.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(BlkError::Id(id.to_owned()));
        }
        let mut padded = [0; ID_LENGTH];
        padded[..id.len()].copy_from_slice(id.as_bytes());
        Ok(Self {
            file,
            read_only,
            sectors: length / SECTOR,
            id: padded,
            common: Common::new().map_err(|e| setup("creating an eventfd")(e.into()))?,
        })
    }

    /// The state from which [`Blk::restore`] makes the same device.
    pub fn state(&self) -> BlkState {
        BlkState {
            version: STATE_VERSION,
            acked_features: self.common.acked_features,
            sectors: self.sectors,
            read_only: self.read_only,
        }
    }

    /// Takes on `state`, which must be of the same disk. No request is ever half done between two calls, so that there is nothing
    /// else to take over.
    ///
    /// # Errors
    /// [`BlkError::StateVersion`], [`BlkError::StateDisk`].
    pub fn restore(&mut self, state: &BlkState) -> Result<(), BlkError> {
        if state.version != STATE_VERSION {
            return Err(BlkError::StateVersion(state.version));
        }
        if (state.sectors, state.read_only) != (self.sectors, self.read_only) {
            let (saved, present) = (state.sectors, self.sectors);
            return Err(BlkError::StateDisk { saved, present });
        }
        self.set_acked_features(state.acked_features);
        Ok(())
    }
}

impl Requests for Blk {
    const NAME: &'static str = "blk";
    const ID: u32 = VIRTIO_ID_BLOCK;
    const QUEUE_SIZES: &'static [u16] = &[QUEUE_SIZE];
    const BATCH: usize = BATCH;

    fn common(&self) -> &Common {
        &self.common
    }

    fn common_mut(&mut self) -> &mut Common {
        &mut self.common
    }

    fn own_features(&self) -> u64 {
        let always = 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH;
        always
            | if self.read_only {
                1 << VIRTIO_BLK_F_RO
            } else {
                1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
            }
    }

    /// `struct virtio_blk_config` (§5.2.4). What belongs to features that are not offered is zero.
    fn config(&self, offset: u64, data: &mut [u8]) {
        let mut bytes = [0; 60];
        bytes[0..8].copy_from_slice(&self.sectors.to_le_bytes());
        bytes[8..12].copy_from_slice(&SIZE_MAX.to_le_bytes());
        bytes[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
        bytes[20..24].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        if !self.read_only {
            let ranges = (MAX_RANGES as u32).to_le_bytes();
            let sectors = MAX_RANGE_SECTORS.to_le_bytes();
            // max_discard_sectors, max_discard_seg, discard_sector_alignment.
            bytes[36..40].copy_from_slice(&sectors);
            bytes[40..44].copy_from_slice(&ranges);
            bytes[44..48].copy_from_slice(&1u32.to_le_bytes());
            // max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap.
            bytes[48..52].copy_from_slice(&sectors);
            bytes[52..56].copy_from_slice(&ranges);
            bytes[56] = 1;
        }
        config::read(&bytes, offset, data);
    }

    fn answer<'m>(&mut self, memory: &'m GuestMemoryMmap, chain: Chain<'m>) -> u32 {
        self.handle(memory, chain)
    }
}

#[cfg(test)]
mod tests;
