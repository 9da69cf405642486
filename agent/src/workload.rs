//! What a container's process becomes once libcontainer has put it into the container: its program, identity, limits
//! and filter. The agent makes it from the spec, the helper carries it out (`helper::finish`).

use std::path::PathBuf;

use libcontainer::oci_spec::runtime::{LinuxCapabilities, LinuxSeccomp, PosixRlimit};
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
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub capabilities: LinuxCapabilities,
    pub rlimits: Vec<PosixRlimit>,
    pub seccomp: Option<LinuxSeccomp>,
    /// Initial size of the terminal: columns, rows.
    pub window: Option<(u16, u16)>,
    /// The process is in a network namespace of its own, whose loopback interface nobody else brings up.
    pub new_network: bool,
}
