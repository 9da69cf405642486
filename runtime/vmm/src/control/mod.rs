//! The control socket: how anyone with access to a sandbox's directory talks to its VM process. One JSON message a packet, one
//! reply to each request, in order. The protocol is here, its two sides in the modules below.

mod client;
mod server;
#[cfg(feature = "testing")]
pub(crate) mod testing;

use cloison_devices::MacAddress;
use serde::{Deserialize, Serialize};

pub use client::{ControlClient, ControlError};
pub(crate) use server::{Host, Server};

use crate::nic::Plugged;
use crate::spec::Engine;
use crate::timeline::Timeline;

/// A request. Descriptors travel with the packet that asks for something to be done with them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
enum Request {
    /// How is the VM? Answered by [`Reply::Status`].
    Status {},
    /// Connect a host port to the descriptors that come along, in the order read, write, done; answered by [`Reply::Attached`].
    Attach { read: bool, write: bool, done: bool },
    /// What has the guest's kernel said? Answered by [`Reply::KernelLog`].
    KernelLog {},
    /// Stop the guest's vCPUs. Answered by [`Reply::Done`] when they have stopped.
    Pause {},
    /// Let a paused guest go on. Answered by [`Reply::Done`].
    Resume {},
    /// Let the guest use this many vCPUs. Answered by [`Reply::Done`].
    ResizeVcpus { vcpus: u8 },
    /// Let the guest have this much memory. Answered by [`Reply::Done`] when it has been told; a descriptor that comes along is closed
    /// when it has that much, or is told something else.
    ResizeMemory { memory_mib: u32, done: bool },
    /// Give the guest one more device, made from the descriptor that comes along if the device needs one; answered by
    /// [`Reply::Plugged`].
    Plug { device: DeviceKind },
    /// Take a device away that came by [`Request::Plug`]. Answered by [`Reply::Done`].
    Unplug { slot: u32 },
    /// End the VM at once. Answered by [`Reply::Done`], then the socket hangs up.
    Kill {},
}

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
enum Reply {
    Done {},
    Status(Status),
    Attached { port: u32 },
    KernelLog { text: String },
    Plugged(Plugged),
    Error { message: String },
}

/// A living VM, seen from outside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The sandbox's ID.
    pub id: String,
    /// What runs the guest.
    pub engine: Engine,
    /// How far the guest has come.
    pub state: State,
    /// The VM process's own ID.
    pub pid: u32,
    /// IDs of the processes the engine runs beside it.
    pub engine_pids: Vec<u32>,
    /// Milliseconds since the VM process began.
    pub uptime_ms: u64,
    /// When it came how far.
    pub timeline: Timeline,
    /// Memory the guest has, MiB.
    pub memory_mib: u32,
    /// Memory it keeps, which it was started with, MiB.
    pub min_memory_mib: u32,
    /// Memory it can be given, MiB.
    pub max_memory_mib: u32,
    /// vCPUs the guest may use.
    pub vcpus: u8,
    /// vCPUs it can be given.
    pub max_vcpus: u8,
    /// Network devices that are in use; those that were there before the guest started first, in the order in which they were given.
    pub nics: Vec<Plugged>,
}

/// A device that a guest can be given while it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// One more source of entropy.
    Rng,
    /// A disk: a file or block device of the host's, whose descriptor comes along, open for reading and, unless it is read-only,
    /// writing.
    Blk {
        /// The guest cannot write to it.
        read_only: bool,
        /// What the guest sees as its serial number, at most 20 bytes.
        serial: String,
    },
    /// A network interface: a tap, whose descriptor comes along.
    Net {
        /// The guest's hardware address.
        mac: MacAddress,
    },
}

impl DeviceKind {
    /// Whether it is made from a descriptor.
    fn has_descriptor(&self) -> bool {
        matches!(self, Self::Blk { .. } | Self::Net { .. })
    }
}

/// How far the guest has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The guest's kernel has not taken its first device yet.
    Starting,
    /// It has.
    Running,
    /// Its vCPUs have been stopped.
    Paused,
}
