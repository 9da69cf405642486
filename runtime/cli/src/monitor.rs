//! A container's monitor: the one process that makes a container, launches its VM, and stays until both are over. In the
//! foreground it is the front end itself; of a detached container it is a child in a session of its own. The VM ends with it.

use std::convert::Infallible;
use std::sync::Arc;

use anyhow::{Context, Result};
use cloison_sandbox::{Agent, AgentError, Attached, ExitStatus, Network, Signals, Streams, Wiring};
use cloison_vmm::probe::Probed;
use cloison_vmm::{ControlClient, VmSpec, monotonic};
use oci_spec::runtime::Spec;
use tokio::task::JoinHandle;

use crate::attached::{self, Outcome};
use crate::container::{Container, MonitorLock, Record, State, now};
use crate::exit::{self, Failed};
use crate::network::{self, Held, Source};
use crate::profile::Profile;
use crate::terminal;

const NO_NETWORK: &str = "cannot connect the container to its network";

/// A container that is ready to be run.
pub struct Monitor {
    pub container: Container,
    /// Held until the record says how it ended.
    pub _lock: MonitorLock,
    pub record: Record,
    pub vm: VmSpec,
    pub spec: Spec,
    pub streams: Streams,
    /// Takes the run's times when they are wanted.
    pub profile: Option<Profile>,
    /// What is left of choosing the engine.
    pub probed: Option<Probed>,
    /// Where the guest's interfaces come from.
    pub source: Source,
}

/// Whom the monitor speaks to of a VM that runs.
struct Guest {
    agent: Agent,
    control: Arc<ControlClient>,
    /// The VM process.
    pid: u32,
}

/// A container's way to its network.
struct Connection {
    source: Source,
    /// The interfaces that are there before the VM.
    early: Option<Network>,
}

/// How a container's life went, as seen from where its process was to run.
struct Life {
    status: ExitStatus,
    error: Option<String>,
}

impl Monitor {
    /// Launches the VM, runs the process, and records what became of it. `started` is called when the process runs.
    ///
    /// # Errors
    /// When the process could not be started, or was lost; the record says so as well.
    pub async fn run(
        &mut self,
        started: impl FnOnce(&Container) -> Result<()>,
    ) -> Result<u8, Failed> {
        let lived = self.live(started).await;
        let (life, result) = match lived {
            Ok(status) => (
                Life {
                    status,
                    error: None,
                },
                Ok(status.code),
            ),
            Err(failed) => {
                let status = ExitStatus {
                    code: failed.status,
                    oom_killed: false,
                };
                let error = Some(format!("{:#}", failed.error));
                (Life { status, error }, Err(failed))
            }
        };
        let settled = self.settle(&life);
        if let Some(profile) = &mut self.profile {
            profile.front_end("clearing up");
        }
        match settled {
            // The container's own failure is the one to tell.
            Err(error) if result.is_ok() => Err(error.into()),
            _ => result,
        }
    }

    async fn live(
        &mut self,
        started: impl FnOnce(&Container) -> Result<()>,
    ) -> Result<ExitStatus, Failed> {
        let mut signals = Signals::of_a_front_end().map_err(anyhow::Error::from)?;
        let streams = std::mem::take(&mut self.streams);
        let sandbox = self.container.sandbox();
        let source = std::mem::replace(&mut self.source, Source::None);
        let (early, nics) = source.early().await.context(NO_NETWORK)?;
        let (mut vm, wiring) = sandbox
            .launch(self.vm.clone(), streams, nics)
            .context("cannot start the container's VM")?;
        // The guest boots meanwhile.
        self.probed = None;
        let agent = vm.agent().clone();
        let guest = Guest {
            agent: agent.clone(),
            control: vm.control(),
            pid: vm.pid(),
        };

        let mut network = Connection { source, early };
        let lived = tokio::select! {
            lived = self.drive(&guest, wiring, &mut network, &mut signals, started) => lived,
            ended = vm.ended() => {
                let end = ended.context("the container's VM is gone")?;
                return Err(anyhow::Error::from(cloison_sandbox::Error::from(end)).into());
            }
        };
        if let Some(profile) = &mut self.profile {
            profile.guest("running the command", monotonic());
            // A VM that is gone says no more, and what became of it is told elsewhere.
            if let Ok(timeline) = sandbox.timeline() {
                profile.output(&timeline);
            }
        }
        if matches!(lived, Ok(Outcome::Exited(_))) {
            vm.shut_down(std::time::Duration::ZERO).await;
        }
        let lived = match lived {
            Err(lost) => {
                let better = match agent_error(&lost) {
                    Some(agent) => vm.why_lost(agent).await,
                    None => None,
                };
                Err(better.map_or(lost, anyhow::Error::from))
            }
            other => other,
        };
        if let Some(profile) = &mut self.profile {
            profile.guest("shutting down", monotonic());
        }
        let stopped = vm.stop().await;
        // The end of a VM and of an interface both wait for the kernel, one after the other; the VM's goes first, since it has more to do.
        let leased = self.record.network.is_leased();
        let left = leased.then(|| self.leave_network());
        let killed = match stopped {
            Ok(()) => vm.ended().await,
            Err(error) => Err(error),
        };
        if let Some(left) = left {
            // What went wrong is tried again when all is cleared up, and told then.
            if let Ok(Err(error)) = left.await {
                tracing::debug!("{error:#}");
            }
        }
        let _ = killed.context("cannot end the container's VM")?;
        if let Some(profile) = &mut self.profile {
            profile.vm_process("ending");
        }
        match lived? {
            Outcome::Exited(status) => Ok(status),
            Outcome::Abandoned(signal) => Ok(ExitStatus {
                code: exit::by_signal(signal),
                oom_killed: false,
            }),
        }
    }

    /// Begins to take the container off its network.
    fn leave_network(&self) -> JoinHandle<Result<()>> {
        let home = self.container.home().clone();
        let id = self.container.id().clone();
        tokio::task::spawn_blocking(move || network::detach(&home, &id))
    }

    async fn drive(
        &mut self,
        guest: &Guest,
        wiring: Wiring,
        connection: &mut Connection,
        signals: &mut Signals,
        started: impl FnOnce(&Container) -> Result<()>,
    ) -> Result<Outcome> {
        let id = self.container.id().clone();
        let tty = self.record.tty;
        let spec = self.spec.clone();
        let stdio = wiring.stdio.clone();
        let Guest {
            agent,
            control,
            pid,
        } = guest;
        let source = std::mem::replace(&mut connection.source, Source::None);
        let mut network = connection.early.take();
        let mut held = None;
        let start = async {
            // The guest boots while its network is made.
            let connected = async { source.connect().await.context(NO_NETWORK) };
            let hello = async { agent.hello().await.map_err(anyhow::Error::from) };
            let (guest, connected) = tokio::try_join!(hello, connected)?;
            if let Some((made, hold)) = connected {
                network = Some(made);
                held = Some(hold);
            }
            tracing::debug!(
                kernel = guest.kernel,
                agent = guest.agent,
                memory = guest.memory,
                "the guest is up"
            );
            let up = monotonic();
            let size = tty.then(terminal::size).flatten();
            let created = async {
                let created = agent
                    .create(id.as_str(), &spec, stdio, size, Vec::new(), None)
                    .await;
                created.map_err(anyhow::Error::from)
            };
            let settled = async {
                if let Some(network) = &mut network {
                    network.settle(agent, control).await.context(NO_NETWORK)?;
                }
                Ok(())
            };
            tokio::try_join!(created, settled)?;
            let created = monotonic();
            agent.start(id.as_str()).await?;
            Ok::<_, anyhow::Error>((guest, up, created))
        };
        let mut start = Box::pin(start);
        let (info, up, created) = loop {
            tokio::select! {
                biased;
                done = &mut start => break done?,
                event = signals.next() => {
                    if let Some(signal) = event.ends() {
                        return Ok(Outcome::Abandoned(signal));
                    }
                }
            }
        };
        drop(start);
        let timeline = self.container.sandbox().timeline()?;
        self.record.vm_origin = Some(timeline.origin);
        if let Some(profile) = &mut self.profile {
            profile.guest_is_up(&timeline, &info, up);
            profile.guest("creating the container", created);
            profile.guest("starting it", monotonic());
        }
        self.record.state = State::Running {
            started: now(),
            pid: *pid,
        };
        self.container.save(&self.record)?;
        started(&self.container)?;
        let attached = Attached {
            agent,
            container: id.as_str(),
            exec_id: "",
            size: &|| tty.then(terminal::size).flatten(),
        };
        let lived = tokio::select! {
            biased;
            ended = attached::wait(&attached, wiring, signals) => ended,
            never = follow(network.as_mut(), guest) => match never {},
            never = look_up_names(held.as_ref()) => match never {},
        };
        drop(held);
        lived
    }

    /// Writes down how it ended, or removes what was to be removed.
    fn settle(&mut self, life: &Life) -> Result<()> {
        network::release(self.container.sandbox().dir(), &self.record.network)?;
        let started = match &self.record.state {
            State::Running { started, .. } => Some(*started),
            _ => None,
        };
        if self.record.auto_remove || started.is_none() {
            return self.container.erase();
        }
        network::detach(self.container.home(), self.container.id())?;
        self.record.state = State::Exited {
            started,
            finished: now(),
            code: life.status.code,
            oom_killed: life.status.oom_killed,
            error: life.error.clone(),
        };
        self.container.save(&self.record)
    }
}

/// Has the guest follow its network. A container outlives the end of that.
async fn follow(network: Option<&mut Network>, guest: &Guest) -> Infallible {
    if let Some(network) = network
        && let Err(error) = network.follow(&guest.agent, &guest.control).await
    {
        tracing::warn!("the container's network is no longer followed: {error}");
    }
    std::future::pending().await
}

/// Keeps the container's egress policy up to date.
async fn look_up_names(held: Option<&Held>) -> Infallible {
    match held {
        Some(held) => held.look_up_names().await,
        None => std::future::pending().await,
    }
}

/// The agent's error, if that is what it is.
fn agent_error(error: &anyhow::Error) -> Option<&AgentError> {
    match error.downcast_ref::<cloison_sandbox::Error>() {
        Some(error) => error.agent(),
        None => error.downcast_ref(),
    }
}
