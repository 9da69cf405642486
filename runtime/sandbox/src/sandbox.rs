//! A sandbox's directory and what lives in it. The directory is the journal: it exists before anything it names does, so whoever
//! finds it can end the VM process and remove every trace, whatever was killed at whatever moment.
//!
//! ```text
//! sandboxes/<id>/
//!   control.sock  the VM process's control socket
//!   vsock.sock    connections to the guest
//!   vsock.sock_<port>  a socket of the host that the guest may connect to
//!   vm.pid        the VM process, as long as control.sock accepts connections
//!   shared/       all of the host that the guest sees
//!   end.json      why the VM ended
//! ```

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cloison_agent_api::AGENT_PORT;
use cloison_vmm::{
    Attachment, CONTROL_SOCKET, ControlClient, ControlError, End, EndReason, Launch, Nic, Timeline,
    VM_PROCESS_NAME, VSOCK_SOCKET, VmProcess, VmSpec, launch, read_end,
};
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{Pid, pipe2};
use tokio::io::unix::AsyncFd;

use crate::{
    Agent, AgentError, Error, Failure, Home, Id, Shared, Source, Streams, VmSize, Wiring, host,
    mounts, shared,
};

/// How long a VM process that was told to end may take before it is killed, milliseconds.
const END_TIMEOUT_MS: u16 = 5_000;

/// The host's vsock ports for sockets that are offered to the guest begin here. Those of an init's streams are below, of execs' far above.
const FIRST_SOCKET_PORT: u32 = 3000;
/// Most sockets of the host that one sandbox is offered.
pub const MAX_SOCKETS: u32 = 64;

/// How long an orderly shutdown of a guest may take before its VM is ended without.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the end of a VM may take to show after its agent was lost.
const LOST_TIMEOUT: Duration = Duration::from_secs(5);

/// A sandbox's place on disk; whether its VM runs is for the VM process to say.
#[derive(Debug, Clone)]
pub struct Sandbox {
    id: Id,
    dir: PathBuf,
}

/// A VM that this process has launched, and that ends with it.
pub struct Running {
    process: VmProcess,
    exited: AsyncFd<OwnedFd>,
    agent: Agent,
    control: Arc<ControlClient>,
    // The VM process kills its VM when the last copy of this is closed, however this process ends.
    _owner: OwnedFd,
}

impl Sandbox {
    /// Makes a new sandbox's directory.
    ///
    /// # Errors
    /// [`Error::Exists`], or when the run directory cannot be written.
    pub fn create(home: &Home, id: &Id) -> Result<Self, Error> {
        let sandbox = Self::open(home, id);
        let parent = home.sandboxes();
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(&parent)
            .map_err(Error::path("create the directory", &parent))?;
        // The root of a container with a user namespace is somebody else in the guest, who has to pass through the shared directory.
        for (dir, mode) in [(&sandbox.dir, 0o700), (&sandbox.shared(), 0o711)] {
            fs::DirBuilder::new()
                .mode(mode)
                .create(dir)
                .map_err(|e| match e.kind() {
                    io::ErrorKind::AlreadyExists => Error::Exists { id: id.to_string() },
                    _ => Error::path("create the directory", dir)(e),
                })?;
        }
        Ok(sandbox)
    }

    /// Names a sandbox that may or may not exist.
    pub fn open(home: &Home, id: &Id) -> Self {
        Self {
            id: id.clone(),
            dir: home.sandbox(id),
        }
    }

    /// The sandbox's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn pid_file(&self) -> PathBuf {
        self.dir.join("vm.pid")
    }

    fn shared(&self) -> PathBuf {
        self.dir.join("shared")
    }

    /// Makes a container's part of the shared directory. To be called once, by a process that has a mount namespace of its own
    /// ([`enter_private_namespace`](crate::enter_private_namespace)).
    ///
    /// # Errors
    /// When it exists or cannot be written.
    pub fn share(&self, container: &Id) -> Result<Shared, Error> {
        mounts::attach(&self.shared())?;
        Shared::create(&self.shared(), &shared::guest_base(None), container)
    }

    /// As [`Sandbox::share`], for a sandbox without a VM, whose container is going to be in that of another ([`Sandbox::show`]). To be
    /// called in the mount namespace of the other's processes.
    ///
    /// # Errors
    /// As for [`Sandbox::share`].
    pub fn share_elsewhere(&self, container: &Id, place: &Id) -> Result<Shared, Error> {
        mounts::attach(&self.shared())?;
        Shared::create(&self.shared(), &shared::guest_base(Some(place)), container)
    }

    /// Shows the guest, which runs, all that `other` shares, and so `shared`, at a place that has not been used before: the guest may remember for a while
    /// what it has found at another. All at once, since the guest may change what it sees. To be called in the mount namespace of
    /// this sandbox's processes.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub fn show(&self, other: &Self, shared: &mut Shared, place: &Id) -> Result<(), Error> {
        let place = self.shared().join(place.as_str());
        fs::DirBuilder::new()
            .mode(0o711)
            .create(&place)
            .map_err(Error::path("create the directory", &place))?;
        mounts::move_to(&other.shared(), &place)?;
        shared.has_moved(&place);
        Ok(())
    }

    /// Takes away from the guest what [`Sandbox::show`] and [`Sandbox::offer`] have given it for `place`. Of a sandbox that is gone, all has
    /// been taken away already. To be called in the host's mount namespace; `monitor` is a process in that of the sandbox's.
    ///
    /// # Errors
    /// Naming what could not be taken away.
    pub fn withdraw(&self, other: &Self, place: &Id, monitor: Option<i32>) -> Result<(), Error> {
        let shown = self.shared().join(place.as_str());
        let ports = FIRST_SOCKET_PORT..FIRST_SOCKET_PORT + MAX_SOCKETS;
        let sockets = ports.map(|port| self.socket_place(port));
        // What is mounted on the file hides its content from the sandbox's processes only.
        let sockets: Vec<PathBuf> = sockets
            .filter(|file| fs::read(file).is_ok_and(|owner| owner == place.as_str().as_bytes()))
            .collect();
        if let Some(monitor) = monitor {
            let mut mounted = sockets.clone();
            mounted.extend([shown.clone(), other.shared()]);
            mounts::detach_within(monitor, &mounted)?;
        }
        for file in sockets {
            fs::remove_file(&file).map_err(Error::path("remove", &file))?;
        }
        cloison_image::remove_tree(&shown).map_err(Error::path("remove the directory", &shown))
    }

    /// Shows the guest, which runs, a file or directory of the host, at a place that has not been used before, for as long as the answer lives. To
    /// be called in the host's mount namespace; `monitor` is a process in that of the sandbox's.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub fn lend(&self, source: Source, monitor: i32) -> Result<Lent, Error> {
        let name = Id::random().map_err(Error::system("make an ID"))?;
        let lent = Lent {
            // Where the guest cannot put anything in the way.
            made: self.dir.join(name.as_str()),
            shown: self.shared().join(name.as_str()),
            in_guest: shared::guest_base(Some(&name)),
            monitor,
        };
        for place in [&lent.made, &lent.shown] {
            source.make_place(place)?;
        }
        mounts::bind_within(monitor, source, &lent.made, &lent.shown)?;
        Ok(lent)
    }

    /// Lets the guest reach a socket that listens on the host, on behalf of `owner`, and nothing else by this: gives the host's vsock port
    /// on which it does. The VM process connects to the socket by itself. To be called in the mount namespace of the sandbox's
    /// processes.
    ///
    /// # Errors
    /// When the socket cannot be bound below the sandbox's directory, or there are [`MAX_SOCKETS`] already.
    pub fn offer(&self, socket: Source, owner: &Id) -> Result<u32, Error> {
        for port in FIRST_SOCKET_PORT..FIRST_SOCKET_PORT + MAX_SOCKETS {
            let place = self.socket_place(port);
            let failed = || Error::path("offer to the guest a socket at", &place);
            match File::create_new(&place) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                file => file
                    .and_then(|mut file| file.write_all(owner.as_str().as_bytes()))
                    .map_err(failed())?,
            }
            socket.bind_over(&place)?;
            return Ok(port);
        }
        let full = io::Error::other("a sandbox can be offered no more sockets");
        Err(Error::path(
            "offer to the guest one more socket below",
            &self.dir,
        )(full))
    }

    fn socket_place(&self, port: u32) -> PathBuf {
        self.dir.join(format!("{VSOCK_SOCKET}_{port}"))
    }

    /// Where a container's root file system is mounted, for the processes of this sandbox.
    pub fn rootfs_on_host(&self, container: &Id) -> PathBuf {
        shared::rootfs(&self.shared(), container)
    }

    /// Starts the VM with `streams` ready for the first container's init, and with the interfaces of `nics`
    /// ([`Network::early`](crate::Network::early)). Calls to the agent may be made at once; they are
    /// answered when the guest is up.
    ///
    /// # Errors
    /// When the VM process cannot be started.
    pub fn launch(
        &self,
        spec: VmSpec,
        streams: Streams,
        nics: Vec<Nic>,
    ) -> Result<(Running, Wiring), Error> {
        let (wiring, mut attachments) = streams.into_attachments()?;
        let (ours, theirs) = UnixStream::pair().map_err(Error::system("create a socket pair"))?;
        theirs
            .set_nonblocking(true)
            .map_err(Error::system("set up the connection to the agent"))?;
        let theirs = OwnedFd::from(theirs);
        attachments.push(Attachment {
            port: AGENT_PORT,
            read: Some(
                theirs
                    .try_clone()
                    .map_err(Error::system("duplicate a socket"))?,
            ),
            write: Some(theirs),
            done: None,
        });
        let (watched, owner) = pipe2(OFlag::O_CLOEXEC)
            .map_err(io::Error::from)
            .map_err(Error::system("create a pipe"))?;
        let debugging = tracing::enabled!(tracing::Level::DEBUG).then(|| {
            let stderr = io::stderr().as_fd().try_clone_to_owned();
            stderr.map_err(Error::system("duplicate standard error"))
        });
        let process = launch(Launch {
            spec,
            dir: &self.dir,
            shared: &self.shared(),
            attachments,
            nics,
            owner: Some(watched),
            log: debugging.transpose()?,
        })
        .map_err(Error::Launch)?;
        let pid_file = self.pid_file();
        fs::write(&pid_file, process.pid().to_string()).map_err(Error::path("write", &pid_file))?;
        let exited = process
            .pidfd()
            .try_clone_to_owned()
            .and_then(host::watch)
            .map_err(Error::system("watch the VM process"))?;
        let running = Running {
            process,
            exited,
            agent: Agent::over(ours)
                .map_err(Error::system("set up the connection to the agent"))?,
            control: Arc::new(self.control()?),
            _owner: owner,
        };
        Ok((running, wiring))
    }

    /// The VM's size.
    ///
    /// # Errors
    /// When the VM process does not run or does not answer.
    pub fn size(&self) -> Result<VmSize, Error> {
        let status = self.control()?.status();
        let status = status.map_err(|source| Error::Control {
            what: "ask the VM for its size",
            source,
        })?;
        Ok(VmSize {
            memory_mib: status.memory_mib,
            vcpus: status.vcpus,
        })
    }

    /// Connects to the VM process.
    ///
    /// # Errors
    /// When it does not run.
    pub fn control(&self) -> Result<ControlClient, Error> {
        ControlClient::connect(&self.dir.join(CONTROL_SOCKET)).map_err(|source| Error::Control {
            what: "reach the VM",
            source,
        })
    }

    /// How far the VM has come, and when.
    ///
    /// # Errors
    /// When the VM process does not run or does not answer.
    pub fn timeline(&self) -> Result<Timeline, Error> {
        let status = self.control()?.status();
        let status = status.map_err(|source| Error::Control {
            what: "ask the VM how far it has come",
            source,
        })?;
        Ok(status.timeline)
    }

    /// Connects to the agent of a running VM.
    ///
    /// # Errors
    /// When the VM does not run or its agent does not listen.
    pub fn connect_agent(&self) -> Result<Agent, Error> {
        let path = self.dir.join(VSOCK_SOCKET);
        let failed = || Error::path("connect to the guest through", &path);
        // By way of a descriptor: the path itself may be longer than a socket's address can be.
        let dir = File::open(&self.dir).map_err(failed())?;
        let near = format!("/proc/self/fd/{}/{VSOCK_SOCKET}", dir.as_raw_fd());
        let mut stream = UnixStream::connect(near).map_err(failed())?;
        writeln!(stream, "CONNECT {AGENT_PORT}").map_err(failed())?;
        let mut reader = BufReader::with_capacity(64, &stream);
        let mut answer = String::new();
        reader.read_line(&mut answer).map_err(failed())?;
        if !answer.starts_with("OK ") {
            return Err(failed()(io::Error::other(format!(
                "the guest refused the connection: {}",
                answer.trim_end().trim_start_matches("ERR ")
            ))));
        }
        Agent::over(stream).map_err(failed())
    }

    /// Why the VM ended; `None` while it runs or when it never started.
    ///
    /// # Errors
    /// When the report cannot be read.
    pub fn end(&self) -> Result<Option<End>, Error> {
        read_end(&self.dir).map_err(Error::EndFile)
    }

    /// Ends the VM, whoever launched it, waits until its process is gone, and takes away what was mounted for it.
    ///
    /// # Errors
    /// When the process survives a SIGKILL, or a mount cannot be taken away.
    pub fn kill(&self) -> Result<(), Error> {
        let process = self.process();
        // Nobody listens on the socket of a VM process that ends.
        if let Ok(control) = self.control() {
            self.end_process(&control)?;
        }
        if let Some(process) = process
            && !is_over(process.as_fd(), PollFlags::POLLIN, END_TIMEOUT_MS)?
        {
            return Err(not_ended());
        }
        // The mounts are for the sandbox's own processes, of which the caller may be one.
        mounts::detach(&self.shared())
    }

    /// The VM process, if it has not ended.
    fn process(&self) -> Option<OwnedFd> {
        let pid: i32 = fs::read_to_string(self.pid_file()).ok()?.parse().ok()?;
        let process = host::pidfd(Pid::from_raw(pid)).ok()?;
        // Its pid may be another's by now.
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let ours = if command.is_empty() {
            // One that has given its memory back and is not gone yet has no command line any more, but its name.
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            name.trim_end() == VM_PROCESS_NAME
        } else {
            let mut words = command.split(|byte| *byte == 0);
            words.any(|word| word == self.id.as_str().as_bytes())
        };
        ours.then_some(process)
    }

    fn end_process(&self, control: &ControlClient) -> Result<(), Error> {
        // One that does not answer is killed below.
        let asked = control.kill();
        if asked.is_ok() && hung_up(control, END_TIMEOUT_MS)? {
            return Ok(());
        }
        // The pid is right, for the process still held its socket a moment ago.
        let pid = fs::read_to_string(self.pid_file()).ok();
        if let Some(pid) = pid.and_then(|pid| pid.parse().ok()) {
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(pid),
                nix::sys::signal::Signal::SIGKILL,
            );
        }
        match hung_up(control, END_TIMEOUT_MS)? {
            true => Ok(()),
            false => Err(not_ended()),
        }
    }

    /// Ends the VM if it runs and removes the sandbox's directory; a sandbox that does not exist is removed already.
    ///
    /// # Errors
    /// When something of it cannot be removed.
    pub fn remove(&self) -> Result<(), Error> {
        self.kill()?;
        // What is mounted below is mounted for the sandbox's own processes, of which the caller may be one.
        mounts::detach(&self.shared())?;
        cloison_image::remove_tree(&self.dir)
            .map_err(Error::path("remove the directory", &self.dir))
    }

    /// The sandbox's ID.
    pub fn id(&self) -> &Id {
        &self.id
    }
}

fn not_ended() -> Error {
    Error::system("end the VM process")(io::ErrorKind::TimedOut.into())
}

fn hung_up(control: &ControlClient, timeout_ms: u16) -> Result<bool, Error> {
    is_over(control.as_fd(), PollFlags::empty(), timeout_ms)
}

/// Waits for one of these events of a descriptor, or its hanging up.
fn is_over(fd: BorrowedFd<'_>, events: PollFlags, timeout_ms: u16) -> Result<bool, Error> {
    let mut fds = [PollFd::new(fd, events)];
    let ready = poll(&mut fds, PollTimeout::from(timeout_ms))
        .map_err(io::Error::from)
        .map_err(Error::system("wait for the VM process"))?;
    Ok(ready > 0)
}

/// Something of the host that a guest has been shown for a while.
#[derive(Debug)]
pub struct Lent {
    made: PathBuf,
    shown: PathBuf,
    in_guest: PathBuf,
    monitor: i32,
}

impl Lent {
    /// Where the guest finds it.
    pub fn in_guest(&self) -> &Path {
        &self.in_guest
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let places = [self.shown.clone(), self.made.clone()];
        let detached = mounts::detach_within(self.monitor, &places);
        let removed = places.iter().map(|place| {
            let is_dir = fs::symlink_metadata(place).is_ok_and(|found| found.is_dir());
            let removed = match is_dir {
                true => fs::remove_dir(place),
                false => fs::remove_file(place),
            };
            removed.map_err(Error::path("remove", place))
        });
        // What is left goes with the sandbox.
        for error in removed.chain([detached]).filter_map(Result::err) {
            tracing::debug!("{error}");
        }
    }
}

impl Running {
    /// The agent.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// The VM process's control socket.
    pub fn control(&self) -> Arc<ControlClient> {
        Arc::clone(&self.control)
    }

    /// The VM process's pid.
    pub fn pid(&self) -> u32 {
        self.process.pid().as_raw().unsigned_abs()
    }

    /// Waits until the VM process has ended by itself. May be dropped and called again.
    ///
    /// # Errors
    /// When its report cannot be read.
    pub async fn ended(&mut self) -> Result<End, Error> {
        let failed = || Error::system("wait for the VM process");
        drop(self.exited.readable().await.map_err(failed())?);
        self.process.wait().map_err(Error::Wait)
    }

    /// What is to be told instead when a call to the agent failed: an agent that is lost is most often a VM that has ended, which
    /// says more.
    pub async fn why_lost(&mut self, lost: &AgentError) -> Option<Error> {
        if lost.failure != Failure::Other {
            return None;
        }
        match tokio::time::timeout(LOST_TIMEOUT, self.ended()).await {
            Ok(Ok(end)) if end.reason != EndReason::Killed => Some(end.into()),
            _ => None,
        }
    }

    /// Has the guest end its processes and write its files back, for as long as that may take. Containers that came to it later are given
    /// `grace` to end by themselves.
    pub async fn shut_down(&self, grace: Duration) {
        // What the guest has not written back by then, it had no reason to believe written.
        let shutdown = self.agent.shutdown(grace);
        if let Ok(Err(error)) = tokio::time::timeout(grace + SHUTDOWN_TIMEOUT, shutdown).await {
            tracing::debug!("{error}");
        }
    }

    /// Ends the VM at once. When this returns the guest has stopped for good, and [`Running::ended`] waits for its process to be gone.
    ///
    /// # Errors
    /// When the VM process cannot be watched, or killed.
    pub async fn stop(&mut self) -> Result<(), Error> {
        match self.control.kill() {
            Ok(()) => {
                let watch = || Error::system("watch the VM process");
                let control = self.control.as_fd().try_clone_to_owned();
                let control = control.and_then(host::watch).map_err(watch())?;
                // It says nothing more, and hangs up.
                drop(control.readable().await.map_err(watch())?);
                Ok(())
            }
            // It has ended by itself.
            Err(ControlError::Gone) => Ok(()),
            Err(error) => {
                tracing::debug!("{error}");
                let killed = self.process.kill();
                killed.map_err(Error::system("end the VM process"))
            }
        }
    }

    /// Ends the VM at once, and waits until its process is gone.
    ///
    /// # Errors
    /// As for [`Running::stop`] and [`Running::ended`].
    pub async fn kill(mut self) -> Result<End, Error> {
        self.stop().await?;
        self.ended().await
    }
}

impl From<End> for Error {
    fn from(end: End) -> Self {
        Self::Ended {
            message: end.message,
            log: end.kernel_log_tail,
        }
    }
}
