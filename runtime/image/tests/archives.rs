//! What `docker save` writes, of old and of late, and what else people take for it. These tests need root.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail")]

mod common;

use std::fs;
use std::path::PathBuf;

use cloison_image::{Error, Reference};
use common::*;
use serde_json::{Value, json};
use tar::EntryType;

struct Archive {
    dir: tempfile::TempDir,
}

impl Archive {
    fn new(content: &[u8]) -> Archive {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("image.tar"), content).unwrap();
        Archive { dir }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("image.tar")
    }

    fn reference(&self, reference: Option<&str>) -> Reference {
        Reference::DockerArchive {
            file: self.path(),
            reference: reference.map(str::to_owned),
        }
    }
}

fn layer(content: &str) -> Vec<u8> {
    Tar::new().file("file", content).end()
}

fn json_text(value: &Value) -> String {
    value.to_string()
}

fn content(image: &cloison_image::Image) -> String {
    fs::read_to_string(image.layers[0].join("file")).unwrap()
}

fn manifest(config: &str, tags: Value, layers: &[&str]) -> Value {
    json!([{"Config": config, "RepoTags": tags, "Layers": layers}])
}

/// As docker wrote it until version 24: layers in directories, the same layer a second time as a link.
fn old() -> Vec<u8> {
    let (a, b) = (layer("lower"), layer("upper"));
    let config = json_text(&config(&[sha256(&a), sha256(&b), sha256(&a)]));
    let name = format!("{}.json", sha256(config.as_bytes()).hex());
    let manifest = manifest(
        &name,
        json!(["busybox:1.36", "busybox:latest"]),
        &["a/layer.tar", "b/layer.tar", "c/layer.tar"],
    );
    Tar::new()
        .dir("a/", 0o755)
        .file("a/VERSION", "1.0")
        .entry(EntryType::Regular, "a/layer.tar", 0o644, 0, "", &a)
        .entry(EntryType::Regular, "b/layer.tar", 0o644, 0, "", &b)
        .entry(
            EntryType::Symlink,
            "c/layer.tar",
            0o777,
            0,
            "../a/layer.tar",
            b"",
        )
        .file(&name, &config)
        .file("manifest.json", &json_text(&manifest))
        .end()
}

/// As docker writes it since: an OCI layout that has a `manifest.json` as well; layers may be compressed.
fn late(tamper: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
    let plain = layer("late");
    let mut blob = gzip(&plain);
    let blob_name = format!("blobs/sha256/{}", sha256(&blob).hex());
    tamper(&mut blob);
    let config = json_text(&config(&[sha256(&plain)]));
    let config_name = format!("blobs/sha256/{}", sha256(config.as_bytes()).hex());
    Tar::new()
        .dir("blobs/", 0o755)
        .file(&config_name, &config)
        .entry(EntryType::Regular, &blob_name, 0o644, 0, "", &blob)
        .file("index.json", "{}")
        .file(
            "manifest.json",
            &json_text(&manifest(
                &config_name,
                json!(["example.org/app:2"]),
                &[&blob_name],
            )),
        )
        .file("oci-layout", r#"{"imageLayoutVersion":"1.0.0"}"#)
        .end()
}

#[test]
fn archives_of_old_and_of_late_are_read() {
    let data = Data::new();
    let archive = Archive::new(&old());
    let image = data.resolve(&archive.reference(None)).unwrap();
    assert_eq!((content(&image).as_str(), image.layers.len()), ("lower", 2));
    let archive = Archive::new(&late(|_| ()));
    let (image, unpacked) = data.resolve_counting(&archive.reference(Some("example.org/app:2")));
    assert_eq!((content(&image).as_str(), unpacked), ("late", 1));
    assert_eq!(data.resolve_counting(&archive.reference(None)).1, 0);
}

#[test]
fn an_archive_may_be_compressed() {
    for compressed in [gzip(&old()), zstd(&old())] {
        let data = Data::new();
        let image = data
            .resolve(&Archive::new(&compressed).reference(None))
            .unwrap();
        assert_eq!(content(&image), "lower");
        assert!(names(&data.dir.path().join("tmp")).is_empty());
    }
    let (error, text) = Data::new().refuse(&Archive::new(b"\xfd7zXZ\0...").reference(None));
    assert!(
        matches!(error, Error::WrongKind { .. }) && text.contains("xz"),
        "{text}"
    );
    let (error, _) = Data::new().refuse(&Archive::new(&gzip(&old())[..300]).reference(None));
    assert!(matches!(error, Error::Io { .. }));
}

#[test]
fn a_name_is_found_however_docker_writes_it() {
    let data = Data::new();
    let archive = Archive::new(&old());
    for name in [
        "busybox",
        "busybox:latest",
        "library/busybox",
        "docker.io/library/busybox:1.36",
    ] {
        assert!(
            data.resolve(&archive.reference(Some(name))).is_ok(),
            "{name}"
        );
    }
    let (error, text) = data.refuse(&archive.reference(Some("busybox:2")));
    assert!(
        matches!(error, Error::NoSuchName { .. }) && text.contains("busybox:1.36, busybox:latest"),
        "{text}"
    );
}

#[test]
fn several_images_need_a_name() {
    let (a, b) = (layer("a"), layer("b"));
    let configs = [
        json_text(&config(&[sha256(&a)])),
        json_text(&config(&[sha256(&b)])),
    ];
    let items = json!([
        {"Config": "a.json", "RepoTags": ["a:1"], "Layers": ["a.tar"]},
        {"Config": "b.json", "RepoTags": null, "Layers": ["b.tar"]},
    ]);
    let tar = Tar::new()
        .file("manifest.json", &json_text(&items))
        .file("a.json", &configs[0])
        .file("b.json", &configs[1])
        .entry(EntryType::Regular, "a.tar", 0o644, 0, "", &a)
        .entry(EntryType::Regular, "b.tar", 0o644, 0, "", &b);
    let archive = Archive::new(&tar.end());
    let data = Data::new();
    assert_eq!(
        content(&data.resolve(&archive.reference(Some("a:1"))).unwrap()),
        "a"
    );
    let (error, text) = data.refuse(&archive.reference(None));
    assert!(
        matches!(error, Error::Ambiguous { .. }) && text.contains("a:1"),
        "{text}"
    );
}

#[test]
fn content_that_is_not_what_its_name_says_is_refused() {
    let (error, text) =
        Data::new().refuse(&Archive::new(&late(|blob| blob[4] ^= 1)).reference(None));
    assert!(matches!(error, Error::Layer { .. }), "{text}");
    let name = format!("{}.json", sha256(b"something else").hex());
    let tar = Tar::new()
        .file(&name, &text_of_config())
        .file("manifest.json", &text_of_manifest(&name));
    let (error, _) = Data::new().refuse(&Archive::new(&tar.end()).reference(None));
    assert!(matches!(error, Error::WrongDigest { .. }));
}

fn text_of_config() -> String {
    json_text(&config(&[]))
}

fn text_of_manifest(config: &str) -> String {
    json_text(&manifest(config, json!(null), &[]))
}

#[test]
fn what_is_no_docker_archive_is_refused_with_a_reason() {
    let refuse = |content: &[u8]| Data::new().refuse(&Archive::new(content).reference(None));
    let (error, text) = refuse(&Tar::new().file("index.json", "{}").end());
    assert!(
        matches!(error, Error::WrongKind { .. }) && text.contains("oci:DIR"),
        "{text}"
    );
    assert!(matches!(refuse(b"").0, Error::WrongKind { .. }));
    assert!(matches!(refuse(&[7; 5000]).0, Error::WrongKind { .. }));
    let whole = old();
    assert!(matches!(
        refuse(&whole[..whole.len() / 2]).0,
        Error::WrongKind { .. }
    ));
    assert!(matches!(
        refuse(&Tar::new().file("manifest.json", "[]").end()).0,
        Error::WrongKind { .. }
    ));
    assert!(matches!(
        refuse(&Tar::new().file("manifest.json", "[{").end()).0,
        Error::Malformed { .. }
    ));
    let missing = Tar::new()
        .file("manifest.json", &text_of_manifest("nothing.json"))
        .end();
    assert!(matches!(refuse(&missing).0, Error::Malformed { .. }));
    for layer in [
        "missing/layer.tar",
        "../../../etc/passwd",
        "/etc/passwd",
        "loop",
    ] {
        let manifest = json_text(&manifest("c.json", json!(null), &[layer]));
        let tar = Tar::new()
            .file("c.json", &json_text(&config(&[sha256(b"")])))
            .entry(EntryType::Symlink, "loop", 0o777, 0, "loop", b"")
            .file("manifest.json", &manifest);
        let (error, text) = refuse(&tar.end());
        assert!(
            matches!(error, Error::Malformed { .. } | Error::WrongKind { .. }),
            "{layer}: {text}"
        );
    }
    let dir = tempfile::tempdir().unwrap();
    let reference = |file: &str| Reference::DockerArchive {
        file: dir.path().join(file),
        reference: None,
    };
    assert!(matches!(
        Data::new().refuse(&reference("nothing")).0,
        Error::NoSuchImage { .. }
    ));
    assert!(matches!(
        Data::new().refuse(&reference("")).0,
        Error::WrongKind { .. }
    ));
}
