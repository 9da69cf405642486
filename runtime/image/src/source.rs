//! What a reference leads to before anything is unpacked: a configuration and the blobs of its layers. Layouts and archives
//! find these in their own ways; what they must agree on is checked here.

use std::path::{Path, PathBuf};

use oci_spec::image::{Arch, ImageConfiguration, Os};
use serde::de::DeserializeOwned;

use crate::blob::Place;
use crate::compression::Compression;
use crate::digest::{Algorithm, Digest};
use crate::error::{Error, Result};
use crate::limits::MAX_LAYERS;
use crate::{ImageConfig, LayerError};

/// An image, verified as far as its configuration.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) id: Digest,
    pub(crate) config: ImageConfig,
    /// Bottom first.
    pub(crate) layers: Vec<LayerBlob>,
}

/// A layer as it is kept in the image.
#[derive(Debug, Clone)]
pub(crate) struct LayerBlob {
    /// Digest of the uncompressed archive, by the configuration.
    pub(crate) diff_id: Digest,
    pub(crate) stored: StoredLayer,
}

/// What a manifest says of a layer.
#[derive(Debug, Clone)]
pub(crate) struct StoredLayer {
    pub(crate) place: Place,
    /// Digest of the blob, where the image has one.
    pub(crate) digest: Option<Digest>,
    /// Length of the blob in bytes, where the image says so.
    pub(crate) size: Option<u64>,
    /// By its media type, where it has one.
    pub(crate) compression: Option<Compression>,
}

/// Puts an image together from the text of its configuration and its layers, bottom first.
pub(crate) fn assemble(
    path: &Path,
    config: &[u8],
    id: Digest,
    layers: Vec<StoredLayer>,
) -> Result<Source> {
    let what = format!("image configuration {id}");
    let malformed = |reason| Error::Malformed {
        what: what.clone(),
        path: path.to_owned(),
        reason,
    };
    let whole: ImageConfiguration = parse(config, &what, path)?;
    check_platform(path, whole.os(), whole.architecture())?;
    if whole.rootfs().typ() != "layers" {
        return Err(malformed(format!(
            "its rootfs is of the unknown type {:?}",
            whole.rootfs().typ()
        )));
    }
    let diff_ids = whole.rootfs().diff_ids();
    if diff_ids.len() != layers.len() {
        return Err(malformed(format!(
            "it names {} layers and the manifest {}",
            diff_ids.len(),
            layers.len()
        )));
    }
    if layers.len() > MAX_LAYERS {
        let (size, limit) = (layers.len() as u64, MAX_LAYERS as u64);
        return Err(Error::TooLarge {
            what: "the number of layers".to_owned(),
            path: path.to_owned(),
            size,
            limit,
        });
    }
    let layers = diff_ids.iter().zip(layers).map(|(diff_id, stored)| {
        let diff_id = diff_id
            .parse()
            .map_err(|e: crate::InvalidDigest| malformed(e.to_string()))?;
        Ok(LayerBlob { diff_id, stored })
    });
    Ok(Source {
        id,
        config: ImageConfig::new(&whole, config).map_err(malformed)?,
        layers: layers.collect::<Result<_>>()?,
    })
}

/// This host, in image-spec's terms.
pub(crate) fn host_platform() -> (Os, Arch) {
    (Os::Linux, Arch::default())
}

fn check_platform(path: &Path, os: &Os, architecture: &Arch) -> Result<()> {
    let (host_os, host_architecture) = host_platform();
    if (os, architecture) == (&host_os, &host_architecture) {
        return Ok(());
    }
    Err(Error::WrongPlatform {
        path: path.to_owned(),
        wanted: format!("{host_os}/{host_architecture}"),
        available: format!("{os}/{architecture}"),
    })
}

/// Reads a JSON document.
pub(crate) fn parse<T: DeserializeOwned>(text: &[u8], what: &str, path: &Path) -> Result<T> {
    serde_json::from_slice(text).map_err(|e| Error::Malformed {
        what: what.to_owned(),
        path: path.to_owned(),
        reason: e.to_string(),
    })
}

/// Names for a person to choose from.
pub(crate) fn list<T: AsRef<str>>(names: impl IntoIterator<Item = T>) -> String {
    /// Names shown at most.
    const SHOWN: usize = 20;
    let mut shown: Vec<String> = names
        .into_iter()
        .take(SHOWN + 1)
        .map(|n| n.as_ref().chars().take(200).collect())
        .collect();
    if shown.is_empty() {
        return "none with a name".to_owned();
    }
    if shown.len() > SHOWN {
        shown[SHOWN] = "and more".to_owned();
    }
    shown.join(", ")
}

/// Where a blob of a layout is, relative to the layout.
pub(crate) fn blob_path(digest: &Digest) -> PathBuf {
    ["blobs", digest.algorithm().name(), digest.hex()]
        .iter()
        .collect()
}

/// The digest in a blob's path.
pub(crate) fn digest_of_blob_path(path: &str) -> Option<Digest> {
    let (algorithm, hex) = path.strip_prefix("blobs/")?.split_once('/')?;
    format!("{algorithm}:{hex}").parse().ok()
}

impl StoredLayer {
    /// The compression, if the blob's first bytes and its media type agree on one.
    pub(crate) fn compression(&self, start: &[u8]) -> std::result::Result<Compression, LayerError> {
        let found = Compression::of(start);
        match self.compression {
            Some(declared) if declared != found => Err(LayerError::Compression {
                declared: declared.name(),
                found: found.name(),
            }),
            _ => Ok(found),
        }
    }
}

/// The digest by which an image is known.
pub(crate) fn image_id(config: &[u8]) -> Digest {
    Digest::of(Algorithm::Sha256, config)
}
