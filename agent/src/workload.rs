//! What a container's process becomes once libcontainer has put it into the container: its program, identity, limits
//! and filter. The agent makes it from the spec, the helper carries it out (`helper::finish`).

use std::collections::HashMap;
use std::path::PathBuf;

use libcontainer::oci_spec::runtime::{Hook, LinuxCapabilities, LinuxSeccomp, PosixRlimit};
use serde::{Deserialize, Serialize};

/// The last steps of a container's process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Workload {
    /// Never empty; no NUL in it.
    pub args: Vec<String>,
    /// `NAME=value`, in the spec's order; no NUL in it.
    pub env: Vec<String>,
    /// Absolute.
    pub cwd: PathBuf,
    /// Make `cwd` if it is missing.
    pub make_cwd: bool,
    /// As the container's user namespace counts, like all IDs here.
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub capabilities: LinuxCapabilities,
    pub rlimits: Vec<PosixRlimit>,
    pub seccomp: Option<LinuxSeccomp>,
    /// What a container's init runs before its program.
    pub start: Option<Start>,
    pub terminal: Option<Terminal>,
    /// Join the user namespace of this process, a container's init, by its PID outside the container.
    pub user_namespace_of: Option<i32>,
    /// Path within the hierarchy of a cgroup below the container's that the process is to be in.
    pub cgroup: Option<PathBuf>,
    /// The process is in a network namespace of its own, whose loopback interface nobody else brings up.
    pub new_network: bool,
    /// Places of the container where a tmpfs is mounted that begins with a copy of what it covers.
    pub copy_up: Vec<CopyUp>,
    /// Mounts of the container that are changed when all are there, and mount(2)'s flags for that: those whose propagation the spec
    /// says, a read-only /dev, and read-only ones that are filled first.
    pub mount_changes: Vec<(PathBuf, u64)>,
}

/// The startContainer hooks of a container, and what they are told of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Start {
    pub hooks: Vec<Hook>,
    pub container_id: String,
    pub bundle: PathBuf,
    pub annotations: HashMap<String, String>,
}

/// A tmpfs that begins with a copy of what it covers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyUp {
    /// The container's root file system, as the guest has it.
    pub root: PathBuf,
    /// In the container.
    pub place: PathBuf,
}

/// The terminal of a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// Who shall own it, as the user namespace counts in which the process is made; nobody leaves it root's.
    pub owner: Option<u32>,
    /// Initial size: columns, rows.
    pub size: Option<(u16, u16)>,
}
