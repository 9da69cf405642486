//! A virtual processor before it runs: made, given its CPUID, and, if it is the one that boots, its registers at the kernel's
//! entry. The others wait in KVM for the guest to start them.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_dtable, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::boot::{CODE, DATA, DESCRIPTORS, TASK};
use super::cpuid;
use super::error::{KvmError, kvm};
use super::layout::{BOOT_PARAMS, GDT, PML4, STACK_TOP};

/// The bit of the flags register that is always set.
const RFLAGS: u64 = 1 << 1;
/// Protection, numeric errors, extension type, paging.
const CR0: u64 = 1 | 1 << 4 | 1 << 5 | 1 << 31;
/// Physical address extension, without which there is no 64-bit mode.
const CR4: u64 = 1 << 5;
/// Long mode, enabled and active.
const EFER: u64 = 1 << 8 | 1 << 10;
/// IA32_MISC_ENABLE, and its bit for fast string instructions (Intel SDM vol. 4, table 2-2).
const MSR_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;
/// What an x87 unit and an SSE unit have in their control words after FNINIT and a reset.
const FCW: u16 = 0x37f;
const MXCSR: u32 = 0x1f80;

/// What KVM can offer a guest on this host, asked once for all processors.
pub(super) struct Offer(CpuId);

impl Offer {
    pub(super) fn of(kvm_fd: &Kvm) -> Result<Self, KvmError> {
        kvm_fd
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map(Self)
            .map_err(kvm("say what processor it offers"))
    }
}

/// Makes processor `id` of `count`.
pub(super) fn create(vm: &VmFd, offer: &Offer, id: u8, count: u8) -> Result<VcpuFd, KvmError> {
    let vcpu = vm.create_vcpu(id.into()).map_err(kvm("create a vCPU"))?;
    let cpuid = cpuid::configure(&offer.0, id, count).map_err(|_| KvmError::Kvm {
        what: "describe a vCPU: its CPUID has too many leaves",
        source: std::io::ErrorKind::InvalidInput.into(),
    })?;
    vcpu.set_cpuid2(&cpuid).map_err(kvm("describe a vCPU"))?;
    Ok(vcpu)
}

/// Has KVM send the guest's interrupts to `vcpu`, which was made while the guest runs: it draws its map of all local APICs anew when
/// the state of one is written, and draws it too early when a vCPU is made (arch/x86/kvm/lapic.c).
pub(super) fn announce(vcpu: &VcpuFd) -> Result<(), KvmError> {
    vcpu.get_lapic()
        .and_then(|state| vcpu.set_lapic(&state))
        .map_err(kvm("announce a vCPU"))
}

/// Puts the boot processor at the kernel's entry, as the 64-bit boot protocol wants it: paging on, flat segments, the
/// parameters' address in rsi, interrupts off.
pub(super) fn point_at(vcpu: &VcpuFd, entry: u64) -> Result<(), KvmError> {
    set_sregs(vcpu).map_err(kvm("set a vCPU's system registers"))?;
    let regs = kvm_regs {
        rip: entry,
        rsi: BOOT_PARAMS,
        rsp: STACK_TOP,
        rbp: STACK_TOP,
        rflags: RFLAGS,
        ..Default::default()
    };
    vcpu.set_regs(&regs)
        .map_err(kvm("set a vCPU's registers"))?;
    let fpu = kvm_fpu {
        fcw: FCW,
        mxcsr: MXCSR,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu)
        .map_err(kvm("set a vCPU's floating point unit"))?;
    let fast_strings = kvm_msr_entry {
        index: MSR_MISC_ENABLE,
        data: FAST_STRINGS,
        ..Default::default()
    };
    let what = "set a vCPU's model-specific registers";
    let msrs = Msrs::from_entries(&[fast_strings]).map_err(|_| KvmError::Kvm {
        what,
        source: std::io::ErrorKind::InvalidInput.into(),
    })?;
    match vcpu.set_msrs(&msrs).map_err(kvm(what))? {
        1 => Ok(()),
        _ => Err(KvmError::Kvm {
            what,
            source: std::io::ErrorKind::Unsupported.into(),
        }),
    }
}

fn set_sregs(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    let data = segment(DATA);
    sregs.cs = segment(CODE);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TASK);
    sregs.gdt = kvm_dtable {
        base: GDT,
        limit: (size_of_val(&DESCRIPTORS) - 1) as u16,
        ..Default::default()
    };
    sregs.idt = kvm_dtable::default();
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, PML4, CR4, EFER);
    vcpu.set_sregs(&sregs)
}

/// The segment register that has loaded `selector`, one of those in [`DESCRIPTORS`] (Intel SDM vol. 3, 3.4.5).
fn segment(selector: u16) -> kvm_segment {
    let descriptor = DESCRIPTORS[usize::from(selector / 8)];
    let bit = |at: u32| (descriptor >> at & 1) as u8;
    let limit = (descriptor & 0xffff | descriptor >> 32 & 0xf_0000) as u32;
    let g = bit(55);
    kvm_segment {
        base: descriptor >> 16 & 0xff_ffff | descriptor >> 32 & 0xff00_0000,
        limit: if g == 1 { limit << 12 | 0xfff } else { limit },
        selector,
        type_: (descriptor >> 40 & 0xf) as u8,
        present: bit(47),
        dpl: (descriptor >> 45 & 0b11) as u8,
        db: bit(54),
        s: bit(44),
        l: bit(53),
        g,
        avl: bit(52),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_what_their_descriptors_say() {
        let code = segment(CODE);
        assert_eq!(
            (code.base, code.limit, code.type_, code.l, code.db, code.s),
            (0, u32::MAX, 0xb, 1, 0, 1)
        );
        let data = segment(DATA);
        assert_eq!(
            (data.limit, data.type_, data.l, data.db, data.present),
            (u32::MAX, 3, 0, 1, 1)
        );
        let task = segment(TASK);
        assert_eq!(
            (task.type_, task.s, task.present, task.selector),
            (0xb, 0, 1, TASK)
        );
    }
}
