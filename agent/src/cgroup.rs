//! One container's cgroup, read and driven through its files (Linux, Documentation/admin-guide/cgroup-v2.rst). The
//! container may make cgroups below its own; every walk over them is bounded. Limits are libcontainer's to write.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::uio::pread;
use tokio::io::Interest;

use crate::{dirs, sys};

/// Most cgroups of one container that are looked at.
const MAX_CGROUPS: usize = 4096;

/// Most processes of one container that are listed.
pub const MAX_PROCESSES: usize = 65536;

/// Longest file of cgroupfs that is read, bytes.
const MAX_FILE: u64 = 4 << 20;

/// What a container uses.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub cpu_ns: u64,
    pub cpu_user_ns: u64,
    pub cpu_system_ns: u64,
    pub memory_bytes: u64,
    /// 0: no limit.
    pub memory_limit_bytes: u64,
    pub memory_inactive_file_bytes: u64,
    pub pids: u64,
    pub oom_kills: u64,
}

/// A container's cgroup.
#[derive(Debug)]
pub struct Cgroup {
    /// Path within the hierarchy.
    pub path: PathBuf,
    directory: PathBuf,
    /// The program that decides on devices.
    filter: Mutex<Option<Arc<OwnedFd>>>,
}

/// Lets the cgroups below `directory` have every controller that it has.
pub fn enable_controllers(directory: &Path) -> io::Result<()> {
    let names = fs::read_to_string(directory.join("cgroup.controllers"))?;
    let request: Vec<String> = names
        .split_whitespace()
        .map(|name| format!("+{name}"))
        .collect();
    fs::write(directory.join("cgroup.subtree_control"), request.join(" "))
}

/// Makes a cgroup that others will be below, and those above it, where they are missing.
pub fn create_parent(path: &Path) -> io::Result<()> {
    let mut directory = PathBuf::from(dirs::CGROUPS);
    for name in path.components().skip_while(|c| *c == Component::RootDir) {
        directory.push(name);
        match fs::create_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            result => {
                result?;
                enable_controllers(&directory)?;
            }
        }
    }
    Ok(())
}

impl Cgroup {
    /// `path` is absolute within the hierarchy and without `..`.
    pub fn new(path: PathBuf) -> Self {
        let below = path.strip_prefix("/").unwrap_or(&path);
        let directory = Path::new(dirs::CGROUPS).join(below);
        Self {
            path,
            directory,
            filter: Mutex::default(),
        }
    }

    /// Makes it, and those above it that are missing. It must not exist.
    pub fn create(&self) -> io::Result<()> {
        if let Some(parent) = self.path.parent() {
            create_parent(parent)?;
        }
        fs::create_dir(&self.directory)
    }

    /// Has this program decide on the devices that its processes may use.
    pub fn filter_devices(&self, program: Arc<OwnedFd>) -> io::Result<()> {
        let directory = File::open(&self.directory)?;
        // A descriptor and nothing else is behind the lock.
        let mut filter = self.filter.lock().unwrap_or_else(PoisonError::into_inner);
        let replaced = filter.as_ref().map(|filter| filter.as_fd());
        sys::attach_device_program(program.as_fd(), directory.as_fd(), replaced)?;
        *filter = Some(program);
        Ok(())
    }

    fn read(&self, file: &str) -> io::Result<String> {
        let mut text = String::new();
        File::open(self.directory.join(file))?
            .take(MAX_FILE)
            .read_to_string(&mut text)?;
        Ok(text)
    }

    fn write(&self, file: &str, value: &str) -> io::Result<()> {
        fs::write(self.directory.join(file), value)
    }

    /// How many processes the kernel's OOM killer has killed in here so far; 0 without a memory controller.
    pub fn oom_kills(&self) -> u64 {
        let events = self.read("memory.events").unwrap_or_default();
        value(&events, "oom_kill").unwrap_or(0)
    }

    /// Kills everything in here, frozen or not.
    pub fn kill(&self) -> io::Result<()> {
        match self.write("cgroup.kill", "1") {
            Err(error) if is_gone(&error) => Ok(()),
            result => result,
        }
    }

    /// Freezes or thaws everything in here and waits until the kernel has done so.
    pub async fn freeze(&self, frozen: bool) -> io::Result<()> {
        let state = if frozen { "1" } else { "0" };
        self.write("cgroup.freeze", state)?;
        self.wait_event("frozen", u64::from(frozen)).await
    }

    /// Waits until no process is left in here.
    pub async fn emptied(&self) -> io::Result<()> {
        match self.wait_event("populated", 0).await {
            Err(error) if is_gone(&error) => Ok(()),
            result => result,
        }
    }

    /// Removes the cgroup with all below it. No process may be left in it.
    pub fn remove(&self) -> io::Result<()> {
        // Children come after their parents in the walk, so backwards they go first.
        for directory in self.walk().iter().rev() {
            match fs::remove_dir(directory) {
                Err(error) if !is_gone(&error) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// PIDs of all processes in here, in the reader's PID namespace.
    pub fn processes(&self) -> io::Result<Vec<u32>> {
        let mut pids = Vec::new();
        for directory in self.walk() {
            // A cgroup below may be gone by now, or threaded: then its processes are listed above it.
            let Ok(text) = fs::read_to_string(directory.join("cgroup.procs")) else {
                continue;
            };
            pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
            if pids.len() > MAX_PROCESSES {
                return Err(io::Error::other("too many processes to list"));
            }
        }
        Ok(pids)
    }

    /// What the container uses. Files of a controller the guest lacks count as zero.
    pub fn usage(&self) -> Usage {
        let cpu = self.read("cpu.stat").unwrap_or_default();
        let memory = self.read("memory.stat").unwrap_or_default();
        let number = |file| {
            self.read(file)
                .ok()
                .and_then(|text| text.trim().parse().ok())
        };
        let micros = |key| value(&cpu, key).unwrap_or(0).saturating_mul(1000);
        Usage {
            cpu_ns: micros("usage_usec"),
            cpu_user_ns: micros("user_usec"),
            cpu_system_ns: micros("system_usec"),
            memory_bytes: number("memory.current").unwrap_or(0),
            memory_limit_bytes: number("memory.max").unwrap_or(0),
            memory_inactive_file_bytes: value(&memory, "inactive_file").unwrap_or(0),
            pids: number("pids.current").unwrap_or(0),
            oom_kills: self.oom_kills(),
        }
    }

    /// This cgroup and those below it, parents first.
    fn walk(&self) -> Vec<PathBuf> {
        let mut found = vec![self.directory.clone()];
        let mut next = 0;
        while next < found.len() {
            let entries = fs::read_dir(&found[next]).into_iter().flatten().flatten();
            for entry in entries.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())) {
                if found.len() >= MAX_CGROUPS {
                    return found;
                }
                found.push(entry.path());
            }
            next += 1;
        }
        found
    }

    /// Waits until `cgroup.events` says so. The kernel signals every change of that file to its pollers.
    async fn wait_event(&self, key: &str, wanted: u64) -> io::Result<()> {
        let file = File::open(self.directory.join("cgroup.events"))?;
        let file = sys::register(file.into(), Interest::PRIORITY)?;
        // Two short lines (Linux 6.12).
        let mut text = [0; 256];
        loop {
            let length = pread(file.get_ref(), &mut text, 0)?;
            if value(&String::from_utf8_lossy(&text[..length]), key) == Some(wanted) {
                return Ok(());
            }
            file.ready(Interest::PRIORITY).await?.clear_ready();
        }
    }
}

/// A cgroup that was removed has no files; those still open fail with ENODEV.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

/// The number after `key` in a file of `key number` lines.
fn value(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (name, number) = line.split_once(' ')?;
        (name == key).then(|| number.trim().parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fake() -> (tempfile::TempDir, Cgroup) {
        let directory = tempfile::tempdir().unwrap();
        let cgroup = Cgroup {
            path: "/x".into(),
            directory: directory.path().to_owned(),
            filter: Mutex::default(),
        };
        (directory, cgroup)
    }

    #[test]
    fn keys_are_matched_whole() {
        let text = "oom 3\noom_kill 2\noom_group_kill 9\n";
        assert_eq!(value(text, "oom_kill"), Some(2));
        assert_eq!(value(text, "oom"), Some(3));
        assert_eq!(value(text, "kill"), None);
        assert_eq!(value("oom_kill\noom_kill x\n", "oom_kill"), None);
    }

    #[test]
    fn missing_controllers_count_as_zero_and_max_as_no_limit() {
        let (directory, cgroup) = fake();
        assert_eq!(cgroup.usage(), Usage::default());
        fs::write(directory.path().join("memory.max"), "max\n").unwrap();
        fs::write(
            directory.path().join("cpu.stat"),
            "usage_usec 7\nuser_usec 5\nsystem_usec 2\n",
        )
        .unwrap();
        let usage = cgroup.usage();
        assert_eq!(
            (usage.cpu_ns, usage.cpu_user_ns, usage.cpu_system_ns),
            (7000, 5000, 2000)
        );
        assert_eq!(usage.memory_limit_bytes, 0);
    }

    #[test]
    fn processes_of_nested_cgroups_are_found_and_nonsense_is_not() {
        let (directory, cgroup) = fake();
        let nested = directory.path().join("a/b");
        fs::create_dir_all(&nested).unwrap();
        fs::write(directory.path().join("cgroup.procs"), "1\n2\nx\n-3\n").unwrap();
        fs::write(nested.join("cgroup.procs"), "44\n").unwrap();
        assert_eq!(cgroup.processes().unwrap(), [1, 2, 44]);
    }

    #[test]
    fn killing_in_a_cgroup_that_is_gone_is_done() {
        let cgroup = Cgroup::new("/no/such/cgroup".into());
        assert!(cgroup.kill().is_ok());
        assert!(cgroup.remove().is_ok());
        assert_eq!(cgroup.oom_kills(), 0);
    }

    #[test]
    fn a_path_stays_below_the_hierarchy() {
        let cgroup = Cgroup::new("/cloison/c1".into());
        assert_eq!(cgroup.directory, Path::new("/sys/fs/cgroup/cloison/c1"));
    }
}
