//! The Linux part of a spec: namespaces, limits, devices. The guest's kernel enforces what concerns the container's processes; what
//! speaks of the host's own CPUs, disks and devices cannot be meant for a guest.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use cloison_sandbox::{CgroupPlace, HostCgroup, HostLimits, Scope, Throttle, Throttled, VmSize};
use oci_spec::runtime::{
    Linux, LinuxBlockIo, LinuxCpu, LinuxDevice, LinuxDeviceType, LinuxNamespace,
    LinuxNamespaceBuilder, LinuxNamespaceType, LinuxResources,
};

use crate::container::CpuTime;
use crate::network::{HOSTS_NETWORK, Network};

/// CFS period when none is given, microseconds (Documentation/scheduler/sched-bwc.rst).
const DEFAULT_CPU_PERIOD_US: u64 = 100_000;

/// Character devices that every guest has: /dev/null, zero, full, random, urandom, kmsg (its own kernel's log), tty, console, ptmx, fuse
/// (Documentation/admin-guide/devices.txt).
const GUEST_DEVICES: [(i64, i64); 10] = [
    (1, 3),
    (1, 5),
    (1, 7),
    (1, 8),
    (1, 9),
    (1, 11),
    (5, 0),
    (5, 1),
    (5, 2),
    (10, 229),
];

/// A Linux part for the guest, and what of it is the host's.
pub(super) struct Adapted {
    pub linux: Linux,
    pub network: Network,
    pub shared: Vec<NamespacePath>,
    pub size: VmSize,
    pub host: HostLimits,
    pub cgroup: CgroupPlace,
}

pub(super) fn adapt(
    id: &str,
    mut linux: Linux,
    systemd: bool,
    notes: &mut Vec<String>,
) -> Result<Adapted> {
    let (network, shared) = adapt_namespaces(&mut linux)?;
    let cgroup = cgroup(id, linux.cgroups_path().clone(), systemd)?;
    // In the guest each container has a place of its own; the host's path is for the VM's processes.
    linux.set_cgroups_path(Some(HostCgroup::default_path(id)));
    for (name, given) in [
        ("intelRdt", linux.intel_rdt().is_some()),
        ("memoryPolicy", linux.memory_policy().is_some()),
        (
            "netDevices",
            linux.net_devices().as_ref().is_some_and(|d| !d.is_empty()),
        ),
        (
            "timeOffsets",
            linux.time_offsets().as_ref().is_some_and(|t| !t.is_empty()),
        ),
    ] {
        ensure!(!given, "config.json: linux.{name} is not supported");
    }
    linux.set_time_offsets(None);
    if let Some(personality) = linux.personality() {
        let flags = personality.flags().as_ref();
        ensure!(
            flags.is_none_or(|flags| flags.is_empty()),
            "config.json: linux.personality.flags are not supported: the OCI specification knows none"
        );
    }
    // All that the guest has mounted is the container's, so mounts below others follow them in any case.
    let propagation = linux.rootfs_propagation().clone().unwrap_or_default();
    linux.set_rootfs_propagation(match propagation.as_str() {
        "" => None,
        "shared" | "rshared" => Some("shared".into()),
        "slave" | "rslave" => Some("slave".into()),
        "private" | "rprivate" => Some("private".into()),
        "unbindable" | "runbindable" => Some("unbindable".into()),
        other => bail!("config.json: linux.rootfsPropagation {other:?} is not known"),
    });
    if let Some(label) = linux.mount_label().clone().filter(|l| !l.is_empty()) {
        notes.push(format!(
            "the SELinux mount label {label:?} is not applied: SELinux is not in the guest"
        ));
    }
    linux.set_mount_label(None);
    let (size, host) = match linux.resources().clone() {
        Some(mut resources) => {
            let size = size(&resources)?;
            let host = adapt_resources(&mut resources)?;
            adapt_devices(&mut linux, is_privileged(&resources), notes)?;
            linux.set_resources(Some(resources));
            (size, host)
        }
        None => {
            adapt_devices(&mut linux, false, notes)?;
            (VmSize::for_limits(None, None)?, HostLimits::default())
        }
    };
    network.refuse_the_hosts()?;
    Ok(Adapted {
        linux,
        network,
        shared,
        size,
        host,
        cgroup,
    })
}

/// Where the cgroup of the VM's processes is.
fn cgroup(id: &str, given: Option<PathBuf>, systemd: bool) -> Result<CgroupPlace> {
    let given = given.filter(|path| !path.as_os_str().is_empty());
    if !systemd {
        let path = given.unwrap_or_else(|| HostCgroup::default_path(id));
        return Ok(CgroupPlace::Path(path));
    }
    let Some(path) = given else {
        return Ok(CgroupPlace::Scope(Scope::default_of(id)));
    };
    let scope = path.to_string_lossy().parse();
    Ok(CgroupPlace::Scope(scope.context(
        "config.json: linux.cgroupsPath with systemd as the cgroup driver",
    )?))
}

/// Resources for the guest from those an update brings, and the host's part of them.
///
/// # Errors
/// Naming what cannot be done.
pub fn update(mut resources: LinuxResources) -> Result<(LinuxResources, HostLimits)> {
    let host = adapt_resources(&mut resources)?;
    Ok((resources, host))
}

/// A namespace that is to be the one at a path of the host's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamespacePath {
    /// As it is called below /proc/PID/ns.
    pub name: &'static str,
    /// Absolute.
    pub path: PathBuf,
}

fn adapt_namespaces(linux: &mut Linux) -> Result<(Network, Vec<NamespacePath>)> {
    let given = linux.namespaces().clone().unwrap_or_default();
    let find = |typ| given.iter().find(|n: &&LinuxNamespace| n.typ() == typ);
    let path = |n: &LinuxNamespace| n.path().clone().filter(|p| !p.as_os_str().is_empty());
    let network = match find(LinuxNamespaceType::Network) {
        None => bail!("config.json has no network namespace: {HOSTS_NETWORK}"),
        Some(namespace) => path(namespace).map_or(Network::Fresh, Network::At),
    };
    let mut namespaces = Vec::new();
    let mut shared = Vec::new();
    for (typ, name, title) in [
        (LinuxNamespaceType::Pid, "pid", "PID"),
        (LinuxNamespaceType::Ipc, "ipc", "IPC"),
        (LinuxNamespaceType::Uts, "uts", "UTS"),
        (LinuxNamespaceType::Mount, "mnt", "mount"),
    ] {
        let Some(namespace) = find(typ) else {
            bail!(
                "config.json: without {title} namespace of its own the container would share the host's, which a VM cannot: give it one"
            );
        };
        match path(namespace) {
            Some(path) if typ != LinuxNamespaceType::Mount => {
                shared.push(NamespacePath { name, path });
            }
            path => refuse_path(title, path)?,
        }
        namespaces.push(new_namespace(typ)?);
    }
    // Where the caller wants the host's cgroup namespace, there is nothing of the host's to see in the guest.
    if let Some(namespace) = find(LinuxNamespaceType::Cgroup) {
        refuse_path("cgroup", path(namespace))?;
    }
    namespaces.push(new_namespace(LinuxNamespaceType::Cgroup)?);
    if let Some(namespace) = find(LinuxNamespaceType::User) {
        refuse_path("user", path(namespace))?;
        namespaces.push(new_namespace(LinuxNamespaceType::User)?);
    }
    ensure!(
        find(LinuxNamespaceType::Time).is_none(),
        "config.json: time namespaces are not supported"
    );
    linux.set_namespaces(Some(namespaces));
    Ok((network, shared))
}

fn refuse_path(name: &str, path: Option<PathBuf>) -> Result<()> {
    match path {
        Some(path) => bail!(
            "config.json: the {name} namespace {} cannot be joined from inside a VM",
            path.display()
        ),
        None => Ok(()),
    }
}

fn new_namespace(typ: LinuxNamespaceType) -> Result<LinuxNamespace> {
    Ok(LinuxNamespaceBuilder::default().typ(typ).build()?)
}

fn size(resources: &LinuxResources) -> Result<VmSize> {
    let memory = resources
        .memory()
        .as_ref()
        .and_then(|memory| memory.limit());
    let memory = memory.and_then(|limit| u64::try_from(limit).ok());
    let cpu_time = CpuTime::default().changed_by(resources.cpu().as_ref());
    let cpus = cpu_time.milli_cpus();
    let size = VmSize::for_limits(memory.filter(|limit| *limit > 0), cpus)?;
    Ok(size.within_the_host())
}

impl CpuTime {
    /// With what a change names. Callers send zero for what nobody asked for.
    pub fn changed_by(self, cpu: Option<&LinuxCpu>) -> Self {
        let quota = cpu.and_then(LinuxCpu::quota).filter(|quota| *quota != 0);
        let period = cpu.and_then(LinuxCpu::period).filter(|period| *period > 0);
        Self {
            quota: quota.or(self.quota),
            period: period.or(self.period),
        }
    }

    /// How many thousandths of a CPU a quota is; `None` without one.
    pub fn milli_cpus(self) -> Option<u32> {
        let quota = u64::try_from(self.quota?).ok()?;
        let period = self.period.unwrap_or(DEFAULT_CPU_PERIOD_US);
        Some(u32::try_from(quota.saturating_mul(1000).div_ceil(period)).unwrap_or(u32::MAX))
    }
}

/// Takes out limits that the host enforces, and refuses those that nobody can.
fn adapt_resources(resources: &mut LinuxResources) -> Result<HostLimits> {
    let mut host = HostLimits::default();
    if let Some(mut cpu) = resources.cpu().clone() {
        ensure!(
            cpu.realtime_runtime().unwrap_or(0) == 0 && cpu.realtime_period().unwrap_or(0) == 0,
            "config.json: linux.resources.cpu: real-time limits are not supported"
        );
        // Callers send empty and zero values for what nobody asked for. The CPUs named are the host's, and so is the competition that
        // shares are about.
        host.cpus = cpu.cpus().clone().filter(|cpus| !cpus.is_empty());
        host.mems = cpu.mems().clone().filter(|mems| !mems.is_empty());
        host.cpu_shares = cpu.shares().filter(|shares| *shares > 0);
        let (shares, quota, period) = (cpu.shares(), cpu.quota(), cpu.period());
        cpu.set_shares(shares.filter(|shares| *shares > 0))
            .set_quota(quota.filter(|quota| *quota != 0))
            .set_period(period.filter(|period| *period > 0))
            .set_cpus(None)
            .set_mems(None)
            .set_realtime_runtime(None)
            .set_realtime_period(None);
        resources.set_cpu(Some(cpu));
    }
    if let Some(mut memory) = *resources.memory() {
        let given = |limit: Option<i64>| limit.filter(|limit| *limit != 0);
        let (limit, reservation, swap) = (memory.limit(), memory.reservation(), memory.swap());
        memory
            .set_limit(given(limit))
            .set_reservation(given(reservation))
            .set_swap(given(swap));
        resources.set_memory(Some(memory));
    }
    if resources.pids().is_some_and(|pids| pids.limit() == 0) {
        resources.set_pids(None);
    }
    if let Some(block) = resources.block_io() {
        limit_block_io(block, &mut host)?;
    }
    resources.set_block_io(None);
    ensure!(
        resources
            .hugepage_limits()
            .as_ref()
            .is_none_or(Vec::is_empty),
        "config.json: linux.resources.hugepageLimits is not supported: the guest has no huge pages"
    );
    resources.set_hugepage_limits(None);
    if let Some(network) = resources.network() {
        ensure!(
            network.class_id().unwrap_or(0) == 0
                && network.priorities().as_ref().is_none_or(Vec::is_empty),
            "config.json: linux.resources.network is not supported: the container's packets are not the host's processes'"
        );
    }
    resources.set_network(None);
    ensure!(
        resources.rdma().as_ref().is_none_or(|r| r.is_empty()),
        "config.json: linux.resources.rdma is not supported: the guest has no RDMA devices"
    );
    resources.set_rdma(None);
    Ok(host)
}

/// The container's files are the host's: it is the VM process that reads and writes them there.
fn limit_block_io(block: &LinuxBlockIo, host: &mut HostLimits) -> Result<()> {
    ensure!(
        block.weight_device().as_ref().is_none_or(Vec::is_empty)
            && block.leaf_weight().unwrap_or(0) == 0,
        "config.json: linux.resources.blockIO: weights of single devices and of leaves are not supported"
    );
    host.block_weight = block.weight().filter(|weight| *weight > 0);
    for (what, name, limits) in [
        (
            Throttled::ReadBytes,
            "ReadBps",
            block.throttle_read_bps_device(),
        ),
        (
            Throttled::WrittenBytes,
            "WriteBps",
            block.throttle_write_bps_device(),
        ),
        (
            Throttled::Reads,
            "ReadIOPS",
            block.throttle_read_iops_device(),
        ),
        (
            Throttled::Writes,
            "WriteIOPS",
            block.throttle_write_iops_device(),
        ),
    ] {
        for limit in limits.iter().flatten() {
            let (Ok(major), Ok(minor)) = (limit.major().try_into(), limit.minor().try_into())
            else {
                bail!("config.json: linux.resources.blockIO.throttle{name}Device names no device");
            };
            host.throttles.push(Throttle {
                what,
                major,
                minor,
                rate: limit.rate(),
            });
        }
    }
    Ok(())
}

/// A rule allows every device there is, as callers say for privileged containers.
fn is_privileged(resources: &LinuxResources) -> bool {
    let rules = resources.devices().iter().flatten();
    rules.into_iter().any(|rule| {
        rule.allow()
            && rule.major().is_none_or(|major| major < 0)
            && rule.minor().is_none_or(|minor| minor < 0)
            && matches!(rule.typ().unwrap_or_default(), LinuxDeviceType::A)
            && rule.access().as_ref().is_none_or(|a| a.contains('w'))
    })
}

/// Keeps the devices that a guest has. A privileged container is given all of the host's, which nobody asked for one by one.
fn adapt_devices(linux: &mut Linux, privileged: bool, notes: &mut Vec<String>) -> Result<()> {
    let Some(devices) = linux.devices().clone() else {
        return Ok(());
    };
    let there = |device: &LinuxDevice| match device.typ() {
        LinuxDeviceType::P => true,
        LinuxDeviceType::C | LinuxDeviceType::U => {
            GUEST_DEVICES.contains(&(device.major(), device.minor()))
        }
        _ => false,
    };
    let (kept, missing): (Vec<_>, Vec<_>) = devices.into_iter().partition(there);
    if let Some(device) = missing.first() {
        let path = device.path().display();
        ensure!(
            privileged,
            "the device {path} ({}:{}) is the host's and not in the guest",
            device.major(),
            device.minor()
        );
        notes.push(format!(
            "{} devices of the host are left out, {path} for one: they are not in the guest",
            missing.len()
        ));
    }
    linux.set_devices(Some(kept));
    Ok(())
}

/// A size as `update` takes it: bytes, or with a unit k, m, g, t; -1 is no limit.
///
/// # Errors
/// When it is none.
pub fn bytes(text: &str) -> Result<i64> {
    let lower = text.to_ascii_lowercase();
    let lower = lower.strip_suffix('b').unwrap_or(&lower);
    let (digits, shift) = match lower.as_bytes().last() {
        Some(b'k') => (&lower[..lower.len() - 1], 10),
        Some(b'm') => (&lower[..lower.len() - 1], 20),
        Some(b'g') => (&lower[..lower.len() - 1], 30),
        Some(b't') => (&lower[..lower.len() - 1], 40),
        _ => (lower, 0),
    };
    let number: i64 = digits
        .parse()
        .ok()
        .filter(|number| *number >= -1)
        .with_context(|| {
            format!("{text:?} is not a size: give bytes, a number with k, m or g, or -1")
        })?;
    if number < 0 {
        ensure!(shift == 0, "{text:?} is not a size");
        return Ok(-1);
    }
    number
        .checked_mul(1 << shift)
        .with_context(|| format!("{text:?} is too large"))
}
