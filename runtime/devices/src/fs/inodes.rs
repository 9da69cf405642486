//! The files and directories the guest knows: those it has looked up and not yet forgotten. Each has a number that is
//! never used again, so that a late FORGET cannot hit another file, and the identity the host gives it.
//!
//! The device keeps an `O_PATH` descriptor on the ones in use. There may be far more known files than a process may have
//! descriptors, so the least used lose theirs; such a file is found again by its last known name in its directory, one
//! component at a time, and taken only if it is still the same file. That needs no privilege and works on every file
//! system, where file handles (`open_by_handle_at`) would need CAP_DAC_READ_SEARCH, with which one can open anything on
//! the host's file system, and do not work on overlayfs.

use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{FileType, Mode, Statx, openat};
use rustix::io::Errno;

use super::file::{FileId, PLACE, Version, kind, stat_fd};
use super::limits::FsLimits;

/// Number by which the guest names a file.
pub type NodeId = u64;

/// The shared directory itself (`FUSE_ROOT_ID`).
pub const ROOT: NodeId = 1;

/// Deepest nesting of directories that is searched for a file without a descriptor.
const MAX_DEPTH: usize = 1024;

/// Where a file was last seen.
#[derive(Debug)]
struct Place {
    parent: NodeId,
    name: CString,
}

/// One known file.
#[derive(Debug)]
struct Inode {
    id: FileId,
    kind: FileType,
    /// How often the guest has been told of it, less how often it has forgotten.
    lookups: u64,
    /// `None` for the root, and for a file whose name is gone: those keep their descriptor.
    place: Option<Place>,
    /// Known files whose place is in this directory; while there are any, it stays known.
    children: usize,
    fd: Option<Arc<OwnedFd>>,
    /// Used since the clock's hand last passed.
    used: bool,
    /// What the guest's cache of its content was filled from.
    cached: Option<Version>,
}

/// All known files.
#[derive(Debug)]
pub struct Inodes {
    nodes: HashMap<NodeId, Inode>,
    ids: HashMap<FileId, NodeId>,
    next: NodeId,
    /// Files with a descriptor, in the order in which a second-chance clock passes them. It may name files that have
    /// lost theirs since.
    clock: VecDeque<NodeId>,
    descriptors: usize,
    limits: FsLimits,
}

impl Inodes {
    /// Only the root, which is the directory that `root` is.
    ///
    /// # Errors
    /// Those of statx(2); ENOTDIR.
    pub fn new(root: OwnedFd, limits: FsLimits) -> io::Result<Self> {
        let stat = stat_fd(&root)?;
        if kind(&stat) != FileType::Directory {
            return Err(Errno::NOTDIR.into());
        }
        let mut inodes = Self {
            nodes: HashMap::new(),
            ids: HashMap::new(),
            next: ROOT,
            clock: VecDeque::new(),
            descriptors: 0,
            limits,
        };
        let root = inodes.insert(root, &stat);
        debug_assert_eq!(root, ROOT);
        Ok(inodes)
    }

    /// How many files are known.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// How many of them have a descriptor.
    pub fn descriptors(&self) -> usize {
        self.descriptors
    }

    /// Forgets all but the root.
    pub fn clear(&mut self) {
        let root = self.nodes.remove(&ROOT);
        self.nodes = HashMap::new();
        self.ids = HashMap::new();
        self.clock = VecDeque::new();
        self.descriptors = 1;
        if let Some(mut root) = root {
            root.children = 0;
            root.lookups = 0;
            self.ids.insert(root.id, ROOT);
            self.nodes.insert(ROOT, root);
        }
    }

    /// A descriptor (`O_PATH`) on `node`, and its type.
    ///
    /// # Errors
    /// ESTALE for a file the guest does not know, and for one that is no longer where it was: the guest then looks its path
    /// up again. Those of openat(2) and statx(2).
    pub fn get(&mut self, node: NodeId) -> io::Result<(Arc<OwnedFd>, FileType)> {
        let inode = self.nodes.get_mut(&node).ok_or(Errno::STALE)?;
        inode.used = true;
        let kind = inode.kind;
        match &inode.fd {
            Some(fd) => Ok((Arc::clone(fd), kind)),
            None => Ok((self.find(node)?, kind)),
        }
    }

    /// As [`Inodes::get`], for a directory.
    ///
    /// # Errors
    /// As for [`Inodes::get`]; ENOTDIR.
    pub fn dir(&mut self, node: NodeId) -> io::Result<Arc<OwnedFd>> {
        match self.get(node)? {
            (fd, FileType::Directory) => Ok(fd),
            _ => Err(Errno::NOTDIR.into()),
        }
    }

    /// The mount that `node` is on.
    pub fn mount(&self, node: NodeId) -> Option<u64> {
        self.nodes.get(&node).map(|inode| inode.id.mount)
    }

    /// The known file that `stat` is of.
    pub fn known(&self, stat: &Statx) -> Option<NodeId> {
        let node = *self.ids.get(&FileId::of(stat))?;
        (self.nodes.get(&node)?.kind == kind(stat)).then_some(node)
    }

    /// The guest is told of the file that `fd` and `stat` are, seen in the directory `parent` as `name`. It must forget it
    /// once for each time.
    ///
    /// # Errors
    /// ENFILE when there is no room for another file, or none for another descriptor.
    pub fn enter(
        &mut self,
        parent: NodeId,
        name: &CStr,
        fd: OwnedFd,
        stat: &Statx,
    ) -> io::Result<NodeId> {
        let node = match self.known(stat) {
            Some(node) => {
                if self
                    .nodes
                    .get(&node)
                    .is_some_and(|inode| inode.fd.is_none())
                {
                    self.make_room()?;
                    self.keep(node, fd);
                }
                node
            }
            None => {
                if self.nodes.len() >= self.limits.inodes {
                    return Err(Errno::NFILE.into());
                }
                self.make_room()?;
                self.insert(fd, stat)
            }
        };
        if let Some(inode) = self.nodes.get_mut(&node) {
            inode.lookups = inode.lookups.saturating_add(1);
            inode.used = true;
        }
        self.place(node, parent, name);
        Ok(node)
    }

    /// The guest forgets `node`, `count` times.
    pub fn forget(&mut self, node: NodeId, count: u64) {
        if let Some(inode) = self.nodes.get_mut(&node) {
            inode.lookups = inode.lookups.saturating_sub(count);
            self.drop_unused(node);
        }
    }

    /// `node` is in the directory `parent` as `name`.
    pub fn place(&mut self, node: NodeId, parent: NodeId, name: &CStr) {
        if node == ROOT || !self.nodes.contains_key(&parent) {
            return;
        }
        let Some(inode) = self.nodes.get(&node) else {
            return;
        };
        if let Some(place) = &inode.place
            && place.parent == parent
            && place.name.as_c_str() == name
        {
            return;
        }
        // The host may have moved directories into one another since they were seen: places must not form a ring.
        if inode.kind == FileType::Directory && self.is_below(parent, node) {
            self.displace(node);
            return;
        }
        if let Some(above) = self.nodes.get_mut(&parent) {
            above.children += 1;
        }
        let left = self.nodes.get_mut(&node).and_then(|inode| {
            inode.place.replace(Place {
                parent,
                name: name.to_owned(),
            })
        });
        self.leave(left);
    }

    /// `node` has no name any more, or none that is known. From here on it keeps the descriptor it has.
    pub fn displace(&mut self, node: NodeId) {
        let left = self
            .nodes
            .get_mut(&node)
            .and_then(|inode| inode.place.take());
        self.leave(left);
    }

    /// The identity of `node` is that in `stat`. On overlayfs it changes when a file is first written, if the layers and the
    /// upper directory are on different file systems; it is still the same file.
    pub fn identify(&mut self, node: NodeId, stat: &Statx) {
        let id = FileId::of(stat);
        if let Some(inode) = self.nodes.get_mut(&node)
            && inode.id != id
            && inode.kind == kind(stat)
        {
            if self.ids.get(&inode.id) == Some(&node) {
                self.ids.remove(&inode.id);
            }
            inode.id = id;
            self.ids.insert(id, node);
        }
    }

    /// The guest opens `node`, whose content is in `version`: whether what it has cached of it still holds.
    pub fn cache_holds(&mut self, node: NodeId, version: Option<Version>) -> bool {
        self.nodes.get_mut(&node).is_some_and(|inode| {
            let before = std::mem::replace(&mut inode.cached, version);
            before.is_some() && before == version
        })
    }

    /// Adds a file that is not known, with no place and not counted as looked up.
    fn insert(&mut self, fd: OwnedFd, stat: &Statx) -> NodeId {
        let node = self.next;
        self.next += 1;
        let id = FileId::of(stat);
        self.ids.insert(id, node);
        self.nodes.insert(
            node,
            Inode {
                id,
                kind: kind(stat),
                lookups: 0,
                place: None,
                children: 0,
                fd: None,
                used: true,
                cached: None,
            },
        );
        self.keep(node, fd);
        node
    }

    /// Gives `node` a descriptor.
    fn keep(&mut self, node: NodeId, fd: OwnedFd) -> Arc<OwnedFd> {
        let fd = Arc::new(fd);
        if let Some(inode) = self.nodes.get_mut(&node)
            && inode.fd.replace(Arc::clone(&fd)).is_none()
        {
            self.descriptors += 1;
            if node != ROOT {
                self.clock.push_back(node);
            }
        }
        // Forgotten files leave their entry behind.
        if self.clock.len() > 2 * self.descriptors + 64 {
            let nodes = &self.nodes;
            self.clock
                .retain(|node| nodes.get(node).is_some_and(|inode| inode.fd.is_some()));
        }
        fd
    }

    /// Makes room for one more descriptor: the hand of the clock passes files until one has not been used since it last
    /// came by and can be found again by name.
    fn make_room(&mut self) -> io::Result<()> {
        let mut passes = 2 * self.clock.len();
        while self.descriptors >= self.limits.descriptors {
            let node = self.clock.pop_front().ok_or(Errno::NFILE)?;
            let Some(inode) = self.nodes.get_mut(&node) else {
                continue;
            };
            if inode.fd.is_none() {
                continue;
            }
            if inode.place.is_some() && !inode.used {
                inode.fd = None;
                self.descriptors -= 1;
                continue;
            }
            inode.used = false;
            self.clock.push_back(node);
            passes = passes.checked_sub(1).ok_or(Errno::NFILE)?;
        }
        Ok(())
    }

    /// Finds a file that has lost its descriptor.
    fn find(&mut self, node: NodeId) -> io::Result<Arc<OwnedFd>> {
        let mut lost = vec![node];
        let mut at = node;
        let mut fd = loop {
            let place = self.nodes.get(&at).and_then(|inode| inode.place.as_ref());
            at = place.ok_or(Errno::STALE)?.parent;
            match self.nodes.get(&at) {
                Some(Inode { fd: Some(fd), .. }) => break Arc::clone(fd),
                Some(_) if lost.len() < MAX_DEPTH => lost.push(at),
                _ => return Err(Errno::STALE.into()),
            }
        };
        for node in lost.into_iter().rev() {
            let inode = self.nodes.get(&node).ok_or(Errno::STALE)?;
            let place = inode.place.as_ref().ok_or(Errno::STALE)?;
            let found = match openat(&fd, &place.name, PLACE, Mode::empty()) {
                Ok(found) => found,
                Err(Errno::NOENT | Errno::NOTDIR) => return Err(Errno::STALE.into()),
                Err(e) => return Err(e.into()),
            };
            let stat = stat_fd(&found)?;
            if FileId::of(&stat) != inode.id || kind(&stat) != inode.kind {
                return Err(Errno::STALE.into());
            }
            self.make_room()?;
            fd = self.keep(node, found);
        }
        Ok(fd)
    }

    /// Whether `node` is `above`, or has its place somewhere below it.
    fn is_below(&self, node: NodeId, above: NodeId) -> bool {
        let mut at = node;
        for _ in 0..MAX_DEPTH {
            if at == above {
                return true;
            }
            let place = self.nodes.get(&at).and_then(|inode| inode.place.as_ref());
            match place {
                Some(place) => at = place.parent,
                None => return false,
            }
        }
        true
    }

    /// A file is no longer at `place`.
    fn leave(&mut self, place: Option<Place>) {
        if let Some(Place { parent, .. }) = place {
            if let Some(above) = self.nodes.get_mut(&parent) {
                above.children = above.children.saturating_sub(1);
            }
            self.drop_unused(parent);
        }
    }

    /// Drops `node` if neither the guest nor another file needs it, and then the directory it was in likewise.
    fn drop_unused(&mut self, node: NodeId) {
        let mut at = node;
        while at != ROOT
            && self
                .nodes
                .get(&at)
                .is_some_and(|inode| inode.lookups == 0 && inode.children == 0)
        {
            let Some(inode) = self.nodes.remove(&at) else {
                return;
            };
            if self.ids.get(&inode.id) == Some(&at) {
                self.ids.remove(&inode.id);
            }
            self.descriptors -= usize::from(inode.fd.is_some());
            let Some(Place { parent, .. }) = inode.place else {
                return;
            };
            if let Some(above) = self.nodes.get_mut(&parent) {
                above.children = above.children.saturating_sub(1);
            }
            at = parent;
        }
    }
}
