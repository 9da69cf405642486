//! Giving guest memory back to the host: what the guest does not use any more costs nothing until it is touched again.

use std::io;
use std::ptr::NonNull;

use cloison_devices::{HotMemory, Reclaim};
use nix::sys::mman::{MmapAdvise, madvise};
use vm_memory::{Address, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

/// What is behind a guest's memory: private pages of this process, some of them copies of a file's.
pub(super) struct Backing(pub(super) GuestMemoryMmap);

impl Backing {
    fn drop_pages(&self, start: GuestAddress, length: u64) -> io::Result<()> {
        let region = self.0.find_region(start);
        let left = region.map_or(0, |region| region.last_addr().raw_value() - start.0 + 1);
        if length == 0 || length > left {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let place = self.0.get_host_address(start).map_err(io::Error::other)?;
        let place = NonNull::new(place.cast()).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: the range is in one region of guest memory, as was just checked. That stays mapped, and nothing in it is referred to
        // but by raw pointers and volatile accesses, to which the content may change at any time.
        unsafe { madvise(place, length as usize, MmapAdvise::MADV_DONTNEED) }?;
        Ok(())
    }
}

impl Reclaim for Backing {
    fn discard(&mut self, start: GuestAddress, length: u64) -> io::Result<()> {
        self.drop_pages(start, length)
    }
}

impl HotMemory for Backing {
    /// Pages come when they are touched.
    fn plug(&mut self, _start: GuestAddress, _length: u64) -> io::Result<()> {
        Ok(())
    }

    fn unplug(&mut self, start: GuestAddress, length: u64) -> io::Result<()> {
        self.drop_pages(start, length)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::super::memory::reserve;
    use super::*;

    #[test]
    fn discarded_pages_are_empty_and_their_neighbours_untouched() {
        let memory = reserve(16).unwrap();
        let mut backing = Backing(memory.clone());
        for at in [0xf_f000, 0x10_0000, 0x10_1000] {
            memory.write_obj(b'x', GuestAddress(at)).unwrap();
        }
        backing.discard(GuestAddress(0x10_0000), 4096).unwrap();
        let byte = |at| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
        assert_eq!(
            [byte(0xf_f000), byte(0x10_0000), byte(0x10_1000)],
            [b'x', 0, b'x']
        );
        memory.write_obj(b'y', GuestAddress(0x10_0000)).unwrap();
        assert_eq!(byte(0x10_0000), b'y');
    }

    #[test]
    fn what_is_not_guest_memory_is_refused() {
        let mut backing = Backing(reserve(16).unwrap());
        for (start, length) in [
            (0, 0),
            (0, (16 << 20) + 1),
            (15 << 20, 2 << 20),
            (16 << 20, 4096),
            (u64::MAX, 1),
            (0, u64::MAX),
        ] {
            backing.discard(GuestAddress(start), length).unwrap_err();
            backing.unplug(GuestAddress(start), length).unwrap_err();
        }
    }
}
