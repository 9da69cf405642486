//! OCI image layouts (image-spec image-layout.md): from a directory and a tag to an image. Every document is checked
//! against the digest and size that led to it before it is believed.

use std::io;
use std::path::{Path, PathBuf};

use oci_spec::image::{Descriptor, ImageIndex, ImageManifest, MediaType, OciLayout};

use crate::blob::Place;
use crate::compression::Compression;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::limits::MAX_LAYERS;
use crate::source::{self, Source, StoredLayer, blob_path, list, parse};

/// Indexes inside indexes followed at most.
const MAX_NESTING: usize = 4;

const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Where containerd and docker write the full name when the tag alone is in [`REF_NAME`].
const CONTAINERD_NAME: &str = "io.containerd.image.name";

/// Marks what buildkit stores beside an image, as if it were an image for the platform `unknown/unknown`.
const ATTESTATION: &str = "vnd.docker.reference.type";

/// Finds the image with the given tag, or the only one.
pub(crate) fn find(dir: &Path, tag: Option<&str>) -> Result<Source> {
    check_marker(dir)?;
    let layout = Layout { dir };
    let place = Place::File(dir.join("index.json"));
    let text = place.read_document("the index", None, None)?;
    let index: ImageIndex = parse(&text, "the index", place.path())?;
    let manifest = layout.choose(&index, tag)?;
    layout.image(&manifest)
}

fn check_marker(dir: &Path) -> Result<()> {
    let file = dir.join("oci-layout");
    let wrong = |reason| Error::WrongKind {
        path: dir.to_owned(),
        kind: "an OCI image layout",
        reason,
    };
    let place = Place::File(file.clone());
    let text = match place.read_document("the file oci-layout", None, None) {
        Err(Error::MissingBlob { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Err(match dir.metadata() {
                Err(source) => Error::NoSuchImage {
                    path: dir.to_owned(),
                    source,
                },
                Ok(_) => wrong("it has no file oci-layout".to_owned()),
            });
        }
        Err(Error::MissingBlob { source, .. }) if source.kind() == io::ErrorKind::NotADirectory => {
            return Err(wrong(
                "it is not a directory; for what docker save writes use docker-archive:FILE"
                    .to_owned(),
            ));
        }
        other => other?,
    };
    let marker: OciLayout = parse(&text, "the file oci-layout", &file)?;
    match marker.image_layout_version().as_str() {
        "1.0.0" => Ok(()),
        other => Err(wrong(format!(
            "its version is {other:?}, and only \"1.0.0\" is supported"
        ))),
    }
}

struct Layout<'a> {
    dir: &'a Path,
}

impl Layout<'_> {
    /// The manifest for this host that a tag, or none, stands for.
    fn choose(&self, index: &ImageIndex, tag: Option<&str>) -> Result<Descriptor> {
        let images: Vec<&Descriptor> = index.manifests().iter().filter(|d| is_image(d)).collect();
        let named: Vec<&Descriptor> = images
            .iter()
            .copied()
            .filter(|d| tag.is_none_or(|t| has_name(d, t)))
            .collect();
        let path = || self.dir.to_owned();
        let available = || list(images.iter().filter_map(|d| name(d)));
        match (named.is_empty(), tag) {
            (true, Some(tag)) => {
                return Err(Error::NoSuchName {
                    path: path(),
                    name: tag.to_owned(),
                    available: available(),
                });
            }
            (true, None) => {
                let reason = "its index names no image".to_owned();
                return Err(Error::WrongKind {
                    path: path(),
                    kind: "an image",
                    reason,
                });
            }
            (false, _) => {}
        }
        let fitting = self.fitting(named)?;
        if fitting.iter().any(|d| d.digest() != fitting[0].digest()) {
            return Err(Error::Ambiguous {
                path: path(),
                available: available(),
            });
        }
        self.descend(fitting[0].clone())
    }

    /// Follows indexes down to a manifest. Within one, the first that fits is meant (image-spec image-index.md).
    fn descend(&self, mut descriptor: Descriptor) -> Result<Descriptor> {
        for _ in 0..MAX_NESTING {
            if !is_index(descriptor.media_type()) {
                return Ok(descriptor);
            }
            let what = format!("index {}", descriptor.digest());
            let (text, path) = self.document(&descriptor, &what)?;
            let index: ImageIndex = parse(&text, &what, &path)?;
            check_media_type(index.media_type().as_ref(), &descriptor, &what, &path)?;
            let images: Vec<&Descriptor> =
                index.manifests().iter().filter(|d| is_image(d)).collect();
            let fitting = self.fitting(images)?;
            let exact = fitting.iter().find(|d| d.platform().is_some());
            descriptor = (*exact.unwrap_or(&fitting[0])).clone();
        }
        Err(Error::TooLarge {
            what: "the nesting of indexes".to_owned(),
            path: self.dir.to_owned(),
            size: MAX_NESTING as u64 + 1,
            limit: MAX_NESTING as u64,
        })
    }

    /// Those that do not say they are for another platform; at least one.
    fn fitting<'d>(&self, images: Vec<&'d Descriptor>) -> Result<Vec<&'d Descriptor>> {
        let (os, architecture) = source::host_platform();
        let fits = |d: &Descriptor| {
            d.platform()
                .as_ref()
                .is_none_or(|p| (p.os(), p.architecture()) == (&os, &architecture))
        };
        let fitting: Vec<&Descriptor> = images.iter().copied().filter(|d| fits(d)).collect();
        if fitting.is_empty() {
            let platforms = images.iter().filter_map(|d| d.platform().as_ref());
            return Err(Error::WrongPlatform {
                path: self.dir.to_owned(),
                wanted: format!("{os}/{architecture}"),
                available: list(platforms.map(|p| format!("{}/{}", p.os(), p.architecture()))),
            });
        }
        Ok(fitting)
    }

    fn image(&self, descriptor: &Descriptor) -> Result<Source> {
        let what = format!("manifest {}", descriptor.digest());
        let (text, path) = self.document(descriptor, &what)?;
        let manifest: ImageManifest = parse(&text, &what, &path)?;
        check_media_type(manifest.media_type().as_ref(), descriptor, &what, &path)?;
        if manifest.schema_version() != 2 {
            let reason = format!("its schema version is {}, not 2", manifest.schema_version());
            return Err(Error::Malformed { what, path, reason });
        }
        if manifest.layers().len() > MAX_LAYERS {
            let (size, limit) = (manifest.layers().len() as u64, MAX_LAYERS as u64);
            return Err(Error::TooLarge {
                what: format!("the number of layers of {what}"),
                path,
                size,
                limit,
            });
        }
        if !is_config(manifest.config().media_type()) {
            return Err(Error::UnsupportedMediaType {
                what: format!("the configuration of {what}"),
                path,
                media_type: manifest.config().media_type().to_string(),
                expected: "this is no container image",
            });
        }
        let layers = manifest
            .layers()
            .iter()
            .map(|layer| self.layer(layer, &path))
            .collect::<Result<_>>()?;
        let what = format!("image configuration {}", manifest.config().digest());
        let (config, config_path) = self.document(manifest.config(), &what)?;
        source::assemble(
            &config_path,
            &config,
            digest(manifest.config(), &path)?,
            layers,
        )
    }

    fn layer(&self, descriptor: &Descriptor, manifest: &Path) -> Result<StoredLayer> {
        let digest = digest(descriptor, manifest)?;
        let compression = layer_compression(descriptor.media_type()).ok_or_else(|| {
            Error::UnsupportedMediaType {
                what: format!("layer {digest}"),
                path: manifest.to_owned(),
                media_type: descriptor.media_type().to_string(),
                expected: "a layer must be a tar archive, plain or compressed with gzip or zstd",
            }
        })?;
        Ok(StoredLayer {
            place: Place::File(self.dir.join(blob_path(&digest))),
            digest: Some(digest),
            size: Some(descriptor.size()),
            compression: Some(compression),
        })
    }

    fn document(&self, descriptor: &Descriptor, what: &str) -> Result<(Vec<u8>, PathBuf)> {
        let digest = digest(descriptor, &self.dir.join("index.json"))?;
        let path = self.dir.join(blob_path(&digest));
        let text = Place::File(path.clone()).read_document(
            what,
            Some(&digest),
            Some(descriptor.size()),
        )?;
        Ok((text, path))
    }
}

fn digest(descriptor: &Descriptor, path: &Path) -> Result<Digest> {
    descriptor
        .digest()
        .as_ref()
        .parse()
        .map_err(|e: crate::InvalidDigest| Error::Malformed {
            what: "a descriptor".to_owned(),
            path: path.to_owned(),
            reason: e.to_string(),
        })
}

/// A document that says what it is must be what its descriptor says, lest one text be read as two things.
fn check_media_type(
    said: Option<&MediaType>,
    descriptor: &Descriptor,
    what: &str,
    path: &Path,
) -> Result<()> {
    match said {
        Some(said) if said != descriptor.media_type() => Err(Error::Malformed {
            what: what.to_owned(),
            path: path.to_owned(),
            reason: format!(
                "it says it is {said}, and what refers to it says {}",
                descriptor.media_type()
            ),
        }),
        _ => Ok(()),
    }
}

fn annotation<'d>(descriptor: &'d Descriptor, key: &str) -> Option<&'d str> {
    descriptor
        .annotations()
        .as_ref()?
        .get(key)
        .map(String::as_str)
}

fn name(descriptor: &Descriptor) -> Option<&str> {
    annotation(descriptor, REF_NAME).or_else(|| annotation(descriptor, CONTAINERD_NAME))
}

fn has_name(descriptor: &Descriptor, wanted: &str) -> bool {
    [REF_NAME, CONTAINERD_NAME]
        .into_iter()
        .any(|key| annotation(descriptor, key) == Some(wanted))
}

fn is_image(descriptor: &Descriptor) -> bool {
    let is_manifest = match descriptor.media_type() {
        MediaType::ImageManifest => true,
        other => other.as_ref() == "application/vnd.docker.distribution.manifest.v2+json",
    };
    (is_manifest || is_index(descriptor.media_type()))
        && annotation(descriptor, ATTESTATION).is_none()
}

fn is_index(media_type: &MediaType) -> bool {
    match media_type {
        MediaType::ImageIndex => true,
        other => other.as_ref() == "application/vnd.docker.distribution.manifest.list.v2+json",
    }
}

fn is_config(media_type: &MediaType) -> bool {
    match media_type {
        MediaType::ImageConfig => true,
        other => other.as_ref() == "application/vnd.docker.container.image.v1+json",
    }
}

/// By media type (image-spec layer.md; docker's from distribution's "Image Manifest Version 2, Schema 2").
fn layer_compression(media_type: &MediaType) -> Option<Compression> {
    match media_type {
        MediaType::ImageLayer | MediaType::ImageLayerNonDistributable => Some(Compression::None),
        MediaType::ImageLayerGzip | MediaType::ImageLayerNonDistributableGzip => {
            Some(Compression::Gzip)
        }
        MediaType::ImageLayerZstd | MediaType::ImageLayerNonDistributableZstd => {
            Some(Compression::Zstd)
        }
        other => match other.as_ref() {
            "application/vnd.docker.image.rootfs.diff.tar" => Some(Compression::None),
            "application/vnd.docker.image.rootfs.diff.tar.gzip"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip" => {
                Some(Compression::Gzip)
            }
            "application/vnd.docker.image.rootfs.diff.tar.zstd" => Some(Compression::Zstd),
            _ => None,
        },
    }
}
