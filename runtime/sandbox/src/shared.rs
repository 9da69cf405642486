//! The one directory a sandbox shows its guest. Root file systems and volumes are mounted below it on the host, and named to the
//! agent by where the guest sees them; nothing else of the host is reachable from the guest.
//!
//! ```text
//! shared/<container>/rootfs      the container's root file system
//! shared/<container>/mounts/<n>  its n-th volume, a directory or a file
//! ```

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use cloison_agent_api::SHARED_DIR;

use crate::{BindOptions, Error, Id, mounts};

/// One container's part of the shared directory.
#[derive(Debug)]
pub struct Shared {
    host: PathBuf,
    guest: PathBuf,
    mounts: usize,
}

/// Where a container's root file system is in a shared directory.
pub(crate) fn rootfs(shared: &Path, container: &Id) -> PathBuf {
    shared.join(container.as_str()).join("rootfs")
}

impl Shared {
    pub(crate) fn create(shared: &Path, container: &Id) -> Result<Self, Error> {
        let host = shared.join(container.as_str());
        for dir in [&host, &host.join("rootfs"), &host.join("mounts")] {
            fs::DirBuilder::new()
                .mode(0o711)
                .create(dir)
                .map_err(Error::path("create the directory", dir))?;
        }
        Ok(Self {
            host,
            guest: Path::new(SHARED_DIR).join(container.as_str()),
            mounts: 0,
        })
    }

    /// Where the host is to mount the container's root file system.
    pub fn rootfs_on_host(&self) -> PathBuf {
        self.host.join("rootfs")
    }

    /// Where the guest finds it.
    pub fn rootfs_in_guest(&self) -> PathBuf {
        self.guest.join("rootfs")
    }

    /// Shows a root file system that is a directory of the host, with all that is mounted below it.
    ///
    /// # Errors
    /// When it cannot be bound.
    pub fn bind_rootfs(&self, source: &Path) -> Result<(), Error> {
        let options = BindOptions {
            recursive: true,
            ..BindOptions::default()
        };
        mounts::bind_over(source, &self.rootfs_on_host(), options)
    }

    /// Shows `source`, a file or a directory of the host, to the guest and returns where the guest finds it.
    ///
    /// # Errors
    /// When the source is missing or cannot be bound.
    pub fn add_mount(&mut self, source: &Path, options: BindOptions) -> Result<PathBuf, Error> {
        let place = Path::new("mounts").join(self.mounts.to_string());
        mounts::bind(source, &self.host.join(&place), options)?;
        self.mounts += 1;
        Ok(self.guest.join(place))
    }
}
