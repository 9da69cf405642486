//! From docker's options and an image's configuration to the OCI runtime spec that the agent gets, with every path as the guest
//! sees it. Nothing here touches the host, but for reading the files that options name.

mod capabilities;
mod process;
mod seccomp;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cloison_sandbox::Id;
use oci_spec::runtime::{
    LinuxCpuBuilder, LinuxMemoryBuilder, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxResources,
    Mount, MountBuilder, Process, RootBuilder, Spec,
};

use crate::values::{Bytes, MilliCpus, Tmpfs};

pub use capabilities::Capabilities;
pub use process::{ProcessPlan, command, environment, user_of};
pub use seccomp::SecurityOptions;

/// Release of the OCI runtime specification that the spec follows.
const OCI_VERSION: &str = "1.2.0";
/// CFS period, microseconds, docker's.
const CPU_PERIOD_US: u64 = 100_000;
/// Where `--init` puts the init in the container, and where the guest has it.
const INIT_IN_CONTAINER: &str = "/sbin/cloison-init";
const INIT_IN_GUEST: &str = "/init";

/// What a container is besides its process.
pub struct ContainerPlan<'a> {
    pub id: &'a Id,
    pub process: Process,
    pub hostname: String,
    /// Where the guest finds the root file system.
    pub rootfs: PathBuf,
    pub read_only: bool,
    pub memory: Option<Bytes>,
    pub cpus: Option<MilliCpus>,
    pub security: SecurityOptions,
    /// Bind mounts: where the guest finds the source, where the container has it, whether it may only read.
    pub binds: Vec<(PathBuf, PathBuf, bool)>,
    pub tmpfs: &'a [Tmpfs],
    pub init: bool,
}

impl ContainerPlan<'_> {
    /// Makes the spec.
    ///
    /// # Errors
    /// When a part of it contradicts the OCI specification.
    pub fn into_spec(self) -> Result<Spec> {
        let mut spec = Spec::default();
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for (source, destination, read_only) in &self.binds {
            let access = if *read_only { "ro" } else { "rw" };
            mounts.push(mount(
                "bind",
                source,
                destination,
                ["rbind", "rprivate", access],
            )?);
        }
        for tmpfs in self.tmpfs {
            mounts.push(mount(
                "tmpfs",
                Path::new("tmpfs"),
                &tmpfs.destination,
                tmpfs.options.iter().map(String::as_str),
            )?);
        }
        let mut process = self.process;
        if self.init {
            mounts.push(mount(
                "bind",
                Path::new(INIT_IN_GUEST),
                Path::new(INIT_IN_CONTAINER),
                ["bind", "ro"],
            )?);
            let mut args = vec![INIT_IN_CONTAINER.to_owned(), "--".to_owned()];
            args.extend(process.args().clone().unwrap_or_default());
            process.set_args(Some(args));
        }
        process.set_no_new_privileges(Some(self.security.no_new_privileges));

        let mut linux = spec
            .linux()
            .clone()
            .context("the default spec has no Linux part")?;
        // The guest has one network stack, and it is the container's.
        let namespaces = [
            LinuxNamespaceType::Pid,
            LinuxNamespaceType::Ipc,
            LinuxNamespaceType::Uts,
            LinuxNamespaceType::Mount,
            LinuxNamespaceType::Cgroup,
        ];
        let namespaces: Result<Vec<_>, _> = namespaces
            .into_iter()
            .map(|typ| LinuxNamespaceBuilder::default().typ(typ).build())
            .collect();
        linux.set_namespaces(Some(namespaces?));
        linux.set_cgroups_path(Some(format!("/cloison/{}", self.id).into()));
        linux.set_resources(Some(resources(
            linux.resources().clone().unwrap_or_default(),
            self.memory,
            self.cpus,
        )?));
        linux.set_seccomp(self.security.seccomp);

        spec.set_version(OCI_VERSION.into());
        spec.set_root(Some(
            RootBuilder::default()
                .path(self.rootfs)
                .readonly(self.read_only)
                .build()?,
        ));
        spec.set_hostname(Some(self.hostname));
        spec.set_mounts(Some(mounts));
        spec.set_process(Some(process));
        spec.set_linux(Some(linux));
        Ok(spec)
    }
}

fn resources(
    mut resources: LinuxResources,
    memory: Option<Bytes>,
    cpus: Option<MilliCpus>,
) -> Result<LinuxResources> {
    if let Some(Bytes(limit)) = memory {
        let limit = i64::try_from(limit).context("the memory limit is too large")?;
        // Memory and swap together: the guest has no swap, and the limit says so.
        resources.set_memory(Some(
            LinuxMemoryBuilder::default()
                .limit(limit)
                .swap(limit)
                .build()?,
        ));
    }
    if let Some(MilliCpus(milli)) = cpus {
        let quota = i64::from(milli) * i64::try_from(CPU_PERIOD_US)? / 1000;
        resources.set_cpu(Some(
            LinuxCpuBuilder::default()
                .quota(quota)
                .period(CPU_PERIOD_US)
                .build()?,
        ));
    }
    Ok(resources)
}

fn mount<'o>(
    typ: &str,
    source: &Path,
    destination: &Path,
    options: impl IntoIterator<Item = &'o str>,
) -> Result<Mount> {
    let options: Vec<String> = options.into_iter().map(str::to_owned).collect();
    Ok(MountBuilder::default()
        .typ(typ)
        .source(source)
        .destination(destination)
        .options(options)
        .build()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::values::Volume;

    fn plan(id: &Id) -> ContainerPlan<'_> {
        ContainerPlan {
            id,
            process: Process::default(),
            hostname: "h".into(),
            rootfs: "/shared/x/rootfs".into(),
            read_only: false,
            memory: None,
            cpus: None,
            security: SecurityOptions::default(),
            binds: Vec::new(),
            tmpfs: &[],
            init: false,
        }
    }

    #[test]
    fn limits_become_cgroup_limits() {
        let id = "x".parse().unwrap();
        let mut plan = plan(&id);
        plan.memory = Some("64m".parse().unwrap());
        plan.cpus = Some("1.5".parse().unwrap());
        let spec = plan.into_spec().unwrap();
        let resources = spec.linux().as_ref().unwrap().resources().clone().unwrap();
        assert_eq!(resources.memory().unwrap().limit(), Some(64 << 20));
        assert_eq!(resources.cpu().as_ref().unwrap().quota(), Some(150_000));
    }

    #[test]
    fn the_container_shares_the_guests_network_and_nothing_else() {
        let id = "x".parse().unwrap();
        let spec = plan(&id).into_spec().unwrap();
        let namespaces = spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
        let has = |typ| namespaces.iter().any(|n| n.typ() == typ);
        assert!(!has(LinuxNamespaceType::Network));
        assert!(
            has(LinuxNamespaceType::Pid)
                && has(LinuxNamespaceType::Mount)
                && has(LinuxNamespaceType::Cgroup)
        );
    }

    #[test]
    fn mounts_come_after_the_ones_every_container_has() {
        let id = "x".parse().unwrap();
        let volume: Volume = "/a:/dev/shm/b:ro".parse().unwrap();
        let mut plan = plan(&id);
        plan.binds = vec![(
            "/shared/x/mounts/0".into(),
            volume.destination,
            volume.read_only,
        )];
        let spec = plan.into_spec().unwrap();
        let last = spec.mounts().as_ref().unwrap().last().unwrap();
        assert_eq!(last.destination(), Path::new("/dev/shm/b"));
        assert!(last.options().as_ref().unwrap().contains(&"ro".to_owned()));
    }

    #[test]
    fn an_init_runs_the_command_as_its_child() {
        let id = "x".parse().unwrap();
        let mut plan = plan(&id);
        plan.init = true;
        let spec = plan.into_spec().unwrap();
        let args = spec.process().as_ref().unwrap().args().clone().unwrap();
        assert_eq!(args, [INIT_IN_CONTAINER, "--", "sh"]);
    }
}
