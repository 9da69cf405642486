//! Mounts that cannot leak: a sandbox's mounts live in a mount namespace that only its own processes are in, so they are gone
//! when the last of those is, however it ended.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::libc;
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

/// How something of the host is bound into the shared directory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BindOptions {
    /// With all that is mounted below the source.
    pub recursive: bool,
    /// Not to be written through.
    pub read_only: bool,
    /// And nothing mounted below either.
    pub read_only_below: bool,
    /// What the host mounts below the source later on appears as well.
    pub follow_host: bool,
}

/// Binds `source`, a file or a directory, to `target`, which must not exist yet.
pub(crate) fn bind(source: &Path, target: &Path, options: BindOptions) -> Result<(), Error> {
    let kind = fs::metadata(source).map_err(Error::path("find", source))?;
    if kind.is_dir() {
        fs::create_dir(target).map_err(Error::path("create the mount point", target))?;
    } else {
        File::create_new(target).map_err(Error::path("create the mount point", target))?;
    }
    bind_over(source, target, options)
}

/// Binds `source` to `target`, which must exist and be of its kind.
pub(crate) fn bind_over(source: &Path, target: &Path, options: BindOptions) -> Result<(), Error> {
    let recursive = match options.recursive {
        true => MsFlags::MS_REC,
        false => MsFlags::empty(),
    };
    let flags = MsFlags::MS_BIND | recursive;
    mount(Some(source), target, None::<&str>, flags, None::<&str>)
        .map_err(io::Error::from)
        .map_err(Error::path("bind-mount", source))?;
    if !options.follow_host {
        let flags = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        mount(None::<&str>, target, None::<&str>, flags, None::<&str>)
            .map_err(io::Error::from)
            .map_err(Error::path("make private the mount of", source))?;
    }
    if options.read_only {
        make_read_only(target, options.read_only_below && options.recursive)
            .map_err(Error::path("make read-only the mount of", source))?;
    }
    Ok(())
}

/// By mount_setattr(2), which leaves a mount's other flags as they are.
fn make_read_only(target: &Path, below: bool) -> io::Result<()> {
    let path = CString::new(target.as_os_str().as_bytes())?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    let flags = if below { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path ends in NUL, and the kernel reads one mount_attr of the size it is told from its address.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    match answer {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
