//! What `docker save` writes: a tar archive with a `manifest.json` that names configurations and layers by their paths in
//! the archive, in the layout of old (`ID/layer.tar`) or as OCI blobs (`blobs/sha256/…`). The archive is read where it lies;
//! only its headers are walked through to find an image.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use serde::Deserialize;

use crate::blob::{BlobReader, Place, open_regular};
use crate::compression::{Compression, MAGIC_LEN};
use crate::digest::{Algorithm, Digest};
use crate::error::{Error, LayerError, Result};
use crate::source::{self, Source, StoredLayer, digest_of_blob_path, list, parse};
use crate::tarball::{Archive, Kind};

/// Most members of an archive. An image has two or three for each layer.
const MAX_MEMBERS: usize = 16_384;

/// Links from member to member followed at most.
const MAX_LINKS: usize = 8;

const KIND: &str = "a docker archive";
const MANIFEST: &str = "manifest.json";

/// One image of `manifest.json` (moby's image/tarexport `manifestItem`).
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Item {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

impl Item {
    fn tags(&self) -> &[String] {
        self.repo_tags.as_deref().unwrap_or_default()
    }
}

/// Finds the image with the given tag, or the only one. A compressed archive is first decompressed into a nameless file in
/// `scratch`.
pub(crate) fn find(file: &Path, reference: Option<&str>, scratch: &Path) -> Result<Source> {
    let members = Members::read(file, scratch)?;
    let Some(manifest) = members.get(MANIFEST)? else {
        let hint = if members.get("index.json")?.is_some() {
            "; unpack it and use oci:DIR"
        } else {
            ""
        };
        return Err(Error::WrongKind {
            path: file.to_owned(),
            kind: KIND,
            reason: format!("it has no {MANIFEST}{hint}"),
        });
    };
    let text = manifest.read_document(MANIFEST, None, None)?;
    let items: Vec<Item> = parse(&text, MANIFEST, file)?;
    let item = choose(&items, reference, file)?;

    let what = format!("image configuration {}", item.config);
    let config = members
        .require(&item.config, &what)?
        .read_document(&what, None, None)?;
    let id = source::image_id(&config);
    if let Some(expected) = digest_in_config_name(&item.config) {
        let actual = Digest::of(expected.algorithm(), &config);
        if actual != expected {
            return Err(Error::WrongDigest {
                what,
                path: file.to_owned(),
                expected,
                actual,
            });
        }
    }
    let layers = item.layers.iter().flatten().map(|name| {
        Ok(StoredLayer {
            place: members.require(name, &format!("layer {name}"))?,
            digest: digest_of_blob_path(name),
            size: None,
            compression: None,
        })
    });
    source::assemble(file, &config, id, layers.collect::<Result<_>>()?)
}

fn choose<'i>(items: &'i [Item], reference: Option<&str>, file: &Path) -> Result<&'i Item> {
    let path = || file.to_owned();
    let available = || list(items.iter().flat_map(Item::tags));
    match reference {
        Some(wanted) => {
            let full = full_name(wanted);
            let chosen = items
                .iter()
                .find(|i| i.tags().iter().any(|t| full_name(t) == full));
            chosen.ok_or_else(|| Error::NoSuchName {
                path: path(),
                name: wanted.to_owned(),
                available: available(),
            })
        }
        None => match items {
            [] => Err(Error::WrongKind {
                path: path(),
                kind: KIND,
                reason: format!("its {MANIFEST} names no image"),
            }),
            [only] => Ok(only),
            _ => Err(Error::Ambiguous {
                path: path(),
                available: available(),
            }),
        },
    }
}

/// A name without what docker adds or leaves away as it pleases: its own registry, `library/`, `:latest`.
fn full_name(name: &str) -> String {
    let name = name.strip_prefix("docker.io/").unwrap_or(name);
    let name = name.strip_prefix("library/").unwrap_or(name);
    let has_tag = name
        .rsplit('/')
        .next()
        .is_some_and(|last| last.contains(':'));
    if has_tag {
        name.to_owned()
    } else {
        format!("{name}:latest")
    }
}

/// A configuration is called by its digest: `HEX.json` or `blobs/ALGORITHM/HEX`.
fn digest_in_config_name(name: &str) -> Option<Digest> {
    digest_of_blob_path(name).or_else(|| {
        let hex = name.strip_suffix(".json")?;
        format!("{}:{hex}", Algorithm::Sha256.name()).parse().ok()
    })
}

enum Member {
    File {
        offset: u64,
        size: u64,
    },
    /// Relative to the archive's root.
    Link(String),
}

struct Members {
    archive: Arc<File>,
    path: PathBuf,
    by_name: HashMap<String, Member>,
}

impl Members {
    fn read(path: &Path, scratch: &Path) -> Result<Members> {
        let file = open_regular(path).map_err(|source| match source.kind() {
            io::ErrorKind::InvalidInput => Error::WrongKind {
                path: path.to_owned(),
                kind: KIND,
                reason: source.to_string(),
            },
            _ => Error::NoSuchImage {
                path: path.to_owned(),
                source,
            },
        })?;
        let archive = Arc::new(decompressed(file, path, scratch)?);
        let failed = |source| Error::Io {
            action: "read",
            path: path.to_owned(),
            source,
        };
        let mut reader = Archive::new(BlobReader::whole(Arc::clone(&archive)).map_err(failed)?);
        let mut by_name = HashMap::new();
        loop {
            let entry = match reader.next() {
                Ok(Some(entry)) => entry,
                Ok(None) => break,
                Err(LayerError::Read(source)) if source.kind() != io::ErrorKind::UnexpectedEof => {
                    return Err(failed(source));
                }
                Err(LayerError::Read(_)) => {
                    return Err(not_an_archive(path, "it ends too early; copy it again"));
                }
                Err(e) => return Err(not_an_archive(path, &e.to_string())),
            };
            let Some(name) = member_name(&entry.path) else {
                continue;
            };
            let member = match entry.kind {
                // The size of a sparse file is that of its holes as well; nobody writes one here.
                Kind::File { size, .. } if size == reader.content() => Member::File {
                    offset: reader.position(),
                    size,
                },
                Kind::HardLink(target) => match member_name(&target) {
                    Some(target) => Member::Link(target),
                    None => continue,
                },
                Kind::Symlink(target) => match link_target(&name, &target) {
                    Some(target) => Member::Link(target),
                    None => continue,
                },
                _ => continue,
            };
            by_name.insert(name, member);
            if by_name.len() > MAX_MEMBERS {
                return Err(Error::TooLarge {
                    what: "the number of members".to_owned(),
                    path: path.to_owned(),
                    size: by_name.len() as u64,
                    limit: MAX_MEMBERS as u64,
                });
            }
        }
        Ok(Members {
            archive,
            path: path.to_owned(),
            by_name,
        })
    }

    fn get(&self, name: &str) -> Result<Option<Place>> {
        let Some(mut name) = member_name(name.as_bytes()) else {
            return Ok(None);
        };
        for _ in 0..=MAX_LINKS {
            match self.by_name.get(&name) {
                None => return Ok(None),
                Some(Member::Link(target)) => name.clone_from(target),
                Some(Member::File { offset, size }) => {
                    let (archive, path) = (Arc::clone(&self.archive), self.path.clone());
                    return Ok(Some(Place::Member {
                        archive,
                        path,
                        offset: *offset,
                        size: *size,
                    }));
                }
            }
        }
        Err(not_an_archive(&self.path, "its links lead in a circle"))
    }

    fn require(&self, name: &str, what: &str) -> Result<Place> {
        self.get(name)?.ok_or_else(|| Error::Malformed {
            what: MANIFEST.to_owned(),
            path: self.path.clone(),
            reason: format!("{what} is not in the archive; it is incomplete"),
        })
    }
}

fn not_an_archive(path: &Path, reason: &str) -> Error {
    Error::WrongKind {
        path: path.to_owned(),
        kind: KIND,
        reason: reason.to_owned(),
    }
}

/// A member's path without needless parts; `None` if it leads out of the archive or is no text.
fn member_name(raw: &[u8]) -> Option<String> {
    let mut parts = Vec::new();
    for part in std::str::from_utf8(raw).ok()?.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            _ => parts.push(part),
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

/// Where a symbolic link leads, as docker wrote them between layers that are the same.
fn link_target(name: &str, target: &[u8]) -> Option<String> {
    let target = std::str::from_utf8(target)
        .ok()
        .filter(|t| !t.starts_with('/'))?;
    let dir = name.rsplit_once('/').map_or("", |(dir, _)| dir);
    member_name(format!("{dir}/{target}").as_bytes())
}

/// The archive itself, or its content in a nameless file if it is compressed.
fn decompressed(file: File, path: &Path, scratch: &Path) -> Result<File> {
    let failed = |source| Error::Io {
        action: "read",
        path: path.to_owned(),
        source,
    };
    let reader = BlobReader::whole(Arc::new(file.try_clone().map_err(failed)?)).map_err(failed)?;
    let compression = Compression::of(&reader.peek::<MAGIC_LEN>().map_err(failed)?);
    if compression == Compression::None {
        return Ok(file);
    }
    let Some(decoder) = compression.decoder(reader) else {
        let reason = format!(
            "it is compressed with {}; decompress it first",
            compression.name()
        );
        return Err(Error::WrongKind {
            path: path.to_owned(),
            kind: KIND,
            reason,
        });
    };
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let spool = rustix::fs::open(scratch, flags, Mode::from_raw_mode(0o600)).map_err(|e| {
        Error::DataDir {
            action: "create a file in",
            path: scratch.to_owned(),
            source: e.into(),
        }
    })?;
    let mut spool = File::from(spool);
    io::copy(&mut decoder.map_err(failed)?, &mut spool).map_err(|source| Error::Io {
        action: "decompress",
        path: path.to_owned(),
        source,
    })?;
    Ok(spool)
}
