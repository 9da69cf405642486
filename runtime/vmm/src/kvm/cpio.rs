//! The table of contents of an initial ramfs: a cpio archive of the format "newc" (Documentation/driver-api/early-userspace/
//! buffer-format.rst in Linux), not compressed. Headers are read, contents are not. The file is the host's own, but nothing it
//! says is believed unchecked; what is not understood is left to the guest's kernel.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// "newc", without checksums.
const MAGIC: &[u8] = b"070701";
/// Length of a header, bytes: the magic and 13 numbers of 8 hexadecimal digits.
const HEADER: usize = 110;
/// Most bytes of a name with its NULs (PATH_MAX).
const MAX_NAME: u64 = 4096;
/// Most entries that are looked at. An archive of more is none of ours.
const MAX_ENTRIES: usize = 64;
/// Name of the entry that ends the archive.
const TRAILER: &[u8] = b"TRAILER!!!";

/// A file in the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// Its path, without a leading slash.
    pub(super) path: Vec<u8>,
    /// Type and permissions, as in stat(2).
    pub(super) mode: u32,
    /// Major and minor number of a device node.
    pub(super) device: (u32, u32),
    /// Where its content is in the archive, bytes.
    pub(super) offset: u64,
    /// Length of its content, bytes.
    pub(super) size: u64,
}

/// The entries of the archive in `file`, or `None` if it is not one that can be understood.
///
/// # Errors
/// When the file cannot be read.
pub(super) fn entries(file: &File) -> io::Result<Option<Vec<Entry>>> {
    let length = file.metadata()?.len();
    let mut entries = Vec::new();
    let mut at = 0;
    loop {
        let mut header = [0; HEADER];
        match file.read_exact_at(&mut header, at) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            result => result?,
        }
        let Some(fields) = fields(&header) else {
            return Ok(None);
        };
        let [_, mode, _, _, _, _, size, _, _, major, minor, name_size, _] = fields;
        let name_at = at + HEADER as u64;
        let offset = (name_at + u64::from(name_size)).next_multiple_of(4);
        let end = offset + u64::from(size);
        if !(1..=MAX_NAME).contains(&name_size.into()) || end > length {
            return Ok(None);
        }
        let mut name = vec![0; name_size as usize];
        file.read_exact_at(&mut name, name_at)?;
        name.truncate(
            name.iter()
                .position(|byte| *byte == 0)
                .unwrap_or(name.len()),
        );
        if name == TRAILER {
            return Ok(Some(entries));
        }
        if entries.len() == MAX_ENTRIES {
            return Ok(None);
        }
        entries.push(Entry {
            path: name,
            mode,
            device: (major, minor),
            offset,
            size: size.into(),
        });
        at = end.next_multiple_of(4);
    }
}

fn fields(header: &[u8; HEADER]) -> Option<[u32; 13]> {
    let digits = header.strip_prefix(MAGIC)?;
    let mut fields = [0; 13];
    for (field, digits) in fields.iter_mut().zip(digits.chunks(8)) {
        // from_str_radix would take a sign for a digit.
        if !digits.iter().all(u8::is_ascii_hexdigit) {
            return None;
        }
        *field = u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(fields)
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use super::*;

    /// The header and name of an entry; `name` has its NULs.
    pub(in super::super) fn head(name: &[u8], mode: u32, size: u32, device: (u32, u32)) -> Vec<u8> {
        let (major, minor) = device;
        let mut bytes = MAGIC.to_vec();
        for field in [
            1,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            major,
            minor,
            name.len() as u32,
            0,
        ] {
            bytes.extend(format!("{field:08X}").bytes());
        }
        bytes.extend(name);
        bytes
    }

    /// An archive of these names (with their NULs), modes and contents.
    pub(in super::super) fn archive(files: &[(&[u8], u32, &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let pad = |bytes: &mut Vec<u8>| bytes.resize(bytes.len().next_multiple_of(4), 0);
        for (name, mode, content) in files.iter().chain([&(&b"TRAILER!!!\0"[..], 0, &b""[..])]) {
            bytes.extend(head(name, *mode, content.len() as u32, (5, 1)));
            pad(&mut bytes);
            bytes.extend(*content);
            pad(&mut bytes);
        }
        bytes
    }

    fn read(bytes: &[u8]) -> Option<Vec<Entry>> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        entries(&file).unwrap()
    }

    #[test]
    fn an_archive_is_its_entries_up_to_the_trailer() {
        let bytes = archive(&[
            (b"dev\0", 0o40755, b""),
            (b"init\0\0\0\0", 0o100755, b"hello"),
            (b"x\0", 0o100644, b"!"),
        ]);
        let entries = read(&bytes).unwrap();
        let paths: Vec<&[u8]> = entries.iter().map(|entry| &entry.path[..]).collect();
        assert_eq!(paths, [&b"dev"[..], b"init", b"x"]);
        let init = &entries[1];
        assert_eq!((init.mode, init.size, init.device), (0o100755, 5, (5, 1)));
        assert_eq!(&bytes[init.offset as usize..][..5], b"hello");
    }

    #[test]
    fn what_is_cut_short_or_no_archive_is_not_understood() {
        let whole = archive(&[(b"init\0", 0o100755, b"hello")]);
        for length in 0..whole.len() {
            let cut = read(&whole[..length]);
            assert!(cut.is_none() || length + 4 > whole.len(), "{length} bytes");
        }
        assert!(read(&[0x1f, 0x8b].repeat(200)).is_none());
        for (at, byte) in [(0, b'1'), (5, b'2'), (6, b'+'), (14, b'g'), (94, b'F')] {
            let mut bytes = whole.clone();
            bytes[at] = byte;
            assert!(read(&bytes).is_none(), "byte {at}");
        }
        let mut nameless = head(b"", 0o100755, 0, (0, 0));
        nameless.extend(&whole);
        assert!(read(&nameless).is_none());
    }

    #[test]
    fn more_entries_than_are_ever_ours_are_not_understood() {
        let many = |count| archive(&vec![(&b"x\0"[..], 0o100644, &b""[..]); count]);
        assert_eq!(read(&many(MAX_ENTRIES)).unwrap().len(), MAX_ENTRIES);
        assert!(read(&many(MAX_ENTRIES + 1)).is_none());
    }
}
