//! What a VM is made of, as plain data: written by whoever asks for a sandbox, read by the VM process at its start.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// Our own VMM on the host's KVM.
    Kvm,
    /// QEMU's microvm machine, instructions emulated by TCG.
    Software,
}

/// One sandbox's VM. Sizes have been checked against [`VmSpec::MIN_MEMORY_MIB`] and friends by [`VmSpec::validate`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    /// Names the VM in its processes' command lines and logs: the sandbox's ID.
    pub id: String,
    /// Engine; `auto` has been resolved before.
    pub engine: Engine,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// vCPUs the guest sees, 1..=64.
    pub vcpus: u8,
    /// Uncompressed ELF kernel.
    pub kernel: PathBuf,
    /// Initial ramfs with the agent.
    pub initramfs: PathBuf,
    /// Words appended to the kernel command line.
    pub cmdline: String,
    /// QEMU's executable, for [`Engine::Software`].
    pub qemu: PathBuf,
}
