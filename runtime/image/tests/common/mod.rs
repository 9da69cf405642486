//! Images built on the spot, byte by byte, so that each test can break exactly one thing. Unpacking needs root.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use cloison_image::{Algorithm, Digest, Error, Image, Progress, Reference, Store};
use serde_json::{Value, json};
use tar::{Builder, EntryType, Header};
use tempfile::TempDir;

pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
pub const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

/// A layer's tar archive.
pub struct Tar(Builder<Vec<u8>>);

impl Tar {
    pub fn new() -> Tar {
        Tar(Builder::new(Vec::new()))
    }

    pub fn entry(
        mut self,
        kind: EntryType,
        name: &str,
        mode: u32,
        owner: u64,
        link: &str,
        content: &[u8],
    ) -> Tar {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(owner);
        header.set_gid(owner);
        header.set_mtime(1_000_000_000);
        header.set_size(content.len() as u64);
        if link.is_empty() {
            self.0.append_data(&mut header, name, content).unwrap();
        } else {
            self.0.append_link(&mut header, name, link).unwrap();
        }
        self
    }

    pub fn file(self, name: &str, content: &str) -> Tar {
        self.entry(EntryType::Regular, name, 0o644, 0, "", content.as_bytes())
    }

    pub fn dir(self, name: &str, mode: u32) -> Tar {
        self.entry(EntryType::Directory, name, mode, 0, "", b"")
    }

    pub fn end(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

pub fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

pub fn zstd(content: &[u8]) -> Vec<u8> {
    zstd::encode_all(content, 1).unwrap()
}

pub fn sha256(content: &[u8]) -> Digest {
    Digest::of(Algorithm::Sha256, content)
}

pub fn config(diff_ids: &[Digest]) -> Value {
    json!({
        "architecture": if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" },
        "os": "linux",
        "config": {"Env": ["A=b"], "Cmd": ["/bin/true"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    })
}

/// An OCI layout in a temporary directory.
pub struct Layout {
    pub dir: TempDir,
    manifests: Vec<Value>,
}

impl Layout {
    pub fn new() -> Layout {
        let layout = Layout {
            dir: tempfile::tempdir().unwrap(),
            manifests: Vec::new(),
        };
        fs::create_dir_all(layout.path("blobs/sha256")).unwrap();
        fs::create_dir_all(layout.path("blobs/sha512")).unwrap();
        fs::write(
            layout.path("oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )
        .unwrap();
        layout.write_index();
        layout
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.path("blobs")
            .join(digest.algorithm().name())
            .join(digest.hex())
    }

    /// Stores a blob and describes it.
    pub fn blob(&self, media_type: &str, content: &[u8]) -> Value {
        let digest = sha256(content);
        fs::write(self.blob_path(&digest), content).unwrap();
        json!({"mediaType": media_type, "digest": digest, "size": content.len()})
    }

    pub fn json(&self, media_type: &str, document: &Value) -> Value {
        self.blob(media_type, document.to_string().as_bytes())
    }

    /// Stores a manifest for a configuration and described layers.
    pub fn manifest(&self, config: &Value, layers: &[Value]) -> Value {
        let config = self.json(CONFIG, config);
        let manifest =
            json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers});
        self.json(MANIFEST, &manifest)
    }

    /// Stores an image of gzip layers, bottom first.
    pub fn image(&self, layers: &[Vec<u8>]) -> Value {
        let diff_ids: Vec<Digest> = layers.iter().map(|l| sha256(l)).collect();
        let layers: Vec<Value> = layers.iter().map(|l| self.blob(GZIP, &gzip(l))).collect();
        self.manifest(&config(&diff_ids), &layers)
    }

    /// Adds to the index, under a tag.
    pub fn tag(&mut self, mut descriptor: Value, tag: &str) {
        descriptor["annotations"]["org.opencontainers.image.ref.name"] = json!(tag);
        self.add(descriptor);
    }

    /// Adds to the index.
    pub fn add(&mut self, descriptor: Value) {
        self.manifests.push(descriptor);
        self.write_index();
    }

    fn write_index(&self) {
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": self.manifests});
        fs::write(self.path("index.json"), index.to_string()).unwrap();
    }

    pub fn reference(&self, tag: Option<&str>) -> Reference {
        Reference::OciLayout {
            dir: self.dir.path().to_owned(),
            tag: tag.map(str::to_owned),
        }
    }
}

/// An empty store in a temporary directory.
pub struct Data {
    pub dir: TempDir,
    pub store: Store,
}

impl Data {
    pub fn new() -> Data {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        Data { dir, store }
    }

    pub fn resolve(&self, reference: &Reference) -> Result<Image, Error> {
        self.store.resolve(reference, &mut |_| {})
    }

    /// Resolves and counts the layers that had to be unpacked.
    pub fn resolve_counting(&self, reference: &Reference) -> (Image, usize) {
        let mut unpacked = 0;
        let image = self.store.resolve(reference, &mut |p| {
            unpacked += usize::from(matches!(p, Progress::Unpacked { .. }))
        });
        (image.unwrap(), unpacked)
    }

    /// Resolves what cannot be resolved: the error, with its causes, after a look whether anything was left behind.
    pub fn refuse(&self, reference: &Reference) -> (Error, String) {
        let error = self.resolve(reference).expect_err("it was accepted");
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(e) = cause {
            text.push_str(": ");
            text.push_str(&e.to_string());
            cause = e.source();
        }
        assert_eq!(
            names(&self.dir.path().join("tmp")),
            Vec::<String>::new(),
            "left behind by: {text}"
        );
        (error, text)
    }

    pub fn layers(&self) -> Vec<String> {
        names(&self.dir.path().join("layers/sha256"))
    }
}

/// The names in a directory, sorted; none if there is no directory.
pub fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .map(|entries| {
            entries
                .map(|e| e.unwrap().file_name().into_string().unwrap())
                .collect()
        })
        .unwrap_or_default();
    names.sort();
    names
}

/// Gives the calling thread a mount namespace of its own, in which it may mount as it likes.
pub fn own_mounts() {
    use nix::mount::{MsFlags, mount};
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
}
