//! What is refused, and how that is said.

use std::fs;

use crate::host::{Host, busybox, dist, fail, image, succeed, text};

#[test]
fn images_that_are_missing_or_broken_are_named() {
    let host = Host::new();
    for (reference, words) in [
        ("oci:/nonexistent", vec!["/nonexistent"]),
        ("docker-archive:/nonexistent.tar", vec!["/nonexistent.tar"]),
        ("rootfs:/nonexistent", vec!["/nonexistent"]),
        ("debian:12", vec!["debian:12", "oci:"]),
        ("", vec![]),
        ("oci:", vec!["oci:"]),
    ] {
        fail(&host.cloison(["run", reference, "true"]), 125, &words);
    }
    host.assert_clean();
}

#[test]
fn an_image_with_a_wrong_digest_or_a_cut_layer_never_runs() {
    let host = Host::with_own_data();
    let source = image("busybox");
    let source = source.trim_start_matches("oci:");
    for (name, damage) in [
        (
            "wrong",
            &(|bytes: &mut Vec<u8>| bytes[100] ^= 1) as &dyn Fn(&mut Vec<u8>),
        ),
        ("cut", &|bytes| bytes.truncate(2000)),
    ] {
        let copy = host.path(name);
        assert!(
            std::process::Command::new("cp")
                .args(["-r", source])
                .arg(&copy)
                .status()
                .unwrap()
                .success()
        );
        let blobs = fs::read_dir(copy.join("blobs/sha256"))
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let layer = blobs
            .max_by_key(|path| fs::metadata(path).unwrap().len())
            .unwrap();
        let mut bytes = fs::read(&layer).unwrap();
        damage(&mut bytes);
        fs::write(&layer, bytes).unwrap();
        let digest = layer.file_name().unwrap().to_str().unwrap();
        fail(
            &host.cloison(["run", "--rm", &format!("oci:{}", copy.display()), "true"]),
            125,
            &[&digest[..12]],
        );
    }
    host.assert_clean();
}

#[test]
fn a_full_disk_is_said_and_leaves_nothing() {
    let host = Host::with_own_data();
    let data = host.data_dir().to_owned();
    fs::create_dir(&data).unwrap();
    nix::mount::mount(
        Some("small"),
        &data,
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        Some("size=256k"),
    )
    .unwrap();
    let output = host.run(&[], &["true"]);
    let layers = walk(&data.join("layers"));
    nix::mount::umount(&data).unwrap();
    fail(&output, 125, &["No space left on device"]);
    assert!(
        layers < 10,
        "{layers} files of a layer that does not fit are left"
    );
}

fn walk(dir: &std::path::Path) -> usize {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| {
            1 + if entry.file_type().unwrap().is_dir() {
                walk(&entry.path())
            } else {
                0
            }
        })
        .sum()
}

#[test]
fn directories_that_cannot_be_written_are_named() {
    let host = Host::new();
    let image = busybox();
    for variable in ["CLOISON_RUN_DIR", "CLOISON_DATA_DIR"] {
        let file = host.file("file", "");
        let output = host
            .command(["run", "--rm", &image, "true"])
            .env(variable, file.join("below"))
            .output()
            .unwrap();
        fail(&output, 125, &["file/below"]);
    }
}

#[test]
fn a_name_in_use_is_said_with_its_owner() {
    let host = Host::new();
    let id = host.detached(&["--name", "taken"], &["sleep", "1000"]);
    fail(
        &host.run(&["--name", "taken"], &["true"]),
        125,
        &["taken", &id[..12]],
    );
    fail(
        &host.run(&["--name", "../evil"], &["true"]),
        125,
        &["../evil"],
    );
    succeed(&host.cloison(["rm", "-f", "taken"]));
    assert_eq!(
        host.stdout(&["--name", "taken"], &["echo", "free again"]),
        "free again\n"
    );
}

#[test]
fn unknown_verbs_and_options_are_125_and_help_is_0() {
    let host = Host::new();
    for args in [
        vec!["nonesuch"],
        vec!["run", "--nonesuch", "x"],
        vec!["run"],
        vec!["exec", "x"],
        vec!["rm"],
        vec![],
    ] {
        let output = host.cloison(&args);
        assert_eq!(
            output.status.code(),
            Some(125),
            "{args:?}: {}",
            text(&output.stderr)
        );
        assert!(
            text(&output.stderr).contains("Usage") && output.stdout.is_empty(),
            "{args:?}"
        );
    }
    for args in [
        vec!["--help"],
        vec!["run", "--help"],
        vec!["exec", "--help"],
        vec!["--version"],
        vec!["completion", "bash"],
    ] {
        assert!(!succeed(&host.cloison(&args)).is_empty());
    }
    for verb in ["kill", "stop", "wait", "rm", "logs", "inspect"] {
        fail_with_nothing_printed(&host, verb);
    }
}

fn fail_with_nothing_printed(host: &Host, verb: &str) {
    let output = host.cloison([verb, "nonesuch"]);
    assert_eq!(output.status.code(), Some(1), "{verb}");
    assert!(
        text(&output.stderr).contains("no such container: nonesuch"),
        "{verb}: {}",
        text(&output.stderr)
    );
}

#[test]
fn doctor_says_what_this_host_can_do_and_fails_when_it_can_do_nothing() {
    let host = Host::new();
    let report = succeed(&host.cloison(["doctor"]));
    for word in [
        "engine kvm",
        "engine software",
        "guest kernel",
        "initramfs",
        "memory",
    ] {
        assert!(report.contains(word), "{word} is not in: {report}");
    }
    let output = host.cloison(["doctor", "--kernel", "/nonexistent"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stdout).contains("/nonexistent"),
        "{}",
        text(&output.stdout)
    );
    fail(
        &host.cloison(["run", "--kernel", "/nonexistent", &busybox(), "true"]),
        125,
        &["/nonexistent"],
    );
}

#[test]
fn a_front_door_that_is_not_built_says_so() {
    let name = "containerd-shim-cloison-v2";
    let output = std::process::Command::new(dist().join(name))
        .arg("--version")
        .output()
        .unwrap();
    fail(&output, 1, &[name, "limitations"]);
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let host = Host::new();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = host.command(["doctor"]).stdout(writer).output().unwrap();
    assert!(
        !text(&output.stderr).contains("panicked"),
        "{}",
        text(&output.stderr)
    );
    assert_eq!(output.status.code(), Some(0));
}
