//! How large a VM must be for the limits of what runs in it.

use cloison_vmm::{Engine, VmSpec};

/// Memory of a VM whose container has no limit, MiB.
const DEFAULT_MEMORY_MIB: u32 = 1024;
/// What the guest itself needs beside a container that uses all of its limit, MiB: kernel, agent, page tables.
const GUEST_OVERHEAD_MIB: u32 = 96;
/// The least a container can be limited to, MiB; docker's limit too.
const MIN_MEMORY_MIB: u64 = 6;

/// What a VM's processes on the host need beside the guest's memory, MiB: on the KVM engine the VM process itself, on the software
/// engine QEMU and the code it has translated as well.
const HOST_OVERHEAD_KVM_MIB: u64 = 64;
const HOST_OVERHEAD_SOFTWARE_MIB: u64 = 512;

/// Memory of VMs on the software engine, which get all that they can ever have at their start, MiB; larger ones have just what they need. The
/// fewer sizes there are, the fewer templates are made. One has to copy the kernel's description of the memory, a sixty-fourth of it.
const SOFTWARE_MEMORY_MIB: [u32; 3] = [DEFAULT_MEMORY_MIB, 2048, 4096];

/// CPUs that a VM can be given while it runs, if the host has as many: this many in any case, and for one that has more of them from its
/// start, so many times those. Each costs the guest's boot a little, used or not.
const CPU_ROOM: u8 = 4;
const CPU_ROOM_FACTOR: u8 = 2;

/// A VM's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmSize {
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// vCPUs.
    pub vcpus: u8,
}

/// A limit that no VM can be made for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// Too little memory.
    #[error("a memory limit of {0} bytes is too small: the least is {MIN_MEMORY_MIB}m")]
    TooSmall(u64),
    /// More memory than can be counted.
    #[error("the memory limit is too large")]
    TooLarge,
}

impl VmSize {
    /// What the VM's processes on the host may use with this much guest memory, bytes.
    pub fn on_host(self, engine: Engine) -> u64 {
        let overhead = match engine {
            Engine::Kvm => HOST_OVERHEAD_KVM_MIB,
            Engine::Software => HOST_OVERHEAD_SOFTWARE_MIB,
        };
        (u64::from(self.memory_mib) + overhead) << 20
    }

    /// The size for a container that may use `memory` bytes and `milli_cpus` thousandths of a CPU; `None` is no limit.
    ///
    /// # Errors
    /// [`LimitError`].
    pub fn for_limits(memory: Option<u64>, milli_cpus: Option<u32>) -> Result<Self, LimitError> {
        let memory_mib = match memory {
            None => DEFAULT_MEMORY_MIB,
            Some(limit) if limit < MIN_MEMORY_MIB << 20 => return Err(LimitError::TooSmall(limit)),
            Some(limit) => u32::try_from(limit.div_ceil(1 << 20))
                .ok()
                .and_then(|mib| mib.checked_add(GUEST_OVERHEAD_MIB))
                .ok_or(LimitError::TooLarge)?,
        };
        let vcpus = milli_cpus.map_or(1, |milli| milli.div_ceil(1000).max(1));
        Ok(Self {
            memory_mib,
            vcpus: u8::try_from(vcpus).unwrap_or(u8::MAX),
        })
    }

    /// What a VM that starts with this size can be given while it runs: on the KVM engine all of the host's memory, for which a place in its
    /// address space is all it costs, on the software engine what it is made with; and some CPUs.
    pub fn room(self, engine: Engine) -> Self {
        // Without an answer there is one.
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        self.room_on(engine, host_memory(), cpus)
    }

    fn room_on(self, engine: Engine, memory: u64, cpus: usize) -> Self {
        let host = u32::try_from(memory >> 20).unwrap_or(u32::MAX);
        let memory_mib = match engine {
            Engine::Kvm => Some(host.min(VmSpec::MAX_MEMORY_MIB)),
            Engine::Software => SOFTWARE_MEMORY_MIB
                .into_iter()
                .find(|mib| (self.memory_mib..=host).contains(mib)),
        };
        let memory_mib = memory_mib.unwrap_or(0).max(self.memory_mib);
        let cpus = u8::try_from(cpus).unwrap_or(u8::MAX).min(VmSpec::MAX_VCPUS);
        let room = self.vcpus.saturating_mul(CPU_ROOM_FACTOR).max(CPU_ROOM);
        Self {
            memory_mib,
            vcpus: room.min(cpus).max(self.vcpus),
        }
    }

    /// No larger than the host's memory. A container may have a limit above that, which it will not reach; a guest would spend its boot on
    /// describing memory that nobody can give it.
    pub fn within_the_host(self) -> Self {
        self.within(host_memory())
    }

    fn within(self, host: u64) -> Self {
        let host = u32::try_from(host >> 20).unwrap_or(u32::MAX);
        Self {
            memory_mib: self.memory_mib.min(host),
            ..self
        }
    }
}

/// Bytes; as much as there can be when the host does not say.
fn host_memory() -> u64 {
    nix::sys::sysinfo::sysinfo().map_or(u64::MAX, |info| info.ram_total())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_is_as_large_as_its_containers_limits_and_what_the_guest_needs() {
        let size = |memory, cpus| VmSize::for_limits(memory, cpus).map(|s| (s.memory_mib, s.vcpus));
        assert_eq!(size(None, None), Ok((1024, 1)));
        assert_eq!(size(Some(64 << 20), Some(1500)), Ok((160, 2)));
        assert_eq!(size(Some((64 << 20) + 1), Some(10)), Ok((161, 1)));
        assert_eq!(
            size(Some(1 << 20), None),
            Err(LimitError::TooSmall(1 << 20))
        );
        assert_eq!(size(Some(u64::MAX), None), Err(LimitError::TooLarge));
    }

    #[test]
    fn a_vm_is_no_larger_than_its_host() {
        let size = VmSize::for_limits(Some(900 << 30), Some(2000)).unwrap();
        let within = |host| size.within(host).memory_mib;
        assert_eq!(within(8 << 30), 8 << 10);
        assert_eq!(within(u64::MAX), size.memory_mib);
        assert_eq!(size.within(8 << 30).vcpus, 2);
    }

    #[test]
    fn a_vm_has_room_for_what_its_host_has_and_never_less_than_it_starts_with() {
        let size = |memory_mib, vcpus| VmSize { memory_mib, vcpus };
        let room = |of: VmSize, memory, cpus| of.room_on(Engine::Kvm, memory, cpus);
        let small = size(1024, 1);
        assert_eq!(room(small, 8 << 30, 2), size(8192, 2));
        assert_eq!(room(small, 8 << 30, 64), size(8192, 4));
        assert_eq!(room(size(160, 6), 8 << 30, 64), size(8192, 12));
        assert_eq!(room(size(160, 60), 8 << 30, 1000), size(8192, 64));
        assert_eq!(room(size(9000, 6), 8 << 30, 4), size(9000, 6));
        let all = room(small, u64::MAX, 1);
        assert_eq!(all, size(VmSpec::MAX_MEMORY_MIB, 1));
    }

    #[test]
    fn a_vm_on_the_software_engine_has_room_up_to_the_next_of_a_few_sizes_that_its_host_has() {
        let room = |memory_mib, host: u64| {
            let size = VmSize {
                memory_mib,
                vcpus: 1,
            };
            let room = size.room_on(Engine::Software, host << 20, 64);
            assert_eq!(room.vcpus, CPU_ROOM);
            room.memory_mib
        };
        assert_eq!(room(102, 8192), 1024);
        assert_eq!(room(1024, 8192), 1024);
        assert_eq!(room(1025, 8192), 2048);
        assert_eq!(room(3000, 8192), 4096);
        assert_eq!(room(5000, 8192), 5000);
        assert_eq!(room(1500, 1800), 1500);
        assert_eq!(room(100, 900), 100);
    }
}
