//! A container's files for whoever on the host enters the mount namespace of the process that stands for its init, as `podman cp` does: where
//! runc's init has the container's root, that process would have the host's.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, chroot};

use crate::mounts::{BindOptions, Source, make_read_only};
use crate::{Error, Shared};

/// The place of a container's file systems. What only the guest has is an empty directory that nothing can be written to: files must not
/// come to lie beneath a mount of the guest's and seem to have been copied.
#[derive(Debug)]
pub struct View {
    rootfs: PathBuf,
    read_only: bool,
    mounts: Vec<(PathBuf, Option<PathBuf>)>,
}

impl View {
    /// That of what is shared. `mounts` are the container's in their order: where they are in it, and which of those that were shared it is
    /// ([`Shared::add_mount`]), if any. They are to exist already.
    pub fn of(
        shared: &Shared,
        read_only: bool,
        mounts: impl IntoIterator<Item = (PathBuf, Option<usize>)>,
    ) -> Self {
        let place = |number| shared.mount_on_host(number);
        let mounts = mounts.into_iter();
        Self {
            rootfs: shared.rootfs_on_host(),
            read_only,
            mounts: mounts.map(|(at, n)| (at, n.map(place))).collect(),
        }
    }

    /// Moves the calling thread, and no other, into a mount namespace of its own with the container's root for its root. Nothing of the host
    /// is to be found from there. Paths are the container's, which may make links of them meanwhile; they lead nowhere else.
    ///
    /// # Errors
    /// When something cannot be mounted. The thread is then of no use to anybody.
    pub fn enter(self) -> Result<(), Error> {
        unshare(CloneFlags::CLONE_NEWNS)
            .map_err(io::Error::from)
            .map_err(Error::system("create a mount namespace"))?;
        let recursive = BindOptions {
            recursive: true,
            ..BindOptions::default()
        };
        let open = |path: &Path| Source::open(path, recursive);
        let mounts = self.mounts.into_iter();
        let mounts: Result<Vec<_>, Error> = mounts
            .map(|(at, source)| Ok((at, source.as_deref().map(open).transpose()?)))
            .collect();
        let mounts = mounts?;
        enter_root(&self.rootfs).map_err(Error::path("make a root for others of", &self.rootfs))?;
        for (at, source) in mounts {
            let at = match fs::canonicalize(&at) {
                // It is in a file system of the guest's.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                found => found.map_err(Error::path("find", &at))?,
            };
            match source {
                Some(source) => source.bind_over(&at)?,
                None => cover(&at).map_err(Error::path("cover", &at))?,
            }
        }
        if self.read_only {
            make_read_only(Path::new("/"), false)
                .map_err(Error::path("make read-only", &self.rootfs))?;
        }
        Ok(())
    }
}

/// By moving it over the present one, since the root that a host has booted from cannot be taken away everywhere (pivot_root(2)). Who enters
/// the namespace arrives on top.
fn enter_root(rootfs: &Path) -> io::Result<()> {
    chdir(rootfs)?;
    let flags = MsFlags::MS_MOVE;
    mount(Some("."), "/", None::<&str>, flags, None::<&str>)?;
    chroot(".")?;
    Ok(chdir("/")?)
}

fn cover(at: &Path) -> io::Result<()> {
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    Ok(mount(
        Some("cloison"),
        at,
        Some("tmpfs"),
        flags,
        Some("mode=755"),
    )?)
}
