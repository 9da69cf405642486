//! Mounts below the shared directory: volumes, and a root file system that is an overlay.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use fuse_backend_rs::abi::fuse_abi::*;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::client::*;
use crate::FsLimits;

/// Runs a test in a mount namespace of its own.
pub fn privately(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let ran = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).unwrap();
            let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).unwrap();
            test();
        });
        ran.join().unwrap();
    });
}

/// Mounts an empty file system at `at`.
pub fn tmpfs(at: &Path) {
    let data = Some("size=32m");
    mount(Some("test"), at, Some("tmpfs"), MsFlags::empty(), data).unwrap();
}

fn bind(from: &Path, at: &Path, read_only: bool) {
    mount(Some(from), at, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    if read_only {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, at, None::<&str>, flags, None::<&str>).unwrap();
    }
}

/// Whether the guest is told that `at` in the root is a file system of its own.
fn is_submount(client: &mut Client, at: &str) -> bool {
    client.lookup(ROOT, at).unwrap().attr.flags & ATTR_SUBMOUNT != 0
}

#[test]
fn a_mounted_directory_is_announced_and_another_is_not() {
    privately(|| {
        let mut client = Client::new();
        for at in ["plain", "mounted", "bound"] {
            fs::create_dir(client.host(at)).unwrap();
        }
        tmpfs(&client.host("mounted"));
        bind(&client.host("plain"), &client.host("bound"), false);
        fs::create_dir(client.host("mounted/sub")).unwrap();
        fs::write(client.host("file"), b"").unwrap();
        assert!(is_submount(&mut client, "mounted"));
        assert!(is_submount(&mut client, "bound"));
        assert!(!is_submount(&mut client, "plain"));
        assert!(!is_submount(&mut client, "file"));
        let sub = client.walk("mounted/sub").unwrap();
        assert_eq!(sub.attr.flags & ATTR_SUBMOUNT, 0);
        let listed = client.list_all(ROOT, 4096, true);
        assert_eq!(listed.len(), 6);
    });
}

#[test]
fn files_of_one_inode_number_on_two_file_systems_are_two_files() {
    privately(|| {
        let mut client = Client::new();
        let mut nodes = Vec::new();
        let mut inos = Vec::new();
        for at in ["one", "two"] {
            fs::create_dir(client.host(at)).unwrap();
            tmpfs(&client.host(at));
            fs::write(client.host(at).join("f"), at).unwrap();
            let file = client.walk(&format!("{at}/f")).unwrap();
            inos.push(file.attr.ino);
            nodes.push(file.node);
        }
        assert_eq!(inos[0], inos[1], "tmpfs numbers from the start");
        assert_ne!(nodes[0], nodes[1]);
        for (node, text) in nodes.into_iter().zip(["one", "two"]) {
            let fh = client.open(node, libc::O_RDONLY).unwrap().fh;
            assert_eq!(client.read(node, fh, 0, 9).unwrap(), text.as_bytes());
        }
    });
}

#[test]
fn a_read_only_volume_stays_read_only_beside_a_writable_one_of_the_same_directory() {
    privately(|| {
        let mut client = Client::new();
        let source = tempfile::tempdir().unwrap();
        fs::write(source.path().join("f"), b"text").unwrap();
        for (at, read_only) in [("ro", true), ("rw", false)] {
            fs::create_dir(client.host(at)).unwrap();
            bind(source.path(), &client.host(at), read_only);
        }
        let writable = client.walk("rw/f").unwrap().node;
        let fixed = client.walk("ro/f").unwrap().node;
        assert_ne!(writable, fixed);
        let dir = client.lookup(ROOT, "ro").unwrap().node;
        let refused = [
            client.open(fixed, libc::O_RDWR).unwrap_err(),
            client
                .create(dir, "f", libc::O_WRONLY, 0o644, 0)
                .unwrap_err(),
            client.create(dir, "n", libc::O_RDWR, 0o644, 0).unwrap_err(),
            client.mkdir(dir, "d", 0o755, 0).unwrap_err(),
            client.unlink(dir, "f").unwrap_err(),
            client.rename((dir, "f"), (dir, "g"), 0).unwrap_err(),
            client.setxattr(fixed, "user.x", b"", 0).unwrap_err(),
            client
                .setattr(
                    fixed,
                    SetattrIn {
                        valid: SetattrValid::MODE.bits(),
                        ..SetattrIn::default()
                    },
                )
                .unwrap_err(),
            client
                .setattr(
                    fixed,
                    SetattrIn {
                        valid: SetattrValid::SIZE.bits(),
                        ..SetattrIn::default()
                    },
                )
                .unwrap_err(),
        ];
        assert_eq!(refused, [libc::EROFS; 9]);
        let fh = client.open(writable, libc::O_RDWR).unwrap().fh;
        client.write(writable, fh, 0, b"TEXT").unwrap();
        let fh = client.open(fixed, libc::O_RDONLY).unwrap().fh;
        assert_eq!(client.read(fixed, fh, 0, 9).unwrap(), b"TEXT");
    });
}

#[test]
fn a_file_can_be_a_volume_and_names_do_not_cross_mounts() {
    privately(|| {
        let mut client = Client::new();
        let source = tempfile::tempdir().unwrap();
        let there = source.path().join("a name with spaces");
        fs::write(&there, b"volume").unwrap();
        fs::write(client.host("point"), b"").unwrap();
        bind(&there, &client.host("point"), false);
        let file = client.lookup(ROOT, "point").unwrap().node;
        let fh = client.open(file, libc::O_RDWR).unwrap().fh;
        assert_eq!(client.read(file, fh, 0, 9).unwrap(), b"volume");
        client.write(file, fh, 0, b"VOL").unwrap();
        assert_eq!(fs::read(&there).unwrap(), b"VOLume");
        assert_eq!(client.unlink(ROOT, "point"), Err(libc::EBUSY));
        let moved = client.rename((ROOT, "point"), (ROOT, "x"), 0);
        assert_eq!(moved, Err(libc::EBUSY));
        assert_eq!(client.link(file, ROOT, "y").unwrap_err(), libc::EXDEV);
        fs::create_dir(client.host("dir")).unwrap();
        tmpfs(&client.host("dir"));
        fs::write(client.host("other"), b"").unwrap();
        let dir = client.lookup(ROOT, "dir").unwrap().node;
        let moved = client.rename((ROOT, "other"), (dir, "x"), 0);
        assert_eq!(moved, Err(libc::EXDEV));
    });
}

#[test]
fn a_file_on_a_mount_is_found_again_by_its_name() {
    privately(|| {
        let mut client = Client::with(FsLimits {
            descriptors: 4,
            ..WIDE
        });
        fs::create_dir(client.host("a volume")).unwrap();
        tmpfs(&client.host("a volume"));
        fs::create_dir_all(client.host("a volume/x/y")).unwrap();
        fs::write(client.host("a volume/x/y/f"), b"deep").unwrap();
        let file = client.walk("a volume/x/y/f").unwrap().node;
        for i in 0..20 {
            fs::write(client.host(format!("{i}")), b"").unwrap();
            client.lookup(ROOT, &i.to_string()).unwrap();
        }
        let fh = client.open(file, libc::O_RDONLY).unwrap().fh;
        assert_eq!(client.read(file, fh, 0, 9).unwrap(), b"deep");
        assert!(client.fs.usage().descriptors <= 4);
    });
}

#[test]
fn a_file_is_the_same_before_and_after_an_overlay_copies_it_up() {
    privately(|| {
        // Without an index, the copy of a file with several names in its layer has an inode number of its own.
        let below = tempfile::tempdir().unwrap();
        let above = tempfile::tempdir().unwrap();
        tmpfs(below.path());
        tmpfs(above.path());
        for at in ["upper", "work"] {
            fs::create_dir(above.path().join(at)).unwrap();
        }
        for at in ["opened", "changed", "linked", "moved", "named"] {
            fs::write(below.path().join(at), b"lower").unwrap();
            let twin = below.path().join(format!("{at}-twin"));
            fs::hard_link(below.path().join(at), twin).unwrap();
        }
        let mut client = Client::new();
        fs::create_dir(client.host("root")).unwrap();
        let options = format!(
            "lowerdir={},upperdir={},workdir={},index=off",
            below.path().display(),
            above.path().join("upper").display(),
            above.path().join("work").display(),
        );
        mount(
            Some("overlay"),
            &client.host("root"),
            Some("overlay"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .unwrap();
        let root = client.lookup(ROOT, "root").unwrap().node;
        let before = |client: &mut Client, at: &str| {
            let host = fs::metadata(client.host("root").join(at)).unwrap();
            (
                client.lookup(root, at).unwrap().node,
                (host.dev(), host.ino()),
            )
        };
        let after = |client: &mut Client, at: &str, (node, id): (u64, (u64, u64))| {
            let host = fs::metadata(client.host("root").join(at)).unwrap();
            assert_ne!((host.dev(), host.ino()), id, "{at} was copied up");
            assert_eq!(client.lookup(root, at).unwrap().node, node, "{at}");
        };
        let was = before(&mut client, "opened");
        let fh = client.open(was.0, libc::O_RDWR).unwrap().fh;
        after(&mut client, "opened", was);
        client.write(was.0, fh, 0, b"UPPER").unwrap();
        assert_eq!(fs::read(client.host("root/opened")).unwrap(), b"UPPER");
        assert_eq!(fs::read(below.path().join("opened")).unwrap(), b"lower");

        let was = before(&mut client, "changed");
        let set = SetattrIn {
            valid: SetattrValid::MODE.bits(),
            mode: 0o600,
            ..SetattrIn::default()
        };
        client.setattr(was.0, set).unwrap();
        after(&mut client, "changed", was);

        let was = before(&mut client, "linked");
        let other = client.link(was.0, root, "second").unwrap().node;
        assert_eq!(other, was.0);
        after(&mut client, "linked", was);

        let was = before(&mut client, "moved");
        client.rename((root, "moved"), (root, "there"), 0).unwrap();
        after(&mut client, "there", was);

        let was = before(&mut client, "named");
        client.setxattr(was.0, "trusted.x", b"", 0).unwrap();
        after(&mut client, "named", was);
    });
}
