//! Containers that share a VM. The first one's VM is the sandbox; another whose spec names namespaces of a container in it, by the
//! process that stands for that one's init, comes to the same guest. There it has these namespaces in common with that container, and
//! the network, which is the guest's. Its monitor is in the mount namespace of the first one's, where the VM process looks for files.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use cloison_agent_api::agent::SharedNamespace;
use cloison_sandbox::{Home, HostLimits, Id, Sandbox, VmSize, enter_namespace_of};
use cloison_vmm::{Engine, EngineChoice};

use crate::container::{Container, Joined, SharedMemory};
use crate::network::Network;
use crate::translate::Plan;

/// A container's place in the VM of another.
pub struct Membership {
    /// The container whose VM it is.
    pub owner: Container,
    /// What runs the VM.
    pub engine: Engine,
    /// Why this engine, in words.
    pub engine_reason: String,
    /// What its record says of that.
    pub joined: Joined,
    /// Its namespaces that are others'.
    pub namespaces: Vec<SharedNamespace>,
    /// The shared memory of the one whose IPC namespace it has.
    shm: Option<SharedMemory>,
}

impl Membership {
    /// Where the container belongs that `plan` describes; `None` for one that is given a VM of its own.
    ///
    /// # Errors
    /// When what it is to share cannot be shared.
    pub fn find(home: &Home, plan: &Plan) -> Result<Option<Self>> {
        let mut others = Vec::new();
        let mut namespaces = Vec::new();
        let mut shm = None;
        for namespace in &plan.namespaces {
            let (name, path) = (namespace.name, namespace.path.display());
            let other = match stand_in(&namespace.path, name) {
                Some(pid) => stood_for_by(home, pid)?,
                None => None,
            };
            let other = other.with_context(|| {
                format!(
                    "config.json: the {name} namespace {path} is that of no running container below {}: only such a container's can be joined, in its VM",
                    home.sandboxes().display()
                )
            })?;
            if name == "ipc" {
                shm = other.record()?.shm;
            }
            namespaces.push(SharedNamespace {
                kind: name.into(),
                container_id: other.id().to_string(),
                ..SharedNamespace::default()
            });
            others.push(other);
        }
        if let Network::At(path) = &plan.network
            && let Some(pid) = stand_in(path, "net")
        {
            // The network of a process that is nobody's is like any other.
            others.extend(stood_for_by(home, pid)?);
        }
        let mut vms = Vec::new();
        for other in &others {
            let record = other.record()?;
            vms.push(record.joined.map_or_else(|| other.id().clone(), |j| j.vm));
        }
        let Some(vm) = vms.first() else {
            return Ok(None);
        };
        ensure!(
            vms.iter().all(|other| other == vm),
            "config.json: the containers whose namespaces are to be joined are in different VMs"
        );
        let owner = Container::find(home, vm.as_str())?;
        let record = owner.record()?;
        let membership = Self {
            owner,
            engine: record.engine,
            engine_reason: record.engine_reason,
            joined: Joined {
                vm: vm.clone(),
                place: Id::random().context("cannot make an ID")?,
            },
            namespaces,
            shm,
        };
        membership.check(plan)?;
        Ok(Some(membership))
    }

    fn check(&self, plan: &Plan) -> Result<()> {
        let owner = self.owner.id();
        let monitor = self.monitor()?;
        ensure!(
            plan.network
                .is_at(Path::new(&format!("/proc/{monitor}/ns/net")))?,
            "config.json: namespaces of the VM of container {owner} are to be joined, and so must be its network namespace: a VM has one network (docker: --network container:{owner})"
        );
        ensure!(
            !plan.has_users,
            "config.json: the container comes to the VM of container {owner} and cannot have a user namespace of its own there"
        );
        let engine = match self.engine {
            Engine::Kvm => EngineChoice::Kvm,
            Engine::Software => EngineChoice::Software,
        };
        ensure!(
            [EngineChoice::Auto, engine].contains(&plan.engine),
            "the container comes to the VM of container {owner}, whose engine is another than it asks for"
        );
        refuse_limits_of_the_host(owner, &plan.host_limits)
    }

    /// What of the container's limits there is no room for, in words.
    ///
    /// # Errors
    /// When the VM does not say how large it is.
    pub fn notes(&self, plan: &Plan) -> Result<Vec<String>> {
        notes(&self.owner, plan.size, plan.memory_is_limited())
    }

    /// Where the guest has what the host has at `source`, if that is the shared memory of the container whose IPC namespace this one has.
    pub fn shared_memory(&self, source: &Path) -> Option<PathBuf> {
        let shm = self.shm.as_ref().filter(|shm| shm.source == source);
        shm.map(|shm| shm.in_guest.clone())
    }

    /// The VM.
    pub fn vm(&self) -> Sandbox {
        self.owner.sandbox()
    }

    /// Moves this process, which has no other thread, to where the VM's files are mounted.
    ///
    /// # Errors
    /// When the VM is gone.
    pub fn enter_mounts(&self) -> Result<()> {
        Ok(enter_namespace_of(self.monitor()?)?)
    }

    fn monitor(&self) -> Result<i32> {
        let monitor = self.owner.monitor()?.filter(|pid| *pid > 0);
        monitor.with_context(|| format!("the VM of container {} is gone", self.owner.id()))
    }
}

/// Refuses limits that are a VM's as a whole, for a container that came to the VM of `owner`. Shares of its CPUs are not: they are those
/// in the guest.
///
/// # Errors
/// When there is one.
pub fn refuse_limits_of_the_host(owner: &Id, limits: &HostLimits) -> Result<()> {
    for (what, given) in [
        ("a set of CPUs", limits.cpus.is_some()),
        ("a set of memory nodes", limits.mems.is_some()),
        (
            "a limit of block I/O",
            !limits.throttles.is_empty() || limits.block_weight.is_some(),
        ),
    ] {
        if given {
            bail!(
                "{what} is for a VM as a whole, and the container shares that of container {owner}: give it to that one"
            );
        }
    }
    Ok(())
}

/// What there is no room for in the owner's VM, in words, of the limits of a container that would have a VM of that size for itself.
///
/// # Errors
/// When the VM does not say how large it is.
pub fn notes(owner: &Container, size: VmSize, memory_is_limited: bool) -> Result<Vec<String>> {
    let vm = owner.sandbox().size()?;
    let owner = owner.id();
    let mut notes = Vec::new();
    if memory_is_limited && size.memory_mib > vm.memory_mib {
        notes.push(format!(
            "the container may use more memory than there is: the VM of container {owner}, which it comes to, has {} MiB",
            vm.memory_mib
        ));
    }
    if size.vcpus > vm.vcpus {
        notes.push(format!(
            "the container may use {} CPUs: the VM of container {owner}, which it comes to, has {}",
            size.vcpus, vm.vcpus
        ));
    }
    Ok(notes)
}

/// The process whose namespace a path names, if it names one so.
fn stand_in(path: &Path, name: &str) -> Option<i32> {
    let pid = path.to_str()?.strip_prefix("/proc/")?;
    let pid = pid.strip_suffix(&format!("/ns/{name}"))?;
    pid.parse().ok().filter(|pid| *pid > 0)
}

/// The container for whose init a process stands, which waits for its start or runs.
fn stood_for_by(home: &Home, pid: i32) -> Result<Option<Container>> {
    for container in Container::all(home)? {
        // Others may be removed meanwhile.
        if container
            .monitor()
            .is_ok_and(|monitor| monitor == Some(pid))
        {
            return Ok(Some(container));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_names_a_process_only_as_proc_does() {
        let of = |path: &str| stand_in(Path::new(path), "ipc");
        assert_eq!(of("/proc/42/ns/ipc"), Some(42));
        for path in [
            "",
            "/proc/42/ns/net",
            "/proc/self/ns/ipc",
            "/proc/0/ns/ipc",
            "/proc/-1/ns/ipc",
            "/proc/42/ns/ipc/",
            "/proc/42/../1/ns/ipc",
            "/proc/99999999999/ns/ipc",
            "/run/netns/ipc",
            "proc/42/ns/ipc",
        ] {
            assert_eq!(of(path), None, "{path}");
        }
    }

    #[test]
    fn limits_of_a_vm_are_not_a_members() {
        let owner = "one".parse().unwrap();
        let shares = HostLimits {
            cpu_shares: Some(512),
            ..HostLimits::default()
        };
        refuse_limits_of_the_host(&owner, &shares).unwrap();
        let cpus = HostLimits {
            cpus: Some("0".into()),
            ..HostLimits::default()
        };
        let error = refuse_limits_of_the_host(&owner, &cpus).unwrap_err();
        assert!(error.to_string().contains("container one"), "{error}");
    }
}
