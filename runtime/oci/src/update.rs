//! `update`: other limits for a container that runs. The guest's cgroup enforces them, and the VM is as large as they are: it grows
//! before, and shrinks afterwards. The host's cgroup holds the VM within that.

use std::fs;
use std::io::Read;

use anyhow::{Context, Result, ensure};
use cloison_sandbox::{Agent, Error, Home, HostCgroup, HostLimits, Resize, Sandbox, VmSize};
use oci_spec::runtime::{
    LinuxBlockIoBuilder, LinuxCpuBuilder, LinuxMemoryBuilder, LinuxPidsBuilder, LinuxResources,
    LinuxResourcesBuilder,
};

use crate::args::Update;
use crate::container::{Container, CpuTime, Record, Status};
use crate::log::Log;
use crate::{pod, runtime, translate};

/// Changes the limits.
pub fn update(home: &Home, log: &Log, args: &Update) -> Result<()> {
    let container = Container::find(home, &args.container)?;
    let _lock = container.lock()?;
    let (status, mut record) = container.status()?;
    ensure!(
        !matches!(status, Status::Stopped | Status::Creating),
        "container not running: it is {}",
        status.word()
    );
    let (resources, host) = translate::update(resources(args)?)?;
    let change = Change::new(&resources, record.cpu_time)?;
    match &record.joined {
        Some(joined) => {
            pod::refuse_limits_of_the_host(&joined.vm, &host)?;
            let owner = Container::find(home, joined.vm.as_str())?;
            for note in pod::notes(&owner, change.size, change.memory.is_some())? {
                log.warn(note);
            }
            // Its shares are among those in the guest.
            runtime()?.block_on(async {
                let agent = connect(&container, &record).await?;
                let updated = agent.update(container.id().as_str(), &resources).await;
                anyhow::Ok(updated.map_err(Error::from)?)
            })?;
        }
        None => {
            let cgroup = HostCgroup::at(&record.cgroup)?;
            runtime()?.block_on(change.apply(&container, &record, &resources, &cgroup))?;
            cgroup.limit(&host)?;
        }
    }
    record.cpu_time = change.cpu_time;
    container.save(&record)
}

async fn connect(container: &Container, record: &Record) -> Result<Agent> {
    let agent = container.vm(record).connect_agent()?;
    agent.hello().await.map_err(Error::from)?;
    Ok(agent)
}

/// What an update means for a VM.
struct Change {
    cpu_time: CpuTime,
    /// For the container with all its limits.
    size: VmSize,
    /// The limit, if that changes; `Some(None)` for none.
    memory: Option<Option<u64>>,
    /// Whether the quota of CPU time changes, and there is one.
    cpus: bool,
}

impl Change {
    fn new(resources: &LinuxResources, before: CpuTime) -> Result<Self> {
        let memory = resources.memory().as_ref();
        let memory = memory
            .and_then(|memory| memory.limit())
            .map(|limit| u64::try_from(limit).ok());
        let cpu_time = before.changed_by(resources.cpu().as_ref());
        let milli_cpus = cpu_time.milli_cpus();
        Ok(Self {
            cpu_time,
            size: VmSize::for_limits(memory.flatten(), milli_cpus)?.within_the_host(),
            memory,
            cpus: cpu_time != before && milli_cpus.is_some(),
        })
    }

    /// Changes the VM, the container in it and the VM's limit on the host.
    async fn apply(
        &self,
        container: &Container,
        record: &Record,
        resources: &LinuxResources,
        cgroup: &HostCgroup,
    ) -> Result<()> {
        let resize = self.resize(&container.vm(record))?;
        let agent = connect(container, record).await?;
        // A VM whose container has no limit promises nothing, and has none.
        let hold = |size: VmSize| match self.memory {
            Some(limit) => cgroup.limit(&HostLimits {
                memory: Some(limit.map_or(u64::MAX, |_| size.on_host(record.engine))),
                ..HostLimits::default()
            }),
            None => Ok(()),
        };
        hold(resize.largest())?;
        resize.grow(&agent).await?;
        let updated = agent.update(container.id().as_str(), resources).await;
        updated.map_err(Error::from)?;
        let size = resize.shrink(&agent).await?;
        Ok(hold(size)?)
    }

    /// What becomes of the VM. Where a limit goes, it stays as large as it is.
    fn resize(&self, vm: &Sandbox) -> Result<Resize> {
        let memory = self.memory.flatten();
        let resize = |memory_mib| Resize::of(vm, memory_mib, self.cpus.then_some(self.size.vcpus));
        let planned = resize(memory.map(|_| self.size.memory_mib));
        let Err(Error::NoRoom { most, .. }) = &planned else {
            return Ok(planned?);
        };
        ensure!(
            !self.cpus || self.size.vcpus <= most.vcpus,
            "the limit cannot be raised to {} CPUs: the container's VM cannot have more than {} while it runs",
            self.size.vcpus,
            most.vcpus
        );
        let limit = memory.unwrap_or(0);
        ensure!(
            limit <= u64::from(most.memory_mib) << 20,
            "the memory limit cannot be raised to {limit} bytes: the container's VM cannot have more than {} MiB while it runs",
            most.memory_mib
        );
        // What the guest itself needs is missing, as it is in a VM whose container had no limit.
        Ok(resize(Some(most.memory_mib))?)
    }
}

fn resources(args: &Update) -> Result<LinuxResources> {
    if let Some(file) = &args.resources {
        let mut text = Vec::new();
        if file.as_os_str() == "-" {
            let read = std::io::stdin().read_to_end(&mut text);
            read.context("cannot read the resources from standard input")?;
        } else {
            text = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        }
        return serde_json::from_slice(&text).context("cannot understand the resources");
    }
    let bytes = |text: &Option<String>| text.as_deref().map(translate::bytes).transpose();
    let mut resources = LinuxResourcesBuilder::default().build()?;
    let mut memory = LinuxMemoryBuilder::default().build()?;
    memory
        .set_limit(bytes(&args.memory)?)
        .set_reservation(bytes(&args.memory_reservation)?)
        .set_swap(bytes(&args.memory_swap)?);
    let mut cpu = LinuxCpuBuilder::default().build()?;
    cpu.set_period(args.cpu_period)
        .set_quota(args.cpu_quota)
        .set_burst(args.cpu_burst)
        .set_idle(args.cpu_idle)
        .set_shares(args.cpu_share)
        .set_realtime_period(args.cpu_rt_period)
        .set_realtime_runtime(args.cpu_rt_runtime)
        .set_cpus(args.cpuset_cpus.clone())
        .set_mems(args.cpuset_mems.clone());
    resources.set_memory(Some(memory)).set_cpu(Some(cpu));
    if let Some(limit) = args.pids_limit {
        resources.set_pids(Some(LinuxPidsBuilder::default().limit(limit).build()?));
    }
    if let Some(weight) = args.blkio_weight {
        let block = LinuxBlockIoBuilder::default().weight(weight).build()?;
        resources.set_block_io(Some(block));
    }
    Ok(resources)
}
