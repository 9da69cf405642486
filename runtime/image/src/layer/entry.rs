//! What one entry of a layer does to its directory (image-spec layer.md, "Applying Changesets").

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

use super::tree::{Place, Present, make_dir, make_opaque, present};
use super::{Layer, normal, refused, set_time, timestamps, write_error};
use crate::error::LayerError;
use crate::root::{descriptor_path, group, open_child, owner};
use crate::tarball::{Archive, Chunk, Entry, Input, Kind};

const WHITEOUT_PREFIX: &[u8] = b".wh.";

/// What the file system of docker's first years left in its layers beside whiteouts; of it only the mark for opaque
/// directories means anything.
const AUFS_PREFIX: &[u8] = b".wh..wh.";
const OPAQUE_NAME: &[u8] = b".wh..wh..opq";

/// Largest major and minor device numbers of Linux.
const MAX_MAJOR: u32 = (1 << 12) - 1;
const MAX_MINOR: u32 = (1 << 20) - 1;

impl Layer {
    /// Makes what the entry describes, taking its content from `archive`.
    pub(super) fn apply(
        &mut self,
        entry: &Entry,
        archive: &mut Archive<impl Input>,
    ) -> Result<(), LayerError> {
        let path = normal(&entry.path)?;
        let Some(name) = path.file_name() else {
            return self.apply_to_root(entry);
        };
        let parent = path.parent().unwrap_or(Path::new(""));
        if path
            .components()
            .any(|c| c.as_os_str().as_bytes().starts_with(AUFS_PREFIX))
        {
            if name.as_bytes() == OPAQUE_NAME {
                let place = self.parent(parent)?;
                make_opaque(&*place.dir)
                    .map_err(|e| write_error("mark as opaque", &place.path, e))?;
            }
            return Ok(());
        }
        if parent
            .components()
            .any(|c| c.as_os_str().as_bytes().starts_with(WHITEOUT_PREFIX))
        {
            return Err(refused(&entry.path, "a whiteout cannot contain anything"));
        }
        let place = self.parent(parent)?;
        match name.as_bytes().strip_prefix(WHITEOUT_PREFIX) {
            Some(hidden) => self.apply_whiteout(&place, hidden, entry),
            None => self.apply_file(&place, Path::new(name), entry, archive),
        }
    }

    fn apply_to_root(&mut self, entry: &Entry) -> Result<(), LayerError> {
        if entry.kind != Kind::Directory {
            return Err(refused(&entry.path, "only a directory can be the root"));
        }
        let root = Path::new("");
        let dir = self
            .root
            .open_physical(root, OFlags::RDONLY | OFlags::DIRECTORY);
        let dir = dir.map_err(|e| write_error("open", root, e))?;
        set_attributes(&dir, entry).map_err(|e| write_error("set the attributes of", root, e))?;
        self.remember(root, entry.modified)
    }

    /// Hides a name of the layers below, but nothing that this layer brings under the same name: the order of a whiteout and
    /// its siblings means nothing.
    fn apply_whiteout(
        &mut self,
        place: &Place,
        hidden: &[u8],
        entry: &Entry,
    ) -> Result<(), LayerError> {
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(refused(&entry.path, "it hides nothing that can exist"));
        }
        let name = Path::new(OsStr::from_bytes(hidden));
        let path = place.path.join(name);
        let failed = |e| write_error("hide", &path, e);
        match present(&*place.dir, name).map_err(failed)? {
            Present::Whiteout | Present::Other => Ok(()),
            Present::Directory => {
                let dir = open_child(&*place.dir, name, OFlags::RDONLY | OFlags::DIRECTORY)
                    .map_err(failed)?;
                make_opaque(&dir).map_err(failed)
            }
            Present::Nothing => {
                let kind = FileType::CharacterDevice;
                rustix::fs::mknodat(
                    &*place.dir,
                    name,
                    kind,
                    Mode::empty(),
                    super::tree::WHITEOUT_DEVICE,
                )
                .map_err(failed)
            }
        }
    }

    fn apply_file(
        &mut self,
        place: &Place,
        name: &Path,
        entry: &Entry,
        archive: &mut Archive<impl Input>,
    ) -> Result<(), LayerError> {
        let path = place.path.join(name);
        match &entry.kind {
            Kind::Directory => self.apply_directory(place, name, entry),
            Kind::HardLink(target) => self.apply_hard_link(place, name, target, entry),
            Kind::File { size, chunks } => {
                self.clear(place, name)?;
                let flags = OFlags::WRONLY
                    | OFlags::CREATE
                    | OFlags::EXCL
                    | OFlags::NOFOLLOW
                    | OFlags::CLOEXEC;
                let file = rustix::fs::openat(&*place.dir, name, flags, Mode::from_raw_mode(0o600))
                    .map_err(|e| write_error("create", &path, e))?;
                let file = File::from(file);
                self.write_content(&file, *size, chunks, archive, &path)?;
                let file = OwnedFd::from(file);
                set_attributes(&file, entry)
                    .and_then(|()| rustix::fs::futimens(&file, &timestamps(entry.modified)))
                    .map_err(|e| write_error("set the attributes of", &path, e))
            }
            Kind::Symlink(target) => {
                if target.is_empty() {
                    return Err(refused(&entry.path, "it is a symbolic link to nothing"));
                }
                self.clear(place, name)?;
                rustix::fs::symlinkat(Path::new(OsStr::from_bytes(target)), &*place.dir, name)
                    .map_err(|e| write_error("link", &path, e))?;
                let (uid, gid) = (owner(entry.uid), group(entry.gid));
                rustix::fs::chownat(&*place.dir, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
                    .and_then(|()| set_time(&*place.dir, name, entry.modified))
                    .map_err(|e| write_error("set the attributes of", &path, e))
            }
            Kind::Fifo => self.apply_node(place, name, entry, FileType::Fifo, 0),
            Kind::CharDevice { major, minor } => {
                let device = device(*major, *minor, entry)?;
                self.apply_node(place, name, entry, FileType::CharacterDevice, device)
            }
            Kind::BlockDevice { major, minor } => {
                let device = device(*major, *minor, entry)?;
                self.apply_node(place, name, entry, FileType::BlockDevice, device)
            }
        }
    }

    fn apply_directory(
        &mut self,
        place: &Place,
        name: &Path,
        entry: &Entry,
    ) -> Result<(), LayerError> {
        let path = place.path.join(name);
        let failed = |e| write_error("make", &path, e);
        let found = present(&*place.dir, name).map_err(failed)?;
        if found == Present::Other {
            self.clear(place, name)?;
        }
        if found != Present::Directory {
            make_dir(&*place.dir, name, found).map_err(failed)?;
        }
        let dir =
            open_child(&*place.dir, name, OFlags::RDONLY | OFlags::DIRECTORY).map_err(failed)?;
        set_attributes(&dir, entry).map_err(|e| write_error("set the attributes of", &path, e))?;
        self.remember(&path, entry.modified)
    }

    /// The target must be in the same layer. A layer is stored under the digest of its own content and shared by all images
    /// that have it, whatever lies below it there, so it cannot link to what only some of them have. (Docker and containerd
    /// cannot either when they unpack for overlayfs.)
    fn apply_hard_link(
        &mut self,
        place: &Place,
        name: &Path,
        target: &[u8],
        entry: &Entry,
    ) -> Result<(), LayerError> {
        let target_path = normal(target)?;
        let missing = || {
            let target = super::shown(target);
            refused(
                &entry.path,
                format!(
                    "it is a hard link to {target:?}, which this layer does not have before it"
                ),
            )
        };
        let target_name = target_path
            .file_name()
            .map(PathBuf::from)
            .ok_or_else(missing)?;
        let target_parent = target_path.parent().unwrap_or(Path::new(""));
        self.clear(place, name)?;
        let target_dir = self.existing_parent(target_parent)?.ok_or_else(missing)?;
        match present(&target_dir, &target_name) {
            Ok(Present::Nothing | Present::Whiteout) => return Err(missing()),
            Ok(Present::Directory) => {
                return Err(refused(&entry.path, "it is a hard link to a directory"));
            }
            _ => {}
        }
        rustix::fs::linkat(
            &target_dir,
            &target_name,
            &*place.dir,
            name,
            AtFlags::empty(),
        )
        .map_err(|e| write_error("link", &place.path.join(name), e))
    }

    /// A FIFO or a device. A character device 0:0 is what overlayfs takes for a whiteout, and an image may have that.
    fn apply_node(
        &mut self,
        place: &Place,
        name: &Path,
        entry: &Entry,
        kind: FileType,
        device: u64,
    ) -> Result<(), LayerError> {
        self.clear(place, name)?;
        let (uid, gid) = (owner(entry.uid), group(entry.gid));
        rustix::fs::mknodat(&*place.dir, name, kind, Mode::empty(), device)
            .and_then(|()| {
                rustix::fs::chownat(&*place.dir, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
            })
            // The name was made by the call above and is no link.
            .and_then(|()| {
                rustix::fs::chmodat(
                    &*place.dir,
                    name,
                    Mode::from_raw_mode(entry.mode),
                    AtFlags::empty(),
                )
            })
            .and_then(|()| {
                let node = open_child(&*place.dir, name, OFlags::PATH)?;
                set_xattrs(&node, entry)
            })
            .and_then(|()| set_time(&*place.dir, name, entry.modified))
            .map_err(|e| write_error("make", &place.path.join(name), e))
    }

    fn write_content(
        &mut self,
        file: &File,
        size: u64,
        chunks: &[Chunk],
        archive: &mut Archive<impl Input>,
        path: &Path,
    ) -> Result<(), LayerError> {
        let failed = |source| LayerError::Write {
            action: "write",
            entry: super::shown(path.as_os_str().as_bytes()),
            source,
        };
        // Where the last byte written is; a sparse file may end with a hole.
        let mut end = 0;
        for chunk in chunks {
            let mut at = chunk.offset;
            let mut left = chunk.length;
            while left > 0 {
                let want = self
                    .buffer
                    .len()
                    .min(usize::try_from(left).unwrap_or(usize::MAX));
                let n = archive
                    .read_content(&mut self.buffer[..want])
                    .map_err(LayerError::Read)?;
                if n == 0 {
                    return Err(LayerError::Read(std::io::ErrorKind::UnexpectedEof.into()));
                }
                file.write_all_at(&self.buffer[..n], at).map_err(failed)?;
                at += n as u64;
                left -= n as u64;
                end = at;
            }
        }
        if end < size {
            file.set_len(size).map_err(failed)
        } else {
            Ok(())
        }
    }
}

fn device(major: u32, minor: u32, entry: &Entry) -> Result<u64, LayerError> {
    if major > MAX_MAJOR || minor > MAX_MINOR {
        return Err(refused(
            &entry.path,
            format!("there is no device {major}:{minor}"),
        ));
    }
    Ok(rustix::fs::makedev(major, minor))
}

/// Owner, mode and extended attributes, in this order: a new owner clears set-user-ID and capabilities.
fn set_attributes(fd: &OwnedFd, entry: &Entry) -> rustix::io::Result<()> {
    rustix::fs::fchown(fd, owner(entry.uid), group(entry.gid))?;
    rustix::fs::fchmod(fd, Mode::from_raw_mode(entry.mode))?;
    set_xattrs(fd, entry)
}

/// Sets those extended attributes that are the image's to set. `trusted.*` belongs to the host (`trusted.overlay.*` would
/// lead overlayfs elsewhere), and so do the labels of its security modules.
fn set_xattrs(fd: &OwnedFd, entry: &Entry) -> rustix::io::Result<()> {
    for (name, value) in &entry.xattrs {
        let belongs_to_image = name.starts_with(b"user.")
            || matches!(
                name.as_slice(),
                b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default"
            );
        if !belongs_to_image || name.contains(&0) {
            tracing::debug!(name = %String::from_utf8_lossy(name), "extended attribute passed over");
            continue;
        }
        // By name, since fsetxattr(2) takes no descriptor opened with O_PATH.
        match rustix::fs::setxattr(
            descriptor_path(fd),
            name.as_slice(),
            value,
            XattrFlags::empty(),
        ) {
            // A file system without such attributes, or user attributes on a device: nothing to be had.
            Err(e) if e == Errno::OPNOTSUPP || (e == Errno::PERM && name.starts_with(b"user.")) => {
                tracing::debug!(name = %String::from_utf8_lossy(name), "extended attribute not supported");
            }
            other => other?,
        }
    }
    Ok(())
}
