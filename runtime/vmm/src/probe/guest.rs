//! The probe's tiny guest: its instructions, the memory and registers it starts with, and the watch over its steps. It runs
//! once, in 64 KiB of its own, and reports each step by writing its number to a port.

use std::arch::global_asm;
use std::io;

use kvm_bindings::{
    CpuId, kvm_cpuid_entry2, kvm_dtable, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, VolatileMemory};

use super::ProbeFailure;

/// The port to which the guest writes the number of the step it has finished.
const PORT: u16 = 0x510;

/// What the guest does, in order; step N is the Nth.
const STEPS: [&str; 4] = [
    "entering 64-bit code",
    "a 16-byte compare-and-exchange (cmpxchg16b)",
    "a software interrupt and the return from it (iretq)",
    "an interrupt from outside and the return from it",
];

/// The step after which the guest waits for an interrupt.
const AWAITS_INTERRUPT: usize = 3;
const INTERRUPT_VECTOR: u8 = 0x21;
const TRAP_VECTOR: u8 = 0x20;

const MEMORY_SIZE: usize = 0x10000;
const CODE: usize = 0x0;
const IDT: usize = 0x1000;
const GDT: usize = 0x1800;
/// Two 64-bit words for the compare-and-exchange, aligned as it demands.
const DATA: usize = 0x1900;
const PML4: usize = 0x2000;
const PDPT: usize = 0x3000;
const PD: usize = 0x4000;
const STACK_TOP: u64 = 0x8000;

const CODE_SELECTOR: u16 = 8;
const DATA_SELECTOR: u16 = 16;

/// An interrupt flag that is set, and the bit that always is.
const RFLAGS_IF: u64 = 1 << 9 | 1 << 1;
const CR0_PE_NE_PG: u64 = 1 | 1 << 5 | 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
/// Present, writable.
const TABLE: u64 = 0b11;
/// Present, writable, 2 MiB.
const LARGE_PAGE: u64 = 0b1000_0011;

/// A processor as small as the guest's needs: KVM refuses registers that the processor it was told of could not hold.
const FEATURES: [kvm_cpuid_entry2; 3] = {
    const fn leaf(function: u32, eax: u32, ecx: u32, edx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index: 0,
            flags: 0,
            eax,
            ebx: 0,
            ecx,
            edx,
            padding: [0; 3],
        }
    }
    [
        // cmpxchg16b; PSE, PAE, cmpxchg8b, APIC.
        leaf(1, 0, 1 << 13, 1 << 3 | 1 << 6 | 1 << 8 | 1 << 9),
        leaf(0x8000_0000, 0x8000_0001, 0, 0),
        // Long mode.
        leaf(0x8000_0001, 0, 0, 1 << 29),
    ]
};

// rbx holds the address of the two words, dx the port; r12 counts the interrupts that were taken.
global_asm!(
    ".pushsection .rodata.cloison_probe, \"a\"",
    ".globl cloison_probe_begin, cloison_probe_trap, cloison_probe_interrupt, cloison_probe_end",
    "cloison_probe_begin:",
    "    mov al, 1",
    "    out dx, al",
    "    mov rax, [rbx]",
    "    mov r8, rdx",
    "    mov rdx, [rbx + 8]",
    "    mov rdi, rbx",
    "    mov ebx, 0x55",
    "    mov ecx, 0xaa",
    "    lock cmpxchg16b [rdi]",
    "    jnz 2f",
    "    cmp qword ptr [rdi], 0x55",
    "    jne 2f",
    "    cmp qword ptr [rdi + 8], 0xaa",
    "    jne 2f",
    "    mov rdx, r8",
    "    mov al, 2",
    "    out dx, al",
    "    int 0x20",
    "    cmp r12, 1",
    "    jne 2f",
    "    mov al, 3",
    "    out dx, al",
    "    cmp r12, 2",
    "    jne 2f",
    "    mov al, 4",
    "    out dx, al",
    "2:  mov al, 0xff",
    "    out dx, al",
    "    jmp 2b",
    "cloison_probe_trap:",
    "    inc r12",
    "    iretq",
    "cloison_probe_interrupt:",
    "    inc r12",
    "    iretq",
    "cloison_probe_end:",
    ".popsection",
);

unsafe extern "C" {
    static cloison_probe_begin: u8;
    static cloison_probe_trap: u8;
    static cloison_probe_interrupt: u8;
    static cloison_probe_end: u8;
}

/// The guest's instructions, and where in them the two handlers are.
fn code() -> (&'static [u8], usize, usize) {
    let begin = &raw const cloison_probe_begin;
    let offset = |symbol: *const u8| symbol as usize - begin as usize;
    let length = offset(&raw const cloison_probe_end);
    // SAFETY: the two symbols are the ends of one run of bytes that the assembler has put into this program's constant
    // data, which is mapped and unchanging for as long as the program runs.
    let bytes = unsafe { std::slice::from_raw_parts(begin, length) };
    (
        bytes,
        offset(&raw const cloison_probe_trap),
        offset(&raw const cloison_probe_interrupt),
    )
}

/// The guest and what it is made of.
#[derive(Debug)]
pub(super) struct Guest {
    // In this order: the VM is given the memory, and the vCPU is the VM's.
    _vcpu: VcpuFd,
    _vm: VmFd,
    _memory: MmapRegion<()>,
}

/// Builds the guest, runs it, watches it. The number of exits is bounded by the number of steps.
pub(super) fn run(kvm: &Kvm) -> Result<Guest, ProbeFailure> {
    let memory = MmapRegion::<()>::new(MEMORY_SIZE)
        .map_err(|error| refused("map 64 KiB for a guest")(io::Error::other(error)))?;
    fill(&memory).map_err(refused("fill a guest's memory"))?;
    let vm = kvm.create_vm().map_err(kvm_refused("create a VM"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY_SIZE as u64,
        userspace_addr: memory.as_ptr() as u64,
    };
    // SAFETY: the region is `memory`, which is dropped after `vm` and its vCPU, here and in `Guest`.
    unsafe { vm.set_user_memory_region(region) }.map_err(kvm_refused("give a VM memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(kvm_refused("create a vCPU"))?;
    let cpuid = CpuId::from_entries(&FEATURES)
        .map_err(|_| refused("describe a processor")(io::ErrorKind::InvalidInput.into()))?;
    vcpu.set_cpuid2(&cpuid)
        .map_err(kvm_refused("describe a processor"))?;
    registers(&vcpu).map_err(kvm_refused("set a vCPU's registers"))?;

    for (index, step) in STEPS.into_iter().enumerate() {
        if index == AWAITS_INTERRUPT {
            interrupt(&vcpu).map_err(kvm_refused("interrupt a vCPU"))?;
        }
        let failed = |how: String| ProbeFailure::Guest { step, how };
        match vcpu.run() {
            Ok(VcpuExit::IoOut(PORT, &[number])) if usize::from(number) == index + 1 => {}
            Ok(VcpuExit::IoOut(PORT, _)) => return Err(failed("the result was wrong".into())),
            Ok(VcpuExit::InternalError) => return Err(failed(internal_error(&mut vcpu))),
            Ok(VcpuExit::Shutdown) => return Err(failed("the guest crashed: triple fault".into())),
            Ok(exit) => return Err(failed(format!("unexpected exit: {exit:?}"))),
            Err(error) => return Err(kvm_refused("run a guest")(error)),
        }
    }
    Ok(Guest {
        _vcpu: vcpu,
        _vm: vm,
        _memory: memory,
    })
}

fn refused(what: &'static str) -> impl Fn(io::Error) -> ProbeFailure {
    move |error| ProbeFailure::Refused { what, error }
}

fn kvm_refused(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> ProbeFailure {
    move |error| refused(what)(error.into())
}

fn internal_error(vcpu: &mut VcpuFd) -> String {
    let run = vcpu.get_kvm_run();
    // SAFETY: KVM has just reported an internal error, so `internal` is the member of the union that it filled; it is plain
    // numbers, of which any are valid.
    match unsafe { run.__bindgen_anon_1.internal.suberror } {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => {
            "it emulates instructions in software, and does not know this one".into()
        }
        other => format!("KVM internal error {other}"),
    }
}

fn fill(memory: &MmapRegion<()>) -> io::Result<()> {
    let slice = memory.as_volatile_slice();
    let put =
        |offset: usize, bytes: &[u8]| slice.write_slice(bytes, offset).map_err(io::Error::other);
    let word = |offset: usize, word: u64| put(offset, &word.to_le_bytes());
    let (code, trap, interrupt) = code();
    put(CODE, code)?;
    word(PML4, PDPT as u64 | TABLE)?;
    word(PDPT, PD as u64 | TABLE)?;
    word(PD, LARGE_PAGE)?;
    // Flat descriptors (Intel SDM vol. 3, 3.4.5): 64-bit code, then data.
    word(GDT + usize::from(CODE_SELECTOR), 0x00af_9b00_0000_ffff)?;
    word(GDT + usize::from(DATA_SELECTOR), 0x00cf_9300_0000_ffff)?;
    for (vector, handler) in [(TRAP_VECTOR, trap), (INTERRUPT_VECTOR, interrupt)] {
        // A 64-bit interrupt gate (vol. 3, 6.14.1) to a handler below 64 KiB.
        let gate = (CODE + handler) as u64 | u64::from(CODE_SELECTOR) << 16 | 0x8e00 << 32;
        word(IDT + 16 * usize::from(vector), gate)?;
    }
    Ok(())
}

fn registers(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    let segment = |selector: u16, type_: u8| kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        ..Default::default()
    };
    let data = segment(DATA_SELECTOR, 3);
    sregs.cs = kvm_segment {
        db: 0,
        l: 1,
        ..segment(CODE_SELECTOR, 11)
    };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // A task register that VM entry accepts; nothing here uses it.
    sregs.tr = kvm_segment {
        limit: 0x67,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    sregs.ldt = kvm_segment {
        type_: 2,
        unusable: 1,
        ..Default::default()
    };
    sregs.gdt = kvm_dtable {
        base: GDT as u64,
        limit: 23,
        ..Default::default()
    };
    sregs.idt = kvm_dtable {
        base: IDT as u64,
        limit: 16 * (u16::from(INTERRUPT_VECTOR) + 1) - 1,
        ..Default::default()
    };
    sregs.cr3 = PML4 as u64;
    sregs.cr0 = CR0_PE_NE_PG;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME_LMA;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: CODE as u64,
        rsp: STACK_TOP,
        rbx: DATA as u64,
        rdx: u64::from(PORT),
        rflags: RFLAGS_IF,
        ..Default::default()
    })
}

/// Puts an interrupt on its way into the guest, as an interrupt controller outside the kernel would.
fn interrupt(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut events = vcpu.get_vcpu_events()?;
    events.interrupt.injected = 1;
    events.interrupt.nr = INTERRUPT_VECTOR;
    vcpu.set_vcpu_events(&events)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_instructions_fit_their_page_and_the_handlers_are_inside() {
        let (code, trap, interrupt) = code();
        assert!(CODE + code.len() <= IDT);
        assert!(trap < interrupt && interrupt < code.len());
        // Both handlers end in iretq.
        assert_eq!(code[code.len() - 2..], [0x48, 0xcf]);
        assert_eq!(code[interrupt - 2..interrupt], [0x48, 0xcf]);
    }

    #[test]
    fn the_tables_do_not_overlap() {
        assert!(IDT + 16 * (usize::from(INTERRUPT_VECTOR) + 1) <= GDT);
        assert!(GDT + 24 <= DATA && DATA.is_multiple_of(16) && DATA + 16 <= PML4);
        assert!(PD + 0x1000 < STACK_TOP as usize && STACK_TOP as usize <= MEMORY_SIZE);
    }
}
