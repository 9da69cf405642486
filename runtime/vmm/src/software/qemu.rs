//! The QEMU process as the VM it is: joined by its devices when they are there, watched, and seen to its end.

use std::fs::File;
use std::io::{self, PipeWriter};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cloison_devices::{Device, MacAddress, NetHandle};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::command::Start;
use super::monitor::Monitor;
use super::output::Output;
use super::qmp::QmpError;
use super::spawn::{Sockets, Spawned, spawn};
use crate::control::{DeviceKind, State};
use crate::devices::Devices;
use crate::end::EndReason;
use crate::kernel_log::KernelLog;
use crate::machine::{Machine, Watch};
use crate::nic::Plugged;
use crate::spec::VmSpec;
use crate::stop::{Stop, chain};
use crate::vhost_user::{self, ServeError, Service};

/// What to do about a QEMU that does not work. 7.2 (Debian 12) is the oldest that was tried; microvm without ACPI came with 5.2.
const ADVICE: &str =
    "cloison needs QEMU 7.2 or later with its microvm machine: `apt-get install qemu-system-x86`";

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
    output: Output,
    stop: Stop,
    running: Arc<AtomicBool>,
    /// The guest's.
    pub(super) memory: File,
    /// Of a guest that is saved or loaded.
    monitor: Option<Monitor>,
    /// To the console of a guest that was loaded.
    _input: Option<PipeWriter>,
    vcpus: u8,
    max_vcpus: u8,
    /// What the guest may have beyond what it was started with, MiB.
    hot_memory_mib: u32,
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
        let Spawned {
            child,
            pidfd,
            console,
            stderr,
            memory,
            monitor,
            sockets,
        } = spawn(spec, start, nics)?;
        let qemu = Self {
            path: spec.qemu.clone(),
            child,
            pidfd,
            output: Output::new(console, stderr, log).map_err(SoftwareError::Connect)?,
            stop,
            running: Arc::new(AtomicBool::new(false)),
            memory,
            monitor,
            _input: None,
            vcpus: spec.vcpus,
            max_vcpus: spec.max_vcpus,
            hot_memory_mib: 0,
            nics: Vec::new(),
            paused: false,
            reaped: false,
        };
        Ok((qemu, sockets))
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
        self.output.drain();
        let (reason, message) = self.explain(status);
        self.stop.stop(reason, message);
    }

    fn explain(&self, status: ExitStatus) -> (EndReason, String) {
        if !status.success() {
            return (EndReason::EngineFailed, self.complaint(status));
        }
        if let Some(why) = self.output.log().panic() {
            return (
                EndReason::GuestPanic,
                format!("the guest's kernel panicked: {why}"),
            );
        }
        if self.output.log().stopped_orderly() {
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
        let said = self.output.said();
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

    /// Waits until the guest has written `line` to its console; before the main loop watches that.
    pub(super) fn await_line(&mut self, line: &str) -> io::Result<()> {
        self.output.await_line(line)
    }

    /// The means of saving or loading the guest, which one that just boots lacks.
    pub(super) fn monitor(&mut self) -> io::Result<&mut Monitor> {
        let monitor = self.monitor.as_mut();
        monitor.ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl Machine for Qemu {
    fn watched(&self) -> Vec<BorrowedFd<'_>> {
        vec![
            self.pidfd.as_fd(),
            self.output.console(),
            self.output.stderr(),
        ]
    }

    fn ready(&mut self, index: usize) -> Watch {
        match index {
            0 => {
                self.ended();
                Watch::Drop
            }
            1 => self.output.read_console().into(),
            _ => self.output.read_stderr().into(),
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
        self.max_vcpus
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
        self.hot_memory_mib
    }

    // The guest has had them all from its start, and they wait there.
    fn resize_vcpus(&mut self, vcpus: u8) -> Result<(), String> {
        if !(1..=self.max_vcpus).contains(&vcpus) {
            let most = self.max_vcpus;
            return Err(format!("this VM can have 1 to {most} vCPUs, not {vcpus}"));
        }
        self.vcpus = vcpus;
        Ok(())
    }

    // It has been there from its start, too; what of it the guest has touched does not come back.
    fn resize_hot_memory(&mut self, mib: u32, _done: Option<OwnedFd>) -> Result<(), String> {
        self.hot_memory_mib = self.hot_memory_mib.max(mib);
        Ok(())
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

impl Drop for Qemu {
    fn drop(&mut self) {
        self.end();
    }
}
