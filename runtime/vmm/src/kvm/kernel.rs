//! The guest's kernel: an uncompressed ELF executable whose segments are laid over guest memory from the file, so that all VMs on
//! the host share the page cache's copy, but for those that the kernel writes: nearly every page of these would be shared only until
//! it is written, and cost two faults for it. The file is the host's own, but nothing it says is believed unchecked.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr, PT_LOAD};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

use super::layout::{HIGH_MEMORY, IDENTITY_MAPPED, PAGE};
use super::memory::lay_file;

/// Most program headers; a kernel has about five.
const MAX_SEGMENTS: u16 = 64;

/// The identification of a 64-bit little-endian ELF file (System V ABI, "ELF Identification").
const IDENTIFICATION: [u8; 6] = [0x7f, b'E', b'L', b'F', 2, 1];

/// An executable file, for x86-64 (System V ABI, "ELF Header").
const ET_EXEC: u16 = 2;
const EM_X86_64: u16 = 62;
/// A segment that is written (System V ABI, "Program Header").
const PF_W: u32 = 2;

/// Why a file is no kernel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KernelError {
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    #[error(
        "it is not a 64-bit x86 ELF executable (an uncompressed vmlinux is wanted, not a bzImage)"
    )]
    NotElf,
    #[error("its program headers make no sense")]
    Headers,
    #[error("a segment of {size:#x} bytes at {start:#x} does not fit into the guest's memory")]
    Segment { start: u64, size: u64 },
    #[error("its entry point {0:#x} is outside its segments")]
    Entry(u64),
    #[error("a segment cannot be mapped")]
    Map(#[source] io::Error),
    #[error("a segment cannot be written")]
    Write(#[source] vm_memory::GuestMemoryError),
}

/// A kernel in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kernel {
    /// Where the boot CPU begins.
    pub(super) entry: u64,
    /// First address after the kernel and its zeroed data.
    pub(super) end: u64,
}

/// Lays the kernel in `file` over `memory`.
pub(super) fn load(file: &File, memory: &GuestMemoryMmap) -> Result<Kernel, KernelError> {
    let header: Elf64_Ehdr = read(file, 0)?;
    if header.e_ident[..IDENTIFICATION.len()] != IDENTIFICATION
        || header.e_type != ET_EXEC
        || header.e_machine != EM_X86_64
    {
        return Err(KernelError::NotElf);
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() || header.e_phnum > MAX_SEGMENTS {
        return Err(KernelError::Headers);
    }
    let length = file.metadata().map_err(KernelError::Read)?.len();
    let mut kernel = Kernel {
        entry: header.e_entry,
        end: 0,
    };
    let mut has_entry = false;
    for index in 0..u64::from(header.e_phnum) {
        let at = header
            .e_phoff
            .checked_add(index * size_of::<Elf64_Phdr>() as u64);
        let segment: Elf64_Phdr = read(file, at.ok_or(KernelError::Headers)?)?;
        if segment.p_type != PT_LOAD || segment.p_memsz == 0 {
            continue;
        }
        // A page mapped beyond the file's end would be there until it was touched.
        let in_file = segment
            .p_offset
            .checked_add(segment.p_filesz)
            .is_some_and(|end| end <= length);
        if segment.p_filesz > segment.p_memsz || !in_file {
            return Err(KernelError::Headers);
        }
        let end = load_segment(file, memory, &segment)?;
        has_entry |= (segment.p_paddr..end).contains(&header.e_entry);
        kernel.end = kernel.end.max(end);
    }
    if !has_entry {
        return Err(KernelError::Entry(header.e_entry));
    }
    Ok(kernel)
}

/// Lays whole pages over memory, if the kernel does not write them, and copies the rest, so that the zeroes a segment ends in are zeroes
/// and not whatever follows in the file. Answers where the segment ends.
fn load_segment(
    file: &File,
    memory: &GuestMemoryMmap,
    segment: &Elf64_Phdr,
) -> Result<u64, KernelError> {
    let (start, size) = (segment.p_paddr, segment.p_memsz);
    let fits = |end: &u64| start >= HIGH_MEMORY && *end <= IDENTITY_MAPPED;
    let end = start
        .checked_add(size)
        .filter(fits)
        .ok_or(KernelError::Segment { start, size })?;
    if !memory.check_range(GuestAddress(start), size as usize) {
        return Err(KernelError::Segment { start, size });
    }
    let laid = match segment.p_flags & PF_W {
        0 => segment.p_filesz - segment.p_filesz % PAGE,
        _ => 0,
    };
    if laid > 0 {
        lay_file(memory, file, segment.p_offset, GuestAddress(start), laid)
            .map_err(KernelError::Map)?;
    }
    let mut rest = file;
    rest.seek(SeekFrom::Start(segment.p_offset + laid))
        .map_err(KernelError::Read)?;
    let (at, length) = (GuestAddress(start + laid), segment.p_filesz - laid);
    memory
        .read_exact_volatile_from(at, &mut rest, length as usize)
        .map_err(KernelError::Write)?;
    Ok(end)
}

fn read<T: ByteValued + Default>(file: &File, at: u64) -> Result<T, KernelError> {
    let mut value = T::default();
    match file.read_exact_at(value.as_mut_slice(), at) {
        Ok(()) => Ok(value),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(KernelError::NotElf),
        Err(error) => Err(KernelError::Read(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::memory::reserve;
    use super::*;

    const START: u64 = 0x20_0000;

    fn header() -> Elf64_Ehdr {
        let mut header = Elf64_Ehdr {
            e_type: ET_EXEC,
            e_machine: EM_X86_64,
            e_entry: START + 0x10,
            e_phoff: 64,
            e_phentsize: 56,
            e_phnum: 1,
            ..Default::default()
        };
        header.e_ident[..6].copy_from_slice(&IDENTIFICATION);
        header
    }

    fn segment() -> Elf64_Phdr {
        Elf64_Phdr {
            p_type: PT_LOAD,
            p_offset: PAGE,
            p_paddr: START,
            p_filesz: PAGE + 100,
            p_memsz: 4 * PAGE,
            ..Default::default()
        }
    }

    fn try_load(
        header: Elf64_Ehdr,
        segment: Elf64_Phdr,
    ) -> Result<(Kernel, GuestMemoryMmap), KernelError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(header.as_slice()).unwrap();
        file.write_all(segment.as_slice()).unwrap();
        file.write_all(&vec![0x90; 16 * PAGE as usize]).unwrap();
        let memory = reserve(16).unwrap();
        load(&file, &memory).map(|kernel| (kernel, memory))
    }

    #[test]
    fn a_segment_is_the_files_bytes_and_then_zeroes() {
        let (kernel, memory) = try_load(header(), segment()).unwrap();
        assert_eq!(
            kernel,
            Kernel {
                entry: START + 0x10,
                end: START + 4 * PAGE
            }
        );
        let byte = |at| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
        assert_eq!(
            (byte(START - 1), byte(START), byte(START + PAGE + 99)),
            (0, 0x90, 0x90)
        );
        assert_eq!(
            (byte(START + PAGE + 100), byte(START + 4 * PAGE - 1)),
            (0, 0)
        );
    }

    #[test]
    fn what_is_not_an_elf_executable_for_this_machine_is_refused() {
        type Change = fn(&mut Elf64_Ehdr);
        let changes: [Change; 6] = [
            |header| header.e_ident[0] = b'M',
            |header| header.e_ident[4] = 1,
            |header| header.e_ident[5] = 2,
            |header| header.e_type = 3,
            |header| header.e_machine = 183,
            |header| *header = Elf64_Ehdr::default(),
        ];
        for change in changes {
            let mut header = header();
            change(&mut header);
            assert!(matches!(
                try_load(header, segment()),
                Err(KernelError::NotElf)
            ));
        }
        assert!(matches!(
            load(&tempfile::tempfile().unwrap(), &reserve(16).unwrap()),
            Err(KernelError::NotElf)
        ));
    }

    #[test]
    fn headers_that_make_no_sense_are_refused() {
        for (size, count, offset) in [
            (55, 1, 64),
            (0, 1, 64),
            (56, 65, 64),
            (56, u16::MAX, 64),
            (56, 1, u64::MAX),
            (56, 2, u64::MAX - 80),
        ] {
            let header = Elf64_Ehdr {
                e_phentsize: size,
                e_phnum: count,
                e_phoff: offset,
                ..header()
            };
            try_load(header, segment()).unwrap_err();
        }
        for (file_size, offset) in [(5 * PAGE, PAGE), (PAGE, u64::MAX - 100)] {
            let segment = Elf64_Phdr {
                p_filesz: file_size,
                p_offset: offset,
                ..segment()
            };
            assert!(matches!(
                try_load(header(), segment),
                Err(KernelError::Headers)
            ));
        }
    }

    #[test]
    fn segments_outside_memory_or_over_what_the_engine_puts_there_are_refused() {
        for (start, size) in [
            (0, PAGE),
            (0x7000, PAGE),
            (16 << 20, PAGE),
            (START, 15 << 20),
            (START, u64::MAX),
            (u64::MAX, 2),
        ] {
            let segment = Elf64_Phdr {
                p_paddr: start,
                p_memsz: size,
                p_filesz: 0,
                ..segment()
            };
            assert!(
                matches!(
                    try_load(header(), segment),
                    Err(KernelError::Segment { .. })
                ),
                "{start:#x}"
            );
        }
    }

    #[test]
    fn an_unaligned_segment_and_a_file_cut_short_are_refused() {
        let unaligned = Elf64_Phdr {
            p_offset: PAGE + 8,
            ..segment()
        };
        assert!(matches!(
            try_load(header(), unaligned),
            Err(KernelError::Map(_))
        ));
        let cut = Elf64_Phdr {
            p_offset: 100 * PAGE,
            p_filesz: 100,
            ..segment()
        };
        assert!(matches!(try_load(header(), cut), Err(KernelError::Headers)));
    }

    #[test]
    fn an_entry_point_outside_the_segments_is_refused() {
        for entry in [0, START - 1, START + 4 * PAGE, u64::MAX] {
            let header = Elf64_Ehdr {
                e_entry: entry,
                ..header()
            };
            assert!(matches!(
                try_load(header, segment()),
                Err(KernelError::Entry(_))
            ));
        }
    }
}
