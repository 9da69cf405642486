//! Files and directories the guest has open. A handle is good only together with the inode it was opened on, and numbers
//! are never used again.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;

use super::inodes::NodeId;

/// Number by which the guest names an open file or directory.
pub type HandleId = u64;

/// Something open.
#[derive(Debug)]
pub enum Open {
    /// A regular file.
    File {
        /// Open for what the guest asked.
        file: File,
        /// Whether O_APPEND is set on `file`.
        append: bool,
    },
    /// A directory. Shared, because entries are looked up while it is read.
    Dir(Arc<OwnedFd>),
}

impl AsFd for Open {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::File { file, .. } => file.as_fd(),
            Self::Dir(fd) => fd.as_fd(),
        }
    }
}

/// All that is open.
#[derive(Debug)]
pub struct Handles {
    open: HashMap<HandleId, (NodeId, Open)>,
    next: HandleId,
    limit: usize,
}

impl Handles {
    /// Nothing open, and never more than `limit`.
    pub fn new(limit: usize) -> Self {
        Self {
            open: HashMap::new(),
            next: 1,
            limit,
        }
    }

    /// How many are open.
    pub fn len(&self) -> usize {
        self.open.len()
    }

    /// Whether there is room for another.
    ///
    /// # Errors
    /// ENFILE when there is not. Asked before the host is, so that a refused open has no effect.
    pub fn room(&self) -> io::Result<()> {
        if self.open.len() < self.limit {
            Ok(())
        } else {
            Err(Errno::NFILE.into())
        }
    }

    /// Keeps something opened on `node`.
    ///
    /// # Errors
    /// As for [`Handles::room`].
    pub fn insert(&mut self, node: NodeId, open: Open) -> io::Result<HandleId> {
        self.room()?;
        let id = self.next;
        self.next += 1;
        self.open.insert(id, (node, open));
        Ok(id)
    }

    /// What `handle` is.
    ///
    /// # Errors
    /// EBADF when it is not open, or not on `node`.
    pub fn get(&mut self, handle: HandleId, node: NodeId) -> io::Result<&mut Open> {
        match self.open.get_mut(&handle) {
            Some((on, open)) if *on == node => Ok(open),
            _ => Err(Errno::BADF.into()),
        }
    }

    /// The regular file that `handle` is, and whether it is in append mode.
    ///
    /// # Errors
    /// As for [`Handles::get`]; EBADF as well for a directory.
    pub fn file(&mut self, handle: HandleId, node: NodeId) -> io::Result<(&mut File, &mut bool)> {
        match self.get(handle, node)? {
            Open::File { file, append } => Ok((file, append)),
            Open::Dir(_) => Err(Errno::BADF.into()),
        }
    }

    /// The directory that `handle` is.
    ///
    /// # Errors
    /// As for [`Handles::get`]; ENOTDIR for a file.
    pub fn dir(&mut self, handle: HandleId, node: NodeId) -> io::Result<Arc<OwnedFd>> {
        match self.get(handle, node)? {
            Open::Dir(fd) => Ok(Arc::clone(fd)),
            Open::File { .. } => Err(Errno::NOTDIR.into()),
        }
    }

    /// Closes `handle`.
    ///
    /// # Errors
    /// As for [`Handles::get`].
    pub fn remove(&mut self, handle: HandleId, node: NodeId) -> io::Result<()> {
        self.get(handle, node)?;
        self.open.remove(&handle);
        Ok(())
    }

    /// Closes everything.
    pub fn clear(&mut self) {
        self.open = HashMap::new();
    }
}
