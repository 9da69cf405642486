//! A container's monitor: the process whose pid the caller gets. It is in the container's network namespace, has the mounts that the
//! guest sees in a mount namespace of its own, launches the VM and lives until the container's init has ended and the VM is gone;
//! then it exits with the init's status. The VM ends with it, however it ends. That of a container in the VM of another does not
//! launch one (`join`).
//!
//! Its first thread only waits, and has the container's files for its own (`View`): it is that thread whose namespaces and root are found by
//! the pid.

use std::convert::Infallible;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result};
use cloison_agent_api::TEMPLATE_NIC_SLOTS;
use cloison_agent_api::agent::{HostSocket, TtySize};
use cloison_net::Namespace;
use cloison_sandbox::{
    Attached, BindOptions, Descriptor, Error, ExitStatus, HostCgroup, HostLimits, Joined,
    MonitorLock, Network, Preserved, Resolver, Running, Sandbox, Shared, Signals, Source, Streams,
    View, Wiring, enter_private_namespace, loopback_resolver,
};
use cloison_vmm::{ControlClient, VmSpec};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use oci_spec::runtime::{Hook, Spec};
use tokio::sync::oneshot;

use crate::channel::{self, Order, ProcessEnd, Report};
use crate::console::{Console, inherited_size, inherited_streams};
use crate::container::{Container, Record, Status};
use crate::fork::take_stdio;
use crate::log::Log;
use crate::pod::Membership;
use crate::rendezvous::Rendezvous;
use crate::standin::{self, Sizes};
use crate::translate::{Plan, Socket};
use crate::{NAME, hooks, join, runtime};

/// Status of a container whose VM was lost: nobody knows its own.
const LOST: u8 = 255;

/// Network devices of a guest on an engine that cannot add any later.
const NICS: usize = TEMPLATE_NIC_SLOTS.len();

/// What containers in the VM of one that has ended are given to end by themselves: when all are told to stop at once, as podman does with a
/// pod, the first one must not take the others' time. By default docker and podman wait for 10 s, and docker calls it a failure when a container
/// that it has killed is there for longer than that; so the VM is to be gone by then.
const GRACE: Duration = Duration::from_secs(8);

const NO_NETWORK: &str = "cannot connect the container to its network";

/// All that a monitor is started with.
pub struct Job {
    pub container: Container,
    pub record: Record,
    pub plan: Plan,
    pub place: Place,
    pub console_socket: Option<PathBuf>,
    pub preserved: Vec<Preserved>,
    pub log: Log,
}

/// Where a container is to be made.
pub enum Place {
    /// In a VM of its own.
    Own(VmSpec),
    /// In another's.
    In(Membership),
}

impl Job {
    /// The limits of the host's cgroup. Its memory is limited for a container that has a limit itself: without, the VM's size is a default
    /// that promises nothing.
    pub fn host_limits(&self) -> HostLimits {
        match &self.place {
            Place::Own(vm) => HostLimits {
                memory: self
                    .plan
                    .memory_is_limited()
                    .then(|| self.plan.size.on_host(vm.engine)),
                ..self.plan.host_limits.clone()
            },
            // The VM is elsewhere, and the guest's cgroup has all that limits one container in it.
            Place::In(_) => HostLimits::default(),
        }
    }
}

/// A container that is ready to be made in a guest.
pub struct Ready {
    pub id: String,
    sandbox: Sandbox,
    spec: Spec,
    pub streams: Streams,
    pub sizes: Sizes,
    first_size: Option<TtySize>,
    sockets: Vec<HostSocket>,
    hooks: Option<Vec<Hook>>,
    resolv_conf: Option<PathBuf>,
    view: Option<View>,
    views: mpsc::Sender<Request>,
    pub log: Log,
}

/// What the first thread is asked: to have the container's files for its own, and to say when it has.
type Request = (View, oneshot::Sender<Result<(), Error>>);

/// The monitor's whole life, and its exit status.
pub fn serve(job: Job, channel: UnixStream) -> u8 {
    let mut told = Told {
        log: job.log.clone(),
        verb: channel.try_clone().ok(),
        stderr: None,
    };
    let begun = begin(job, channel, &mut told);
    let ended = begun.and_then(|begun| begun.live(&mut told));
    ended.unwrap_or_else(|error| told.of(&error))
}

/// Who is told when the container comes to a bad end.
pub struct Told {
    log: Log,
    /// The verb, which waits for the container to be made; later on there are only logs.
    pub verb: Option<UnixStream>,
    /// The container's standard error, which is what people look at, if it is not a terminal, whose screen is the container's, and as long as
    /// the container has it.
    stderr: Option<OwnedFd>,
}

impl Told {
    /// The monitor's status then. To be called where the host's files are.
    fn of(&self, error: &anyhow::Error) -> u8 {
        if let Some(verb) = &self.verb {
            let _ = verb.set_nonblocking(false);
            let _ = channel::tell(verb, &Report::Failed(format!("{error:#}")));
        } else {
            self.log.error(error);
            if let Some(stderr) = &self.stderr {
                say(stderr, &format!("{error:#}"));
            }
        }
        LOST
    }
}

/// Most of what is said at the end: what a pipe has room for if it is writable at all (pipe(7)).
const LAST_WORDS: usize = 4096;

/// Says in a container's standard error what no process of its could say. Whoever does not read it misses it.
fn say(stderr: &OwnedFd, message: &str) {
    let message = format!("{NAME}: {message}\n");
    let mut message = message.as_bytes();
    if message.len() > LAST_WORDS {
        message = &message[..LAST_WORDS];
    }
    let mut writable = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    if let Ok(1) = poll(&mut writable, PollTimeout::ZERO) {
        let _ = nix::unistd::write(stderr, message);
    }
}

/// A container whose namespaces and files on the host are there, and this process in them.
struct Begun {
    container: Container,
    record: Record,
    place: Place,
    ready: Ready,
    channel: UnixStream,
    cgroup: HostCgroup,
    requests: mpsc::Receiver<Request>,
    _lock: MonitorLock,
}

fn begin(mut job: Job, channel: UnixStream, told: &mut Told) -> Result<Begun> {
    let container = job.container.clone();
    let stdio = take_stdio()?;
    let lock = MonitorLock::take(&container.dir())?.context("the container was removed")?;
    // Where cgroups are is asked of the first thread's mounts, so before it has the container's.
    let cgroup = HostCgroup::at(&job.plan.cgroup)?;
    job.plan.network.enter()?;
    // All that the caller has named by its path is where the caller is.
    let console = match (job.plan.terminal, &job.console_socket) {
        (Some(size), Some(socket)) => Some(Console::hand_over(socket, size)?),
        _ => None,
    };
    let sources = Sources::open(&job.plan, std::mem::take(&mut job.preserved))?;
    match &job.place {
        Place::Own(_) => enter_private_namespace()?,
        Place::In(membership) => membership.enter_mounts()?,
    }
    channel::tell(&channel, &Report::Ready)?;

    let (mut streams, sizes) = match (job.plan.terminal, console) {
        (_, Some(console)) => {
            // A caller may wait for the end of what it gave the command.
            drop(stdio);
            (console.streams()?, Sizes::Console(console))
        }
        (Some(_), None) => (inherited_streams(&stdio, true)?, Sizes::Inherited(stdio)),
        (None, None) => {
            let streams = inherited_streams(&stdio, false)?;
            let [_, _, stderr] = stdio;
            told.stderr = Some(stderr);
            (streams, Sizes::None)
        }
    };
    let first_size = match &sizes {
        Sizes::Inherited(stdio) => inherited_size(stdio),
        other => other.size(),
    };
    let sandbox = container.sandbox();
    let Shown {
        shared,
        binds,
        sockets,
        descriptors,
    } = sources.show(&container, &job.place)?;
    streams.preserved = descriptors;
    let view = View::of(&shared, job.plan.is_read_only(), job.plan.places());
    let (views, requests) = mpsc::channel();
    let hooks = job.plan.hooks.create_container().clone();
    let resolv_conf = job.plan.resolv_conf.clone();
    let spec = job.plan.into_guest_spec(shared.rootfs_in_guest(), binds)?;
    let ready = Ready {
        id: container.id().to_string(),
        sandbox,
        spec,
        streams,
        sizes,
        first_size,
        sockets,
        hooks,
        resolv_conf,
        view: Some(view),
        views,
        log: job.log.clone(),
    };
    let mut record = job.record;
    record.pid = std::process::id().cast_signed();
    Ok(Begun {
        container,
        record,
        place: job.place,
        ready,
        channel,
        cgroup,
        requests,
        _lock: lock,
    })
}

impl Begun {
    /// Has another thread do all that is to be done.
    fn live(self, told: &mut Told) -> Result<u8> {
        let Self {
            container,
            record,
            place,
            ready,
            channel,
            cgroup,
            requests,
            _lock,
        } = self;
        let life = move || {
            let log = ready.log.clone();
            let lived = runtime().and_then(|runtime| {
                runtime.block_on(async {
                    let told = &mut *told;
                    match place {
                        Place::Own(vm) => ready.run(vm, &container, &record, channel, told).await,
                        Place::In(membership) => {
                            join::run(ready, &membership, &container, &record, channel, told).await
                        }
                    }
                })
            });
            let ended = match lived {
                Ok(ended) => ended,
                Err(error) => return told.of(&error),
            };
            if ended.oom_killed
                && let Err(error) = cgroup.report_oom()
            {
                log.warn(format!("{:#}", anyhow::Error::from(error)));
            }
            ended.code
        };
        std::thread::scope(|scope| {
            let life = std::thread::Builder::new()
                .spawn_scoped(scope, life)
                .context("cannot start a thread")?;
            for (view, answer) in requests {
                // Nobody listens when the VM has ended meanwhile.
                let _ = answer.send(view.enter());
            }
            let ended = life.join();
            Ok(ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })
    }
}

impl Ready {
    async fn run(
        mut self,
        mut spec: VmSpec,
        container: &Container,
        record: &Record,
        channel: UnixStream,
        told: &mut Told,
    ) -> Result<ExitStatus> {
        let mut signals = Signals::of_a_stand_in()?;
        let mut channel = ProcessEnd::new(channel)?;
        let streams = std::mem::take(&mut self.streams);
        // This process is in the container's own.
        let namespace = Namespace::current().context(NO_NETWORK)?;
        let mut network = Network::new(&namespace).context(NO_NETWORK)?;
        let nics = network.early().await.context(NO_NETWORK)?;
        spec.spare_nics = spare_nics(nics.len());
        channel.expect(&Order::Charged).await?;
        let cpus = spec.vcpus;
        let (mut vm, wiring) = self
            .sandbox
            .launch(spec, streams, nics)
            .context("cannot start the container's VM")?;
        let lived = {
            let agent = vm.agent().clone();
            let control = vm.control();
            let drive = async {
                agent.hello_with_cpus(cpus).await.map_err(Error::from)?;
                // The hooks of the host, which may bring interfaces, ran while the guest booted.
                channel.expect(&Order::GoOn).await?;
                network.settle(&agent, &control).await.context(NO_NETWORK)?;
                let rendezvous = Rendezvous::at(&container.dir())?;
                self.make(&agent, &wiring, None, container, record, &mut channel)
                    .await?;
                told.verb = None;
                let followed = async {
                    // A container outlives the end of its network.
                    let Err(error) = self
                        .follow(&mut network, &rendezvous, &agent, &control)
                        .await;
                    let lost = "the container's network is no longer followed";
                    self.log.warn(format!("{lost}: {error:#}"));
                    std::future::pending::<Infallible>().await
                };
                tokio::select! {
                    biased;
                    ended = self.stand_in(&agent, wiring, &mut channel, &mut signals, told) => ended,
                    never = followed => match never {},
                }
            };
            tokio::select! {
                lived = drive => lived,
                ended = vm.ended() => {
                    let end = ended.context("the container's VM is gone")?;
                    return Err(Error::from(end).into());
                }
            }
        };
        let lived = match lived {
            Ok(status) => {
                vm.shut_down(GRACE).await;
                Ok(status)
            }
            Err(error) => Err(explain(&mut vm, error).await),
        };
        let _ = vm.kill().await.context("cannot end the container's VM")?;
        lived
    }

    /// Makes the container in the guest.
    pub async fn make(
        &mut self,
        agent: &cloison_sandbox::Agent,
        wiring: &Wiring,
        joined: Option<Joined<'_>>,
        container: &Container,
        record: &Record,
        channel: &mut ProcessEnd,
    ) -> Result<()> {
        let state = container.state(Status::Creating, record, &self.spec);
        hooks::run("createContainer", self.hooks.as_ref(), &state)?;
        let stdio = wiring.stdio.clone();
        let size = self.sizes.size().or(self.first_size.clone());
        agent
            .create(
                &self.id,
                &self.spec,
                stdio,
                size,
                self.sockets.clone(),
                joined,
            )
            .await
            .map_err(Error::from)?;
        // The guest has made the places of its mounts.
        if let Some(view) = self.view.take() {
            let (answer, answered) = oneshot::channel();
            self.views.send((view, answer))?;
            answered.await??;
        }
        channel.tell(&Report::Made).await
    }

    /// Brings every change of the network to the guest, and has a `start` wait for those that were there before it.
    async fn follow(
        &self,
        network: &mut Network,
        rendezvous: &Rendezvous,
        agent: &cloison_sandbox::Agent,
        control: &ControlClient,
    ) -> Result<Infallible> {
        let (mut failed, mut resolver, mut started) = (None, None, false);
        loop {
            tokio::select! {
                biased;
                start = rendezvous.next() => {
                    let settled = network.settle(agent, control).await;
                    let settled = settled.map_err(anyhow::Error::from);
                    let mut settled = failed.take().map_or(settled, Err);
                    if settled.is_ok() {
                        settled = self.resolve(&mut resolver, agent, control).await;
                    }
                    started = settled.is_ok();
                    start?.answer(settled.context(NO_NETWORK)).await;
                }
                change = network.changed() => {
                    let applied = network.apply(agent, control, change?).await;
                    let mut applied = applied.map_err(anyhow::Error::from);
                    if applied.is_ok() && started {
                        applied = self.resolve(&mut resolver, agent, control).await;
                    }
                    if let Err(error) = applied {
                        self.log.warn(format!("{error:#}"));
                        failed = Some(error);
                    }
                }
            }
        }
    }

    /// Gives the guest the resolver that its caller has on the loopback of the container's namespace, if it has one by now.
    async fn resolve(
        &self,
        resolver: &mut Option<Resolver>,
        agent: &cloison_sandbox::Agent,
        control: &ControlClient,
    ) -> Result<()> {
        let text = self.resolv_conf.as_ref().map(fs::read_to_string);
        // One that the caller has taken away names nobody.
        let wanted = text.and_then(Result::ok);
        let wanted = wanted.and_then(|text| loopback_resolver(&text));
        let Some(address) = wanted else { return Ok(()) };
        if resolver.as_ref().is_none_or(|r| r.address() != address) {
            *resolver = Some(Resolver::open(agent, control, address).await?);
        }
        Ok(())
    }

    /// Stands for the container's init until that has ended.
    pub async fn stand_in(
        &self,
        agent: &cloison_sandbox::Agent,
        wiring: Wiring,
        channel: &mut ProcessEnd,
        signals: &mut Signals,
        told: &mut Told,
    ) -> Result<ExitStatus> {
        // A caller that was never told of the container cannot end it.
        channel.expect(&Order::Stay).await?;
        let closed = wiring.stderr_closed()?;
        // A VM that dies closes it as well, and does not answer then.
        let closed_by_the_container = async {
            let alive = closed.await.is_ok() && agent.usage(&self.id).await.is_ok();
            if !alive {
                std::future::pending::<()>().await;
            }
        };
        let attached = Attached {
            agent,
            container: &self.id,
            exec_id: "",
            size: &|| self.sizes.size(),
        };
        let ended = standin::wait(&attached, wiring, signals);
        tokio::pin!(ended);
        tokio::select! {
            biased;
            ended = &mut ended => return Ok(ended?),
            // Whoever reads what the container writes there waits for the end of it, and is not to wait for this process.
            () = closed_by_the_container => told.stderr = None,
        }
        Ok(ended.await?)
    }
}

/// Network devices for interfaces that come later: as many as a guest from a template can have in all, and one at least.
fn spare_nics(early: usize) -> u8 {
    let room = VmSpec::MAX_NICS.saturating_sub(early);
    let spare = NICS.saturating_sub(early).max(1).min(room);
    u8::try_from(spare).unwrap_or(0)
}

/// What of the host a guest is to see of a container, as the caller sees it.
struct Sources {
    rootfs: Source,
    binds: Vec<Source>,
    sockets: Vec<(HostSocket, Source)>,
    preserved: Vec<Preserved>,
}

/// What a guest sees of it.
struct Shown {
    /// The container's part of the shared directory.
    shared: Shared,
    /// The sources of its binds there.
    binds: Vec<PathBuf>,
    sockets: Vec<HostSocket>,
    descriptors: Vec<Descriptor>,
}

impl Sources {
    fn open(plan: &Plan, preserved: Vec<Preserved>) -> Result<Self> {
        let recursive = BindOptions {
            recursive: true,
            ..BindOptions::default()
        };
        let binds = plan.binds.iter();
        let binds = binds.map(|bind| {
            let source = Source::open(&bind.source, bind.options)?;
            match &bind.ids {
                Some(map) => source.map_ids(map),
                None => Ok(source),
            }
        });
        let sockets = plan.sockets.iter().map(|socket| {
            let source = Source::open(&socket.source, BindOptions::default())?;
            Ok((host_socket(socket)?, source))
        });
        Ok(Self {
            rootfs: Source::open(&plan.rootfs, recursive)?,
            binds: binds.collect::<Result<_, _>>()?,
            sockets: sockets.collect::<Result<_>>()?,
            preserved,
        })
    }

    /// Shows it to the guest.
    fn show(self, container: &Container, place: &Place) -> Result<Shown> {
        let (own, id) = (container.sandbox(), container.id());
        let (mut shared, vm, owner) = match place {
            Place::Own(_) => (own.share(id)?, own.clone(), id),
            Place::In(membership) => {
                let place = &membership.joined.place;
                (own.share_elsewhere(id, place)?, membership.vm(), place)
            }
        };
        shared.bind_rootfs(self.rootfs)?;
        let binds = self.binds.into_iter();
        let binds: Result<Vec<_>, _> = binds.map(|bind| shared.add_mount(bind)).collect();
        let binds = binds?;
        let preserved = self.preserved.into_iter();
        let descriptors = preserved.map(|p| p.prepare(|source| shared.add_mount(source)));
        let descriptors = descriptors.collect::<Result<_, _>>()?;
        if let Place::In(_) = place {
            vm.show(&own, &mut shared, owner)?;
        }
        let offer = |(mut socket, source): (HostSocket, Source)| {
            socket.port = vm.offer(source, owner)?;
            Ok(socket)
        };
        let sockets: Result<_> = self.sockets.into_iter().map(offer).collect();
        Ok(Shown {
            sockets: sockets?,
            shared,
            binds,
            descriptors,
        })
    }
}

/// A socket of the host as the guest has it, under the permissions that it has there.
fn host_socket(socket: &Socket) -> Result<HostSocket> {
    let found = fs::metadata(&socket.source)
        .with_context(|| format!("cannot find the socket {}", socket.source.display()))?;
    Ok(HostSocket {
        mount: u32::try_from(socket.mount)?,
        mode: found.mode() & 0o777,
        uid: found.uid(),
        gid: found.gid(),
        ..HostSocket::default()
    })
}

/// A lost agent is most often a VM that has ended, which says more.
async fn explain(vm: &mut Running, error: anyhow::Error) -> anyhow::Error {
    let better = match error.downcast_ref::<Error>().and_then(Error::agent) {
        Some(agent) => vm.why_lost(agent).await,
        None => None,
    };
    better.map_or(error, anyhow::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_room_for_interfaces_that_come_later_and_never_more_than_a_vm_has() {
        assert_eq!([0, 1, 2, 3, 4, 5].map(spare_nics), [3, 2, 1, 1, 0, 0]);
    }
}
