//! One request to the disk (virtio 1.3 §5.2.6): a header, data in one direction, and a byte for the answer. Nothing is read, written
//! or discarded before all that the request says has been checked against the disk's capacity.

use std::io;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::fdatasync;
use tracing::debug;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::GuestMemoryMmap;

use super::io::{Durability, read_at, write_at};
use super::{Blk, ID_LENGTH, SECTOR, SEG_MAX, SIZE_MAX};
use crate::chains::Chain;
use crate::segments::Segments;

/// Length of a request's header: its type, a reserved word, the first sector.
const HEADER_LENGTH: usize = 16;
/// Most bytes of data in one request.
const MAX_DATA: usize = SEG_MAX as usize * SIZE_MAX as usize;
/// Most ranges in one request to discard or to write zeroes.
pub(super) const MAX_RANGES: usize = 16;
/// Most sectors in one such range: 2 GiB.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 22;
/// Length of a range: first sector, number of sectors, flags (§5.2.6, `struct virtio_blk_discard_write_zeroes`).
const RANGE_LENGTH: usize = 16;
/// Flag of a range: the zeroes need not take space.
const UNMAP: u32 = 1;

/// Why a request is not carried out.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("it is malformed")]
    Malformed,
    #[error("it reaches beyond the end of the disk")]
    Range,
    #[error("the disk is read-only")]
    ReadOnly,
    #[error("there is no such kind of request")]
    Unsupported,
    #[error(transparent)]
    System(#[from] io::Error),
}

impl Refused {
    fn status(&self) -> u32 {
        match self {
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
            // The file's file system cannot do it; nothing is wrong with the disk.
            Self::System(error) if error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => {
                VIRTIO_BLK_S_UNSUPP
            }
            _ => VIRTIO_BLK_S_IOERR,
        }
    }
}

impl From<Errno> for Refused {
    fn from(errno: Errno) -> Self {
        Self::System(errno.into())
    }
}

/// A part of the disk, in bytes, that is inside it.
#[derive(Debug, Clone, Copy)]
struct Range {
    offset: u64,
    length: u64,
}

/// What to do with ranges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Clear {
    Discard,
    Zero,
}

impl Blk {
    /// Carries out the request that `chain` is; answers how many bytes it has written, the status included.
    pub(super) fn handle<'m>(&self, memory: &'m GuestMemoryMmap, chain: Chain<'m>) -> u32 {
        let (request, mut room) = match Segments::of_request(memory, chain) {
            Ok(both) => both,
            Err(reason) => {
                debug!(%reason, "dropping a request to the disk");
                return 0;
            }
        };
        let Some(before_status) = room.len().checked_sub(1) else {
            debug!("dropping a request to the disk that has no room for an answer");
            return 0;
        };
        let answer = room.split_off(before_status);
        let (status, written) = match self.carry_out(request, room) {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(reason) => {
                debug!(%reason, "refusing a request to the disk");
                (reason.status(), 0)
            }
        };
        // The three statuses are 0, 1 and 2.
        answer.copy_from(&[status as u8]);
        written + 1
    }

    /// Answers how many bytes of `room` it has written.
    fn carry_out(&self, mut request: Segments<'_>, room: Segments<'_>) -> Result<u32, Refused> {
        let data = request.split_off(HEADER_LENGTH);
        let mut header = [0; HEADER_LENGTH];
        if request.copy_to(&mut header) < HEADER_LENGTH {
            return Err(Refused::Malformed);
        }
        let [kind, _reserved, low, high] = words(&header);
        let sector = u64::from(low) | u64::from(high) << 32;
        match kind {
            VIRTIO_BLK_T_IN => self.read(sector, room),
            VIRTIO_BLK_T_OUT => self.write(sector, data).map(|()| 0),
            VIRTIO_BLK_T_FLUSH => self.flush().map(|()| 0),
            VIRTIO_BLK_T_GET_ID => self.name(room),
            VIRTIO_BLK_T_DISCARD => self.clear(Clear::Discard, data).map(|()| 0),
            VIRTIO_BLK_T_WRITE_ZEROES => self.clear(Clear::Zero, data).map(|()| 0),
            _ => Err(Refused::Unsupported),
        }
    }

    fn read(&self, sector: u64, room: Segments<'_>) -> Result<u32, Refused> {
        let range = self.data_range(sector, room.len())?;
        read_at(self.file.as_fd(), room, range.offset)?;
        // At most MAX_DATA.
        Ok(range.length as u32)
    }

    fn write(&self, sector: u64, data: Segments<'_>) -> Result<(), Refused> {
        self.check_writable()?;
        let range = self.data_range(sector, data.len())?;
        Ok(write_at(
            self.file.as_fd(),
            data,
            range.offset,
            self.durability(),
        )?)
    }

    fn flush(&self) -> Result<(), Refused> {
        // What can only be read has nothing to be written back.
        if self.read_only {
            return Ok(());
        }
        Ok(fdatasync(&self.file)?)
    }

    fn name(&self, room: Segments<'_>) -> Result<u32, Refused> {
        if room.len() != ID_LENGTH {
            return Err(Refused::Malformed);
        }
        Ok(room.copy_from(&self.id) as u32)
    }

    fn clear(&self, how: Clear, data: Segments<'_>) -> Result<(), Refused> {
        self.check_writable()?;
        let mut bytes = [0; MAX_RANGES * RANGE_LENGTH];
        if data.len() > bytes.len() || !data.len().is_multiple_of(RANGE_LENGTH) {
            return Err(Refused::Malformed);
        }
        let length = data.copy_to(&mut bytes);
        let mut ranges = Vec::with_capacity(MAX_RANGES);
        for entry in bytes[..length].chunks_exact(RANGE_LENGTH) {
            let [low, high, sectors, flags] = words(entry);
            let known = match how {
                Clear::Discard => 0,
                Clear::Zero => UNMAP,
            };
            if flags & !known != 0 {
                return Err(Refused::Unsupported);
            }
            if sectors > MAX_RANGE_SECTORS {
                return Err(Refused::Range);
            }
            let sector = u64::from(low) | u64::from(high) << 32;
            let range = self.range(sector, u64::from(sectors) * SECTOR)?;
            ranges.push((range, flags & UNMAP != 0));
        }
        for (range, unmap) in ranges {
            let mode = if how == Clear::Discard || unmap {
                FallocateFlags::FALLOC_FL_PUNCH_HOLE
            } else {
                FallocateFlags::FALLOC_FL_ZERO_RANGE
            };
            if range.length > 0 {
                let mode = mode | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                // Both are at most the length of a file.
                let (offset, length) = (range.offset as i64, range.length as i64);
                fallocate(&self.file, mode, offset, length)?;
            }
        }
        match self.durability() {
            Durability::Cached => Ok(()),
            Durability::Through => self.flush(),
        }
    }

    fn check_writable(&self) -> Result<(), Refused> {
        if self.read_only {
            return Err(Refused::ReadOnly);
        }
        Ok(())
    }

    /// A driver that does not know of flushes expects each write to last (§5.2.6.2).
    fn durability(&self) -> Durability {
        if self.common.acked_features & 1 << VIRTIO_BLK_F_FLUSH != 0 {
            Durability::Cached
        } else {
            Durability::Through
        }
    }

    fn data_range(&self, sector: u64, length: usize) -> Result<Range, Refused> {
        if length > MAX_DATA {
            return Err(Refused::Malformed);
        }
        self.range(sector, length as u64)
    }

    fn range(&self, sector: u64, length: u64) -> Result<Range, Refused> {
        if !length.is_multiple_of(SECTOR) {
            return Err(Refused::Malformed);
        }
        match sector.checked_add(length / SECTOR) {
            Some(end) if end <= self.sectors => Ok(Range {
                offset: sector * SECTOR,
                length,
            }),
            _ => Err(Refused::Range),
        }
    }
}

/// The little-endian words that the 16 `bytes` are.
fn words(bytes: &[u8]) -> [u32; 4] {
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        let mut four = [0; 4];
        four.copy_from_slice(bytes);
        *word = u32::from_le_bytes(four);
    }
    words
}
