//! Mounts that cannot leak: a sandbox's mounts live in a mount namespace that only its own processes are in, so they are gone
//! when the last of those is, however it ended.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::{Error, IdMap};

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

/// Something of the host that is to be shown to a guest. It is taken hold of in the mount namespace of whoever names it, and may be
/// placed in another.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    tree: OwnedFd,
    is_dir: bool,
    options: BindOptions,
}

impl Source {
    /// Takes hold of a file or directory.
    ///
    /// # Errors
    /// When it is missing or cannot be bound.
    pub fn open(path: &Path, options: BindOptions) -> Result<Self, Error> {
        let kind = fs::metadata(path).map_err(Error::path("find", path))?;
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        if options.recursive {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        let tree = open_tree(CWD, path, flags)
            .map_err(io::Error::from)
            .map_err(Error::path("bind-mount", path))?;
        Ok(Self {
            path: path.to_owned(),
            tree,
            is_dir: kind.is_dir(),
            options,
        })
    }

    /// Takes hold of the file or directory that a descriptor is of, which `path` names for people.
    ///
    /// # Errors
    /// When it is in no file system that is mounted in the caller's mount namespace.
    pub(crate) fn of_descriptor(
        fd: impl AsFd,
        path: PathBuf,
        is_dir: bool,
        options: BindOptions,
    ) -> Result<Self, Error> {
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        if options.recursive {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        let tree = open_tree(fd, "", flags)
            .map_err(io::Error::from)
            .map_err(Error::path("bind-mount", &path))?;
        Ok(Self {
            path,
            tree,
            is_dir,
            options,
        })
    }

    #[cfg(test)]
    pub(crate) fn is_read_only(&self) -> bool {
        self.options.read_only
    }

    /// Has its files belong to others.
    ///
    /// # Errors
    /// When its file system cannot do that, or the host refuses the mapping.
    pub fn map_ids(self, map: &IdMap) -> Result<Self, Error> {
        let mapped = map.apply(&self.tree);
        mapped.map_err(Error::path("map the IDs of", &self.path))?;
        Ok(self)
    }

    /// Binds it to `target`, which must not exist yet.
    pub(crate) fn bind(self, target: &Path) -> Result<(), Error> {
        self.make_place(target)?;
        self.bind_over(target)
    }

    /// Makes what it can be bound to.
    pub(crate) fn make_place(&self, target: &Path) -> Result<(), Error> {
        let made = match self.is_dir {
            true => fs::create_dir(target),
            false => File::create_new(target).map(drop),
        };
        made.map_err(Error::path("create the mount point", target))
    }

    /// Binds it to `target`, which must exist and be of its kind.
    pub(crate) fn bind_over(self, target: &Path) -> Result<(), Error> {
        let failed = |what| Error::path(what, &self.path);
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&self.tree, "", CWD, target, flags)
            .map_err(io::Error::from)
            .map_err(failed("bind-mount"))?;
        // Never the other way: what is mounted in the guest's part is not the host's.
        let propagation = match self.options.follow_host {
            true => MsFlags::MS_SLAVE,
            false => MsFlags::MS_PRIVATE,
        };
        let flags = propagation | MsFlags::MS_REC;
        mount(None::<&str>, target, None::<&str>, flags, None::<&str>)
            .map_err(io::Error::from)
            .map_err(failed("detach from the host the mount of"))?;
        if self.options.read_only {
            make_read_only(
                target,
                self.options.read_only_below && self.options.recursive,
            )
            .map_err(failed("make read-only the mount of"))?;
        }
        Ok(())
    }
}

/// Moves a mount with all below it. `to` is not followed if it is a link: somebody else may have put it there.
pub(crate) fn move_to(from: &Path, to: &Path) -> Result<(), Error> {
    move_mount(CWD, from, CWD, to, MoveMountFlags::empty())
        .map_err(io::Error::from)
        .map_err(Error::path("mount what a guest is to see on", to))
}

/// Moves this process, which has no other thread, into the mount namespace of another.
///
/// # Errors
/// When that process is gone.
pub fn enter_namespace_of(pid: i32) -> Result<(), Error> {
    let path = namespace_of(pid);
    File::open(&path)
        .and_then(|namespace| Ok(setns(namespace, CloneFlags::CLONE_NEWNS)?))
        .map_err(Error::path("enter the mount namespace", path))
}

/// Takes away mounts that only another process's mount namespace has. If that process is gone, so are they, or soon.
pub(crate) fn detach_within(pid: i32, places: &[PathBuf]) -> Result<(), Error> {
    match open_namespace_of(pid)? {
        Some(namespace) => within(namespace, || places.iter().try_for_each(|p| detach(p))),
        None => Ok(()),
    }
}

/// Binds `source`, in the mount namespace of another process, to `to`, by way of `from`; both must exist and be of its kind. It comes there
/// in one step, with all its options.
pub(crate) fn bind_within(pid: i32, source: Source, from: &Path, to: &Path) -> Result<(), Error> {
    let gone = || Error::path("open the mount namespace", namespace_of(pid))(Errno::ESRCH.into());
    let namespace = open_namespace_of(pid)?.ok_or_else(gone)?;
    within(namespace, || {
        source.bind_over(from)?;
        move_to(from, to)
    })
}

/// `None` when that process is gone.
fn open_namespace_of(pid: i32) -> Result<Option<File>, Error> {
    let path = namespace_of(pid);
    match File::open(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other
            .map(Some)
            .map_err(Error::path("open the mount namespace", path)),
    }
}

/// Does something in another mount namespace.
fn within(namespace: File, work: impl FnOnce() -> Result<(), Error> + Send) -> Result<(), Error> {
    let failed = || Error::system("enter a sandbox's mount namespace");
    let done = std::thread::scope(|scope| {
        // A thread that shares neither root nor working directory with the others may be in another namespace than they are.
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_FS)
                .and_then(|()| setns(namespace, CloneFlags::CLONE_NEWNS))
                .map_err(|errno| failed()(errno.into()))?;
            work()
        });
        thread.join()
    });
    done.unwrap_or_else(|_| Err(failed()(io::Error::other("the thread for it failed"))))
}

/// The mount namespace that a sandbox's files are mounted in. The first thread of a process that stands for a container's init is in another one
/// ([`View`](crate::View)), so it is that of any other.
fn namespace_of(pid: i32) -> PathBuf {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    let threads = threads.into_iter().flatten().flatten();
    let names = threads.map(|thread| thread.file_name());
    let mut ids = names.filter_map(|name| name.to_str()?.parse::<i32>().ok());
    let thread = ids.find(|id| *id != pid).unwrap_or(pid);
    format!("/proc/{pid}/task/{thread}/ns/mnt").into()
}

/// By mount_setattr(2), which leaves a mount's other flags as they are.
pub(crate) fn make_read_only(target: &Path, below: bool) -> io::Result<()> {
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
