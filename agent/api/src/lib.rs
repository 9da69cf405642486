//! The protocol between the host and the agent, the guest's PID 1: the messages, the asynchronous client and service
//! generated from `agent.proto`, and the numbers and names both sides must agree on. Nothing here does any I/O.

#![forbid(unsafe_code)]

pub mod resolver;

#[allow(clippy::all, clippy::unwrap_used, clippy::expect_used)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

pub use generated::{agent, agent_ttrpc};

/// Version of the protocol. Raised by every change an older peer would misunderstand; the two sides work together only when
/// they say the same number in `Hello`.
pub const PROTOCOL: u32 = 5;

/// The host's vsock context ID (virtio 1.3 §5.10.4, VMADDR_CID_HOST).
pub const HOST_CID: u32 = 2;

/// The vsock port of this protocol on both sides: the agent serves every connection it accepts on it, and, once at boot,
/// dials the same port on the host and serves that connection as well.
pub const AGENT_PORT: u32 = 1024;

/// The first argument of an agent that is to become a template: when it is ready for calls it writes [`TEMPLATE_READY`] to its console and
/// reads a line from it. Only then does it take up the devices in [`TEMPLATE_SLOTS`] and [`TEMPLATE_NIC_SLOTS`], mount the shared directory and dial
/// [`AGENT_PORT`].
pub const TEMPLATE_ARGUMENT: &str = "template";

/// A line of its own on the console of a guest with [`TEMPLATE_ARGUMENT`].
pub const TEMPLATE_READY: &str = "cloison-agent: ready to become a template";

/// The slots of the vsock device and the shared directory, which may be empty in a template.
pub const TEMPLATE_SLOTS: [u32; 2] = [0, 1];

/// The slots, empty in a template, of network devices, which are put there in this order.
pub const TEMPLATE_NIC_SLOTS: [u32; 3] = [2, 3, 4];

/// The most bytes of `HelloRequest.entropy`.
pub const MAX_ENTROPY: usize = 256;

/// The most descriptors that a process is given beside stdio, `Stdio.preserved`.
pub const MAX_PRESERVED: usize = 64;

/// Devices that a process's descriptor can be of: files below /dev, and their minor numbers as the kernel's own have them, with major number 1
/// (Documentation/admin-guide/devices.txt).
pub const DEVICES: [(&str, u32); 5] = [
    ("/dev/null", 3),
    ("/dev/zero", 5),
    ("/dev/full", 7),
    ("/dev/random", 8),
    ("/dev/urandom", 9),
];

/// Tag of the virtio-fs device through which the host shares files with the guest (virtio 1.3 §5.11.4, at most 36 bytes).
pub const SHARED_TAG: &str = "cloison";

/// Where the guest has the shared directory mounted.
pub const SHARED_DIR: &str = "/run/cloison/shared";
