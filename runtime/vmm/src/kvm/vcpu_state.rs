//! Everything a virtual processor is made of between two instructions, as plain data: taken from a vCPU that is out of the guest, and
//! given to a fresh one with the same CPUID.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::error::{KvmError, kvm};

/// Version of [`VcpuState`].
const STATE_VERSION: u32 = 1;

/// The clock of a vCPU, which is restored before all else, and the deadline that is measured by it, which is restored last.
const TSC: u32 = 0x10;
const TSC_DEADLINE: u32 = 0x6e0;

/// Model-specific registers that are a guest's, by number (Intel SDM vol. 4; Linux, Documentation/virt/kvm/x86/msr.rst), of which KVM's own
/// list may leave some out. One that this host's KVM does not have is left out when saving.
const MSRS: [u32; 28] = [
    TSC,
    0x3b,        // IA32_TSC_ADJUST
    0x48,        // IA32_SPEC_CTRL
    0x174,       // IA32_SYSENTER_CS
    0x175,       // IA32_SYSENTER_ESP
    0x176,       // IA32_SYSENTER_EIP
    0x1a0,       // IA32_MISC_ENABLE
    0x277,       // IA32_PAT
    0x2ff,       // IA32_MTRR_DEF_TYPE
    0xda0,       // IA32_XSS
    0xc000_0081, // STAR
    0xc000_0082, // LSTAR
    0xc000_0083, // CSTAR
    0xc000_0084, // FMASK
    0xc000_0102, // KERNEL_GS_BASE
    0xc000_0103, // TSC_AUX
    0xc001_011f, // VIRT_SPEC_CTRL
    0x11,        // KVM_WALL_CLOCK
    0x12,        // KVM_SYSTEM_TIME
    0x4b56_4d00, // KVM_WALL_CLOCK_NEW
    0x4b56_4d01, // KVM_SYSTEM_TIME_NEW
    0x4b56_4d02, // KVM_ASYNC_PF_EN
    0x4b56_4d03, // KVM_STEAL_TIME
    0x4b56_4d04, // KVM_PV_EOI_EN
    0x4b56_4d05, // KVM_POLL_CONTROL
    0x4b56_4d06, // KVM_ASYNC_PF_INT
    0x4b56_4d08, // KVM_MIGRATION_CONTROL
    TSC_DEADLINE,
];

/// All registers to be saved, in the order in which they are to be restored.
pub(super) fn registers(kvm_fd: &Kvm) -> Result<Vec<u32>, KvmError> {
    let list = kvm_fd.get_msr_index_list();
    let list = list.map_err(kvm("list model-specific registers"))?;
    let mut registers: Vec<u32> = MSRS.iter().chain(list.as_slice()).copied().collect();
    registers.sort_by_key(|&index| (index == TSC_DEADLINE, index != TSC, index));
    registers.dedup();
    Ok(registers)
}

/// A vCPU's state.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct VcpuState {
    version: u32,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// The state of `vcpu` with these model-specific registers. A kick has brought it out of the guest: what any other exit has left undone
    /// would be lost.
    pub(super) fn save(vcpu: &VcpuFd, registers: &[u32]) -> Result<Self, KvmError> {
        let what = "save a vCPU's state";
        // KVM finishes what the last exit has left undone before it reports states, so the multiprocessing state comes first.
        Ok(Self {
            version: STATE_VERSION,
            mp_state: vcpu.get_mp_state().map_err(kvm(what))?,
            regs: vcpu.get_regs().map_err(kvm(what))?,
            sregs: vcpu.get_sregs().map_err(kvm(what))?,
            xsave: Box::new(vcpu.get_xsave().map_err(kvm(what))?),
            xcrs: vcpu.get_xcrs().map_err(kvm(what))?,
            debug: vcpu.get_debug_regs().map_err(kvm(what))?,
            lapic: vcpu.get_lapic().map_err(kvm(what))?,
            msrs: registers
                .iter()
                .filter_map(|&index| read_msr(vcpu, index).transpose())
                .collect::<Result<_, _>>()?,
            events: vcpu.get_vcpu_events().map_err(kvm(what))?,
        })
    }

    /// Gives this state to `vcpu`, which has its CPUID and has not run.
    pub(super) fn restore(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        let what = "restore a vCPU's state";
        if self.version != STATE_VERSION {
            return Err(KvmError::StateVersion {
                found: self.version,
                known: STATE_VERSION,
            });
        }
        vcpu.set_mp_state(self.mp_state).map_err(kvm(what))?;
        vcpu.set_regs(&self.regs).map_err(kvm(what))?;
        vcpu.set_sregs(&self.sregs).map_err(kvm(what))?;
        // SAFETY: the structure is whole, and as large as KVM_GET_XSAVE makes it; no feature that needs more is offered.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(kvm(what))?;
        vcpu.set_xcrs(&self.xcrs).map_err(kvm(what))?;
        vcpu.set_debug_regs(&self.debug).map_err(kvm(what))?;
        vcpu.set_lapic(&self.lapic).map_err(kvm(what))?;
        write_msrs(vcpu, &self.msrs)?;
        vcpu.set_vcpu_events(&self.events).map_err(kvm(what))
    }
}

/// Writes model-specific registers, in this order. One that cannot be written is as good when it has the value already.
fn write_msrs(vcpu: &VcpuFd, mut entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let what = "restore a vCPU's model-specific registers";
    while let Some(first) = entries.first() {
        let msrs = Msrs::from_entries(entries).map_err(|_| KvmError::Msr(first.index))?;
        let written = vcpu.set_msrs(&msrs).map_err(kvm(what))?;
        let [refused, rest @ ..] = &entries[written..] else {
            return Ok(());
        };
        match read_msr(vcpu, refused.index)? {
            Some(has) if has.data == refused.data => entries = rest,
            _ => return Err(KvmError::Msr(refused.index)),
        }
    }
    Ok(())
}

fn read_msr(vcpu: &VcpuFd, index: u32) -> Result<Option<kvm_msr_entry>, KvmError> {
    let what = "save a vCPU's model-specific registers";
    let entry = kvm_msr_entry {
        index,
        ..Default::default()
    };
    let invalid = |_| KvmError::Kvm {
        what,
        source: std::io::ErrorKind::InvalidInput.into(),
    };
    let mut msrs = Msrs::from_entries(&[entry]).map_err(invalid)?;
    match vcpu.get_msrs(&mut msrs).map_err(kvm(what))? {
        0 => Ok(None),
        _ => Ok(msrs.as_slice().first().copied()),
    }
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::{Cap, VcpuExit, VmFd};
    use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

    use super::super::layout::{KVM_IDENTITY_MAP, KVM_TSS};
    use super::super::memory::reserve;
    use super::super::vcpu::{self, Offer};
    use super::*;

    const CODE: u64 = 0x1000;
    const PORT: u16 = 0x510;
    /// `again: inc ax; out dx, al; jmp again`, for a processor in the mode it wakes up in.
    const COUNT: [u8; 4] = [0x40, 0xee, 0xeb, 0xfc];

    struct Guest {
        vcpu: VcpuFd,
        _vm: VmFd,
    }

    /// A vCPU that has not run, in a VM of its own with this memory; `None` where there is no KVM that could run it.
    fn guest(memory: &GuestMemoryMmap) -> Option<Guest> {
        let kvm = Kvm::new()
            .ok()
            .filter(|kvm| kvm.check_extension(Cap::Xcrs))?;
        let vm = kvm.create_vm().unwrap();
        vm.set_identity_map_address(KVM_IDENTITY_MAP).unwrap();
        vm.set_tss_address(KVM_TSS as usize).unwrap();
        vm.create_irq_chip().unwrap();
        let region = kvm_bindings::kvm_userspace_memory_region {
            memory_size: 1 << 20,
            userspace_addr: memory.get_host_address(GuestAddress(0)).unwrap() as u64,
            ..Default::default()
        };
        // SAFETY: guest memory stays mapped to the end of the process.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        let vcpu = vcpu::create(&vm, &Offer::of(&kvm).unwrap(), 0, 1).unwrap();
        Some(Guest { vcpu, _vm: vm })
    }

    fn counts(guest: &mut Guest) -> u8 {
        match guest.vcpu.run().unwrap() {
            VcpuExit::IoOut(PORT, &[number]) => number,
            exit => panic!("{exit:?}"),
        }
    }

    fn kick(guest: &mut Guest) {
        guest.vcpu.set_kvm_immediate_exit(1);
        assert_eq!(guest.vcpu.run().unwrap_err().errno(), libc::EINTR);
        guest.vcpu.set_kvm_immediate_exit(0);
    }

    #[test]
    fn another_vcpu_goes_on_where_the_one_whose_state_it_got_was() {
        let memory = reserve(1).unwrap();
        memory.write_slice(&COUNT, GuestAddress(CODE)).unwrap();
        let Some(mut first) = guest(&memory) else {
            println!("skipped: there is no KVM here");
            return;
        };
        let mut sregs = first.vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        first.vcpu.set_sregs(&sregs).unwrap();
        let regs = kvm_regs {
            rip: CODE,
            rdx: PORT.into(),
            rflags: 2,
            ..Default::default()
        };
        first.vcpu.set_regs(&regs).unwrap();
        assert_eq!([counts(&mut first), counts(&mut first)], [1, 2]);
        kick(&mut first);
        let registers = registers(&Kvm::new().unwrap()).unwrap();
        assert_eq!(registers.first(), Some(&TSC));
        assert_eq!(registers.last(), Some(&TSC_DEADLINE));
        let saved = VcpuState::save(&first.vcpu, &registers).unwrap();
        let saved = serde_json::to_vec(&saved).unwrap();
        assert_eq!(counts(&mut first), 3);

        let mut second = guest(&memory).unwrap();
        let state: VcpuState = serde_json::from_slice(&saved).unwrap();
        state.restore(&second.vcpu).unwrap();
        assert_eq!(second.vcpu.get_regs().unwrap(), state.regs);
        assert_eq!(second.vcpu.get_sregs().unwrap(), state.sregs);
        assert_eq!(second.vcpu.get_lapic().unwrap(), state.lapic);
        assert_eq!([counts(&mut second), counts(&mut second)], [3, 4]);
    }

    #[test]
    fn a_state_of_another_version_is_refused() {
        let memory = reserve(1).unwrap();
        let Some(guest) = guest(&memory) else {
            println!("skipped: there is no KVM here");
            return;
        };
        let mut state = VcpuState::save(&guest.vcpu, &MSRS).unwrap();
        state.version += 1;
        let error = state.restore(&guest.vcpu).unwrap_err();
        assert!(matches!(error, KvmError::StateVersion { .. }), "{error}");
    }
}
