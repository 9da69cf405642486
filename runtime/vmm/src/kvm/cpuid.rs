//! What the guest's CPUID instruction answers: what KVM supports, less what a container's guest has no use for (nested
//! virtualization, performance counters, power states), and with this machine's topology: one package, a core per vCPU, no threads.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use vmm_sys_util::fam;

/// Leaf numbers (Intel SDM vol. 2, CPUID; AMD APM vol. 3, E.3 and E.4).
const FEATURES: u32 = 0x1;
const CACHES: u32 = 0x4;
const MONITOR: u32 = 0x5;
const POWER: u32 = 0x6;
const MORE_FEATURES: u32 = 0x7;
const COUNTERS: u32 = 0xa;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_SIZES: u32 = 0x8000_0008;
const AMD_SVM: u32 = 0x8000_000a;
const AMD_TOPOLOGY: u32 = 0x8000_001e;

/// Bits of leaf 1's ecx: 64-bit debug store, monitor, CPL-qualified debug store, VMX, SMX, SpeedStep, TM2, perfmon capabilities.
const NO_FEATURES_C: u32 = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 15;
/// TSC deadline timer, which KVM emulates on every processor but does not announce; "runs under a hypervisor".
const FEATURES_C: u32 = 1 << 24 | 1 << 31;
/// Bits of leaf 1's edx: debug store, thermal; and "has more than one logical processor".
const NO_FEATURES_D: u32 = 1 << 21 | 1 << 22 | 1 << 29;
const MANY_PROCESSORS: u32 = 1 << 28;
/// Bits of leaf 7's edx: AMX, whose state a process must ask its kernel for before a guest may have it.
const NO_MORE_FEATURES_D: u32 = 1 << 22 | 1 << 24 | 1 << 25;
/// The local APIC's timer runs in every power state (leaf 6, eax).
const ARAT: u32 = 1 << 2;
/// Bits of AMD's feature leaf, ecx: SVM, IBS, SKINIT, watchdog, performance counters; "cores, not threads".
const NO_AMD_FEATURES_C: u32 = 1 << 2 | 1 << 10 | 1 << 12 | 1 << 13 | 1 << 23 | 1 << 24 | 1 << 28;
const AMD_LEGACY_MULTICORE: u32 = 1 << 1;
/// Levels of the topology leaves.
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// The leaves for processor `id` of `count`, made from what KVM supports.
///
/// # Errors
/// When they are more than KVM takes.
pub(super) fn configure(supported: &CpuId, id: u8, count: u8) -> Result<CpuId, fam::Error> {
    let shape = Shape {
        id: u32::from(id),
        count: u32::from(count),
    };
    let gone = |leaf: u32| matches!(leaf, TOPOLOGY | TOPOLOGY_V2 | MONITOR | COUNTERS | AMD_SVM);
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|entry| !gone(entry.function))
        .copied()
        .collect();
    for entry in &mut entries {
        shape.adjust(entry);
    }
    // Version 2 of the leaf says no more than version 1 where there are no dies and modules, and is left out.
    entries.extend(shape.topology());
    // The highest leaf that is announced must be one that is there.
    if let Some(basic) = entries.iter_mut().find(|entry| entry.function == 0) {
        basic.eax = basic.eax.max(TOPOLOGY);
    }
    CpuId::from_entries(&entries)
}

/// One processor's place among all.
#[derive(Clone, Copy)]
struct Shape {
    id: u32,
    count: u32,
}

impl Shape {
    /// Bits that the number of a processor takes.
    fn bits(self) -> u32 {
        self.count.next_power_of_two().trailing_zeros()
    }

    fn adjust(self, entry: &mut kvm_cpuid_entry2) {
        let last = self.count - 1;
        match (entry.function, entry.index) {
            (FEATURES, _) => {
                entry.ebx = entry.ebx & 0xff00
                    | entry.ebx & 0xff
                    | self.id << 24
                    | (1 << self.bits()) << 16;
                entry.ecx = entry.ecx & !NO_FEATURES_C | FEATURES_C;
                entry.edx &= !(NO_FEATURES_D | MANY_PROCESSORS);
                if self.count > 1 {
                    entry.edx |= MANY_PROCESSORS;
                }
            }
            (CACHES, _) if entry.eax & 0x1f != 0 => {
                // Cores in the package; threads that share the cache: one, or all for the last level.
                let sharing = if entry.eax >> 5 & 0b111 >= 3 {
                    (1 << self.bits()) - 1
                } else {
                    0
                };
                let cores = ((1 << self.bits()) - 1_u32).min(63);
                entry.eax = entry.eax & 0x3fff | sharing << 14 | cores << 26;
            }
            (POWER, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (ARAT, 0, 0, 0),
            (MORE_FEATURES, 0) => entry.edx &= !NO_MORE_FEATURES_D,
            (AMD_FEATURES, _) => {
                entry.ecx &= !(NO_AMD_FEATURES_C | AMD_LEGACY_MULTICORE);
                if self.count > 1 && entry.edx != 0 {
                    entry.ecx |= AMD_LEGACY_MULTICORE;
                }
            }
            (AMD_SIZES, _) => entry.ecx = entry.ecx & !0xf0ff | last | self.bits() << 12,
            (AMD_TOPOLOGY, _) => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (self.id, self.id, 0, 0)
            }
            _ => {}
        }
    }

    /// The levels of the topology leaf: threads, of which a core has one; cores; the end.
    fn topology(self) -> [kvm_cpuid_entry2; 3] {
        let level = |index: u32, shift: u32, processors: u32, kind: u32| kvm_cpuid_entry2 {
            function: TOPOLOGY,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: processors,
            ecx: kind | index,
            edx: self.id,
            ..Default::default()
        };
        [
            level(0, 0, 1, LEVEL_THREAD),
            level(1, self.bits(), self.count, LEVEL_CORE),
            level(2, 0, 0, 0),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let leaf = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: if function == 0 { 0xd } else { 0x21 },
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        let leaves = [
            0,
            FEATURES,
            CACHES,
            MONITOR,
            POWER,
            MORE_FEATURES,
            COUNTERS,
            TOPOLOGY,
            0xd,
            0x4000_0001,
            AMD_FEATURES,
            AMD_SIZES,
            AMD_SVM,
        ];
        CpuId::from_entries(&leaves.map(|function| leaf(function, 0))).unwrap()
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
        cpuid
            .as_slice()
            .iter()
            .find(|entry| (entry.function, entry.index) == (function, index))
            .copied()
    }

    #[test]
    fn every_processor_has_its_own_number_in_every_leaf_that_tells_it() {
        for (id, count) in [(0, 1), (3, 4), (4, 5), (63, 64)] {
            let cpuid = configure(&supported(), id, count).unwrap();
            assert_eq!(leaf(&cpuid, FEATURES, 0).unwrap().ebx >> 24, u32::from(id));
            assert_eq!(leaf(&cpuid, TOPOLOGY, 1).unwrap().edx, u32::from(id));
            assert_eq!(leaf(&cpuid, TOPOLOGY, 1).unwrap().ebx, u32::from(count));
        }
        let five = configure(&supported(), 4, 5).unwrap();
        assert_eq!(leaf(&five, TOPOLOGY, 1).unwrap().eax, 3);
        assert_eq!(leaf(&five, AMD_SIZES, 0).unwrap().ecx & 0xf0ff, 3 << 12 | 4);
    }

    #[test]
    fn nested_virtualization_and_performance_counters_are_hidden() {
        let cpuid = configure(&supported(), 0, 1).unwrap();
        for gone in [MONITOR, COUNTERS, AMD_SVM, TOPOLOGY_V2] {
            assert!(leaf(&cpuid, gone, 0).is_none(), "{gone:#x}");
        }
        let features = leaf(&cpuid, FEATURES, 0).unwrap();
        assert_eq!(features.ecx & 1 << 5, 0);
        assert_eq!(leaf(&cpuid, AMD_FEATURES, 0).unwrap().ecx & 1 << 2, 0);
        assert_ne!(features.ecx & 1 << 31, 0);
        assert_ne!(features.ecx & 1 << 24, 0);
    }

    #[test]
    fn a_single_processor_is_not_announced_as_many() {
        assert_eq!(
            leaf(&configure(&supported(), 0, 1).unwrap(), FEATURES, 0)
                .unwrap()
                .edx
                & MANY_PROCESSORS,
            0
        );
        assert_ne!(
            leaf(&configure(&supported(), 0, 2).unwrap(), FEATURES, 0)
                .unwrap()
                .edx
                & MANY_PROCESSORS,
            0
        );
    }

    #[test]
    fn what_is_not_ours_to_change_stays() {
        let cpuid = configure(&supported(), 0, 2).unwrap();
        assert_eq!(
            leaf(&cpuid, 0x4000_0001, 0).unwrap(),
            leaf(&supported(), 0x4000_0001, 0).unwrap()
        );
        assert_eq!(
            leaf(&cpuid, 0xd, 0).unwrap(),
            leaf(&supported(), 0xd, 0).unwrap()
        );
    }
}
