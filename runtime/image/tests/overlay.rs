//! Root filesystems through the kernel's overlayfs, in mount namespaces of the tests' own. These tests need root.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail")]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use cloison_image::{Error, Image, Reference, RootFs, remove_tree};
use common::*;
use tar::EntryType;

/// A container's directories.
struct Container {
    dir: tempfile::TempDir,
    rootfs: Option<RootFs>,
}

impl Container {
    fn start(image: &Image, read_only: bool) -> Container {
        Container::start_in(image, read_only, "c")
    }

    /// With a directory of the given name around all others.
    fn start_in(image: &Image, read_only: bool, name: &str) -> Container {
        let dir = tempfile::tempdir().unwrap();
        let at = |sub: &str| dir.path().join(name).join(sub);
        for sub in ["upper", "work", "rootfs"] {
            fs::create_dir_all(at(sub)).unwrap();
        }
        let rootfs =
            RootFs::mount(image, &at("upper"), &at("work"), &at("rootfs"), read_only).unwrap();
        Container {
            dir,
            rootfs: Some(rootfs),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.rootfs.as_ref().unwrap().target().join(name)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.rootfs.take().unwrap().unmount().unwrap();
        for entry in fs::read_dir(self.dir.path()).unwrap() {
            remove_tree(&entry.unwrap().path()).unwrap();
        }
    }
}

fn image(data: &Data, layers: &[Vec<u8>]) -> Image {
    let mut layout = Layout::new();
    let image = layout.image(layers);
    layout.add(image);
    data.resolve(&layout.reference(None)).unwrap()
}

fn mode(path: &Path) -> (u32, u32) {
    let meta = fs::metadata(path).unwrap();
    (meta.mode() & 0o7777, meta.uid())
}

#[test]
fn whiteouts_and_opaque_directories_hide_what_lies_below() {
    own_mounts();
    let base = Tar::new()
        .file("gone", "x")
        .file("kept", "x")
        .file("gone-dir/x", "x")
        .file("opaque/below", "x")
        .file("replaced/below", "x")
        .file("was-file", "x")
        .file("was-dir/x", "x");
    let change = Tar::new()
        .file(".wh.gone", "")
        .file(".wh.gone-dir", "")
        .file("opaque/above", "y")
        .file("opaque/.wh..wh..opq", "")
        .file(".wh.replaced", "")
        .file("replaced/above", "y")
        .file("was-file/now", "y")
        .file("was-dir", "y");
    let top = Tar::new().file("gone", "again");
    let data = Data::new();
    let two = image(&data, &[base.end(), change.end(), top.end()]);
    let c = Container::start(&two, false);
    assert_eq!(
        names(&c.path("")),
        ["gone", "kept", "opaque", "replaced", "was-dir", "was-file"]
    );
    assert_eq!(names(&c.path("opaque")), ["above"]);
    assert_eq!(names(&c.path("replaced")), ["above"]);
    assert_eq!(names(&c.path("was-file")), ["now"]);
    assert_eq!(fs::read(c.path("was-dir")).unwrap(), b"y");
    assert_eq!(fs::read(c.path("gone")).unwrap(), b"again");
}

#[test]
fn an_opaque_root_hides_all_layers_below() {
    own_mounts();
    let data = Data::new();
    let image = image(
        &data,
        &[
            Tar::new().file("below", "x").end(),
            Tar::new().file("above", "y").file(".wh..wh..opq", "").end(),
        ],
    );
    let c = Container::start(&image, false);
    assert_eq!(names(&c.path("")), ["above"]);
}

#[test]
fn directories_that_a_layer_says_nothing_about_look_as_below() {
    own_mounts();
    let base = Tar::new()
        .entry(EntryType::Directory, "./", 0o711, 0, "", b"")
        .dir("tmp/", 0o1777)
        .entry(EntryType::Directory, "home/", 0o751, 7, "", b"")
        .entry(EntryType::Directory, "home/user/", 0o700, 1000, "", b"")
        .dir("hidden/", 0o700)
        .dir("set/", 0o700)
        .dir("plain/", 0o755);
    let change = Tar::new()
        .file("tmp/file", "x")
        .file("home/user/.config/file", "x")
        .file("hidden/.wh..wh..opq", "")
        .file("hidden/file", "x")
        .dir("set/", 0o750)
        .file("plain/file", "x")
        .file("new/file", "x");
    let top = Tar::new().file("tmp/file2", "x").file("set/file", "x");
    let data = Data::new();
    let image = image(&data, &[base.end(), change.end(), top.end()]);
    let c = Container::start(&image, false);
    assert_eq!(mode(&c.path("")), (0o711, 0));
    assert_eq!(mode(&c.path("tmp")), (0o1777, 0));
    assert_eq!(mode(&c.path("home")), (0o751, 7));
    assert_eq!(mode(&c.path("home/user")), (0o700, 1000));
    assert_eq!(mode(&c.path("home/user/.config")), (0o755, 0));
    assert_eq!(
        mode(&c.path("hidden")),
        (0o755, 0),
        "it is another directory than the one it hides"
    );
    assert_eq!(mode(&c.path("set")), (0o750, 0));
    assert_eq!(names(&c.path("tmp")), ["file", "file2"]);
    assert_eq!(names(&c.path("hidden")), ["file"]);
    assert_eq!(fs::metadata(c.path("tmp")).unwrap().mtime(), 1_000_000_000);
    assert_eq!(image.layers.len(), 4, "three layers and one with the looks");
}

#[test]
fn no_further_layer_is_needed_where_nothing_would_look_different() {
    let data = Data::new();
    let base = Tar::new().dir("./", 0o755).dir("a/", 0o755).end();
    assert_eq!(
        image(&data, &[base, Tar::new().file("b/y", "").end()])
            .layers
            .len(),
        2
    );
}

#[test]
fn what_a_container_does_never_reaches_the_image() {
    own_mounts();
    let data = Data::new();
    let image = image(
        &data,
        &[
            Tar::new().file("dir/file", "image").end(),
            Tar::new().file("dir/other", "image").end(),
        ],
    );
    let c = Container::start(&image, false);
    fs::write(c.path("dir/file"), "changed").unwrap();
    fs::remove_file(c.path("dir/other")).unwrap();
    fs::set_permissions(c.path("dir"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::write(c.path("new"), "new").unwrap();
    drop(c);
    let c = Container::start(&image, false);
    assert_eq!(fs::read(c.path("dir/file")).unwrap(), b"image");
    assert_eq!(names(&c.path("dir")), ["file", "other"]);
    assert_eq!(
        (names(&c.path("")), mode(&c.path("dir"))),
        (vec!["dir".to_owned()], (0o755, 0))
    );
}

#[test]
fn a_bare_root_directory_is_not_changed_either() {
    own_mounts();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "bare").unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o751)).unwrap();
    let image = Data::new()
        .resolve(&Reference::RootfsDir(dir.path().to_owned()))
        .unwrap();
    let c = Container::start(&image, false);
    assert_eq!(mode(&c.path("")), (0o751, 0));
    fs::write(c.path("file"), "changed").unwrap();
    fs::write(c.path("more"), "").unwrap();
    assert_eq!(names(dir.path()), ["file"]);
    assert_eq!(fs::read(dir.path().join("file")).unwrap(), b"bare");
}

#[test]
fn a_read_only_root_takes_no_changes() {
    own_mounts();
    let data = Data::new();
    let image = image(&data, &[Tar::new().file("file", "x").end()]);
    let c = Container::start(&image, true);
    assert_eq!(fs::read(c.path("file")).unwrap(), b"x");
    let error = fs::write(c.path("file"), "y").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
}

#[test]
fn the_host_can_use_no_program_and_no_device_of_it() {
    own_mounts();
    let dir = tempfile::tempdir().unwrap();
    let null = dir.path().join("null");
    let kind = nix::sys::stat::SFlag::S_IFCHR;
    nix::sys::stat::mknod(
        &null,
        kind,
        nix::sys::stat::Mode::S_IRUSR,
        nix::sys::stat::makedev(1, 3),
    )
    .unwrap();
    let image = Data::new()
        .resolve(&Reference::RootfsDir(dir.path().to_owned()))
        .unwrap();
    let c = Container::start(&image, false);
    assert!(fs::File::open(&null).is_ok());
    assert_eq!(
        fs::File::open(c.path("null")).unwrap_err().kind(),
        std::io::ErrorKind::PermissionDenied
    );
    fs::write(c.path("program"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(c.path("program"), fs::Permissions::from_mode(0o755)).unwrap();
    assert!(
        std::process::Command::new(c.path("program"))
            .status()
            .is_err()
    );
}

#[test]
fn directories_may_have_any_name() {
    own_mounts();
    let bare = tempfile::tempdir().unwrap();
    let data = Data::new();
    let long = "long".repeat(60);
    for name in [
        "a:b,c",
        "back\\slash\\:x",
        "lowerdir=/,upperdir=/",
        "space and 'quotes'",
        long.as_str(),
    ] {
        let dir = bare.path().join(name).join("x").join(name);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("file"), name).unwrap();
        let image = data.resolve(&Reference::RootfsDir(dir)).unwrap();
        let c = Container::start_in(&image, false, name);
        assert_eq!(fs::read(c.path("file")).unwrap(), name.as_bytes());
        fs::write(c.path("written"), "x").unwrap();
    }
}

#[test]
fn as_many_layers_as_an_image_may_have_are_stacked() {
    own_mounts();
    let layers: Vec<Vec<u8>> = (0..499)
        .map(|n| Tar::new().file("number", &n.to_string()).end())
        .collect();
    let data = Data::new();
    let image = image(&data, &layers);
    let c = Container::start(&image, false);
    assert_eq!(fs::read(c.path("number")).unwrap(), b"498");
}

#[test]
fn what_cannot_be_mounted_is_told_with_a_reason() {
    own_mounts();
    let data = Data::new();
    let image = image(&data, &[Tar::new().file("file", "x").end()]);
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in ["upper", "work", "rootfs", "other", "other-work"] {
        fs::create_dir(at(name)).unwrap();
    }
    let error =
        RootFs::mount(&image, &at("upper"), &at("work"), &at("nothing"), false).unwrap_err();
    assert!(matches!(error, Error::Mount { .. }), "{error:?}");
    assert!(
        error.to_string().contains(at("nothing").to_str().unwrap()),
        "{error}"
    );
    assert!(RootFs::mount(&image, &at("nothing"), &at("work"), &at("rootfs"), false).is_err());
    // Overlayfs has marked "upper" as belonging to the first image's layers.
    let inside = at("other").join("image");
    fs::create_dir(&inside).unwrap();
    let inside = data.resolve(&Reference::RootfsDir(inside)).unwrap();
    let error = RootFs::mount(
        &inside,
        &at("other"),
        &at("other-work"),
        &at("rootfs"),
        false,
    )
    .unwrap_err();
    assert!(error.to_string().contains("may not lie inside"), "{error}");
}

#[test]
fn unmounting_what_is_not_mounted_is_fine() {
    let dir = tempfile::tempdir().unwrap();
    RootFs::at(dir.path()).unmount().unwrap();
    RootFs::at(&dir.path().join("nothing")).unmount().unwrap();
}
