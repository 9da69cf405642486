//! `update`: other limits for a container that runs. They are the guest's cgroup's; the VM stays as large as it was made.

use std::fs;
use std::io::Read;

use anyhow::{Context, Result, ensure};
use cloison_sandbox::{Home, HostCgroup, Sandbox};
use oci_spec::runtime::{
    LinuxCpuBuilder, LinuxMemoryBuilder, LinuxPidsBuilder, LinuxResources, LinuxResourcesBuilder,
};

use crate::args::Update;
use crate::container::{Container, Status};
use crate::{pod, runtime, translate};

/// Changes the limits.
pub fn update(home: &Home, args: &Update) -> Result<()> {
    let container = Container::find(home, &args.container)?;
    let (status, record) = container.status()?;
    ensure!(
        !matches!(status, Status::Stopped | Status::Creating),
        "container not running: it is {}",
        status.word()
    );
    let (resources, host) = translate::update(resources(args)?)?;
    if let Some(limit) = resources.memory().as_ref().and_then(|m| m.limit()) {
        fits(&container.vm(&record), limit)?;
    }
    if let Some(joined) = &record.joined {
        pod::refuse_limits_of_the_host(&joined.vm, &host)?;
    }
    runtime()?.block_on(async {
        let agent = container.vm(&record).connect_agent()?;
        agent.hello().await?;
        agent.update(container.id().as_str(), &resources).await?;
        anyhow::Ok(())
    })?;
    // Beside others in its guest a container's shares are the guest's cgroup's.
    if record.joined.is_none() {
        HostCgroup::at(&record.cgroup)?.limit(&host)?;
    }
    Ok(())
}

/// A VM has the memory it was started with: a higher limit would be a promise that nobody can keep.
fn fits(vm: &Sandbox, limit: i64) -> Result<()> {
    let vm = u64::from(vm.size()?.memory_mib) << 20;
    let fits = u64::try_from(limit).map_or(true, |limit| limit <= vm);
    ensure!(
        fits,
        "the memory limit cannot be raised to {limit} bytes: the container's VM has {vm}, and cannot be given more while it runs"
    );
    Ok(())
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
        .set_shares(args.cpu_share);
    resources.set_memory(Some(memory)).set_cpu(Some(cpu));
    if let Some(limit) = args.pids_limit {
        resources.set_pids(Some(LinuxPidsBuilder::default().limit(limit).build()?));
    }
    Ok(resources)
}
