//! Starting QEMU: it is given guest memory, its console, and sockets for its devices, as descriptors, and dies with this process.

use std::fs::File;
use std::io::{self, PipeReader};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};

use cloison_devices::MacAddress;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, SealFlag, fcntl, open};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::sys::socket::SockType;
use nix::sys::stat::Mode;
use nix::unistd::{Pid, getppid};

use super::command::{Control, DeviceSockets, Inherited, InheritedNic, Start, arguments};
use super::monitor::Monitor;
use super::qemu::SoftwareError;
use super::tsc;
use crate::packet;
use crate::spec::VmSpec;
use crate::sys;

/// Our ends of the devices' vhost-user sockets.
pub(crate) struct Sockets {
    pub(super) fs: UnixStream,
    pub(super) vsock: UnixStream,
    /// QEMU connects to these.
    pub(super) nics: Vec<UnixListener>,
}

/// A QEMU that has been started, and what it is connected by.
pub(super) struct Spawned {
    pub(super) child: Child,
    pub(super) pidfd: OwnedFd,
    pub(super) console: PipeReader,
    pub(super) stderr: ChildStderr,
    /// The guest's.
    pub(super) memory: File,
    /// Of a guest that is saved or loaded.
    pub(super) monitor: Option<Monitor>,
    pub(super) sockets: Sockets,
}

/// Starts QEMU, with network devices of these addresses.
pub(super) fn spawn(
    spec: &VmSpec,
    start: Start,
    nics: &[MacAddress],
) -> Result<Spawned, SoftwareError> {
    let connect = SoftwareError::Connect;
    let pair = || UnixStream::pair().map_err(connect);
    let (fs, fs_of_qemu) = pair()?;
    let (vsock, vsock_of_qemu) = pair()?;
    let (console, console_of_qemu) = io::pipe().map_err(connect)?;
    let memory = guest_memory(spec).map_err(connect)?;
    let monitor = (start != Start::Boot).then(Monitor::new).transpose();
    let (monitor, of_qemu) = monitor.map_err(connect)?.unzip();
    let control = monitor.as_ref().zip(of_qemu.as_ref());
    let sockets = nics.iter().map(|_| listen());
    let sockets = sockets.collect::<io::Result<Vec<_>>>();
    let (listeners, files): (Vec<_>, Vec<_>) = sockets.map_err(connect)?.into_iter().unzip();
    let inherited = Inherited {
        memory: memory.as_raw_fd(),
        console: console_of_qemu.as_raw_fd(),
        devices: (start != Start::Save).then(|| DeviceSockets {
            fs: fs_of_qemu.as_raw_fd(),
            vsock: vsock_of_qemu.as_raw_fd(),
        }),
        control: control.map(|(monitor, of_qemu)| Control {
            monitor: of_qemu.socket.as_raw_fd(),
            input: of_qemu.input.as_raw_fd(),
            state: monitor.state.as_raw_fd(),
        }),
        nics: nics
            .iter()
            .zip(&files)
            .map(|(&mac, file)| InheritedNic {
                socket: file.as_raw_fd(),
                mac,
            })
            .collect(),
    };
    let mut child = run(spec, &inherited, start).map_err(|source| SoftwareError::Start {
        path: spec.qemu.clone(),
        source,
    })?;
    let pidfd = sys::pidfd_open(child.id()).map_err(connect)?;
    let missing = || SoftwareError::Connect(io::ErrorKind::BrokenPipe.into());
    let stderr = child.stderr.take().ok_or_else(missing)?;
    Ok(Spawned {
        child,
        pidfd,
        console,
        stderr,
        memory,
        monitor,
        sockets: Sockets {
            fs,
            vsock,
            nics: listeners,
        },
    })
}

/// A listening socket, and its file, which has no name any more: it is reached by way of a descriptor.
fn listen() -> io::Result<(UnixListener, OwnedFd)> {
    const NAME: &str = "net.sock";
    let here = Path::new(".");
    let listener = packet::listen_at(here, NAME, SockType::Stream)?;
    let file = open(NAME, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty());
    std::fs::remove_file(NAME)?;
    Ok((listener.into(), file?))
}

/// Guest memory, all zeroes. Its size is final: who maps it may rely on that.
fn guest_memory(spec: &VmSpec) -> io::Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let memory = File::from(memfd_create(c"cloison-guest", flags)?);
    memory.set_len(u64::from(spec.max_memory_mib) << 20)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&memory, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(memory)
}

fn run(spec: &VmSpec, inherited: &Inherited, start: Start) -> io::Result<Child> {
    let parent = Pid::this();
    let mut fds = vec![inherited.memory, inherited.console];
    if let Some(DeviceSockets { fs, vsock }) = inherited.devices {
        fds.extend([fs, vsock]);
    }
    if let Some(control) = inherited.control {
        fds.extend([control.monitor, control.input, control.state]);
    }
    fds.extend(inherited.nics.iter().map(|nic| nic.socket));
    let boots = start != Start::Load;
    let tsc_khz = boots.then(tsc::measure_khz).flatten();
    let mut command = Command::new(&spec.qemu);
    command
        .args(arguments(spec, inherited, start, tsc_khz))
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    // SAFETY: runs between fork and exec, in a copy of one thread: it makes a few system calls and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            // The parent may have died before it could be asked for a signal.
            if getppid() != parent {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            prctl::set_no_new_privs()?;
            fds.iter().copied().try_for_each(inherit)
        });
    }
    command.spawn()
}

/// Lets the program that comes next keep `fd`.
fn inherit(fd: RawFd) -> io::Result<()> {
    // SAFETY: called with descriptors that the caller of `run` owns, and copies of which this forked process holds.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(())
}
