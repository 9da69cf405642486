//! A template's file: the state of a VM, and its memory as it is laid out in the guest, so that other guests can have it mapped
//! copy-on-write. Pages of zeroes are holes.
//!
//! ```text
//! "cloison\2"  bytes of state  CRC-32 of state  state as JSON  …  at 1 MiB: memory, from the guest's address 0 on
//! ```
//!
//! Numbers have 64 bits and are little-endian. That the file is not cut is checked, and that the state is whole. The memory is not: who reads it
//! all to check it might as well copy it. It is root's own, as the guest's kernel is.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

use super::layout::PAGE;
use super::memory::{lay_file, ranges};
use super::state::VmState;

/// The last byte is the layout's version.
const MAGIC: [u8; 8] = *b"cloison\x02";

/// Bytes before the state.
const HEADER: usize = 24;

/// Where the memory begins.
const MEMORY: u64 = 1 << 20;

/// Pages that are looked at together.
const BATCH: u64 = 512;

/// So many pages of zeroes between others are mapped with them: more mappings cost more than pages that are never touched.
const GAP: u64 = 16;

/// An entry of the page map, and its bits for a page that is in memory or swapped out (Linux, Documentation/admin-guide/mm/pagemap.rst).
const ENTRY: u64 = 8;
const HELD: u64 = 1 << 63 | 1 << 62;

/// What the file has beside the memory.
#[derive(Serialize, Deserialize)]
struct Head<T> {
    vm: T,
    /// Start and length of what is not all zeroes, bytes.
    runs: Vec<(u64, u64)>,
}

/// A template.
pub(super) struct Image<T = VmState> {
    file: File,
    head: Head<T>,
}

impl<T: DeserializeOwned> Image<T> {
    /// Takes the file of a template of VMs with `mib` MiB of memory.
    ///
    /// # Errors
    /// When it is not whole, or none.
    pub(super) fn read(file: File, mib: u32) -> io::Result<Self> {
        if file.metadata()?.len() != MEMORY + end_of(mib) {
            return Err(damaged("it is cut, or another guest's"));
        }
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0)?;
        let [magic, length, sum] = words(&header);
        if magic != u64::from_le_bytes(MAGIC) || length > MEMORY - HEADER as u64 {
            return Err(damaged("it does not begin as templates do"));
        }
        let mut head = vec![0; length as usize];
        file.read_exact_at(&mut head, HEADER as u64)?;
        if u64::from(crc32fast::hash(&head)) != sum {
            return Err(damaged("the checksum of its state is wrong"));
        }
        let head = serde_json::from_slice(&head)?;
        Ok(Self { file, head })
    }

    pub(super) fn vm(&self) -> &T {
        &self.head.vm
    }

    pub(super) fn into_vm(self) -> T {
        self.head.vm
    }

    /// Lays the memory over that of a guest.
    pub(super) fn lay(&self, memory: &GuestMemoryMmap) -> io::Result<()> {
        let mut runs = self.head.runs.iter();
        runs.try_for_each(|&(start, length)| {
            let offset = MEMORY.checked_add(start);
            let offset = offset.ok_or_else(|| damaged("a page is outside memory"))?;
            lay_file(memory, &self.file, offset, GuestAddress(start), length)
        })
    }
}

/// Writes a template of a guest with `mib` MiB of memory that does not run any more. Up to `laid`, files have been laid over its memory.
pub(super) fn write(
    file: &File,
    vm: &impl Serialize,
    memory: &GuestMemoryMmap,
    mib: u32,
    laid: u64,
) -> io::Result<()> {
    let page_map = File::open("/proc/self/pagemap")?;
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for (start, size) in ranges(mib) {
        let host = memory
            .get_host_address(GuestAddress(start))
            .map_err(io::Error::other)? as u64;
        let mut at = start;
        while at < start + size {
            let pages = BATCH.min((start + size - at) / PAGE);
            let place = (host + (at - start)) / PAGE * ENTRY;
            for (page, held) in (0..).zip(held(&page_map, place, pages)?) {
                let page = at + page * PAGE;
                // Of a page of a file the page map says nothing before it has been touched.
                if held || page < laid {
                    keep(file, memory, page, &mut runs)?;
                }
            }
            at += pages * PAGE;
        }
    }
    file.set_len(MEMORY + end_of(mib))?;
    let head = serde_json::to_vec(&Head { vm, runs })?;
    if head.len() as u64 > MEMORY - HEADER as u64 {
        return Err(io::Error::other("the guest's memory is in too many pieces"));
    }
    file.write_all_at(&head, HEADER as u64)?;
    let sum = u64::from(crc32fast::hash(&head));
    let words = [u64::from_le_bytes(MAGIC), head.len() as u64, sum];
    file.write_all_at(&words.map(u64::to_le_bytes).concat(), 0)
}

/// Writes the page at `at`, unless it is all zeroes, and has it be part of a run.
fn keep(
    file: &File,
    memory: &GuestMemoryMmap,
    at: u64,
    runs: &mut Vec<(u64, u64)>,
) -> io::Result<()> {
    let mut page = [0; PAGE as usize];
    memory
        .read_slice(&mut page, GuestAddress(at))
        .map_err(io::Error::other)?;
    if page == [0; PAGE as usize] {
        return Ok(());
    }
    file.write_all_at(&page, MEMORY + at)?;
    match runs.last_mut() {
        Some((start, length)) if at - (*start + *length) <= GAP * PAGE => {
            *length = at + PAGE - *start;
        }
        _ => runs.push((at, PAGE)),
    }
    Ok(())
}

/// Whether each of the pages is held for this process, from where the page map has the first.
fn held(page_map: &File, place: u64, pages: u64) -> io::Result<Vec<bool>> {
    let mut bytes = vec![0; (pages * ENTRY) as usize];
    page_map.read_exact_at(&mut bytes, place)?;
    let (entries, _) = bytes.as_chunks::<{ ENTRY as usize }>();
    let held = |entry: &[u8; 8]| u64::from_le_bytes(*entry) & HELD != 0;
    Ok(entries.iter().map(held).collect())
}

/// The end of the memory of a guest with `mib` MiB.
fn end_of(mib: u32) -> u64 {
    ranges(mib).last().map_or(0, |(start, size)| start + size)
}

fn words(header: &[u8; HEADER]) -> [u64; 3] {
    let (words, _) = header.as_chunks::<8>();
    [0, 1, 2].map(|word| u64::from_le_bytes(words[word]))
}

fn damaged(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::super::memory::reserve;
    use super::*;

    const MIB: u32 = 16;
    /// Above which no file is laid.
    const LAID: u64 = 2 << 20;

    /// The file of a guest with something here and there, and its memory.
    fn template() -> (File, GuestMemoryMmap) {
        let memory = reserve(MIB).unwrap();
        let kernel = tempfile::tempfile().unwrap();
        kernel.set_len(PAGE).unwrap();
        kernel.write_all_at(b"kernel", 100).unwrap();
        lay_file(&memory, &kernel, 0, GuestAddress(1 << 20), PAGE).unwrap();
        for at in [0, 5 * PAGE, 8 << 20, (16 << 20) - 1] {
            memory.write_obj(b'x', GuestAddress(at)).unwrap();
        }
        memory.write_obj(0_u8, GuestAddress(12 << 20)).unwrap();
        let file = tempfile::tempfile().unwrap();
        write(&file, &"state", &memory, MIB, LAID).unwrap();
        (file, memory)
    }

    fn read(file: &File, mib: u32) -> io::Result<Image<String>> {
        Image::read(file.try_clone().unwrap(), mib)
    }

    #[test]
    fn another_guest_gets_the_same_memory_and_has_it_for_itself() {
        let (file, memory) = template();
        let image = read(&file, MIB).unwrap();
        assert_eq!(image.vm(), "state");
        let runs = [
            (0, 6 * PAGE),
            (1 << 20, PAGE),
            (8 << 20, PAGE),
            ((16 << 20) - PAGE, PAGE),
        ];
        assert_eq!(image.head.runs, runs);
        let guests = [reserve(MIB).unwrap(), reserve(MIB).unwrap()];
        let contents = |memory: &GuestMemoryMmap| {
            let mut bytes = vec![0; (MIB as usize) << 20];
            memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
            bytes
        };
        for guest in &guests {
            image.lay(guest).unwrap();
            assert!(contents(guest) == contents(&memory));
            guest.write_obj(b'y', GuestAddress(8 << 20)).unwrap();
        }
    }

    #[test]
    fn a_file_that_is_cut_or_of_another_guest_is_refused() {
        let (file, _) = template();
        assert!(read(&file, MIB + 1).is_err());
        let whole = file.metadata().unwrap().len();
        for length in [whole - 1, MEMORY, 100, HEADER as u64, 10, 0] {
            file.set_len(length).unwrap();
            assert!(read(&file, MIB).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn a_state_that_was_changed_anywhere_is_refused() {
        let (file, _) = template();
        let mut length = [0; 8];
        file.read_exact_at(&mut length, 8).unwrap();
        let end = HEADER as u64 + u64::from_le_bytes(length);
        for at in 0..end {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x80], at).unwrap();
            assert!(read(&file, MIB).is_err(), "byte {at}");
            file.write_all_at(&byte, at).unwrap();
        }
        read(&file, MIB).unwrap();
    }

    #[test]
    fn runs_outside_memory_are_refused() {
        let (file, _) = template();
        for run in [
            (0, u64::MAX),
            (u64::MAX, PAGE),
            (u64::MAX - PAGE + 1, PAGE),
            (16 << 20, PAGE),
            (15 << 20, 2 << 20),
            (1, PAGE),
            (PAGE, 0),
        ] {
            let mut image = read(&file, MIB).unwrap();
            image.head.runs = vec![run];
            assert!(image.lay(&reserve(MIB).unwrap()).is_err(), "{run:?}");
        }
    }
}
