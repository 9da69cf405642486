//! A sandbox's life on the host: its directory, the directory it shares with its guest, its VM process, its agent, and their
//! removal. Every front door comes through here; nothing here knows which engine runs the VM, what an image is, or what a
//! person sees.

mod agent;
mod attached;
mod cgroup;
mod error;
mod home;
mod host;
mod id;
mod idmap;
mod lock;
mod mounts;
mod network;
mod parts;
mod preserved;
mod resize;
mod resolver;
mod sandbox;
mod scope;
mod shared;
mod signals;
mod size;
mod stdio;
mod terminal;
mod view;

pub use agent::{Agent, AgentError, ExitStatus, Failure, GuestInfo, Joined, NewProcess, Usage};
pub use attached::Attached;
pub use cgroup::{
    CgroupPlace, HostCgroup, HostLimits, OOM_PROCESS_NAME, Throttle, Throttled, oom_main,
};
pub use error::Error;
pub use home::Home;
pub use host::{pidfd, split, take_charge, take_inherited, terminal_size};
pub use id::{Id, InvalidName, Name};
pub use idmap::{IdMap, IdRange};
pub use lock::MonitorLock;
pub use mounts::{BindOptions, Source, enter_namespace_of, enter_private_namespace};
pub use network::Network;
pub use parts::Parts;
pub use preserved::{Descriptor, Preserved};
pub use resize::Resize;
pub use resolver::{Resolver, loopback_resolver};
pub use sandbox::{Lent, MAX_SOCKETS, Running, Sandbox};
pub use scope::Scope;
pub use shared::{Shared, mount_in_guest};
pub use signals::{Event, Signals, UnknownSignal, signal_number};
pub use size::{LimitError, VmSize};
pub use stdio::{HostStream, Lifeline, Streams, Wiring};
pub use terminal::RawTerminal;
pub use view::View;
