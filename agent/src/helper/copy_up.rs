//! What a tmpfs covers, copied into it: with owners, modes, times, links and extended attributes. Runs in the container's process when
//! all is mounted. What is in the tmpfs by then is where others are mounted, and stays.

use std::collections::HashMap;
use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid,
    XattrFlags,
};
use rustix::io::Errno;

use crate::workload::CopyUp;

/// The most bytes of an extended attribute, and of all their names (xattr(7)).
const MAX_XATTR: usize = 64 << 10;

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);

/// The directory that is going to be covered; `None` if there is none. To be called while the container's root is where it is.
pub fn open(wanted: &CopyUp) -> io::Result<Option<OwnedFd>> {
    let root = rustix::fs::openat(CWD, &wanted.root, DIRECTORY, Mode::empty())?;
    let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    match rustix::fs::openat2(&root, &wanted.place, DIRECTORY, Mode::empty(), inside) {
        Ok(directory) => Ok(Some(directory)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Copies a directory, and all that is in it, into that at `place`.
pub fn copy(from: BorrowedFd<'_>, place: &Path) -> io::Result<()> {
    let to = rustix::fs::openat(CWD, place, DIRECTORY, Mode::empty())?;
    let device = rustix::fs::fstat(&to)?.st_dev;
    let mut copy = Copy {
        top: to.as_fd(),
        device,
        seen: HashMap::new(),
    };
    copy.directory(from, to.as_fd(), Path::new(""))
}

struct Copy<'a> {
    top: BorrowedFd<'a>,
    /// The file system's that is copied to.
    device: u64,
    /// Where a file with several names is by now, by its number in the source.
    seen: HashMap<(u64, u64), PathBuf>,
}

impl Copy<'_> {
    fn directory(
        &mut self,
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
        path: &Path,
    ) -> io::Result<()> {
        for entry in Dir::read_from(from)? {
            let entry = entry?;
            let name = entry.file_name();
            if [c".", c".."].contains(&name) {
                continue;
            }
            let below = path.join(OsStr::from_bytes(name.to_bytes()));
            self.entry(from, to, name, &below)?;
        }
        attributes(from, to)
    }

    fn entry(
        &mut self,
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
        name: &CStr,
        path: &Path,
    ) -> io::Result<()> {
        let found = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(found.st_mode);
        if kind == FileType::Directory {
            return self.below(from, to, name, path);
        }
        let number = (found.st_dev, found.st_ino);
        let made = match (self.seen.get(&number), kind) {
            (Some(other), _) => rustix::fs::linkat(self.top, other, to, name, AtFlags::empty()),
            (None, FileType::RegularFile) => return self.file(from, to, name, path, &found),
            (None, FileType::Symlink) => {
                let target = rustix::fs::readlinkat(from, name, Vec::new())?;
                rustix::fs::symlinkat(target, to, name)
            }
            (None, kind) => {
                let mode = Mode::from_raw_mode(found.st_mode);
                rustix::fs::mknodat(to, name, kind, mode, found.st_rdev)
            }
        };
        match made {
            // Something is mounted there.
            Err(Errno::EXIST) => return Ok(()),
            other => other?,
        }
        self.remember(&found, path);
        rustix::fs::chownat(
            to,
            name,
            Some(owner(&found)),
            Some(group(&found)),
            AtFlags::SYMLINK_NOFOLLOW,
        )?;
        if kind != FileType::Symlink {
            rustix::fs::chmodat(
                to,
                name,
                Mode::from_raw_mode(found.st_mode),
                AtFlags::empty(),
            )?;
        }
        rustix::fs::utimensat(to, name, &times(&found), AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(())
    }

    fn below(
        &mut self,
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
        name: &CStr,
        path: &Path,
    ) -> io::Result<()> {
        match rustix::fs::mkdirat(to, name, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        let flags = DIRECTORY | OFlags::NOFOLLOW;
        let to = match rustix::fs::openat(to, name, flags, Mode::empty()) {
            Ok(to) => to,
            Err(Errno::NOTDIR | Errno::LOOP) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        };
        if rustix::fs::fstat(&to)?.st_dev != self.device {
            return Ok(());
        }
        let from = rustix::fs::openat(from, name, flags, Mode::empty())?;
        self.directory(from.as_fd(), to.as_fd(), path)
    }

    fn file(
        &mut self,
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
        name: &CStr,
        path: &Path,
        found: &Stat,
    ) -> io::Result<()> {
        let new = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let to = match rustix::fs::openat(to, name, new, Mode::RUSR | Mode::WUSR) {
            Err(Errno::EXIST) => return Ok(()),
            other => other?,
        };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let from = rustix::fs::openat(from, name, flags, Mode::empty())?;
        let (mut from, mut to) = (File::from(from), File::from(to));
        io::copy(&mut from, &mut to)?;
        attributes(from.as_fd(), to.as_fd())?;
        self.remember(found, path);
        Ok(())
    }

    fn remember(&mut self, found: &Stat, path: &Path) {
        if found.st_nlink > 1 {
            self.seen
                .insert((found.st_dev, found.st_ino), path.to_owned());
        }
    }
}

/// In this order: a change of the owner takes away bits of the mode and capabilities, and everything changes times.
fn attributes(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let found = rustix::fs::fstat(from)?;
    rustix::fs::fchown(to, Some(owner(&found)), Some(group(&found)))?;
    rustix::fs::fchmod(to, Mode::from_raw_mode(found.st_mode))?;
    let mut names = vec![0; MAX_XATTR];
    let length = match rustix::fs::flistxattr(from, &mut names) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => 0,
        Err(errno) => return Err(errno.into()),
    };
    let mut value = vec![0; MAX_XATTR];
    for name in names[..length].split_inclusive(|byte| *byte == 0) {
        let name = CStr::from_bytes_with_nul(name).map_err(io::Error::other)?;
        let length = rustix::fs::fgetxattr(from, name, &mut value)?;
        match rustix::fs::fsetxattr(to, name, &value[..length], XattrFlags::empty()) {
            // One that means something to the other file system only.
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    rustix::fs::futimens(to, &times(&found))?;
    Ok(())
}

fn owner(found: &Stat) -> Uid {
    Uid::from_raw(found.st_uid)
}

fn group(found: &Stat) -> Gid {
    Gid::from_raw(found.st_gid)
}

fn times(found: &Stat) -> Timestamps {
    Timestamps {
        last_access: Timespec {
            tv_sec: found.st_atime,
            tv_nsec: found.st_atime_nsec.cast_signed(),
        },
        last_modification: Timespec {
            tv_sec: found.st_mtime,
            tv_nsec: found.st_mtime_nsec.cast_signed(),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn copied(from: &Path, to: &Path) -> io::Result<()> {
        copy(File::open(from)?.as_fd(), to)
    }

    #[test]
    fn all_of_a_tree_is_copied_and_what_is_there_stays() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (from, to) = (from.path(), to.path());
        fs::create_dir_all(from.join("a/b")).unwrap();
        fs::write(from.join("a/b/file"), "content").unwrap();
        fs::hard_link(from.join("a/b/file"), from.join("again")).unwrap();
        symlink("/nowhere", from.join("link")).unwrap();
        let place = from.join("a/b/file");
        rustix::fs::setxattr(&place, "user.x", b"y", XattrFlags::empty()).unwrap();
        fs::set_permissions(from.join("a/b/file"), fs::Permissions::from_mode(0o640)).unwrap();
        fs::set_permissions(from.join("a"), fs::Permissions::from_mode(0o1770)).unwrap();
        fs::set_permissions(from, fs::Permissions::from_mode(0o711)).unwrap();
        fs::write(from.join("there"), "image").unwrap();
        fs::write(to.join("there"), "mounted").unwrap();
        copied(from, to).unwrap();
        let look = |path: &str| {
            let found = |root: &Path| fs::symlink_metadata(root.join(path)).unwrap();
            let (old, new) = (found(from), found(to));
            assert_eq!(
                (
                    old.mode(),
                    old.uid(),
                    old.mtime(),
                    old.mtime_nsec(),
                    old.nlink()
                ),
                (
                    new.mode(),
                    new.uid(),
                    new.mtime(),
                    new.mtime_nsec(),
                    new.nlink()
                ),
                "{path}"
            );
            new.ino()
        };
        assert_eq!(look("a/b/file"), look("again"));
        let mut value = [0; 8];
        let length = rustix::fs::getxattr(to.join("again"), "user.x", &mut value).unwrap();
        assert_eq!(&value[..length], b"y");
        for path in ["", "a", "a/b"] {
            look(path);
        }
        assert_eq!(
            fs::read_link(to.join("link")).unwrap(),
            Path::new("/nowhere")
        );
        assert_eq!(fs::read_to_string(to.join("again")).unwrap(), "content");
        assert_eq!(fs::read_to_string(to.join("there")).unwrap(), "mounted");
    }

    #[test]
    fn what_is_covered_is_found_inside_the_root_or_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        fs::write(root.path().join("etc/own"), "").unwrap();
        fs::write(root.path().join("file"), "").unwrap();
        symlink("/etc", root.path().join("link")).unwrap();
        let names = |place: &str| {
            let wanted = CopyUp {
                root: root.path().to_owned(),
                place: place.into(),
            };
            let directory = open(&wanted).unwrap()?;
            let entries = Dir::read_from(&directory).unwrap();
            let names = entries.map(|e| e.unwrap().file_name().to_str().unwrap().to_owned());
            Some(
                names
                    .filter(|name| !name.starts_with('.'))
                    .collect::<Vec<_>>(),
            )
        };
        for place in ["/etc", "/link", "/../../etc", "etc"] {
            assert_eq!(names(place), Some(vec!["own".to_owned()]), "{place}");
        }
        assert_eq!((names("/missing"), names("/file")), (None, None));
    }
}
