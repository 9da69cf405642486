//! Windows: files of the host's, mapped read-only and shared into the guest's address space above all memory. The guest reads the
//! host's page cache, and its writes go nowhere.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use vm_memory::GuestAddress;

use super::error::{KvmError, kvm};
use super::layout::{PAGE, SLOT_COUNT};

/// The unit in which Linux maps persistent memory, bytes.
const UNIT: u64 = 2 << 20;
/// KVM's number for the first window's memory; those below are the guest's own memory.
const FIRST_REGION: u32 = 8;

/// The windows of a VM, by the slots of the devices that announce them.
pub(super) struct Windows {
    vm: Arc<VmFd>,
    /// Where they begin, and where the guest's physical addresses end.
    start: u64,
    end: u64,
    open: BTreeMap<usize, Window>,
}

struct Window {
    start: u64,
    mapping: Mapping,
}

/// Part of our address space; unmapped when dropped.
struct Mapping {
    place: NonNull<libc::c_void>,
    length: NonZeroUsize,
}

// SAFETY: the mapping is referred to by its address alone, which means the same in every thread.
unsafe impl Send for Mapping {}

impl Windows {
    /// Room for windows from `start` on, in a guest whose physical addresses have `bits` bits.
    pub(super) fn new(vm: Arc<VmFd>, start: u64, bits: u8) -> Self {
        Self {
            vm,
            start: start.next_multiple_of(UNIT),
            end: 1_u64.checked_shl(bits.into()).unwrap_or(u64::MAX),
            open: BTreeMap::new(),
        }
    }

    /// Maps a file that is to be announced by the device in `slot`. Answers its address and length; the file's end is
    /// followed by zeros up to a multiple of 2 MiB.
    ///
    /// # Errors
    /// When the file is empty or cannot be mapped, or there is no room for it.
    pub(super) fn open(
        &mut self,
        slot: usize,
        file: &File,
    ) -> Result<(GuestAddress, u64), KvmError> {
        let failed = |source| KvmError::System {
            what: "map the file for the guest",
            source,
        };
        let mapping = map(file).map_err(failed)?;
        let length = mapping.length.get() as u64;
        let start = self
            .find(length)
            .ok_or_else(|| failed(io::ErrorKind::StorageFull.into()))?;
        self.tell(slot, start, length, &mapping)?;
        self.open.insert(slot, Window { start, mapping });
        Ok((GuestAddress(start), length))
    }

    /// Takes the window of the device in `slot` away, if it has one.
    ///
    /// # Errors
    /// When KVM cannot. The window then stays.
    pub(super) fn close(&mut self, slot: usize) -> Result<(), KvmError> {
        let Some(window) = self.open.get(&slot) else {
            return Ok(());
        };
        self.tell(slot, window.start, 0, &window.mapping)?;
        self.open.remove(&slot);
        Ok(())
    }

    /// The first place for `length` bytes.
    fn find(&self, length: u64) -> Option<u64> {
        let mut taken: Vec<(u64, u64)> = self
            .open
            .values()
            .map(|window| {
                (
                    window.start,
                    window.start + window.mapping.length.get() as u64,
                )
            })
            .collect();
        taken.sort_unstable();
        let mut start = self.start;
        for (from, to) in taken {
            if start.checked_add(length)? <= from {
                break;
            }
            start = to;
        }
        (start.checked_add(length)? <= self.end).then_some(start)
    }

    /// Gives KVM the window of the device in `slot`; without a length, takes it away.
    fn tell(
        &self,
        slot: usize,
        start: u64,
        length: u64,
        mapping: &Mapping,
    ) -> Result<(), KvmError> {
        debug_assert!(slot < SLOT_COUNT);
        let region = kvm_userspace_memory_region {
            slot: FIRST_REGION + slot as u32,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: start,
            memory_size: length,
            userspace_addr: mapping.place.as_ptr() as u64,
        };
        // SAFETY: `mapping` is that long, and unmapped only after KVM has been told to forget it, or after the VM's end.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(kvm("show the guest a file"))
    }
}

/// Maps `file`, which must not be empty, and zeros behind it up to a whole unit.
fn map(file: &File) -> io::Result<Mapping> {
    let size = file.metadata()?.len();
    let whole = size.checked_next_multiple_of(UNIT);
    let length = whole.and_then(|whole| NonZeroUsize::new(usize::try_from(whole).ok()?));
    let pages = NonZeroUsize::new(size.next_multiple_of(PAGE) as usize);
    let (Some(length), Some(pages)) = (length, pages) else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is empty, or too large",
        ));
    };
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
    // SAFETY: a new mapping at a place of the kernel's choosing; it touches nothing that exists.
    let place = unsafe { mmap_anonymous(None, length, ProtFlags::PROT_READ, flags) }?;
    let mapping = Mapping { place, length };
    // SAFETY: `pages` is at most `length`, and nobody refers to those pages yet.
    unsafe {
        mmap(
            NonZeroUsize::new(place.as_ptr() as usize),
            pages,
            ProtFlags::PROT_READ,
            MapFlags::MAP_SHARED | MapFlags::MAP_FIXED,
            file.as_fd(),
            0,
        )
    }?;
    Ok(mapping)
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's alone, and KVM has forgotten it.
        if let Err(errno) = unsafe { munmap(self.place, self.length.get()) } {
            tracing::error!("cannot unmap a file that the guest has seen: {errno}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use kvm_ioctls::Kvm;

    use super::*;

    /// `None` where there is no KVM.
    fn windows(bits: u8) -> Option<Windows> {
        let vm = Kvm::new().ok()?.create_vm().ok()?;
        Some(Windows::new(Arc::new(vm), 1 << 32, bits))
    }

    fn file(size: u64) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"first").unwrap();
        file.set_len(size).unwrap();
        file
    }

    #[test]
    fn windows_lie_beside_each_other_and_room_is_used_again() {
        let Some(mut windows) = windows(40) else {
            return;
        };
        let at = |n: u64| GuestAddress((1 << 32) + n * UNIT);
        assert_eq!(windows.open(5, &file(3 << 20)).unwrap(), (at(0), 2 * UNIT));
        assert_eq!(windows.open(6, &file(1)).unwrap(), (at(2), UNIT));
        windows.close(5).unwrap();
        assert_eq!(windows.open(7, &file(UNIT)).unwrap(), (at(0), UNIT));
        assert_eq!(windows.open(8, &file(2 * UNIT)).unwrap(), (at(3), 2 * UNIT));
        windows.close(5).unwrap();
    }

    #[test]
    fn a_file_is_followed_by_zeros() {
        let mapping = map(&file(4097)).unwrap();
        assert_eq!(mapping.length.get() as u64, UNIT);
        // SAFETY: the mapping is as long as it says, and lives.
        let bytes = unsafe {
            std::slice::from_raw_parts(mapping.place.as_ptr().cast::<u8>(), UNIT as usize)
        };
        assert_eq!(&bytes[..5], b"first");
        assert!(bytes[5..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn what_cannot_be_shown_is_refused() {
        let Some(mut windows) = windows(33) else {
            return;
        };
        assert!(windows.open(5, &file(0)).is_err());
        assert!(
            windows.open(5, &file(5 << 30)).is_err(),
            "beyond the guest's addresses"
        );
        let directory = File::open("/").unwrap();
        assert!(windows.open(5, &directory).is_err());
        assert!(windows.open(5, &file(1)).is_ok());
    }
}
