//! A file system around an initial ramfs (EROFS, fs/erofs/erofs_fs.h in Linux): one page of metadata, behind which the archive's
//! bytes are the contents of its files. A guest whose memory holds the two, one after the other, runs its first program where it lies in
//! the archive, of which all guests on the host share one copy, and unpacks nothing.

use std::collections::BTreeMap;

use super::cpio::Entry;
use super::layout::PAGE;

const MAGIC: u32 = 0xe0f5_e1e2;
/// Where the superblock is, and its length.
const SUPERBLOCK: usize = 1024;
const SUPERBLOCK_SIZE: usize = 128;
/// Inodes are numbered by their place in these units.
const SLOT: usize = 32;
/// Layouts of an inode's content: in blocks of its own, or right behind the inode (EROFS_INODE_FLAT_PLAIN, _FLAT_INLINE).
const PLAIN: u16 = 0 << 1;
const INLINE: u16 = 2 << 1;

/// Types of files (stat(2)), and what directories call them (linux/fs_types.h).
const TYPE: u32 = 0o170_000;
const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const CHARACTER: u32 = 0o020_000;

/// A name in a directory, and the number and type of what it names.
struct Name<'e> {
    name: &'e [u8],
    path: &'e [u8],
    kind: u8,
}

/// The page of metadata for an archive with these entries, or `None` if they do not fit into one: too many, a content that does
/// not begin with a page, a kind of file that is not made here, or a path that leads nowhere.
pub(super) fn metadata(entries: &[Entry], archive_length: u64) -> Option<Vec<u8>> {
    let root = Entry {
        path: Vec::new(),
        mode: DIRECTORY | 0o755,
        device: (0, 0),
        offset: 0,
        size: 0,
    };
    let mut files = BTreeMap::from([(&root.path[..], &root)]);
    for entry in entries {
        if entry.path.is_empty() || files.insert(&entry.path, entry).is_some() {
            return None;
        }
    }
    let mut directories: BTreeMap<&[u8], Vec<Name<'_>>> = BTreeMap::new();
    for (path, entry) in &files {
        let (parent, name) = split(path);
        let kind = kind(entry)?;
        if !path.is_empty() {
            let parent = directories.get_mut(parent)?;
            parent.push(Name { name, path, kind });
        }
        if entry.mode & TYPE == DIRECTORY {
            let own = |name, path| Name {
                name,
                path,
                kind: 2,
            };
            // The root is its own parent.
            directories.insert(path, vec![own(b".", path), own(b"..", parent)]);
        }
    }
    for names in directories.values_mut() {
        names.sort_by_key(|name| name.name);
    }

    // Places first, because directories name them.
    let mut end = SUPERBLOCK + SUPERBLOCK_SIZE;
    let mut places = BTreeMap::new();
    for path in files.keys() {
        places.insert(*path, end);
        let names = directories.get(path).map_or(0, |names| length(names));
        end = (end + SLOT + names).next_multiple_of(SLOT);
    }
    let mut page = vec![0; PAGE as usize];
    page.get(..end)?;
    for (number, (path, entry)) in (1_u32..).zip(&files) {
        let place = places[path];
        match directories.get(path) {
            Some(names) => {
                let children = names.iter().filter(|name| name.kind == 2).count();
                let list = list(names, |path| (places[path] / SLOT) as u64);
                inode(
                    &mut page[place..],
                    entry,
                    INLINE,
                    (children as u16, list.len() as u32, 0, number),
                );
                page[place + SLOT..place + SLOT + list.len()].copy_from_slice(&list);
            }
            None => {
                let content = match entry.mode & TYPE {
                    CHARACTER => device(entry.device),
                    _ => u32::try_from(1 + entry.offset / PAGE).ok()?,
                };
                let size = u32::try_from(entry.size).ok()?;
                inode(&mut page[place..], entry, PLAIN, (1, size, content, number));
            }
        }
    }
    let blocks = u32::try_from(1 + archive_length.div_ceil(PAGE)).ok()?;
    superblock(
        &mut page[SUPERBLOCK..],
        places[&root.path[..]],
        files.len(),
        blocks,
    );
    Some(page)
}

/// A path's directory and last name.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&[], path),
    }
}

/// What a directory says of such a file, if it can be made here.
fn kind(entry: &Entry) -> Option<u8> {
    match entry.mode & TYPE {
        REGULAR if entry.offset.is_multiple_of(PAGE) || entry.size == 0 => Some(1),
        DIRECTORY => Some(2),
        CHARACTER => Some(3),
        _ => None,
    }
}

/// Length of a directory's content: 12 bytes for each name, and the names.
fn length(names: &[Name<'_>]) -> usize {
    names.iter().map(|name| 12 + name.name.len()).sum()
}

/// `struct erofs_dirent` for each name, then the names.
fn list(names: &[Name<'_>], number: impl Fn(&[u8]) -> u64) -> Vec<u8> {
    let mut list = Vec::with_capacity(length(names));
    let mut name_at = 12 * names.len();
    for name in names {
        list.extend(number(name.path).to_le_bytes());
        list.extend((name_at as u16).to_le_bytes());
        list.extend([name.kind, 0]);
        name_at += name.name.len();
    }
    names.iter().for_each(|name| list.extend(name.name));
    list
}

/// A device number as Linux has it on disks (new_encode_dev).
fn device((major, minor): (u32, u32)) -> u32 {
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

/// `struct erofs_inode_compact`, root's: links, size, content and number are the inode's own.
fn inode(
    at: &mut [u8],
    entry: &Entry,
    layout: u16,
    (links, size, content, number): (u16, u32, u32, u32),
) {
    at[0..2].copy_from_slice(&layout.to_le_bytes());
    at[4..6].copy_from_slice(&(entry.mode as u16).to_le_bytes());
    at[6..8].copy_from_slice(&links.to_le_bytes());
    at[8..12].copy_from_slice(&size.to_le_bytes());
    at[16..20].copy_from_slice(&content.to_le_bytes());
    at[20..24].copy_from_slice(&number.to_le_bytes());
}

/// `struct erofs_super_block`, of which no feature is used.
fn superblock(at: &mut [u8], root: usize, inodes: usize, blocks: u32) {
    at[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    at[12] = PAGE.ilog2() as u8;
    at[14..16].copy_from_slice(&((root / SLOT) as u16).to_le_bytes());
    at[16..24].copy_from_slice(&(inodes as u64).to_le_bytes());
    at[36..40].copy_from_slice(&blocks.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, mode: u32, offset: u64, size: u64) -> Entry {
        Entry {
            path: path.into(),
            mode,
            device: (5, 1),
            offset,
            size,
        }
    }

    fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
        let mut number = [0; 8];
        number[..N].copy_from_slice(&bytes[at..at + N]);
        u64::from_le_bytes(number)
    }

    /// What the directory whose inode is at `place` names: names, numbers, types.
    fn listed(page: &[u8], place: usize) -> Vec<(String, u64, u8)> {
        let size = number::<4>(page, place + 8) as usize;
        let list = &page[place + SLOT..][..size];
        let names_at = number::<2>(list, 8) as usize;
        let start = |index: usize| match index * 12 {
            at if at < names_at => number::<2>(list, at + 8) as usize,
            _ => size,
        };
        (0..names_at / 12)
            .map(|index| {
                let name = list[start(index)..start(index + 1)].to_vec();
                let name = String::from_utf8(name).unwrap();
                (name, number::<8>(list, index * 12), list[index * 12 + 10])
            })
            .collect()
    }

    #[test]
    fn every_file_is_found_from_the_superblock_on() {
        let entries = [
            entry("dev", 0o40_755, 0, 0),
            entry("dev/console", 0o20_600, 0, 0),
            entry("-", 0o40_700, 0, 0),
            entry("init", 0o100_755, 3 * PAGE, 10_000),
        ];
        let page = metadata(&entries, 6 * PAGE + 1).unwrap();
        assert_eq!(page.len() as u64, PAGE);
        let superblock = &page[SUPERBLOCK..];
        assert_eq!(number::<4>(superblock, 0), u64::from(MAGIC));
        assert_eq!(number::<4>(superblock, 36), 8, "blocks");
        assert_eq!(number::<8>(superblock, 16), 5, "inodes");
        let root = number::<2>(superblock, 14);
        let place = |number: u64| number as usize * SLOT;
        let names = listed(&page, place(root));
        let plain: Vec<(&str, u8)> = names.iter().map(|name| (&name.0[..], name.2)).collect();
        // In the order of their bytes, by which the kernel searches.
        assert_eq!(
            plain,
            [("-", 2), (".", 2), ("..", 2), ("dev", 2), ("init", 1)]
        );
        assert_eq!((names[1].1, names[2].1), (root, root));
        assert_eq!(number::<2>(&page, place(root) + 6), 4, "links");
        let dev = listed(&page, place(names[3].1));
        assert_eq!(dev[1], ("..".into(), root, 2));
        let console = place(dev[2].1);
        assert_eq!(number::<2>(&page, console + 4), 0o20_600);
        assert_eq!(number::<4>(&page, console + 16), 5 << 8 | 1);
        let init = place(names[4].1);
        assert_eq!(number::<2>(&page, init + 4), 0o100_755);
        assert_eq!(number::<4>(&page, init + 8), 10_000);
        assert_eq!(number::<4>(&page, init + 16), 4, "behind the metadata");
    }

    #[test]
    fn what_cannot_be_shown_where_it_lies_is_left_alone() {
        let file = |path: &str, offset| entry(path, 0o100_644, offset, 1);
        let refused = |entries: &[Entry]| metadata(entries, 1 << 20).is_none();
        assert!(!refused(&[file("a", PAGE)]));
        assert!(refused(&[file("a", PAGE + 4)]), "not aligned");
        assert!(refused(&[file("a", PAGE), file("a", PAGE)]), "twice");
        assert!(refused(&[file("no/where", PAGE)]));
        assert!(
            refused(&[file("a", PAGE), file("a/b", PAGE)]),
            "no directory"
        );
        assert!(refused(&[file("", PAGE)]));
        assert!(refused(&[entry("link", 0o120_777, PAGE, 1)]));
        assert!(refused(&[file("far", PAGE << 32)]));
        assert!(refused(&[entry("large", 0o100_644, PAGE, 1 << 32)]));
        let many: Vec<Entry> = (0..60).map(|n| file(&"n".repeat(n + 1), PAGE)).collect();
        assert!(refused(&many), "more than a page");
    }
}
