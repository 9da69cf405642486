use std::io::Write;

use proptest::prelude::*;
use tar::{Builder, EntryType, Header};

use super::*;

fn header(name: &str, kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_path(name).unwrap();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(1);
    header.set_gid(2);
    header.set_mtime(3);
    header.set_cksum();
    header
}

fn raw(blocks: &[&[u8]]) -> Vec<u8> {
    let mut archive = Vec::new();
    for block in blocks {
        archive.extend_from_slice(block);
        archive.resize(archive.len().next_multiple_of(BLOCK), 0);
    }
    archive.extend_from_slice(&[0; 2 * BLOCK]);
    archive
}

fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut text = Vec::new();
    for (key, value) in records {
        let rest = 3 + key.len() + value.len();
        let length = (rest..).find(|n| n.to_string().len() + rest == *n).unwrap();
        write!(text, "{length} {key}=").unwrap();
        text.extend_from_slice(value);
        text.push(b'\n');
    }
    text
}

type Read = (Entry, Vec<u8>);

fn read(archive: &[u8]) -> Result<Vec<Read>, LayerError> {
    let mut reader = Archive::new(archive);
    let mut entries = Vec::new();
    while let Some(entry) = reader.next()? {
        let mut content = Vec::new();
        let mut buf = [0; 100];
        loop {
            match reader.read_content(&mut buf).map_err(LayerError::Read)? {
                0 => break,
                n => content.extend_from_slice(&buf[..n]),
            }
        }
        entries.push((entry, content));
    }
    Ok(entries)
}

/// The one entry after a PAX header with these records.
fn extended(
    records: &[(&str, &[u8])],
    header: &Header,
    content: &[u8],
) -> Result<Read, LayerError> {
    let text = pax(records);
    let x = self::header("x", EntryType::XHeader, text.len() as u64);
    read(&raw(&[x.as_bytes(), &text, header.as_bytes(), content])).map(|mut all| all.remove(0))
}

#[test]
fn what_the_tar_crate_writes_is_read_back() {
    let mut builder = Builder::new(Vec::new());
    let long = "d/".repeat(120) + "file";
    builder
        .append_data(
            &mut header("x", EntryType::Regular, 5),
            &long,
            &b"hello"[..],
        )
        .unwrap();
    builder
        .append_link(&mut header("x", EntryType::Symlink, 0), "link", &long)
        .unwrap();
    builder
        .append(&header("dir/", EntryType::Directory, 0), &b""[..])
        .unwrap();
    let entries = read(&builder.into_inner().unwrap()).unwrap();
    assert_eq!(entries.len(), 3);
    let (file, content) = &entries[0];
    assert_eq!(
        (file.path.as_slice(), content.as_slice()),
        (long.as_bytes(), &b"hello"[..])
    );
    assert_eq!(
        (file.mode, file.uid, file.gid, file.modified.seconds),
        (0o644, 1, 2, 3)
    );
    assert_eq!(entries[1].0.kind, Kind::Symlink(long.into_bytes()));
    assert_eq!(entries[2].0.kind, Kind::Directory);
}

#[test]
fn content_that_nobody_reads_is_passed_over() {
    let a = header("a", EntryType::Regular, 700);
    let b = header("b", EntryType::Regular, 1);
    let archive = raw(&[a.as_bytes(), &[7; 700], b.as_bytes(), b"x"]);
    let mut reader = Archive::new(archive.as_slice());
    assert_eq!(reader.next().unwrap().unwrap().path, b"a");
    assert_eq!(reader.position(), 512);
    assert_eq!(reader.next().unwrap().unwrap().path, b"b");
    assert_eq!((reader.position(), reader.content()), (4 * 512, 1));
}

#[test]
fn a_pax_header_replaces_fields_of_the_next_entry_only() {
    let text = pax(&[
        ("path", b"new"),
        ("size", b"3"),
        ("uid", b"70000"),
        ("gid", b"4294967294"),
        ("mtime", b"-1.5"),
        ("SCHILY.xattr.user.a", b"\n\0="),
    ]);
    let x = header("x", EntryType::XHeader, text.len() as u64);
    let f = header("old", EntryType::Regular, 0);
    let g = header("other", EntryType::Regular, 0);
    let entries = read(&raw(&[
        x.as_bytes(),
        &text,
        f.as_bytes(),
        b"abc",
        g.as_bytes(),
    ]))
    .unwrap();
    let (entry, content) = &entries[0];
    assert_eq!(
        (entry.path.as_slice(), content.as_slice()),
        (&b"new"[..], &b"abc"[..])
    );
    assert_eq!((entry.uid, entry.gid), (70_000, 4_294_967_294));
    assert_eq!(
        entry.modified,
        Time {
            seconds: -2,
            nanoseconds: 500_000_000
        }
    );
    assert_eq!(entry.xattrs, [(b"user.a".to_vec(), b"\n\0=".to_vec())]);
    assert_eq!(
        (entries[1].0.path.as_slice(), entries[1].0.uid),
        (&b"other"[..], 1)
    );
}

#[test]
fn an_owner_that_only_pax_can_express_is_read_from_there() {
    let mut f = header("f", EntryType::Regular, 0);
    f.as_gnu_mut().unwrap().uid = [0xff; 8];
    f.set_cksum();
    assert!(read(&raw(&[f.as_bytes()])).is_err());
    assert_eq!(extended(&[("uid", b"5")], &f, b"").unwrap().0.uid, 5);
}

#[test]
fn a_global_header_changes_nothing() {
    let text = pax(&[("path", b"evil")]);
    let g = header("g", EntryType::XGlobalHeader, text.len() as u64);
    let f = header("f", EntryType::Regular, 0);
    let entries = read(&raw(&[g.as_bytes(), &text, f.as_bytes()])).unwrap();
    assert_eq!(entries[0].0.path, b"f");
}

#[test]
fn links_and_devices_have_no_content_whatever_their_size() {
    for kind in [
        EntryType::Link,
        EntryType::Symlink,
        EntryType::Char,
        EntryType::Block,
        EntryType::Directory,
        EntryType::Fifo,
    ] {
        let mut a = header("a", kind, 4096);
        a.set_link_name("t").unwrap();
        a.set_cksum();
        let b = header("b", EntryType::Regular, 0);
        assert_eq!(
            read(&raw(&[a.as_bytes(), b.as_bytes()])).unwrap().len(),
            2,
            "{kind:?}"
        );
    }
}

#[test]
fn a_v7_file_that_ends_with_a_slash_is_a_directory() {
    let mut old = Header::new_old();
    old.as_old_mut().name[..4].copy_from_slice(b"dir/");
    old.set_mode(0o755);
    old.set_uid(0);
    old.set_gid(0);
    old.set_size(0);
    old.set_mtime(0);
    old.set_cksum();
    assert_eq!(
        read(&raw(&[old.as_bytes()])).unwrap()[0].0.kind,
        Kind::Directory
    );
}

fn chunks(entry: &Entry) -> (u64, Vec<(u64, u64)>) {
    match &entry.kind {
        Kind::File { size, chunks } => {
            (*size, chunks.iter().map(|c| (c.offset, c.length)).collect())
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn sparse_files_of_all_pax_formats_are_read() {
    let expected = (5000, vec![(0, 2), (4000, 3)]);
    let f = header("GNUSparseFile.0/f", EntryType::Regular, 5);
    let v00: [(&str, &[u8]); 6] = [
        ("GNU.sparse.size", b"5000"),
        ("GNU.sparse.numblocks", b"2"),
        ("GNU.sparse.offset", b"0"),
        ("GNU.sparse.numbytes", b"2"),
        ("GNU.sparse.offset", b"4000"),
        ("GNU.sparse.numbytes", b"3"),
    ];
    let (entry, content) = extended(&v00, &f, b"abcde").unwrap();
    assert_eq!(
        (chunks(&entry), content.as_slice()),
        (expected.clone(), &b"abcde"[..])
    );

    let v01: [(&str, &[u8]); 3] = [
        ("GNU.sparse.size", b"5000"),
        ("GNU.sparse.name", b"f"),
        ("GNU.sparse.map", b"0,2,4000,3"),
    ];
    let (entry, _) = extended(&v01, &f, b"abcde").unwrap();
    assert_eq!(
        (chunks(&entry), entry.path.as_slice()),
        (expected.clone(), &b"f"[..])
    );

    let v10: [(&str, &[u8]); 4] = [
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"f"),
        ("GNU.sparse.realsize", b"5000"),
    ];
    let mut content = b"2\n0\n2\n4000\n3\n".to_vec();
    content.resize(BLOCK, 0);
    content.extend_from_slice(b"abcde");
    let f = header(
        "GNUSparseFile.0/f",
        EntryType::Regular,
        content.len() as u64,
    );
    let (entry, content) = extended(&v10, &f, &content).unwrap();
    assert_eq!(
        (chunks(&entry), entry.path.as_slice(), content.as_slice()),
        (expected, &b"f"[..], &b"abcde"[..])
    );
}

#[test]
fn sparse_maps_that_lie_are_refused() {
    let f = header("f", EntryType::Regular, 5);
    for map in [
        "0,2,1,3",
        "0,2,4000,4",
        "0,2",
        "0,5,",
        "x",
        "0,2,4998,3",
        "18446744073709551615,5",
        "0,5,9000,0",
    ] {
        let records: [(&str, &[u8]); 2] = [
            ("GNU.sparse.size", b"5000"),
            ("GNU.sparse.map", map.as_bytes()),
        ];
        assert!(extended(&records, &f, b"abcde").is_err(), "{map}");
    }
    assert!(extended(&[("GNU.sparse.map", b"0,5")], &f, b"abcde").is_err());
    assert!(
        extended(
            &[
                ("GNU.sparse.size", b"9223372036854775808"),
                ("GNU.sparse.map", b"0,5")
            ],
            &f,
            b"abcde"
        )
        .is_err()
    );
    for text in [
        &b"99999999999\n"[..],
        b"1\n0\n",
        b"1\n0",
        b"x\n",
        b"\n",
        b"000000000000000000000000000001\n",
    ] {
        let mut content = text.to_vec();
        content.resize(BLOCK, 0);
        let f = header("f", EntryType::Regular, content.len() as u64);
        let records: [(&str, &[u8]); 2] =
            [("GNU.sparse.major", b"1"), ("GNU.sparse.realsize", b"5")];
        assert!(extended(&records, &f, &content).is_err(), "{text:?}");
    }
}

#[test]
fn old_gnu_sparse_files_are_read() {
    let mut f = header("f", EntryType::GNUSparse, 10);
    let gnu = f.as_gnu_mut().unwrap();
    gnu.set_real_size(100_000);
    for (n, slot) in gnu.sparse.iter_mut().enumerate() {
        slot.set_offset(n as u64 * 1000);
        slot.set_length(2);
    }
    gnu.set_is_extended(true);
    f.set_cksum();
    let mut more = tar::GnuExtSparseHeader::new();
    more.sparse_mut()[0].set_offset(99_998);
    more.sparse_mut()[0].set_length(2);
    let entries = read(&raw(&[f.as_bytes(), more.as_bytes(), b"0123456789"])).unwrap();
    let expected = vec![(0, 2), (1000, 2), (2000, 2), (3000, 2), (99_998, 2)];
    assert_eq!(
        (chunks(&entries[0].0), entries[0].1.as_slice()),
        ((100_000, expected), &b"0123456789"[..])
    );

    more.set_is_extended(true);
    let mut endless = vec![f.as_bytes().to_vec(), more.as_bytes().to_vec()];
    let mut empty = tar::GnuExtSparseHeader::new();
    empty.set_is_extended(true);
    endless.extend(std::iter::repeat_n(empty.as_bytes().to_vec(), 100));
    assert!(read(&endless.concat()).is_err());
}

#[test]
fn archives_that_are_none_are_refused() {
    let f = header("f", EntryType::Regular, 600);
    let whole = raw(&[f.as_bytes(), &[1; 600]]);
    for length in [1, 511, 513, 512 + 599, 512 + 601] {
        assert!(
            matches!(read(&whole[..length]), Err(LayerError::Read(_))),
            "{length}"
        );
    }
    let mut damaged = whole.clone();
    damaged[0] ^= 1;
    assert!(matches!(read(&damaged), Err(LayerError::Archive(_))));
    let lone_zeros = [&[0; BLOCK][..], &whole].concat();
    assert!(matches!(read(&lone_zeros), Err(LayerError::Archive(_))));
    let unknown = header("f", EntryType::new(b'V'), 0);
    assert!(matches!(
        read(&raw(&[unknown.as_bytes()])),
        Err(LayerError::Archive(_))
    ));
}

#[test]
fn extensions_are_bounded_unique_and_followed_by_something() {
    let huge = header("x", EntryType::XHeader, MAX_EXTENSION + 1);
    assert!(matches!(
        read(&raw(&[huge.as_bytes()])),
        Err(LayerError::TooMany { .. })
    ));
    let huge = header("L", EntryType::GNULongName, 1 << 40);
    assert!(matches!(
        read(&raw(&[huge.as_bytes()])),
        Err(LayerError::TooMany { .. })
    ));
    let f = header("f", EntryType::Regular, 0);
    let text = pax(&[("path", b"p")]);
    let x = header("x", EntryType::XHeader, text.len() as u64);
    assert!(
        read(&raw(&[
            x.as_bytes(),
            &text,
            x.as_bytes(),
            &text,
            f.as_bytes()
        ]))
        .is_err()
    );
    assert!(read(&raw(&[x.as_bytes(), &text])).is_err());
    let l = header("L", EntryType::GNULongName, 2);
    assert!(
        read(&raw(&[
            l.as_bytes(),
            b"a\0",
            l.as_bytes(),
            b"b\0",
            f.as_bytes()
        ]))
        .is_err()
    );
    assert!(extended(&[("path", &[b'a'; MAX_PATH + 1])], &f, b"").is_err());
    assert!(extended(&[("path", b"a\0b")], &f, b"").is_err());
    assert!(extended(&[("size", b"9223372036854775808")], &f, b"").is_err());
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
        let _ = read(&bytes);
    }

    #[test]
    fn no_header_with_a_right_checksum_makes_the_reader_panic(
        flag in prop::sample::select(b"\x0001234567SxgLK".to_vec()),
        noise in prop::collection::vec((0_usize..512, any::<u8>()), 0..12),
        content in prop::collection::vec(any::<u8>(), 0..1200),
    ) {
        let mut f = header("f", EntryType::new(flag), content.len() as u64);
        for (at, byte) in noise {
            f.as_mut_bytes()[at] = byte;
        }
        f.set_cksum();
        let g = header("g", EntryType::Regular, 0);
        let _ = read(&raw(&[f.as_bytes(), &content, g.as_bytes()]));
    }
}
