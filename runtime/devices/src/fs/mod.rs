//! The virtio file system device (virtio 1.3 §5.11): one host directory, served to the guest as a FUSE file system.
//! fuse-backend-rs reads requests and writes replies; which host files they may touch, and how many descriptors and how
//! much memory they may cost, is decided here. No name of more than one component is ever resolved on the host, and no
//! host device, FIFO or socket is ever opened.

mod attr;
mod create;
mod device;
mod dir;
mod file;
mod handles;
mod identity;
mod inodes;
mod limits;
mod names;
mod serve;
mod tree;
mod xattr;

#[cfg(test)]
mod tests;

pub use device::{Fs, FsError, FsState};
pub use limits::{FsLimits, FsUsage};
