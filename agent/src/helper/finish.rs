//! The last steps of a container's process, run by libcontainer inside the container: the terminal, working directory,
//! identity, capabilities and the search for the program before it is reported ready; limits, seccomp and execve(2) once
//! it is started, and the hooks that run in the container. `spec` says why libcontainer does not do these itself.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use caps::{CapSet, Capability, CapsHashSet};
use libcontainer::capabilities::CapabilityExt;
use libcontainer::container::{ContainerStatus, State};
use libcontainer::hooks;
use libcontainer::oci_spec::runtime::{Capabilities, Spec};
use libcontainer::workload::{
    Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError,
};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::{Gid, Uid, chdir, execve, fchown, getcwd, setgroups, setresgid, setresuid};

use super::{copy_up, filter, lookup};
use crate::dirs;
use crate::error::chain;
use crate::report::{Failure, FailureKind, Report};
use crate::sys;
use crate::workload::{Start, Terminal, Workload};

/// Most of a container's /etc/passwd that is read for a home directory, bytes.
const MAX_PASSWD: u64 = 1 << 20;

/// Kept until execve(2), which takes them away by itself: raising limits needs the one, loading a seccomp filter
/// without no_new_privs the other. Neither lets the process execute a file its user may not.
const KEPT: [Capability; 2] = [Capability::CAP_SYS_RESOURCE, Capability::CAP_SYS_ADMIN];

/// The steps for one process. libcontainer clones it into the process it makes and calls it there.
#[derive(Clone)]
pub struct Finish {
    workload: Workload,
    /// The report's pipe, under the number it has in the helper and everything forked from it.
    report: RawFd,
    user_namespace: Option<Rc<File>>,
    /// The list of processes of the cgroup that this one goes to.
    cgroup: Option<Rc<File>>,
    /// Directories that are copied into the tmpfs that covers them.
    covered: Vec<(Rc<OwnedFd>, PathBuf)>,
    program: OnceCell<CString>,
}

impl Finish {
    /// To be made while the guest's own /proc can be seen.
    pub fn new(workload: Workload, report: BorrowedFd<'_>) -> io::Result<Self> {
        let namespace = |pid| File::open(format!("/proc/{pid}/ns/user")).map(Rc::new);
        let cgroup = workload.cgroup.as_deref().map(|path| {
            let directory = Path::new(dirs::CGROUPS).join(path.strip_prefix("/").unwrap_or(path));
            let file = File::options()
                .write(true)
                .open(directory.join("cgroup.procs"));
            file.map(Rc::new).map_err(|error| {
                io::Error::new(
                    error.kind(),
                    format!("the cgroup {}: {error}", path.display()),
                )
            })
        });
        let mut covered = Vec::new();
        for wanted in &workload.copy_up {
            let directory = copy_up::open(wanted)?.map(Rc::new);
            covered.extend(directory.map(|directory| (directory, wanted.place.clone())));
        }
        Ok(Self {
            covered,
            cgroup: cgroup.transpose()?,
            user_namespace: workload.user_namespace_of.map(namespace).transpose()?,
            workload,
            report: report.as_raw_fd(),
            program: OnceCell::new(),
        })
    }

    fn fail(&self, failure: Failure) -> String {
        // SAFETY: the helper's `main` owns this descriptor for as long as the process runs libcontainer, and a fork
        // inherits it; libcontainer marks it close-on-exec but leaves it open.
        let report = unsafe { BorrowedFd::borrow_raw(self.report) };
        let message = failure.message.clone();
        super::send(report, &Report::Failed(failure));
        message
    }

    fn prepare(&self) -> Result<CString, Failure> {
        let w = &self.workload;
        if let Some(cgroup) = &self.cgroup {
            // 0 is whoever writes.
            let moved = cgroup.as_ref().write_all(b"0");
            moved.map_err(|e| internal("entering the cgroup", e))?;
        }
        if w.new_network {
            sys::loopback_up().map_err(|e| internal("bringing up the loopback interface", e))?;
        }
        if let Some(terminal) = &w.terminal {
            set_terminal(terminal).map_err(|e| internal("setting up the terminal", e))?;
        }
        for (directory, place) in &self.covered {
            copy_up::copy(directory.as_fd(), place).map_err(|e| {
                internal(
                    &format!(
                        "copying what is covered by the tmpfs at {}",
                        place.display()
                    ),
                    e,
                )
            })?;
        }
        for (place, flags) in &w.mount_changes {
            let flags = MsFlags::from_bits_truncate(*flags);
            mount(None::<&str>, place, None::<&str>, flags, None::<&str>)
                .map_err(|e| internal(&format!("changing the mount {}", place.display()), e))?;
        }
        if let Some(namespace) = &self.user_namespace {
            setns(namespace.as_fd(), CloneFlags::CLONE_NEWUSER)
                .map_err(|e| internal("entering the container's user namespace", e))?;
        }
        let entered = enter(&w.cwd, w.make_cwd);
        become_user(w)?;
        // A directory root may not enter (a network file system's) may be the user's own.
        entered
            .or_else(|_| chdir(&w.cwd))
            .map_err(|errno| Failure {
                kind: FailureKind::Invalid,
                message: format!("working directory {}: {}", w.cwd.display(), errno.desc()),
            })?;
        inside_root()?;
        lookup::program(&w.args[0], &w.env)
    }

    fn execute(&self) -> Failure {
        match self.try_execute() {
            Ok(never) => match never {},
            Err(failure) => failure,
        }
    }

    fn try_execute(&self) -> Result<std::convert::Infallible, Failure> {
        let w = &self.workload;
        let program = match self.program.get() {
            Some(program) => program.clone(),
            None => lookup::program(&w.args[0], &w.env)?,
        };
        let mut env = w.env.clone();
        if !env.iter().any(|entry| entry.starts_with("HOME=")) {
            env.push(format!("HOME={}", home(w.uid)));
        }
        let (args, env) = (c_strings(&w.args)?, c_strings(&env)?);

        for limit in &w.rlimits {
            sys::set_rlimit(limit).map_err(|error| Failure {
                kind: FailureKind::Invalid,
                message: format!(
                    "setting {} to {}:{}: {error}",
                    limit.typ(),
                    limit.soft(),
                    limit.hard()
                ),
            })?;
        }
        sys::reset_signals().map_err(|e| internal("resetting signals", e))?;
        if let Some(filter) = &w.seccomp {
            // Last, so that the filter has to allow nothing but the hooks and execve(2).
            filter::load(filter)
                .map_err(|error| explained("loading the seccomp filter", &error))?;
        }
        if let Some(start) = &w.start {
            run_hooks(start, &w.env)?;
        }
        execve(&program, &args, &env).map_err(|errno| lookup::explain(&w.args[0], errno))
    }
}

impl Executor for Finish {
    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        match self.prepare() {
            Ok(program) => {
                // Set once: libcontainer validates once.
                let _ = self.program.set(program);
                Ok(())
            }
            Err(failure) => Err(ExecutorValidationError::ArgValidationError(
                self.fail(failure),
            )),
        }
    }

    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        // execve(2) gets the environment; the process's own is nobody's.
        Ok(())
    }

    fn exec(&self, _: &Spec) -> Result<(), ExecutorError> {
        Err(ExecutorError::Other(self.fail(self.execute())))
    }
}

fn internal(doing: &str, error: impl std::error::Error) -> Failure {
    Failure {
        kind: FailureKind::Internal,
        message: format!("{doing}: {error}"),
    }
}

fn explained(doing: &str, error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure {
        kind: FailureKind::Internal,
        message: format!("{doing}: {}", chain(error)),
    }
}

/// Runs the startContainer hooks. One without an environment of its own has the container's.
fn run_hooks(start: &Start, env: &[String]) -> Result<(), Failure> {
    let mut state = State::new(
        &start.container_id,
        ContainerStatus::Created,
        Some(std::process::id().cast_signed()),
        start.bundle.clone(),
    );
    state.annotations = Some(start.annotations.clone());
    let env = env.iter().filter_map(|entry| entry.split_once('='));
    let env = env.map(|(name, value)| (name.to_owned(), value.to_owned()));
    hooks::run_hooks(
        Some(&start.hooks),
        Some(&state),
        None,
        None,
        Some(&env.collect()),
    )
    .map_err(|error| explained("running the startContainer hooks", &error))
}

fn c_strings(texts: &[String]) -> Result<Vec<CString>, Failure> {
    texts
        .iter()
        .map(|text| CString::new(text.as_bytes()))
        .collect::<Result<_, _>>()
        .map_err(|error| Failure {
            kind: FailureKind::Invalid,
            message: format!("an argument or environment entry: {error}"),
        })
}

/// Makes the terminal the user's, so that opening /dev/tty or /dev/stdout works. Pipes are theirs already.
fn set_terminal(terminal: &Terminal) -> io::Result<()> {
    let stdin = io::stdin();
    fchown(&stdin, terminal.owner.map(Uid::from_raw), None)?;
    match terminal.size {
        Some((columns, rows)) => sys::set_window(stdin.as_fd(), columns, rows),
        None => Ok(()),
    }
}

fn enter(directory: &Path, make: bool) -> Result<(), Errno> {
    let made = || {
        fs::create_dir_all(directory)
            .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
    };
    match chdir(directory) {
        Err(Errno::ENOENT) if make => {
            match made() {
                Err(Errno::EROFS) => with_writable_root(made)?,
                made => made?,
            }
            chdir(directory)
        }
        result => result,
    }
}

/// Does what a read-only root does not allow, before anybody else is there.
fn with_writable_root(act: impl FnOnce() -> Result<(), Errno>) -> Result<(), Errno> {
    let flags = statvfs("/")?.flags();
    // Flags of a mount have the same numbers for both calls; the others are its file system's own.
    let kept = FsFlags::ST_NOSUID | FsFlags::ST_NODEV | FsFlags::ST_NOEXEC | FsFlags::ST_NOATIME;
    let kept = MsFlags::from_bits_truncate((flags & kept).bits());
    let change = |flags| {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | kept | flags;
        mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
    };
    change(MsFlags::empty())?;
    let acted = act();
    change(MsFlags::MS_RDONLY)?;
    acted
}

/// A working directory that was reached through a descriptor of the outside has no path in here (CVE-2024-21626).
fn inside_root() -> Result<(), Failure> {
    match getcwd() {
        Ok(path) if path.is_absolute() => Ok(()),
        Ok(_) | Err(Errno::ENOENT) => Err(Failure {
            kind: FailureKind::Invalid,
            message: "the working directory is outside the container".into(),
        }),
        Err(errno) => Err(internal("reading the working directory", errno)),
    }
}

fn become_user(w: &Workload) -> Result<(), Failure> {
    let wanted = |set: &Option<Capabilities>| -> CapsHashSet {
        set.iter().flatten().map(CapabilityExt::to_cap).collect()
    };
    let c = &w.capabilities;
    let apply = || -> Result<(), caps::errors::CapsError> {
        let bounding = wanted(c.bounding());
        for capability in caps::read(None, CapSet::Bounding)?.difference(&bounding) {
            caps::drop(None, CapSet::Bounding, *capability)?;
        }
        Ok(())
    };
    apply().map_err(|e| internal("dropping bounding capabilities", e))?;

    let groups: Vec<Gid> = w.groups.iter().copied().map(Gid::from_raw).collect();
    let (uid, gid) = (Uid::from_raw(w.uid), Gid::from_raw(w.gid));
    let switch = || {
        prctl::set_keepcaps(true)?;
        setgroups(&groups)?;
        setresgid(gid, gid, gid)?;
        setresuid(uid, uid, uid)?;
        prctl::set_keepcaps(false)
    };
    switch().map_err(|errno| Failure {
        kind: FailureKind::Invalid,
        message: format!("becoming user {}:{}: {}", w.uid, w.gid, errno.desc()),
    })?;

    let own = |set: &Option<Capabilities>| {
        let mut set = wanted(set);
        set.extend(KEPT);
        set
    };
    let apply = || -> Result<(), caps::errors::CapsError> {
        caps::set(None, CapSet::Inheritable, &wanted(c.inheritable()))?;
        caps::set(None, CapSet::Effective, &own(c.effective()))?;
        caps::set(None, CapSet::Permitted, &own(c.permitted()))?;
        caps::clear(None, CapSet::Ambient)?;
        // The kernel refuses an ambient capability that is not also permitted and inheritable; like runc, give the rest.
        let possible = &wanted(c.permitted()) & &wanted(c.inheritable());
        for capability in wanted(c.ambient()).intersection(&possible) {
            caps::raise(None, CapSet::Ambient, *capability)?;
        }
        Ok(())
    };
    apply().map_err(|error| Failure {
        kind: FailureKind::Invalid,
        message: format!("setting capabilities: {error}"),
    })
}

/// The user's home directory by the container's /etc/passwd, `/` when it has none.
fn home(uid: u32) -> String {
    let lines = File::open("/etc/passwd")
        .map(|file| BufReader::new(file.take(MAX_PASSWD)).lines())
        .into_iter()
        .flatten()
        .map_while(Result::ok);
    home_in(lines, uid).unwrap_or_else(|| "/".into())
}

fn home_in(mut lines: impl Iterator<Item = String>, uid: u32) -> Option<String> {
    lines.find_map(|line| {
        let mut fields = line.split(':');
        (fields.nth(2)?.parse() == Ok(uid)).then_some(())?;
        let home = fields.nth(2)?;
        (!home.is_empty() && !home.contains('\0')).then(|| home.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(passwd: &str, uid: u32) -> Option<String> {
        home_in(passwd.lines().map(str::to_owned), uid)
    }

    #[test]
    fn a_home_directory_is_read_from_passwd() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:33::/var/www:/bin/false\n";
        assert_eq!(find(passwd, 0).as_deref(), Some("/root"));
        assert_eq!(find(passwd, 33).as_deref(), Some("/var/www"));
        assert_eq!(find(passwd, 34), None);
    }

    #[test]
    fn broken_lines_of_passwd_are_passed_over() {
        let passwd =
            "\n:::\nx:y\nbad:x:notanumber:0::/bad:\nshort:x:5\nempty:x:6:6:::\nok:x:5:5::/ok:\n";
        assert_eq!(find(passwd, 5).as_deref(), Some("/ok"));
        assert_eq!(find(passwd, 6), None);
    }

    #[test]
    fn a_working_directory_is_made_only_when_asked() {
        let tree = tempfile::tempdir().unwrap();
        let before = getcwd().unwrap();
        let path = tree.path().join("a/b");
        assert_eq!(enter(&path, false), Err(Errno::ENOENT));
        assert_eq!(enter(&path, true), Ok(()));
        chdir(&before).unwrap();
        assert!(path.is_dir());
        fs::write(tree.path().join("file"), "").unwrap();
        assert_eq!(enter(&tree.path().join("file"), true), Err(Errno::ENOTDIR));
    }
}
