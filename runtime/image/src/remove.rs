//! Removal of directory trees that somebody hostile has made: of any depth, with constant memory and a handful of
//! descriptors. It never follows a link and never enters another mount.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;

/// Removes a file or a directory tree; nothing being there is no error. Nothing else may be writing to the tree. A mount point
/// inside it is an error of kind [`io::ErrorKind::ResourceBusy`], and what is mounted there is not touched.
///
/// Directories inside are moved up to the top before they are emptied, so that neither depth nor path length has a limit.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not the name of a file",
        ));
    };
    let parent = if parent.as_os_str().is_empty() {
        Path::new(".")
    } else {
        parent
    };
    match rustix::fs::open(
        parent,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    ) {
        Err(Errno::NOENT) => Ok(()),
        other => Ok(remove_at(other?, Path::new(name))?),
    }
}

/// [`remove_tree`] for a name in an open directory.
pub(crate) fn remove_at(parent: impl AsFd, name: &Path) -> rustix::io::Result<()> {
    if remove_simple(&parent, name)? {
        return Ok(());
    }
    let top = open_dir(&parent, name)?;
    let mut moved = 0;
    while empty(&top, &top, &mut moved)? {}
    rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR)
}

/// Empties `dir`, which is `top` or a directory in it. Directories that are not empty themselves are emptied if they are in
/// `top`, and moved there if they are not. True if there was anything.
fn empty(dir: &OwnedFd, top: &OwnedFd, moved: &mut u64) -> rustix::io::Result<bool> {
    let is_top = std::ptr::eq(dir, top);
    let mut any = false;
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = Path::new(OsStr::from_bytes(entry.file_name().to_bytes()));
        if matches!(entry.file_name().to_bytes(), b"." | b"..") {
            continue;
        }
        any = true;
        if remove_simple(dir, name)? {
            continue;
        }
        if is_top {
            let child = open_dir(dir, name)?;
            while empty(&child, top, moved)? {}
            rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR)?;
        } else {
            move_up(dir, name, top, moved)?;
        }
    }
    Ok(any)
}

/// Removes what is no directory, or an empty one. False if it is a directory with something in it.
fn remove_simple(dir: impl AsFd, name: &Path) -> rustix::io::Result<bool> {
    match rustix::fs::unlinkat(&dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(true),
        // EISDIR is what Linux says of a directory; POSIX says EPERM.
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(e) => return Err(e),
    }
    match rustix::fs::unlinkat(&dir, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(false),
        Err(e) => Err(e),
    }
}

fn move_up(dir: &OwnedFd, name: &Path, top: &OwnedFd, moved: &mut u64) -> rustix::io::Result<()> {
    loop {
        *moved += 1;
        match rustix::fs::renameat_with(dir, name, top, moved.to_string(), RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => {}
            other => return other,
        }
    }
}

fn open_dir(parent: impl AsFd, name: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    rustix::fs::openat2(parent, name, flags, Mode::empty(), within)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_tree_goes_and_what_its_links_point_to_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, kept) = (dir.path().join("tree"), dir.path().join("kept"));
        fs::create_dir_all(tree.join("a/b/c")).unwrap();
        fs::create_dir_all(tree.join("1/2/3")).unwrap();
        fs::create_dir_all(tree.join("2")).unwrap();
        fs::create_dir(&kept).unwrap();
        fs::write(kept.join("file"), "x").unwrap();
        fs::write(tree.join("a/b/file"), "x").unwrap();
        symlink(&kept, tree.join("a/link")).unwrap();
        symlink(&kept, tree.join("link")).unwrap();
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
        assert_eq!(fs::read(kept.join("file")).unwrap(), b"x");
    }

    #[test]
    fn a_link_or_a_file_is_removed_itself_and_nothing_is_fine() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "x").unwrap();
        symlink("file", dir.path().join("link")).unwrap();
        for name in ["link", "nothing", "nothing/below"] {
            remove_tree(&dir.path().join(name)).unwrap();
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        remove_tree(&dir.path().join("file")).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn depth_has_no_limit() {
        let dir = tempfile::tempdir().unwrap();
        let mut at =
            rustix::fs::open(dir.path(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let name = Path::new("a-name-long-enough-to-exceed-any-limit-on-paths-soon");
        for _ in 0..1500 {
            rustix::fs::mkdirat(&at, name, Mode::from_raw_mode(0o755)).unwrap();
            at = open_dir(&at, name).unwrap();
        }
        drop(at);
        remove_tree(&dir.path().join(name)).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
