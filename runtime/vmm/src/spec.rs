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

impl std::fmt::Display for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Software => "software",
        })
    }
}

/// One sandbox's VM. Sizes have been checked against [`VmSpec::MIN_MEMORY_MIB`] and friends by [`VmSpec::validate`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    /// Names the VM in its processes' command lines and logs: the sandbox's ID.
    pub id: String,
    /// Engine; `auto` has been resolved before.
    pub engine: Engine,
    /// Guest memory at the start, MiB.
    pub memory_mib: u32,
    /// Memory the guest can be given while it runs, `memory_mib` to [`VmSpec::MAX_MEMORY_MIB`], MiB.
    pub max_memory_mib: u32,
    /// vCPUs the guest may use from the start, 1..=64.
    pub vcpus: u8,
    /// vCPUs it can be given while it runs, `vcpus` to 64. Those beyond `vcpus` are parked and cost next to nothing.
    pub max_vcpus: u8,
    /// Network devices that wait for a tap from the guest's start, on an engine that cannot add devices later; 0 to
    /// [`VmSpec::MAX_NICS`], less those that have a tap already. Each costs a little of the guest's boot.
    pub spare_nics: u8,
    /// Whether an interface is sure to come while the guest starts: on an engine that can add devices, a template's guest has a device that
    /// waits for it. Until then the guest shows it, down.
    pub awaits_nic: bool,
    /// Uncompressed ELF kernel.
    pub kernel: PathBuf,
    /// Initial ramfs with the agent.
    pub initramfs: PathBuf,
    /// Words appended to the kernel command line.
    pub cmdline: String,
    /// QEMU's executable, for [`Engine::Software`].
    pub qemu: PathBuf,
    /// Starts the guest from a template, which is made if there is none.
    pub template: Option<Template>,
}

/// A guest's state when it is ready for its first call, from which further guests of its kind are started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Template {
    /// Directory of the templates of all kinds of guests; it is made when it is missing.
    pub dir: PathBuf,
    /// Word of the kernel command line that has the guest wait when it is ready, without the devices that are ours: it writes `ready` to its
    /// console and reads a line from it. Then it finds the vsock device in slot 0, the fs device in slot 1 and network devices from slot 2 on.
    pub word: String,
    /// A line of text.
    pub ready: String,
}

/// A [`VmSpec`] that cannot be run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Too little or too much guest memory.
    #[error(
        "a VM with {0} MiB of memory is out of range: it takes {min} to {max} MiB",
        min = VmSpec::MIN_MEMORY_MIB,
        max = VmSpec::MAX_MEMORY_MIB
    )]
    Memory(u32),
    /// Less memory at most than at the start, or too much.
    #[error(
        "a VM that starts with {memory} MiB of memory cannot have at most {most}: it takes up to {max}",
        max = VmSpec::MAX_MEMORY_MIB
    )]
    MaxMemory {
        /// At the start, MiB.
        memory: u32,
        /// At most, MiB.
        most: u32,
    },
    /// No vCPU, or too many.
    #[error("a VM with {0} vCPUs is out of range: it takes 1 to {max}", max = VmSpec::MAX_VCPUS)]
    Vcpus(u8),
    /// Fewer vCPUs at most than at the start.
    #[error("a VM that starts with {vcpus} vCPUs cannot have at most {max}")]
    MaxVcpus {
        /// At the start.
        vcpus: u8,
        /// At most.
        max: u8,
    },
    /// More network devices than there are places for.
    #[error("a VM with {0} network interfaces is out of range: it has places for {max}", max = VmSpec::MAX_NICS)]
    Nics(usize),
    /// An ID that could be mistaken for something else on a command line.
    #[error("VM ID {0:?} is not made of 1 to {max} letters, digits, '_', '.' and '-'", max = VmSpec::MAX_ID)]
    Id(String),
    /// A command line the kernel would cut or misread.
    #[error("the kernel command line has a control character in it, or more than {max} bytes", max = VmSpec::MAX_CMDLINE)]
    Cmdline,
}

impl VmSpec {
    /// The least memory with which a guest is sure to get as far as its agent, MiB: below about 54 its kernel runs out while it unpacks
    /// the initramfs.
    pub const MIN_MEMORY_MIB: u32 = 64;
    /// The most memory a guest may have, MiB: 1 TiB.
    pub const MAX_MEMORY_MIB: u32 = 1 << 20;
    /// The most vCPUs a guest may have.
    pub const MAX_VCPUS: u8 = 64;
    /// The most network devices a guest has at its start: QEMU's microvm has 8 virtio-mmio transports, four of which are taken.
    pub const MAX_NICS: usize = 4;
    /// The longest ID, bytes.
    pub const MAX_ID: usize = 128;
    /// The longest [`VmSpec::cmdline`], bytes: half of what x86 takes (COMMAND_LINE_SIZE, 2048), the rest is the engine's.
    pub const MAX_CMDLINE: usize = 1024;

    /// Checks every number and name that some other program would otherwise stumble over.
    ///
    /// # Errors
    /// The first thing found wrong.
    pub fn validate(&self) -> Result<(), SpecError> {
        if !(Self::MIN_MEMORY_MIB..=Self::MAX_MEMORY_MIB).contains(&self.memory_mib) {
            return Err(SpecError::Memory(self.memory_mib));
        }
        if !(self.memory_mib..=Self::MAX_MEMORY_MIB).contains(&self.max_memory_mib) {
            return Err(SpecError::MaxMemory {
                memory: self.memory_mib,
                most: self.max_memory_mib,
            });
        }
        if !(1..=Self::MAX_VCPUS).contains(&self.vcpus) {
            return Err(SpecError::Vcpus(self.vcpus));
        }
        if !(self.vcpus..=Self::MAX_VCPUS).contains(&self.max_vcpus) {
            return Err(SpecError::MaxVcpus {
                vcpus: self.vcpus,
                max: self.max_vcpus,
            });
        }
        if usize::from(self.spare_nics) > Self::MAX_NICS {
            return Err(SpecError::Nics(self.spare_nics.into()));
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        if self.id.is_empty() || self.id.len() > Self::MAX_ID || !self.id.chars().all(plain) {
            return Err(SpecError::Id(self.id.clone()));
        }
        if self.cmdline.len() > Self::MAX_CMDLINE || self.cmdline.chars().any(char::is_control) {
            return Err(SpecError::Cmdline);
        }
        if matches!(&self.template, Some(template) if !template.word.chars().all(plain)) {
            return Err(SpecError::Cmdline);
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An ordinary VM.
    pub(crate) fn spec() -> VmSpec {
        VmSpec {
            id: "web-1".into(),
            engine: Engine::Software,
            memory_mib: 256,
            max_memory_mib: 256,
            vcpus: 1,
            max_vcpus: 1,
            spare_nics: 0,
            awaits_nic: false,
            kernel: "vmlinux".into(),
            initramfs: "initramfs".into(),
            cmdline: String::new(),
            qemu: "qemu".into(),
            template: None,
        }
    }

    #[test]
    fn an_ordinary_spec_is_fine() {
        assert_eq!(spec().validate(), Ok(()));
    }

    #[test]
    fn memory_too_small_to_boot_is_refused_with_the_range() {
        let error = VmSpec {
            memory_mib: 4,
            ..spec()
        }
        .validate()
        .unwrap_err();
        assert_eq!(error, SpecError::Memory(4));
        assert!(error.to_string().contains("64 to"), "{error}");
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        for (memory_mib, vcpus, max_vcpus) in [
            (0, 1, 1),
            (u32::MAX, 1, 1),
            (256, 0, 1),
            (256, 65, 65),
            (256, 255, 255),
            (256, 2, 1),
            (256, 1, 65),
        ] {
            let spec = VmSpec {
                memory_mib,
                max_memory_mib: memory_mib,
                vcpus,
                max_vcpus,
                ..spec()
            };
            assert!(
                spec.validate().is_err(),
                "{memory_mib} MiB, {vcpus} to {max_vcpus} vCPUs"
            );
        }
    }

    #[test]
    fn less_memory_at_most_than_at_the_start_is_refused() {
        for max_memory_mib in [0, 255, VmSpec::MAX_MEMORY_MIB + 1] {
            let spec = VmSpec {
                max_memory_mib,
                ..spec()
            };
            let refused = SpecError::MaxMemory {
                memory: 256,
                most: max_memory_mib,
            };
            assert_eq!(spec.validate(), Err(refused));
        }
    }

    #[test]
    fn more_spare_interfaces_than_places_are_refused() {
        let with = |spare_nics| {
            let spec = VmSpec {
                spare_nics,
                ..spec()
            };
            spec.validate()
        };
        assert_eq!(with(4), Ok(()));
        assert_eq!(with(5), Err(SpecError::Nics(5)));
    }

    #[test]
    fn ids_that_could_be_options_or_paths_or_two_words_are_refused() {
        for id in ["", "a b", "a,b", "a/b", "a=b", "é", &"x".repeat(129)] {
            let spec = VmSpec {
                id: id.into(),
                ..spec()
            };
            assert_eq!(spec.validate(), Err(SpecError::Id(id.into())));
        }
    }

    #[test]
    fn command_lines_the_kernel_would_cut_or_misread_are_refused() {
        for cmdline in ["a\nb".to_owned(), "a\0".to_owned(), "x".repeat(1025)] {
            let spec = VmSpec { cmdline, ..spec() };
            assert_eq!(spec.validate(), Err(SpecError::Cmdline));
        }
    }
}
