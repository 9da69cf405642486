//! The host's side of a sandbox's network.
//!
//! - [`Namespace`]: network namespaces.
//! - [`Adopter`]: gives a guest the interfaces of a namespace that a caller prepared.
//! - [`Networks`]: networks of cloison's own, with [`Publication`]s of ports and policies for [`Egress`].
//! - [`files`]: what a container finds in `/etc` about its network.
//!
//! Everything happens in a namespace that is named; nothing here depends on the one the caller is in. Functions that talk to the
//! kernel at length are asynchronous and want a tokio runtime with I/O.

mod adopt;
mod attach;
mod detach;
mod direct;
mod egress;
mod error;
pub mod files;
mod guest;
mod links;
mod mac;
mod macvtap;
mod namespace;
mod netlink;
mod network;
mod networks;
mod nft;
mod ports;
mod publish;
mod sandbox;
mod store;
mod sys;
mod sysctl;
#[cfg(test)]
mod testing;

pub use adopt::{Adopted, Adopter, Change, release};
pub use egress::{Egress, Names};
pub use error::{Error, Result};
pub use guest::{GuestAddress, GuestInterface, GuestNeighbour, GuestRoute};
pub use ipnet::IpNet;
pub use mac::Mac;
pub use namespace::Namespace;
pub use network::{Network, NetworkSpec, parse_subnet};
pub use networks::{Inspection, Networks};
pub use ports::{Reservation, reserve};
pub use publish::{Mapping, Protocol, Publication};
pub use sandbox::{Addresses, Attached, Attachment, Lease};
