//! Images: how a reference to one is read, where its layers are kept, and how a root filesystem is made from them.
//!
//! An image is somebody else's work and is treated as hostile: digests are verified before content is believed, every size
//! and count is bounded by a named constant, and no path out of an image is followed except strictly inside the directory
//! it belongs to. This crate needs root (layers carry owners and device nodes, overlayfs wants CAP_SYS_ADMIN); it never
//! talks to a network and never changes an image's own files.
#![forbid(unsafe_code)]

mod archive;
mod blob;
mod compression;
mod config;
mod digest;
mod error;
mod layer;
mod layout;
mod limits;
mod overlay;
mod reference;
mod remove;
mod root;
mod source;
mod store;
mod tarball;
mod users;

pub use config::{DEFAULT_PATH, Healthcheck, ImageConfig};
pub use digest::{Algorithm, Digest, InvalidDigest};
pub use error::{Error, LayerError};
pub use overlay::RootFs;
pub use reference::Reference;
pub use remove::remove_tree;
pub use root::Root;
pub use store::{Image, Progress, Store};
pub use users::{User, resolve_user};
