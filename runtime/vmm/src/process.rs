//! The life of a VM process, from taking what it was given to its last word: it opens all it needs, starts the engine, locks
//! itself in, and then does nothing but wait for the guest's end and answer the control socket.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::str::FromStr;

use cloison_devices::{Net, VsockHandle};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::read;
use tracing::level_filters::LevelFilter;

use crate::control::{DeviceKind, Host, Server, Status};
use crate::devices::{Devices, DevicesError, make_devices};
use crate::end::{self, End, EndReason};
use crate::handoff::{self, Handoff};
use crate::kernel_log::KernelLog;
use crate::kvm::{self, KvmError};
use crate::lock_in::lock_in;
use crate::machine::{Machine, Watch};
use crate::nic::Plugged;
use crate::software::{self, SoftwareError};
use crate::spec::{Engine, VmSpec};
use crate::stop::{Stop, Verdict, chain, panic_text};
use crate::timeline::{Timeline, monotonic};

/// Lines of kernel log in the last word.
const LOG_LINES: usize = 24;

/// Descriptors for which the process's table has room from the start.
const DESCRIPTORS: RawFd = 1024;

/// Most events taken from one wait.
const EVENTS: usize = 16;

/// Epoll keys: the process's own, then the engine's from [`MACHINE`] on, then clients by their descriptors from [`CLIENT`] on.
const BELL: u64 = 0;
const CONTROL: u64 = 1;
const OWNER: u64 = 2;
const MACHINE: u64 = 16;
const CLIENT: u64 = 1 << 32;

/// Why a VM could not be started, or not be watched.
#[derive(Debug, thiserror::Error)]
enum ProcessError {
    #[error(transparent)]
    Devices(#[from] DevicesError),
    #[error(transparent)]
    Software(#[from] SoftwareError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error("cannot {what}")]
    System {
        what: &'static str,
        source: io::Error,
    },
}

fn system<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> ProcessError {
    move |error| ProcessError::System {
        what,
        source: error.into(),
    }
}

/// The body of a VM process: what the executable runs when `argv[0]` is [`crate::VM_PROCESS_NAME`].
pub fn vm_main() -> ExitCode {
    let process = monotonic();
    // The program was run through a link named "exe", which says nothing to whoever looks at a list of processes.
    if let Err(errno) = prctl::set_name(c"cloison-vm") {
        eprintln!("cloison-vm: cannot set the process's name: {errno}");
    }
    let handoff = match handoff::receive(io::stdin()) {
        Ok(handoff) => handoff,
        Err(error) => {
            eprintln!("cloison-vm: {error} (only cloison itself can start this program)");
            return ExitCode::FAILURE;
        }
    };
    log_to_stderr(&handoff.log_level);
    // The guest's open files are descriptors of this process.
    if let Err(errno) = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most))
    {
        tracing::warn!("cannot raise the number of open files to its limit: {errno}");
    }
    // A table that grows while there are threads waits for a grace period of the kernel's (fs/file.c): some milliseconds, in the
    // midst of a guest's start. One that has been large stays so.
    match fcntl(&handoff.end, FcntlArg::F_DUPFD_CLOEXEC(DESCRIPTORS - 1)) {
        // SAFETY: fcntl has just made this descriptor, and nothing else knows of it.
        Ok(last) => drop(unsafe { OwnedFd::from_raw_fd(last) }),
        Err(errno) => tracing::debug!("cannot make room for {DESCRIPTORS} descriptors: {errno}"),
    }
    let Handoff {
        spec,
        shared,
        end,
        control,
        vsock,
        owner,
        attachments,
        nics,
        ..
    } = handoff;
    let log = KernelLog::default();
    let run = || {
        let stop = Stop::new().map_err(system("make the main loop's bell"))?;
        // An engine that can add devices makes them when they are needed.
        let spares = match spec.engine {
            Engine::Software => spec.spare_nics,
            Engine::Kvm => 0,
        };
        let (devices, vsock) = make_devices(&shared, vsock, attachments, nics, spares)?;
        let (machine, timeline) = start(&spec, devices, &log, &stop)?;
        let vm = Vm {
            spec,
            timeline: Timeline {
                process,
                ..timeline
            },
            machine,
            vsock,
            log: log.clone(),
            stop,
        };
        vm.watch(Server::new(control), owner)
    };
    let (reason, message) = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(verdict)) => (verdict.reason, verdict.message),
        Ok(Err(error)) => (EndReason::EngineFailed, chain(&error)),
        Err(panic) => {
            let message = format!("the VM process panicked: {}", panic_text(&*panic));
            (EndReason::EngineFailed, message)
        }
    };
    let last_word = End {
        reason,
        message,
        kernel_log_tail: log.last_lines(LOG_LINES),
    };
    if let Err(error) = end::write(end, &last_word) {
        tracing::error!("cannot write the VM's last word: {error}");
        return ExitCode::FAILURE;
    }
    match reason {
        EndReason::Shutdown | EndReason::Killed => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn log_to_stderr(level: &str) {
    let level = LevelFilter::from_str(level).unwrap_or(LevelFilter::INFO);
    // Fails only where a log has been set up before, which then is the one.
    let _ = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(io::stderr)
        .with_ansi(false)
        .try_init();
}

/// Starts the spec's engine with our devices, and says when it let the guest go. The process locks itself in when all is there
/// and the guest is not yet.
fn start(
    spec: &VmSpec,
    devices: Devices,
    log: &KernelLog,
    stop: &Stop,
) -> Result<(Box<dyn Machine>, Timeline), ProcessError> {
    let lock_in = || lock_in().map_err(system("give up what a VM process does not need"));
    match spec.engine {
        Engine::Software => {
            let nics: Vec<_> = devices.nics.iter().map(Net::mac).collect();
            let begun = software::start(spec, &nics, log, stop)?;
            lock_in()?;
            let timeline = begun.timeline();
            let (mut qemu, sockets) = begun.guest;
            qemu.serve(devices, sockets)?;
            Ok((Box::new(qemu), timeline))
        }
        Engine::Kvm => {
            let begun = kvm::start(spec, devices.nics.len(), log, stop)?;
            lock_in()?;
            let timeline = begun.timeline();
            let mut machine = begun.guest;
            machine.serve(devices)?;
            Ok((Box::new(machine), timeline))
        }
    }
}

/// A VM that runs, as its own process's main loop sees it.
struct Vm {
    spec: VmSpec,
    timeline: Timeline,
    machine: Box<dyn Machine>,
    vsock: VsockHandle,
    log: KernelLog,
    stop: Stop,
}

impl Vm {
    /// Serves the control socket until there is a verdict, and carries it out.
    fn watch(
        mut self,
        mut server: Server,
        owner: Option<OwnedFd>,
    ) -> Result<Verdict, ProcessError> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(system("make an epoll"))?;
        let watch = |fd: BorrowedFd<'_>, key, flags| {
            let event = EpollEvent::new(flags, key);
            epoll.add(fd, event).map_err(system("watch a descriptor"))
        };
        watch(self.stop.bell(), BELL, EpollFlags::EPOLLIN)?;
        watch(
            server.listener(),
            CONTROL,
            EpollFlags::EPOLLIN | EpollFlags::EPOLLET,
        )?;
        if let Some(owner) = &owner {
            watch(owner.as_fd(), OWNER, EpollFlags::EPOLLIN)?;
        }
        for (key, fd) in (MACHINE..).zip(self.machine.watched()) {
            watch(fd, key, EpollFlags::EPOLLIN)?;
        }

        let mut events = [EpollEvent::empty(); EVENTS];
        loop {
            let ready = match epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(ready) => ready,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(system("wait for events")(errno)),
            };
            for event in events.iter().take(ready) {
                match event.data() {
                    BELL => {}
                    CONTROL => server.accept(&mut self, |client| {
                        let key = CLIENT | client.as_raw_fd() as u64;
                        Ok(epoll.add(client, EpollEvent::new(EpollFlags::EPOLLIN, key))?)
                    }),
                    OWNER => self.check_on_owner(owner.as_ref()),
                    client @ CLIENT.. => server.serve((client & !CLIENT) as RawFd, &mut self),
                    of_machine => {
                        let index = (of_machine - MACHINE) as usize;
                        if self.machine.ready(index) == Watch::Drop
                            && let Some(fd) = self.machine.watched().get(index)
                        {
                            epoll
                                .delete(fd)
                                .map_err(system("stop watching a descriptor"))?;
                        }
                    }
                }
            }
            if let Some(verdict) = self.stop.verdict() {
                let verdict = verdict.clone();
                self.machine.end();
                return Ok(verdict);
            }
        }
    }

    fn check_on_owner(&self, owner: Option<&OwnedFd>) {
        let Some(owner) = owner else { return };
        match read(owner, &mut [0; 64]) {
            Ok(0) => self.stop.stop(
                EndReason::OwnerGone,
                "the process that the VM belonged to is gone",
            ),
            // Whatever an owner may write, it is alive.
            Ok(_) | Err(Errno::EINTR | Errno::EAGAIN) => {}
            Err(errno) => {
                let message = format!("cannot tell whether the VM's owner lives: {errno}");
                self.stop.stop(EndReason::OwnerGone, message);
            }
        }
    }
}

impl Host for Vm {
    fn status(&self) -> Status {
        let now = monotonic();
        let output = self.vsock.first_output().map(|first| {
            let ago = u64::try_from(first.elapsed().as_nanos()).unwrap_or(u64::MAX);
            now.saturating_sub(ago)
        });
        Status {
            id: self.spec.id.clone(),
            engine: self.spec.engine,
            state: self.machine.state(),
            pid: std::process::id(),
            engine_pids: self.machine.pids(),
            uptime_ms: now.saturating_sub(self.timeline.process) / 1_000_000,
            timeline: Timeline {
                output,
                ..self.timeline
            },
            memory_mib: self.spec.memory_mib + self.machine.hot_memory_mib(),
            min_memory_mib: self.spec.memory_mib,
            max_memory_mib: self.spec.max_memory_mib,
            vcpus: self.machine.vcpus(),
            max_vcpus: self.machine.max_vcpus(),
            nics: self.machine.nics(),
        }
    }

    fn attach(
        &mut self,
        read: Option<OwnedFd>,
        write: Option<OwnedFd>,
        done: Option<OwnedFd>,
    ) -> Result<u32, String> {
        self.vsock
            .attach_any(read, write, done)
            .map_err(|error| chain(&error))
    }

    fn detach(&mut self, port: u32) {
        self.vsock.detach(port);
    }

    fn pause(&mut self) -> Result<(), String> {
        self.machine.pause()
    }

    fn resume(&mut self) -> Result<(), String> {
        self.machine.resume()
    }

    fn resize_vcpus(&mut self, vcpus: u8) -> Result<(), String> {
        self.machine.resize_vcpus(vcpus)
    }

    fn resize_memory(&mut self, mib: u32, done: Option<OwnedFd>) -> Result<(), String> {
        let (least, most) = (self.spec.memory_mib, self.spec.max_memory_mib);
        if !(least..=most).contains(&mib) {
            return Err(format!(
                "this VM can have {least} to {most} MiB of memory, not {mib}"
            ));
        }
        self.machine.resize_hot_memory(mib - least, done)
    }

    fn plug(&mut self, device: DeviceKind, file: Option<OwnedFd>) -> Result<Plugged, String> {
        self.machine.plug(device, file)
    }

    fn unplug(&mut self, slot: u32) -> Result<(), String> {
        self.machine.unplug(slot)
    }

    fn kernel_log(&self, limit: usize) -> String {
        self.log.tail(limit)
    }

    fn kill(&mut self) {
        self.stop
            .stop(EndReason::Killed, "the VM was killed on request");
    }
}
