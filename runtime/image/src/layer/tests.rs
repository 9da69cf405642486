//! These tests make owners and device nodes, so they need root.

use std::fs;
use std::io::{Cursor, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use rustix::fs::Mode;
use tar::{Builder, EntryType, Header};

use super::*;

struct Target {
    dir: tempfile::TempDir,
}

impl Target {
    fn new() -> Target {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("layer")).unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        fs::write(dir.path().join("outside/file"), "outside").unwrap();
        Target { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("layer").join(name)
    }

    fn unpack(&self, archive: Vec<u8>) -> Result<Implied, LayerError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(self.path(""), flags, Mode::empty()).unwrap();
        let unpacked = unpack(Cursor::new(archive), dir);
        let outside: Vec<_> = fs::read_dir(self.dir.path().join("outside"))
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(outside, ["file"], "something was made outside");
        assert_eq!(
            fs::read(self.dir.path().join("outside/file")).unwrap(),
            b"outside"
        );
        unpacked
    }

    fn is_whiteout(&self, name: &str) -> bool {
        fs::symlink_metadata(self.path(name))
            .is_ok_and(|m| m.file_type().is_char_device() && m.rdev() == 0)
    }

    fn is_opaque(&self, name: &str) -> bool {
        let mut value = [0; 8];
        rustix::fs::lgetxattr(self.path(name), OPAQUE.0, &mut value)
            .is_ok_and(|n| &value[..n] == OPAQUE.1)
    }
}

/// An archive under construction, with names as they are given.
struct Tar(Builder<Vec<u8>>);

impl Tar {
    fn new() -> Tar {
        Tar(Builder::new(Vec::new()))
    }

    fn add(mut self, kind: EntryType, name: &str, mode: u32, link: &str, content: &[u8]) -> Tar {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        header.set_size(content.len() as u64);
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    fn file(self, name: &str, content: &str) -> Tar {
        self.add(EntryType::Regular, name, 0o644, "", content.as_bytes())
    }

    fn dir(self, name: &str) -> Tar {
        self.add(EntryType::Directory, name, 0o755, "", b"")
    }

    fn symlink(self, name: &str, target: &str) -> Tar {
        self.add(EntryType::Symlink, name, 0o777, target, b"")
    }

    fn hard_link(self, name: &str, target: &str) -> Tar {
        self.add(EntryType::Link, name, 0o644, target, b"")
    }

    fn pax(mut self, records: &[(&str, &[u8])]) -> Tar {
        self.0
            .append_pax_extensions(records.iter().copied())
            .unwrap();
        self
    }

    fn end(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

#[test]
fn owners_modes_and_times_are_the_archives_whatever_the_umask() {
    // The thread's own file system state, so that other tests keep their umask.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    let target = Target::new();
    let mut header = Header::new_gnu();
    header.set_path("d/setuid").unwrap();
    header.set_mode(0o104755);
    header.set_uid(3_000_000);
    header.set_gid(1234);
    header.set_mtime(1_234_567_890);
    header.set_size(1);
    header.set_cksum();
    let mut tar = Tar::new().add(EntryType::Directory, "d/", 0o3777, "", b"");
    tar.0.append(&header, &b"x"[..]).unwrap();
    let tar = tar
        .pax(&[("mtime", b"5.25")])
        .add(EntryType::Fifo, "d/fifo", 0o622, "", b"")
        .file("d/e/implied", "");
    let implied = target.unpack(tar.end()).unwrap();

    let file = fs::metadata(target.path("d/setuid")).unwrap();
    assert_eq!(
        (file.mode() & 0o7777, file.uid(), file.gid(), file.mtime()),
        (0o4755, 3_000_000, 1234, 1_234_567_890)
    );
    let dir = fs::metadata(target.path("d")).unwrap();
    assert_eq!((dir.mode() & 0o7777, dir.mtime()), (0o3777, 1_000_000_000));
    let fifo = fs::metadata(target.path("d/fifo")).unwrap();
    assert!(fifo.file_type().is_fifo());
    assert_eq!(
        (fifo.mode() & 0o7777, fifo.mtime(), fifo.mtime_nsec()),
        (0o622, 5, 250_000_000)
    );
    let made = fs::metadata(target.path("d/e")).unwrap();
    assert_eq!(
        (made.mode() & 0o7777, made.uid(), made.gid()),
        (0o755, 0, 0)
    );
    assert_eq!(implied, Implied::from(["".into(), "d/e".into()]));
}

#[test]
fn an_entry_for_the_root_gives_it_its_looks() {
    let target = Target::new();
    let implied = target
        .unpack(
            Tar::new()
                .add(EntryType::Directory, "./", 0o711, "", b"")
                .end(),
        )
        .unwrap();
    let root = fs::metadata(target.path("")).unwrap();
    assert_eq!(
        (root.mode() & 0o7777, root.mtime(), implied.len()),
        (0o711, 1_000_000_000, 0)
    );
    assert!(target.unpack(Tar::new().file("/", "").end()).is_err());
}

#[test]
fn extended_attributes_of_the_image_are_set_and_others_are_not() {
    let target = Target::new();
    // Effective, permitted set with a byte that is a newline: cap_dac_override and cap_fowner.
    let capability = [
        1, 0, 0, 2, 0x0a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let records: [(&str, &[u8]); 4] = [
        ("SCHILY.xattr.user.note", b"a\nb"),
        ("SCHILY.xattr.security.capability", &capability),
        ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
        ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
    ];
    let mut text = Vec::new();
    for (key, value) in records {
        let rest = 3 + key.len() + value.len();
        let length = (rest..).find(|n| n.to_string().len() + rest == *n).unwrap();
        write!(text, "{length} {key}=").unwrap();
        text.extend_from_slice(value);
        text.push(b'\n');
    }
    let tar = Tar::new()
        .add(EntryType::XHeader, "x", 0o644, "", &text)
        .file("f", "x");
    let tar = tar.add(EntryType::XHeader, "x", 0o644, "", &text).dir("d");
    target.unpack(tar.end()).unwrap();
    let get = |name: &str, key: &str| {
        let mut value = vec![0; 64];
        rustix::fs::getxattr(target.path(name), key, &mut value).map(|n| value[..n].to_vec())
    };
    assert_eq!(get("f", "user.note").unwrap(), b"a\nb");
    assert_eq!(get("f", "security.capability").unwrap(), capability);
    for name in ["f", "d"] {
        assert_eq!(get(name, "trusted.overlay.redirect"), Err(Errno::NODATA));
        assert_eq!(get(name, "trusted.overlay.opaque"), Err(Errno::NODATA));
    }
}

#[test]
fn devices_are_made_and_impossible_ones_refused() {
    let target = Target::new();
    let node = |name: &str, kind, major, minor| {
        let mut header = Header::new_gnu();
        header.set_path(name).unwrap();
        header.set_entry_type(kind);
        header.set_mode(0o666);
        header.set_uid(0);
        header.set_gid(5);
        header.set_mtime(0);
        header.set_size(0);
        header.set_device_major(major).unwrap();
        header.set_device_minor(minor).unwrap();
        header.set_cksum();
        let mut tar = Tar::new();
        tar.0.append(&header, &b""[..]).unwrap();
        tar.end()
    };
    target.unpack(node("null", EntryType::Char, 1, 3)).unwrap();
    target
        .unpack(node("disk", EntryType::Block, 259, 300))
        .unwrap();
    let null = fs::metadata(target.path("null")).unwrap();
    assert!(null.file_type().is_char_device());
    assert_eq!(
        (null.rdev(), null.gid(), null.mode() & 0o7777),
        (rustix::fs::makedev(1, 3), 5, 0o666)
    );
    assert_eq!(
        fs::metadata(target.path("disk")).unwrap().rdev(),
        rustix::fs::makedev(259, 300)
    );
    assert!(
        target
            .unpack(node("bad", EntryType::Char, 0x1000, 0))
            .is_err()
    );
    assert!(
        target
            .unpack(node("bad", EntryType::Char, 0, 0x10_0000))
            .is_err()
    );
}

#[test]
fn hard_links_share_their_file_and_may_lead_through_links_in_the_layer() {
    let target = Target::new();
    let tar = Tar::new()
        .file("a", "x")
        .symlink("l", "/")
        .hard_link("b", "./a")
        .hard_link("c", "/l/a")
        .hard_link("d", "l");
    target.unpack(tar.end()).unwrap();
    let inode = |name: &str| fs::symlink_metadata(target.path(name)).unwrap().ino();
    assert_eq!(inode("a"), inode("b"));
    assert_eq!(inode("a"), inode("c"));
    assert_eq!(
        inode("l"),
        inode("d"),
        "a link to a link is one to the link itself"
    );
}

#[test]
fn hard_links_out_of_the_layer_are_refused() {
    for link in [
        "../outside/file",
        "/../outside/file",
        "a/../../outside/file",
        "nothing",
        "up/outside/file",
        "out/file",
        "",
        "/",
        "d",
    ] {
        let target = Target::new();
        let outside = target.dir.path().join("outside");
        let tar = Tar::new()
            .dir("d")
            .symlink("up", "../..")
            .symlink("out", outside.to_str().unwrap())
            .hard_link("x", link);
        let error = target.unpack(tar.end()).unwrap_err();
        assert!(
            matches!(error, LayerError::Refused { .. }),
            "{link}: {error:?}"
        );
        assert!(!target.path("x").exists());
    }
}

#[test]
fn names_that_go_up_are_refused_and_absolute_ones_start_at_the_layer() {
    for name in [
        "..",
        "../x",
        "a/../../outside/x",
        "a/../b",
        "/../x",
        "./../outside/x",
    ] {
        let target = Target::new();
        let error = target
            .unpack(Tar::new().dir("a").file(name, "x").end())
            .unwrap_err();
        assert!(
            matches!(error, LayerError::Refused { .. }),
            "{name}: {error:?}"
        );
    }
    let target = Target::new();
    target
        .unpack(Tar::new().file("//a//./b/", "x").end())
        .unwrap();
    assert_eq!(fs::read(target.path("a/b")).unwrap(), b"x");
}

#[test]
fn entries_behind_links_stay_in_the_layer() {
    let target = Target::new();
    let outside = target.dir.path().join("outside");
    let tar = Tar::new()
        .symlink("out", outside.to_str().unwrap())
        .symlink("up", "../../../outside")
        .symlink("lib", "usr/lib")
        .dir("real")
        .symlink("alias", "real")
        .file("out/x", "1")
        .file("up/x", "2")
        .file("lib/x", "3")
        .file("alias/x", "4")
        .add(EntryType::Directory, "up/d", 0o700, "", b"")
        .file("up/.wh.file", "")
        .file("out/.wh..wh..opq", "")
        .hard_link("up/y", "up/x")
        .symlink("up/z", "x");
    target.unpack(tar.end()).unwrap();
    assert_eq!(fs::read(target.path("outside/x")).unwrap(), b"2");
    assert_eq!(fs::read(target.path("usr/lib/x")).unwrap(), b"3");
    assert_eq!(fs::read(target.path("real/x")).unwrap(), b"4");
    let inside = target.path("").join(outside.strip_prefix("/").unwrap());
    assert_eq!(fs::read(inside.join("x")).unwrap(), b"1");
    assert!(target.is_whiteout("outside/file"));
}

#[test]
fn a_file_replaces_a_link_instead_of_writing_through_it() {
    let target = Target::new();
    let file = target.dir.path().join("outside/file");
    let tar = Tar::new()
        .symlink("f", file.to_str().unwrap())
        .file("f", "inside")
        .symlink("d", "/")
        .dir("d");
    target.unpack(tar.end()).unwrap();
    assert_eq!(fs::read(target.path("f")).unwrap(), b"inside");
    assert!(fs::symlink_metadata(target.path("f")).unwrap().is_file());
    assert!(fs::symlink_metadata(target.path("d")).unwrap().is_dir());
}

#[test]
fn a_loop_of_links_is_an_error() {
    let target = Target::new();
    let error = target
        .unpack(
            Tar::new()
                .symlink("a", "b")
                .symlink("b", "a")
                .file("a/x", "")
                .end(),
        )
        .unwrap_err();
    assert!(matches!(error, LayerError::Write { .. }), "{error:?}");
}

#[test]
fn the_last_of_several_entries_with_one_name_wins() {
    let target = Target::new();
    let tar = Tar::new()
        .file("a/b/c", "old")
        .file("a", "file")
        .file("f", "x")
        .file("f/", "y")
        .dir("d")
        .file("d/kept", "")
        .add(EntryType::Directory, "d", 0o700, "", b"")
        .file("e/gone", "")
        .symlink("e", "d")
        .file("e/new", "");
    let implied = target.unpack(tar.end()).unwrap();
    assert_eq!(fs::read(target.path("a")).unwrap(), b"file");
    assert_eq!(fs::read(target.path("f")).unwrap(), b"y");
    assert!(target.path("d/kept").exists());
    assert_eq!(
        fs::metadata(target.path("d")).unwrap().mode() & 0o7777,
        0o700
    );
    assert!(target.path("d/new").exists());
    assert_eq!(
        implied,
        Implied::from(["".into()]),
        "directories that are gone again are not remembered"
    );
}

#[test]
fn what_lies_in_a_file_is_refused() {
    let target = Target::new();
    let error = target
        .unpack(Tar::new().file("a", "x").file("a/b", "y").end())
        .unwrap_err();
    assert!(matches!(error, LayerError::Refused { .. }), "{error:?}");
}

#[test]
fn whiteouts_become_overlayfs_marks_in_any_order() {
    let target = Target::new();
    let tar = Tar::new()
        .file(".wh.gone", "")
        .file("d/.wh..wh..opq", "")
        .file("d/x", "")
        .file("late/x", "")
        .file("late/.wh..wh..opq", "")
        .file(".wh.again", "")
        .file("again", "x")
        .file(".wh.dir", "")
        .file("dir/x", "")
        .file(".wh.made", "")
        .dir("made")
        .file("kept", "x")
        .file(".wh.kept", "")
        .file("kept-dir/x", "")
        .file(".wh.kept-dir", "")
        .dir(".wh.as-directory");
    target.unpack(tar.end()).unwrap();
    assert!(target.is_whiteout("gone"));
    assert!(target.is_whiteout("as-directory"));
    for name in ["d", "late", "dir", "made", "kept-dir"] {
        assert!(target.is_opaque(name), "{name}");
    }
    assert_eq!(fs::read(target.path("again")).unwrap(), b"x");
    assert_eq!(fs::read(target.path("kept")).unwrap(), b"x");
    assert!(target.path("kept-dir/x").exists());
}

#[test]
fn whiteouts_of_nothing_and_in_whiteouts_are_refused() {
    for name in [".wh.", ".wh..", ".wh...", "d/.wh..", ".wh.a/b"] {
        let target = Target::new();
        let error = target.unpack(Tar::new().file(name, "").end()).unwrap_err();
        assert!(
            matches!(error, LayerError::Refused { .. }),
            "{name}: {error:?}"
        );
    }
}

#[test]
fn what_aufs_left_is_passed_over() {
    let target = Target::new();
    target
        .unpack(
            Tar::new()
                .file(".wh..wh.aufs", "")
                .file(".wh..wh.plnk/1.2", "x")
                .dir(".wh..wh.orph")
                .end(),
        )
        .unwrap();
    assert_eq!(fs::read_dir(target.path("")).unwrap().count(), 0);
}

#[test]
fn sparse_files_keep_their_holes() {
    let target = Target::new();
    let mut header = Header::new_gnu();
    header.set_path("sparse").unwrap();
    header.set_entry_type(EntryType::GNUSparse);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(4);
    let gnu = header.as_gnu_mut().unwrap();
    gnu.set_real_size(1 << 40);
    gnu.sparse[0].set_offset(1 << 30);
    gnu.sparse[0].set_length(4);
    // GNU tar says where a hole at the end leads to.
    gnu.sparse[1].set_offset(1 << 40);
    gnu.sparse[1].set_length(0);
    header.set_cksum();
    let mut tar = Tar::new();
    tar.0.append(&header, &b"data"[..]).unwrap();
    target.unpack(tar.end()).unwrap();
    let file = fs::File::open(target.path("sparse")).unwrap();
    let meta = file.metadata().unwrap();
    assert_eq!(meta.len(), 1 << 40);
    assert!(meta.blocks() < 100);
    let mut data = [0; 4];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut data, 1 << 30).unwrap();
    assert_eq!(&data, b"data");
}

#[test]
fn depth_is_limited_even_through_links() {
    let target = Target::new();
    let deep = "d/".repeat(MAX_DEPTH + 1);
    let tar = Tar::new().pax(&[("path", deep.as_bytes())]).dir("x");
    assert!(matches!(
        target.unpack(tar.end()),
        Err(LayerError::Refused { .. })
    ));

    let target = Target::new();
    let half = "d/".repeat(MAX_DEPTH - 1);
    let tar = Tar::new()
        .pax(&[("path", half.as_bytes())])
        .dir("x")
        .pax(&[("linkpath", half.as_bytes())])
        .symlink("l", "x")
        .file("l/a/b/c", "");
    assert!(matches!(
        target.unpack(tar.end()),
        Err(LayerError::Refused { .. })
    ));
}

#[test]
fn truncated_content_is_an_error() {
    let target = Target::new();
    let whole = Tar::new().file("f", &"x".repeat(5000)).end();
    assert!(matches!(
        target.unpack(whole[..3000].to_vec()),
        Err(LayerError::Read(_))
    ));
}

#[test]
fn links_keep_their_target_owner_and_time() {
    let target = Target::new();
    target
        .unpack(Tar::new().symlink("l", "../../../etc/passwd").end())
        .unwrap();
    let link = fs::symlink_metadata(target.path("l")).unwrap();
    assert_eq!(link.mtime(), 1_000_000_000);
    assert_eq!(
        fs::read_link(target.path("l")).unwrap(),
        Path::new("../../../etc/passwd")
    );
    assert!(
        target
            .unpack(Tar::new().symlink("empty", "").end())
            .is_err()
    );
}
