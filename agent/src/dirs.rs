//! Where the agent keeps things in the guest. All of it is on the guest's own tmpfs and dies with the VM.

/// libcontainer's state, one directory per container.
pub const STATE: &str = "/run/cloison/state";
/// Bundles: one directory per container with the spec as libcontainer gets it.
pub const BUNDLES: &str = "/run/cloison/bundle";
/// Sockets through which a container's terminal arrives.
pub const CONSOLES: &str = "/run/cloison/console";
/// Sockets that stand for the host's.
pub const SOCKETS: &str = "/run/cloison/socket";
/// The cgroup v2 hierarchy.
pub const CGROUPS: &str = "/sys/fs/cgroup";
/// cgroup of a container whose spec names none: a child of this one.
pub const DEFAULT_CGROUP: &str = "/cloison";
