//! Direct attachments: pairs of host descriptors that wait at a host port for the guest to connect to it. They are checked
//! here, on the caller's thread, so that the device never meets a descriptor it cannot use. The lock is held for a look
//! into a table, never for input or output.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use super::descriptor::{Checked, Purpose, Unsuitable, same_socket};

/// Most attachments that may wait for the guest at one time.
pub const MAX_ATTACHMENTS: usize = 1024;

/// First host port that [`VsockHandle::attach_any`] gives out; it gives out none above twice this.
pub const FIRST_DYNAMIC_PORT: u32 = 0x4000_0000;

/// Descriptors for the next connection the guest makes to a host port; for one connection only.
///
/// A descriptor must have O_NONBLOCK (pipes, FIFOs, terminals), or be a stream socket, a regular file or a device that is
/// always ready, such as /dev/null. The device changes no flags.
#[derive(Debug)]
pub struct Attachment {
    /// The host port to wait at.
    pub port: u32,
    /// What is read here goes to the guest, and so does its end. Without it the guest sees the end at once.
    pub read: Option<OwnedFd>,
    /// What the guest sends goes here; it is closed when the guest is finished. Without it the guest cannot send.
    ///
    /// If `read` and `write` are the same socket, ends are said with `shutdown`; otherwise by closing alone, since a
    /// socket that is only written to may be shared with others who are not finished.
    pub write: Option<OwnedFd>,
    /// Never read or written. It is closed when the stream is over both ways with all bytes written, when the stream was
    /// reset, or when the device is dropped or reset.
    pub done: Option<OwnedFd>,
}

/// Why an attachment was not taken. The descriptors are closed then.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Another attachment waits at that port.
    #[error("host port {0} of the vsock device has an attachment already")]
    PortInUse(u32),
    /// [`MAX_ATTACHMENTS`] are waiting.
    #[error(
        "{MAX_ATTACHMENTS} attachments wait for the guest to connect, and no more are taken; is its agent alive?"
    )]
    TooMany,
    /// The system gave no random number.
    #[error("cannot choose a port for a vsock stream")]
    Port(#[source] std::io::Error),
    /// The device is gone.
    #[error("the vsock device is gone: the virtual machine has ended")]
    Ended,
    /// One of the descriptors cannot carry a stream.
    #[error("the {which} descriptor for a vsock stream is unusable")]
    Unsuitable {
        /// "read" or "write".
        which: &'static str,
        /// What is wrong with it.
        source: Unsuitable,
    },
}

/// An attachment whose descriptors are known to be usable.
#[derive(Debug)]
pub(super) struct Waiting {
    pub read: Option<Checked>,
    pub write: Option<Checked>,
    /// `read` and `write` are the same socket.
    pub one_socket: bool,
    pub done: Option<OwnedFd>,
    /// Set by the first byte that leaves through `write`.
    pub first_output: Option<FirstOutput>,
}

/// When the guest's first output left, over all streams that share it.
pub(super) type FirstOutput = Arc<OnceLock<Instant>>;

impl Waiting {
    fn new(
        read: Option<OwnedFd>,
        write: Option<OwnedFd>,
        done: Option<OwnedFd>,
        first_output: &FirstOutput,
    ) -> Result<Self, AttachError> {
        let unsuitable = |which| move |source| AttachError::Unsuitable { which, source };
        let one_socket = match (&read, &write) {
            (Some(read), Some(write)) => {
                same_socket(read, write).map_err(|e| unsuitable("read")(e.into()))?
            }
            _ => false,
        };
        let check = |fd: Option<OwnedFd>, purpose, which| {
            fd.map(|fd| Checked::new(fd, purpose))
                .transpose()
                .map_err(unsuitable(which))
        };
        Ok(Self {
            read: check(read, Purpose::Read, "read")?,
            write: check(write, Purpose::Write, "write")?,
            one_socket,
            done,
            first_output: (!one_socket).then(|| Arc::clone(first_output)),
        })
    }
}

/// One of the 2^30 ports from [`FIRST_DYNAMIC_PORT`] on.
fn unguessable_port() -> Result<u32, AttachError> {
    let mut bytes = [0; size_of::<u32>()];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| AttachError::Port(errno.into()))?;
    Ok(FIRST_DYNAMIC_PORT | (u32::from_ne_bytes(bytes) & (FIRST_DYNAMIC_PORT - 1)))
}

/// Attachments by host port. `None` once the device is gone.
type Table = Option<HashMap<u32, Waiting>>;

/// A door to a vsock device from any thread, for as long as one likes: when the device is gone it says so.
#[derive(Debug, Clone)]
pub struct VsockHandle {
    table: Arc<Mutex<Table>>,
    first_output: FirstOutput,
}

impl VsockHandle {
    pub(super) fn new() -> Self {
        Self {
            table: Arc::new(Mutex::new(Some(HashMap::new()))),
            first_output: FirstOutput::default(),
        }
    }

    /// Lets `attachment` wait for the guest.
    ///
    /// # Errors
    /// [`AttachError`]; the attachment's descriptors are closed.
    pub fn attach(&self, attachment: Attachment) -> Result<(), AttachError> {
        let Attachment {
            port,
            read,
            write,
            done,
        } = attachment;
        let waiting = Waiting::new(read, write, done, &self.first_output)?;
        let mut table = self.lock();
        let entries = table.as_mut().ok_or(AttachError::Ended)?;
        if entries.contains_key(&port) {
            return Err(AttachError::PortInUse(port));
        }
        if entries.len() >= MAX_ATTACHMENTS {
            return Err(AttachError::TooMany);
        }
        entries.insert(port, waiting);
        Ok(())
    }

    /// As [`VsockHandle::attach`], at a port of the device's choice, [`FIRST_DYNAMIC_PORT`] or above, which is the answer. Nobody in
    /// the guest can guess it: a container may open vsock connections too, and must not come before the agent.
    ///
    /// # Errors
    /// As for [`VsockHandle::attach`].
    pub fn attach_any(
        &self,
        read: Option<OwnedFd>,
        write: Option<OwnedFd>,
        done: Option<OwnedFd>,
    ) -> Result<u32, AttachError> {
        let waiting = Waiting::new(read, write, done, &self.first_output)?;
        let mut table = self.lock();
        let entries = table.as_mut().ok_or(AttachError::Ended)?;
        if entries.len() >= MAX_ATTACHMENTS {
            return Err(AttachError::TooMany);
        }
        loop {
            // With at most MAX_ATTACHMENTS of them taken, a free one is never far.
            let port = unguessable_port()?;
            if let std::collections::hash_map::Entry::Vacant(entry) = entries.entry(port) {
                entry.insert(waiting);
                return Ok(port);
            }
        }
    }

    /// Takes back, and closes, the attachment that waits at `port`. False when none does: the guest has connected, or
    /// there never was one.
    pub fn detach(&self, port: u32) -> bool {
        self.take(port).is_some()
    }

    /// When the guest's first byte left for an attachment other than a socket that is both read and written, which is how a
    /// protocol is spoken.
    pub fn first_output(&self) -> Option<Instant> {
        self.first_output.get().copied()
    }

    /// The attachment waiting at `port`, for good.
    pub(super) fn take(&self, port: u32) -> Option<Waiting> {
        self.lock().as_mut()?.remove(&port)
    }

    /// Closes all attachments; none is taken from here on.
    pub(super) fn end(&self) {
        let entries = self.lock().take();
        drop(entries);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // No code that can panic runs under the lock, and the table is whole between any two statements.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    fn nothing(port: u32) -> Attachment {
        Attachment {
            port,
            read: None,
            write: None,
            done: None,
        }
    }

    #[test]
    fn a_second_attachment_at_a_port_is_an_error_until_the_first_is_gone() {
        let handle = VsockHandle::new();
        handle.attach(nothing(7)).unwrap();
        assert!(matches!(
            handle.attach(nothing(7)),
            Err(AttachError::PortInUse(7))
        ));
        assert!(handle.detach(7));
        assert!(!handle.detach(7));
        handle.attach(nothing(7)).unwrap();
    }

    #[test]
    fn only_so_many_attachments_may_wait() {
        let handle = VsockHandle::new();
        for port in 0..MAX_ATTACHMENTS as u32 {
            handle.attach(nothing(port)).unwrap();
        }
        assert!(matches!(
            handle.attach(nothing(u32::MAX)),
            Err(AttachError::TooMany)
        ));
        assert!(matches!(
            handle.attach_any(None, None, None),
            Err(AttachError::TooMany)
        ));
    }

    #[test]
    fn ports_of_the_device_s_choice_are_in_their_range_and_follow_no_order() {
        let handle = VsockHandle::new();
        let ports: Vec<_> = (0..100)
            .map(|_| handle.attach_any(None, None, None).unwrap())
            .collect();
        let range = FIRST_DYNAMIC_PORT..2 * FIRST_DYNAMIC_PORT;
        assert!(ports.iter().all(|port| range.contains(port)), "{ports:x?}");
        let near = |pair: &[u32]| pair[0].abs_diff(pair[1]) < 1 << 10;
        assert!(
            ports.windows(2).filter(|pair| near(pair)).count() < 5,
            "{ports:x?}"
        );
    }

    #[test]
    fn a_refused_attachment_s_descriptors_are_closed() {
        let handle = VsockHandle::new();
        handle.attach(nothing(7)).unwrap();
        let (done, mut watch) = UnixStream::pair().unwrap();
        let again = Attachment {
            done: Some(done.into()),
            ..nothing(7)
        };
        assert!(handle.attach(again).is_err());
        assert_eq!(watch.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn the_end_closes_what_waits_and_is_told_to_late_comers() {
        let handle = VsockHandle::new();
        let (done, mut watch) = UnixStream::pair().unwrap();
        handle
            .attach(Attachment {
                done: Some(done.into()),
                ..nothing(7)
            })
            .unwrap();
        handle.end();
        assert_eq!(watch.read(&mut [0]).unwrap(), 0);
        assert!(matches!(handle.attach(nothing(8)), Err(AttachError::Ended)));
        assert!(matches!(
            handle.attach_any(None, None, None),
            Err(AttachError::Ended)
        ));
    }

    #[test]
    fn the_error_says_which_descriptor_is_unusable() {
        let (reader, _writer) = nix::unistd::pipe().unwrap();
        let refused = VsockHandle::new().attach_any(Some(reader), None, None);
        let text = refused.unwrap_err().to_string();
        assert!(text.contains("read descriptor"), "{text}");
    }
}
