//! What no guest kernel would send.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::time::Instant;

use fuse_backend_rs::abi::fuse_abi::*;
use vm_memory::ByteValued;

use super::client::*;

/// A file outside the shared directory and a link to it inside.
fn with_way_out() -> (Client, tempfile::TempDir, u64) {
    let mut client = Client::new();
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    fs::write(&secret, b"secret").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    symlink(&secret, client.host("out")).unwrap();
    symlink(outside.path(), client.host("outdir")).unwrap();
    let link = client.lookup(ROOT, "out").unwrap();
    assert_eq!(link.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    (client, outside, link.node)
}

/// The file outside is as it was.
fn untouched(outside: &tempfile::TempDir) {
    let secret = outside.path().join("secret");
    assert_eq!(fs::read(&secret).unwrap(), b"secret");
    let stat = fs::metadata(&secret).unwrap();
    assert_eq!(
        (stat.mode() & 0o7777, stat.uid(), stat.nlink()),
        (0o600, 0, 1)
    );
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
}

#[test]
fn a_link_is_never_followed_on_the_host() {
    let (mut client, outside, link) = with_way_out();
    let target = client.readlink(link).unwrap();
    assert!(target.ends_with(b"/secret"), "the guest follows it itself");
    let outdir = client.lookup(ROOT, "outdir").unwrap().node;
    assert_eq!(client.lookup(outdir, "secret").unwrap_err(), libc::ENOTDIR);
    assert_eq!(client.opendir(outdir), Err(libc::ENOTDIR));
    assert_eq!(
        client.mkdir(outdir, "d", 0o755, 0).unwrap_err(),
        libc::ENOTDIR
    );
    assert_eq!(client.unlink(outdir, "secret"), Err(libc::ENOTDIR));
    assert_eq!(
        client.rename((outdir, "secret"), (ROOT, "x"), 0),
        Err(libc::ENOTDIR)
    );
    for flags in [
        libc::O_RDONLY,
        libc::O_RDWR | libc::O_TRUNC,
        libc::O_NOFOLLOW,
    ] {
        assert_eq!(client.open(link, flags).unwrap_err(), libc::ELOOP);
        let made = client.create(ROOT, "out", flags, 0o666, 0);
        assert_eq!(made.unwrap_err(), libc::ELOOP);
    }
    assert_eq!(
        client.setxattr(link, "user.a", b"", 0),
        Err(libc::EOPNOTSUPP)
    );
    assert_eq!(client.getxattr(link, "user.a", 9), Err(libc::EOPNOTSUPP));
    assert_eq!(client.listxattr(link, 99).unwrap(), b"");
    let set = |valid: SetattrValid| SetattrIn {
        valid: valid.bits(),
        mode: 0o777,
        uid: 9,
        gid: 9,
        ..SetattrIn::default()
    };
    assert_eq!(
        client.setattr(link, set(SetattrValid::SIZE)).unwrap_err(),
        libc::ELOOP
    );
    client.setattr(link, set(SetattrValid::MODE)).unwrap_err();
    client
        .setattr(link, set(SetattrValid::ATIME | SetattrValid::MTIME))
        .unwrap();
    let attr = client
        .setattr(link, set(SetattrValid::UID | SetattrValid::GID))
        .unwrap();
    assert_eq!(attr.uid, 9, "the link's own owner");
    client.link(link, ROOT, "out2").unwrap();
    assert!(
        fs::symlink_metadata(client.host("out2"))
            .unwrap()
            .is_symlink()
    );
    untouched(&outside);
}

#[test]
fn flags_that_change_what_an_open_means_are_not_passed_on() {
    let (mut client, outside, _) = with_way_out();
    // O_PATH would make the host ignore O_CREAT and O_EXCL, and follow the link.
    let made = client.create(ROOT, "out", libc::O_PATH, 0o666, 0);
    assert_eq!(made.unwrap_err(), libc::ELOOP);
    let made = client.create(ROOT, "out", libc::O_PATH | libc::O_EXCL, 0o666, 0);
    assert_eq!(made.unwrap_err(), libc::EEXIST);
    let (file, _) = client.create(ROOT, "f", libc::O_RDWR, 0o666, 0).unwrap();
    for flags in [
        libc::O_TMPFILE,
        libc::O_CREAT,
        libc::O_PATH,
        libc::O_DIRECT,
        libc::O_DIRECTORY,
        libc::O_ASYNC,
        i32::MAX & !libc::O_ACCMODE,
    ] {
        let open = client.open(file.node, flags | libc::O_RDWR).unwrap();
        client.write(file.node, open.fh, 0, b"x").unwrap();
        assert_eq!(client.open(ROOT, flags).unwrap_err(), libc::EISDIR);
    }
    assert_eq!(client.open(file.node, 3).unwrap_err(), libc::EINVAL);
    let made = client.create(ROOT, "g", 3, 0o666, 0);
    assert_eq!(made.unwrap_err(), libc::EINVAL);
    assert_eq!(fs::read_dir(client.dir.path()).unwrap().count(), 3);
    untouched(&outside);
}

#[test]
fn the_hosts_devices_fifos_and_sockets_are_never_opened() {
    let mut client = Client::new();
    client
        .mknod(ROOT, "null", libc::S_IFCHR | 0o666, (1 << 8) | 3)
        .unwrap();
    client
        .mknod(ROOT, "disk", libc::S_IFBLK | 0o666, 7 << 8)
        .unwrap();
    client
        .mknod(ROOT, "fifo", libc::S_IFIFO | 0o666, 0)
        .unwrap();
    let listener = UnixListener::bind(client.host("socket")).unwrap();
    listener.set_nonblocking(true).unwrap();
    let start = Instant::now();
    for at in ["null", "disk", "fifo", "socket"] {
        let node = client.lookup(ROOT, at).unwrap().node;
        for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR | libc::O_TRUNC] {
            assert_eq!(client.open(node, flags).unwrap_err(), libc::ENXIO, "{at}");
            let made = client.create(ROOT, at, flags, 0o666, 0);
            assert_eq!(made.unwrap_err(), libc::ENXIO, "{at}");
        }
        assert_eq!(client.opendir(node), Err(libc::ENOTDIR));
        let truncate = SetattrIn {
            valid: SetattrValid::SIZE.bits(),
            ..SetattrIn::default()
        };
        assert_eq!(client.setattr(node, truncate).unwrap_err(), libc::ENXIO);
        assert_eq!(client.getxattr(node, "user.a", 9), Err(libc::EOPNOTSUPP));
        let set = SetattrIn {
            valid: (SetattrValid::MODE | SetattrValid::UID).bits(),
            mode: 0o640,
            uid: 3,
            ..SetattrIn::default()
        };
        let attr = client.setattr(node, set).unwrap();
        assert_eq!((attr.mode & 0o7777, attr.uid), (0o640, 3));
    }
    assert!(
        start.elapsed().as_secs() < 5,
        "nothing has waited for a writer"
    );
    assert!(listener.accept().is_err(), "nothing has connected");
}

#[test]
fn names_of_more_than_one_component_are_refused_everywhere() {
    let mut client = Client::new();
    fs::create_dir(client.host("d")).unwrap();
    fs::write(client.host("d/f"), b"").unwrap();
    let dir = client.lookup(ROOT, "d").unwrap().node;
    let file = client.lookup(dir, "f").unwrap().node;
    for bad in [
        "",
        ".",
        "..",
        "/",
        "a/b",
        "../x",
        "d/f",
        "/etc/passwd",
        "f/",
    ] {
        for parent in [ROOT, dir] {
            assert_eq!(client.lookup(parent, bad).unwrap_err(), libc::EINVAL);
            assert_eq!(
                client.mkdir(parent, bad, 0o755, 0).unwrap_err(),
                libc::EINVAL
            );
            let made = client.mknod(parent, bad, libc::S_IFREG | 0o644, 0);
            assert_eq!(made.unwrap_err(), libc::EINVAL);
            let made = client.create(parent, bad, libc::O_RDWR, 0o644, 0);
            assert_eq!(made.unwrap_err(), libc::EINVAL);
            assert_eq!(client.unlink(parent, bad), Err(libc::EINVAL));
            assert_eq!(client.rmdir(parent, bad), Err(libc::EINVAL));
            assert_eq!(client.link(file, parent, bad).unwrap_err(), libc::EINVAL);
            assert_eq!(client.symlink(parent, bad, "t").unwrap_err(), libc::EINVAL);
            let moved = client.rename((parent, bad), (ROOT, "x"), 0);
            assert_eq!(moved, Err(libc::EINVAL));
            let moved = client.rename((dir, "f"), (parent, bad), 0);
            assert_eq!(moved, Err(libc::EINVAL));
        }
    }
    assert!(client.host("d/f").exists());
    assert_eq!(fs::read_dir(client.dir.path()).unwrap().count(), 1);
}

#[test]
fn names_without_an_end_or_too_long_are_refused() {
    let mut client = Client::new();
    for opcode in [Opcode::Lookup, Opcode::Unlink, Opcode::Rmdir] {
        for bad in [&b""[..], b"a", b"abc", &[b'x'; 5000]] {
            assert_eq!(client.call(opcode, ROOT, bad), Err(libc::EIO), "{opcode:?}");
        }
    }
    let long = "x".repeat(256);
    assert_eq!(client.lookup(ROOT, &long).unwrap_err(), libc::ENAMETOOLONG);
    let huge = "x".repeat(1 << 19);
    assert_eq!(
        client.mkdir(ROOT, &huge, 0o755, 0).unwrap_err(),
        libc::ENAMETOOLONG
    );
    assert_eq!(
        client.symlink(ROOT, "s", &huge).unwrap_err(),
        libc::ENAMETOOLONG
    );
    assert_eq!(client.symlink(ROOT, "s", "").unwrap_err(), libc::ENOENT);
    // Two names where the second is missing or has no end.
    for bad in [&b"a\0"[..], b"a\0b", b"a", b"\0", b""] {
        assert!(client.call(Opcode::Symlink, ROOT, bad).is_err(), "{bad:?}");
        let request = body(RenameIn { newdir: ROOT }, bad);
        assert!(
            client.call(Opcode::Rename, ROOT, &request).is_err(),
            "{bad:?}"
        );
    }
    client.mkdir(ROOT, &"y".repeat(255), 0o755, 0).unwrap();
    assert_eq!(fs::read_dir(client.dir.path()).unwrap().count(), 1);
}

#[test]
fn forged_numbers_name_nothing() {
    let mut client = Client::new();
    fs::write(client.host("f"), b"x").unwrap();
    let file = client.lookup(ROOT, "f").unwrap().node;
    for node in [0, file + 1, 1 << 32, u64::MAX - 1, u64::MAX] {
        assert_eq!(client.getattr(node).unwrap_err(), libc::ESTALE);
        assert_eq!(client.lookup(node, "f").unwrap_err(), libc::ESTALE);
        assert_eq!(client.open(node, 0).unwrap_err(), libc::ESTALE);
        assert_eq!(client.opendir(node), Err(libc::ESTALE));
        assert_eq!(client.readlink(node), Err(libc::ESTALE));
        assert_eq!(client.unlink(node, "f"), Err(libc::ESTALE));
        assert_eq!(client.link(node, ROOT, "x").unwrap_err(), libc::ESTALE);
        assert_eq!(client.link(file, node, "x").unwrap_err(), libc::ESTALE);
        assert_eq!(
            client.rename((ROOT, "f"), (node, "x"), 0),
            Err(libc::ESTALE)
        );
        assert_eq!(client.getxattr(node, "user.a", 1), Err(libc::ESTALE));
        assert_eq!(client.call(Opcode::Statfs, node, &[]), Err(libc::ESTALE));
        let set = SetattrIn {
            valid: SetattrValid::all().bits(),
            ..SetattrIn::default()
        };
        assert_eq!(client.setattr(node, set).unwrap_err(), libc::ESTALE);
    }
    // A file where a directory belongs.
    assert_eq!(client.lookup(file, "f").unwrap_err(), libc::ENOTDIR);
    assert_eq!(
        client.mkdir(file, "d", 0o755, 0).unwrap_err(),
        libc::ENOTDIR
    );
    assert_eq!(client.link(file, file, "x").unwrap_err(), libc::ENOTDIR);
}

#[test]
fn a_handle_is_good_only_for_what_it_was_opened_on() {
    let mut client = Client::new();
    fs::write(client.host("f"), b"x").unwrap();
    fs::write(client.host("g"), b"y").unwrap();
    let f = client.lookup(ROOT, "f").unwrap().node;
    let g = client.lookup(ROOT, "g").unwrap().node;
    let fh = client.open(f, libc::O_RDWR).unwrap().fh;
    let dh = client.opendir(ROOT).unwrap();
    for (node, fh) in [
        (g, fh),
        (ROOT, fh),
        (f, 0),
        (f, fh + 9),
        (f, u64::MAX),
        (ROOT, dh),
        (f, dh),
    ] {
        assert_eq!(client.read(node, fh, 0, 1), Err(libc::EBADF));
        assert_eq!(client.write(node, fh, 0, b"z"), Err(libc::EBADF));
        let allocate = FallocateIn {
            fh,
            length: 1,
            ..FallocateIn::default()
        };
        let reply = client.call(Opcode::Fallocate, node, allocate.as_slice());
        assert_eq!(reply, Err(libc::EBADF));
        let seek = LseekIn {
            fh,
            whence: libc::SEEK_DATA as u32,
            ..LseekIn::default()
        };
        let reply = client.call(Opcode::Lseek, node, seek.as_slice());
        assert_eq!(reply, Err(libc::EBADF));
        let flush = FlushIn {
            fh,
            ..FlushIn::default()
        };
        let reply = client.call(Opcode::Flush, node, flush.as_slice());
        assert_eq!(reply, Err(libc::EBADF));
    }
    assert_eq!(client.release(g, fh), Err(libc::EBADF));
    assert_eq!(
        client.list(f, fh, 0, 4096, false).unwrap_err(),
        libc::ENOTDIR
    );
    assert_eq!(client.list(f, dh, 0, 4096, true).unwrap_err(), libc::EBADF);
    let by_handle = GetattrIn {
        flags: GETATTR_FH,
        fh: fh + 9,
        ..GetattrIn::default()
    };
    let reply = client.call(Opcode::Getattr, f, by_handle.as_slice());
    assert_eq!(reply, Err(libc::EBADF));
    client.release(f, fh).unwrap();
    assert_eq!(client.release(f, fh), Err(libc::EBADF));
    assert_eq!(fs::read(client.host("f")).unwrap(), b"x");
}

#[test]
fn a_file_opened_to_be_read_cannot_be_written_and_the_other_way_round() {
    let mut client = Client::new();
    fs::write(client.host("f"), b"x").unwrap();
    let file = client.lookup(ROOT, "f").unwrap().node;
    let read = client.open(file, libc::O_RDONLY).unwrap().fh;
    let write = client.open(file, libc::O_WRONLY).unwrap().fh;
    assert_eq!(client.write(file, read, 0, b"y"), Err(libc::EBADF));
    assert_eq!(client.read(file, write, 0, 1), Err(libc::EBADF));
    let truncate = SetattrIn {
        valid: SetattrValid::SIZE.bits() | FATTR_FH,
        fh: read,
        ..SetattrIn::default()
    };
    assert_eq!(client.setattr(file, truncate).unwrap_err(), libc::EINVAL);
    assert_eq!(fs::read(client.host("f")).unwrap(), b"x");
}

#[test]
fn sizes_of_gigabytes_are_answered_without_gigabytes() {
    let mut client = Client::new();
    let (file, fh) = client.create(ROOT, "f", libc::O_RDWR, 0o644, 0).unwrap();
    client.setxattr(file.node, "user.a", b"value", 0).unwrap();
    for size in [65537, 1 << 30, u32::MAX] {
        assert_eq!(
            client.getxattr(file.node, "user.a", size).unwrap(),
            b"value"
        );
        assert!(
            client
                .listxattr(file.node, size)
                .unwrap()
                .ends_with(b"user.a\0")
        );
    }
    let dh = client.opendir(ROOT).unwrap();
    let read = |fh, offset, size| ReadIn {
        fh,
        offset,
        size,
        ..ReadIn::default()
    };
    for size in [4097, 1 << 30, u32::MAX] {
        // The reply has room for 4096 bytes.
        let request = read(fh, 0, size);
        let reply = client.call_for(Opcode::Read as u32, file.node, request.as_slice(), 4096);
        assert!(reply.is_err());
        for opcode in [Opcode::Readdir, Opcode::Readdirplus] {
            let request = read(dh, 0, size.saturating_add(100));
            let reply = client.call_for(opcode as u32, ROOT, request.as_slice(), 4096);
            assert_eq!(reply, Err(libc::ENOMEM));
        }
    }
    let write = WriteIn {
        fh,
        size: u32::MAX,
        ..WriteIn::default()
    };
    let reply = client
        .call(Opcode::Write, file.node, &body(write, b"four"))
        .unwrap();
    assert_eq!(
        take::<WriteOut>(&reply).size,
        4,
        "what was there to be written"
    );
    for size in [0, 4, u32::MAX] {
        let head = SetxattrIn { size, flags: 0 };
        let request = body(head, b"user.b\0value");
        assert_eq!(
            client.call(Opcode::Setxattr, file.node, &request),
            Err(libc::EIO)
        );
    }
    for count in [1, 65_000, 66_000, u32::MAX] {
        let head = BatchForgetIn { count, dummy: 0 };
        client.tell(Opcode::BatchForget, 0, head.as_slice());
    }
    for in_size in [1, 4096, u32::MAX] {
        let ioctl = IoctlIn {
            in_size,
            out_size: u32::MAX,
            ..IoctlIn::default()
        };
        let reply = client.call(Opcode::Ioctl, file.node, ioctl.as_slice());
        assert_eq!(reply, Err(libc::ENOTTY));
    }
}

#[test]
fn offsets_at_the_ends_of_their_range_are_errors() {
    let mut client = Client::new();
    let (file, fh) = client.create(ROOT, "f", libc::O_RDWR, 0o644, 0).unwrap();
    let dh = client.opendir(ROOT).unwrap();
    for offset in [1 << 63, u64::MAX - 1, u64::MAX] {
        assert_eq!(client.read(file.node, fh, offset, 10), Err(libc::EINVAL));
        assert_eq!(client.write(file.node, fh, offset, b"x"), Err(libc::EINVAL));
        assert_eq!(
            client.list(ROOT, dh, offset, 4096, false).unwrap_err(),
            libc::EINVAL
        );
        for (offset, length) in [(offset, 1), (0, offset), (offset, offset), (0, 0)] {
            let allocate = FallocateIn {
                fh,
                offset,
                length,
                ..FallocateIn::default()
            };
            let reply = client.call(Opcode::Fallocate, file.node, allocate.as_slice());
            assert_eq!(reply, Err(libc::EINVAL));
        }
        for whence in [libc::SEEK_DATA, libc::SEEK_HOLE] {
            let seek = LseekIn {
                fh,
                offset,
                whence: whence as u32,
                padding: 0,
            };
            assert!(
                client
                    .call(Opcode::Lseek, file.node, seek.as_slice())
                    .is_err()
            );
        }
        let truncate = SetattrIn {
            valid: SetattrValid::SIZE.bits(),
            size: offset,
            ..SetattrIn::default()
        };
        assert_eq!(
            client.setattr(file.node, truncate).unwrap_err(),
            libc::EFBIG
        );
    }
    let far = i64::MAX as u64;
    assert_eq!(client.write(file.node, fh, far, b"xy"), Err(libc::EINVAL));
    assert_eq!(client.getattr(file.node).unwrap().size, 0);
}

#[test]
fn owners_times_and_modes_at_the_ends_of_their_range_do_no_harm() {
    let mut client = Client::new();
    let (file, _) = client.create(ROOT, "f", libc::O_RDWR, 0o644, 0).unwrap();
    let set = |valid: SetattrValid| SetattrIn {
        valid: valid.bits(),
        mode: u32::MAX,
        uid: u32::MAX,
        gid: u32::MAX,
        atime: u64::MAX,
        atimensec: u32::MAX,
        mtime: u64::MAX,
        mtimensec: 1_000_000_000,
        ..SetattrIn::default()
    };
    for valid in [
        SetattrValid::UID,
        SetattrValid::GID,
        SetattrValid::ATIME,
        SetattrValid::MTIME,
    ] {
        let reply = client.setattr(file.node, set(valid));
        assert_eq!(reply.unwrap_err(), libc::EINVAL, "{valid:?}");
    }
    let attr = client.setattr(file.node, set(SetattrValid::MODE)).unwrap();
    assert_eq!(attr.mode, libc::S_IFREG | 0o7777);
    client.uid = u32::MAX;
    let made = client.create(ROOT, "g", libc::O_RDWR, 0o644, 0);
    assert_eq!(made.unwrap_err(), libc::EINVAL);
    client.uid = 0;
    client.gid = u32::MAX;
    assert_eq!(client.mkdir(ROOT, "g", 0o755, 0).unwrap_err(), libc::EINVAL);
    assert!(!client.host("g").exists());
    client.gid = 0;
    // Still root, with all capabilities.
    client.mkdir(ROOT, "d", u32::MAX, 0).unwrap();
    assert_eq!(fs::metadata(client.host("d")).unwrap().uid(), 0);
    client.mkdir(ROOT, "e", 0o777, u32::MAX).unwrap();
    assert_eq!(fs::metadata(client.host("e")).unwrap().mode() & 0o777, 0);
    fs::set_permissions(client.host("e"), fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn attributes_that_mean_something_to_the_host_cannot_be_written() {
    let mut client = Client::new();
    let (file, _) = client.create(ROOT, "f", libc::O_RDWR, 0o644, 0).unwrap();
    for at in [
        "security.selinux",
        "security.ima",
        "security.evm",
        "security.SMACK64",
        "system.sockprotoname",
        "btrfs.compression",
        "",
        "user",
    ] {
        assert_eq!(
            client.setxattr(file.node, at, b"x", 0),
            Err(libc::EOPNOTSUPP),
            "{at}"
        );
        let removed = client.call(Opcode::Removexattr, file.node, &name(at));
        assert_eq!(removed, Err(libc::EOPNOTSUPP), "{at}");
    }
    let long = format!("user.{}", "x".repeat(300));
    assert_eq!(
        client.setxattr(file.node, &long, b"x", 0),
        Err(libc::ERANGE)
    );
    let large = vec![0; 65537];
    let set = client.setxattr(file.node, "user.a", &large, 0);
    assert_eq!(set, Err(libc::E2BIG));
    assert_eq!(
        client.setxattr(file.node, "user.a", b"", -1),
        Err(libc::EINVAL)
    );
    assert_eq!(client.listxattr(file.node, 99).unwrap(), b"");
}

#[test]
fn requests_of_other_kinds_are_politely_refused() {
    let mut client = Client::new();
    let (file, fh) = client.create(ROOT, "f", libc::O_RDWR, 0o644, 0).unwrap();
    for opcode in [
        0,
        7,
        19,
        47,
        50,
        51,
        52,
        53,
        100,
        4096,
        436_207_616,
        u32::MAX,
    ] {
        let reply = client.call_for(opcode, file.node, &[0; 100], 4096);
        assert_eq!(reply, Err(libc::ENOSYS), "{opcode}");
    }
    let lock = LkIn {
        fh,
        ..LkIn::default()
    };
    for opcode in [Opcode::Getlk, Opcode::Setlk, Opcode::Setlkw] {
        assert_eq!(
            client.call(opcode, file.node, lock.as_slice()),
            Err(libc::ENOSYS)
        );
    }
    for (opcode, errno) in [
        (Opcode::Access, libc::ENOSYS),
        (Opcode::Bmap, libc::ENOSYS),
        (Opcode::Poll, libc::ENOSYS),
        (Opcode::NotifyReply, libc::ENOSYS),
        (Opcode::SetupMapping, libc::EINVAL),
        (Opcode::RemoveMapping, libc::EINVAL),
    ] {
        assert_eq!(
            client.call(opcode, file.node, &[0xff; 100]),
            Err(errno),
            "{opcode:?}"
        );
    }
    let header = client.header(Opcode::Interrupt as u32, 0, 8);
    assert_eq!(client.send(header, &[0; 8], 100), None);
    for major in [0, 6, 8, u32::MAX] {
        let init = InitIn {
            major,
            minor: u32::MAX,
            max_readahead: u32::MAX,
            flags: u32::MAX,
        };
        let request = body(init, InitIn2::default().as_slice());
        let reply = client.call(Opcode::Init, 0, &request);
        assert_eq!(reply.is_ok(), major > 7, "{major}");
    }
}
