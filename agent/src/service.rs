//! The agent's service: the containers it knows, and each call translated into what a container does. A call that
//! changes something runs to its end even if its connection is lost meanwhile.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use std::{fs, io};

use async_trait::async_trait;
use cloison_agent_api::agent::Status as StatusMessage;
use cloison_agent_api::agent::{
    ContainerRequest, ContainerStateResponse, ContainerStatsResponse, CpusRequest,
    CreateContainerRequest, DeleteContainerRequest, DeviceRequest, Empty, ExecRequest,
    HelloRequest, HelloResponse, Interface, InterfaceRequest, ListProcessesResponse,
    ProcessRequest, ProcessResponse, ResizeTtyRequest, ResolverRequest, ShutdownRequest,
    SignalRequest, Stdio, TtySize, UpdateContainerRequest, WaitResponse,
};
use cloison_agent_api::agent_ttrpc::Agent;
use cloison_agent_api::{MAX_ENTROPY, PROTOCOL};
use nix::mount::{MntFlags, umount2};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use tokio::sync::watch;
use ttrpc::r#async::TtrpcContext;

use crate::boot;
use crate::container::{Container, Shared, Status, Terms};
use crate::cpus;
use crate::error::{Doing, Error, Result, chain};
use crate::ids::{ContainerId, ExecId, ProcessId};
use crate::interfaces::{self, Interfaces};
use crate::joined;
use crate::lifeline::Lifeline;
use crate::preserved;
use crate::random;
use crate::resolver::Resolver;
use crate::slots;
use crate::sockets::Sockets;
use crate::spec;
use crate::stdio::{self, Ports};

/// Most containers of one guest.
const MAX_CONTAINERS: usize = 1024;

type Containers = HashMap<ContainerId, Arc<Container>>;

/// The service. Cheap to clone; every clone is the same service.
#[derive(Clone)]
pub struct Service {
    shared: Arc<Shared>,
    containers: Arc<Mutex<Containers>>,
    interfaces: Interfaces,
    /// How many containers hang on lifelines.
    tied: watch::Sender<usize>,
    over: Arc<AtomicBool>,
}

impl Service {
    pub fn new(shared: Shared) -> Self {
        Self {
            shared: Arc::new(shared),
            containers: Arc::default(),
            interfaces: Interfaces::default(),
            tied: watch::Sender::new(0),
            over: Arc::default(),
        }
    }

    /// True once the guest has been shut down.
    pub fn over(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.over)
    }

    /// Has the guest use so many CPUs, of those that there are, and no others.
    fn use_first_cpus(&self, count: u32) -> io::Result<()> {
        cpus::take_offline(count)?;
        cpus::bring_online(count)?;
        self.shared.cpus.store(count, Ordering::Relaxed);
        Ok(())
    }

    /// Does ahead of time what the first container will need.
    pub fn prepare(&self) -> Result<()> {
        self.shared.prepare()
    }

    /// From here on the guest is this sandbox's own. Only the first call counts.
    pub fn begin(&self, uptime: Duration) {
        let _ = self.shared.began.set(uptime);
    }

    fn containers(&self) -> MutexGuard<'_, Containers> {
        // Nothing panics with the lock held, and it is never held across an await.
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        let id = container_id(id)?;
        let container = self.containers().get(&id).cloned();
        container.ok_or(Error::NoContainer(id))
    }

    fn add(&self, id: &ContainerId, container: &Arc<Container>) -> Result<()> {
        let mut containers = self.containers();
        if containers.contains_key(id) {
            return Err(Error::ContainerExists(id.clone()));
        }
        if containers.len() >= MAX_CONTAINERS {
            return Err(Error::TooMany("containers"));
        }
        let path = container.cgroup_path();
        if containers.values().any(|other| other.cgroup_path() == path) {
            return Err(Error::Invalid {
                what: "spec",
                why: format!("another container uses cgroup {}", path.display()),
            });
        }
        containers.insert(id.clone(), Arc::clone(container));
        Ok(())
    }

    async fn create(self, request: CreateContainerRequest) -> Result<ProcessResponse> {
        let id = container_id(&request.container_id)?;
        let window = window(request.tty_size.as_ref())?;
        let ports = ports(request.stdio.as_ref())?;
        let (sockets, spec) = Sockets::open(&request.sockets, &request.spec, &self.shared)?;
        let spec = joined::fill_in(&request.namespaces, spec, |id| self.init(id))?;
        let spec = spec::container(&id, &spec, window)?;
        let lifeline = stdio::stream(&*self.shared.connect, request.lifeline).await?;
        let lifeline = lifeline.map(Lifeline::new).transpose();
        let lifeline = lifeline.doing(|| "watching a lifeline".into())?;
        let shared = Arc::clone(&self.shared);
        let container = Arc::new(Container::new(id.clone(), &spec, sockets, shared));
        self.add(&id, &container)?;
        let created = container.create(spec, ports).await;
        match (&created, lifeline) {
            (Err(_), _) => drop(self.containers().remove(&id)),
            (Ok(_), Some(lifeline)) => self.tie(id, &container, lifeline),
            (Ok(_), None) => {}
        }
        created.map(process_response)
    }

    /// The first process of a container, whose namespaces are to be another's as well.
    fn init(&self, id: &str) -> Result<nix::unistd::Pid> {
        let init = self.container(id)?.init();
        let init = init.filter(|init| !init.has_ended()).ok_or(Error::Ended)?;
        Ok(init.pid())
    }

    /// Kills and deletes the container when its lifeline is cut.
    fn tie(&self, id: ContainerId, container: &Arc<Container>, lifeline: Lifeline) {
        let service = self.clone();
        let container = Arc::downgrade(container);
        self.tied.send_modify(|tied| *tied += 1);
        tokio::spawn(async move {
            service.at_the_cut(id, container, lifeline).await;
            service.tied.send_modify(|tied| *tied -= 1);
        });
    }

    async fn at_the_cut(
        &self,
        id: ContainerId,
        container: Weak<Container>,
        mut lifeline: Lifeline,
    ) {
        lifeline.cut().await;
        // One that is deleted already is nobody's any more, and its ID may be another's.
        let known = self.containers().get(&id).cloned();
        let same = |known: &Arc<Container>| Weak::ptr_eq(&Arc::downgrade(known), &container);
        let Some(container) = known.filter(same) else {
            return;
        };
        match container.delete(true).await {
            Ok(()) => self.forget(&id, &container),
            Err(error) => tracing::warn!("container {id} is left: {}", chain(&error)),
        }
    }

    /// Lets go of a container that is deleted, and of its shared memory if that was nobody else's. Its ID may be another's by now.
    fn forget(&self, id: &ContainerId, container: &Arc<Container>) {
        let mut containers = self.containers();
        if containers
            .get(id)
            .is_some_and(|c| Arc::ptr_eq(c, container))
        {
            containers.remove(id);
        }
        let Some(shm) = container.shared_memory() else {
            return;
        };
        if !containers.values().any(|c| c.shared_memory() == Some(shm)) {
            // Where nothing of the host's was mounted, nothing is here.
            let _ = umount2(shm, MntFlags::MNT_DETACH);
        }
    }

    async fn exec_process(self, request: ExecRequest) -> Result<ProcessResponse> {
        let container = self.container(&request.container_id)?;
        let exec = ExecId::parse(&request.exec_id).map_err(|source| Error::Id {
            what: "exec",
            id: request.exec_id.clone(),
            source,
        })?;
        let window = window(request.tty_size.as_ref())?;
        let ports = ports(request.stdio.as_ref())?;
        container
            .exec(
                exec,
                &request.process,
                ports,
                window,
                Terms {
                    lifeline: request.lifeline,
                    cgroup: &request.cgroup,
                    when_resumed: request.when_resumed,
                },
            )
            .await
            .map(process_response)
    }

    async fn delete(self, request: DeleteContainerRequest) -> Result<Empty> {
        let id = container_id(&request.container_id)?;
        let container = self.container(id.as_str())?;
        container.delete(request.force).await?;
        self.forget(&id, &container);
        Ok(Empty::new())
    }

    async fn resolver(self, request: ResolverRequest) -> Result<Empty> {
        let address = loopback(&request.address)?;
        let resolver = Resolver::bind(address).await;
        let resolver = resolver.doing(|| format!("answering names at {address}"))?;
        let host = stdio::stream(&*self.shared.connect, request.port).await?;
        let host = host.ok_or_else(|| Error::Invalid {
            what: "resolver",
            why: "it has no stream to the host".into(),
        })?;
        tokio::spawn(async move {
            if let Err(error) = resolver.serve(host).await {
                tracing::warn!("names are no longer answered at {address}: {error}");
            }
        });
        Ok(Empty::new())
    }

    async fn end(self, grace: Duration) -> Result<Empty> {
        let mut tied = self.tied.subscribe();
        // Whoever takes longer is killed with the others.
        let _ = tokio::time::timeout(grace, tied.wait_for(|tied| *tied == 0)).await;
        let all: Vec<_> = self.containers().values().cloned().collect();
        for container in &all {
            container.kill().await?;
        }
        // Takes as long as the disks and the host need; nobody is left who would be kept waiting.
        nix::unistd::sync();
        self.over.store(true, Ordering::Release);
        Ok(Empty::new())
    }
}

/// Does what may block on a thread of its own.
async fn off_loop(
    work: impl FnOnce() -> io::Result<()> + Send + 'static,
    doing: impl FnOnce() -> String,
) -> Result<Empty> {
    let done = tokio::task::spawn_blocking(work).await;
    let done = done.map_err(io::Error::other).flatten();
    done.doing(doing)?;
    Ok(Empty::new())
}

/// Runs a call to its end whatever happens to its connection.
async fn whole<T: Send + 'static>(
    call: impl Future<Output = Result<T>> + Send + 'static,
) -> ttrpc::Result<T> {
    let ended = tokio::spawn(call).await;
    let result = ended
        .map_err(io::Error::other)
        .doing(|| "running the call".into());
    Ok(result.flatten()?)
}

fn loopback(bytes: &[u8]) -> Result<Ipv4Addr> {
    let address = <[u8; 4]>::try_from(bytes).map(Ipv4Addr::from);
    match address {
        Ok(address) if address.is_loopback() => Ok(address),
        _ => Err(Error::Invalid {
            what: "resolver",
            why: format!("{bytes:?} is no loopback address"),
        }),
    }
}

fn container_id(text: &str) -> Result<ContainerId> {
    ContainerId::parse(text).map_err(|source| Error::Id {
        what: "container",
        id: text.to_owned(),
        source,
    })
}

fn process_id(text: &str) -> Result<ProcessId> {
    ProcessId::parse(text).map_err(|source| Error::Id {
        what: "exec",
        id: text.to_owned(),
        source,
    })
}

fn ports(stdio: Option<&Stdio>) -> Result<Ports> {
    let Some(stdio) = stdio else {
        return Ok(Ports::default());
    };
    Ok(Ports {
        stdin: stdio.stdin,
        stdout: stdio.stdout,
        stderr: stdio.stderr,
        preserved: preserved::read(&stdio.preserved)?,
    })
}

/// A terminal's size, if one was given. The kernel counts in 16 bits.
fn window(size: Option<&TtySize>) -> Result<Option<(u16, u16)>> {
    let Some(size) = size.filter(|size| size.columns != 0 || size.rows != 0) else {
        return Ok(None);
    };
    match (u16::try_from(size.columns), u16::try_from(size.rows)) {
        (Ok(columns), Ok(rows)) => Ok(Some((columns, rows))),
        _ => Err(Error::Invalid {
            what: "terminal size",
            why: format!("{} by {} characters", size.columns, size.rows),
        }),
    }
}

fn process_response(pid: nix::unistd::Pid) -> ProcessResponse {
    let mut response = ProcessResponse::new();
    response.pid = pid.as_raw().cast_unsigned();
    response
}

/// As the protocol has it; 584 years fit.
fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn hello(request: &HelloRequest, began: Option<Duration>) -> Result<HelloResponse> {
    if request.protocol != PROTOCOL {
        return Err(Error::Protocol {
            ours: PROTOCOL,
            theirs: request.protocol,
        });
    }
    if request.entropy.len() > MAX_ENTROPY {
        return Err(Error::Invalid {
            what: "entropy",
            why: format!("{} bytes, more than {MAX_ENTROPY}", request.entropy.len()),
        });
    }
    if !request.entropy.is_empty() {
        random::reseed(&request.entropy).doing(|| "seeding the random number generator".into())?;
    }
    if request.realtime_ns != 0 {
        let time = TimeSpec::from_duration(Duration::from_nanos(request.realtime_ns));
        clock_settime(ClockId::CLOCK_REALTIME, time).doing(|| "setting the clock".into())?;
    }
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease");
    let kernel = kernel.doing(|| "reading the kernel's release".into())?;
    let memory = nix::sys::sysinfo::sysinfo().doing(|| "reading the size of memory".into())?;
    let mut response = HelloResponse::new();
    response.protocol = PROTOCOL;
    response.version = env!("CARGO_PKG_VERSION").to_owned();
    response.kernel = kernel.trim_end().to_owned();
    response.memory_bytes = memory.ram_total();
    response.began_ns = nanoseconds(began.unwrap_or_default());
    response.now_ns = nanoseconds(boot::uptime());
    Ok(response)
}

#[async_trait]
impl Agent for Service {
    async fn hello(&self, _: &TtrpcContext, request: HelloRequest) -> ttrpc::Result<HelloResponse> {
        let response = hello(&request, self.shared.began.get().copied())?;
        if request.cpus != 0 {
            self.shared.cpus.store(request.cpus, Ordering::Relaxed);
        }
        Ok(response)
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<ProcessResponse> {
        whole(self.clone().create(request)).await
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container_id)?;
        whole(async move { container.start().await.map(|()| Empty::new()) }).await
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: DeleteContainerRequest,
    ) -> ttrpc::Result<Empty> {
        whole(self.clone().delete(request)).await
    }

    async fn container_state(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<ContainerStateResponse> {
        let container = self.container(&request.container_id)?;
        let mut response = ContainerStateResponse::new();
        response.status = match container.status() {
            Status::Creating => StatusMessage::CREATING,
            Status::Created => StatusMessage::CREATED,
            Status::Running => StatusMessage::RUNNING,
            Status::Paused => StatusMessage::PAUSED,
            Status::Stopped => StatusMessage::STOPPED,
        }
        .into();
        response.pid = container
            .init()
            .map_or(0, |init| init.pid().as_raw().cast_unsigned());
        Ok(response)
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container_id)?;
        whole(async move { container.pause().await.map(|()| Empty::new()) }).await
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container_id)?;
        whole(async move { container.resume().await.map(|()| Empty::new()) }).await
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container_id)?;
        whole(async move {
            container
                .update(&request.resources)
                .await
                .map(|()| Empty::new())
        })
        .await
    }

    async fn container_stats(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<ContainerStatsResponse> {
        let usage = self.container(&request.container_id)?.usage();
        let mut response = ContainerStatsResponse::new();
        response.cpu_usage_ns = usage.cpu_ns;
        response.cpu_user_ns = usage.cpu_user_ns;
        response.cpu_system_ns = usage.cpu_system_ns;
        response.memory_usage_bytes = usage.memory_bytes;
        response.memory_limit_bytes = usage.memory_limit_bytes;
        response.memory_inactive_file_bytes = usage.memory_inactive_file_bytes;
        response.pids = usage.pids;
        response.oom_kills = usage.oom_kills;
        Ok(response)
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<ListProcessesResponse> {
        let mut response = ListProcessesResponse::new();
        response.pids = self.container(&request.container_id)?.processes()?;
        Ok(response)
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> ttrpc::Result<ProcessResponse> {
        whole(self.clone().exec_process(request)).await
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container_id)?;
        if request.all {
            container.signal_all(request.signal)?;
        } else {
            container
                .process(&process_id(&request.exec_id)?)?
                .signal(request.signal)?;
        }
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<WaitResponse> {
        let container = self.container(&request.container_id)?;
        let process = container.process(&process_id(&request.exec_id)?)?;
        drop(container);
        let outcome = process.wait().await?;
        let mut response = WaitResponse::new();
        response.exit_code = outcome.exit.code;
        response.signal = outcome.exit.signal;
        response.oom_killed = outcome.oom_killed;
        response.exited_at_ns = outcome.exit.at_ns;
        Ok(response)
    }

    async fn resize_tty(
        &self,
        _: &TtrpcContext,
        request: ResizeTtyRequest,
    ) -> ttrpc::Result<Empty> {
        let process = self
            .container(&request.container_id)?
            .process(&process_id(&request.exec_id)?)?;
        if let Some((columns, rows)) = window(request.size.as_ref())? {
            process.resize(columns, rows)?;
        }
        Ok(Empty::new())
    }

    async fn use_cpus(&self, _: &TtrpcContext, request: CpusRequest) -> ttrpc::Result<Empty> {
        let (service, count) = (self.clone(), request.count);
        if count == 0 {
            let why = "a guest has one at least".into();
            return Err(Error::Invalid {
                what: "number of CPUs",
                why,
            }
            .into());
        }
        let doing = || "changing the number of CPUs".into();
        whole(off_loop(move || service.use_first_cpus(count), doing)).await
    }

    async fn release_device(
        &self,
        _: &TtrpcContext,
        request: DeviceRequest,
    ) -> ttrpc::Result<Empty> {
        let slot = request.slot;
        let doing = move || format!("letting go of the device in slot {slot}");
        whole(off_loop(move || slots::release(slot), doing)).await
    }

    async fn configure_interface(
        &self,
        _: &TtrpcContext,
        request: Interface,
    ) -> ttrpc::Result<Empty> {
        let interface = interfaces::read(&request)?;
        let interfaces = self.interfaces.clone();
        whole(async move { interfaces.configure(interface).await.map(|()| Empty::new()) }).await
    }

    async fn remove_interface(
        &self,
        _: &TtrpcContext,
        request: InterfaceRequest,
    ) -> ttrpc::Result<Empty> {
        let device = interfaces::hardware_address(&request.device)?;
        let interfaces = self.interfaces.clone();
        whole(async move { interfaces.remove(device).await.map(|()| Empty::new()) }).await
    }

    async fn serve_resolver(
        &self,
        _: &TtrpcContext,
        request: ResolverRequest,
    ) -> ttrpc::Result<Empty> {
        whole(self.clone().resolver(request)).await
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        let grace = Duration::from_millis(request.grace_ms.into());
        whole(self.clone().end(grace)).await
    }
}
