//! The local store: where unpacked layers live, each once, found by the digest of its content. Any number of processes may
//! use one store at the same time; one that dies leaves nothing but a staging directory, which the next one removes.
//!
//! ```text
//! DATA/layers/ALGORITHM/HEX/rootfs     a layer, unpacked, under its diff ID
//! DATA/layers/ALGORITHM/HEX/implied    directories in it that the image says nothing about; absent if there are none
//! DATA/attributes/sha256/HEX/rootfs    what such directories must look like in one stack of layers, under its chain ID
//! DATA/tmp/NAME/                       staging directories, each locked by the process that fills it
//! ```

mod attributes;
mod staging;

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::compression::MAGIC_LEN;
use crate::digest::{Algorithm, Digest, HashingReader};
use crate::error::{Error, LayerError, Result};
use crate::layer::{self, Implied};
use crate::source::{LayerBlob, Source};
use crate::{ImageConfig, Reference, archive, layout};
use staging::{Staged, Staging};

/// Bytes of a blob between two reports of progress.
const PROGRESS_STEP: u64 = 1 << 20;

/// Where a layer's files are in its directory, and the list of those of its directories that have no entry.
const ROOTFS: &str = "rootfs";
const IMPLIED: &str = "implied";

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
    /// Directories for overlayfs to stack, topmost first, none twice. They belong to the store or to the user and are never
    /// written to.
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
    /// Opens the store in `data_dir`, making what is missing (mode 0700, since layers hold set-user-ID programs that are none
    /// of this host's users' business), and removes what processes that died have left in it.
    pub fn open(data_dir: &Path) -> Result<Store> {
        let store = Store {
            dir: data_dir.to_owned(),
        };
        for dir in [store.layers_dir(), store.attributes_dir(), store.tmp_dir()] {
            make_private_dir(&dir).map_err(|source| Error::DataDir {
                action: "create",
                path: dir.clone(),
                source,
            })?;
        }
        staging::sweep(&store.tmp_dir());
        Ok(store)
    }

    /// Finds the image, verifies it, and unpacks those of its layers that are not in the store yet.
    ///
    /// For an image that is all there this reads its index, manifest and configuration and looks whether the layers' directories
    /// exist; it writes nothing.
    pub fn resolve(
        &self,
        reference: &Reference,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Image> {
        let source = match reference {
            Reference::OciLayout { dir, tag } => layout::find(dir, tag.as_deref())?,
            Reference::DockerArchive { file, reference } => {
                archive::find(file, reference.as_deref(), &self.tmp_dir())?
            }
            Reference::RootfsDir(dir) => return bare_rootfs(reference, dir),
            Reference::Registry(name) => return Err(Error::RegistryUnsupported(name.clone())),
        };
        for layer in &source.layers {
            self.ensure_layer(layer, progress)?;
        }
        let Source { id, config, layers } = source;
        let stack = self.stack(layers.iter().map(|l| &l.diff_id))?;
        Ok(Image {
            id,
            reference: reference.to_string(),
            config,
            layers: stack,
        })
    }

    fn layers_dir(&self) -> PathBuf {
        self.dir.join("layers")
    }

    fn attributes_dir(&self) -> PathBuf {
        self.dir.join("attributes")
    }

    fn tmp_dir(&self) -> PathBuf {
        self.dir.join("tmp")
    }

    fn layer_dir(&self, diff_id: &Digest) -> PathBuf {
        self.layers_dir()
            .join(diff_id.algorithm().name())
            .join(diff_id.hex())
    }

    /// Unpacks a layer, or waits for another process that is doing so, unless it is there.
    fn ensure_layer(&self, layer: &LayerBlob, progress: &mut dyn FnMut(Progress)) -> Result<()> {
        let diff_id = &layer.diff_id;
        let target = self.layer_dir(diff_id);
        if target.join(ROOTFS).is_dir() {
            return Ok(());
        }
        let failed = |action, path: &Path, source| match no_space(&source) {
            true => Error::NoSpace {
                layer: diff_id.clone(),
                dir: self.dir.clone(),
                source,
            },
            false => Error::DataDir {
                action,
                path: path.to_owned(),
                source,
            },
        };
        let parent = self.layers_dir().join(diff_id.algorithm().name());
        make_private_dir(&parent).map_err(|source| failed("create", &parent, source))?;
        let tmp = self.tmp_dir();
        let name = format!("{}-{}", diff_id.algorithm().name(), diff_id.hex());
        let mut waiting = || {
            progress(Progress::Waiting {
                layer: diff_id.clone(),
            })
        };
        let staged = Staging::enter(&tmp, &name, &target, &mut waiting)
            .map_err(|source| failed("create a staging directory in", &tmp, source))?;
        let Staged::Ours(staging) = staged else {
            return Ok(());
        };
        // Whatever fails from here on, dropping the staging directory removes it.
        let implied = self.unpack(layer, &staging, progress)?;
        write_implied(&staging, &implied)
            .and_then(|()| staging.publish(&target))
            .map_err(|source| failed("write to", &target, source))?;
        progress(Progress::Unpacked {
            layer: diff_id.clone(),
        });
        Ok(())
    }

    fn unpack(
        &self,
        layer: &LayerBlob,
        staging: &Staging,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Implied> {
        let LayerBlob { diff_id, stored } = layer;
        let what = format!("layer {diff_id}");
        let path = stored.place.path();
        let blob = stored.place.open(&what)?;
        let size = blob.left();
        if let Some(expected) = stored.size.filter(|expected| *expected != size) {
            return Err(Error::WrongSize {
                what,
                path: path.to_owned(),
                expected,
                actual: size,
            });
        }
        let failed = |source: LayerError| match source {
            LayerError::Write { source, .. } if no_space(&source) => Error::NoSpace {
                layer: diff_id.clone(),
                dir: self.dir.clone(),
                source,
            },
            source => Error::Layer {
                layer: diff_id.clone(),
                path: path.to_owned(),
                source,
            },
        };
        let start = blob
            .peek::<MAGIC_LEN>()
            .map_err(|e| failed(LayerError::Read(e)))?;
        let compression = stored.compression(&start).map_err(failed)?;
        let rootfs = staging
            .make_dir(ROOTFS)
            .map_err(|source| failed(staging_error(source)))?;

        let algorithm = stored
            .digest
            .as_ref()
            .map_or(Algorithm::Sha256, Digest::algorithm);
        let reported = Reported {
            inner: blob,
            read: 0,
            next: 0,
            size,
            layer: diff_id,
            progress,
        };
        let mut blob = HashingReader::new(reported, algorithm);
        let decoder = compression
            .decoder(&mut blob)
            .ok_or(LayerError::Compression {
                declared: "gzip, zstd or an uncompressed tar archive",
                found: compression.name(),
            });
        let decoder = decoder
            .and_then(|d| d.map_err(LayerError::Read))
            .map_err(failed)?;
        let mut content = HashingReader::new(decoder, diff_id.algorithm());
        let unpacked = layer::unpack(&mut content, rootfs);
        let (actual, _) = content.finish();
        if let Err(error @ LayerError::Write { .. }) = unpacked {
            return Err(failed(error));
        }
        // A blob that is not what it should be explains any other error, so that is looked at first.
        io::copy(&mut blob, &mut io::sink()).map_err(|e| failed(LayerError::Read(e)))?;
        let (blob, _) = blob.finish();
        if let Some(expected) = stored.digest.clone().filter(|expected| *expected != blob) {
            return Err(failed(LayerError::WrongBlob {
                expected,
                actual: blob,
            }));
        }
        let implied = unpacked.map_err(failed)?;
        if actual != *diff_id {
            return Err(failed(LayerError::WrongDiffId { actual }));
        }
        Ok(implied)
    }
}

fn staging_error(source: io::Error) -> LayerError {
    LayerError::Write {
        action: "make",
        entry: "/".to_owned(),
        source,
    }
}

fn no_space(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// Makes a directory and its missing parents, each mode 0700 whatever the umask. What exists keeps its mode.
fn make_private_dir(dir: &Path) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => fs::set_permissions(dir, fs::Permissions::from_mode(0o700)),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => match dir.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => {
                make_private_dir(parent)?;
                make_private_dir(dir)
            }
            _ => Err(e),
        },
        Err(e) => Err(e),
    }
}

/// Names ended by NULs, the root being an empty one.
fn write_implied(staging: &Staging, implied: &Implied) -> io::Result<()> {
    if implied.is_empty() {
        return Ok(());
    }
    let text: Vec<u8> = implied
        .iter()
        .flat_map(|p| [p.as_os_str().as_bytes(), b"\0"].concat())
        .collect();
    staging.write(IMPLIED, &text)
}

fn read_implied(layer_dir: &Path) -> io::Result<Implied> {
    match fs::read(layer_dir.join(IMPLIED)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Implied::new()),
        Err(e) => Err(e),
        Ok(text) => {
            let mut names: Vec<&[u8]> = text.split(|b| *b == 0).collect();
            names.pop();
            Ok(names
                .into_iter()
                .map(|n| PathBuf::from(OsStr::from_bytes(n)))
                .collect())
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
            &[b"rootfs:", path.as_os_str().as_bytes()].concat(),
        ),
        reference: reference.to_string(),
        config: ImageConfig::of_bare_rootfs(),
        layers: vec![path],
    })
}

/// Reports how much of a blob has been read.
struct Reported<'a, R> {
    inner: R,
    read: u64,
    /// Where the next report is due.
    next: u64,
    size: u64,
    layer: &'a Digest,
    progress: &'a mut dyn FnMut(Progress),
}

impl<R: Read> Read for Reported<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.read += n as u64;
        if self.read >= self.next {
            self.next = self.read + PROGRESS_STEP;
            (self.progress)(Progress::Unpacking {
                layer: self.layer.clone(),
                read: self.read,
                size: self.size,
            });
        }
        Ok(n)
    }
}
