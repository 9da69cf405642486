//! The device: configuration space, queues, and the way of a request from a descriptor chain through fuse-backend-rs and
//! back. Replies, and the content of files with them, are written straight into the guest's buffers.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use fuse_backend_rs::abi::fuse_abi::{InHeader, OutHeader};
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::limits::{FsLimits, FsUsage};
use super::serve::Served;
use super::tree::Tree;
use crate::{Broken, Context, Device, QueueMask, config};

/// Name of the device in errors.
const NAME: &str = "fs";
/// Queues: one for FORGET and INTERRUPT, one for all other requests (virtio 1.3 §5.11.2).
const QUEUES: usize = 2;
/// Size of each queue. A request of 1 MiB in pages of 4 KiB, with its headers, must fit into half of it: the guest's driver
/// uses no larger requests than its queue has descriptors.
const QUEUE_SIZE: u16 = 512;
/// Most bytes of a request or of a reply: the largest WRITE and READ (1 MiB) and room for their headers.
const MOST_BYTES: usize = (1 << 20) + (1 << 16);
/// Most requests handled in one call, so that a busy guest does not keep whoever drives the device from all else.
const BATCH: usize = 32;
/// Length of the tag in configuration space, in bytes (virtio 1.3 §5.11.4).
const TAG_LENGTH: usize = 36;
/// Version of [`FsState`].
const STATE_VERSION: u32 = 1;

/// Why the device could not be made or restored.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag does not fit.
    #[error("the file system tag {0:?} must have 1 to {TAG_LENGTH} bytes and no NUL")]
    Tag(String),
    /// The directory to share, or `/proc/self/fd`, could not be opened.
    #[error("cannot share the directory {path} with the guest")]
    Share {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A saved state is not of this version.
    #[error(
        "the saved state of the file system device has version {0}; this program knows version {STATE_VERSION}"
    )]
    StateVersion(u32),
    /// A saved state is of a device that had another tag.
    #[error("the saved state is of a file system with the tag {saved:?}, not {present:?}")]
    StateTag {
        /// The tag in the state.
        saved: String,
        /// The tag of this device.
        present: String,
    },
    /// A saved state is of a guest that had the file system mounted.
    #[error(
        "the guest had the file system {0:?} mounted when its state was saved; only an unmounted one can be restored"
    )]
    StateMounted(String),
}

/// What is needed to give a restored guest the same device.
///
/// What a guest knows of files does not outlive its device: their numbers stand for descriptors on this host. A state
/// can therefore be restored only if the guest had not mounted the file system, as in a template; it mounts it afterwards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {
    version: u32,
    tag: String,
    acked_features: u64,
    mounted: bool,
}

/// A virtio-fs device that shares one host directory.
///
/// The thread that drives it needs CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID, CAP_MKNOD, CAP_SETFCAP, CAP_SETGID and
/// CAP_SETUID for a guest to find its file system complete. While a request creates a file, that thread has another
/// `fsuid` (and is not dumpable from then on), and the process another umask.
pub struct Fs {
    tag: String,
    acked_features: u64,
    served: Served,
    server: Server<Served>,
    /// Readable when a call has left requests in a queue.
    again: EventFd,
}

impl Fs {
    /// Shares the directory `shared` under `tag`, by which the guest mounts it. The directory is opened here; no other path
    /// is opened afterwards, except single names below it. The process that calls this must be the one that serves.
    ///
    /// # Errors
    /// [`FsError::Tag`], [`FsError::Share`].
    pub fn new(tag: &str, shared: &Path, limits: FsLimits) -> Result<Self, FsError> {
        if tag.is_empty() || tag.len() > TAG_LENGTH || tag.contains('\0') {
            return Err(FsError::Tag(tag.to_owned()));
        }
        let share = |source| FsError::Share {
            path: shared.to_owned(),
            source,
        };
        let served = Served::new(Tree::new(shared, limits).map_err(share)?);
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self {
            tag: tag.to_owned(),
            acked_features: 0,
            server: Server::new(served.clone()),
            served,
            again: EventFd::from_flags(flags).map_err(|e| share(e.into()))?,
        })
    }

    /// What the guest makes the device hold.
    pub fn usage(&self) -> FsUsage {
        self.served.tree().usage()
    }

    /// An eventfd that becomes readable when the guest should drop what it caches of files it does not use, because it
    /// knows three quarters of [`FsLimits::inodes`]. It becomes readable again only after the guest has come down to half. It is
    /// for the caller to read, and stays the same for the device's life.
    ///
    /// # Errors
    /// Those of dup(2).
    pub fn reclaim_fd(&self) -> io::Result<std::os::fd::OwnedFd> {
        self.served.tree().reclaim().as_fd().try_clone_to_owned()
    }

    /// What a device needs to take this one's place.
    pub fn state(&self) -> FsState {
        let usage = self.usage();
        FsState {
            version: STATE_VERSION,
            tag: self.tag.clone(),
            acked_features: self.acked_features,
            mounted: usage.inodes > 1 || usage.open > 0,
        }
    }

    /// Takes the place of the device that `state` is of.
    ///
    /// # Errors
    /// [`FsError::StateVersion`], [`FsError::StateTag`], [`FsError::StateMounted`].
    pub fn restore(&mut self, state: &FsState) -> Result<(), FsError> {
        if state.version != STATE_VERSION {
            return Err(FsError::StateVersion(state.version));
        }
        if state.tag != self.tag {
            return Err(FsError::StateTag {
                saved: state.tag.clone(),
                present: self.tag.clone(),
            });
        }
        if state.mounted {
            return Err(FsError::StateMounted(state.tag.clone()));
        }
        self.reset();
        self.acked_features = state.acked_features;
        Ok(())
    }

    /// Handles requests of queue `index`.
    fn serve(&self, ctx: &mut Context<'_, '_>, index: usize) -> Result<QueueMask, Broken> {
        let memory = ctx.memory;
        let mut grown = QueueMask::NONE;
        let Some(queue) = ctx.queues.get_mut(index).filter(|queue| queue.ready()) else {
            return Ok(grown);
        };
        let mut left = BATCH;
        loop {
            queue.disable_notification(memory).map_err(broken)?;
            while let Some(chain) = queue.iter(memory).map_err(broken)?.next() {
                let head = chain.head_index();
                let length = self.handle(memory, chain);
                queue.add_used(memory, head, length).map_err(broken)?;
                grown.insert(index);
                left -= 1;
                if left == 0 {
                    // It can only fail when it is readable already.
                    let _ = self.again.write(1);
                    return Ok(grown);
                }
            }
            if !queue.enable_notification(memory).map_err(broken)? {
                return Ok(grown);
            }
        }
    }

    /// Handles one request; answers how many bytes of the chain it has written.
    fn handle(&self, memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) -> u32 {
        // The reader and the writer each walk the chain once and keep the buffers they have checked. Should the guest
        // change descriptors in between, they keep different buffers, each of them in its memory.
        let reader = Reader::from_descriptor_chain(memory, chain.clone());
        let writer = VirtioFsWriter::new(memory, chain.clone());
        let handled = match (reader, writer) {
            // The server allocates as much as a request says it has.
            (Ok(reader), Ok(writer))
                if reader.available_bytes() <= MOST_BYTES
                    && writer.available_bytes() <= MOST_BYTES =>
            {
                self.server
                    .handle_message(reader, Writer::VirtioFs(writer), None, None)
                    .ok()
            }
            _ => None,
        };
        match handled {
            // At most `MOST_BYTES`.
            Some(length) => length as u32,
            None => refuse(memory, chain).unwrap_or(0),
        }
    }
}

/// Answers EIO to a request that cannot be understood, if there is room for an answer.
fn refuse(memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) -> Option<u32> {
    // The header is read once more, for the number that the guest gave the request and wants back.
    let header: InHeader = Reader::from_descriptor_chain(memory, chain.clone())
        .ok()?
        .read_obj()
        .ok()?;
    let length = size_of::<OutHeader>() as u32;
    VirtioFsWriter::new(memory, chain)
        .ok()?
        .write_obj(OutHeader {
            len: length,
            error: -libc::EIO,
            unique: header.unique,
        })
        .ok()?;
    Some(length)
}

fn broken(error: virtio_queue::Error) -> Broken {
    Broken {
        device: NAME,
        what: error.to_string(),
    }
}

impl Device for Fs {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; QUEUES]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn set_acked_features(&mut self, features: u64) {
        self.acked_features = features;
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // virtio 1.3 §5.11.4: the tag, filled up with NULs, and the number of request queues.
        let mut config = [0; TAG_LENGTH + 4];
        config[..self.tag.len()].copy_from_slice(self.tag.as_bytes());
        config[TAG_LENGTH..].copy_from_slice(&(QUEUES as u32 - 1).to_le_bytes());
        config::read(&config, offset, data);
    }

    fn queue_event(
        &mut self,
        ctx: &mut Context<'_, '_>,
        index: usize,
    ) -> Result<QueueMask, Broken> {
        self.serve(ctx, index)
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.again.as_fd())
    }

    fn host_event(&mut self, ctx: &mut Context<'_, '_>) -> Result<QueueMask, Broken> {
        // It can only fail when it is not readable any more.
        let _ = self.again.read();
        let mut grown = QueueMask::NONE;
        for index in 0..QUEUES {
            if !self.serve(ctx, index)?.is_empty() {
                grown.insert(index);
            }
        }
        Ok(grown)
    }

    fn reset(&mut self) {
        self.acked_features = 0;
        self.served.tree().clear();
        let _ = self.again.read();
    }
}
