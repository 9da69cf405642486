//! What the kernel finds in memory when it starts, by the 64-bit entry of the x86 boot protocol
//! (Documentation/arch/x86/boot.rst): its parameters, its command line, its initial ramfs, and tables for the processor that
//! last until it has made its own.

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use super::error::KvmError;
use super::layout::{
    BASE_MEMORY_END, BOOT_PARAMS, CMDLINE, CMDLINE_SIZE, GDT, HIGH_MEMORY, HOLE_END,
    IDENTITY_MAPPED, PAGE, PD, PDPT, PML4, SLOT_COUNT, slot_address, slot_irq,
};
use super::memory::low_end;
use super::root::Root;

/// "HdrS", at which the kernel knows that the parameters are filled in.
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// Type of usable memory in the memory map (ACPI 6.5, 15.1).
const E820_RAM: u32 = 1;

/// Descriptors of the boot processor, by their selectors; the boot protocol names the first two (__BOOT_CS, __BOOT_DS).
pub(super) const CODE: u16 = 0x10;
pub(super) const DATA: u16 = 0x18;
pub(super) const TASK: u16 = 0x20;
/// Null, null, 64-bit code, data, a busy task of one page (Intel SDM vol. 3, 3.4.5, 8.2.2).
pub(super) const DESCRIPTORS: [u64; 5] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x008f_8b00_0000_ffff,
];

/// Page table entries: present and writable; the same for a page of 2 MiB.
const TABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 0b1000_0011;
const LARGE_PAGE_SIZE: u64 = 2 << 20;

/// What every guest of this engine is told. With `quiet` its log keeps to what matters; each line is some exits. A panic becomes a
/// reset at once (`panic=-1`), by the keyboard controller's reset line (`reboot=k`), which is told from a triple fault. CPUs beyond
/// the first wait until they are asked for (`maxcpus=1`). Nothing is patched for one processor (`noreplace-smp`), since every page
/// of the kernel that is written is a page that this VM no longer shares. The host vouches for its clock (`tsc=reliable`): CPUs that come need not compare theirs.
/// And whoever waits for readers of the kernel's data to be done does not wait for the next ticks (`rcupdate.rcu_expedited`), as making
/// a container does several times. No network interface is there that nobody asked for (`dummy.numdummies=0`).
const WORDS: &str = "console=hvc0 quiet panic=-1 reboot=k maxcpus=1 noreplace-smp tsc=reliable \
    rcupdate.rcu_expedited=1 dummy.numdummies=0";

/// The words every guest of this engine is started with, those that name its root and the slots, and the caller's.
pub(super) fn command_line(root: &Root, words: &str) -> Result<String, KvmError> {
    let mut line = format!("{WORDS} {}", root.words());
    for slot in 0..SLOT_COUNT {
        let (address, irq) = (slot_address(slot), slot_irq(slot));
        line.push_str(&format!(" virtio_mmio.device={PAGE:#x}@{address:#x}:{irq}"));
    }
    if !words.is_empty() {
        line.push(' ');
        line.push_str(words);
    }
    if line.len() >= CMDLINE_SIZE {
        return Err(KvmError::Cmdline(line.len()));
    }
    Ok(line)
}

/// Writes parameters, command line and processor tables.
pub(super) fn write(
    memory: &GuestMemoryMmap,
    command_line: &str,
    root: &Root,
) -> Result<(), KvmError> {
    let parameters = parameters(memory, command_line, root);
    memory
        .write_obj(parameters, GuestAddress(BOOT_PARAMS))
        .map_err(written("boot parameters"))?;
    let mut line = command_line.as_bytes().to_vec();
    line.push(0);
    memory
        .write_slice(&line, GuestAddress(CMDLINE))
        .map_err(written("kernel command line"))?;
    write_tables(memory).map_err(written("processor's tables"))
}

fn written(what: &'static str) -> impl Fn(vm_memory::GuestMemoryError) -> KvmError {
    move |source| KvmError::Write { what, source }
}

fn parameters(memory: &GuestMemoryMmap, command_line: &str, root: &Root) -> boot_params {
    let initramfs = root.initramfs();
    let mut parameters = boot_params {
        hdr: setup_header {
            header: HEADER_MAGIC,
            boot_flag: BOOT_FLAG,
            type_of_loader: LOADER_UNDEFINED,
            kernel_alignment: LARGE_PAGE_SIZE as u32,
            // All below 4 GiB, by the layout.
            cmd_line_ptr: CMDLINE as u32,
            cmdline_size: command_line.len() as u32,
            ramdisk_image: initramfs.start as u32,
            ramdisk_size: initramfs.size as u32,
            ..Default::default()
        },
        ..Default::default()
    };
    let low = low_end(memory);
    let mut map = vec![(0, BASE_MEMORY_END), (HIGH_MEMORY, low - HIGH_MEMORY)];
    map.extend(
        memory
            .iter()
            .filter(|region| region.start_addr().0 >= HOLE_END)
            .map(|region| (region.start_addr().raw_value(), region.len())),
    );
    for (entry, &(addr, size)) in parameters.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr,
            size,
            type_: E820_RAM,
        };
    }
    parameters.e820_entries = map.len() as u8;
    parameters
}

fn write_tables(memory: &GuestMemoryMmap) -> Result<(), vm_memory::GuestMemoryError> {
    memory.write_obj(PDPT | TABLE, GuestAddress(PML4))?;
    memory.write_obj(PD | TABLE, GuestAddress(PDPT))?;
    let pages = IDENTITY_MAPPED / LARGE_PAGE_SIZE;
    let directory: Vec<u8> = (0..pages)
        .flat_map(|page| ((page * LARGE_PAGE_SIZE) | LARGE_PAGE).to_le_bytes())
        .collect();
    memory.write_slice(&directory, GuestAddress(PD))?;
    let descriptors: Vec<u8> = DESCRIPTORS
        .iter()
        .flat_map(|descriptor| descriptor.to_le_bytes())
        .collect();
    memory.write_slice(&descriptors, GuestAddress(GDT))
}

#[cfg(test)]
mod tests {
    use super::super::layout::HOLE;
    use super::super::memory::reserve;
    use super::super::root::Initramfs;
    use super::*;

    const ROOT: Root = Root::Unpacked(Initramfs { start: 0, size: 0 });

    #[test]
    fn the_memory_map_covers_all_memory_and_leaves_out_the_holes() {
        let map = |mib| {
            let parameters = parameters(&reserve(mib).unwrap(), "", &ROOT);
            let table = parameters.e820_table;
            table[..usize::from(parameters.e820_entries)]
                .iter()
                .map(|entry| (entry.addr, entry.size))
                .collect::<Vec<_>>()
        };
        assert_eq!(map(64), [(0, BASE_MEMORY_END), (HIGH_MEMORY, 63 << 20)]);
        let large = map(4096);
        assert_eq!(large[1], (HIGH_MEMORY, HOLE - HIGH_MEMORY));
        assert_eq!(large[2], (1 << 32, 1 << 30));
        assert_eq!(large.len(), 3);
    }

    #[test]
    fn the_command_line_names_every_slot_and_ends_with_the_callers_words() {
        let line = command_line(&ROOT, "quiet init=/x").unwrap();
        assert!(line.contains(" virtio_mmio.device=0x1000@0xd0000000:5 "));
        assert_eq!(line.matches("virtio_mmio.device=").count(), SLOT_COUNT);
        assert!(line.ends_with(" quiet init=/x"));
    }

    #[test]
    fn the_longest_words_a_spec_allows_fit_and_longer_ones_are_refused() {
        command_line(&ROOT, &"x".repeat(crate::spec::VmSpec::MAX_CMDLINE)).unwrap();
        assert!(matches!(
            command_line(&ROOT, &"x".repeat(CMDLINE_SIZE)),
            Err(KvmError::Cmdline(_))
        ));
    }
}
