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
pub(super) struct Image {
    file: File,
    head: Head<VmState>,
}

impl Image {
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

    pub(super) fn vm(&self) -> &VmState {
        &self.head.vm
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
    vm: &VmState,
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
    let words = [
        u64::from_le_bytes(MAGIC),
        head.len() as u64,
        sum,
    ];
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
