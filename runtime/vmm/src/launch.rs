//! How a front door starts a VM process and learns of its end. By the time [`launch`] returns, the sandbox's sockets accept
//! connections and everything the VM needs is on its way to it; the guest may not have started yet.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use cloison_devices::Attachment;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::{AccessFlags, Pid, access};
use tracing::level_filters::LevelFilter;

use crate::end::{self, End, EndFileError};
use crate::handoff::{self, Handoff, MAX_EARLY_ATTACHMENTS};
use crate::nic::Nic;
use crate::spec::{Engine, SpecError, VmSpec};
use crate::{packet, sys};

/// The control socket's name inside the sandbox's directory.
pub const CONTROL_SOCKET: &str = "control.sock";

/// The name, inside the sandbox's directory, of the socket through which host programs connect to the guest's vsock ports;
/// a guest that connects to host port P reaches `vsock.sock_P`.
pub const VSOCK_SOCKET: &str = "vsock.sock";

/// `argv[0]` of a VM process: the executable calls [`crate::vm_main`] when it sees it.
pub const VM_PROCESS_NAME: &str = "cloison-vm";

/// What a VM is launched with.
#[derive(Debug)]
pub struct Launch<'a> {
    /// What the VM is made of.
    pub spec: VmSpec,
    /// The sandbox's directory: sockets and `end.json` are made in it, and it becomes the process's working directory.
    pub dir: &'a Path,
    /// Directory served to the guest by virtio-fs under the tag "cloison".
    pub shared: &'a Path,
    /// Streams that are there before the guest's first instruction; at most [`MAX_EARLY_ATTACHMENTS`].
    pub attachments: Vec<Attachment>,
    /// Network interfaces that are there before the guest's first instruction; at most [`VmSpec::MAX_NICS`], the spare ones counted.
    pub nics: Vec<Nic>,
    /// Read end of a pipe; when it reports end of file, the owner has died and the VM is killed.
    pub owner: Option<OwnedFd>,
    /// Where the VM process's log lines go; `None` drops them.
    pub log: Option<OwnedFd>,
}

/// Why no VM process was started. Nothing is left behind but, at most, the sockets' files in the sandbox's directory.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The VM cannot be as asked for.
    #[error("cannot launch this VM")]
    Spec(#[from] SpecError),
    /// More attachments than fit into the one message.
    #[error("{0} streams are attached to a VM before its start, more than {MAX_EARLY_ATTACHMENTS}")]
    Attachments(usize),
    /// A file the VM is made from is missing or unreadable.
    #[error("cannot use {} as the {role}: {advice}", path.display())]
    File {
        /// What it is for.
        role: &'static str,
        /// The file.
        path: PathBuf,
        /// What to do.
        advice: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The software engine's program is missing.
    #[error("cannot run QEMU at {}: install it (`apt-get install qemu-system-x86`) or name its path", path.display())]
    NoQemu {
        /// Where it was looked for.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A socket could not be made.
    #[error("cannot listen at {}", path.display())]
    Socket {
        /// The socket's path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// `end.json` could not be made.
    #[error(transparent)]
    EndFile(#[from] EndFileError),
    /// The process could not be started.
    #[error("cannot start the VM process")]
    Spawn(#[source] io::Error),
    /// The process died before it took what it was given.
    #[error("cannot hand the VM's parts to its process")]
    Handoff(#[source] io::Error),
}

/// Starts a VM process in its own session and gives it all it needs.
///
/// # Errors
/// See [`LaunchError`].
pub fn launch(launch: Launch<'_>) -> Result<VmProcess, LaunchError> {
    let Launch {
        spec,
        dir,
        shared,
        attachments,
        nics,
        owner,
        log,
    } = launch;
    let spec = absolute(spec)?;
    check(&spec)?;
    if attachments.len() > MAX_EARLY_ATTACHMENTS {
        return Err(LaunchError::Attachments(attachments.len()));
    }
    let all_nics = nics.len() + usize::from(spec.spare_nics);
    if all_nics > VmSpec::MAX_NICS {
        return Err(SpecError::Nics(all_nics).into());
    }
    let shared = usable(
        "shared directory",
        shared,
        AccessFlags::R_OK | AccessFlags::X_OK,
        "it must be a directory",
    )?;
    let end = end::create(dir)?;
    let listen = |name: &str, kind| {
        packet::listen_at(dir, name, kind).map_err(|source| LaunchError::Socket {
            path: dir.join(name),
            source,
        })
    };
    let control = listen(CONTROL_SOCKET, SockType::SeqPacket)?;
    let vsock = listen(VSOCK_SOCKET, SockType::Stream)?;

    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .map_err(|errno| LaunchError::Spawn(errno.into()))?;
    let child = spawn(&spec.id, dir, theirs, log).map_err(LaunchError::Spawn)?;
    let pidfd = sys::pidfd_open(child.id()).map_err(LaunchError::Spawn)?;
    let process = VmProcess {
        child,
        pidfd,
        dir: dir.to_owned(),
    };
    let handoff = Handoff {
        spec,
        shared,
        log_level: LevelFilter::current().max(LevelFilter::INFO).to_string(),
        end,
        control,
        vsock,
        owner,
        attachments,
        nics,
    };
    match handoff::send(ours.as_fd(), handoff) {
        Ok(()) => Ok(process),
        Err(error) => {
            process.discard();
            Err(LaunchError::Handoff(error))
        }
    }
}

fn spawn(id: &str, dir: &Path, stdin: OwnedFd, log: Option<OwnedFd>) -> io::Result<Child> {
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0(VM_PROCESS_NAME)
        .args([OsStr::new("vm"), OsStr::new(id)])
        .env_clear()
        .current_dir(dir)
        .stdin(stdin)
        .stdout(Stdio::null())
        .stderr(log.map_or_else(Stdio::null, Stdio::from));
    // SAFETY: runs between fork and exec, in a copy of one thread: it makes two system calls and allocates nothing.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            sys::close_on_exec_from(3)
        });
    }
    command.spawn()
}

fn absolute(mut spec: VmSpec) -> Result<VmSpec, LaunchError> {
    spec.validate()?;
    spec.kernel = usable(
        "guest kernel",
        &spec.kernel,
        AccessFlags::R_OK,
        "it must be a readable file",
    )?;
    spec.initramfs = usable(
        "guest's initramfs",
        &spec.initramfs,
        AccessFlags::R_OK,
        "it must be a readable file",
    )?;
    if let Some(template) = &mut spec.template {
        template.dir = std::path::absolute(&template.dir).map_err(|source| LaunchError::File {
            role: "directory of templates",
            path: template.dir.clone(),
            advice: "it must be a path",
            source,
        })?;
    }
    Ok(spec)
}

fn usable(
    role: &'static str,
    path: &Path,
    flags: AccessFlags,
    advice: &'static str,
) -> Result<PathBuf, LaunchError> {
    access(path, flags)
        .map_err(io::Error::from)
        .and_then(|()| std::path::absolute(path))
        .map_err(|source| LaunchError::File {
            role,
            path: path.to_owned(),
            advice,
            source,
        })
}

fn check(spec: &VmSpec) -> Result<(), LaunchError> {
    if spec.engine == Engine::Software {
        access(&spec.qemu, AccessFlags::X_OK).map_err(|errno| LaunchError::NoQemu {
            path: spec.qemu.clone(),
            source: errno.into(),
        })?;
    }
    Ok(())
}

/// A VM process that is this process's child. Dropping it leaves the VM running.
#[derive(Debug)]
pub struct VmProcess {
    child: Child,
    pidfd: OwnedFd,
    dir: PathBuf,
}

impl VmProcess {
    /// Its process ID, valid until [`VmProcess::wait`] has returned.
    pub fn pid(&self) -> Pid {
        // A process ID is at most 2^22 on Linux (PID_MAX_LIMIT).
        Pid::from_raw(self.child.id() as i32)
    }

    /// A descriptor that becomes readable when the process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Kills a process that does not listen.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn kill(&mut self) -> io::Result<()> {
        self.child.kill()
    }

    /// Waits for the process to end and reaps it; says how its VM ended.
    ///
    /// # Errors
    /// When the process cannot be waited for, or its last word cannot be read.
    pub fn wait(&mut self) -> Result<End, WaitError> {
        self.child.wait().map_err(WaitError::Wait)?;
        let end = end::await_end(&self.dir)?;
        // Someone removed the file under a running VM: there is no word, as if it had been killed.
        Ok(end.unwrap_or_else(End::process_killed))
    }

    /// Ends a process that never became a VM.
    fn discard(mut self) {
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait().map(drop)) {
            tracing::warn!("cannot end the VM process {}: {error}", self.child.id());
        }
    }
}

/// Why the end of a VM could not be learnt.
#[derive(Debug, thiserror::Error)]
pub enum WaitError {
    /// The process could not be waited for.
    #[error("cannot wait for the VM process")]
    Wait(#[source] io::Error),
    /// Its last word could not be read.
    #[error(transparent)]
    End(#[from] EndFileError),
}
