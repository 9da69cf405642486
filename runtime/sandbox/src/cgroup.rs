//! The host's cgroup of a sandbox: it holds the processes that stand for the guest's and the VM's, and charges them. What limits the
//! container is its cgroup in the guest; the limits here keep the VM itself within what it was sized for. On cgroup v1, on v2, and
//! on hosts with both, of which the v1 controllers are used.

use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::{fs, io};

use cgroups_rs::CgroupPid;
use cgroups_rs::fs::Controller;
use cgroups_rs::fs::blkio::BlkIoController;
use cgroups_rs::fs::cgroup::Cgroup;
use cgroups_rs::fs::cpu::CpuController;
use cgroups_rs::fs::cpuset::CpuSetController;
use cgroups_rs::fs::freezer::FreezerController;
use cgroups_rs::fs::hierarchies;
use cgroups_rs::fs::memory::MemController;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use serde::{Deserialize, Serialize};

use crate::scope::ScopeError;
use crate::{Error, Scope, host};

/// Where sandboxes are for whose cgroup nobody has said a place, below the hierarchies' roots.
const DEFAULT_PARENT: &str = "cloison";
/// How long a process that was killed may take to be gone, milliseconds.
const END_TIMEOUT_MS: u16 = 5_000;

/// `argv[0]` of the process that is killed for lack of memory: the executable calls [`oom_main`] when it sees it.
pub const OOM_PROCESS_NAME: &str = "cloison-oom";
/// What that process may use before it takes memory, bytes.
const OOM_ROOM: u64 = 8 << 20;
/// What it takes at most, bytes.
const OOM_APPETITE: usize = 64 << 20;

/// Where a sandbox's cgroup is, and who makes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum CgroupPlace {
    /// Below the hierarchies' roots, made here.
    Path(PathBuf),
    /// Made by systemd.
    Scope(Scope),
}

/// A cgroup, in each of the host's hierarchies.
pub struct HostCgroup {
    path: String,
    /// Whose it is where systemd makes it.
    scope: Option<Scope>,
    cgroup: Cgroup,
}

/// What the processes in a cgroup may use; `None` leaves a limit as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostLimits {
    /// Bytes.
    pub memory: Option<u64>,
    /// Share of the CPUs beside other cgroups, as cgroup v1 counts (2 to 262144).
    pub cpu_shares: Option<u64>,
    /// CPUs of the host, as in "0-2,7".
    pub cpus: Option<String>,
    /// Memory nodes of the host.
    pub mems: Option<String>,
    /// Limits of block devices of the host, where the container's files are.
    pub throttles: Vec<Throttle>,
    /// Share of block devices beside other cgroups (10 to 1000), where the host's I/O scheduler has such.
    pub block_weight: Option<u16>,
}

/// How much may go from or to one block device of the host in a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Throttle {
    /// What is counted.
    pub what: Throttled,
    /// The device's number.
    pub major: u64,
    /// The device's number.
    pub minor: u64,
    /// Bytes or operations in a second; 0 takes the limit away.
    pub rate: u64,
}

/// What a [`Throttle`] counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Throttled {
    /// Bytes read.
    ReadBytes,
    /// Bytes written.
    WrittenBytes,
    /// Reads.
    Reads,
    /// Writes.
    Writes,
}

impl HostCgroup {
    /// The cgroup at `place`, whether it exists or not.
    ///
    /// # Errors
    /// When a path leaves the hierarchy or is its root.
    pub fn at(place: &CgroupPlace) -> Result<Self, Error> {
        let (path, scope) = match place {
            CgroupPlace::Path(path) => (path.clone(), None),
            CgroupPlace::Scope(scope) => (scope.path(), Some(scope.clone())),
        };
        let path = path.as_path();
        let normal = |component: Component<'_>| match component {
            Component::Normal(name) => Some(name.to_str().map(str::to_owned)),
            Component::RootDir | Component::CurDir => None,
            Component::ParentDir | Component::Prefix(_) => Some(None),
        };
        let names: Option<Vec<String>> = path.components().filter_map(normal).collect();
        let names = names.filter(|names| !names.is_empty());
        let path = names.map(|names| names.join("/")).ok_or_else(|| {
            Error::path("use the cgroup", path)(io::ErrorKind::InvalidInput.into())
        })?;
        let cgroup = Cgroup::load(hierarchies::auto(), &path);
        Ok(Self {
            path,
            scope,
            cgroup,
        })
    }

    /// The path for a sandbox for which nobody has said one.
    pub fn default_path(id: &str) -> PathBuf {
        Path::new("/").join(DEFAULT_PARENT).join(id)
    }

    /// Refuses one that is frozen, or will be when it is made below one that is: whoever is moved into it does not go on.
    ///
    /// # Errors
    /// [`Error::Frozen`].
    pub fn refuse_frozen(&self) -> Result<(), Error> {
        let freezer: Option<&FreezerController> = self.cgroup.controller_of();
        // A host that cannot freeze has not.
        let Some(freezer) = freezer else {
            return Ok(());
        };
        let directory = freezer.path();
        let root = directory
            .ancestors()
            .nth(Path::new(&self.path).components().count());
        match root.and_then(|root| frozen(root, Path::new(&self.path))) {
            Some((file, thaw)) => Err(Error::Frozen { file, thaw }),
            None => Ok(()),
        }
    }

    /// Makes it, or takes one that exists, and moves a process, and so what that will start, into it. The kernel waits some milliseconds
    /// for all its processors to do so.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn create(&self, limits: &HostLimits, process: Pid) -> Result<(), Error> {
        if let Some(scope) = &self.scope {
            let started = scope.start(limits, process);
            started.map_err(self.refused("create"))?;
        }
        // On cgroup v1 systemd makes it in some hierarchies alone.
        if self.scope.is_none() || !hierarchies::is_cgroup2_unified_mode() {
            self.cgroup.create().map_err(self.failed("create"))?;
        }
        self.write(limits)?;
        self.take_in(process)
    }

    /// Sets limits.
    ///
    /// # Errors
    /// When the host refuses one, or lacks its controller.
    pub fn limit(&self, limits: &HostLimits) -> Result<(), Error> {
        if let Some(scope) = &self.scope {
            let limited = scope.limit(limits);
            limited.map_err(self.refused("set the limits of"))?;
        }
        self.write(limits)
    }

    fn write(&self, limits: &HostLimits) -> Result<(), Error> {
        let failed = || self.failed("set the limits of");
        if let Some(bytes) = limits.memory {
            let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
            let memory: &MemController = self.controller("memory")?;
            memory.set_limit(bytes).map_err(failed())?;
        }
        if let Some(shares) = limits.cpu_shares {
            let cpu: &CpuController = self.controller("cpu")?;
            cpu.set_shares(shares).map_err(failed())?;
        }
        if let Some(cpus) = &limits.cpus {
            let set: &CpuSetController = self.controller("cpuset")?;
            set.set_cpus(cpus).map_err(failed())?;
        }
        if let Some(mems) = &limits.mems {
            let set: &CpuSetController = self.controller("cpuset")?;
            set.set_mems(mems).map_err(failed())?;
        }
        if let Some(weight) = limits.block_weight {
            let block: &BlkIoController = self.controller("blkio")?;
            block.set_weight(weight.into()).map_err(failed())?;
        }
        for limit in &limits.throttles {
            let block: &BlkIoController = self.controller("blkio")?;
            let Throttle {
                major, minor, rate, ..
            } = *limit;
            let set = match limit.what {
                Throttled::ReadBytes => block.throttle_read_bps_for_device(major, minor, rate),
                Throttled::WrittenBytes => block.throttle_write_bps_for_device(major, minor, rate),
                Throttled::Reads => block.throttle_read_iops_for_device(major, minor, rate),
                Throttled::Writes => block.throttle_write_iops_for_device(major, minor, rate),
            };
            set.map_err(failed())?;
        }
        Ok(())
    }

    fn controller<'a, T>(&'a self, name: &'static str) -> Result<&'a T, Error>
    where
        &'a T: From<&'a cgroups_rs::fs::Subsystem>,
        T: cgroups_rs::fs::Controller + cgroups_rs::fs::ControllIdentifier,
    {
        self.cgroup
            .controller_of()
            .ok_or(Error::NoController { name })
    }

    /// Moves a process, and so what that will start, into one that exists.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn take_in(&self, process: Pid) -> Result<(), Error> {
        self.cgroup
            .add_task_by_tgid(CgroupPid::from(u64::from(process.as_raw().unsigned_abs())))
            .map_err(self.failed("move a process into"))
    }

    /// Has the host's kernel report that the OOM killer has struck in this cgroup, as it has in the guest's, where the host's kernel
    /// does not see it. Callers read that of the host's cgroup: its limit is lowered to what is used by now, and a process that
    /// wants more ([`oom_main`]) is killed for it. For a cgroup whose VM is gone, by the last process in it.
    ///
    /// # Errors
    /// When the limit cannot be lowered or the process not be started.
    pub fn report_oom(&self) -> Result<(), Error> {
        let memory: &MemController = self.controller("memory")?;
        let used = memory.memory_stat().usage_in_bytes;
        memory
            .set_limit(i64::try_from(used + OOM_ROOM).unwrap_or(i64::MAX))
            .map_err(self.failed("lower the limit of"))?;
        let victim = Command::new("/proc/self/exe")
            .arg0(OOM_PROCESS_NAME)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        victim
            .map(drop)
            .map_err(Error::system("report the guest's lack of memory"))
    }

    /// The processes in it.
    pub fn pids(&self) -> Vec<u32> {
        let all = self.cgroup.procs().into_iter();
        all.filter_map(|pid| u32::try_from(pid.pid).ok()).collect()
    }

    /// Kills what is in it and removes it. One that does not exist is removed already.
    ///
    /// # Errors
    /// When a process does not end, or the host refuses.
    pub fn remove(&self) -> Result<(), Error> {
        if !self.cgroup.exists() {
            return Ok(());
        }
        for pid in self.pids() {
            end(Pid::from_raw(pid.cast_signed()))?;
        }
        if let Some(scope) = &self.scope {
            let stopped = scope.stop();
            stopped.map_err(self.refused("remove"))?;
        }
        match self.cgroup.delete() {
            Err(_) if !self.cgroup.exists() => {}
            other => other.map_err(self.failed("remove"))?,
        }
        if let Some((DEFAULT_PARENT, _)) = self.path.split_once('/') {
            // Nobody else's, and of no use without a container; with another one in it, it stays.
            let _ = Cgroup::load(hierarchies::auto(), DEFAULT_PARENT).delete();
        }
        Ok(())
    }

    fn refused(&self, what: &'static str) -> impl FnOnce(ScopeError) -> Error {
        let path = self.path.clone();
        move |source| Error::Scope {
            what,
            path,
            source: Box::new(source),
        }
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(cgroups_rs::fs::error::Error) -> Error {
        let path = self.path.clone();
        move |source| Error::Cgroup {
            what,
            path,
            source: Box::new(source),
        }
    }
}

/// The body of the process that [`HostCgroup::report_oom`] starts: it takes memory, a bounded amount, until it is killed for it.
pub fn oom_main() -> ExitCode {
    // Nobody else in the cgroup shall be hit instead.
    if std::fs::write("/proc/self/oom_score_adj", "1000").is_err() {
        return ExitCode::FAILURE;
    }
    let mut taken = vec![0_u8; OOM_APPETITE];
    for page in taken.chunks_mut(4096) {
        page[0] = 1;
    }
    std::hint::black_box(&taken);
    ExitCode::SUCCESS
}

/// The file by which the outermost frozen cgroup on the way from `root` to `path` says that it is frozen, and what thaws it, on cgroup v1
/// and v2. That of one that is gone, or not yet there, says nothing.
fn frozen(root: &Path, path: &Path) -> Option<(PathBuf, &'static str)> {
    let kinds = [
        ("freezer.state", "THAWED"),
        // Not the whole state, which is that of the cgroups above as well, but they are looked at themselves.
        ("cgroup.freeze", "0"),
    ];
    let mut directory = root.to_owned();
    path.components().find_map(|name| {
        directory.push(name);
        kinds.iter().find_map(|&(file, thaw)| {
            let file = directory.join(file);
            let state = fs::read_to_string(&file).ok()?;
            (state.trim() != thaw).then_some((file, thaw))
        })
    })
}

/// Kills a process and waits until it is gone.
fn end(pid: Pid) -> Result<(), Error> {
    let Ok(watched) = host::pidfd(pid) else {
        return Ok(());
    };
    // It may end between the two calls.
    let _ = kill(pid, Signal::SIGKILL);
    let failed = || Error::system("wait for the end of a process in the container's cgroup");
    let mut fds = [PollFd::new(watched.as_fd(), PollFlags::POLLIN)];
    match poll(&mut fds, PollTimeout::from(END_TIMEOUT_MS)) {
        Ok(0) => Err(failed()(io::ErrorKind::TimedOut.into())),
        Ok(_) => Ok(()),
        Err(errno) => Err(failed()(errno.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outermost_cgroup_that_is_frozen_is_named_with_what_thaws_it() {
        let root = tempfile::tempdir().unwrap();
        let (outer, inner) = (root.path().join("a"), root.path().join("a/b"));
        fs::create_dir_all(&inner).unwrap();
        let found = || frozen(root.path(), Path::new("a/b/new"));
        assert_eq!(found(), None);
        for (file, thawed, frozen) in [
            ("cgroup.freeze", "0\n", "1\n"),
            ("freezer.state", "THAWED\n", "FROZEN\n"),
            ("freezer.state", "THAWED\n", "FREEZING\n"),
        ] {
            fs::write(outer.join(file), thawed).unwrap();
            fs::write(inner.join(file), thawed).unwrap();
            assert_eq!(found(), None);
            fs::write(inner.join(file), frozen).unwrap();
            assert_eq!(found().unwrap().0, inner.join(file));
            fs::write(outer.join(file), frozen).unwrap();
            assert_eq!(found().unwrap(), (outer.join(file), thawed.trim()));
            fs::write(inner.join(file), thawed).unwrap();
            fs::write(outer.join(file), thawed).unwrap();
        }
        // A file that is no file.
        fs::remove_file(inner.join("cgroup.freeze")).unwrap();
        fs::create_dir(inner.join("cgroup.freeze")).unwrap();
        assert_eq!(found(), None);
    }

    #[test]
    fn a_path_that_leaves_the_hierarchy_or_is_its_root_is_refused() {
        for path in ["", "/", ".", "..", "/a/../../b", "a/.."] {
            let place = CgroupPlace::Path(path.into());
            assert!(HostCgroup::at(&place).is_err(), "{path}");
        }
        let place = CgroupPlace::Path("/a//./b".into());
        assert_eq!(HostCgroup::at(&place).unwrap().path, "a/b");
    }
}
