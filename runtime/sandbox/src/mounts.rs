//! Mounts that cannot leak: a sandbox's mounts live in a mount namespace that only its own processes are in, so they are gone
//! when the last of those is, however it ended.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::Error;

/// Moves the calling thread into a mount namespace of its own that still follows the host's mounts. Call it before any other
/// thread is started, so that the whole process is inside.
///
/// # Errors
/// Without CAP_SYS_ADMIN.
pub fn enter_private_namespace() -> Result<(), Error> {
    unshare(CloneFlags::CLONE_NEWNS)
        .map_err(io::Error::from)
        .map_err(Error::system("create a mount namespace (are you root?)"))?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_SLAVE,
        None::<&str>,
    )
    .map_err(io::Error::from)
    .map_err(Error::system("detach the mount namespace from the host's"))
}

/// Makes a directory a mount of its own, so that [`detach`] finds all that is mounted below it later on.
pub(crate) fn attach(dir: &Path) -> Result<(), Error> {
    mount(Some(dir), dir, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(io::Error::from)
        .map_err(Error::path("bind-mount", dir))
}

/// Takes away, in one step, what [`attach`] has made and all that is mounted below it. What the calling process cannot see is
/// mounted for others and not its business.
pub(crate) fn detach(dir: &Path) -> Result<(), Error> {
    match umount2(dir, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(errno) => Err(Error::path("unmount", dir)(errno.into())),
    }
}

/// Binds `source`, a file or a directory with all that is mounted below it, to `target`, which must not exist yet.
pub(crate) fn bind(source: &Path, target: &Path, read_only: bool) -> Result<(), Error> {
    let kind = fs::metadata(source).map_err(Error::path("find", source))?;
    if kind.is_dir() {
        fs::create_dir(target).map_err(Error::path("create the mount point", target))?;
    } else {
        File::create_new(target).map_err(Error::path("create the mount point", target))?;
    }
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(source), target, None::<&str>, flags, None::<&str>)
        .map_err(io::Error::from)
        .map_err(Error::path("bind-mount", source))?;
    if read_only {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, target, None::<&str>, flags, None::<&str>)
            .map_err(io::Error::from)
            .map_err(Error::path("make read-only the mount of", source))?;
    }
    Ok(())
}
