//! What a guest does all day.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::time::{Duration, SystemTime};

use fuse_backend_rs::abi::fuse_abi::*;
use vm_memory::ByteValued;

use super::client::*;

#[test]
fn mounting_agrees_on_requests_of_a_mebibyte_and_no_more_than_is_offered() {
    let mut client = Client::new();
    let init = client.mount();
    assert_eq!(
        (init.major, init.max_write, init.max_pages),
        (7, 1 << 20, 256)
    );
    let chosen = FsOptions::from_bits_truncate(u64::from(init.flags));
    for on in [
        FsOptions::AUTO_INVAL_DATA,
        FsOptions::DO_READDIRPLUS,
        FsOptions::HANDLE_KILLPRIV_V2,
        FsOptions::POSIX_ACL,
        FsOptions::SUBMOUNTS,
    ] {
        assert!(chosen.contains(on), "{on:?}");
    }
    for off in [
        FsOptions::WRITEBACK_CACHE,
        FsOptions::POSIX_LOCKS,
        FsOptions::FLOCK_LOCKS,
        FsOptions::EXPORT_SUPPORT,
        FsOptions::ZERO_MESSAGE_OPEN,
        FsOptions::ZERO_MESSAGE_OPENDIR,
        FsOptions::MAP_ALIGNMENT,
    ] {
        assert!(!chosen.intersects(off), "{off:?}");
    }
    assert_eq!(init.flags2, 0);
}

#[test]
fn a_file_is_created_written_and_read() {
    let mut client = Client::new();
    let (file, fh) = client.create(ROOT, "a", libc::O_RDWR, 0o644, 0).unwrap();
    assert_eq!(client.write(file.node, fh, 0, b"hello").unwrap(), 5);
    assert_eq!(client.write(file.node, fh, 4096, b"there").unwrap(), 5);
    assert_eq!(client.read(file.node, fh, 0, 5).unwrap(), b"hello");
    assert_eq!(client.read(file.node, fh, 4096, 100).unwrap(), b"there");
    assert_eq!(client.read(file.node, fh, 1 << 40, 100).unwrap(), b"");
    assert_eq!(client.getattr(file.node).unwrap().size, 4101);
    client.release(file.node, fh).unwrap();
    assert_eq!(client.read(file.node, fh, 0, 5), Err(libc::EBADF));
    assert_eq!(&fs::read(client.host("a")).unwrap()[..5], b"hello");
}

#[test]
fn a_mebibyte_travels_in_one_request_each_way() {
    let mut client = Client::new();
    let data: Vec<u8> = (0..1 << 20).map(|i: u32| ((i * 31) >> 7) as u8).collect();
    let (file, fh) = client.create(ROOT, "a", libc::O_RDWR, 0o644, 0).unwrap();
    assert_eq!(client.write(file.node, fh, 0, &data).unwrap(), 1 << 20);
    assert!(client.read(file.node, fh, 0, 1 << 20).unwrap() == data);
    assert!(fs::read(client.host("a")).unwrap() == data);
}

#[test]
fn what_a_user_creates_belongs_to_that_user_with_the_mode_asked_for() {
    let mut client = Client::new();
    client.uid = 1234;
    client.gid = 4321;
    // The directory is root's alone on the host: the guest's kernel has decided that this user may.
    fs::set_permissions(client.dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
    client.mkdir(ROOT, "d", 0o1775, 0o022).unwrap();
    client
        .create(ROOT, "f", libc::O_RDWR, 0o4755, 0o027)
        .unwrap();
    client.mknod(ROOT, "p", libc::S_IFIFO | 0o666, 0).unwrap();
    client.symlink(ROOT, "l", "nowhere").unwrap();
    for (at, mode) in [("d", 0o1755), ("f", 0o4750), ("p", 0o666), ("l", 0o777)] {
        let stat = fs::symlink_metadata(client.host(at)).unwrap();
        assert_eq!((stat.uid(), stat.gid()), (1234, 4321), "{at}");
        assert_eq!(stat.mode() & 0o7777, mode, "{at}");
    }
    client.uid = 0;
    client.gid = 0;
    client.mkdir(ROOT, "r", 0o755, 0).unwrap();
    assert_eq!(fs::metadata(client.host("r")).unwrap().uid(), 0);
}

#[test]
fn a_group_directory_hands_its_group_on() {
    let mut client = Client::new();
    let dir = client.mkdir(ROOT, "d", 0o2777, 0).unwrap();
    std::os::unix::fs::chown(client.host("d"), None, Some(77)).unwrap();
    fs::set_permissions(client.host("d"), fs::Permissions::from_mode(0o2777)).unwrap();
    client.uid = 1000;
    client.gid = 1000;
    client
        .create(dir.node, "f", libc::O_RDWR, 0o644, 0)
        .unwrap();
    let stat = fs::metadata(client.host("d/f")).unwrap();
    assert_eq!((stat.uid(), stat.gid()), (1000, 77));
}

#[test]
fn nodes_of_every_type_are_created_and_looked_up() {
    let mut client = Client::new();
    let char_null = (1 << 8) | 3;
    for (at, kind, rdev) in [
        ("c", libc::S_IFCHR, char_null),
        ("b", libc::S_IFBLK, (8 << 8) | 1),
        ("big", libc::S_IFCHR, (0xfff << 8) | 0x34 | (0xabc00 << 12)),
        ("p", libc::S_IFIFO, 0),
        ("s", libc::S_IFSOCK, 0),
        ("f", libc::S_IFREG, 0),
    ] {
        let made = client.mknod(ROOT, at, kind | 0o600, rdev).unwrap();
        assert_eq!(made.attr.mode, kind | 0o600, "{at}");
        assert_eq!(made.attr.rdev, rdev, "{at}");
        assert_eq!(client.lookup(ROOT, at).unwrap().node, made.node);
    }
    let null = fs::metadata(client.host("c")).unwrap();
    assert!(null.file_type().is_char_device());
    assert_eq!(null.rdev(), nix::sys::stat::makedev(1, 3));
    let big = fs::metadata(client.host("big")).unwrap();
    assert_eq!(big.rdev(), nix::sys::stat::makedev(0xfff, 0xabc34));
    for kind in [libc::S_IFDIR, libc::S_IFLNK, 0o070000, libc::S_IFMT] {
        assert!(
            client.mknod(ROOT, "x", kind | 0o600, 0).is_err(),
            "{kind:o}"
        );
    }
}

#[test]
fn an_existing_file_is_opened_by_create_unless_it_must_not_exist() {
    let mut client = Client::new();
    fs::write(client.host("a"), b"old").unwrap();
    let (file, fh) = client.create(ROOT, "a", libc::O_RDWR, 0o600, 0).unwrap();
    assert_eq!(client.read(file.node, fh, 0, 9).unwrap(), b"old");
    let exclusive = libc::O_RDWR | libc::O_EXCL;
    let refused = client.create(ROOT, "a", exclusive, 0o600, 0);
    assert_eq!(refused.unwrap_err(), libc::EEXIST);
    let (again, _) = client
        .create(ROOT, "a", libc::O_RDWR | libc::O_TRUNC, 0o600, 0)
        .unwrap();
    assert_eq!(again.node, file.node);
    assert_eq!(fs::read(client.host("a")).unwrap(), b"");
    client.create(ROOT, "new", exclusive, 0o600, 0).unwrap();
}

#[test]
fn attributes_are_changed_one_by_one() {
    let mut client = Client::new();
    fs::write(client.host("a"), b"0123456789").unwrap();
    let file = client.lookup(ROOT, "a").unwrap().node;
    let set = |valid: SetattrValid| SetattrIn {
        valid: valid.bits(),
        mode: 0o4711,
        uid: 5,
        gid: 6,
        size: 4,
        atime: 1000,
        atimensec: 1,
        mtime: 2000,
        mtimensec: 2,
        ..SetattrIn::default()
    };
    assert_eq!(
        client.setattr(file, set(SetattrValid::SIZE)).unwrap().size,
        4
    );
    let attr = client
        .setattr(file, set(SetattrValid::UID | SetattrValid::GID))
        .unwrap();
    assert_eq!((attr.uid, attr.gid), (5, 6));
    let attr = client.setattr(file, set(SetattrValid::MODE)).unwrap();
    assert_eq!(attr.mode, libc::S_IFREG | 0o4711);
    let attr = client
        .setattr(file, set(SetattrValid::ATIME | SetattrValid::MTIME))
        .unwrap();
    assert_eq!((attr.atime, attr.atimensec), (1000, 1));
    assert_eq!((attr.mtime, attr.mtimensec), (2000, 2));
    let attr = client
        .setattr(file, set(SetattrValid::MTIME | SetattrValid::MTIME_NOW))
        .unwrap();
    assert!(attr.mtime > 1_000_000_000);
    assert_eq!(attr.atime, 1000);
    // Only the owner: the group stays.
    let attr = client.setattr(file, set(SetattrValid::UID)).unwrap();
    assert_eq!((attr.uid, attr.gid), (5, 6));
    let fh = client.open(file, libc::O_RDWR).unwrap().fh;
    let by_handle = SetattrIn {
        fh,
        size: 8,
        ..set(SetattrValid::SIZE)
    };
    let by_handle = SetattrIn {
        valid: by_handle.valid | FATTR_FH,
        ..by_handle
    };
    assert_eq!(client.setattr(file, by_handle).unwrap().size, 8);
}

#[test]
fn a_write_by_an_ordinary_user_clears_setuid_and_one_by_root_does_not() {
    let mut client = Client::new();
    fs::write(client.host("a"), b"x").unwrap();
    let file = client.lookup(ROOT, "a").unwrap().node;
    let fh = client.open(file, libc::O_RDWR).unwrap().fh;
    let suid = |client: &Client| {
        fs::set_permissions(client.host("a"), fs::Permissions::from_mode(0o6755)).unwrap();
    };
    suid(&client);
    client.write_as(file, fh, 0, b"y", 0, 0).unwrap();
    assert_eq!(client.getattr(file).unwrap().mode & 0o7777, 0o6755);
    client
        .write_as(file, fh, 0, b"y", 0, WRITE_KILL_PRIV)
        .unwrap();
    assert_eq!(client.getattr(file).unwrap().mode & 0o7777, 0o755);
    suid(&client);
    let truncate = |valid: SetattrValid| SetattrIn {
        valid: valid.bits(),
        size: 1,
        ..SetattrIn::default()
    };
    let attr = client.setattr(file, truncate(SetattrValid::SIZE)).unwrap();
    assert_eq!(attr.mode & 0o7777, 0o6755);
    let kill = SetattrValid::SIZE | SetattrValid::KILL_SUIDGID;
    let attr = client.setattr(file, truncate(kill)).unwrap();
    assert_eq!(attr.mode & 0o7777, 0o755);
    suid(&client);
    let open = OpenIn {
        flags: (libc::O_WRONLY | libc::O_TRUNC) as u32,
        fuse_flags: FOPEN_IN_KILL_SUIDGID,
    };
    client.call(Opcode::Open, file, open.as_slice()).unwrap();
    assert_eq!(client.getattr(file).unwrap().mode & 0o7777, 0o755);
}

#[test]
fn appending_follows_the_end_of_the_file_and_stops_when_the_guest_says_so() {
    let mut client = Client::new();
    fs::write(client.host("a"), b"one").unwrap();
    let file = client.lookup(ROOT, "a").unwrap().node;
    let fh = client
        .open(file, libc::O_WRONLY | libc::O_APPEND)
        .unwrap()
        .fh;
    // The host appends meanwhile; the guest still believes that the end is at 3.
    fs::write(client.host("a"), b"onetwo").unwrap();
    client
        .write_as(file, fh, 3, b"three", libc::O_APPEND, 0)
        .unwrap();
    assert_eq!(fs::read(client.host("a")).unwrap(), b"onetwothree");
    client.write_as(file, fh, 0, b"ONE", 0, 0).unwrap();
    assert_eq!(fs::read(client.host("a")).unwrap(), b"ONEtwothree");
}

#[test]
fn a_directory_is_listed_completely_whatever_the_size_of_the_answers() {
    let mut client = Client::new();
    for i in 0..300 {
        fs::write(client.host(format!("file-{i:03}")), b"").unwrap();
    }
    fs::create_dir(client.host("sub")).unwrap();
    symlink("x", client.host("link")).unwrap();
    let expected: Vec<String> = [".", ".."]
        .into_iter()
        .map(String::from)
        .chain((0..300).map(|i| format!("file-{i:03}")))
        .chain(["link".into(), "sub".into()])
        .collect();
    for size in [512, 4096, 65536, 1 << 20] {
        for plus in [false, true] {
            let listed = client.list_all(ROOT, size, plus);
            let names: Vec<&String> = listed.iter().map(|(name, ..)| name).collect();
            assert_eq!(names, expected.iter().collect::<Vec<_>>(), "{size} {plus}");
            for (name, node, kind) in listed {
                let dir = name.starts_with('.') || name == "sub";
                assert_eq!(kind == 4, dir, "{name}");
                assert_eq!(node != 0, plus && !name.starts_with('.'), "{name}");
            }
        }
    }
}

#[test]
fn an_answer_counts_only_the_entries_it_holds_as_looked_up() {
    let mut client = Client::new();
    for i in 0..100 {
        fs::write(client.host(format!("f{i}")), b"").unwrap();
    }
    let fh = client.opendir(ROOT).unwrap();
    let (entries, _) = client.list(ROOT, fh, 0, 1024, true).unwrap();
    let told: Vec<u64> = entries.iter().map(|e| e.1).filter(|n| *n != 0).collect();
    assert!(!told.is_empty() && told.len() < 10);
    assert_eq!(client.fs.usage().inodes, 1 + told.len());
    for node in told {
        client.forget(node, 1);
    }
    assert_eq!(client.fs.usage().inodes, 1);
}

#[test]
fn names_are_moved_replaced_and_exchanged() {
    let mut client = Client::new();
    let sub = client.mkdir(ROOT, "sub", 0o755, 0).unwrap().node;
    fs::write(client.host("a"), b"a").unwrap();
    fs::write(client.host("b"), b"b").unwrap();
    let a = client.lookup(ROOT, "a").unwrap().node;
    client.rename((ROOT, "a"), (sub, "x"), 0).unwrap();
    assert_eq!(client.lookup(sub, "x").unwrap().node, a);
    assert_eq!(client.lookup(ROOT, "a").unwrap_err(), libc::ENOENT);
    client
        .rename((sub, "x"), (ROOT, "b"), libc::RENAME_EXCHANGE)
        .unwrap();
    assert_eq!(fs::read(client.host("b")).unwrap(), b"a");
    assert_eq!(fs::read(client.host("sub/x")).unwrap(), b"b");
    let taken = client.rename((sub, "x"), (ROOT, "b"), libc::RENAME_NOREPLACE);
    assert_eq!(taken, Err(libc::EEXIST));
    client
        .rename((sub, "x"), (ROOT, "b"), libc::RENAME_WHITEOUT)
        .unwrap();
    let whiteout = fs::symlink_metadata(client.host("sub/x")).unwrap();
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
    assert_eq!(fs::read(client.host("b")).unwrap(), b"b");
    let head = RenameIn { newdir: sub };
    let request = body(head, &[name("b"), name("y")].concat());
    client.call(Opcode::Rename, ROOT, &request).unwrap();
    assert_eq!(fs::read(client.host("sub/y")).unwrap(), b"b");
}

#[test]
fn a_hard_link_is_the_same_file_and_an_open_file_outlives_its_names() {
    let mut client = Client::new();
    let (file, fh) = client.create(ROOT, "a", libc::O_RDWR, 0o644, 0).unwrap();
    let linked = client.link(file.node, ROOT, "b").unwrap();
    assert_eq!(linked.node, file.node);
    assert_eq!(linked.attr.nlink, 2);
    client.unlink(ROOT, "a").unwrap();
    client.unlink(ROOT, "b").unwrap();
    assert_eq!(client.write(file.node, fh, 0, b"still").unwrap(), 5);
    assert_eq!(client.read(file.node, fh, 0, 5).unwrap(), b"still");
    assert_eq!(client.getattr(file.node).unwrap().nlink, 0);
    let set = SetattrIn {
        valid: (SetattrValid::MODE | SetattrValid::SIZE).bits(),
        mode: 0o600,
        size: 2,
        ..SetattrIn::default()
    };
    assert_eq!(client.setattr(file.node, set).unwrap().size, 2);
    let soft = client.symlink(ROOT, "s", "t").unwrap();
    assert_eq!(client.link(soft.node, ROOT, "s2").unwrap().node, soft.node);
    assert_eq!(
        fs::read_link(client.host("s2")).unwrap().to_str(),
        Some("t")
    );
}

#[test]
fn directories_are_removed_when_they_are_empty() {
    let mut client = Client::new();
    let dir = client.mkdir(ROOT, "d", 0o755, 0).unwrap().node;
    client.mkdir(dir, "e", 0o755, 0).unwrap();
    assert_eq!(client.rmdir(ROOT, "d"), Err(libc::ENOTEMPTY));
    assert_eq!(client.unlink(ROOT, "d"), Err(libc::EISDIR));
    client.rmdir(dir, "e").unwrap();
    client.rmdir(ROOT, "d").unwrap();
    assert!(!client.host("d").exists());
    assert_eq!(client.mkdir(dir, "x", 0o755, 0).unwrap_err(), libc::ENOENT);
}

#[test]
fn extended_attributes_are_set_read_listed_and_removed() {
    let mut client = Client::new();
    let dir = client.mkdir(ROOT, "d", 0o755, 0).unwrap().node;
    let (file, _) = client.create(ROOT, "f", libc::O_RDWR, 0o000, 0).unwrap();
    for node in [dir, file.node] {
        client.setxattr(node, "user.a", b"value", 0).unwrap();
        client
            .setxattr(node, "trusted.b", b"", libc::XATTR_CREATE)
            .unwrap();
        let again = client.setxattr(node, "trusted.b", b"", libc::XATTR_CREATE);
        assert_eq!(again, Err(libc::EEXIST));
        assert_eq!(client.getxattr(node, "user.a", 100).unwrap(), b"value");
        let size = client.getxattr(node, "user.a", 0).unwrap();
        assert_eq!(take::<GetxattrOut>(&size).size, 5);
        assert_eq!(client.getxattr(node, "user.a", 4), Err(libc::ERANGE));
        assert_eq!(client.getxattr(node, "user.x", 9), Err(libc::ENODATA));
        let names = client.listxattr(node, 1000).unwrap();
        assert!(names.ends_with(b"\0") && names.len() >= 17);
        let size = client.listxattr(node, 0).unwrap();
        assert_eq!(take::<GetxattrOut>(&size).size as usize, names.len());
        client
            .call(Opcode::Removexattr, node, &name("user.a"))
            .unwrap();
        assert_eq!(client.getxattr(node, "user.a", 100), Err(libc::ENODATA));
    }
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    client
        .setxattr(file.node, "security.capability", &capability, 0)
        .unwrap();
    assert_eq!(
        client
            .getxattr(file.node, "security.capability", 100)
            .unwrap(),
        capability
    );
}

#[test]
fn a_default_acl_takes_the_place_of_the_umask() {
    let mut client = Client::new();
    let dir = client.mkdir(ROOT, "d", 0o755, 0).unwrap().node;
    // struct posix_acl_xattr_header and three entries (linux/posix_acl_xattr.h): u::rwx, g::rwx, o::r--
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, perm) in [(1u16, 7u16), (4, 7), (0x20, 4)] {
        acl.extend(tag.to_le_bytes());
        acl.extend(perm.to_le_bytes());
        acl.extend(u32::MAX.to_le_bytes());
    }
    client
        .setxattr(dir, "system.posix_acl_default", &acl, 0)
        .unwrap();
    let (file, _) = client.create(dir, "f", libc::O_RDWR, 0o666, 0o077).unwrap();
    assert_eq!(file.attr.mode & 0o777, 0o664);
    let (file, _) = client
        .create(ROOT, "f", libc::O_RDWR, 0o666, 0o077)
        .unwrap();
    assert_eq!(file.attr.mode & 0o777, 0o600);
}

#[test]
fn room_is_allocated_and_holes_are_found() {
    let mut client = Client::new();
    let (file, fh) = client.create(ROOT, "f", libc::O_RDWR, 0o644, 0).unwrap();
    let allocate = FallocateIn {
        fh,
        offset: 0,
        length: 1 << 20,
        mode: 0,
        padding: 0,
    };
    client
        .call(Opcode::Fallocate, file.node, allocate.as_slice())
        .unwrap();
    let attr = client.getattr(file.node).unwrap();
    assert_eq!((attr.size, attr.blocks), (1 << 20, 2048));
    let (sparse, fh) = client.create(ROOT, "s", libc::O_RDWR, 0o644, 0).unwrap();
    client.write(sparse.node, fh, 1 << 20, b"x").unwrap();
    let mut seek = |offset, whence: i32| {
        let request = LseekIn {
            fh,
            offset,
            whence: whence as u32,
            padding: 0,
        };
        client
            .call(Opcode::Lseek, sparse.node, request.as_slice())
            .map(|reply| take::<LseekOut>(&reply).offset)
    };
    assert_eq!(seek(0, libc::SEEK_DATA), Ok(1 << 20));
    assert_eq!(seek(0, libc::SEEK_HOLE), Ok(0));
    assert_eq!(seek(1 << 30, libc::SEEK_DATA), Err(libc::ENXIO));
    assert_eq!(seek(0, libc::SEEK_END), Err(libc::EINVAL));
    assert_eq!(seek(0, 77), Err(libc::EINVAL));
}

#[test]
fn files_and_directories_are_synced_and_closed() {
    let mut client = Client::new();
    let (file, fh) = client.create(ROOT, "f", libc::O_RDWR, 0o644, 0).unwrap();
    for fsync_flags in [0, FSYNC_FDATASYNC] {
        let request = FsyncIn {
            fh,
            fsync_flags,
            padding: 0,
        };
        client
            .call(Opcode::Fsync, file.node, request.as_slice())
            .unwrap();
    }
    let flush = FlushIn {
        fh,
        ..FlushIn::default()
    };
    client
        .call(Opcode::Flush, file.node, flush.as_slice())
        .unwrap();
    client.read(file.node, fh, 0, 1).unwrap();
    let fh = client.opendir(ROOT).unwrap();
    let request = FsyncIn {
        fh,
        ..FsyncIn::default()
    };
    client
        .call(Opcode::Fsyncdir, ROOT, request.as_slice())
        .unwrap();
}

#[test]
fn the_file_system_reports_its_room() {
    let mut client = Client::new();
    let reply = client.call(Opcode::Statfs, ROOT, &[]).unwrap();
    let stat: Kstatfs = take(&reply);
    let host = nix::sys::statvfs::statvfs(client.dir.path()).unwrap();
    assert_eq!(stat.blocks, host.blocks());
    assert_eq!(u64::from(stat.namelen), host.name_max());
}

/// Makes the file `at` on the host look modified so many seconds ago.
fn age(client: &Client, at: &str, seconds: u64) {
    let file = fs::File::options()
        .write(true)
        .open(client.host(at))
        .unwrap();
    let then = SystemTime::now() - Duration::from_secs(seconds);
    file.set_modified(then).unwrap();
}

/// Whether the guest may keep what it has cached of `file` when it opens it.
fn keeps_cache(client: &mut Client, file: u64) -> bool {
    let open = client.open(file, libc::O_RDONLY).unwrap();
    client.release(file, open.fh).unwrap();
    OpenOptions::from_bits_truncate(open.open_flags).contains(OpenOptions::KEEP_CACHE)
}

#[test]
fn what_changes_on_the_host_is_seen_at_the_next_open() {
    let mut client = Client::new();
    fs::write(client.host("a"), b"one").unwrap();
    age(&client, "a", 100);
    let file = client.lookup(ROOT, "a").unwrap().node;
    assert!(
        !keeps_cache(&mut client, file),
        "nothing is cached at first"
    );
    assert!(keeps_cache(&mut client, file), "nothing has changed");
    fs::write(client.host("a"), b"two").unwrap();
    age(&client, "a", 90);
    assert!(!keeps_cache(&mut client, file), "the time has changed");
    assert!(keeps_cache(&mut client, file));
}

#[test]
fn a_file_modified_a_moment_ago_may_be_modified_again_at_the_same_time() {
    let mut client = Client::new();
    fs::write(client.host("a"), b"one").unwrap();
    let file = client.lookup(ROOT, "a").unwrap().node;
    for seconds in [0, 1] {
        age(&client, "a", seconds);
        assert!(!keeps_cache(&mut client, file));
        assert!(!keeps_cache(&mut client, file));
    }
}

#[test]
fn a_file_replaced_on_the_host_is_another_file() {
    let mut client = Client::new();
    fs::write(client.host("a"), b"one").unwrap();
    let old = client.lookup(ROOT, "a").unwrap().node;
    fs::write(client.host("b"), b"two").unwrap();
    fs::rename(client.host("b"), client.host("a")).unwrap();
    let new = client.lookup(ROOT, "a").unwrap().node;
    assert_ne!(old, new);
    let fh = client.open(new, libc::O_RDONLY).unwrap().fh;
    assert_eq!(client.read(new, fh, 0, 9).unwrap(), b"two");
    assert_eq!(client.getattr(old).unwrap().nlink, 0);
}

#[test]
fn names_and_attributes_are_believed_for_a_second_and_absence_is_not() {
    let mut client = Client::new();
    fs::write(client.host("a"), b"").unwrap();
    let reply = client.call(Opcode::Lookup, ROOT, &name("a")).unwrap();
    let entry: EntryOut = take(&reply);
    assert_eq!((entry.entry_valid, entry.entry_valid_nsec), (1, 0));
    assert_eq!((entry.attr_valid, entry.attr_valid_nsec), (1, 0));
    assert_eq!(client.lookup(ROOT, "b").unwrap_err(), libc::ENOENT);
}

#[test]
fn only_files_that_may_have_been_written_are_flushed() {
    let mut client = Client::new();
    fs::write(client.host("a"), b"").unwrap();
    let file = client.lookup(ROOT, "a").unwrap().node;
    let noflush = |open: OpenOut| open.open_flags & (1 << 5) != 0;
    assert!(noflush(client.open(file, libc::O_RDONLY).unwrap()));
    assert!(!noflush(client.open(file, libc::O_WRONLY).unwrap()));
    assert!(!noflush(client.open(file, libc::O_RDWR).unwrap()));
}
