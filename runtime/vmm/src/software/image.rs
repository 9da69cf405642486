//! A template's file: the guest's memory without the pages that are all zeroes, and the state of QEMU's devices. It is written and read
//! from its beginning to its end; a file that was cut or changed is found out by its length or its checksum.
//!
//! ```text
//! "cloison\1"  bytes of memory  bytes of state  state
//! {first page  pages  their bytes}  …  0  0  CRC-32 of all before
//! ```
//!
//! Numbers have 64 bits and are little-endian, the checksum too.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;

use crc32fast::Hasher;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};

/// The last byte is the layout's version.
const MAGIC: [u8; 8] = *b"cloison\x01";

const PAGE: usize = 4 << 10;
const ZEROES: [u8; PAGE] = [0; PAGE];

/// The most pages that follow each other in the file.
const MAX_RUN: usize = 256;

/// The most state QEMU's devices may have, bytes; a microvm's have some 150 KiB.
const MAX_STATE: u64 = 16 << 20;

/// Writes what `memory` and `state` hold. Memory is a file of whole pages.
pub(super) fn write(memory: &File, state: &[u8], to: impl Write) -> io::Result<()> {
    let mut to = Summed::new(to);
    let size = memory.metadata()?.len();
    to.write_all(&MAGIC)?;
    to.number(size)?;
    to.number(state.len() as u64)?;
    to.write_all(state)?;
    let mut buffer = vec![0; MAX_RUN * PAGE];
    let mut at = 0;
    // Holes need not be looked at.
    while let Some(data) = seek(memory, at, Whence::SeekData)? {
        at = data;
        let end = seek(memory, at, Whence::SeekHole)?.unwrap_or(size);
        while at < end {
            let length = buffer.len().min((end - at) as usize);
            let piece = &mut buffer[..length];
            memory.read_exact_at(piece, at)?;
            let mut page = at / PAGE as u64;
            let pages: Vec<&[u8]> = piece.chunks(PAGE).collect();
            for run in pages.chunk_by(|one, next| (*one == ZEROES) == (*next == ZEROES)) {
                if run.first().is_some_and(|first| *first != ZEROES) {
                    to.number(page)?;
                    to.number(run.len() as u64)?;
                    run.iter().try_for_each(|page| to.write_all(page))?;
                }
                page += run.len() as u64;
            }
            at += length as u64;
        }
    }
    to.number(0)?;
    to.number(0)?;
    let sum = u64::from(to.sum.finalize());
    to.inner.write_all(&sum.to_le_bytes())?;
    to.inner.flush()
}

/// Fills `memory`, all zeroes so far and as large as the one that was written, and returns the state.
///
/// # Errors
/// When the file is not whole, or of another guest's memory; what `memory` holds is of no use then.
pub(super) fn read(from: impl Read, memory: &File) -> io::Result<Vec<u8>> {
    let mut from = Summed::new(from);
    let size = memory.metadata()?.len();
    let mut magic = [0; MAGIC.len()];
    from.read_exact(&mut magic)?;
    if magic != MAGIC || from.take_number()? != size {
        return Err(damaged("it is another guest's"));
    }
    let length = from.take_number()?;
    if length > MAX_STATE {
        return Err(damaged("its state is too long"));
    }
    let mut state = vec![0; length as usize];
    from.read_exact(&mut state)?;
    let mut buffer = vec![0; MAX_RUN * PAGE];
    loop {
        let (first, pages) = (from.take_number()?, from.take_number()?);
        if pages == 0 {
            break;
        }
        let at = first.checked_mul(PAGE as u64);
        let run = usize::try_from(pages)
            .ok()
            .filter(|&pages| pages <= MAX_RUN);
        let (Some(at), Some(run)) = (at, run) else {
            return Err(damaged("a run of pages is too long"));
        };
        let run = &mut buffer[..run * PAGE];
        if at
            .checked_add(run.len() as u64)
            .is_none_or(|end| end > size)
        {
            return Err(damaged("a page is outside memory"));
        }
        from.read_exact(run)?;
        memory.write_all_at(run, at)?;
    }
    let sum = u64::from(from.sum.clone().finalize());
    if from.take_number()? != sum {
        return Err(damaged("its checksum is wrong"));
    }
    Ok(state)
}

fn damaged(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// Where the next data, or the next hole, begins; nothing beyond the last.
fn seek(file: &File, from: u64, whence: Whence) -> io::Result<Option<u64>> {
    let from = i64::try_from(from).map_err(io::Error::other)?;
    match lseek64(file, from, whence) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Takes the checksum of what passes.
struct Summed<T> {
    inner: T,
    sum: Hasher,
}

impl<T> Summed<T> {
    fn new(inner: T) -> Self {
        let sum = Hasher::new();
        Self { inner, sum }
    }
}

impl<T: Write> Summed<T> {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sum.update(bytes);
        self.inner.write_all(bytes)
    }

    fn number(&mut self, number: u64) -> io::Result<()> {
        self.write_all(&number.to_le_bytes())
    }
}

impl<T: Read> Summed<T> {
    fn read_exact(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        self.inner.read_exact(bytes)?;
        self.sum.update(bytes);
        Ok(())
    }

    fn take_number(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.read_exact(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 3 << 20;

    fn memory() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE).unwrap();
        file
    }

    /// Pages here and there, one of zeroes among them, and a run longer than fits at once.
    fn template() -> (Vec<u8>, Vec<u8>) {
        let memory = memory();
        for (page, byte) in [(0, 1), (2, 2), (3, 0), (4, 3), (767, 4)] {
            memory
                .write_all_at(&[byte; PAGE], page * PAGE as u64)
                .unwrap();
        }
        let long = vec![5; (MAX_RUN + 7) * PAGE];
        memory.write_all_at(&long, 100 * PAGE as u64).unwrap();
        let mut file = Vec::new();
        write(&memory, b"devices", &mut file).unwrap();
        (file, contents(&memory))
    }

    fn contents(memory: &File) -> Vec<u8> {
        let mut bytes = vec![0; SIZE as usize];
        memory.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn what_was_written_is_read() {
        let (file, before) = template();
        let after = memory();
        assert_eq!(read(&file[..], &after).unwrap(), b"devices");
        assert!(contents(&after) == before);
        assert!(file.len() < (MAX_RUN + 7 + 5) * PAGE);
    }

    #[test]
    fn memory_of_another_size_is_refused() {
        let (file, _) = template();
        let other = memory();
        other.set_len(2 * SIZE).unwrap();
        assert!(read(&file[..], &other).is_err());
    }

    #[test]
    fn a_file_that_was_cut_anywhere_is_refused() {
        let (file, _) = template();
        for length in (0..200).chain((200..file.len()).step_by(4001)) {
            assert!(read(&file[..length], &memory()).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn a_file_that_was_changed_anywhere_is_refused() {
        let (file, _) = template();
        for at in (0..200).chain((200..file.len()).step_by(4001)) {
            let mut file = file.clone();
            file[at] ^= 0x80;
            assert!(read(&file[..], &memory()).is_err(), "byte {at}");
        }
    }

    #[test]
    fn lengths_and_pages_that_cannot_be_are_refused_before_they_are_used() {
        let file = |state: u64, runs: &[u64]| {
            let mut file = MAGIC.to_vec();
            let numbers = [SIZE, state].into_iter().chain(runs.iter().copied());
            numbers.for_each(|number| file.extend(number.to_le_bytes()));
            file.resize(file.len() + 2 * MAX_RUN * PAGE, 1);
            file
        };
        for file in [
            file(MAX_STATE + 1, &[]),
            file(u64::MAX, &[]),
            file(0, &[0, MAX_RUN as u64 + 1]),
            file(0, &[0, u64::MAX]),
            file(0, &[SIZE / PAGE as u64, 1]),
            file(0, &[u64::MAX / PAGE as u64, 1]),
            file(0, &[u64::MAX, 1]),
        ] {
            let error = read(&file[..], &memory()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
        }
    }
}
