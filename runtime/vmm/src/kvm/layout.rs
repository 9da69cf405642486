//! Where everything is in the guest's physical address space. All other modules take their addresses from here.

/// Size of a page, bytes.
pub(super) const PAGE: u64 = 4 << 10;

/// Global descriptor table the boot CPU starts with; the kernel soon has its own.
pub(super) const GDT: u64 = 0x6000;
/// The boot protocol's `struct boot_params`, the "zero page".
pub(super) const BOOT_PARAMS: u64 = 0x7000;
/// The boot CPU's stack, growing down.
pub(super) const STACK_TOP: u64 = 0x8ff0;
/// Page tables that map the first GiB onto itself: three levels, a page each.
pub(super) const PML4: u64 = 0x9000;
pub(super) const PDPT: u64 = 0xa000;
pub(super) const PD: u64 = 0xb000;
/// What the page tables map, bytes; everything the kernel looks at before it has tables of its own is below.
pub(super) const IDENTITY_MAPPED: u64 = 1 << 30;
/// The kernel command line.
pub(super) const CMDLINE: u64 = 0x2_0000;
/// COMMAND_LINE_SIZE of the x86 kernel (arch/x86/include/asm/setup.h), with the NUL.
pub(super) const CMDLINE_SIZE: usize = 2048;
/// End of what PCs call base memory; above it are, on a PC, the BIOS's data and ROMs.
pub(super) const BASE_MEMORY_END: u64 = 0x9_fc00;
/// The MP tables, where a BIOS would have put them: one of the places in which kernels look (MP spec 1.4, 4).
pub(super) const MP_TABLE: u64 = 0xf_0000;
/// Where memory goes on above base memory.
pub(super) const HIGH_MEMORY: u64 = 0x10_0000;

/// The hole below 4 GiB that holds devices; memory goes on above it.
pub(super) const HOLE: u64 = 0xc000_0000;
pub(super) const HOLE_END: u64 = 0x1_0000_0000;

/// The guest's root file system, where it is mapped and not unpacked, and what room there is for it.
pub(super) const ROOT: u64 = HOLE;
pub(super) const ROOT_SIZE: u64 = SLOTS - ROOT;

/// The virtio slots, a page each.
pub(super) const SLOTS: u64 = 0xd000_0000;
/// Number of slots. Each has an interrupt line of its own from [`FIRST_IRQ`] on.
pub(super) const SLOT_COUNT: usize = 16;
/// The slots in which the guest's agent looks for what makes a guest of a template one of its own (cloison_agent_api::TEMPLATE_SLOTS);
/// network devices come right behind them.
pub(super) const VSOCK_SLOT: usize = 0;
pub(super) const FS_SLOT: usize = 1;
/// The slot of the network device that a template's guest knows, if it has one.
pub(super) const NIC_SLOT: usize = FS_SLOT + 1;
/// How many network devices a guest of a template looks for.
pub(super) const TEMPLATE_NICS: usize = 3;
/// The first slot of the devices that every VM has from its first instruction on.
pub(super) const OWN_SLOTS: usize = FS_SLOT + 1 + TEMPLATE_NICS;
/// The first interrupt line that no PC device had a claim on.
pub(super) const FIRST_IRQ: u32 = 5;
/// Input lines of the I/O APIC that KVM emulates.
pub(super) const IOAPIC_LINES: u8 = 24;

/// Three pages and one that KVM wants for itself on Intel processors without unrestricted guests.
pub(super) const KVM_TSS: u64 = 0xfffb_d000;
pub(super) const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// Registers of the interrupt controllers KVM emulates, at their architectural places.
pub(super) const IOAPIC: u32 = 0xfec0_0000;
pub(super) const LAPIC: u32 = 0xfee0_0000;

const _: () = {
    assert!(FIRST_IRQ as usize + SLOT_COUNT <= IOAPIC_LINES as usize);
    assert!(SLOTS >= HOLE && SLOTS + SLOT_COUNT as u64 * PAGE <= IOAPIC as u64);
    assert!(CMDLINE + CMDLINE_SIZE as u64 <= BASE_MEMORY_END);
};

/// Address of slot `index`.
pub(super) const fn slot_address(index: usize) -> u64 {
    SLOTS + index as u64 * PAGE
}

/// Interrupt line of slot `index`.
pub(super) const fn slot_irq(index: usize) -> u32 {
    FIRST_IRQ + index as u32
}
