//! Reading directories. Entries go straight from the host's answer into the guest's buffer; a position in a directory is
//! whatever number the host's file system gives.

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use fuse_backend_rs::api::filesystem::{DirEntry, Entry};
use rustix::fs::{FileType, Mode, RawDir, SeekFrom, openat, seek};

use super::file::PLACE;
use super::handles::HandleId;
use super::inodes::NodeId;
use super::names::Name;
use super::tree::Tree;

/// Least room for the host's answer, in bytes: more than one entry of the longest name takes.
const LEAST_BUFFER: usize = 1024;
/// Most room for the host's answer, in bytes.
const MOST_BUFFER: usize = 32 << 10;
/// About how much larger an entry is in an answer to READDIRPLUS than as the host gives it.
const PLUS_FACTOR: usize = 4;

/// Puts an entry into the guest's buffer; answers 0 when there is no room for it.
pub type Add<'a> = &'a mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>;
/// As [`Add`], with what the guest is told of the file.
pub type AddPlus<'a> = &'a mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>;

impl Tree {
    /// Lists the directory `handle` from `offset` on, until `add` has no more room.
    ///
    /// # Errors
    /// Those of lseek(2) and getdents64(2), when nothing has been added.
    pub fn readdir(
        &mut self,
        node: NodeId,
        handle: HandleId,
        size: u32,
        offset: u64,
        add: Add<'_>,
    ) -> io::Result<()> {
        let dir = self.handles.dir(handle, node)?;
        each(&dir, size as usize, offset, &mut |entry, _| add(entry))
    }

    /// As [`Tree::readdir`], telling the guest of each file. If that cannot be done, or if the guest knows so many already
    /// that it should not be told of more, it gets the bare name (a node number of 0) and may look it up itself.
    ///
    /// # Errors
    /// As for [`Tree::readdir`].
    pub fn readdirplus(
        &mut self,
        node: NodeId,
        handle: HandleId,
        size: u32,
        offset: u64,
        add: AddPlus<'_>,
    ) -> io::Result<()> {
        let dir = self.handles.dir(handle, node)?;
        each(
            &dir,
            size as usize / PLUS_FACTOR,
            offset,
            &mut |entry, name| {
                let told = self.tell(&dir, node, name).unwrap_or_default();
                let added = add(entry, told);
                if told.inode != 0 && !matches!(added, Ok(1..)) {
                    self.forget(told.inode, 1);
                }
                added
            },
        )
    }

    /// What the guest is told of `name` in the open directory `dir`, if anything.
    fn tell(&mut self, dir: &Arc<OwnedFd>, node: NodeId, name: &CStr) -> Option<Entry> {
        let name = Name::new(name).ok()?;
        if self.is_crowded() {
            return None;
        }
        let found = openat(dir, name.as_c_str(), PLACE, Mode::empty()).ok()?;
        self.enter(node, name, found).ok()
    }
}

/// Calls `add` with the entries of `dir` from `offset` on, until it answers that there is no more room.
fn each(
    dir: &Arc<OwnedFd>,
    room: usize,
    offset: u64,
    add: &mut dyn FnMut(DirEntry<'_>, &CStr) -> io::Result<usize>,
) -> io::Result<()> {
    let mut buffer = vec![MaybeUninit::uninit(); room.clamp(LEAST_BUFFER, MOST_BUFFER)];
    seek(dir, SeekFrom::Start(offset))?;
    let mut entries = RawDir::new(dir, &mut buffer);
    let mut added_any = false;
    while let Some(entry) = entries.next() {
        let added = entry.map_err(io::Error::from).and_then(|entry| {
            let name = entry.file_name();
            let type_ = match entry.file_type() {
                FileType::Unknown => 0,
                // `IFTODT` (dirent.h): the type's bits of a mode, moved down.
                kind => kind.as_raw_mode() >> 12,
            };
            let dirent = DirEntry {
                ino: entry.ino(),
                offset: entry.next_entry_cookie(),
                type_,
                name: name.to_bytes(),
            };
            add(dirent, name)
        });
        match added {
            Ok(0) => break,
            Ok(_) => added_any = true,
            // An answer is either entries or an error; the guest gets the entries, and the error when it asks for more.
            Err(_) if added_any => break,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
