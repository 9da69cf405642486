//! How the guest gets at its first program. Where the initial ramfs is laid out for it, the guest's kernel finds it as a file system in
//! persistent memory, mapped from the host's file and executed where it is: no page of it is copied, and all guests share them. Any other
//! initial ramfs is laid into the guest's memory for the kernel to unpack.

use std::fs::File;
use std::io;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::error::KvmError;
use super::kernel::Kernel;
use super::layout::{PAGE, ROOT, ROOT_SIZE};
use super::memory::{USED, add_region, lay_file, low_end};
use super::{cpio, erofs};

/// What persistent memory is a multiple of, bytes.
const UNIT: u64 = 2 << 20;

/// Where the initial ramfs is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Initramfs {
    pub(super) start: u64,
    pub(super) size: u64,
}

/// The guest's root.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Root {
    /// A file system at [`ROOT`], in so many bytes of persistent memory.
    Mapped(u64),
    /// For the guest's kernel to unpack.
    Unpacked(Initramfs),
}

impl Root {
    /// Makes the initial ramfs in `file` the guest's root, in memory of its own if it can be mapped, or else at the top of the memory
    /// below the device hole.
    pub(super) fn lay(
        file: &File,
        memory: &mut GuestMemoryMmap,
        kernel: &Kernel,
        mib: u32,
    ) -> io::Result<Result<Self, KvmError>> {
        match Self::map(file, memory)? {
            Some(root) => Ok(root),
            None => unpack(file, file.metadata()?.len(), memory, kernel, mib),
        }
    }

    /// Makes the initial ramfs in `file` the guest's root, in memory of its own; `None` if it cannot be mapped.
    pub(super) fn map(
        file: &File,
        memory: &mut GuestMemoryMmap,
    ) -> io::Result<Option<Result<Self, KvmError>>> {
        let size = file.metadata()?.len();
        let metadata = cpio::entries(file)?.and_then(|entries| erofs::metadata(&entries, size));
        let length = (PAGE + size).next_multiple_of(UNIT);
        let metadata = metadata.filter(|_| length <= ROOT_SIZE);
        let map = |metadata: Vec<u8>| map(file, size, &metadata, memory, length);
        metadata.map(map).transpose()
    }

    /// Start and length of the persistent memory it is in, if it is.
    pub(super) fn mapped(&self) -> Option<(GuestAddress, u64)> {
        match self {
            Self::Mapped(length) => Some((GuestAddress(ROOT), *length)),
            Self::Unpacked(_) => None,
        }
    }

    /// What the kernel is to unpack; nothing is empty.
    pub(super) fn initramfs(&self) -> Initramfs {
        match self {
            Self::Mapped(_) => Initramfs { start: 0, size: 0 },
            Self::Unpacked(initramfs) => *initramfs,
        }
    }

    /// What the kernel is told of it. An initial ramfs stays where it is when it has been unpacked: a page that is written is a page that
    /// this VM no longer shares.
    pub(super) fn words(&self) -> &'static str {
        match self {
            Self::Mapped(_) => "root=/dev/pmem0 rootfstype=erofs rootflags=dax ro init=/init",
            Self::Unpacked(_) => "retain_initrd",
        }
    }
}

/// One page of metadata, and the archive behind it.
fn map(
    file: &File,
    size: u64,
    metadata: &[u8],
    memory: &mut GuestMemoryMmap,
    length: u64,
) -> io::Result<Result<Root, KvmError>> {
    *memory = match add_region(memory, (GuestAddress(ROOT), length), USED) {
        Ok(memory) => memory,
        Err(error) => return Ok(Err(error)),
    };
    lay_file(memory, file, 0, GuestAddress(ROOT + PAGE), size)?;
    let written = memory.write_slice(metadata, GuestAddress(ROOT));
    Ok(written
        .map(|()| Root::Mapped(length))
        .map_err(|source| KvmError::Write {
            what: "root file system's metadata",
            source,
        }))
}

fn unpack(
    file: &File,
    size: u64,
    memory: &GuestMemoryMmap,
    kernel: &Kernel,
    mib: u32,
) -> io::Result<Result<Root, KvmError>> {
    let too_small = KvmError::TooSmall {
        mib,
        needed: size.div_ceil(1 << 20),
    };
    let room = low_end(memory).checked_sub(size.next_multiple_of(PAGE));
    let Some(start) = room.filter(|&start| start >= kernel.end && size > 0) else {
        return Ok(Err(too_small));
    };
    lay_file(memory, file, 0, GuestAddress(start), size)?;
    Ok(Ok(Root::Unpacked(Initramfs { start, size })))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::cpio::tests::archive;
    use super::super::memory::reserve;
    use super::*;

    const KERNEL: Kernel = Kernel {
        entry: 0x100_0000,
        end: 0x300_0000,
    };

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file
    }

    #[test]
    fn an_archive_with_aligned_contents_is_mapped_behind_its_metadata() {
        let mut name = b"init".to_vec();
        name.resize(PAGE as usize - 110, 0);
        let bytes = archive(&[(&name, 0o100_755, b"hello")]);
        let mut memory = reserve(64).unwrap();
        let root = Root::lay(&file(&bytes), &mut memory, &KERNEL, 64).unwrap();
        assert_eq!(root.unwrap(), Root::Mapped(UNIT));
        let mut found = [0; 5];
        let content = GuestAddress(ROOT + 2 * PAGE);
        memory.read_slice(&mut found, content).unwrap();
        assert_eq!(&found, b"hello");
        let magic: u32 = memory.read_obj(GuestAddress(ROOT + 1024)).unwrap();
        assert_eq!(magic, 0xe0f5_e1e2);
        assert_eq!(
            memory
                .read_obj::<u8>(GuestAddress(ROOT + UNIT - 1))
                .unwrap(),
            0
        );
        assert_eq!(low_end(&memory), 64 << 20);
    }

    #[test]
    fn anything_else_ends_with_memory_and_must_fit_above_the_kernel() {
        let file = file(&[b'i'; 5000]);
        let mut memory = reserve(64).unwrap();
        let mut lay = || Root::lay(&file, &mut memory, &KERNEL, 64).unwrap();
        let root = lay().unwrap();
        let start = (64 << 20) - 2 * PAGE;
        assert_eq!(root, Root::Unpacked(Initramfs { start, size: 5000 }));
        assert_eq!(root.initramfs(), Initramfs { start, size: 5000 });
        file.set_len(17 << 20).unwrap();
        let error = lay().unwrap_err();
        assert!(error.to_string().contains("17 MiB initramfs"), "{error}");
        file.set_len(65 << 20).unwrap();
        lay().unwrap_err();
        file.set_len(0).unwrap();
        lay().unwrap_err();
    }
}
