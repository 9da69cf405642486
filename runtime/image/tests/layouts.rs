//! OCI layouts as people have them, and as they break. These tests need root.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail")]

mod common;

use std::fs;
use std::os::unix::fs::symlink;

use cloison_image::{Error, LayerError, Reference};
use common::*;
use serde_json::{Value, json};

fn one_file(content: &str) -> Vec<u8> {
    Tar::new().file("file", content).end()
}

fn content(image: &cloison_image::Image) -> String {
    fs::read_to_string(image.layers[0].join("file")).unwrap()
}

#[test]
fn an_image_is_unpacked_with_all_that_its_configuration_says() {
    let mut layout = Layout::new();
    let layers = [
        Tar::new().file("a", "1").end(),
        Tar::new().file("b", "2").end(),
        Tar::new().file("c", "3").end(),
    ];
    let stored = [
        layout.blob(LAYER, &layers[0]),
        layout.blob(GZIP, &gzip(&layers[1])),
        layout.blob(ZSTD, &zstd(&layers[2])),
    ];
    let config = config(&layers.each_ref().map(|l| sha256(l)));
    let manifest = layout.manifest(&config, &stored);
    layout.tag(manifest, "v1");
    let data = Data::new();
    let (image, unpacked) = data.resolve_counting(&layout.reference(Some("v1")));
    assert_eq!(unpacked, 3);
    assert_eq!(image.id, sha256(config.to_string().as_bytes()));
    assert_eq!(
        image.reference,
        format!("oci:{}:v1", layout.dir.path().display())
    );
    assert_eq!(
        (image.config.env, image.config.cmd),
        (vec!["A=b".to_owned()], vec!["/bin/true".to_owned()])
    );
    let found: Vec<_> = image.layers.iter().map(|dir| names(dir)).collect();
    assert_eq!(
        found,
        [["c"], ["b"], ["a"]],
        "the topmost layer comes first"
    );
}

#[test]
fn a_layer_is_unpacked_once_for_all_images() {
    let mut layout = Layout::new();
    let (base, extra) = (one_file("base"), one_file("extra"));
    let one = layout.image(std::slice::from_ref(&base));
    let two = layout.image(&[base.clone(), extra]);
    layout.tag(one, "one");
    layout.tag(two, "two");
    let data = Data::new();
    assert_eq!(data.resolve_counting(&layout.reference(Some("one"))).1, 1);
    assert_eq!(data.resolve_counting(&layout.reference(Some("two"))).1, 1);
    assert_eq!(data.resolve_counting(&layout.reference(Some("two"))).1, 0);
    // What is unpacked is not looked for again.
    fs::remove_file(layout.blob_path(&sha256(&gzip(&base)))).unwrap();
    assert_eq!(data.resolve_counting(&layout.reference(Some("one"))).1, 0);
}

#[test]
fn an_image_with_one_layer_twice_or_with_none_can_be_stacked() {
    let mut layout = Layout::new();
    let (a, b) = (one_file("a"), one_file("b"));
    let twice = layout.image(&[a.clone(), b, a]);
    let none = layout.image(&[]);
    layout.tag(twice, "twice");
    layout.tag(none, "none");
    let data = Data::new();
    let image = data.resolve(&layout.reference(Some("twice"))).unwrap();
    assert_eq!((image.layers.len(), content(&image).as_str()), (2, "a"));
    let image = data.resolve(&layout.reference(Some("none"))).unwrap();
    assert_eq!(
        image
            .layers
            .iter()
            .map(|dir| names(dir).len())
            .collect::<Vec<_>>(),
        [0]
    );
}

#[test]
fn docker_media_types_mean_the_same() {
    let mut layout = Layout::new();
    let layer = one_file("docker");
    let stored = layout.blob(
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        &gzip(&layer),
    );
    let config = layout.json(
        "application/vnd.docker.container.image.v1+json",
        &config(&[sha256(&layer)]),
    );
    let media_type = "application/vnd.docker.distribution.manifest.v2+json";
    let manifest =
        json!({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": [stored]});
    let mut descriptor = layout.json(media_type, &manifest);
    descriptor["platform"] = json!({"os": "linux", "architecture": "amd64"});
    let list_type = "application/vnd.docker.distribution.manifest.list.v2+json";
    let list = json!({"schemaVersion": 2, "mediaType": list_type, "manifests": [descriptor]});
    let list = layout.json(list_type, &list);
    layout.add(list);
    assert_eq!(
        content(&Data::new().resolve(&layout.reference(None)).unwrap()),
        "docker"
    );
}

#[test]
fn sha512_digests_are_as_good() {
    let mut layout = Layout::new();
    let layer = one_file("long digest");
    let digest = cloison_image::Digest::of(cloison_image::Algorithm::Sha512, &layer);
    fs::write(layout.blob_path(&digest), &layer).unwrap();
    let stored = json!({"mediaType": LAYER, "digest": digest, "size": layer.len()});
    let manifest = layout.manifest(&config(&[digest]), &[stored]);
    layout.add(manifest);
    assert_eq!(
        content(&Data::new().resolve(&layout.reference(None)).unwrap()),
        "long digest"
    );
}

#[test]
fn a_tag_chooses_and_several_images_need_one() {
    let mut layout = Layout::new();
    for tag in ["one", "docker.io/library/two:latest"] {
        let image = layout.image(&[one_file(tag)]);
        layout.tag(image, tag);
    }
    let mut third = layout.image(&[one_file("three")]);
    third["annotations"] = json!({"io.containerd.image.name": "example.org/three:3"});
    layout.add(third);
    let data = Data::new();
    for tag in ["one", "docker.io/library/two:latest"] {
        assert_eq!(
            content(&data.resolve(&layout.reference(Some(tag))).unwrap()),
            tag
        );
    }
    assert_eq!(
        content(
            &data
                .resolve(&layout.reference(Some("example.org/three:3")))
                .unwrap()
        ),
        "three"
    );
    let (error, text) = data.refuse(&layout.reference(None));
    assert!(matches!(error, Error::Ambiguous { .. }));
    assert!(
        text.contains("one, docker.io/library/two:latest, example.org/three:3"),
        "{text}"
    );
    let (error, text) = data.refuse(&layout.reference(Some("four")));
    assert!(matches!(error, Error::NoSuchName { .. }));
    assert!(
        text.contains("\"four\"") && text.contains("one, "),
        "{text}"
    );
}

#[test]
fn one_image_under_two_tags_needs_no_choice() {
    let mut layout = Layout::new();
    let image = layout.image(&[one_file("same")]);
    layout.tag(image.clone(), "a");
    layout.tag(image, "b");
    assert_eq!(
        content(&Data::new().resolve(&layout.reference(None)).unwrap()),
        "same"
    );
}

fn platform(mut descriptor: Value, os: &str, architecture: &str) -> Value {
    descriptor["platform"] = json!({"os": os, "architecture": architecture});
    descriptor
}

#[test]
fn an_index_is_searched_for_this_hosts_platform() {
    let mut layout = Layout::new();
    let arm = platform(layout.image(&[one_file("arm")]), "linux", "arm64");
    let windows = platform(layout.image(&[one_file("windows")]), "windows", "amd64");
    let ours = platform(layout.image(&[one_file("ours")]), "linux", "amd64");
    let second = platform(layout.image(&[one_file("second")]), "linux", "amd64");
    let mut attestation = platform(layout.image(&[one_file("attestation")]), "linux", "amd64");
    attestation["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest"});
    let manifests = [attestation, arm.clone(), windows, ours, second];
    let inner = layout.json(INDEX, &json!({"schemaVersion": 2, "manifests": manifests}));
    let outer = layout.json(INDEX, &json!({"schemaVersion": 2, "manifests": [inner]}));
    layout.tag(outer, "multi");
    let alone = layout.json(INDEX, &json!({"schemaVersion": 2, "manifests": [arm]}));
    layout.tag(alone, "arm");
    let data = Data::new();
    assert_eq!(
        content(&data.resolve(&layout.reference(Some("multi"))).unwrap()),
        "ours"
    );
    let (error, text) = data.refuse(&layout.reference(Some("arm")));
    assert!(matches!(error, Error::WrongPlatform { .. }));
    assert!(
        text.contains("linux/amd64") && text.contains("linux/arm64"),
        "{text}"
    );
}

#[test]
fn a_configuration_for_another_platform_is_refused() {
    let mut layout = Layout::new();
    let mut config = config(&[]);
    config["architecture"] = json!("riscv64");
    let manifest = layout.manifest(&config, &[]);
    layout.add(manifest);
    let (error, text) = Data::new().refuse(&layout.reference(None));
    assert!(
        matches!(error, Error::WrongPlatform { .. }) && text.contains("linux/riscv64"),
        "{text}"
    );
}

#[test]
fn indexes_nested_without_end_are_refused() {
    let mut layout = Layout::new();
    let mut inner = layout.image(&[]);
    for _ in 0..6 {
        inner = layout.json(INDEX, &json!({"schemaVersion": 2, "manifests": [inner]}));
    }
    layout.add(inner);
    assert!(matches!(
        Data::new().refuse(&layout.reference(None)).0,
        Error::TooLarge { .. }
    ));
}

#[test]
fn what_is_no_layout_is_refused_with_a_reason() {
    let data = Data::new();
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| Reference::OciLayout {
        dir: dir.path().join(name),
        tag: None,
    };
    assert!(matches!(
        data.refuse(&at("nothing")).0,
        Error::NoSuchImage { .. }
    ));
    fs::write(dir.path().join("file"), "x").unwrap();
    assert!(matches!(
        data.refuse(&at("file")).0,
        Error::WrongKind { .. }
    ));
    fs::create_dir(dir.path().join("empty")).unwrap();
    assert!(matches!(
        data.refuse(&at("empty")).0,
        Error::WrongKind { .. }
    ));
    let layout = Layout::new();
    assert!(
        matches!(
            data.refuse(&layout.reference(None)).0,
            Error::WrongKind { .. }
        ),
        "no image in it"
    );
    fs::write(layout.path("index.json"), "{").unwrap();
    assert!(matches!(
        data.refuse(&layout.reference(None)).0,
        Error::Malformed { .. }
    ));
    fs::remove_file(layout.path("index.json")).unwrap();
    assert!(matches!(
        data.refuse(&layout.reference(None)).0,
        Error::MissingBlob { .. }
    ));
    fs::write(
        layout.path("oci-layout"),
        r#"{"imageLayoutVersion":"2.0.0"}"#,
    )
    .unwrap();
    assert!(matches!(
        data.refuse(&layout.reference(None)).0,
        Error::WrongKind { .. }
    ));
}

#[test]
fn documents_that_are_not_what_was_promised_are_refused() {
    let data = Data::new();
    let mut layout = Layout::new();
    let manifest = layout.image(&[one_file("x")]);
    layout.add(manifest.clone());
    let path = layout.blob_path(&manifest["digest"].as_str().unwrap().parse().unwrap());
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"layers\"", "\"Layers\"")).unwrap();
    assert!(matches!(
        data.refuse(&layout.reference(None)).0,
        Error::WrongDigest { .. }
    ));
    fs::write(&path, format!("{text} ")).unwrap();
    assert!(matches!(
        data.refuse(&layout.reference(None)).0,
        Error::WrongSize { .. }
    ));
    fs::remove_file(&path).unwrap();
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
    assert!(
        matches!(
            data.refuse(&layout.reference(None)).0,
            Error::MissingBlob { .. }
        ),
        "a FIFO"
    );
    fs::remove_file(&path).unwrap();
    let (error, text) = data.refuse(&layout.reference(None));
    assert!(
        matches!(error, Error::MissingBlob { .. }) && text.contains("copy the image again"),
        "{text}"
    );
}

/// The error of a layout with this manifest.
fn refused_manifest(layout: &mut Layout, manifest: &Value) -> Error {
    let descriptor = layout.json(MANIFEST, manifest);
    layout.add(descriptor);
    Data::new().refuse(&layout.reference(None)).0
}

#[test]
fn manifests_that_make_no_sense_are_refused() {
    let whole = |layout: &Layout| {
        let config = layout.json(CONFIG, &config(&[]));
        json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": []})
    };
    let broken = |key: &str, value: Value| {
        let mut layout = Layout::new();
        let mut manifest = whole(&layout);
        manifest[key] = value;
        refused_manifest(&mut layout, &manifest)
    };
    assert!(matches!(
        broken("schemaVersion", json!(1)),
        Error::Malformed { .. }
    ));
    assert!(matches!(
        broken("mediaType", json!(INDEX)),
        Error::Malformed { .. }
    ));
    assert!(matches!(
        broken("config", json!("x")),
        Error::Malformed { .. }
    ));
    let layer = json!({"mediaType": LAYER, "digest": sha256(b""), "size": 0});
    assert!(
        matches!(broken("layers", json!([layer])), Error::Malformed { .. }),
        "one layer, no diff ID"
    );
    assert!(matches!(
        broken("layers", json!(vec![layer.clone(); 1000])),
        Error::TooLarge { .. }
    ));
    let weird = json!({"mediaType": "application/x-weird", "digest": sha256(b""), "size": 0});
    assert!(matches!(
        broken("layers", json!([weird])),
        Error::UnsupportedMediaType { .. }
    ));
    let unknown =
        json!({"mediaType": LAYER, "digest": "sha384:".to_owned() + &"0".repeat(96), "size": 0});
    assert!(matches!(
        broken("layers", json!([unknown])),
        Error::Malformed { .. }
    ));
    let up = json!({"mediaType": LAYER, "digest": "sha256:../../../../etc/passwd", "size": 0});
    assert!(matches!(
        broken("layers", json!([up])),
        Error::Malformed { .. }
    ));
    let artifact = json!({"mediaType": "application/vnd.oci.empty.v1+json", "digest": sha256(b"{}"), "size": 2});
    assert!(matches!(
        broken("config", artifact),
        Error::UnsupportedMediaType { .. }
    ));
    let mut huge = Layout::new();
    let manifest = json!({"padding": "x".repeat(5 << 20)});
    assert!(matches!(
        refused_manifest(&mut huge, &manifest),
        Error::TooLarge { .. }
    ));
}

#[test]
fn configurations_that_make_no_sense_are_refused() {
    let broken = |key: &str, value: Value| {
        let mut layout = Layout::new();
        let mut config = config(&[]);
        config[key] = value;
        let manifest = layout.manifest(&config, &[]);
        layout.add(manifest);
        Data::new().refuse(&layout.reference(None)).0
    };
    assert!(matches!(
        broken("rootfs", json!({"type": "layers", "diff_ids": ["x"]})),
        Error::Malformed { .. }
    ));
    assert!(matches!(
        broken("rootfs", json!({"type": "zip", "diff_ids": []})),
        Error::Malformed { .. }
    ));
    assert!(matches!(
        broken("config", json!({"Env": ["A=\u{0}"]})),
        Error::Malformed { .. }
    ));
    assert!(matches!(
        broken("config", json!([])),
        Error::Malformed { .. }
    ));
}

/// The error of a layout with one layer, after a look whether anything of it stayed in the store.
fn refused_layer(
    media_type: &str,
    blob: &[u8],
    diff_id: &cloison_image::Digest,
    damage: impl Fn(&Layout),
) -> (Error, String) {
    let mut layout = Layout::new();
    let stored = layout.blob(media_type, blob);
    let manifest = layout.manifest(&config(std::slice::from_ref(diff_id)), &[stored]);
    layout.add(manifest);
    damage(&layout);
    let data = Data::new();
    let refused = data.refuse(&layout.reference(None));
    assert!(data.layers().is_empty());
    refused
}

fn layer_error(error: &Error) -> &LayerError {
    match error {
        Error::Layer { source, .. } => source,
        other => panic!("{other:?}"),
    }
}

#[test]
fn layers_that_are_not_what_was_promised_are_refused() {
    let tar = one_file("content");
    let good = gzip(&tar);
    let id = sha256(&tar);
    let blob = |layout: &Layout| layout.blob_path(&sha256(&good));

    let (error, text) = refused_layer(GZIP, &good, &sha256(b"other"), |_| ());
    assert!(
        matches!(layer_error(&error), LayerError::WrongDiffId { .. }),
        "{text}"
    );

    let (error, text) = refused_layer(GZIP, &good, &id, |l| {
        let mut damaged = good.clone();
        *damaged.last_mut().unwrap() ^= 1;
        fs::write(blob(l), damaged).unwrap();
    });
    assert!(
        matches!(layer_error(&error), LayerError::WrongBlob { .. }),
        "{text}"
    );

    let (error, _) = refused_layer(GZIP, &good, &id, |l| {
        fs::write(blob(l), &good[..good.len() - 1]).unwrap()
    });
    assert!(matches!(error, Error::WrongSize { .. }));

    let (error, text) = refused_layer(GZIP, &good[..good.len() - 9], &id, |_| ());
    assert!(
        matches!(layer_error(&error), LayerError::Read(_)),
        "truncated by whoever made the image: {text}"
    );

    let (error, _) = refused_layer(GZIP, &good, &id, |l| fs::remove_file(blob(l)).unwrap());
    assert!(matches!(error, Error::MissingBlob { .. }));

    let (error, text) = refused_layer(ZSTD, &zstd(&[7; 1000])[..10], &id, |_| ());
    assert!(matches!(layer_error(&error), LayerError::Read(_)), "{text}");

    let (error, text) = refused_layer(
        LAYER,
        b"no archive at all, but as long as a header is. "
            .repeat(20)
            .as_slice(),
        &id,
        |_| (),
    );
    assert!(
        matches!(layer_error(&error), LayerError::Archive(_)),
        "{text}"
    );
}

#[test]
fn a_layer_compressed_otherwise_than_its_media_type_says_is_refused() {
    let tar = one_file("content");
    let id = sha256(&tar);
    for (media_type, blob) in [
        (GZIP, tar.clone()),
        (GZIP, zstd(&tar)),
        (ZSTD, gzip(&tar)),
        (LAYER, gzip(&tar)),
        (LAYER, b"BZh91AY".to_vec()),
    ] {
        let (error, text) = refused_layer(media_type, &blob, &id, |_| ());
        assert!(
            matches!(layer_error(&error), LayerError::Compression { .. }),
            "{text}"
        );
    }
}

#[test]
fn what_follows_the_end_of_a_layers_archive_belongs_to_its_digest() {
    let mut layout = Layout::new();
    let mut tar = one_file("content");
    tar.extend_from_slice(b"trailing bytes that no tar reader looks at");
    let image = layout.image(&[tar]);
    layout.add(image);
    assert_eq!(
        content(&Data::new().resolve(&layout.reference(None)).unwrap()),
        "content"
    );
}

#[test]
fn a_layer_that_would_escape_is_refused_and_leaves_nothing() {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..9].copy_from_slice(b"../escape");
    header.set_entry_type(tar::EntryType::Regular);
    header.set_size(0);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_cksum();
    let mut builder = tar::Builder::new(Vec::new());
    builder.append(&header, &b""[..]).unwrap();
    let tar = builder.into_inner().unwrap();
    let (error, text) = refused_layer(LAYER, &tar, &sha256(&tar), |_| ());
    assert!(
        matches!(layer_error(&error), LayerError::Refused { .. }),
        "{text}"
    );
    assert!(text.contains("../escape"), "{text}");
}

#[test]
fn blobs_may_be_links_to_where_a_user_keeps_them() {
    let mut layout = Layout::new();
    let layer = one_file("linked");
    let image = layout.image(std::slice::from_ref(&layer));
    layout.add(image);
    let blob = layout.blob_path(&sha256(&gzip(&layer)));
    fs::rename(&blob, layout.path("elsewhere")).unwrap();
    symlink(layout.path("elsewhere"), &blob).unwrap();
    assert_eq!(
        content(&Data::new().resolve(&layout.reference(None)).unwrap()),
        "linked"
    );
}

#[test]
fn names_in_registries_are_refused_with_what_to_use_instead() {
    let (error, text) = Data::new().refuse(&"docker.io/library/busybox".parse().unwrap());
    assert!(matches!(error, Error::RegistryUnsupported(_)));
    assert!(
        text.contains("oci:DIR")
            && text.contains("docker-archive:FILE")
            && text.contains("rootfs:DIR"),
        "{text}"
    );
}

#[test]
fn a_root_directory_is_an_image_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "bare").unwrap();
    let data = Data::new();
    let reference = Reference::RootfsDir(dir.path().to_owned());
    let image = data.resolve(&reference).unwrap();
    assert_eq!(image.layers, [dir.path().canonicalize().unwrap()]);
    assert_eq!(image.config.env, [cloison_image::DEFAULT_PATH]);
    assert_eq!(image.id, data.resolve(&reference).unwrap().id);
    let (error, _) = data.refuse(&Reference::RootfsDir(dir.path().join("nothing")));
    assert!(matches!(error, Error::NoSuchImage { .. }));
    let (error, _) = data.refuse(&Reference::RootfsDir(dir.path().join("file")));
    assert!(matches!(error, Error::WrongKind { .. }));
}
