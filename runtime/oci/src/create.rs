//! `create`: everything is checked that can be; then the monitor makes the container while this process runs the caller's hooks.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use cloison_sandbox::{Home, Parts, mount_in_guest};
use cloison_vmm::{Chosen, Engine, EngineChoice, VmSpec, choose};
use oci_spec::runtime::{Hooks, Spec};

use crate::args::Create;
use crate::channel::{Order, VerbEnd};
use crate::container::{Container, Joined, Phase, Record, SharedMemory, Status};
use crate::fork::{Child, Side, split, write_pid};
use crate::hooks;
use crate::log::Log;
use crate::monitor::{self, Job, Place};
use crate::pod::Membership;
use crate::translate::Plan;

/// Creates a container.
pub fn create(home: &Home, log: &Log, systemd: bool, args: &Create) -> Result<()> {
    make(home, log, systemd, args, true).map(drop)
}

/// Whether guests may start from templates: CLOISON_TEMPLATE, as for `cloison run`.
fn wants_template() -> bool {
    std::env::var_os("CLOISON_TEMPLATE").is_none_or(|choice| choice != "off")
}

/// The VM for a container that is given one of its own, its engine, and why that.
fn own_vm(home: &Home, log: &Log, args: &Create, plan: &Plan) -> Result<(Place, Engine, String)> {
    // What is left of probing KVM may be a thread, and a process with several cannot be split.
    let Chosen { engine, reason, .. } = choose(plan.engine)?;
    if plan.engine == EngineChoice::Auto && engine == Engine::Software {
        log.info(&reason);
    }
    let parts = Parts::from_env();
    let vm = VmSpec {
        id: args.container.clone(),
        engine,
        memory_mib: plan.size.memory_mib,
        vcpus: plan.size.vcpus,
        max_vcpus: plan.size.vcpus,
        max_memory_mib: plan.size.memory_mib,
        // The monitor knows which there are.
        spare_nics: 0,
        kernel: parts.kernel()?,
        initramfs: parts.initramfs()?,
        cmdline: String::new(),
        qemu: parts.qemu(),
        template: (engine == Engine::Software && wants_template()).then(|| home.template()),
    };
    vm.validate()
        .context("cannot make a VM for this container")?;
    Ok((Place::Own(vm), engine, reason))
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
pub fn make(home: &Home, log: &Log, systemd: bool, args: &Create, detached: bool) -> Result<Made> {
    ensure!(
        args.preserve_fds == 0,
        "--preserve-fds is not supported: descriptors cannot be handed into a VM"
    );
    let bundle = fs::canonicalize(&args.bundle)
        .with_context(|| format!("cannot find the bundle {}", args.bundle.display()))?;
    let config = bundle.join("config.json");
    let text = fs::read(&config).with_context(|| format!("cannot read {}", config.display()))?;
    let spec: Spec = serde_json::from_slice(&text)
        .with_context(|| format!("cannot understand {}", config.display()))?;
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
    let (place, engine, engine_reason) = match Membership::find(home, &plan)? {
        Some(membership) => {
            for note in membership.notes(&plan)? {
                log.info(note);
            }
            let (engine, reason) = (membership.engine, membership.engine_reason.clone());
            (Place::In(membership), engine, reason)
        }
        None => own_vm(home, log, args, &plan)?,
    };

    let rootfs = plan.rootfs.clone();
    let mut record = Record::new(bundle, rootfs, plan.cgroup.clone(), engine, engine_reason);
    if let Place::In(membership) = &place {
        record.joined = Some(membership.joined.clone());
        plan.shm = plan
            .shared_memory()
            .and_then(|(_, bind)| membership.shared_memory(&bind.source));
    }
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
        log: log.clone(),
    };
    let child = match split() {
        Ok(Side::Child(channel)) => {
            // The lock is the verb's, and the monitor outlives it.
            drop(verb_lock);
            std::process::exit(monitor::serve(job, channel).into())
        }
        Ok(Side::Parent(child)) => child,
        Err(error) => {
            let _ = container.remove();
            return Err(error);
        }
    };
    drop(job);
    let mut verb = VerbEnd::new(child.channel.try_clone()?);
    let begun = Begun {
        container,
        record,
        spec,
        hooks: host_hooks,
    };
    match begun.follow(&mut verb, &child, args.pid_file.as_deref()) {
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
    /// Follows the monitor to where the container waits for its start, and runs the hooks of the host meanwhile.
    fn follow(&self, verb: &mut VerbEnd, child: &Child, pid_file: Option<&Path>) -> Result<()> {
        verb.expect_ready()?;
        let mut record = self.record.clone();
        record.pid = child.pid.as_raw();
        self.container.save(&record)?;
        let state = self.container.state(Status::Creating, &record, &self.spec);
        // Callers still use it.
        #[allow(deprecated)]
        let prestart = self.hooks.prestart();
        hooks::run("prestart", prestart.as_ref(), &state)?;
        hooks::run(
            "createRuntime",
            self.hooks.create_runtime().as_ref(),
            &state,
        )?;
        verb.order(&Order::GoOn);
        verb.expect_made()?;
        record.phase = Phase::Created;
        self.container.save(&record)?;
        write_pid(pid_file, child.pid)
    }

    /// Leaves nothing of it.
    fn undo(&self, child: &Child, log: &Log) {
        let mut record = self.record.clone();
        record.pid = child.pid.as_raw();
        if let Err(error) = self.container.end() {
            log.warn(format!("{error:#}"));
        }
        if let Err(error) = child.wait() {
            log.warn(format!("{error:#}"));
        }
        let state = self.container.state(Status::Stopped, &record, &self.spec);
        for error in hooks::run_all("poststop", self.hooks.poststop().as_ref(), &state) {
            log.warn(format!("{error:#}"));
        }
        if let Err(error) = self.container.remove() {
            log.warn(format!("{error:#}"));
        }
    }
}
