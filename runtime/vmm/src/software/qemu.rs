//! The QEMU process: started as early as can be, joined by its devices when they are there, watched, and seen to its end.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cloison_devices::{Device, MacAddress, NetHandle};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, SealFlag, fcntl, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::SockType;
use nix::sys::stat::Mode;
use nix::unistd::{Pid, getppid};

use super::command::{Control, DeviceSockets, Inherited, InheritedNic, Start, arguments};
use super::monitor::Monitor;
use super::qmp::QmpError;
use super::transcript::Transcript;
use super::tsc;
use crate::control::{DeviceKind, State};
use crate::devices::Devices;
use crate::end::EndReason;
use crate::kernel_log::KernelLog;
use crate::machine::{Machine, Watch};
use crate::nic::Plugged;
use crate::packet;
use crate::spec::VmSpec;
use crate::stop::{Stop, chain};
use crate::sys;
use crate::vhost_user::{self, ServeError, Service};

/// What to do about a QEMU that does not work. 7.2 (Debian 12) is the oldest that was tried; microvm without ACPI came with 5.2.
const ADVICE: &str =
    "cloison needs QEMU 7.2 or later with its microvm machine: `apt-get install qemu-system-x86`";

/// Bytes of console or standard error taken at a time.
const CHUNK: usize = 8 << 10;

/// How long a guest may take to boot that is to become a template: far beyond what it takes on a loaded host.
const BOOT_PATIENCE: Duration = Duration::from_secs(60);

/// Why the software engine could not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SoftwareError {
    /// The program cannot be run.
    #[error("cannot run QEMU at {}; {ADVICE}", path.display())]
    Start { path: PathBuf, source: io::Error },
    /// Something QEMU needs could not be made.
    #[error("cannot make what QEMU is connected by")]
    Connect(#[source] io::Error),
    /// A device cannot be served.
    #[error("cannot serve the {device} device to QEMU")]
    Serve {
        device: &'static str,
        source: ServeError,
    },
    /// A guest from a template could not be given its devices.
    #[error("cannot let a guest from a template go; --template=off does without")]
    LetGo(#[source] QmpError),
    /// A device's thread could not be started.
    #[error("cannot start a thread for the {device} device")]
    Thread {
        device: &'static str,
        source: io::Error,
    },
}

/// Our ends of the devices' vhost-user sockets.
pub(crate) struct Sockets {
    fs: UnixStream,
    vsock: UnixStream,
    /// QEMU connects to these.
    nics: Vec<UnixListener>,
}

/// A network device, which stays where it is while what it is connected to comes and goes.
struct Nic {
    mac: MacAddress,
    handle: NetHandle,
    connected: bool,
}

/// A QEMU that has been started; its guest comes to life when its devices are served.
pub(crate) struct Qemu {
    path: PathBuf,
    child: Child,
    pidfd: OwnedFd,
    console: PipeReader,
    stderr: ChildStderr,
    said: Transcript,
    log: KernelLog,
    stop: Stop,
    running: Arc<AtomicBool>,
    /// The guest's.
    pub(super) memory: File,
    /// Of a guest that is saved or loaded.
    monitor: Option<Monitor>,
    /// To the console of a guest that was loaded.
    _input: Option<PipeWriter>,
    vcpus: u8,
    nics: Vec<Nic>,
    paused: bool,
    reaped: bool,
}

impl Qemu {
    /// Starts QEMU, which then waits for the devices, network devices with these addresses among them; must be called on the VM
    /// process's main thread, for QEMU dies with the thread that started it.
    pub(super) fn start(
        spec: &VmSpec,
        start: Start,
        nics: &[MacAddress],
        log: KernelLog,
        stop: Stop,
    ) -> Result<(Self, Sockets), SoftwareError> {
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
        let mut child = spawn(spec, &inherited, start).map_err(|source| SoftwareError::Start {
            path: spec.qemu.clone(),
            source,
        })?;
        let pidfd = sys::pidfd_open(child.id()).map_err(connect)?;
        let missing = || SoftwareError::Connect(io::ErrorKind::BrokenPipe.into());
        let stderr = child.stderr.take().ok_or_else(missing)?;
        for reader in [console.as_fd(), stderr.as_fd()] {
            let nonblocking = FcntlArg::F_SETFL(OFlag::O_NONBLOCK);
            fcntl(reader, nonblocking).map_err(|errno| connect(errno.into()))?;
        }
        let qemu = Self {
            path: spec.qemu.clone(),
            child,
            pidfd,
            console,
            stderr,
            said: Transcript::default(),
            log,
            stop,
            running: Arc::new(AtomicBool::new(false)),
            memory,
            monitor,
            _input: None,
            vcpus: spec.vcpus,
            nics: Vec::new(),
            paused: false,
            reaped: false,
        };
        let nics = listeners;
        Ok((qemu, Sockets { fs, vsock, nics }))
    }

    /// Serves the devices, each on a thread of its own; with that the guest starts.
    pub(crate) fn serve(
        &mut self,
        devices: Devices,
        sockets: Sockets,
    ) -> Result<(), SoftwareError> {
        // QEMU asks about its network devices before it makes any device.
        for (net, listener) in devices.nics.into_iter().zip(sockets.nics) {
            self.nics.push(Nic {
                mac: net.mac(),
                handle: net.handle(),
                connected: net.is_connected(),
            });
            let (qemu, running) = self.of_service()?;
            self.spawn_service("net", move || {
                match vhost_user::accept(&listener, qemu.as_fd())? {
                    Some(socket) => Service::new(Box::new(net), socket, qemu, running)?.run(),
                    // Why QEMU has ended, it says itself.
                    None => Ok(()),
                }
            })?;
        }
        self.serve_device("fs", devices.fs, sockets.fs)?;
        self.serve_device("vsock", devices.vsock, sockets.vsock)?;
        let monitor = self.monitor.take();
        let macs: Vec<_> = self.nics.iter().map(|nic| nic.mac).collect();
        let input = monitor.map(|monitor| monitor.let_go(&macs)).transpose();
        self._input = input.map_err(SoftwareError::LetGo)?;
        Ok(())
    }

    fn serve_device(
        &self,
        name: &'static str,
        device: Box<dyn Device>,
        socket: UnixStream,
    ) -> Result<(), SoftwareError> {
        let (qemu, running) = self.of_service()?;
        let service = Service::new(device, socket, qemu, running);
        let service = service.map_err(|source| SoftwareError::Serve {
            device: name,
            source,
        })?;
        self.spawn_service(name, move || service.run())
    }

    /// What every device's service needs to know of QEMU, and what it tells of it.
    fn of_service(&self) -> Result<(OwnedFd, Arc<AtomicBool>), SoftwareError> {
        let qemu = self.pidfd.try_clone().map_err(SoftwareError::Connect)?;
        Ok((qemu, Arc::clone(&self.running)))
    }

    fn spawn_service(
        &self,
        name: &'static str,
        body: impl FnOnce() -> Result<(), ServeError> + Send + 'static,
    ) -> Result<(), SoftwareError> {
        let thread = self.stop.spawn(name, body);
        thread.map(drop).map_err(|source| SoftwareError::Thread {
            device: name,
            source,
        })
    }

    /// QEMU has ended by itself: reaps it and says what that means.
    fn ended(&mut self) {
        let status = match self.child.wait() {
            Ok(status) => status,
            Err(error) => {
                self.stop.stop(
                    EndReason::EngineFailed,
                    format!("cannot wait for QEMU: {error}"),
                );
                return;
            }
        };
        self.reaped = true;
        // The last words are still in the pipes; they end where QEMU ended.
        while self.read_console() == Took::Something {}
        while self.read_stderr() == Took::Something {}
        let (reason, message) = self.explain(status);
        self.stop.stop(reason, message);
    }

    fn explain(&self, status: ExitStatus) -> (EndReason, String) {
        if !status.success() {
            return (EndReason::EngineFailed, self.complaint(status));
        }
        if let Some(why) = self.log.panic() {
            return (
                EndReason::GuestPanic,
                format!("the guest's kernel panicked: {why}"),
            );
        }
        if self.log.stopped_orderly() {
            return (EndReason::Shutdown, "the guest shut down".into());
        }
        (
            EndReason::GuestReset,
            "the guest was reset without a word".into(),
        )
    }

    /// QEMU failed: how, what it said, and, if it had not got as far as a guest, what to do.
    fn complaint(&self, status: ExitStatus) -> String {
        let how = match status.signal().map(Signal::try_from) {
            Some(Ok(signal)) => format!("was killed by {signal}"),
            Some(Err(_)) => "was killed by a signal".into(),
            None => format!("failed with status {}", status.code().unwrap_or_default()),
        };
        let path = self.path.display();
        let mut message = format!("QEMU ({path}) {how}");
        if !self.running.load(Ordering::Relaxed) && status.signal().is_none() {
            message = format!("{message} before the guest started; {ADVICE}");
        }
        let said = self.said.tail();
        if !said.is_empty() {
            message = format!("{message}; it said:\n{said}");
        }
        message
    }

    fn signal(&self, signal: Signal) -> Result<(), String> {
        if self.reaped {
            return Err("QEMU has ended".into());
        }
        // It is our child and has not been waited for, so that its ID is still its own.
        let sent = kill(Pid::from_raw(self.child.id() as i32), signal);
        sent.map_err(|errno| format!("cannot send {signal} to QEMU: {errno}"))
    }

    /// The means of saving or loading the guest, which one that just boots lacks.
    pub(super) fn monitor(&mut self) -> io::Result<&mut Monitor> {
        let monitor = self.monitor.as_mut();
        monitor.ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Waits until the guest has written `line` to its console; before the main loop watches that.
    pub(super) fn await_line(&mut self, line: &str) -> io::Result<()> {
        let line = format!("{line}\n");
        let deadline = Instant::now() + BOOT_PATIENCE;
        while !self.log.tail(CHUNK).contains(&line) {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = PollTimeout::try_from(left).map_err(io::Error::other)?;
            let mut fds = [PollFd::new(self.console.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, left) {
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            if self.read_console() == Took::End {
                while self.read_stderr() == Took::Something {}
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }

    fn read_console(&mut self) -> Took {
        take_some(&mut self.console, |bytes| self.log.push(bytes))
    }

    fn read_stderr(&mut self) -> Took {
        take_some(&mut self.stderr, |bytes| {
            tracing::debug!("QEMU: {}", String::from_utf8_lossy(bytes).trim_end());
            self.said.push(bytes);
        })
    }
}

impl Machine for Qemu {
    fn watched(&self) -> Vec<BorrowedFd<'_>> {
        vec![
            self.pidfd.as_fd(),
            self.console.as_fd(),
            self.stderr.as_fd(),
        ]
    }

    fn ready(&mut self, index: usize) -> Watch {
        match index {
            0 => {
                self.ended();
                Watch::Drop
            }
            1 => self.read_console().into(),
            _ => self.read_stderr().into(),
        }
    }

    fn state(&self) -> State {
        match self.running.load(Ordering::Relaxed) {
            _ if self.paused => State::Paused,
            true => State::Running,
            false => State::Starting,
        }
    }

    fn pids(&self) -> Vec<u32> {
        if self.reaped {
            Vec::new()
        } else {
            vec![self.child.id()]
        }
    }

    fn vcpus(&self) -> u8 {
        self.vcpus
    }

    fn max_vcpus(&self) -> u8 {
        self.vcpus
    }

    fn pause(&mut self) -> Result<(), String> {
        self.signal(Signal::SIGSTOP)?;
        self.paused = true;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), String> {
        self.signal(Signal::SIGCONT)?;
        self.paused = false;
        Ok(())
    }

    fn hot_memory_mib(&self) -> u32 {
        0
    }

    fn resize_vcpus(&mut self, _vcpus: u8) -> Result<(), String> {
        Err("a VM on the software engine keeps the vCPUs it was started with".into())
    }

    fn resize_hot_memory(&mut self, _mib: u32) -> Result<(), String> {
        Err("a VM on the software engine keeps the memory it was started with".into())
    }

    fn nics(&self) -> Vec<Plugged> {
        let nics = (0..).zip(&self.nics).filter(|(_, nic)| nic.connected);
        nics.map(|(slot, nic)| nic.plugged(slot)).collect()
    }

    fn plug(&mut self, kind: DeviceKind, file: Option<OwnedFd>) -> Result<Plugged, String> {
        let (DeviceKind::Net { mac }, Some(tap)) = (kind, file) else {
            return Err("a VM on the software engine keeps the devices it was started with".into());
        };
        let count = self.nics.len();
        let mut spare = (0..).zip(&mut self.nics).filter(|(_, nic)| !nic.connected);
        let (slot, nic) = spare.next().ok_or_else(|| {
            format!(
                "a VM on the software engine has no more network interfaces than it was started for, and this one was started for {count}"
            )
        })?;
        let connected = nic.handle.connect(tap, mac);
        connected.map_err(|error| chain(&error))?;
        nic.connected = true;
        Ok(nic.plugged(slot))
    }

    fn unplug(&mut self, slot: u32) -> Result<(), String> {
        let nic = self.nics.get_mut(slot as usize).filter(|nic| nic.connected);
        let nic = nic.ok_or_else(|| format!("there is no network interface in slot {slot}"))?;
        nic.handle.disconnect();
        nic.connected = false;
        Ok(())
    }

    fn end(&mut self) {
        if self.reaped {
            return;
        }
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait().map(drop)) {
            tracing::error!("cannot end QEMU: {error}");
        }
        self.reaped = true;
    }
}

impl Nic {
    fn plugged(&self, slot: u32) -> Plugged {
        Plugged {
            slot,
            present: Some(self.mac),
        }
    }
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

impl Drop for Qemu {
    fn drop(&mut self) {
        self.end();
    }
}

/// What came of reading from QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Took {
    Something,
    Nothing,
    /// There will never be more.
    End,
}

impl From<Took> for Watch {
    fn from(took: Took) -> Self {
        match took {
            Took::Something | Took::Nothing => Self::Keep,
            Took::End => Self::Drop,
        }
    }
}

/// Takes what is there, at most [`CHUNK`] bytes.
fn take_some(from: &mut impl Read, take: impl FnOnce(&[u8])) -> Took {
    let mut chunk = [0; CHUNK];
    match from.read(&mut chunk) {
        Ok(0) => Took::End,
        Ok(length) => {
            take(&chunk[..length]);
            Took::Something
        }
        Err(error) => match error.kind() {
            io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => Took::Nothing,
            _ => Took::End,
        },
    }
}

/// Guest memory, all zeroes. Its size is final: who maps it may rely on that.
fn guest_memory(spec: &VmSpec) -> io::Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let memory = File::from(memfd_create(c"cloison-guest", flags)?);
    memory.set_len(u64::from(spec.memory_mib) << 20)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&memory, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(memory)
}

/// An empty file in memory.
pub(super) fn memory_file(name: &CStr) -> io::Result<File> {
    Ok(memfd_create(name, MFdFlags::MFD_CLOEXEC)?.into())
}

fn spawn(spec: &VmSpec, inherited: &Inherited, start: Start) -> io::Result<Child> {
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
    // SAFETY: called with descriptors that the caller of `spawn` owns, and copies of which this forked process holds.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(())
}
