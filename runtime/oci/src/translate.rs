//! From the caller's spec, whose paths are the host's, to the spec that the agent gets, whose paths are the guest's. What the guest
//! cannot do is refused here, with the reason, before anything is made; what concerns only the host is taken out.

mod linux;
mod mounts;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use cloison_sandbox::{CgroupPlace, HostLimits, IdMap, IdRange, VmSize};
use cloison_vmm::EngineChoice;
use oci_spec::runtime::{
    Hooks, HooksBuilder, LinuxIdMapping, LinuxNamespaceType, Process, Root, Spec,
};

use crate::container::CpuTime;
use crate::network::Network;

pub use linux::{NamespacePath, bytes, update};
pub use mounts::{Bind, Socket};

/// Where a container has its shared memory (shm_overview(7)).
const SHARED_MEMORY: &str = "/dev/shm";
/// The annotation that chooses the engine.
const ENGINE_ANNOTATION: &str = "io.cloison.engine";
/// The variable that chooses it when no annotation does.
const ENGINE_VARIABLE: &str = "CLOISON_ENGINE";

/// A container as its caller's spec describes it, checked.
#[derive(Debug)]
pub struct Plan {
    /// The guest's spec, but for the paths that [`Plan::into_guest_spec`] fills in.
    guest: Spec,
    /// The root file system on the host.
    pub rootfs: PathBuf,
    /// What the host shows the guest, in the order of the mounts that use it.
    pub binds: Vec<Bind>,
    /// Where the guest has the shared memory of the container whose IPC namespace this one's is, if it is the same on the host. What is mapped
    /// is common only to those who map a file that they have found in one place.
    pub shm: Option<PathBuf>,
    /// The file of the host that is the container's resolv.conf, if it is one.
    pub resolv_conf: Option<PathBuf>,
    /// Sockets of the host that the guest may connect to.
    pub sockets: Vec<Socket>,
    /// The VM's size.
    pub size: VmSize,
    /// The network namespace of the VM.
    pub network: Network,
    /// Namespaces that are to be another container's.
    pub namespaces: Vec<NamespacePath>,
    /// Whether the container has a user namespace of its own.
    pub has_users: bool,
    /// Limits of the VM's processes on the host, but for memory.
    pub host_limits: HostLimits,
    /// Their cgroup.
    pub cgroup: CgroupPlace,
    /// What asks for an engine.
    pub engine: EngineChoice,
    /// Hooks that run on the host.
    pub hooks: Hooks,
    /// Whether the process has a terminal, and its first size in columns and rows.
    pub terminal: Option<Option<(u16, u16)>>,
    /// What is left out because it means nothing in a guest, for the log.
    pub notes: Vec<String>,
}

impl Plan {
    /// Checks a bundle's spec. `systemd` says who makes the cgroup.
    ///
    /// # Errors
    /// Naming the first thing that cannot be done, and why.
    pub fn new(id: &str, mut spec: Spec, bundle: &Path, systemd: bool) -> Result<Self> {
        let version = spec.version().clone();
        ensure!(
            version.starts_with("1."),
            "config.json: ociVersion {version:?} is not supported: this runtime knows 1.x"
        );
        let mut notes = Vec::new();
        let root = spec
            .root()
            .clone()
            .context("config.json: root is missing")?;
        let rootfs = bundle.join(root.path());
        ensure!(
            rootfs.is_dir(),
            "the root file system {} is not a directory",
            rootfs.display()
        );
        let engine = engine(spec.annotations().as_ref())?;
        let mut process = spec
            .process()
            .clone()
            .context("config.json: process is missing")?;
        adapt_process(&mut process, &mut notes)?;
        let terminal = terminal(&process);
        let linux = spec
            .linux()
            .clone()
            .context("config.json: linux is missing: only Linux containers can be run")?;
        let linux::Adapted {
            linux,
            network,
            shared,
            size,
            host: host_limits,
            cgroup,
        } = linux::adapt(id, linux, systemd, &mut notes)?;
        let mounts = spec.mounts().clone().unwrap_or_default();
        let mut namespaces = linux.namespaces().iter().flatten();
        let has_users = namespaces.any(|n| n.typ() == LinuxNamespaceType::User);
        let users = has_users.then(|| id_map(linux.uid_mappings(), linux.gid_mappings()));
        let mounts::Adapted {
            mounts,
            binds,
            sockets,
        } = mounts::adapt(mounts, bundle, &rootfs, users.as_ref(), &mut notes)?;
        let is_resolv_conf =
            |bind: &&Bind| mounts[bind.mount].destination() == Path::new("/etc/resolv.conf");
        let resolv_conf = binds.iter().find(is_resolv_conf);
        let resolv_conf = resolv_conf.map(|bind| bind.source.clone());
        let (host, guest) = split_hooks(spec.hooks().clone().unwrap_or_default())?;
        spec.set_process(Some(process))
            .set_linux(Some(linux))
            .set_mounts(Some(mounts))
            .set_hooks(guest);
        Ok(Self {
            guest: spec,
            rootfs,
            binds,
            shm: None,
            resolv_conf,
            sockets,
            size,
            network,
            namespaces: shared,
            has_users,
            host_limits,
            cgroup,
            engine,
            hooks: host,
            terminal,
            notes,
        })
    }

    /// Whether the container has a memory limit.
    pub fn memory_is_limited(&self) -> bool {
        let linux = self.guest.linux().as_ref();
        let memory = linux
            .and_then(|linux| linux.resources().as_ref())
            .and_then(|resources| resources.memory().as_ref());
        memory
            .and_then(|memory| memory.limit())
            .is_some_and(|limit| limit > 0)
    }

    /// How much of the CPUs' time it may use.
    pub fn cpu_time(&self) -> CpuTime {
        let linux = self.guest.linux().as_ref();
        let cpu = linux
            .and_then(|linux| linux.resources().as_ref())
            .and_then(|resources| resources.cpu().as_ref());
        CpuTime::default().changed_by(cpu)
    }

    /// Whether its root is not to be written to.
    pub fn is_read_only(&self) -> bool {
        let root = self.guest.root().as_ref();
        root.and_then(Root::readonly).unwrap_or(false)
    }

    /// The container's mounts that are file systems, in their order: where they are in it, and which of [`Plan::binds`] it is, if it is of
    /// the host.
    pub fn places(&self) -> Vec<(PathBuf, Option<usize>)> {
        let mounts = self.guest.mounts().iter().flatten().enumerate();
        let is_socket = |n: usize| self.sockets.iter().any(|socket| socket.mount == n);
        mounts
            .filter(|(n, _)| !is_socket(*n))
            .map(|(n, mount)| {
                let bind = self.binds.iter().position(|bind| bind.mount == n);
                (mount.destination().clone(), bind)
            })
            .collect()
    }

    /// What is bound to /dev/shm, and its number among the binds.
    pub fn shared_memory(&self) -> Option<(usize, &Bind)> {
        let mounts = self.guest.mounts().as_deref().unwrap_or_default();
        let is_shm = |bind: &Bind| {
            let mount = mounts.get(bind.mount);
            mount.is_some_and(|mount| mount.destination() == Path::new(SHARED_MEMORY))
        };
        let mut binds = self.binds.iter().enumerate();
        binds.find(|(_, bind)| is_shm(bind))
    }

    /// The spec for the agent: `rootfs` and `sources` (one for each of [`Plan::binds`]) are where the guest has them.
    ///
    /// # Errors
    /// When a part of it contradicts the OCI specification.
    pub fn into_guest_spec(self, rootfs: PathBuf, mut sources: Vec<PathBuf>) -> Result<Spec> {
        let number = self.shared_memory().map(|(number, _)| number);
        if let (Some(number), Some(shm)) = (number, &self.shm)
            && let Some(source) = sources.get_mut(number)
        {
            source.clone_from(shm);
        }
        let mut spec = self.guest;
        let mut root = spec.root().clone().unwrap_or_default();
        root.set_path(rootfs);
        spec.set_root(Some(root));
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for (bind, source) in self.binds.iter().zip(sources) {
            if let Some(mount) = mounts.get_mut(bind.mount) {
                mount.set_source(Some(source));
            }
        }
        spec.set_mounts(Some(mounts));
        Ok(spec)
    }
}

/// A mapping of IDs as a spec has it.
fn id_map(users: &Option<Vec<LinuxIdMapping>>, groups: &Option<Vec<LinuxIdMapping>>) -> IdMap {
    let ranges = |mappings: &Option<Vec<LinuxIdMapping>>| {
        let mappings = mappings.iter().flatten();
        let ranges = mappings.map(|mapping| IdRange {
            inside: mapping.container_id(),
            outside: mapping.host_id(),
            count: mapping.size(),
        });
        ranges.collect()
    };
    IdMap {
        users: ranges(users),
        groups: ranges(groups),
        recursive: false,
    }
}

/// The engine that the annotations ask for, or else the environment.
fn engine(annotations: Option<&HashMap<String, String>>) -> Result<EngineChoice> {
    let annotation = annotations.and_then(|all| all.get(ENGINE_ANNOTATION));
    if let Some(word) = annotation {
        return word
            .parse()
            .with_context(|| format!("the annotation {ENGINE_ANNOTATION}"));
    }
    match std::env::var(ENGINE_VARIABLE) {
        Ok(word) => word
            .parse()
            .with_context(|| format!("the variable {ENGINE_VARIABLE}")),
        Err(_) => Ok(EngineChoice::Auto),
    }
}

/// Takes out of a process what the guest does not have; for a container's init and for an exec.
///
/// # Errors
/// Naming what cannot be done.
pub fn adapt_process(process: &mut Process, notes: &mut Vec<String>) -> Result<()> {
    // The host's security modules are not in the guest, whose kernel is not what they protect. A caller sets these by default on hosts
    // that have them, so refusing would refuse every container.
    if let Some(profile) = process.apparmor_profile().clone().filter(|p| !p.is_empty()) {
        notes.push(format!(
            "the AppArmor profile {profile:?} is not applied: AppArmor is not in the guest"
        ));
    }
    process.set_apparmor_profile(None);
    if let Some(label) = process.selinux_label().clone().filter(|l| !l.is_empty()) {
        notes.push(format!(
            "the SELinux label {label:?} is not applied: SELinux is not in the guest"
        ));
    }
    process.set_selinux_label(None);
    if process.exec_cpu_affinity().is_some() {
        bail!(
            "config.json: process.execCPUAffinity is not supported: a guest's CPUs are not the host's"
        );
    }
    Ok(())
}

/// Whether a process has a terminal, and its first size in columns and rows.
pub fn terminal(process: &Process) -> Option<Option<(u16, u16)>> {
    let size = process.console_size().and_then(|size| {
        let columns = u16::try_from(size.width()).ok()?;
        let rows = u16::try_from(size.height()).ok()?;
        (columns > 0 && rows > 0).then_some((columns, rows))
    });
    (process.terminal() == Some(true)).then_some(size)
}

/// The hooks of the host and those of the guest. A startContainer hook is a program of the container's, so the agent has it run.
fn split_hooks(mut hooks: Hooks) -> Result<(Hooks, Option<Hooks>)> {
    let start = hooks.start_container().clone().filter(|h| !h.is_empty());
    hooks.set_start_container(None);
    let guest = start
        .map(|start| HooksBuilder::default().start_container(start).build())
        .transpose()?;
    Ok((hooks, guest))
}
