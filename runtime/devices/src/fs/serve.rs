//! The tree behind the interface that fuse-backend-rs's server calls: numbers and flags of the protocol become the tree's,
//! and names are checked. fuse-backend-rs has a file system of its own (`PassthroughFs`), which is not used: it never drops
//! its record of a forgotten file, trusts absolute paths under /proc and in mountinfo, lets O_PATH through to an exclusive
//! create (which then follows links), and cannot tell how many descriptors it holds.

use std::ffi::CStr;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, FOPEN_IN_KILL_SUIDGID, WRITE_KILL_PRIV, stat64, statvfs64,
};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use rustix::fs::AtFlags;

use super::create::By;
use super::handles::HandleId;
use super::identity::Unprivileged;
use super::inodes::NodeId;
use super::names::Name;
use super::tree::{BELIEF, Tree};

/// What the device offers when a guest mounts it. Not WRITEBACK_CACHE: the host must see writes when they are made. Not
/// POSIX_LOCKS and FLOCK_LOCKS: locks are the guest's own. Not ZERO_MESSAGE_OPEN: an open file is a descriptor here.
fn offered() -> FsOptions {
    FsOptions::ASYNC_READ
        | FsOptions::BIG_WRITES
        | FsOptions::MAX_PAGES
        | FsOptions::ATOMIC_O_TRUNC
        | FsOptions::AUTO_INVAL_DATA
        | FsOptions::DO_READDIRPLUS
        | FsOptions::READDIRPLUS_AUTO
        | FsOptions::PARALLEL_DIROPS
        | FsOptions::ASYNC_DIO
        | FsOptions::DONT_MASK
        | FsOptions::POSIX_ACL
        | FsOptions::CACHE_SYMLINKS
        | FsOptions::HANDLE_KILLPRIV_V2
        | FsOptions::SUBMOUNTS
}

/// A tree as the server calls it and the device looks after it. The lock is never contended: both are called by the one
/// thread that drives the device.
#[derive(Debug, Clone)]
pub struct Served(Arc<Mutex<Tree>>);

impl Served {
    /// Serves `tree`.
    pub fn new(tree: Tree) -> Self {
        Self(Arc::new(Mutex::new(tree)))
    }

    /// The tree.
    pub fn tree(&self) -> MutexGuard<'_, Tree> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who asks.
fn by(ctx: &Context, umask: u32) -> By {
    By {
        uid: ctx.uid,
        gid: ctx.gid,
        umask,
    }
}

impl FileSystem for Served {
    type Inode = NodeId;
    type Handle = HandleId;

    fn init(&self, _capable: FsOptions) -> io::Result<FsOptions> {
        // A second INIT is a second mount: what the first one held is gone.
        self.tree().clear();
        Ok(offered())
    }

    fn destroy(&self) {
        self.tree().clear();
    }

    fn lookup(&self, _ctx: &Context, parent: NodeId, name: &CStr) -> io::Result<Entry> {
        self.tree().lookup(parent, Name::new(name)?)
    }

    fn forget(&self, _ctx: &Context, node: NodeId, count: u64) {
        self.tree().forget(node, count);
    }

    fn getattr(
        &self,
        _ctx: &Context,
        node: NodeId,
        handle: Option<HandleId>,
    ) -> io::Result<(stat64, Duration)> {
        Ok((self.tree().getattr(node, handle)?, BELIEF))
    }

    fn setattr(
        &self,
        _ctx: &Context,
        node: NodeId,
        attr: stat64,
        handle: Option<HandleId>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        Ok((self.tree().setattr(node, &attr, handle, valid)?, BELIEF))
    }

    fn readlink(&self, _ctx: &Context, node: NodeId) -> io::Result<Vec<u8>> {
        self.tree().readlink(node)
    }

    fn symlink(
        &self,
        ctx: &Context,
        target: &CStr,
        parent: NodeId,
        name: &CStr,
    ) -> io::Result<Entry> {
        self.tree()
            .symlink(parent, Name::new(name)?, target, by(ctx, 0))
    }

    fn mknod(
        &self,
        ctx: &Context,
        parent: NodeId,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.tree()
            .mknod(parent, Name::new(name)?, mode, rdev, by(ctx, umask))
    }

    fn mkdir(
        &self,
        ctx: &Context,
        parent: NodeId,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.tree()
            .mkdir(parent, Name::new(name)?, mode, by(ctx, umask))
    }

    fn unlink(&self, _ctx: &Context, parent: NodeId, name: &CStr) -> io::Result<()> {
        self.tree()
            .unlink(parent, Name::new(name)?, AtFlags::empty())
    }

    fn rmdir(&self, _ctx: &Context, parent: NodeId, name: &CStr) -> io::Result<()> {
        self.tree()
            .unlink(parent, Name::new(name)?, AtFlags::REMOVEDIR)
    }

    fn rename(
        &self,
        _ctx: &Context,
        old_parent: NodeId,
        old: &CStr,
        new_parent: NodeId,
        new: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.tree().rename(
            old_parent,
            Name::new(old)?,
            new_parent,
            Name::new(new)?,
            flags,
        )
    }

    fn link(&self, _ctx: &Context, node: NodeId, parent: NodeId, name: &CStr) -> io::Result<Entry> {
        self.tree().link(node, parent, Name::new(name)?)
    }

    fn open(
        &self,
        _ctx: &Context,
        node: NodeId,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<HandleId>, OpenOptions, Option<u32>)> {
        let unprivileged = fuse_flags & FOPEN_IN_KILL_SUIDGID != 0;
        let (handle, options) = self.tree().open(node, flags, unprivileged)?;
        Ok((Some(handle), options, None))
    }

    fn create(
        &self,
        ctx: &Context,
        parent: NodeId,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<HandleId>, OpenOptions, Option<u32>)> {
        let (entry, handle, options) = self.tree().create(
            parent,
            Name::new(name)?,
            args.mode,
            args.flags,
            args.fuse_flags & FOPEN_IN_KILL_SUIDGID != 0,
            by(ctx, args.umask),
        )?;
        Ok((entry, Some(handle), options, None))
    }

    fn read(
        &self,
        _ctx: &Context,
        node: NodeId,
        handle: HandleId,
        to: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _flags: u32,
    ) -> io::Result<usize> {
        let mut tree = self.tree();
        let (file, _) = tree.handles.file(handle, node)?;
        to.write_from(file, size as usize, offset)
    }

    fn write(
        &self,
        _ctx: &Context,
        node: NodeId,
        handle: HandleId,
        from: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _delayed_write: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let _unprivileged = Unprivileged::when(fuse_flags & WRITE_KILL_PRIV != 0)?;
        let mut tree = self.tree();
        let file = tree.file_to_write(node, handle, flags)?;
        from.read_to(file, size as usize, offset)
    }

    fn flush(
        &self,
        _ctx: &Context,
        node: NodeId,
        handle: HandleId,
        _lock_owner: u64,
    ) -> io::Result<()> {
        self.tree().flush(node, handle)
    }

    fn fsync(
        &self,
        _ctx: &Context,
        node: NodeId,
        datasync: bool,
        handle: HandleId,
    ) -> io::Result<()> {
        self.tree().fsync(node, handle, datasync)
    }

    fn fallocate(
        &self,
        _ctx: &Context,
        node: NodeId,
        handle: HandleId,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.tree().fallocate(node, handle, mode, offset, length)
    }

    fn release(
        &self,
        _ctx: &Context,
        node: NodeId,
        _flags: u32,
        handle: HandleId,
        _flush: bool,
        _flock_release: bool,
        _lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.tree().handles.remove(handle, node)
    }

    fn statfs(&self, _ctx: &Context, node: NodeId) -> io::Result<statvfs64> {
        self.tree().statfs(node)
    }

    fn setxattr(
        &self,
        _ctx: &Context,
        node: NodeId,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        self.tree().setxattr(node, name, value, flags)
    }

    fn getxattr(
        &self,
        _ctx: &Context,
        node: NodeId,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        self.tree().getxattr(node, name, size)
    }

    fn listxattr(&self, _ctx: &Context, node: NodeId, size: u32) -> io::Result<ListxattrReply> {
        self.tree().listxattr(node, size)
    }

    fn removexattr(&self, _ctx: &Context, node: NodeId, name: &CStr) -> io::Result<()> {
        self.tree().removexattr(node, name)
    }

    fn opendir(
        &self,
        _ctx: &Context,
        node: NodeId,
        _flags: u32,
    ) -> io::Result<(Option<HandleId>, OpenOptions)> {
        Ok((Some(self.tree().opendir(node)?), OpenOptions::empty()))
    }

    fn readdir(
        &self,
        _ctx: &Context,
        node: NodeId,
        handle: HandleId,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.tree().readdir(node, handle, size, offset, add)
    }

    fn readdirplus(
        &self,
        _ctx: &Context,
        node: NodeId,
        handle: HandleId,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.tree().readdirplus(node, handle, size, offset, add)
    }

    fn fsyncdir(
        &self,
        _ctx: &Context,
        node: NodeId,
        datasync: bool,
        handle: HandleId,
    ) -> io::Result<()> {
        self.tree().fsync(node, handle, datasync)
    }

    fn releasedir(
        &self,
        _ctx: &Context,
        node: NodeId,
        _flags: u32,
        handle: HandleId,
    ) -> io::Result<()> {
        self.tree().handles.remove(handle, node)
    }

    fn lseek(
        &self,
        _ctx: &Context,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        self.tree().lseek(node, handle, offset, whence)
    }
}
