//! A sandbox's life on the host: its directory, the directory it shares with its guest, its VM process, its agent, and their
//! removal. Every front door comes through here; nothing here knows which engine runs the VM, what an image is, or what a
//! person sees.

mod agent;
mod error;
mod home;
mod host;
mod id;
mod mounts;
mod network;
mod sandbox;
mod shared;
mod stdio;

pub use agent::{Agent, AgentError, ExitStatus, Failure, GuestInfo};
pub use error::Error;
pub use home::Home;
pub use host::{pidfd, split, terminal_size};
pub use id::{Id, InvalidName, Name};
pub use mounts::enter_private_namespace;
pub use network::Network;
pub use sandbox::{Running, Sandbox};
pub use shared::Shared;
pub use stdio::{HostStream, Streams, Wiring};
