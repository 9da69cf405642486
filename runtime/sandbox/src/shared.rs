//! The one directory a sandbox shows its guest. Root file systems and volumes are mounted below it on the host, and named to the
//! agent by where the guest sees them; nothing else of the host is reachable from the guest.
//!
//! ```text
//! shared/<container>/rootfs      the container's root file system
//! shared/<container>/mounts/<n>  its n-th volume, a directory or a file; after them files that its init has open from its start
//! shared/<place>/<container>/... the same of a container that came to the running guest
//! shared/<place>                 a file or directory for one exec
//! ```

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use cloison_agent_api::SHARED_DIR;

use crate::{Error, Id, Source};

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

/// Where the guest finds the `n`-th volume of a container, which came to it at `place` if it came later.
pub fn mount_in_guest(place: Option<&Id>, container: &Id, n: usize) -> PathBuf {
    let base = guest_base(place);
    base.join(container.as_str())
        .join("mounts")
        .join(n.to_string())
}

/// Where the guest finds what is shared at `place`.
pub(crate) fn guest_base(place: Option<&Id>) -> PathBuf {
    let shared = Path::new(SHARED_DIR);
    place.map_or_else(|| shared.to_owned(), |place| shared.join(place.as_str()))
}

impl Shared {
    /// What is below `shared` on the host is below `guest` for the guest.
    pub(crate) fn create(shared: &Path, guest: &Path, container: &Id) -> Result<Self, Error> {
        let host = shared.join(container.as_str());
        for dir in [&host, &host.join("rootfs"), &host.join("mounts")] {
            fs::DirBuilder::new()
                .mode(0o711)
                .create(dir)
                .map_err(Error::path("create the directory", dir))?;
        }
        Ok(Self {
            host,
            guest: guest.join(container.as_str()),
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

    /// Where the host has mounted its `n`-th volume.
    pub(crate) fn mount_on_host(&self, n: usize) -> PathBuf {
        self.host.join("mounts").join(n.to_string())
    }

    /// Says that all of the shared directory that it was created in is at `shared` by now.
    pub(crate) fn has_moved(&mut self, shared: &Path) {
        if let Some(container) = self.host.file_name() {
            self.host = shared.join(container);
        }
    }

    /// Shows a root file system that is a directory of the host.
    ///
    /// # Errors
    /// When it cannot be bound.
    pub fn bind_rootfs(&self, source: Source) -> Result<(), Error> {
        source.bind_over(&self.rootfs_on_host())
    }

    /// Shows a file or a directory of the host to the guest and returns where the guest finds it.
    ///
    /// # Errors
    /// When it cannot be bound.
    pub fn add_mount(&mut self, source: Source) -> Result<PathBuf, Error> {
        source.bind(&self.mount_on_host(self.mounts))?;
        let place = self.guest.join("mounts").join(self.mounts.to_string());
        self.mounts += 1;
        Ok(place)
    }
}
