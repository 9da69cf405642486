//! The host's side of a sandbox's network.
//!
//! - [`Namespace`]: network namespaces.
//! - [`Adopter`]: gives a guest the interfaces of a namespace that a caller prepared.
//!
//! Everything happens in a namespace that is named; nothing here depends on the one the caller is in. Functions that talk to the
//! kernel at length are asynchronous and want a tokio runtime with I/O.

mod adopt;
mod error;
mod guest;
mod mac;
mod macvtap;
mod namespace;
mod netlink;
mod sys;
#[cfg(test)]
mod testing;

pub use adopt::{Adopted, Adopter, Change, release};
pub use error::{Error, Result};
pub use guest::{GuestAddress, GuestInterface, GuestNeighbour, GuestRoute};
pub use mac::Mac;
pub use namespace::Namespace;
