//! Extended attributes of regular files and directories, on descriptors opened for the purpose. The `*xattr` calls take a
//! path or a readable descriptor, and an absolute path may lead into the guest's own files once the process has the shared
//! directory for its root; so links, devices, FIFOs and sockets have no extended attributes here (of the useful ones,
//! `user.*` and ACLs do not exist on them anyway).

use std::ffi::CStr;
use std::io;
use std::os::fd::OwnedFd;

use fuse_backend_rs::api::filesystem::{GetxattrReply, ListxattrReply};
use rustix::buffer::spare_capacity;
use rustix::fs::{FileType, OFlags, XattrFlags, fgetxattr, flistxattr, fremovexattr, fsetxattr};
use rustix::io::Errno;

use super::file::stat_fd;
use super::inodes::NodeId;
use super::tree::Tree;

/// Largest value, and largest list of names (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX` in linux/limits.h).
const MOST_BYTES: usize = 1 << 16;

/// Namespaces and names a guest may write. The others (labels of the host's security modules, IMA and EVM signatures) mean
/// something to the host and nothing to the guest.
const WRITABLE: [&[u8]; 4] = [
    b"user.",
    b"trusted.",
    b"security.capability",
    b"system.posix_acl_",
];

impl Tree {
    /// Sets `name` of `node`.
    ///
    /// # Errors
    /// EOPNOTSUPP for what cannot have it; those of setxattr(2).
    pub fn setxattr(
        &mut self,
        node: NodeId,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        let file = self.attributed(node, Some(name))?;
        fsetxattr(&file, name, value, XattrFlags::from_bits_retain(flags))?;
        self.inodes.identify(node, &stat_fd(&file)?);
        Ok(())
    }

    /// The value of `name`, or its length when `size` is 0.
    ///
    /// # Errors
    /// ERANGE when it is longer than `size`; EOPNOTSUPP; those of getxattr(2).
    pub fn getxattr(&mut self, node: NodeId, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let file = self.attributed(node, None)?;
        let mut value = room(size);
        let length = fgetxattr(&file, name, spare_capacity(&mut value))?;
        match size {
            0 => Ok(GetxattrReply::Count(length as u32)),
            size if length > size as usize => Err(Errno::RANGE.into()),
            _ => Ok(GetxattrReply::Value(value)),
        }
    }

    /// All names, or their length when `size` is 0.
    ///
    /// # Errors
    /// ERANGE when they are longer than `size`; those of listxattr(2).
    pub fn listxattr(&mut self, node: NodeId, size: u32) -> io::Result<ListxattrReply> {
        let mut names = room(size);
        let length = match self.attributed(node, None) {
            Ok(file) => flistxattr(&file, spare_capacity(&mut names))?,
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => 0,
            Err(e) => return Err(e),
        };
        match size {
            0 => Ok(ListxattrReply::Count(length as u32)),
            size if length > size as usize => Err(Errno::RANGE.into()),
            _ => Ok(ListxattrReply::Names(names)),
        }
    }

    /// Removes `name` of `node`.
    ///
    /// # Errors
    /// EOPNOTSUPP for what cannot have it; those of removexattr(2).
    pub fn removexattr(&mut self, node: NodeId, name: &CStr) -> io::Result<()> {
        let file = self.attributed(node, Some(name))?;
        fremovexattr(&file, name)?;
        self.inodes.identify(node, &stat_fd(&file)?);
        Ok(())
    }

    /// `node`, open for its extended attributes; `written` is the one to be changed.
    fn attributed(&mut self, node: NodeId, written: Option<&CStr>) -> io::Result<OwnedFd> {
        if let Some(name) = written
            && !WRITABLE
                .iter()
                .any(|allowed| name.to_bytes().starts_with(allowed))
        {
            return Err(Errno::OPNOTSUPP.into());
        }
        let (fd, kind) = self.inodes.get(node)?;
        match kind {
            FileType::RegularFile => self.reopen(&fd, kind, OFlags::RDONLY),
            FileType::Directory => self.reopen(&fd, kind, OFlags::RDONLY | OFlags::DIRECTORY),
            _ => Err(Errno::OPNOTSUPP.into()),
        }
    }
}

/// Room for an answer of at most `size` bytes; for any, if it is only to be measured.
fn room(size: u32) -> Vec<u8> {
    Vec::with_capacity(match size as usize {
        0 => MOST_BYTES,
        size => size.min(MOST_BYTES),
    })
}
