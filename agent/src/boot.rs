//! Turns a freshly booted kernel with an initramfs into a guest that can run containers. Does what containers and the
//! first call need and no more: every mount is time before the container's first instruction.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use cloison_agent_api::{SHARED_DIR, SHARED_TAG};
use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, setrlimit};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{chdir, chroot};

use crate::cgroup;
use crate::dirs;
use crate::sys;

/// Most open files of the agent and of a container whose spec sets no limit: the kernel's default ceiling
/// (fs.nr_open).
const MAX_FILES: u64 = 1 << 20;

/// How far ahead of a reader the kernel reads in the shared directory, KiB: what one request can have room for.
const READ_AHEAD_KIB: &str = "1024";

/// An empty directory of the initramfs.
const NEW_ROOT: &str = "/root";

/// How long the guest has been up, by CLOCK_BOOTTIME, which its kernel starts early in its boot; nothing on a kernel without it.
pub fn uptime() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

/// What could not be done at boot.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("leaving the initial root file system")]
    Root(#[source] io::Error),
    #[error("mounting {kind} on {target}")]
    Mount {
        kind: &'static str,
        target: &'static str,
        source: io::Error,
    },
    #[error("setting up {path}")]
    File { path: PathBuf, source: io::Error },
    #[error("setting the limit of open files")]
    Limit(#[source] io::Error),
    #[error("setting the agent's scheduling policy")]
    Policy(#[source] io::Error),
    #[error("bringing up the loopback interface")]
    Loopback(#[source] io::Error),
}

struct Entry {
    kind: &'static str,
    target: &'static str,
    flags: MsFlags,
    options: Option<&'static str>,
}

const NONE: MsFlags = MsFlags::empty();
const PLAIN: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);
const NO_SUID: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC);

const fn entry(
    kind: &'static str,
    target: &'static str,
    flags: MsFlags,
    options: Option<&'static str>,
) -> Entry {
    Entry {
        kind,
        target,
        flags,
        options,
    }
}

/// In this order. Targets below a mount made here are made too.
const MOUNTS: [Entry; 8] = [
    entry("proc", "/proc", PLAIN, None),
    entry("sysfs", "/sys", PLAIN, None),
    entry("cgroup2", dirs::CGROUPS, PLAIN, None),
    entry("devtmpfs", "/dev", MsFlags::MS_NOSUID, Some("mode=0755")),
    entry(
        "devpts",
        "/dev/pts",
        NO_SUID,
        Some("mode=0620,ptmxmode=0666,gid=5"),
    ),
    entry("tmpfs", "/dev/shm", PLAIN, Some("mode=1777")),
    entry("mqueue", "/dev/mqueue", PLAIN, None),
    entry("tmpfs", "/run", NONE, Some("mode=0755")),
];

const DEV_LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Everything between the kernel and the first call. For PID 1 of a guest only.
pub fn prepare() -> Result<(), BootError> {
    leave_initial_root().map_err(BootError::Root)?;
    for entry in &MOUNTS {
        mount_entry(entry)?;
    }
    for (target, link) in DEV_LINKS {
        symlink(target, link)
            .or_else(exists)
            .map_err(|source| file(link, source))?;
    }
    cgroup::enable_controllers(Path::new(dirs::CGROUPS))
        .map_err(|source| file(dirs::CGROUPS, source))?;
    setrlimit(Resource::RLIMIT_NOFILE, MAX_FILES, MAX_FILES)
        .map_err(|errno| BootError::Limit(errno.into()))?;
    // A container that writes is not interrupted for each piece the agent could carry away: it carries more at once.
    sys::set_policy(sys::Policy::Batch).map_err(BootError::Policy)?;
    sys::loopback_up().map_err(BootError::Loopback)
}

/// Mounts the directory the host shares. A VM may have none; a container that needs it then fails with its path.
pub fn mount_shared() -> Result<(), BootError> {
    fs::create_dir_all(SHARED_DIR).map_err(|source| file(SHARED_DIR, source))?;
    mount(
        Some(SHARED_TAG),
        SHARED_DIR,
        Some("virtiofs"),
        NONE,
        None::<&str>,
    )
    .map_err(|errno| BootError::Mount {
        kind: "virtiofs",
        target: SHARED_DIR,
        source: errno.into(),
    })?;
    read_ahead().map_err(|source| file(SHARED_DIR, source))
}

/// Has the kernel read further ahead in the shared directory. It begins with what suits disks, 128 KiB, and asks the host, which has the
/// file in its memory as a rule, as much more often; each time the guest is left and entered again.
fn read_ahead() -> io::Result<()> {
    let device = fs::metadata(SHARED_DIR)?.dev();
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let setting = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    fs::write(setting, READ_AHEAD_KIB)
}

/// pivot_root(2), which every container does, refuses the initial ramfs. A bind mount of it, moved onto the root, is an
/// ordinary mount with the same files, and nothing is copied.
fn leave_initial_root() -> io::Result<()> {
    mount(
        Some("/"),
        NEW_ROOT,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )?;
    chdir(NEW_ROOT)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    chroot(".")?;
    chdir("/")?;
    Ok(())
}

fn mount_entry(entry: &Entry) -> Result<(), BootError> {
    let wrap = |source| BootError::Mount {
        kind: entry.kind,
        target: entry.target,
        source,
    };
    let options = (
        Some(entry.kind),
        entry.target,
        Some(entry.kind),
        entry.flags,
        entry.options,
    );
    let (source, target, kind, flags, data) = options;
    match mount(source, target, kind, flags, data) {
        Err(nix::errno::Errno::ENOENT) => {
            fs::create_dir(target).map_err(wrap)?;
            mount(source, target, kind, flags, data).map_err(|errno| wrap(errno.into()))
        }
        result => result.map_err(|errno| wrap(errno.into())),
    }
}

fn exists(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::AlreadyExists => Ok(()),
        _ => Err(error),
    }
}

fn file(path: impl AsRef<Path>, source: io::Error) -> BootError {
    BootError::File {
        path: path.as_ref().to_owned(),
        source,
    }
}
