//! `create`: everything is checked that can be; then the monitor makes the container while this process runs the caller's hooks.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use cloison_sandbox::{Home, HostCgroup, HostLimits, Parts, mount_in_guest};
use cloison_vmm::{Chosen, Engine, EngineChoice, VmSpec, choose};
use oci_spec::runtime::{Hooks, Spec};

use crate::args::Create;
use crate::capabilities;
use crate::channel::{Order, VerbEnd};
use crate::container::{Container, Joined, Phase, Record, SharedMemory, Status};
use crate::fork::{Child, Side, split, write_pid};
use crate::handed::Handed;
use crate::hooks;
use crate::log::Log;
use crate::monitor::{self, Job, Place};
use crate::pod::Membership;
use crate::translate::Plan;

/// Creates a container.
pub fn create(home: &Home, log: &Log, systemd: bool, args: &Create, handed: Handed) -> Result<()> {
    make(home, log, systemd, args, true, handed).map(drop)
}

/// Whether guests may start from templates: CLOISON_TEMPLATE, as for `cloison run`.
fn wants_template() -> bool {
    std::env::var_os("CLOISON_TEMPLATE").is_none_or(|choice| choice != "off")
}

/// The VM for a container that is given one of its own, on an engine that has been chosen for it.
fn own_vm(home: &Home, args: &Create, plan: &Plan, engine: Engine) -> Result<VmSpec> {
    let parts = Parts::from_env();
    let room = plan.size.room(engine);
    let vm = VmSpec {
        id: args.container.clone(),
        engine,
        memory_mib: plan.size.memory_mib,
        max_memory_mib: room.memory_mib,
        vcpus: plan.size.vcpus,
        max_vcpus: room.vcpus,
        // The monitor knows which there are.
        spare_nics: 0,
        awaits_nic: false,
        kernel: parts.kernel()?,
        initramfs: parts.initramfs()?,
        cmdline: String::new(),
        qemu: parts.qemu(),
        template: wants_template().then(|| home.template()),
    };
    vm.validate()
        .context("cannot make a VM for this container")?;
    Ok(vm)
}

/// The container's shared memory, for others that will have its IPC namespace.
fn shared_memory(id: &str, plan: &Plan, joined: Option<&Joined>) -> Result<Option<SharedMemory>> {
    let Some((number, bind)) = plan.shared_memory() else {
        return Ok(None);
    };
    let in_guest = match &plan.shm {
        Some(others) => others.clone(),
        None => mount_in_guest(joined.map(|j| &j.place), &id.parse()?, number),
    };
    Ok(Some(SharedMemory {
        source: bind.source.clone(),
        in_guest,
    }))
}

/// A container that has been made, and its monitor.
pub struct Made {
    pub container: Container,
    pub monitor: Child,
}

/// Makes a container. A caller that goes away before it ends must have a console socket for a terminal.
///
/// # Errors
/// Then nothing of the container is left.
pub fn make(
    home: &Home,
    log: &Log,
    systemd: bool,
    args: &Create,
    detached: bool,
    handed: Handed,
) -> Result<Made> {
    let bundle = fs::canonicalize(&args.bundle)
        .with_context(|| format!("cannot find the bundle {}", args.bundle.display()))?;
    let config = bundle.join("config.json");
    let text = fs::read(&config).with_context(|| format!("cannot read {}", config.display()))?;
    let (mut spec, text, unknown) = capabilities::parse(text)
        .with_context(|| format!("cannot understand {}", config.display()))?;
    unknown.inspect(|note| log.warn(note));
    handed.announce(&mut spec)?;
    let mut plan = Plan::new(&args.container, spec.clone(), &bundle, systemd)?;
    let has_socket = args.console_socket.is_some();
    ensure!(
        plan.terminal.is_none() || has_socket || !detached,
        "cannot allocate tty if runc will detach without setting console socket"
    );
    ensure!(
        plan.terminal.is_some() || !has_socket,
        "cannot use console socket if runc will not detach or allocate tty"
    );
    for note in &plan.notes {
        log.info(note);
    }
    // Before there is anything that would have to be taken out of it again.
    HostCgroup::at(&plan.cgroup)?.refuse_frozen()?;
    let mut left_of_probing = None;
    let (place, engine, engine_reason) = match Membership::find(home, &plan)? {
        Some(membership) => {
            for note in membership.notes(&plan)? {
                log.info(note);
            }
            let (engine, reason) = (membership.engine, membership.engine_reason.clone());
            (Place::In(membership), engine, reason)
        }
        None => {
            let Chosen {
                engine,
                reason,
                probed,
            } = choose(plan.engine)?;
            if plan.engine == EngineChoice::Auto && engine == Engine::Software {
                log.info(&reason);
            }
            left_of_probing = probed;
            let vm = own_vm(home, args, &plan, engine)?;
            (Place::Own(vm), engine, reason)
        }
    };

    let rootfs = plan.rootfs.clone();
    let mut record = Record::new(bundle, rootfs, plan.cgroup.clone(), engine, engine_reason);
    if let Place::In(membership) = &place {
        record.joined = Some(membership.joined.clone());
        plan.shm = plan
            .shared_memory()
            .and_then(|(_, bind)| membership.shared_memory(&bind.source));
    }
    record.cpu_time = plan.cpu_time();
    record.shm = shared_memory(&args.container, &plan, record.joined.as_ref())?;
    let host_hooks = plan.hooks.clone();
    let container = Container::create(home, &args.container, &record, &text)?;
    let verb_lock = container.lock()?;
    let console_socket = args.console_socket.as_deref().map(std::path::absolute);
    let job = Job {
        container: container.clone(),
        record: record.clone(),
        plan,
        place,
        console_socket: console_socket.transpose()?,
        preserved: handed.descriptors,
        log: log.clone(),
    };
    let child = match split() {
        Ok(Side::Child(channel)) => {
            // The lock is the verb's, and the monitor outlives it; what is left of probing is the verb's to wait for.
            drop((verb_lock, left_of_probing));
            std::process::exit(monitor::serve(job, channel).into())
        }
        Ok(Side::Parent(child)) => child,
        Err(error) => {
            let _ = container.remove();
            return Err(error);
        }
    };
    let limits = job.host_limits();
    drop(job);
    let mut verb = VerbEnd::new(child.channel.try_clone()?);
    record.pid = child.pid.as_raw();
    let begun = Begun {
        container,
        record,
        spec,
        hooks: host_hooks,
    };
    let charged = begun.charge(&mut verb, &child, &limits, log);
    let followed = charged.and_then(|()| begun.run_hooks(&mut verb));
    // The guest boots meanwhile.
    drop(left_of_probing);
    let followed =
        followed.and_then(|()| begun.follow(&mut verb, &child, args.pid_file.as_deref()));
    match followed {
        Ok(()) => {
            verb.order(&Order::Stay);
            Ok(Made {
                container: begun.container,
                monitor: child,
            })
        }
        Err(error) => {
            drop(verb);
            begun.undo(&child, log);
            Err(error)
        }
    }
}

/// A container that is being made.
struct Begun {
    container: Container,
    record: Record,
    spec: Spec,
    hooks: Hooks,
}

impl Begun {
    /// Puts the monitor, which is on its way, and so the VM into the container's cgroup. That is the verb's work because it is mostly waiting.
    fn charge(
        &self,
        verb: &mut VerbEnd,
        child: &Child,
        limits: &HostLimits,
        log: &Log,
    ) -> Result<()> {
        let charged = HostCgroup::at(&self.record.cgroup).and_then(|cgroup| {
            // They share its limits, and end with the container. In runc's words, which are looked for.
            let others = cgroup.pids().len();
            if others > 0 {
                log.warn(format!(
                    "container's cgroup is not empty: {others} process(es) found"
                ));
            }
            cgroup.create(limits, child.pid)
        });
        if let Err(error) = charged {
            // A monitor that has failed cannot be moved, and says itself why.
            verb.expect_ready()?;
            return Err(error.into());
        }
        verb.order(&Order::Charged);
        Ok(())
    }

    /// Runs the hooks of the host while the guest boots.
    fn run_hooks(&self, verb: &mut VerbEnd) -> Result<()> {
        verb.expect_ready()?;
        self.container.save(&self.record)?;
        let state = self
            .container
            .state(Status::Creating, &self.record, &self.spec);
        // Callers still use it.
        #[allow(deprecated)]
        let prestart = self.hooks.prestart();
        let create = self.hooks.create_runtime();
        let run = hooks::run("prestart", prestart.as_ref(), &state)
            .and_then(|()| hooks::run("createRuntime", create.as_ref(), &state));
        // A hook that looks for the namespaces of a monitor whose VM has ended finds none: what matters is why that has.
        run.map_err(|error| verb.failure().unwrap_or(error))?;
        verb.order(&Order::GoOn);
        Ok(())
    }

    /// Follows the monitor to where the container waits for its start.
    fn follow(&self, verb: &mut VerbEnd, child: &Child, pid_file: Option<&Path>) -> Result<()> {
        verb.expect_made()?;
        let mut record = self.record.clone();
        record.phase = Phase::Created;
        self.container.save(&record)?;
        write_pid(pid_file, child.pid)
    }

    /// Leaves nothing of it.
    fn undo(&self, child: &Child, log: &Log) {
        if let Err(error) = self.container.end() {
            log.warn(format!("{error:#}"));
        }
        if let Err(error) = child.wait() {
            log.warn(format!("{error:#}"));
        }
        let state = self
            .container
            .state(Status::Stopped, &self.record, &self.spec);
        for error in hooks::run_all("poststop", self.hooks.poststop().as_ref(), &state) {
            log.warn(format!("{error:#}"));
        }
        if let Err(error) = self.container.remove() {
            log.warn(format!("{error:#}"));
        }
    }
}
