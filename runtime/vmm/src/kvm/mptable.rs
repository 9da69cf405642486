//! The MultiProcessor tables (Intel MultiProcessor Specification 1.4): how a kernel without ACPI learns of its processors and of
//! the way interrupts take. Pure: it makes bytes.

use super::layout::{IOAPIC, IOAPIC_LINES, LAPIC, MP_TABLE};

/// Version register of the local APICs that KVM emulates.
const APIC_VERSION: u8 = 0x14;
/// Version register of the I/O APIC that KVM emulates.
const IOAPIC_VERSION: u8 = 0x11;
/// Revision 1.4 of the specification.
const REVISION: u8 = 4;

/// Entry types (4.3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

/// Interrupt types (table 4-11).
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

/// Lengths of the floating pointer and of the table's header, bytes.
const POINTER_LENGTH: usize = 16;
const HEADER_LENGTH: usize = 44;
const ISA: u8 = 0;

/// The floating pointer and, right behind it, the table of a machine with `processors` processors, to be put at
/// [`MP_TABLE`]. Processor N has APIC ID N; the I/O APIC comes after them. Every line of the I/O APIC is an ISA interrupt of the same
/// number, so that it is edge-triggered, as the interrupts of our slots are.
pub(super) fn build(processors: u8) -> Vec<u8> {
    let ioapic_id = processors;
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..processors {
        // Enabled, and the first one boots. Signature and features are asked of CPUID by every kernel that matters.
        let flags = if id == 0 { 0b11 } else { 0b01 };
        let mut processor = [0; 20];
        processor[..4].copy_from_slice(&[PROCESSOR, id, APIC_VERSION, flags]);
        entry(&processor);
    }
    entry(&[&[BUS, ISA][..], b"ISA   "].concat());
    entry(
        &[
            &[IO_APIC, ioapic_id, IOAPIC_VERSION, 1][..],
            &IOAPIC.to_le_bytes(),
        ]
        .concat(),
    );
    for line in 0..IOAPIC_LINES {
        entry(&[IO_INTERRUPT, INT, 0, 0, ISA, line, ioapic_id, line]);
    }
    entry(&[LOCAL_INTERRUPT, EXT_INT, 0, 0, ISA, 0, 0, 0]);
    entry(&[LOCAL_INTERRUPT, NMI, 0, 0, ISA, 0, 0xff, 1]);

    let mut table = vec![0; HEADER_LENGTH];
    table[..4].copy_from_slice(b"PCMP");
    let length = (HEADER_LENGTH + entries.len()) as u16;
    table[4..6].copy_from_slice(&length.to_le_bytes());
    table[6] = REVISION;
    table[8..16].copy_from_slice(b"CLOISON ");
    table[16..28].copy_from_slice(b"microVM     ");
    table[34..36].copy_from_slice(&count.to_le_bytes());
    table[36..40].copy_from_slice(&LAPIC.to_le_bytes());
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);

    let mut bytes = vec![0; POINTER_LENGTH];
    bytes[..4].copy_from_slice(b"_MP_");
    bytes[4..8].copy_from_slice(&(MP_TABLE as u32 + POINTER_LENGTH as u32).to_le_bytes());
    bytes[8] = 1;
    bytes[9] = REVISION;
    bytes[10] = checksum(&bytes);
    bytes.extend_from_slice(&table);
    bytes
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0, |sum: u8, &byte| sum.wrapping_sub(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes
            .iter()
            .fold(0, |sum: u8, &byte| sum.wrapping_add(byte))
    }

    #[test]
    fn pointer_and_table_are_where_they_say_and_add_up() {
        for processors in [1, 2, 64] {
            let bytes = build(processors);
            assert_eq!(sum(&bytes[..POINTER_LENGTH]), 0);
            let table = &bytes[POINTER_LENGTH..];
            assert_eq!(sum(table), 0);
            assert_eq!(
                usize::from(u16::from_le_bytes([table[4], table[5]])),
                table.len()
            );
            let address = u32::from_le_bytes(bytes[4..8].try_into().unwrap());
            assert_eq!(u64::from(address), MP_TABLE + POINTER_LENGTH as u64);
        }
    }

    #[test]
    fn the_entries_are_as_many_as_announced_and_only_the_first_processor_boots() {
        let bytes = build(64);
        let table = &bytes[POINTER_LENGTH..];
        let mut rest = &table[HEADER_LENGTH..];
        let (mut entries, mut booting) = (0, Vec::new());
        while let Some(&kind) = rest.first() {
            if kind == PROCESSOR && rest[3] & 0b10 != 0 {
                booting.push(rest[1]);
            }
            rest = &rest[if kind == PROCESSOR { 20 } else { 8 }..];
            entries += 1;
        }
        assert_eq!(booting, [0]);
        assert_eq!(entries, u16::from_le_bytes([table[34], table[35]]));
    }
}
