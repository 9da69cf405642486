//! A container from its creation to its removal: an explicit machine of phases, each verb legal in some of them. Only
//! verbs that change the phase wait for each other; signals, waits and questions never do.

use std::collections::{HashMap, VecDeque};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use std::{fs, io};

use nix::unistd::Pid;

use crate::cgroup::{self, Cgroup};
use crate::connect::Connect;
use crate::cpus;
use crate::devices::{Filters, Rule};
use crate::dirs;
use crate::error::{Doing, Error, Result};
use crate::ids::{ContainerId, ExecId, ProcessId};
use crate::lifeline::Lifeline;
use crate::mounts::Mounts;
use crate::process::{Outcome, Process, send};
use crate::reaper::{Expectation, Reaper};
use crate::report::{Create, Exec, Request, Update};
use crate::sockets::Sockets;
use crate::spawn::{Handed, Reports, Waiting};
use crate::spec::{self, ContainerSpec, Defaults};
use crate::stdio::{self, Ports, Stdio, Streams};

/// Most execs of one container that are remembered, running and ended. The oldest ended ones are forgotten first.
const MAX_EXECS: usize = 1024;

/// libcontainer's socket on which a container's init waits for its start.
const START_SOCKET: &str = "notify.sock";

const KILL: u32 = libc::SIGKILL as u32;

/// What every container needs of the agent.
pub struct Shared {
    pub connect: Box<dyn Connect>,
    pub reaper: Arc<Reaper>,
    /// When the agent began, or went on after [`crate::template::wait`], by [`crate::boot::uptime`].
    pub began: OnceLock<Duration>,
    /// How many CPUs the guest may use.
    pub cpus: AtomicU32,
    /// A helper that was started ahead of its time.
    waiting: Mutex<Option<Waiting>>,
    filters: Filters,
}

impl Shared {
    pub fn new(connect: Box<dyn Connect>, reaper: Arc<Reaper>) -> Self {
        Self {
            connect,
            reaper,
            began: OnceLock::new(),
            cpus: AtomicU32::new(u32::MAX),
            waiting: Mutex::default(),
            filters: Filters::default(),
        }
    }

    /// Does ahead of time what the first container needs, whatever it is: a guest that becomes a template does it once for all that go on
    /// from there. All of it is to be had later as well.
    pub fn prepare(&self) -> Result<()> {
        let parent = Path::new(dirs::DEFAULT_CGROUP);
        cgroup::create_parent(parent).doing(|| format!("making cgroup {}", parent.display()))?;
        let default = self.filters.load(&[]);
        default.doing(|| "loading the default rules for devices".to_owned())?;
        let mut helper = Waiting::start(&self.reaper.expect())?;
        helper.await_start()?;
        *lock(&self.waiting) = Some(helper);
        Ok(())
    }

    /// A helper: the one that waits, or another.
    fn helper(&self, expectation: &Expectation) -> Result<Waiting> {
        let waiting = lock(&self.waiting).take();
        match waiting.filter(Waiting::is_alive) {
            Some(waiting) => Ok(waiting),
            None => Waiting::start(expectation),
        }
    }

    /// As many of the CPUs that a container is limited to as the guest may use.
    fn cpus(&self, usable: Option<u32>) -> u32 {
        let all = self.cpus.load(Ordering::Relaxed);
        usable.map_or(all, |usable| usable.min(all))
    }
}

/// What a container is doing, as its owner sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Creating,
    Created,
    Running,
    Paused,
    Stopped,
}

impl Status {
    fn name(self) -> &'static str {
        match self {
            Self::Creating => "being created",
            Self::Created => "created and not started",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

enum Phase {
    Creating,
    /// The init waits at its socket; the reports say whether it could execute its program.
    Created {
        init: Arc<Process>,
        reports: Option<Reports>,
    },
    Running {
        init: Arc<Process>,
    },
    Paused {
        init: Arc<Process>,
    },
}

/// A container.
pub struct Container {
    id: ContainerId,
    cgroup: Arc<Cgroup>,
    defaults: Defaults,
    shared_memory: Option<PathBuf>,
    shared: Arc<Shared>,
    phase: Mutex<Phase>,
    /// Held by verbs that change the phase, for as long as they take.
    changing: tokio::sync::Mutex<()>,
    /// Told of every resumption.
    resumed: tokio::sync::Notify,
    execs: Mutex<Execs>,
    /// Once it is created, and until all its processes are gone.
    mounts: Mutex<Option<Mounts>>,
    /// Served for as long as there is the container.
    _sockets: Sockets,
}

/// What is said of an exec beside what it is.
pub struct Terms<'a> {
    /// It is killed at the end of the stream from this port of the host, if that is not 0.
    pub lifeline: u32,
    /// Its cgroup, by the path below the container's.
    pub cgroup: &'a str,
    /// In a container that is paused it is made when that is resumed.
    pub when_resumed: bool,
}

#[derive(Default)]
struct Execs {
    by_id: HashMap<ExecId, Option<Arc<Process>>>,
    /// In the order of their start.
    order: VecDeque<ExecId>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics with one of these locks held.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn bundle(id: &ContainerId) -> PathBuf {
    Path::new(dirs::BUNDLES).join(id.as_str())
}

fn state(id: &ContainerId) -> PathBuf {
    Path::new(dirs::STATE).join(id.as_str())
}

impl Container {
    /// A container that is about to be created from `spec`.
    pub fn new(
        id: ContainerId,
        spec: &ContainerSpec,
        sockets: Sockets,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            id,
            cgroup: Arc::new(Cgroup::new(spec.cgroup.clone())),
            defaults: spec.defaults.clone(),
            shared_memory: spec.shared_memory.clone(),
            shared,
            phase: Mutex::new(Phase::Creating),
            changing: tokio::sync::Mutex::new(()),
            resumed: tokio::sync::Notify::new(),
            execs: Mutex::default(),
            mounts: Mutex::default(),
            _sockets: sockets,
        }
    }

    /// Path of its cgroup within the hierarchy.
    pub fn cgroup_path(&self) -> &Path {
        &self.cgroup.path
    }

    /// The directory that is bound to its /dev/shm, if one is.
    pub fn shared_memory(&self) -> Option<&Path> {
        self.shared_memory.as_deref()
    }

    /// Creates it: afterwards its init waits to be started. On failure nothing of it is left.
    pub async fn create(&self, spec: ContainerSpec, ports: Ports) -> Result<Pid> {
        let _changing = self.changing.lock().await;
        self.cgroup
            .create()
            .doing(|| format!("making cgroup {}", self.cgroup.path.display()))?;
        let result = self.try_create(spec, ports).await;
        if result.is_err() {
            self.clean().await?;
        }
        result
    }

    async fn try_create(&self, spec: ContainerSpec, ports: Ports) -> Result<Pid> {
        self.allow_devices(&spec.devices)?;
        for (file, value) in &spec.network_settings {
            fs::write(file, value).doing(|| format!("writing {value:?} to {}", file.display()))?;
        }
        if let Some(shm) = &spec.shared_memory {
            // What the host has mounted there is a file system of its own for the kernel, made by the first look into it and for the mount
            // namespace that looks. Containers with one IPC namespace must find the same, so it is made here. If it cannot be, the container
            // cannot be made either, and says why.
            let _ = fs::metadata(shm.join("."));
        }
        let owner = self.defaults.outside(spec.workload.uid);
        let terminal = spec.workload.terminal.is_some();
        let stdio = Stdio::open(&*self.shared.connect, ports, terminal, owner).await?;
        let bundle = bundle(&self.id);
        fs::create_dir_all(dirs::STATE)
            .and_then(|()| fs::create_dir_all(&bundle))
            .and_then(|()| fs::write(bundle.join("config.json"), &spec.config))
            .doing(|| format!("writing the bundle {}", bundle.display()))?;
        let request = Request::Create(Create {
            container_id: self.id.as_str().to_owned(),
            bundle,
            cpus: self.shared.cpus(spec.cpus),
            stdio: stdio.for_helper(),
            preserved: stdio.preserved(),
            workload: spec.workload,
        });
        let (init, reports) = self.launch(request, stdio).await?;
        let pid = init.pid();
        let mounts = Mounts::of(pid).doing(|| "holding the container's mounts".to_owned())?;
        *lock(&self.mounts) = Some(mounts);
        *lock(&self.phase) = Phase::Created {
            init,
            reports: Some(reports),
        };
        Ok(pid)
    }

    /// Has the helper make a process with these streams.
    async fn launch(&self, request: Request, stdio: Stdio) -> Result<(Arc<Process>, Reports)> {
        let expectation = self.shared.reaper.expect();
        let helper = self.shared.helper(&expectation)?;
        let helper = helper.ask(&request, &stdio.handed()).await?;
        let (pid, reports) = helper.answer().await?;
        let pid = pid.map(Pid::from_raw).ok_or_else(|| Error::Invalid {
            what: "answer of the helper",
            why: "it made no process".into(),
        })?;
        let exit = expectation.watch(pid);
        let streams: Streams = match stdio.start() {
            Ok(streams) => streams,
            Err(error) => {
                // Without its streams it is no use; the reaper collects it.
                let _ = send(pid, KILL);
                return Err(error);
            }
        };
        Ok((
            Process::new(pid, exit, streams, Arc::clone(&self.cgroup)),
            reports,
        ))
    }

    /// Lets the init execute its program; returns when it does, or why it does not.
    pub async fn start(&self) -> Result<()> {
        let _changing = self.changing.lock().await;
        let reports = match &mut *lock(&self.phase) {
            Phase::Created { init, reports } if !init.has_ended() => reports.take(),
            _ => None,
        };
        let Some(reports) = reports else {
            return Err(self.wrong("start"));
        };
        let socket = state(&self.id).join(START_SOCKET);
        // libcontainer's init reads to the end of one connection.
        let connected = UnixStream::connect(&socket)
            .and_then(|mut socket| io::Write::write_all(&mut socket, b"start container"));
        connected.doing(|| format!("starting the container's init at {}", socket.display()))?;
        reports.executed().await?;
        let mut phase = lock(&self.phase);
        if let Phase::Created { init, .. } = &*phase {
            let init = Arc::clone(init);
            *phase = Phase::Running { init };
        }
        Ok(())
    }

    /// Runs one more process in it.
    pub async fn exec(
        &self,
        id: ExecId,
        process: &[u8],
        ports: Ports,
        window: Option<(u16, u16)>,
        terms: Terms<'_>,
    ) -> Result<Pid> {
        let mut spec = spec::exec(process, &self.defaults, window)?;
        if !terms.cgroup.is_empty() {
            spec.workload.cgroup = Some(spec::cgroup_below(&self.cgroup.path, terms.cgroup)?);
        }
        self.takes_execs(terms.when_resumed)?;
        if self.defaults.maps_users() {
            spec.workload.user_namespace_of = self.init().map(|init| init.pid().as_raw());
        }
        self.claim(&id)?;
        let result = self.try_exec(&id, spec, ports, terms).await;
        let mut execs = lock(&self.execs);
        match result {
            Ok(process) => {
                let pid = process.pid();
                execs.by_id.insert(id, Some(process));
                Ok(pid)
            }
            Err(error) => {
                execs.forget(&id);
                Err(error)
            }
        }
    }

    async fn try_exec(
        &self,
        id: &ExecId,
        spec: spec::ExecSpec,
        ports: Ports,
        terms: Terms<'_>,
    ) -> Result<Arc<Process>> {
        let owner = self.defaults.outside(spec.workload.uid);
        let terminal = spec.workload.terminal.is_some();
        let lifeline = stdio::stream(&*self.shared.connect, terms.lifeline).await?;
        let lifeline = lifeline.map(Lifeline::new).transpose();
        let mut lifeline = lifeline.doing(|| "watching a lifeline".into())?;
        if terms.when_resumed {
            self.await_resumption(lifeline.as_mut()).await?;
        }
        let stdio = Stdio::open(&*self.shared.connect, ports, terminal, owner).await?;
        let file = bundle(&self.id).join(format!("exec-{id}.json"));
        fs::write(&file, &spec.process).doing(|| format!("writing {}", file.display()))?;
        let request = Request::Exec(Exec {
            container_id: self.id.as_str().to_owned(),
            process: file.clone(),
            stdio: stdio.for_helper(),
            preserved: stdio.preserved(),
            workload: spec.workload,
        });
        // libcontainer rewrites the container's state in place, and a second helper must not read it half written.
        let changing = self.changing.lock().await;
        // It may have been paused meanwhile, and with a helper that is frozen halfway it could not be resumed.
        let launched = match self.takes_execs(false) {
            Ok(()) => self.launch(request, stdio).await,
            Err(error) => Err(error),
        };
        drop(changing);
        // The helper has read it.
        let _ = fs::remove_file(&file);
        let (process, _) = launched?;
        if let Some(lifeline) = lifeline {
            Process::tie(&process, lifeline);
        }
        Ok(process)
    }

    fn takes_execs(&self, when_paused: bool) -> Result<()> {
        match self.status() {
            // One that has not started has its namespaces and its file system.
            Status::Created | Status::Running => Ok(()),
            Status::Paused if when_paused => Ok(()),
            Status::Creating | Status::Paused | Status::Stopped => Err(self.wrong("exec in")),
        }
    }

    /// Waits until it is not paused any more, however that comes, or whoever holds the lifeline is gone.
    async fn await_resumption(&self, mut lifeline: Option<&mut Lifeline>) -> Result<()> {
        loop {
            let resumed = self.resumed.notified();
            let Some(init) = self.init().filter(|_| self.status() == Status::Paused) else {
                return Ok(());
            };
            let gone = async {
                match &mut lifeline {
                    Some(lifeline) => lifeline.cut().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = resumed => {}
                _ = init.ended() => {}
                () = gone => return Err(Error::Ended),
            }
        }
    }

    /// Takes an exec ID. The ID of a process that has ended may be taken again.
    fn claim(&self, id: &ExecId) -> Result<()> {
        let mut execs = lock(&self.execs);
        match execs.by_id.get(id) {
            Some(Some(process)) if process.has_ended() => execs.forget(id),
            Some(_) => {
                return Err(Error::ExecExists {
                    container: self.id.clone(),
                    exec: id.clone(),
                });
            }
            None => {}
        }
        execs.make_room()?;
        execs.by_id.insert(id.clone(), None);
        execs.order.push_back(id.clone());
        Ok(())
    }

    pub fn status(&self) -> Status {
        let phase = lock(&self.phase);
        match &*phase {
            Phase::Creating => Status::Creating,
            Phase::Created { init, .. } | Phase::Running { init } | Phase::Paused { init }
                if init.has_ended() =>
            {
                Status::Stopped
            }
            Phase::Created { .. } => Status::Created,
            Phase::Running { .. } => Status::Running,
            Phase::Paused { .. } => Status::Paused,
        }
    }

    fn wrong(&self, verb: &'static str) -> Error {
        Error::State {
            verb,
            container: self.id.clone(),
            state: self.status().name(),
        }
    }

    fn require(&self, verb: &'static str, status: Status) -> Result<()> {
        if self.status() == status {
            Ok(())
        } else {
            Err(self.wrong(verb))
        }
    }

    pub fn init(&self) -> Option<Arc<Process>> {
        match &*lock(&self.phase) {
            Phase::Creating => None,
            Phase::Created { init, .. } | Phase::Running { init } | Phase::Paused { init } => {
                Some(Arc::clone(init))
            }
        }
    }

    /// The process of that name.
    pub fn process(&self, id: &ProcessId) -> Result<Arc<Process>> {
        match id {
            ProcessId::Init => self.init().ok_or_else(|| self.wrong("reach the init of")),
            ProcessId::Exec(exec) => {
                let process = lock(&self.execs).by_id.get(exec).cloned().flatten();
                process.ok_or_else(|| Error::NoExec {
                    container: self.id.clone(),
                    exec: exec.clone(),
                })
            }
        }
    }

    /// Sends a signal to every process in it.
    pub fn signal_all(&self, number: u32) -> Result<()> {
        if matches!(self.status(), Status::Creating) {
            return Err(self.wrong("signal"));
        }
        if number == KILL {
            return self
                .cgroup
                .kill()
                .doing(|| format!("killing container {}", self.id));
        }
        let pids = self.processes()?;
        if pids.is_empty() {
            return Err(Error::Ended);
        }
        for pid in pids {
            match send(Pid::from_raw(pid.cast_signed()), number) {
                // It ended meanwhile, as it may.
                Err(Error::Ended) => {}
                result => result?,
            }
        }
        Ok(())
    }

    pub async fn pause(&self) -> Result<()> {
        let _changing = self.changing.lock().await;
        self.require("pause", Status::Running)?;
        let frozen = self.cgroup.freeze(true).await;
        frozen.doing(|| format!("freezing container {}", self.id))?;
        self.swap(|init| Phase::Paused { init });
        Ok(())
    }

    pub async fn resume(&self) -> Result<()> {
        let _changing = self.changing.lock().await;
        self.require("resume", Status::Paused)?;
        let thawed = self.cgroup.freeze(false).await;
        thawed.doing(|| format!("thawing container {}", self.id))?;
        self.swap(|init| Phase::Running { init });
        self.resumed.notify_waiters();
        Ok(())
    }

    fn swap(&self, to: impl FnOnce(Arc<Process>) -> Phase) {
        let mut phase = lock(&self.phase);
        if let Phase::Running { init } | Phase::Paused { init } = &*phase {
            let init = Arc::clone(init);
            *phase = to(init);
        }
    }

    /// Changes its limits.
    pub async fn update(&self, resources: &[u8]) -> Result<()> {
        let (resources, devices) = spec::resources(resources)?;
        let _changing = self.changing.lock().await;
        if matches!(self.status(), Status::Creating | Status::Stopped) {
            return Err(self.wrong("update"));
        }
        if !devices.is_empty() {
            self.allow_devices(&devices)?;
        }
        let request = Request::Update(Update {
            cgroup: self.cgroup.path.clone(),
            cpus: cpus::usable(Some(&resources)).map(|usable| self.shared.cpus(Some(usable))),
            resources,
        });
        // In the helper, because lowering a memory limit may take as long as the kernel needs to reclaim.
        let expectation = self.shared.reaper.expect();
        let helper = self.shared.helper(&expectation)?;
        drop(expectation);
        let helper = helper.ask(&request, &Handed::default()).await?;
        helper.answer().await.map(drop)
    }

    fn allow_devices(&self, rules: &[Rule]) -> Result<()> {
        let filter = self.shared.filters.load(rules);
        let allowed = filter.and_then(|filter| self.cgroup.filter_devices(filter));
        allowed.doing(|| format!("applying container {}'s rules for devices", self.id))
    }

    pub fn usage(&self) -> crate::cgroup::Usage {
        self.cgroup.usage()
    }

    /// PIDs of its processes in the guest's initial PID namespace.
    pub fn processes(&self) -> Result<Vec<u32>> {
        self.cgroup
            .processes()
            .doing(|| format!("listing container {}'s processes", self.id))
    }

    /// Ends whatever of it still runs and waits for the end of its init.
    pub async fn kill(&self) -> Result<Option<Outcome>> {
        self.cgroup
            .kill()
            .doing(|| format!("killing container {}", self.id))?;
        match self.init() {
            Some(init) => init.ended().await.map(Some),
            None => Ok(None),
        }
    }

    /// Removes it. Without `force` it must have stopped.
    pub async fn delete(&self, force: bool) -> Result<()> {
        let _changing = self.changing.lock().await;
        let status = self.status();
        if status == Status::Creating || (status != Status::Stopped && !force) {
            return Err(self.wrong("delete"));
        }
        self.kill().await?;
        self.clean().await
    }

    /// Removes what it leaves in the guest. Processes that outlived the init end here.
    async fn clean(&self) -> Result<()> {
        let emptied = async {
            self.cgroup.kill()?;
            self.cgroup.emptied().await?;
            self.cgroup.remove()
        };
        emptied
            .await
            .doing(|| format!("removing cgroup {}", self.cgroup.path.display()))?;
        drop(lock(&self.mounts).take());
        for directory in [state(&self.id), bundle(&self.id)] {
            match fs::remove_dir_all(&directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).doing(|| format!("removing {}", directory.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl Execs {
    fn forget(&mut self, id: &ExecId) {
        self.by_id.remove(id);
        self.order.retain(|known| known != id);
    }

    fn make_room(&mut self) -> Result<()> {
        if self.by_id.len() < MAX_EXECS {
            return Ok(());
        }
        let ended = |id: &&ExecId| {
            let process = self.by_id.get(*id).and_then(Option::as_ref);
            process.is_some_and(|process| process.has_ended())
        };
        let oldest = self.order.iter().find(ended).cloned();
        match oldest {
            Some(id) => {
                self.forget(&id);
                Ok(())
            }
            None => Err(Error::TooMany("execs run in the container")),
        }
    }
}
