//! From the spec the host sends to what libcontainer gets and what the agent's helper does itself. Everything that the
//! guest cannot do is refused here, with the reason, before anything is made.
//!
//! libcontainer is asked for everything up to the process's identity: namespaces, limits, mounts, devices, masked paths,
//! sysctls, terminal. Rules for devices are the agent's own (`devices`): libcontainer 0.7 takes a rule that denies writing
//! not to deny reading and writing. User, capabilities, rlimits, working directory, seccomp and startContainer hooks are taken out of the
//! spec and done by `helper::finish`, because libcontainer 0.7
//! - drops the seccomp filter of every exec (its tenant builder keeps the namespaces only),
//! - takes the mask of a filter's comparison for its value, and forbids system calls that a profile has never heard of instead of
//!   denying that they exist (`helper::filter`),
//! - runs the hooks before it loads the filter, which is to hold for them as well,
//! - cannot load the filter for `noNewPrivileges: false` (it loads it after the capabilities are gone), and for
//!   `null` loads it so early that the filter must allow all of libcontainer's own system calls,
//! - treats missing capabilities as all instead of none,
//! - sets rlimits before its own set-up, which then runs under them,
//! - needs the working directory to exist,
//! - leaves stdio and terminal owned by root,
//! - leaves an exec outside the container's user namespace,
//! - passes the propagation of a mount to the mount(2) that makes it, which ignores it,
//! - leaves a read-only /dev writable, as it has to be until its nodes are made,
//! - looks names up through the C library, which in a static program loads the container's own NSS modules.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use libcontainer::oci_spec::runtime::{
    Linux, LinuxCapabilities, LinuxIdMapping, LinuxNamespaceType, LinuxResources, LinuxSeccomp,
    LinuxSeccompAction, Mount, PosixRlimit, Process, Spec, User,
};

use crate::cpus;
use crate::devices::{self, Rule};
use crate::dirs;
use crate::error::{Error, Result};
use crate::ids::ContainerId;
use crate::workload::{CopyUp, Start, Terminal, Workload};

/// What an exec takes from its container when its own process says nothing, as runc does.
#[derive(Debug, Clone)]
pub struct Defaults {
    capabilities: LinuxCapabilities,
    rlimits: Vec<PosixRlimit>,
    no_new_privileges: Option<bool>,
    oom_score_adj: Option<i32>,
    apparmor_profile: Option<String>,
    seccomp: Option<LinuxSeccomp>,
    /// User IDs of the container's own user namespace, if it has one.
    users: Option<Vec<LinuxIdMapping>>,
}

impl Defaults {
    /// Who a user of the container is outside it; `None` if nobody.
    pub fn outside(&self, uid: u32) -> Option<u32> {
        let Some(users) = &self.users else {
            return Some(uid);
        };
        users.iter().find_map(|mapping| {
            let within = uid.checked_sub(mapping.container_id())?;
            (within < mapping.size()).then(|| mapping.host_id().checked_add(within))?
        })
    }

    /// The container has a user namespace of its own.
    pub fn maps_users(&self) -> bool {
        self.users.is_some()
    }
}

/// A container's spec, checked and split.
#[derive(Debug)]
pub struct ContainerSpec {
    /// For libcontainer, as JSON.
    pub config: Vec<u8>,
    pub workload: Workload,
    /// Absolute path within the cgroup hierarchy, never its root.
    pub cgroup: PathBuf,
    /// How many CPUs it may use; `None`: all.
    pub cpus: Option<u32>,
    pub devices: Vec<Rule>,
    /// Settings of the guest's own network, which is the container's: a file below /proc/sys, and what to write into it.
    pub network_settings: Vec<(PathBuf, String)>,
    /// The directory that is bound to /dev/shm, if one is.
    pub shared_memory: Option<PathBuf>,
    pub defaults: Defaults,
}

/// An exec's process, checked and split.
#[derive(Debug)]
pub struct ExecSpec {
    /// For libcontainer, as JSON.
    pub process: Vec<u8>,
    pub workload: Workload,
}

/// The mount option of a tmpfs that begins with a copy of what it covers.
const COPY_UP: &str = "tmpcopyup";

fn invalid(why: impl Into<String>) -> Error {
    Error::Invalid {
        what: "spec",
        why: why.into(),
    }
}

/// Reads the spec of a container to be created.
pub fn container(
    id: &ContainerId,
    json: &[u8],
    window: Option<(u16, u16)>,
) -> Result<ContainerSpec> {
    let mut spec: Spec = serde_json::from_slice(json)
        .map_err(|error| invalid(format!("not an OCI spec: {error}")))?;
    refuse_host_hooks(&spec)?;
    if spec.root().is_none() {
        return Err(invalid("root is missing"));
    }
    let process = spec
        .process()
        .clone()
        .ok_or_else(|| invalid("process is missing"))?;
    let mut linux = spec
        .linux()
        .clone()
        .ok_or_else(|| invalid("linux is missing"))?;

    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    for namespace in &mut namespaces {
        if namespace
            .path()
            .as_ref()
            .is_some_and(|path| path.as_os_str().is_empty())
        {
            namespace.set_path(None);
        }
    }
    let has = |kind| namespaces.iter().any(|n| n.typ() == kind);
    if !has(LinuxNamespaceType::Mount) {
        return Err(invalid(
            "linux.namespaces has no mount namespace: its mounts would be made in the agent's",
        ));
    }
    let has_users = has(LinuxNamespaceType::User);
    let new_network = namespaces
        .iter()
        .any(|n| n.typ() == LinuxNamespaceType::Network && n.path().is_none());
    linux.set_namespaces(Some(namespaces));

    let own_network = linux
        .namespaces()
        .iter()
        .flatten()
        .any(|n| n.typ() == LinuxNamespaceType::Network);
    let network_settings = match own_network {
        true => Vec::new(),
        false => take_network_settings(&mut linux)?,
    };

    let seccomp = linux.seccomp().clone();
    if let Some(seccomp) = &seccomp {
        refuse_notification(seccomp)?;
    }
    linux.set_seccomp(None);

    let cgroup = cgroup_path(id, linux.cgroups_path().as_deref())?;
    linux.set_cgroups_path(Some(cgroup.clone()));
    let devices = match linux.resources_mut() {
        Some(resources) => adapt_resources(resources)?,
        None => Vec::new(),
    };
    let cpus = cpus::usable(linux.resources().as_ref());

    let defaults = Defaults {
        capabilities: process
            .capabilities()
            .clone()
            .unwrap_or_else(no_capabilities),
        rlimits: process.rlimits().clone().unwrap_or_default(),
        no_new_privileges: process.no_new_privileges(),
        oom_score_adj: process.oom_score_adj(),
        apparmor_profile: process.apparmor_profile().clone(),
        seccomp,
        users: has_users.then(|| linux.uid_mappings().clone().unwrap_or_default()),
    };
    let (process, mut workload) = split(process, &defaults, window)?;
    workload.make_cwd = true;
    workload.new_network = new_network;
    workload.mount_changes = propagation(&spec);
    workload.mount_changes.extend(read_only_dev(&spec));
    take_copies(&mut spec, &mut workload);
    workload.start = take_hooks(id, &mut spec);
    spec.set_process(Some(process)).set_linux(Some(linux));
    Ok(ContainerSpec {
        config: encode(&spec)?,
        workload,
        cgroup,
        cpus,
        devices,
        network_settings,
        shared_memory: shared_memory(&spec),
        defaults,
    })
}

fn shared_memory(spec: &Spec) -> Option<PathBuf> {
    let mut mounts = spec.mounts().iter().flatten();
    let shm = mounts.find(|mount| mount.destination() == Path::new("/dev/shm"))?;
    let bound = |option: &String| option == "bind" || option == "rbind";
    let is_bound = shm.options().iter().flatten().any(bound);
    shm.source().clone().filter(|_| is_bound)
}

/// Reads the process of an exec.
pub fn exec(json: &[u8], defaults: &Defaults, window: Option<(u16, u16)>) -> Result<ExecSpec> {
    let process: Process = serde_json::from_slice(json).map_err(|error| Error::Invalid {
        what: "process",
        why: format!("not an OCI process: {error}"),
    })?;
    let (process, mut workload) = split(process, defaults, window)?;
    if let Some(terminal) = &mut workload.terminal {
        // An exec enters the container's user namespace only after it has its terminal.
        terminal.owner = defaults.outside(workload.uid);
    }
    Ok(ExecSpec {
        process: encode(&process)?,
        workload,
    })
}

/// Reads the resources of an update, and its rules for devices; without any those of the container stay.
pub fn resources(json: &[u8]) -> Result<(LinuxResources, Vec<Rule>)> {
    let mut resources: LinuxResources =
        serde_json::from_slice(json).map_err(|error| Error::Invalid {
            what: "resources",
            why: format!("not OCI resources: {error}"),
        })?;
    let devices = adapt_resources(&mut resources)?;
    Ok((resources, devices))
}

fn encode(value: &impl serde::Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| invalid(error.to_string()))
}

fn no_capabilities() -> LinuxCapabilities {
    let mut none = LinuxCapabilities::default();
    none.set_bounding(None)
        .set_effective(None)
        .set_inheritable(None)
        .set_permitted(None)
        .set_ambient(None);
    none
}

/// Takes from the process what `helper::finish` does, and leaves libcontainer a root process at `/` that can do all.
fn split(
    mut process: Process,
    defaults: &Defaults,
    window: Option<(u16, u16)>,
) -> Result<(Process, Workload)> {
    let args = process.args().clone().unwrap_or_default();
    if args.first().is_none_or(String::is_empty) {
        return Err(invalid("process.args is empty"));
    }
    let mut env = process.env().clone().unwrap_or_default();
    if let Some(entry) = env.iter().find(|e| e.find('=').is_none_or(|at| at == 0)) {
        return Err(invalid(format!("process.env: {entry:?} is not NAME=value")));
    }
    if args.iter().chain(&env).any(|text| text.contains('\0')) {
        return Err(invalid("process.args or process.env contains a NUL byte"));
    }
    let mut cwd = process.cwd().clone();
    if cwd.as_os_str().is_empty() {
        cwd = PathBuf::from("/");
    }
    if !cwd.is_absolute() {
        return Err(invalid(format!("process.cwd {cwd:?} is not absolute")));
    }
    let user = process.user().clone();
    let terminal = (process.terminal() == Some(true)).then(|| Terminal {
        owner: Some(user.uid()),
        size: window,
    });
    let workload = Workload {
        args,
        env: env.clone(),
        cwd,
        make_cwd: false,
        uid: user.uid(),
        gid: user.gid(),
        groups: user.additional_gids().clone().unwrap_or_default(),
        capabilities: process
            .capabilities()
            .clone()
            .unwrap_or_else(|| defaults.capabilities.clone()),
        rlimits: match process.rlimits() {
            Some(rlimits) if !rlimits.is_empty() => rlimits.clone(),
            _ => defaults.rlimits.clone(),
        },
        seccomp: defaults.seccomp.clone(),
        start: None,
        terminal,
        user_namespace_of: None,
        new_network: false,
        cgroup: None,
        copy_up: Vec::new(),
        mount_changes: Vec::new(),
    };

    let mut root = User::default();
    root.set_uid(0).set_gid(0).set_umask(user.umask());
    // With HOME set libcontainer has no reason to ask the C library for root's.
    if !env.iter().any(|e| e.starts_with("HOME=")) {
        env.push("HOME=/".into());
    }
    let no_new_privileges = process.no_new_privileges().or(defaults.no_new_privileges);
    let oom_score_adj = process.oom_score_adj().or(defaults.oom_score_adj);
    let apparmor = process
        .apparmor_profile()
        .clone()
        .or_else(|| defaults.apparmor_profile.clone())
        .filter(|profile| !profile.is_empty());
    process
        .set_user(root)
        .set_env(Some(env))
        .set_cwd(PathBuf::from("/"))
        .set_capabilities(None)
        .set_rlimits(None)
        .set_no_new_privileges(no_new_privileges.filter(|set| *set))
        .set_oom_score_adj(oom_score_adj)
        .set_apparmor_profile(apparmor);
    Ok((process, workload))
}

/// Takes from the mounts that a tmpfs is to begin with a copy of what it covers. One that is read-only becomes so when it has that.
fn take_copies(spec: &mut Spec, workload: &mut Workload) {
    let Some(root) = spec.root().as_ref().map(|root| root.path().clone()) else {
        return;
    };
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in &mut mounts {
        let mut options = mount.options().clone().unwrap_or_default();
        if !options.iter().any(|option| option == COPY_UP) {
            continue;
        }
        workload.copy_up.push(CopyUp {
            root: root.clone(),
            place: mount.destination().clone(),
        });
        let read_only = read_only(mount);
        if workload
            .mount_changes
            .iter()
            .all(|change| Some(change) != read_only.as_ref())
        {
            workload.mount_changes.extend(read_only);
        }
        options.retain(|option| ![COPY_UP, "ro"].contains(&option.as_str()));
        mount.set_options(Some(options));
    }
    spec.set_mounts(Some(mounts));
}

/// A /dev that is to be read-only.
fn read_only_dev(spec: &Spec) -> Option<(PathBuf, u64)> {
    let mut mounts = spec.mounts().iter().flatten();
    read_only(mounts.find(|mount| mount.destination() == Path::new("/dev"))?)
}

/// What makes a tmpfs read-only that is filled first.
fn read_only(mount: &Mount) -> Option<(PathBuf, u64)> {
    let options = mount.options().as_deref().unwrap_or_default();
    // A bind is read-only from the start: nothing is made in it.
    if mount.typ().as_deref() != Some("tmpfs") || !options.iter().any(|option| option == "ro") {
        return None;
    }
    let flags = options.iter().map(|option| match option.as_str() {
        "nosuid" => libc::MS_NOSUID,
        "nodev" => libc::MS_NODEV,
        "noexec" => libc::MS_NOEXEC,
        _ => 0,
    });
    let read_only = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY;
    Some((
        mount.destination().clone(),
        flags.fold(read_only, |all, flag| all | flag),
    ))
}

/// A cgroup below the container's.
pub fn cgroup_below(container: &Path, path: &str) -> Result<PathBuf> {
    let below = Path::new(path);
    let is_plain = |part| matches!(part, Component::Normal(_));
    if !below.components().all(is_plain) || path.contains('\0') {
        return Err(Error::Invalid {
            what: "cgroup",
            why: format!("{path:?} is not a sub cgroup path of the container's cgroup"),
        });
    }
    Ok(container.join(below))
}

/// The mounts that are to be shared or unbindable. Others are private to the container anyhow, so that there is nothing to be slave of.
fn propagation(spec: &Spec) -> Vec<(PathBuf, u64)> {
    let mounts = spec.mounts().iter().flatten();
    let words = mounts.flat_map(|mount| {
        let options = mount.options().iter().flatten();
        options.map(|option| (mount.destination(), option.as_str()))
    });
    let flags = |word| match word {
        "shared" => Some(libc::MS_SHARED),
        "rshared" => Some(libc::MS_SHARED | libc::MS_REC),
        "unbindable" => Some(libc::MS_UNBINDABLE),
        "runbindable" => Some(libc::MS_UNBINDABLE | libc::MS_REC),
        _ => None,
    };
    let known = words.filter_map(|(place, word)| Some((place.clone(), flags(word)?)));
    known.collect()
}

/// Hooks of the runtime's namespace are the host's to run: their paths mean files there.
fn refuse_host_hooks(spec: &Spec) -> Result<()> {
    let Some(hooks) = spec.hooks() else {
        return Ok(());
    };
    #[allow(deprecated)]
    let host = [
        ("prestart", hooks.prestart()),
        ("createRuntime", hooks.create_runtime()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ];
    match host
        .iter()
        .find(|(_, list)| list.as_ref().is_some_and(|l| !l.is_empty()))
    {
        Some((name, _)) => Err(invalid(format!("hooks.{name} must be run by the host"))),
        None => Ok(()),
    }
}

/// Takes out the hooks that run in the container.
fn take_hooks(id: &ContainerId, spec: &mut Spec) -> Option<Start> {
    let mut hooks = spec.hooks().clone()?;
    let start = hooks.start_container().clone().filter(|h| !h.is_empty())?;
    hooks.set_start_container(None);
    spec.set_hooks(Some(hooks));
    Some(Start {
        hooks: start,
        container_id: id.to_string(),
        bundle: Path::new(dirs::BUNDLES).join(id.as_str()),
        annotations: spec.annotations().clone().unwrap_or_default(),
    })
}

/// Takes out the settings of the network, which libcontainer refuses where that is not the container's alone. Here it is.
fn take_network_settings(linux: &mut Linux) -> Result<Vec<(PathBuf, String)>> {
    let Some(all) = linux.sysctl().clone() else {
        return Ok(Vec::new());
    };
    let (network, others): (HashMap<_, _>, HashMap<_, _>) = all
        .into_iter()
        .partition(|(name, _)| name.starts_with("net.") || name.starts_with("net/"));
    linux.set_sysctl(Some(others));
    let files = network
        .into_iter()
        .map(|(name, value)| Ok((setting(&name)?, value)));
    files.collect()
}

/// The file of a sysctl. Its parts are separated by dots, or by slashes where one of them has a dot in it (sysctl(8)).
fn setting(name: &str) -> Result<PathBuf> {
    let separator = if name.contains('/') { '/' } else { '.' };
    let mut file = PathBuf::from("/proc/sys");
    for part in name.split(separator) {
        if part.is_empty() || part == "." || part == ".." || part.contains(['/', '\0']) {
            return Err(invalid(format!("linux.sysctl {name:?} is not a name")));
        }
        file.push(part);
    }
    Ok(file)
}

/// A listener's socket would be the host's; nothing carries the descriptor there.
fn refuse_notification(seccomp: &LinuxSeccomp) -> Result<()> {
    let notify = |action| action == LinuxSeccompAction::ScmpActNotify;
    let mut syscalls = seccomp.syscalls().iter().flatten();
    if notify(seccomp.default_action()) || syscalls.any(|s| notify(s.action())) {
        return Err(invalid(
            "linux.seccomp: SCMP_ACT_NOTIFY is not supported in a VM",
        ));
    }
    Ok(())
}

fn cgroup_path(id: &ContainerId, path: Option<&Path>) -> Result<PathBuf> {
    let Some(path) = path.filter(|path| !path.as_os_str().is_empty()) else {
        return Ok(Path::new(dirs::DEFAULT_CGROUP).join(id.as_str()));
    };
    let mut absolute = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => absolute.push(name),
            Component::ParentDir | Component::Prefix(_) => {
                return Err(invalid(format!(
                    "linux.cgroupsPath {path:?} contains \"..\""
                )));
            }
        }
    }
    if absolute.parent().is_none() {
        return Err(invalid(
            "linux.cgroupsPath is the root, where the agent itself lives",
        ));
    }
    Ok(absolute)
}

/// Makes resources fit cgroup v2 and a guest without swap, refuses what neither can do, and takes the rules for devices out.
fn adapt_resources(resources: &mut LinuxResources) -> Result<Vec<Rule>> {
    let devices = devices::rules(resources.devices().as_deref().unwrap_or_default())?;
    resources.set_devices(None);
    let refuse = |why: &str| {
        Err(Error::Invalid {
            what: "resources",
            why: format!("{why} is not supported with cgroup v2"),
        })
    };
    if resources
        .rdma()
        .as_ref()
        .is_some_and(|limits| !limits.is_empty())
    {
        return refuse("rdma");
    }
    let Some(mut memory) = *resources.memory() else {
        return Ok(devices);
    };
    if memory.disable_oom_killer() == Some(true) {
        return refuse("memory.disableOOMKiller");
    }
    // The guest has no swap, so memory.swap.max does not exist; libcontainer would fail to write it, for a limit of -1
    // ("no limit") as well.
    memory.set_swap(None);
    if memory.limit() == Some(-1) {
        memory.set_limit(None);
        let mut unified = resources.unified().clone().unwrap_or_default();
        unified
            .entry("memory.max".into())
            .or_insert_with(|| "max".into());
        resources.set_unified(Some(unified));
    }
    resources.set_memory(Some(memory));
    Ok(devices)
}

#[cfg(test)]
mod tests;
