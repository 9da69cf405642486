//! The agent: PID 1 of a cloison guest. It serves the host's calls (`cloison-agent-api`), makes containers with
//! libcontainer in a helper process of its own, moves their stdio to and from the host, and reaps. It trusts the host
//! and nothing in a container.

pub mod boot;
mod cgroup;
pub mod connect;
mod container;
mod cpus;
mod devices;
mod dirs;
mod error;
pub mod helper;
mod ids;
pub mod init;
mod interfaces;
mod joined;
mod lifeline;
mod mounts;
mod netlink;
mod preserved;
mod process;
mod pump;
mod random;
mod reaper;
mod report;
mod resolver;
pub mod server;
mod service;
mod slots;
mod sockets;
mod spawn;
mod spec;
mod stdio;
mod sys;
pub mod template;
mod workload;

pub use container::Shared;
pub use error::chain;
pub use reaper::Reaper;
pub use service::Service;
