//! Network namespaces: opening and checking one, making one for a sandbox, and doing something inside one. A thread belongs to
//! a namespace, so what is done inside one is done on a thread of its own; the caller's never changes.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{fstat, stat};
use nix::sys::statfs::fstatfs;

use crate::{Error, Result, sys};

/// `f_type` of a file that stands for a namespace (Linux's include/uapi/linux/magic.h).
const NSFS_MAGIC: i64 = 0x6e73_6673;
/// The calling thread's own namespace.
const OWN: &str = "/proc/thread-self/ns/net";

/// A network namespace, kept alive by being held.
#[derive(Debug, Clone)]
pub struct Namespace(Arc<OwnedFd>);

impl Namespace {
    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// When `/proc` is not there.
    pub fn current() -> Result<Self> {
        let file = File::open(OWN).map_err(Error::system("open the thread's network namespace"))?;
        Ok(Self(Arc::new(file.into())))
    }

    /// The namespace that `path` names, as `ip netns add` or an engine left it, or as `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// When there is no such file, and [`Error::NotANamespace`].
    pub fn open(path: &Path) -> Result<Self> {
        let doing = || format!("open the network namespace {}", path.display());
        // A FIFO or a device in its place must not make this wait.
        let file = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(Error::system(doing()))?;
        let magic = fstatfs(&file).map_err(Error::errno(doing()))?;
        let is_namespace = magic.filesystem_type().0 == NSFS_MAGIC
            && sys::namespace_kind(&file).is_ok_and(|kind| kind == libc::CLONE_NEWNET);
        if !is_namespace {
            return Err(Error::NotANamespace(path.to_owned()));
        }
        Ok(Self(Arc::new(file.into())))
    }

    /// A fresh namespace that ends when nobody holds it or lives in it. Its loopback interface is down.
    #[cfg(test)]
    pub(crate) fn anonymous() -> Result<Self> {
        on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).map_err(Error::errno("make a network namespace"))?;
            Self::current()
        })
    }

    /// A fresh namespace that stays, mounted at `path`, until [`Namespace::remove`].
    ///
    /// # Errors
    /// When `path` exists, or the caller may not make or mount one.
    pub fn persistent(path: &Path) -> Result<Self> {
        let doing = || format!("make the network namespace {}", path.display());
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(Error::system(doing()))?;
        }
        File::create_new(path).map_err(Error::system(doing()))?;
        let made = on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).map_err(Error::errno(doing()))?;
            mount(
                Some(OWN),
                path,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )
            .map_err(Error::errno(doing()))?;
            Self::current()
        });
        if made.is_err() {
            let _ = fs::remove_file(path);
        }
        made
    }

    /// Takes away what [`Namespace::persistent`] left at `path`, in whatever state. It is no error when nothing is there.
    ///
    /// # Errors
    /// When it cannot be unmounted or removed.
    pub fn remove(path: &Path) -> Result<()> {
        let doing = || format!("remove the network namespace {}", path.display());
        loop {
            match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                Ok(()) => {}
                Err(Errno::EINVAL | Errno::ENOENT) => break,
                Err(errno) => return Err(Error::errno(doing())(errno)),
            }
        }
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::system(doing())(e)),
            _ => Ok(()),
        }
    }

    /// Calls `f` inside the namespace, on a thread of its own unless the calling one is there, and waits for it.
    ///
    /// # Errors
    /// When the thread cannot enter the namespace.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        // A thread takes longer than most of what is done on it.
        if self.is_the_callers() {
            return Ok(f());
        }
        on_a_thread(|| {
            setns(&self.0, CloneFlags::CLONE_NEWNET)
                .map_err(Error::errno("enter a network namespace"))?;
            Ok(f())
        })
    }

    fn is_the_callers(&self) -> bool {
        let here = stat(OWN).map(|file| (file.st_dev, file.st_ino));
        let there = fstat(&*self.0).map(|file| (file.st_dev, file.st_ino));
        here.is_ok() && here == there
    }

    /// [`Namespace::run`] for what takes its time: the caller's runtime goes on meanwhile.
    pub(crate) async fn run_long<T: Send + 'static>(
        &self,
        f: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let namespace = self.clone();
        tokio::task::spawn_blocking(move || namespace.run(f)?)
            .await
            .map_err(|e| Error::system("finish work in a network namespace")(e.into()))?
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A thread changes its namespaces for good, so it is never one of anybody's pool.
fn on_a_thread<T: Send>(f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, f)
            .map_err(Error::system("start a thread"))?;
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn inode(namespace: &Namespace) -> u64 {
        File::from(namespace.as_fd().try_clone_to_owned().unwrap())
            .metadata()
            .unwrap()
            .ino()
    }

    #[test]
    fn what_is_done_inside_a_namespace_leaves_the_caller_where_it_was() {
        let before = inode(&Namespace::current().unwrap());
        let other = Namespace::anonymous().unwrap();
        let inside = other.run(|| inode(&Namespace::current().unwrap())).unwrap();
        assert_eq!(inside, inode(&other));
        assert_ne!(inside, before);
        assert_eq!(inode(&Namespace::current().unwrap()), before);
    }

    #[test]
    fn a_path_that_is_no_network_namespace_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        File::create(&file).unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
        for path in [
            file.as_path(),
            &fifo,
            dir.path(),
            Path::new("/dev/null"),
            Path::new("/proc/self/ns/mnt"),
        ] {
            let error = Namespace::open(path).unwrap_err().to_string();
            assert_eq!(
                error,
                format!("{} is not a network namespace", path.display())
            );
        }
        assert!(Namespace::open(&dir.path().join("missing")).is_err());
        Namespace::open(Path::new("/proc/self/ns/net")).unwrap();
    }

    #[test]
    fn a_persistent_namespace_stays_until_it_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("netns/a");
        let made = inode(&Namespace::persistent(&path).unwrap());
        assert_eq!(inode(&Namespace::open(&path).unwrap()), made);
        assert!(Namespace::persistent(&path).is_err());
        Namespace::remove(&path).unwrap();
        assert!(!path.exists());
        Namespace::remove(&path).unwrap();
    }

    #[test]
    fn a_namespace_whose_mount_never_came_is_removed_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        File::create(&path).unwrap();
        Namespace::remove(&path).unwrap();
        assert!(!path.exists());
    }
}
