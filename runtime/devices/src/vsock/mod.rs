//! virtio-vsock (virtio 1.3 §5.10): stream sockets between the guest and the host, whose ends on the host are Unix sockets and
//! descriptors that were handed in. The device moves bytes with backpressure both ways and understands none of them. It
//! holds at most [`STREAM_BUFFER`](credit::STREAM_BUFFER) bytes of a stream, and nothing in it grows with what the guest does.
//!
//! There are three doors:
//! - A client on the host connects to a listening socket, writes `CONNECT <port>\n`, and is answered `OK <host port>\n` once
//!   the guest has accepted, or `ERR <reason>\n`.
//! - The guest connects to a host port at which an [`Attachment`] waits.
//! - The guest connects to any other host port, and with that to the Unix socket `<prefix>_<port>`.
//!
//! The process must ignore SIGPIPE, as a Rust `main` does, and watch [`Device::host_fd`](crate::Device::host_fd) level-triggered.

#![deny(unsafe_code)]

mod attachment;
mod connection;
mod credit;
mod descriptor;
mod device;
mod handshake;
mod host;
#[allow(unsafe_code)]
mod io;
mod packet;
mod rings;
mod stream;
mod table;
#[cfg(test)]
mod tests;

use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use nix::errno::Errno;

pub use attachment::{AttachError, Attachment, FIRST_DYNAMIC_PORT, MAX_ATTACHMENTS, VsockHandle};
pub use descriptor::Unsuitable;
pub use device::{Vsock, VsockState};

/// The guest's context ID. Every guest has the same, since no two are on one device.
pub const GUEST_CID: u64 = 3;

/// Size of the two queues that carry packets.
const QUEUE_SIZE: u16 = 128;

/// Where the ends of the guest's streams are on the host.
#[derive(Debug, Default)]
pub struct VsockConfig {
    /// Listens for clients that want to connect to the guest.
    pub listener: Option<UnixListener>,
    /// The guest's connections to a host port without an attachment go to the Unix socket `<prefix>_<port>`, seen from the
    /// process's working directory. Without a prefix they are refused.
    pub listen_prefix: Option<PathBuf>,
    /// Attachments that wait before the guest starts.
    pub attachments: Vec<Attachment>,
}

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The system refused something the device cannot be without.
    #[error("{what} for the vsock device failed")]
    Setup {
        /// What was being done.
        what: &'static str,
        /// What the system said.
        source: Errno,
    },
    /// Paths made from the prefix are too long for a Unix socket.
    #[error(
        "{prefix:?} cannot begin the names of the vsock device's Unix sockets; use a shorter path",
        prefix = .prefix.display()
    )]
    Prefix {
        /// The prefix.
        prefix: PathBuf,
        /// What the system said.
        source: Errno,
    },
    /// An attachment that was to wait from the start cannot.
    #[error("attaching descriptors to host port {port} of the vsock device failed")]
    Attach {
        /// The attachment's port.
        port: u32,
        /// What is wrong with it.
        source: AttachError,
    },
    /// The state was saved by another version of cloison.
    #[error(
        "the saved state of the vsock device has version {found}, and this cloison reads version {known}; \
         make the template again"
    )]
    StateVersion {
        /// The version in the state.
        found: u32,
        /// The one version there is.
        known: u32,
    },
}
