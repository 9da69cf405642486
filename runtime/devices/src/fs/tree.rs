//! The shared directory as the guest sees it: lookup, opening, and the content of files. Requests arrive one at
//! a time; what they name (inodes, handles, names) is checked against what the guest has been given.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::ATTR_SUBMOUNT;
use fuse_backend_rs::api::filesystem::{Entry, OpenOptions};
use nix::sys::eventfd::{EfdFlags, EventFd};
use rustix::fs::{
    CWD, FallocateFlags, FileType, Mode, OFlags, SeekFrom, Statx, fallocate, fcntl_setfl,
    fdatasync, fsync, openat, readlinkat, seek,
};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::attr::attributes;
use super::file::{FileId, PLACE, Version, kind, stat_fd};
use super::handles::{HandleId, Handles, Open};
use super::identity::Unprivileged;
use super::inodes::{Inodes, NodeId};
use super::limits::{FsLimits, FsUsage};
use super::names::Name;

/// How long the guest may believe a name or an attribute without asking again. A volume may change on the host at any time,
/// and virtio-fs has no way to tell the guest: this is how late it may notice. Within it, the lookups of a burst of system
/// calls cost nothing. That a name does not exist is never believed.
pub const BELIEF: Duration = Duration::from_secs(1);

/// `FOPEN_NOFLUSH` (FUSE 7.35): closing this file needs no FLUSH request.
const FOPEN_NOFLUSH: u32 = 1 << 5;

/// What a guest may choose about the way a regular file is opened. Not O_DIRECT: that is between the guest and its page
/// cache, and the host would demand alignment that the guest does not know of. Not O_PATH, O_CREAT, O_TMPFILE or
/// O_NOFOLLOW: they change what an open means.
const OPEN_FLAGS: OFlags = OFlags::ACCMODE
    .union(OFlags::APPEND)
    .union(OFlags::TRUNC)
    .union(OFlags::SYNC)
    .union(OFlags::DSYNC)
    .union(OFlags::NOATIME);

/// Everything served, and everything the guest holds of it.
#[derive(Debug)]
pub struct Tree {
    pub(super) inodes: Inodes,
    pub(super) handles: Handles,
    /// `/proc/self/fd`, by which a place becomes an open file. Held open, so that no path from `/` is resolved once the
    /// process may have the shared directory for its root.
    descriptors: OwnedFd,
    limits: FsLimits,
    reclaim: EventFd,
    /// Whether the guest has been asked to forget and has not yet done so.
    asked: bool,
}

impl Tree {
    /// Serves the directory at `shared`, which is opened here and never again.
    ///
    /// # Errors
    /// Those of openat(2), eventfd(2).
    pub fn new(shared: &Path, limits: FsLimits) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, shared, flags, Mode::empty())?;
        Ok(Self {
            inodes: Inodes::new(root, limits)?,
            handles: Handles::new(limits.open),
            descriptors: openat(CWD, c"/proc/self/fd", flags, Mode::empty())?,
            limits,
            reclaim: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            asked: false,
        })
    }

    /// What the guest holds.
    pub fn usage(&self) -> FsUsage {
        FsUsage {
            inodes: self.inodes.len(),
            descriptors: self.inodes.descriptors(),
            open: self.handles.len(),
        }
    }

    /// Readable when the guest should forget files it does not use.
    pub fn reclaim(&self) -> &EventFd {
        &self.reclaim
    }

    /// The guest holds nothing any more.
    pub fn clear(&mut self) {
        self.handles.clear();
        self.inodes.clear();
        self.asked = false;
    }

    /// Whether the guest knows so many files that it should not be told of more than it asks for.
    pub fn is_crowded(&self) -> bool {
        self.inodes.len() >= self.limits.high_water()
    }

    /// Looks `name` up in the directory `parent`.
    ///
    /// # Errors
    /// Those of openat(2) and [`Inodes::enter`].
    pub fn lookup(&mut self, parent: NodeId, name: Name<'_>) -> io::Result<Entry> {
        let dir = self.inodes.dir(parent)?;
        let found = openat(&dir, name.as_c_str(), PLACE, Mode::empty())?;
        self.enter(parent, name, found)
    }

    /// Tells the guest of what `found` (`O_PATH`) is, in the directory `parent` as `name`.
    ///
    /// # Errors
    /// Those of [`Inodes::enter`] and statx(2).
    pub fn enter(&mut self, parent: NodeId, name: Name<'_>, found: OwnedFd) -> io::Result<Entry> {
        let stat = stat_fd(&found)?;
        let entered = self.inodes.enter(parent, name.as_c_str(), found, &stat);
        if !self.asked && (entered.is_err() || self.is_crowded()) {
            self.asked = true;
            // It can only fail when it is readable already.
            let _ = self.reclaim.write(1);
        }
        // A directory on another mount is the root of a file system of its own, with its own device number: without
        // this, two files of the same inode number would look like hard links of one another.
        let submount = kind(&stat) == FileType::Directory
            && self.inodes.mount(parent) != Some(FileId::of(&stat).mount);
        Ok(Entry {
            inode: entered?,
            generation: 0,
            attr: attributes(&stat),
            attr_flags: if submount { ATTR_SUBMOUNT } else { 0 },
            attr_timeout: BELIEF,
            entry_timeout: BELIEF,
        })
    }

    /// The guest forgets `node`, `count` times.
    pub fn forget(&mut self, node: NodeId, count: u64) {
        self.inodes.forget(node, count);
        if self.inodes.len() < self.limits.low_water() {
            self.asked = false;
        }
    }

    /// Where the symbolic link `node` points. The guest follows it; the host never does.
    ///
    /// # Errors
    /// Those of readlinkat(2).
    pub fn readlink(&mut self, node: NodeId) -> io::Result<Vec<u8>> {
        let (fd, _) = self.inodes.get(node)?;
        Ok(readlinkat(&fd, c"", Vec::new())?.into_bytes())
    }

    /// Opens the regular file `node`.
    ///
    /// # Errors
    /// ENFILE when too much is open; those of [`Tree::reopen`].
    pub fn open(
        &mut self,
        node: NodeId,
        flags: u32,
        unprivileged: bool,
    ) -> io::Result<(HandleId, OpenOptions)> {
        self.handles.room()?;
        let flags = open_flags(flags)?;
        let (fd, kind) = self.inodes.get(node)?;
        let file = {
            let _unprivileged = Unprivileged::when(unprivileged)?;
            self.reopen(&fd, kind, flags)?
        };
        let stat = stat_fd(&file)?;
        self.opened(node, file, flags, &stat)
    }

    /// Keeps the newly opened `file`, of the attributes `stat`, for the guest.
    ///
    /// # Errors
    /// ENFILE when too much is open.
    pub fn opened(
        &mut self,
        node: NodeId,
        file: OwnedFd,
        flags: OFlags,
        stat: &Statx,
    ) -> io::Result<(HandleId, OpenOptions)> {
        self.inodes.identify(node, stat);
        let open = Open::File {
            file: File::from(file),
            append: flags.contains(OFlags::APPEND),
        };
        let handle = self.handles.insert(node, open)?;
        // Close-to-open consistency: the guest's cached pages live on only if the file is as it was when they were read.
        let mut options = OpenOptions::empty();
        options.set(
            OpenOptions::KEEP_CACHE,
            self.inodes.cache_holds(node, Version::of(stat)),
        );
        if flags.intersection(OFlags::ACCMODE) == OFlags::RDONLY {
            // SAFETY: bitflags 1 keeps bits it has no name for as they are; no code relies on their absence.
            options |= unsafe { OpenOptions::from_bits_unchecked(FOPEN_NOFLUSH) };
        }
        Ok((handle, options))
    }

    /// Opens what the place `fd` is, which has the type `kind`.
    ///
    /// # Errors
    /// ELOOP, ENXIO for what a guest opens without its file system: a link, a device, a FIFO, a socket. Those of the host
    /// would be reached here. EISDIR, ENOTDIR when the type is not as the flags say. Those of openat(2).
    pub fn reopen(&self, fd: impl AsFd, kind: FileType, flags: OFlags) -> io::Result<OwnedFd> {
        let wants_dir = flags.contains(OFlags::DIRECTORY);
        match kind {
            FileType::RegularFile if !wants_dir => {}
            FileType::Directory if wants_dir => {}
            FileType::Directory => return Err(Errno::ISDIR.into()),
            _ if wants_dir => return Err(Errno::NOTDIR.into()),
            FileType::Symlink => return Err(Errno::LOOP.into()),
            _ => return Err(Errno::NXIO.into()),
        }
        self.open_descriptor(fd, flags)
    }

    /// Opens anew what the descriptor `fd` is. Its type must have been checked, unless `flags` has O_PATH. Nothing waits:
    /// some regular files would have a reader wait (those of tracefs), and a lease has an opener do so.
    ///
    /// # Errors
    /// Those of openat(2).
    pub fn open_descriptor(&self, fd: impl AsFd, flags: OFlags) -> io::Result<OwnedFd> {
        let flags = flags | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(openat(
            &self.descriptors,
            DecInt::from_fd(&fd),
            flags,
            Mode::empty(),
        )?)
    }

    /// `/proc/self/fd`.
    pub fn descriptors(&self) -> &OwnedFd {
        &self.descriptors
    }

    /// Opens the directory `node`.
    ///
    /// # Errors
    /// As for [`Tree::open`].
    pub fn opendir(&mut self, node: NodeId) -> io::Result<HandleId> {
        self.handles.room()?;
        let (fd, kind) = self.inodes.get(node)?;
        let dir = self.reopen(&fd, kind, OFlags::RDONLY | OFlags::DIRECTORY)?;
        self.handles.insert(node, Open::Dir(Arc::new(dir)))
    }

    /// The file that `handle` is, with O_APPEND as the guest has it at this moment (it may change it by fcntl(2)). With it,
    /// the host appends wherever the end of the file then is; without it, at the offset it is given.
    ///
    /// # Errors
    /// Those of [`Handles::file`] and fcntl(2).
    pub fn file_to_write(
        &mut self,
        node: NodeId,
        handle: HandleId,
        flags: u32,
    ) -> io::Result<&mut File> {
        let wanted = OFlags::from_bits_retain(flags).contains(OFlags::APPEND);
        let (file, append) = self.handles.file(handle, node)?;
        if *append != wanted {
            let flags = match wanted {
                true => OFlags::APPEND | OFlags::NONBLOCK,
                false => OFlags::NONBLOCK,
            };
            fcntl_setfl(&*file, flags)?;
            *append = wanted;
        }
        Ok(file)
    }

    /// Allocates or frees room in a file.
    ///
    /// # Errors
    /// Those of fallocate(2).
    pub fn fallocate(
        &mut self,
        node: NodeId,
        handle: HandleId,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let (file, _) = self.handles.file(handle, node)?;
        Ok(fallocate(
            &*file,
            FallocateFlags::from_bits_retain(mode),
            offset,
            length,
        )?)
    }

    /// Finds data or a hole. The guest keeps file positions itself and asks for nothing else.
    ///
    /// # Errors
    /// EINVAL for another `whence`; those of lseek(2).
    pub fn lseek(
        &mut self,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        let (file, _) = self.handles.file(handle, node)?;
        let to = match whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL.into()),
        };
        Ok(seek(&*file, to)?)
    }

    /// Brings what `handle` is to stable storage.
    ///
    /// # Errors
    /// Those of fsync(2).
    pub fn fsync(&mut self, node: NodeId, handle: HandleId, data_only: bool) -> io::Result<()> {
        let open = self.handles.get(handle, node)?;
        match data_only {
            true => fdatasync(open)?,
            false => fsync(open)?,
        }
        Ok(())
    }

    /// The guest has closed a file that it may have written: passed on to the host's file system, which may have an error to
    /// report (NFS, quotas).
    ///
    /// # Errors
    /// Those of dup(2) and close(2).
    pub fn flush(&mut self, node: NodeId, handle: HandleId) -> io::Result<()> {
        let (file, _) = self.handles.file(handle, node)?;
        Ok(nix::unistd::close(file.try_clone()?)?)
    }
}

/// The flags of an open(2) that the guest may choose.
///
/// # Errors
/// EINVAL for the access mode that does not exist.
pub fn open_flags(flags: u32) -> io::Result<OFlags> {
    let flags = OFlags::from_bits_retain(flags).intersection(OPEN_FLAGS);
    match flags.intersection(OFlags::ACCMODE) {
        OFlags::ACCMODE => Err(Errno::INVAL.into()),
        _ => Ok(flags),
    }
}
