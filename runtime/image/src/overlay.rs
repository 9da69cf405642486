//! A container's root filesystem: an image's layers below a directory of the container's own, joined by overlayfs. The
//! layers are never written to. The caller owns the directories and the mount namespace.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Dir, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags,
};

use crate::error::{Error, Result};
use crate::root::{descriptor_path, group, owner};
use crate::store::Image;

/// The names of a hard-linked file in a layer stay one file when it is written through one of them. Where a file system cannot
/// do that, the kernel goes on without.
const INDEX: &str = "on";

/// Longest text the kernel takes as one parameter of fsconfig(2), bytes.
const MAX_PARAMETER: usize = 255;

/// Longest option text the kernel takes in mount(2), bytes: a page with its terminator.
const MAX_OPTIONS: usize = 4095;

/// A mounted root filesystem. Dropping it leaves the mount in place, since it may outlive the process that made it.
#[derive(Debug)]
#[must_use = "the mount stays until RootFs::unmount"]
pub struct RootFs {
    target: PathBuf,
}

impl RootFs {
    /// Mounts `image` at `target`, an existing directory. Changes go to `upper`; `work` is overlayfs's own, empty and on the
    /// same file system as `upper`. Nothing on the host may use the mount's programs or devices: it is nosuid, nodev and
    /// noexec, which a guest that it is shared with does not see.
    pub fn mount(
        image: &Image,
        upper: &Path,
        work: &Path,
        target: &Path,
        read_only: bool,
    ) -> Result<RootFs> {
        let layers = Layers {
            lower: &image.layers,
            upper,
            work,
        };
        layers.dress_upper().map_err(|errno| Error::Mount {
            action: "prepare the directory for changes",
            target: target.to_owned(),
            hint: String::new(),
            source: errno.into(),
        })?;
        let mounted = match layers.mount_by_parameters(target, read_only) {
            // The first kernel with `lowerdir+` is 6.8; others call it an invalid parameter.
            Err(Errno::INVAL | Errno::NOSYS) => layers.mount_by_options(target, read_only),
            other => other,
        };
        match mounted {
            Ok(()) => Ok(RootFs {
                target: target.to_owned(),
            }),
            Err(errno) => Err(Error::Mount {
                action: "mount the root filesystem",
                target: target.to_owned(),
                hint: layers.hint(errno),
                source: errno.into(),
            }),
        }
    }

    /// A root filesystem that an earlier process mounted at `target`.
    pub fn at(target: &Path) -> RootFs {
        RootFs {
            target: target.to_owned(),
        }
    }

    /// Where it is mounted.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Unmounts it; a file that is still open keeps its own file system alive but no longer a name. Nothing being mounted is
    /// no error.
    pub fn unmount(self) -> Result<()> {
        match rustix::mount::unmount(&self.target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
            Err(errno) => Err(Error::Mount {
                action: "unmount the root filesystem",
                target: self.target,
                hint: String::new(),
                source: errno.into(),
            }),
        }
    }
}

struct Layers<'a> {
    /// Topmost first.
    lower: &'a [PathBuf],
    upper: &'a Path,
    work: &'a Path,
}

impl Layers<'_> {
    /// Gives an upper directory that is still empty the looks of the image's root, since overlayfs shows the upper one's.
    fn dress_upper(&self) -> rustix::io::Result<()> {
        let Some(top) = self.lower.first() else {
            return Ok(());
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let upper = rustix::fs::open(self.upper, flags, Mode::empty())?;
        for entry in Dir::read_from(&upper)? {
            if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
                return Ok(());
            }
        }
        let look = rustix::fs::stat(top)?;
        rustix::fs::fchown(&upper, owner(look.st_uid), group(look.st_gid))?;
        rustix::fs::fchmod(&upper, Mode::from_raw_mode(look.st_mode & 0o7777))
    }

    /// One parameter for each directory: no separator to escape, no total length to exceed.
    fn mount_by_parameters(&self, target: &Path, read_only: bool) -> rustix::io::Result<()> {
        let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let mut held = Vec::new();
        let mut set = |key: &str, dir: &Path| -> rustix::io::Result<()> {
            let name = parameter(dir, &mut held)?;
            rustix::mount::fsconfig_set_string(&context, key, name)
        };
        for dir in self.lower {
            set("lowerdir+", dir)?;
        }
        set("upperdir", self.upper)?;
        set("workdir", self.work)?;
        rustix::mount::fsconfig_set_string(&context, "source", "cloison")?;
        rustix::mount::fsconfig_set_string(&context, "index", INDEX)?;
        if read_only {
            rustix::mount::fsconfig_set_flag(&context, "ro")?;
        }
        rustix::mount::fsconfig_create(&context)?;
        let mut attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        if read_only {
            attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
        }
        let mount = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        rustix::mount::move_mount(
            &mount,
            "",
            CWD,
            target,
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )
    }

    /// All in one text, for kernels that know nothing better: by descriptors, which are short and need no escaping.
    fn mount_by_options(&self, target: &Path, read_only: bool) -> rustix::io::Result<()> {
        let mut held = Vec::new();
        let mut options = String::from("lowerdir=");
        for (n, dir) in self.lower.iter().enumerate() {
            if n > 0 {
                options.push(':');
            }
            options.push_str(&short_name(dir, &mut held)?);
        }
        options.push_str(",upperdir=");
        options.push_str(&short_name(self.upper, &mut held)?);
        options.push_str(",workdir=");
        options.push_str(&short_name(self.work, &mut held)?);
        options.push_str(",index=");
        options.push_str(INDEX);
        if options.len() > MAX_OPTIONS {
            return Err(Errno::TOOBIG);
        }
        let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        if read_only {
            flags |= MountFlags::RDONLY;
        }
        let options = std::ffi::CString::new(options).map_err(|_| Errno::INVAL)?;
        rustix::mount::mount(
            "cloison",
            target,
            "overlay",
            flags,
            Some(options.as_c_str()),
        )
    }

    fn hint(&self, errno: Errno) -> String {
        match errno {
            Errno::LOOP => "; the image may not lie inside the container's directories".to_owned(),
            Errno::NODEV => "; this kernel has no overlayfs".to_owned(),
            Errno::PERM => "; this needs root".to_owned(),
            Errno::TOOBIG => format!(
                "; {} layers are too many for a kernel older than 6.8",
                self.lower.len()
            ),
            Errno::INVAL => format!(
                "; {} may be on a file system that overlayfs cannot write to",
                self.upper.display()
            ),
            _ => String::new(),
        }
    }
}

/// A directory as a parameter of fsconfig(2): its path, which a person finds again in `/proc/mounts`, unless that is too long
/// or would be taken for an escape sequence.
fn parameter(dir: &Path, held: &mut Vec<OwnedFd>) -> rustix::io::Result<PathBuf> {
    let plain = |path: &OsStr| path.len() <= MAX_PARAMETER && !path.as_bytes().contains(&b'\\');
    let absolute =
        std::path::absolute(dir).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::INVAL))?;
    if plain(absolute.as_os_str()) {
        Ok(absolute)
    } else {
        short_name(dir, held).map(PathBuf::from)
    }
}

/// A directory's name by a descriptor that is kept in `held` until the mount is made.
fn short_name(dir: &Path, held: &mut Vec<OwnedFd>) -> rustix::io::Result<String> {
    let fd = rustix::fs::open(
        dir,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let name = descriptor_path(&fd).display().to_string();
    held.push(fd);
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::mount::MsFlags;
    use std::fs;

    /// Mounts `count` directories the way old kernels need it, in a mount namespace of the calling thread's own, and reads
    /// a file of the topmost one. Needs root.
    fn mount_as_of_old(count: usize) -> rustix::io::Result<String> {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        nix::mount::mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join("a:b,c\\").join(name);
        let lower: Vec<PathBuf> = (0..count).map(|n| at(&format!("lower{n}"))).collect();
        for path in lower.iter().chain(&[at("upper"), at("work"), at("rootfs")]) {
            fs::create_dir_all(path).unwrap();
        }
        for path in &lower {
            fs::write(path.join("file"), path.file_name().unwrap().as_bytes()).unwrap();
        }
        let layers = Layers {
            lower: &lower,
            upper: &at("upper"),
            work: &at("work"),
        };
        layers.mount_by_options(&at("rootfs"), false)?;
        let found = fs::read_to_string(at("rootfs/file")).unwrap();
        RootFs::at(&at("rootfs")).unmount().unwrap();
        Ok(found)
    }

    #[test]
    fn old_kernels_get_all_directories_in_one_text() {
        assert_eq!(mount_as_of_old(100).unwrap(), "lower0");
    }

    #[test]
    fn more_layers_than_fit_into_that_text_are_refused() {
        assert_eq!(mount_as_of_old(400), Err(Errno::TOOBIG));
    }
}
