//! What is fuzzed: everything that reads what a guest, or someone who can reach a control socket, has written. Each target takes bytes
//! and must come back without a panic. Under `fuzz_targets` they are libFuzzer's (`make fuzz`); the tests here run them on inputs that
//! are the same every time. Targets need root, as the devices do.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a failure here is a finding"
)]

mod agent;
mod control;
mod devices;
mod fuse;
mod input;
mod packets;
#[path = "../../../runtime/devices/tests/hostile/subjects.rs"]
mod subjects;
#[cfg(test)]
mod tests;

pub use agent::agent_reply;
pub use control::control;
pub use devices::{balloon, blk, console, fs, mem, net, pmem, rng, vsock};
pub use fuse::fuse;
pub use packets::vsock_packet;

/// A target's name, and what takes an input.
pub type Target = (&'static str, fn(&[u8]));

/// All targets, by the names of their files.
pub const TARGETS: [Target; 13] = [
    ("agent_reply", agent_reply),
    ("balloon", balloon),
    ("blk", blk),
    ("console", console),
    ("control", control),
    ("fs", fs),
    ("fuse", fuse),
    ("mem", mem),
    ("net", net),
    ("pmem", pmem),
    ("rng", rng),
    ("vsock", vsock),
    ("vsock_packet", vsock_packet),
];
