//! The store under several users at once, under a full disk, and after a process that was killed. These tests need root.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;
use std::time::SystemTime;

use cloison_image::{Error, Progress, Reference, Store};
use common::*;
use nix::mount::{MsFlags, mount};

/// Set for the processes that tests start from their own program.
const CHILD_DATA: &str = "CLOISON_IMAGE_TEST_DATA";
const CHILD_IMAGE: &str = "CLOISON_IMAGE_TEST_IMAGE";

/// An image whose layer takes several reads.
fn large_image() -> Layout {
    let mut layout = Layout::new();
    let mut noise = Vec::new();
    let mut state = 1_u64;
    while noise.len() < 1 << 20 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        noise.extend_from_slice(&state.to_le_bytes());
    }
    let mut tar = Tar::new();
    for n in 0..64 {
        let part = &noise[n * (16 << 10)..][..16 << 10];
        tar = tar.entry(
            tar::EntryType::Regular,
            &format!("dir/{n}"),
            0o644,
            0,
            "",
            part,
        );
    }
    let image = layout.image(&[tar.end()]);
    layout.add(image);
    layout
}

/// Runs [`child`] in a process of its own, which stops after its first report of progress until its input ends.
fn start_child(data: &Path, layout: &Layout) -> (Child, BufReader<impl Read + use<>>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["child", "--exact", "--ignored", "--nocapture"])
        .env(CHILD_DATA, data)
        .env(CHILD_IMAGE, layout.dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    (child, output)
}

/// Reads what the child says until it says `word`.
fn wait_for(word: &str, output: &mut impl BufRead) {
    let mut line = String::new();
    while output.read_line(&mut line).unwrap() > 0 {
        if line.contains(word) {
            return;
        }
        line.clear();
    }
    panic!("the child never said {word}");
}

#[test]
#[ignore = "run by other tests as a process of its own"]
fn child() {
    let (Some(data), Some(image)) = (std::env::var_os(CHILD_DATA), std::env::var_os(CHILD_IMAGE))
    else {
        return;
    };
    let store = Store::open(Path::new(&data)).unwrap();
    let mut stopped = false;
    let reference = Reference::OciLayout {
        dir: image.into(),
        tag: None,
    };
    store
        .resolve(&reference, &mut |progress| match progress {
            Progress::Unpacking { .. } if !stopped => {
                stopped = true;
                println!("unpacking");
                std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
            }
            Progress::Unpacked { .. } => println!("unpacked"),
            _ => {}
        })
        .unwrap();
    println!("resolved");
}

#[test]
fn a_second_process_waits_for_the_first_and_uses_its_layer() {
    let (data, layout) = (Data::new(), large_image());
    let (mut child, mut output) = start_child(data.dir.path(), &layout);
    wait_for("unpacking", &mut output);
    // A store that is opened meanwhile must leave the work of the living alone.
    let store = Store::open(data.dir.path()).unwrap();
    assert_eq!(names(&data.dir.path().join("tmp")).len(), 1);
    let mut reports = Vec::new();
    let image = store.resolve(&layout.reference(None), &mut |progress| {
        // Whoever waits lets the child go on.
        drop(child.stdin.take());
        reports.push(progress);
    });
    assert_eq!(names(&image.unwrap().layers[0].join("dir")).len(), 64);
    assert!(
        matches!(reports.as_slice(), [Progress::Waiting { .. }]),
        "{reports:?}"
    );
    wait_for("resolved", &mut output);
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_killed_process_leaves_only_what_the_next_one_removes() {
    let (data, layout) = (Data::new(), large_image());
    let (mut child, mut output) = start_child(data.dir.path(), &layout);
    wait_for("unpacking", &mut output);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(
        names(&data.dir.path().join("tmp")).len(),
        1,
        "the child was in the middle of it"
    );
    assert!(data.layers().is_empty());
    let store = Store::open(data.dir.path()).unwrap();
    assert!(names(&data.dir.path().join("tmp")).is_empty());
    store.resolve(&layout.reference(None), &mut |_| {}).unwrap();
}

#[test]
fn a_store_that_is_open_already_takes_over_from_a_killed_process() {
    let (data, layout) = (Data::new(), large_image());
    let (mut child, mut output) = start_child(data.dir.path(), &layout);
    wait_for("unpacking", &mut output);
    let mut waited = false;
    let image = data
        .store
        .resolve(&layout.reference(None), &mut |progress| {
            if let Progress::Waiting { .. } = progress {
                waited = true;
                child.kill().unwrap();
            }
        });
    assert!(waited);
    child.wait().unwrap();
    assert_eq!(names(&image.unwrap().layers[0].join("dir")).len(), 64);
    assert!(names(&data.dir.path().join("tmp")).is_empty());
}

#[test]
fn many_at_once_unpack_each_layer_once() {
    let mut layout = Layout::new();
    let layers: Vec<Vec<u8>> = (0..4)
        .map(|n| Tar::new().file("dir/file", &n.to_string()).end())
        .collect();
    let image = layout.image(&layers);
    layout.add(image);
    let data = Data::new();
    let start = Barrier::new(8);
    let unpacked: usize = std::thread::scope(|scope| {
        let one = || {
            let store = Store::open(data.dir.path()).unwrap();
            start.wait();
            let mut unpacked = 0;
            let image = store.resolve(&layout.reference(None), &mut |p| {
                unpacked += usize::from(matches!(p, Progress::Unpacked { .. }));
            });
            assert_eq!(image.unwrap().layers.len(), 4);
            unpacked
        };
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(one)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    assert_eq!(unpacked, 4);
    assert!(names(&data.dir.path().join("tmp")).is_empty());
}

#[test]
fn after_a_failure_the_same_layer_can_be_unpacked() {
    let (data, layout) = (Data::new(), large_image());
    let blobs = layout.path("blobs/sha256");
    let largest = fs::read_dir(&blobs)
        .unwrap()
        .map(|e| e.unwrap())
        .max_by_key(|e| e.metadata().unwrap().len())
        .unwrap()
        .path();
    let whole = fs::read(&largest).unwrap();
    fs::write(&largest, vec![0; whole.len()]).unwrap();
    data.refuse(&layout.reference(None));
    fs::write(&largest, whole).unwrap();
    data.resolve(&layout.reference(None)).unwrap();
}

#[test]
fn a_full_disk_is_told_and_leaves_nothing() {
    own_mounts();
    let layout = large_image();
    let disk = tempfile::tempdir().unwrap();
    mount(
        Some("tmpfs"),
        disk.path(),
        Some("tmpfs"),
        MsFlags::empty(),
        Some("size=512k"),
    )
    .unwrap();
    let store = Store::open(disk.path()).unwrap();
    let error = store
        .resolve(&layout.reference(None), &mut |_| {})
        .unwrap_err();
    assert!(matches!(error, Error::NoSpace { .. }), "{error:?}");
    assert!(error.to_string().contains("free some"), "{error}");
    assert!(names(&disk.path().join("tmp")).is_empty());
    assert!(names(&disk.path().join("layers/sha256")).is_empty());
    let used = nix::sys::statvfs::statvfs(disk.path()).unwrap();
    assert!(
        used.blocks() - used.blocks_free() < 16,
        "the disk is as empty as before"
    );
    nix::mount::umount(disk.path()).unwrap();
}

#[test]
fn a_data_directory_that_cannot_be_written_to_is_told() {
    own_mounts();
    let disk = tempfile::tempdir().unwrap();
    mount(
        Some("tmpfs"),
        disk.path(),
        Some("tmpfs"),
        MsFlags::MS_RDONLY,
        None::<&str>,
    )
    .unwrap();
    let error = Store::open(&disk.path().join("data")).unwrap_err();
    assert!(matches!(error, Error::DataDir { .. }), "{error:?}");
    assert!(error.to_string().contains("writable"), "{error}");
    nix::mount::umount(disk.path()).unwrap();
    let file = disk.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(matches!(Store::open(&file), Err(Error::DataDir { .. })));
}

#[test]
fn the_store_is_roots_alone_whatever_the_umask() {
    own_mounts();
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("a/b");
    Store::open(&data).unwrap();
    for dir in [data.clone(), data.join("layers"), data.join("tmp")] {
        assert_eq!(
            fs::metadata(&dir).unwrap().permissions().mode() & 0o7777,
            0o700,
            "{}",
            dir.display()
        );
    }
}

#[test]
fn resolving_what_is_there_writes_nothing() {
    let (data, layout) = (Data::new(), large_image());
    data.resolve(&layout.reference(None)).unwrap();
    let snapshot = |dir: &Path| -> Vec<(String, SystemTime)> {
        let mut todo = vec![dir.to_owned()];
        let mut seen = Vec::new();
        while let Some(at) = todo.pop() {
            let meta = fs::symlink_metadata(&at).unwrap();
            seen.push((at.display().to_string(), meta.modified().unwrap()));
            if meta.is_dir() {
                todo.extend(fs::read_dir(&at).unwrap().map(|e| e.unwrap().path()));
            }
        }
        seen
    };
    let before = snapshot(data.dir.path());
    data.resolve(&layout.reference(None)).unwrap();
    assert_eq!(snapshot(data.dir.path()), before);
}
