//! Virtio devices as pure queue-and-configuration logic, driven over virtio-mmio by the KVM engine and over vhost-user by
//! the software engine. Nothing here knows of KVM, QEMU, containers or async runtimes. Guest memory is hostile: every value is
//! read once and checked where it enters.

mod again;
mod balloon;
mod blk;
mod chains;
mod config;
mod console;
mod device;
mod fs;
mod iovecs;
mod knob;
mod mem;
mod net;
mod pmem;
mod requests;
mod rng;
mod segments;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod vsock;

pub use balloon::{Balloon, BalloonHandle, BalloonState, BalloonStateVersion, Reclaim};
pub use blk::{Blk, BlkError, BlkState};
pub use console::{Console, ConsoleState, ConsoleStateVersion, Sink};
pub use device::{Broken, Context, Device, MAX_QUEUES, QueueMask};
pub use fs::{Fs, FsError, FsLimits, FsState, FsUsage};
pub use mem::{BLOCK as MEMORY_BLOCK, HotMemory, Mem, MemError, MemHandle, MemState};
pub use net::{MacAddress, Net, NetConfig, NetCounters, NetError, NetHandle, NetState};
pub use pmem::{Pmem, PmemError, PmemState};
pub use rng::{Rng, RngState, RngStateVersion};
pub use vsock::{
    AttachError, Attachment, FIRST_DYNAMIC_PORT, GUEST_CID, MAX_ATTACHMENTS, Unsuitable, Vsock,
    VsockConfig, VsockError, VsockHandle, VsockState,
};
