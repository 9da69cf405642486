//! The guest's memory: address space reserved at once and filled by the guest's use of it, with pages of files laid over it
//! copy-on-write. Nothing here copies a file, and nothing is ever unmapped: KVM and the device threads use it to the end of
//! the process.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous};
use vm_memory::{
    Address, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use super::error::KvmError;
use super::layout::{HOLE, HOLE_END, PAGE};

/// Alignment of guest memory in our address space. A huge page can back the guest's only where both addresses agree modulo
/// its size.
const HUGE_PAGE: usize = 2 << 20;

/// What Linux on x86 takes memory in that comes later, bytes: in 128 MiB, or in up to 2 GiB on large machines.
const HOT_UNIT: u64 = 128 << 20;
const HOT_ALIGNMENT: u64 = 2 << 30;

/// Protection of memory that a guest uses.
pub(super) const USED: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

/// Protection of memory that nobody is to use yet.
pub(super) const HELD: ProtFlags = ProtFlags::PROT_NONE;

/// The address ranges that `mib` MiB of memory take: below the device hole, and the rest above it.
pub(super) fn ranges(mib: u32) -> Vec<(u64, u64)> {
    let size = u64::from(mib) << 20;
    match size.checked_sub(HOLE) {
        None | Some(0) => vec![(0, size)],
        Some(rest) => vec![(0, HOLE), (HOLE_END, rest)],
    }
}

/// Reserves `mib` MiB for a guest. They cost nothing until touched.
pub(super) fn reserve(mib: u32) -> Result<GuestMemoryMmap, KvmError> {
    let memory = |source| KvmError::Memory { mib, source };
    let mut regions = Vec::new();
    for (start, size) in ranges(mib) {
        let mapping = reserve_range(size as usize, USED).map_err(memory)?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(start))
            .ok_or_else(|| memory(io::ErrorKind::InvalidInput.into()))?;
        regions.push(region);
    }
    GuestMemoryMmap::from_regions(regions).map_err(|error| memory(io::Error::other(error)))
}

/// Start and length of the region for the `mib` MiB of memory that a guest with `memory` can be given while it runs.
pub(super) fn hot_range(memory: &GuestMemoryMmap, mib: u32) -> (GuestAddress, u64) {
    let above = (memory.last_addr().raw_value() + 1).max(HOLE_END);
    let length = (u64::from(mib) << 20).next_multiple_of(HOT_UNIT);
    (GuestAddress(above.next_multiple_of(HOT_ALIGNMENT)), length)
}

/// Adds to `memory` a region, of this protection at first: [`HELD`] where the guest is yet to be given parts of it.
pub(super) fn add_region(
    memory: &GuestMemoryMmap,
    (start, length): (GuestAddress, u64),
    protection: ProtFlags,
) -> Result<GuestMemoryMmap, KvmError> {
    let failed = |source| KvmError::Memory {
        mib: (length >> 20) as u32,
        source,
    };
    let mapping = reserve_range(length as usize, protection).map_err(failed)?;
    let region = GuestRegionMmap::new(mapping, start)
        .ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
    let added = memory.insert_region(Arc::new(region));
    added.map_err(|error| failed(io::Error::other(error)))
}

fn reserve_range(size: usize, protection: ProtFlags) -> io::Result<MmapRegion> {
    let with_slack = size.checked_add(HUGE_PAGE).and_then(NonZeroUsize::new);
    let with_slack = with_slack.ok_or(io::ErrorKind::InvalidInput)?;
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
    // SAFETY: a new mapping at a place of the kernel's choosing; it touches nothing that exists.
    let start = unsafe { mmap_anonymous(None, with_slack, protection, flags) }?;
    let offset = start.as_ptr().align_offset(HUGE_PAGE);
    if offset > HUGE_PAGE {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: `offset` is at most the slack, so `size` bytes from there on are inside the mapping.
    let aligned = unsafe { start.add(offset) };
    // SAFETY: the range is ours alone and nobody refers to it yet; the advice changes no content.
    unsafe { madvise(aligned, size, MmapAdvise::MADV_DONTFORK) }?;
    // Huge pages, where the host offers them to those who ask. But what a guest starts from is a few pages in the first two MiB, of
    // which it has little use afterwards. A kernel without huge pages refuses the advice, and does not need it.
    let advice = [
        (size, MmapAdvise::MADV_HUGEPAGE),
        (size.min(HUGE_PAGE), MmapAdvise::MADV_NOHUGEPAGE),
    ];
    for (length, advice) in advice {
        // SAFETY: as above, for the range or its beginning.
        let _ = unsafe { madvise(aligned, length, advice) };
    }
    let (protection, flags) = (protection.bits(), flags.bits() | libc::MAP_ANONYMOUS);
    // SAFETY: `size` bytes from `aligned` on are mapped, and stay so to the end of the process. Where they are not to be used yet, who
    // touches them on behalf of the guest ends the process, and so the guest alone.
    unsafe { MmapRegion::build_raw(aligned.as_ptr().cast(), size, protection, flags) }
        .map_err(io::Error::other)
}

/// Lays `length` bytes of `file` from `offset` on over guest memory at `at`. The guest sees the file's content; what it writes
/// stays its own. All three numbers are multiples of [`PAGE`], except that `length` may end with the file.
pub(super) fn lay_file(
    memory: &GuestMemoryMmap,
    file: &File,
    offset: u64,
    at: GuestAddress,
    length: u64,
) -> io::Result<()> {
    let aligned = offset.is_multiple_of(PAGE) && at.0.is_multiple_of(PAGE);
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    let region = memory
        .find_region(at)
        .filter(|_| aligned)
        .ok_or_else(invalid)?;
    let end =
        at.0.checked_add(length)
            .and_then(|end| end.checked_next_multiple_of(PAGE));
    let region_end = region.start_addr().0 + region.len();
    let Some(length) =
        NonZeroUsize::new(length as usize).filter(|_| end.is_some_and(|end| end <= region_end))
    else {
        return Err(invalid());
    };
    let place = memory.get_host_address(at).map_err(io::Error::other)?;
    let offset = i64::try_from(offset).map_err(|_| invalid())?;
    // SAFETY: the pages that are replaced lie in one region of guest memory, as was just checked, and nothing but raw
    // pointers and the guest refers to those. The region's protection stays the same.
    unsafe {
        mmap(
            NonZeroUsize::new(place as usize),
            length,
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED | MapFlags::MAP_NORESERVE,
            file.as_fd(),
            offset,
        )
    }?;
    Ok(())
}

/// The last address of memory below the device hole, plus one.
pub(super) fn low_end(memory: &GuestMemoryMmap) -> u64 {
    let low = memory.find_region(GuestAddress(0));
    low.map_or(0, |region| region.last_addr().raw_value() + 1)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn memory_up_to_the_hole_is_one_range_and_more_goes_on_above_it() {
        assert_eq!(ranges(64), [(0, 64 << 20)]);
        assert_eq!(ranges(3072), [(0, HOLE)]);
        assert_eq!(ranges(3073), [(0, HOLE), (HOLE_END, 1 << 20)]);
        assert_eq!(ranges(1 << 20), [(0, HOLE), (HOLE_END, (1 << 40) - HOLE)]);
    }

    #[test]
    fn memory_is_aligned_for_huge_pages_and_costs_nothing_untouched() {
        let memory = reserve(5000).unwrap();
        for (start, _) in ranges(5000) {
            let host = memory.get_host_address(GuestAddress(start)).unwrap();
            assert!((host as usize).is_multiple_of(HUGE_PAGE));
        }
        assert_eq!(low_end(&memory), HOLE);
        assert_eq!(memory.read_obj::<u64>(GuestAddress(HOLE_END)).unwrap(), 0);
        assert!(memory.read_obj::<u64>(GuestAddress(HOLE)).is_err());
    }

    #[test]
    fn memory_that_comes_later_is_in_whole_units_above_all_other() {
        let memory = reserve(1000).unwrap();
        let range = hot_range(&memory, 130);
        assert_eq!(range, (GuestAddress(HOLE_END), 256 << 20));
        let all = add_region(&memory, range, HELD).unwrap();
        assert_eq!(low_end(&all), 1000 << 20);
        let held = all.get_host_address(GuestAddress(HOLE_END)).unwrap();
        assert!((held as usize).is_multiple_of(HUGE_PAGE));
        let large = reserve(5000).unwrap();
        assert_eq!(
            hot_range(&large, 1),
            (GuestAddress(HOLE_END + HOT_ALIGNMENT), 128 << 20)
        );
        add_region(&memory, (GuestAddress(4096), 4096), USED).unwrap_err();
    }

    #[test]
    fn a_file_shows_through_and_is_never_written() {
        let memory = reserve(16).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[b'a'; 6000]).unwrap();
        lay_file(&memory, &file, 0, GuestAddress(0x10_0000), 6000).unwrap();
        let byte = |at| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
        assert_eq!(
            (
                byte(0xf_ffff),
                byte(0x10_0000),
                byte(0x10_176f),
                byte(0x10_1770)
            ),
            (0, b'a', b'a', 0)
        );
        memory.write_obj(b'b', GuestAddress(0x10_0000)).unwrap();
        let mut content = Vec::new();
        std::io::Seek::rewind(&mut file).unwrap();
        std::io::Read::read_to_end(&mut file, &mut content).unwrap();
        assert_eq!(content, [b'a'; 6000]);
    }

    #[test]
    fn a_file_that_does_not_fit_or_is_not_aligned_is_refused() {
        let memory = reserve(16).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(32 << 20).unwrap();
        for (offset, at, length) in [
            (0, 0x10_0800, 4096),
            (8, 0x10_0000, 4096),
            (0, 0x10_0000, 0),
            (0, 15 << 20, 2 << 20),
            (0, 0, 17 << 20),
            (0, 16 << 20, 4096),
            (0, u64::MAX - 4095, 4096),
            (0, 0x10_0000, u64::MAX),
            (1 << 63, 0x10_0000, 4096),
        ] {
            lay_file(&memory, &file, offset, GuestAddress(at), length).unwrap_err();
        }
    }
}
