//! Files inside a root filesystem, named the way a process inside it would name them. Absolute links, `..` and races with
//! a running container end inside the root: the kernel resolves every path with openat2(2), and nothing here ever follows
//! a link by itself without having the kernel confirm the result.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;

use crate::limits::MAX_PATH;

/// Links followed on one path before it counts as a loop: the kernel's own number.
const MAX_LINKS: usize = 40;

/// Times a look-up is repeated that the kernel gave up because something was being renamed.
const MAX_RETRIES: usize = 64;

/// A directory that stands for `/`.
#[derive(Debug)]
pub struct Root {
    fd: OwnedFd,
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<OwnedFd> for Root {
    /// The descriptor must be a directory's; one opened with `O_PATH` will do.
    fn from(fd: OwnedFd) -> Root {
        Root { fd }
    }
}

impl Root {
    /// Takes a directory of the host as the root.
    pub fn open(dir: &Path) -> io::Result<Root> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Root {
            fd: rustix::fs::open(dir, flags, Mode::empty())?,
        })
    }

    /// Opens a directory (`O_PATH`), following links as inside the root.
    pub fn open_dir(&self, path: &Path) -> io::Result<OwnedFd> {
        Ok(self.open_in(path, OFlags::PATH | OFlags::DIRECTORY)?)
    }

    /// Opens a regular file for reading, following links as inside the root. Never blocks, whatever is there; anything but a
    /// regular file is an error of kind [`io::ErrorKind::InvalidInput`].
    pub fn open_file(&self, path: &Path) -> io::Result<File> {
        // O_PATH first: opening a device or a FIFO for reading can block or act on it.
        let place = self.open_in(path, OFlags::PATH)?;
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&place)?.st_mode);
        if kind != FileType::RegularFile {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is not a regular file",
            ));
        }
        // Another file may stand there by this time, so the checked descriptor itself is opened again.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        Ok(rustix::fs::open(descriptor_path(&place), flags, Mode::empty())?.into())
    }

    /// The content of a regular file of at most `limit` bytes; `None` if there is no such file.
    pub fn read(&self, path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
        let file = match self.open_file(path) {
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                return Ok(None);
            }
            other => other?,
        };
        let mut content = Vec::new();
        file.take(limit.saturating_add(1))
            .read_to_end(&mut content)?;
        if content.len() as u64 > limit {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("it is larger than {limit} bytes"),
            ));
        }
        Ok(Some(content))
    }

    /// Makes a directory and its missing parents, following links as inside the root, and opens it (`O_PATH`). What exists
    /// stays as it is; what is made gets `mode` and the owner, whatever the umask.
    pub fn create_dir_all(
        &self,
        path: &Path,
        mode: u32,
        uid: u32,
        gid: u32,
    ) -> io::Result<OwnedFd> {
        let physical = self.resolve(path)?;
        let mut dir = self.open_physical(Path::new(""), OFlags::PATH | OFlags::DIRECTORY)?;
        for name in &physical {
            let name = Path::new(name);
            match rustix::fs::mkdirat(&dir, name, Mode::from_raw_mode(0o700)) {
                Ok(()) => {
                    rustix::fs::chownat(
                        &dir,
                        name,
                        owner(uid),
                        group(gid),
                        AtFlags::SYMLINK_NOFOLLOW,
                    )?;
                    let child = open_child(&dir, name, OFlags::RDONLY | OFlags::DIRECTORY)?;
                    rustix::fs::fchmod(&child, Mode::from_raw_mode(mode & 0o7777))?;
                }
                Err(Errno::EXIST) => {}
                Err(e) => return Err(e.into()),
            }
            dir = open_child(&dir, name, OFlags::PATH | OFlags::DIRECTORY)?;
        }
        Ok(dir)
    }

    /// Makes an empty regular file and its missing parents (mode 0755, same owner), unless something is there already, and
    /// opens what is there (`O_PATH`): the place to mount a single file on.
    pub fn create_file(&self, path: &Path, mode: u32, uid: u32, gid: u32) -> io::Result<OwnedFd> {
        let physical = self.resolve(path)?;
        let (Some(name), Some(parent)) = (physical.file_name(), physical.parent()) else {
            return Err(Errno::ISDIR.into());
        };
        let dir = self.create_dir_all(parent, 0o755, uid, gid)?;
        let name = Path::new(name);
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(&dir, name, flags, Mode::from_raw_mode(0o600)) {
            Ok(file) => {
                rustix::fs::fchown(&file, owner(uid), group(gid))?;
                rustix::fs::fchmod(&file, Mode::from_raw_mode(mode & 0o7777))?;
            }
            Err(Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
        Ok(open_child(&dir, name, OFlags::PATH)?)
    }

    /// The path without links and `..` that `path` stands for inside the root, relative to it; components that do not exist
    /// are kept. It is only a candidate: use it with [`Root::open_physical`], which fails if it has become untrue.
    pub(crate) fn resolve(&self, path: &Path) -> rustix::io::Result<PathBuf> {
        let mut todo: Vec<OsString> = Vec::new();
        push_reversed(&mut todo, path);
        let mut done = PathBuf::new();
        let mut links = 0;
        while let Some(name) = todo.pop() {
            if name == ".." {
                done.pop();
                continue;
            }
            done.push(&name);
            if done.as_os_str().len() > MAX_PATH {
                return Err(Errno::NAMETOOLONG);
            }
            let Some(target) = self.link_target(&done)? else {
                continue;
            };
            links += 1;
            if links > MAX_LINKS {
                return Err(Errno::LOOP);
            }
            if target.has_root() {
                done.clear();
            } else {
                done.pop();
            }
            push_reversed(&mut todo, &target);
        }
        Ok(done)
    }

    /// Opens a path without links, relative to the root; empty means the root itself.
    pub(crate) fn open_physical(&self, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        self.openat2(
            path,
            flags | OFlags::NOFOLLOW,
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
        )
    }

    fn open_in(&self, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        self.openat2(
            path,
            flags,
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        )
    }

    fn openat2(
        &self,
        path: &Path,
        flags: OFlags,
        resolve: ResolveFlags,
    ) -> rustix::io::Result<OwnedFd> {
        let mut tries = 0;
        loop {
            match rustix::fs::openat2(
                &self.fd,
                path,
                flags | OFlags::CLOEXEC,
                Mode::empty(),
                resolve,
            ) {
                Err(Errno::AGAIN | Errno::INTR) if tries < MAX_RETRIES => tries += 1,
                other => return other,
            }
        }
    }

    /// What the link at a physical path points to; `None` if there is no link.
    fn link_target(&self, path: &Path) -> rustix::io::Result<Option<PathBuf>> {
        let place = match self.open_physical(path, OFlags::PATH) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            other => other?,
        };
        if FileType::from_raw_mode(rustix::fs::fstat(&place)?.st_mode) != FileType::Symlink {
            return Ok(None);
        }
        let target = rustix::fs::readlinkat(&place, "", Vec::new())?;
        Ok(Some(OsString::from_vec(target.into_bytes()).into()))
    }
}

/// A name through which the kernel finds what a descriptor stands for, even one opened with `O_PATH`.
pub(crate) fn descriptor_path(fd: impl AsFd) -> PathBuf {
    use std::os::fd::AsRawFd;
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

pub(crate) fn owner(uid: u32) -> Option<Uid> {
    Some(Uid::from_raw(uid))
}

pub(crate) fn group(gid: u32) -> Option<Gid> {
    Some(Gid::from_raw(gid))
}

/// Opens one name in a directory, never through a link.
pub(crate) fn open_child(
    dir: impl AsFd,
    name: &Path,
    flags: OFlags,
) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat(
        dir,
        name,
        flags | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

fn push_reversed(stack: &mut Vec<OsString>, path: &Path) {
    let names = path.components().filter_map(|c| match c {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    });
    let from = stack.len();
    stack.extend(names);
    stack[from..].reverse();
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    struct Case {
        _dir: tempfile::TempDir,
        outside: PathBuf,
        inside: PathBuf,
        root: Root,
    }

    fn case() -> Case {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("root"), dir.path().join("outside"));
        fs::create_dir_all(inside.join("etc")).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("secret"), "secret").unwrap();
        fs::write(inside.join("etc/passwd"), "inside").unwrap();
        let root = Root::open(&inside).unwrap();
        Case {
            _dir: dir,
            outside,
            inside,
            root,
        }
    }

    #[test]
    fn absolute_links_and_dot_dot_stay_inside() {
        let c = case();
        symlink("/etc/passwd", c.inside.join("absolute")).unwrap();
        symlink("../../../../etc/passwd", c.inside.join("up")).unwrap();
        symlink(c.outside.join("secret"), c.inside.join("out")).unwrap();
        for path in [
            "absolute",
            "up",
            "/up",
            "../../etc/passwd",
            "etc/../../etc/passwd",
        ] {
            assert_eq!(
                c.root.read(Path::new(path), 100).unwrap().as_deref(),
                Some(&b"inside"[..]),
                "{path}"
            );
        }
        assert_eq!(c.root.read(Path::new("out"), 100).unwrap(), None);
    }

    #[test]
    fn what_is_no_regular_file_is_not_opened() {
        let c = case();
        rustix::fs::mkfifoat(&c.root, "fifo", Mode::from_raw_mode(0o600)).unwrap();
        symlink("fifo", c.inside.join("link")).unwrap();
        for path in ["fifo", "link", "etc"] {
            let error = c.root.open_file(Path::new(path)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{path}");
        }
    }

    #[test]
    fn a_file_larger_than_the_limit_is_refused_without_reading_it_all() {
        let c = case();
        File::create(c.inside.join("huge"))
            .unwrap()
            .set_len(1 << 40)
            .unwrap();
        let error = c.root.read(Path::new("huge"), 4096).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
    }

    #[test]
    fn directories_are_made_through_links_inside_with_mode_and_owner() {
        let c = case();
        symlink("/usr/lib", c.inside.join("lib")).unwrap();
        c.root
            .create_dir_all(Path::new("/lib/a/b"), 0o1777, 5, 6)
            .unwrap();
        let made = fs::metadata(c.inside.join("usr/lib/a/b")).unwrap();
        assert_eq!(
            (made.mode() & 0o7777, made.uid(), made.gid()),
            (0o1777, 5, 6)
        );
        assert!(
            fs::symlink_metadata(c.inside.join("lib"))
                .unwrap()
                .is_symlink()
        );
    }

    #[test]
    fn a_directory_that_exists_keeps_its_mode() {
        let c = case();
        fs::set_permissions(c.inside.join("etc"), fs::Permissions::from_mode(0o711)).unwrap();
        c.root
            .create_dir_all(Path::new("etc"), 0o755, 0, 0)
            .unwrap();
        assert_eq!(
            fs::metadata(c.inside.join("etc")).unwrap().mode() & 0o7777,
            0o711
        );
    }

    #[test]
    fn nothing_is_made_outside() {
        let c = case();
        symlink(&c.outside, c.inside.join("out")).unwrap();
        symlink("../../outside", c.inside.join("up")).unwrap();
        for path in ["out/x", "up/x", "../outside/x"] {
            c.root.create_dir_all(Path::new(path), 0o755, 0, 0).unwrap();
            c.root
                .create_file(&Path::new(path).join("file"), 0o644, 0, 0)
                .unwrap();
        }
        assert_eq!(fs::read_dir(&c.outside).unwrap().count(), 1);
    }

    #[test]
    fn a_loop_of_links_is_an_error() {
        let c = case();
        symlink("b", c.inside.join("a")).unwrap();
        symlink("a", c.inside.join("b")).unwrap();
        let error = c
            .root
            .create_dir_all(Path::new("a/x"), 0o755, 0, 0)
            .unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::LOOP.raw_os_error()));
    }

    #[test]
    fn a_directory_below_a_file_is_an_error() {
        let c = case();
        assert!(
            c.root
                .create_dir_all(Path::new("etc/passwd/x"), 0o755, 0, 0)
                .is_err()
        );
    }

    #[test]
    fn a_file_is_made_once_and_then_left_alone() {
        let c = case();
        c.root
            .create_file(Path::new("run/x/file"), 0o640, 1, 2)
            .unwrap();
        let made = fs::metadata(c.inside.join("run/x/file")).unwrap();
        assert_eq!(
            (made.mode() & 0o7777, made.uid(), made.gid()),
            (0o640, 1, 2)
        );
        c.root
            .create_file(Path::new("etc/passwd"), 0o640, 1, 2)
            .unwrap();
        assert_eq!(fs::read(c.inside.join("etc/passwd")).unwrap(), b"inside");
        assert!(c.root.create_file(Path::new("/"), 0o644, 0, 0).is_err());
    }
}
