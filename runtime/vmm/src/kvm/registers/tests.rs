//! A driver's way through the registers, and all the wrong ways.

use super::*;

const IDENTITY: Identity = Identity {
    device_type: 26,
    features: VERSION_1 | 1 << 29 | 0b101,
};

fn registers() -> Registers {
    Registers::new(&[256, 64])
}

/// Writes one after the other; answers the last effect.
fn write(registers: &mut Registers, writes: &[(u64, u32)]) -> Effect {
    let mut effect = Effect::Nothing;
    for &(at, value) in writes {
        effect = registers.write(at, value, IDENTITY);
    }
    effect
}

const NEGOTIATE: [(u64, u32); 6] = [
    (offset::STATUS, 1),
    (offset::STATUS, 3),
    (offset::DRIVER_FEATURES_SEL, 0),
    (offset::DRIVER_FEATURES, 0b001),
    (offset::DRIVER_FEATURES_SEL, 1),
    (offset::DRIVER_FEATURES, 1),
];

const QUEUE: [(u64, u32); 9] = [
    (offset::QUEUE_SEL, 1),
    (offset::QUEUE_SIZE, 64),
    (offset::QUEUE_DESC_LOW, 0x1000),
    (offset::QUEUE_DESC_HIGH, 1),
    (offset::QUEUE_DRIVER_LOW, 0x2000),
    (offset::QUEUE_DRIVER_HIGH, 0),
    (offset::QUEUE_DEVICE_LOW, 0x3000),
    (offset::QUEUE_DEVICE_HIGH, 0),
    (offset::QUEUE_READY, 1),
];

fn configured() -> Registers {
    let mut registers = registers();
    write(&mut registers, &NEGOTIATE);
    write(&mut registers, &[(offset::STATUS, 11)]);
    write(&mut registers, &QUEUE);
    registers
}

fn status(registers: &Registers) -> u32 {
    registers.read(offset::STATUS, IDENTITY)
}

#[test]
fn a_driver_that_does_as_it_should_starts_the_device_with_what_it_wrote() {
    let mut registers = configured();
    assert_eq!(
        write(&mut registers, &[(offset::STATUS, 15)]),
        Effect::Start
    );
    assert_eq!(registers.features(), VERSION_1 | 1);
    let queue = registers.queues()[1];
    assert_eq!((queue.size, queue.ready), (64, true));
    assert_eq!(
        (queue.descriptors, queue.driver, queue.device),
        (0x1_0000_1000, 0x2000, 0x3000)
    );
    assert!(!registers.queues()[0].ready);
    assert_eq!(status(&registers), 15);
}

#[test]
fn the_device_introduces_itself() {
    let mut registers = registers();
    let read = |registers: &Registers, at| registers.read(at, IDENTITY);
    assert_eq!(read(&registers, offset::MAGIC).to_le_bytes(), *b"virt");
    assert_eq!(
        (
            read(&registers, offset::VERSION),
            read(&registers, offset::DEVICE_ID)
        ),
        (2, 26)
    );
    assert_eq!(read(&registers, offset::DEVICE_FEATURES), 1 << 29 | 0b101);
    write(&mut registers, &[(offset::DEVICE_FEATURES_SEL, 1)]);
    assert_eq!(read(&registers, offset::DEVICE_FEATURES), 1);
    write(&mut registers, &[(offset::DEVICE_FEATURES_SEL, 2)]);
    assert_eq!(read(&registers, offset::DEVICE_FEATURES), 0);
    assert_eq!(read(&registers, offset::QUEUE_SIZE_MAX), 256);
    assert_eq!(read(&registers, offset::SHM_LEN_LOW), u32::MAX);
    assert_eq!(read(&registers, offset::SHM_BASE_HIGH), u32::MAX);
}

#[test]
fn queues_that_are_not_there_have_no_size_and_take_no_writes() {
    for select in [2, 31, 32, u32::MAX] {
        let mut registers = configured();
        let before = registers.clone();
        write(&mut registers, &[(offset::QUEUE_SEL, select)]);
        assert_eq!(registers.read(offset::QUEUE_SIZE_MAX, IDENTITY), 0);
        assert_eq!(registers.read(offset::QUEUE_READY, IDENTITY), 0);
        write(
            &mut registers,
            &[(offset::QUEUE_SIZE, 8), (offset::QUEUE_READY, 1)],
        );
        assert_eq!(registers.queues(), before.queues());
    }
}

#[test]
fn features_not_offered_or_without_version_1_are_not_agreed_to() {
    for (low, high) in [(0b010, 1), (0b001, 0), (0b001, 3), (u32::MAX, u32::MAX)] {
        let mut registers = registers();
        write(
            &mut registers,
            &[
                (offset::STATUS, 3),
                (offset::DRIVER_FEATURES, low),
                (offset::DRIVER_FEATURES_SEL, 1),
                (offset::DRIVER_FEATURES, high),
                (offset::STATUS, 11),
            ],
        );
        assert_eq!(status(&registers), 3, "{low:#x} {high:#x}");
        assert_eq!(
            write(&mut registers, &[(offset::STATUS, 15)]),
            Effect::Nothing
        );
    }
}

#[test]
fn features_are_frozen_once_agreed() {
    let mut registers = configured();
    write(
        &mut registers,
        &[
            (offset::DRIVER_FEATURES_SEL, 0),
            (offset::DRIVER_FEATURES, 0b100),
        ],
    );
    assert_eq!(registers.features(), VERSION_1 | 1);
}

#[test]
fn features_before_there_is_a_driver_and_halves_that_are_not_there_are_ignored() {
    let mut registers = registers();
    write(&mut registers, &[(offset::DRIVER_FEATURES, 1)]);
    write(
        &mut registers,
        &[
            (offset::STATUS, 3),
            (offset::DRIVER_FEATURES_SEL, 7),
            (offset::DRIVER_FEATURES, 1),
        ],
    );
    assert_eq!(registers.features(), 0);
}

#[test]
fn queue_sizes_no_ring_can_have_leave_the_queue_unready() {
    for size in [0, 3, 65, 128, 1 << 16, u32::MAX] {
        let mut registers = configured();
        write(&mut registers, &[(offset::STATUS, 0)]);
        write(&mut registers, &NEGOTIATE);
        write(&mut registers, &[(offset::STATUS, 11)]);
        write(
            &mut registers,
            &[
                (offset::QUEUE_SEL, 1),
                (offset::QUEUE_SIZE, size),
                (offset::QUEUE_READY, 1),
            ],
        );
        assert!(!registers.queues()[1].ready, "{size}");
    }
}

#[test]
fn queues_cannot_be_set_up_before_features_are_agreed() {
    let mut registers = registers();
    write(&mut registers, &NEGOTIATE);
    write(&mut registers, &QUEUE);
    assert_eq!(registers.queues(), Registers::new(&[256, 64]).queues());
}

#[test]
fn queues_are_frozen_once_ready_and_all_of_them_once_the_device_lives() {
    let mut registers = configured();
    let frozen = registers.clone();
    let changes = [
        (offset::QUEUE_SIZE, 8),
        (offset::QUEUE_DESC_LOW, 0xdead),
        (offset::QUEUE_DEVICE_HIGH, 9),
        (offset::QUEUE_READY, 0),
    ];
    write(&mut registers, &changes);
    assert_eq!(registers.queues(), frozen.queues());
    write(&mut registers, &[(offset::STATUS, 15)]);
    write(&mut registers, &[(offset::QUEUE_SEL, 0)]);
    write(&mut registers, &changes);
    write(&mut registers, &[(offset::QUEUE_READY, 1)]);
    assert_eq!(registers.queues(), frozen.queues());
}

#[test]
fn a_device_starts_once() {
    let mut registers = configured();
    assert_eq!(
        write(&mut registers, &[(offset::STATUS, 15)]),
        Effect::Start
    );
    for value in [15, 4, 12, 255] {
        assert_eq!(
            write(&mut registers, &[(offset::STATUS, value)]),
            Effect::Nothing
        );
    }
}

#[test]
fn a_device_that_has_failed_or_needs_a_reset_does_not_start() {
    let mut failed = configured();
    write(&mut failed, &[(offset::STATUS, 128)]);
    assert_eq!(write(&mut failed, &[(offset::STATUS, 15)]), Effect::Nothing);
    let mut broken = configured();
    broken.set_needs_reset();
    assert_eq!(write(&mut broken, &[(offset::STATUS, 15)]), Effect::Nothing);
    assert_eq!(status(&broken) & 64, 64);
}

#[test]
fn the_guest_can_neither_set_needs_reset_nor_clear_a_bit() {
    let mut registers = configured();
    write(&mut registers, &[(offset::STATUS, 64)]);
    assert_eq!(status(&registers), 11);
    write(&mut registers, &[(offset::STATUS, 1)]);
    assert_eq!(status(&registers), 11);
    assert_eq!(
        write(
            &mut registers,
            &[(offset::STATUS, 0x100), (offset::STATUS, 0x1000_0000)]
        ),
        Effect::Nothing
    );
    assert_eq!(status(&registers), 11);
}

#[test]
fn a_reset_forgets_everything_at_any_time() {
    let mut negotiating = registers();
    write(&mut negotiating, &NEGOTIATE);
    let mut running = configured();
    write(&mut running, &[(offset::STATUS, 15)]);
    let mut broken = configured();
    broken.set_needs_reset();
    for mut registers in [negotiating, running, broken] {
        assert_eq!(write(&mut registers, &[(offset::STATUS, 0)]), Effect::Reset);
        assert_eq!(registers, Registers::new(&[256, 64]));
    }
}

#[test]
fn steps_out_of_order_lead_nowhere() {
    for values in [
        vec![8],
        vec![4],
        vec![15],
        vec![1, 9],
        vec![1, 13],
        vec![2, 6],
        vec![64],
        vec![255],
    ] {
        let mut registers = registers();
        for value in values {
            assert_eq!(
                write(&mut registers, &[(offset::STATUS, value)]),
                Effect::Nothing
            );
        }
        assert_eq!(status(&registers) & 0b0100_1100, 0);
    }
}

#[test]
fn every_offset_can_be_read_and_written_with_anything() {
    let mut registers = configured();
    for at in (0..0x1000).chain([u64::MAX, u64::MAX - 3]) {
        for value in [0, 1, 0x8000_0000, u32::MAX] {
            registers.write(at, value, IDENTITY);
            registers.read(at, IDENTITY);
        }
    }
    assert!(
        registers
            .queues()
            .iter()
            .all(|queue| queue.size <= queue.max)
    );
}

#[test]
fn registers_survive_being_saved() {
    let registers = configured();
    let text = serde_json::to_string(&registers).unwrap();
    assert_eq!(serde_json::from_str::<Registers>(&text).unwrap(), registers);
}
