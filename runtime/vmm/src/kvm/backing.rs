//! Giving guest memory back to the host: what the guest does not use any more costs nothing until it is touched again. Memory that it
//! can be given while it runs it cannot touch before: there may be room for much more than it is to have.

use std::io;
use std::ptr::NonNull;

use cloison_devices::{HotMemory, Reclaim};
use nix::libc::c_void;
use nix::sys::mman::{MmapAdvise, ProtFlags, madvise, mprotect};
use vm_memory::{Address, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use super::memory::{HELD, USED};

/// What is behind a guest's memory: private pages of this process, some of them copies of a file's.
pub(super) struct Backing(pub(super) GuestMemoryMmap);

impl Backing {
    fn place(&self, start: GuestAddress, length: u64) -> io::Result<NonNull<c_void>> {
        let region = self.0.find_region(start);
        let left = region.map_or(0, |region| region.last_addr().raw_value() - start.0 + 1);
        if length == 0 || length > left {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let place = self.0.get_host_address(start).map_err(io::Error::other)?;
        NonNull::new(place.cast()).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    fn drop_pages(&self, start: GuestAddress, length: u64) -> io::Result<()> {
        let place = self.place(start, length)?;
        // SAFETY: the range is in one region of guest memory, as was just checked. That stays mapped, and nothing in it is referred to
        // but by raw pointers and volatile accesses, to which the content may change at any time.
        unsafe { madvise(place, length as usize, MmapAdvise::MADV_DONTNEED) }?;
        Ok(())
    }

    /// Gives all of it back, of a guest that has ended.
    pub(super) fn give_back(&self) -> io::Result<()> {
        let mut regions = self.0.iter();
        regions.try_for_each(|region| self.drop_pages(region.start_addr(), region.len()))
    }

    fn protect(&self, start: GuestAddress, length: u64, protection: ProtFlags) -> io::Result<()> {
        let place = self.place(start, length)?;
        // SAFETY: as above. Only a guest that uses memory which it has not plugged, and whose devices do, meets memory that is not for
        // use, and ends with its process.
        unsafe { mprotect(place, length as usize, protection) }?;
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
    fn plug(&mut self, start: GuestAddress, length: u64) -> io::Result<()> {
        self.protect(start, length, USED)
    }

    fn unplug(&mut self, start: GuestAddress, length: u64) -> io::Result<()> {
        self.protect(start, length, HELD)?;
        self.drop_pages(start, length)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::super::memory::{add_region, hot_range, reserve};
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
    fn memory_is_for_use_from_when_it_is_plugged_until_it_is_unplugged() {
        const BLOCK: u64 = 2 << 20;
        let memory = reserve(16).unwrap();
        let range = hot_range(&memory, 128);
        let start = range.0;
        let memory = add_region(&memory, range, HELD).unwrap();
        let mut backing = Backing(memory.clone());
        // A system call finds out without a signal.
        let usable = |at: GuestAddress| {
            let place = memory.get_host_address(at).unwrap().cast::<c_void>();
            // SAFETY: the kernel writes one byte of guest memory, or says that it cannot.
            unsafe { nix::libc::getrandom(place, 1, 0) == 1 }
        };
        let second = GuestAddress(start.0 + BLOCK);
        assert!(!usable(start) && !usable(second));
        backing.plug(start, BLOCK).unwrap();
        assert!(usable(start) && !usable(second));
        memory.write_obj(b'x', start).unwrap();
        backing.unplug(start, BLOCK).unwrap();
        assert!(!usable(start));
        backing.plug(start, 2 * BLOCK).unwrap();
        assert_eq!(memory.read_obj::<u8>(start).unwrap(), 0);
        backing.plug(start, 129 << 20).unwrap_err();
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
