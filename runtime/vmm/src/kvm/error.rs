//! Why a guest could not be brought to its first instruction.

use std::io;
use std::path::PathBuf;

use super::kernel::KernelError;

/// What went wrong, and with what.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KvmError {
    /// KVM itself.
    #[error("cannot open /dev/kvm")]
    Open(#[source] io::Error),
    /// One of KVM's calls.
    #[error("KVM cannot {what}")]
    Kvm {
        what: &'static str,
        source: io::Error,
    },
    /// There is no room for the guest.
    #[error("cannot reserve {mib} MiB of address space for the guest's memory")]
    Memory { mib: u32, source: io::Error },
    /// A file of which the guest is made.
    #[error("cannot use {} as the {role}", path.display())]
    File {
        role: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    /// A template that is none, or not this guest's.
    #[error("cannot use the template")]
    Template(#[source] io::Error),
    /// A kernel that is none.
    #[error("{} is not a kernel that can be started", path.display())]
    Kernel { path: PathBuf, source: KernelError },
    /// Kernel and initial ramfs leave no room.
    #[error("{mib} MiB of memory are too few for the kernel and its {needed} MiB initramfs")]
    TooSmall { mib: u32, needed: u64 },
    /// More words than the kernel reads.
    #[error("the kernel command line is {0} bytes long, more than the {max} the kernel reads", max = super::layout::CMDLINE_SIZE - 1)]
    Cmdline(usize),
    /// Every slot has a device in it.
    #[error("all {max} slots for devices are taken", max = super::layout::SLOT_COUNT)]
    NoSlot,
    /// There is no device in this slot.
    #[error("there is no device in slot {0}")]
    EmptySlot(usize),
    /// Something in guest memory could not be written.
    #[error("cannot write the {what} to guest memory")]
    Write {
        what: &'static str,
        source: vm_memory::GuestMemoryError,
    },
    /// A state that another version of this program has saved.
    #[error("the saved state of a vCPU has version {found}; this program knows version {known}")]
    StateVersion { found: u32, known: u32 },
    /// A register that a saved state has a value for.
    #[error(
        "this host's KVM does not let a vCPU have what its model-specific register {0:#x} held"
    )]
    Msr(u32),
    /// Something other than KVM.
    #[error("cannot {what}")]
    System {
        what: &'static str,
        source: io::Error,
    },
}

/// For `map_err` on KVM's calls.
pub(super) fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError::Kvm {
        what,
        source: error.into(),
    }
}

/// For `map_err` on other calls.
pub(super) fn system<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> KvmError {
    move |error| KvmError::System {
        what,
        source: error.into(),
    }
}
