//! A stream that waits for the guest.

use std::os::fd::OwnedFd;

/// Descriptors that the guest gets to talk to when it connects to a host port.
#[derive(Debug)]
pub struct Attachment {
    /// Host port the guest connects to.
    pub port: u32,
    /// What it yields goes to the guest.
    pub read: Option<OwnedFd>,
    /// Gets what the guest sends.
    pub write: Option<OwnedFd>,
    /// Closed when the stream is over.
    pub done: Option<OwnedFd>,
}
