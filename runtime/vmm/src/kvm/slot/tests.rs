//! A driver that reaches a real device over the bus, and a guest that does what no driver does.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cloison_devices::Rng;
use nix::sys::epoll::EpollCreateFlags;
use vm_memory::{Bytes, GuestMemory};

use super::super::layout::slot_address;
use super::super::memory::reserve;
use super::*;

const STATUS: u64 = 0x070;
const QUEUE_SEL: u64 = 0x030;
const TABLE: u64 = 0x10_0000;
const AVAIL: u64 = 0x11_0000;
const USED: u64 = 0x12_0000;
const BUFFER: u64 = 0x13_0000;
const RUNNING: u32 = 15;
const NEEDS_RESET: u32 = 64;

struct Bus {
    slots: Slots,
    line: EventFd,
    epoll: Arc<Epoll>,
}

impl Bus {
    /// A bus with the entropy device in slot 0.
    fn new() -> Self {
        Self::over(reserve(16).unwrap())
    }

    /// The same, with this memory.
    fn over(memory: GuestMemoryMmap) -> Self {
        let line = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let lines: Vec<EventFd> = (0..SLOT_COUNT).map(|_| line()).collect();
        let first = lines[0].try_clone().unwrap();
        let slots = Slots::new(lines, memory);
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::empty()).unwrap());
        let bus = Self {
            slots,
            line: first,
            epoll,
        };
        bus.plug(0).unwrap();
        bus
    }

    fn plug(&self, slot: usize) -> io::Result<()> {
        let watch = HostWatch {
            epoll: Arc::clone(&self.epoll),
            key: 1,
        };
        self.slots
            .plug(slot, "rng", Box::new(Rng::new().unwrap()), watch)
    }

    fn read(&self, at: u64) -> u32 {
        let mut data = [0; 4];
        self.slots.read(SLOTS + at, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, at: u64, value: u32) {
        self.slots.write(SLOTS + at, &value.to_le_bytes());
    }

    /// What a driver does up to DRIVER_OK, with rings at these addresses.
    fn bring_up(&self, table: u64, avail: u64, used: u64) {
        for (at, value) in [
            (STATUS, 0),
            (STATUS, 3),
            (0x024, 1),
            (0x020, 1),
            (STATUS, 11),
            (QUEUE_SEL, 0),
            (0x038, 8),
            (0x080, table as u32),
            (0x084, (table >> 32) as u32),
            (0x090, avail as u32),
            (0x094, (avail >> 32) as u32),
            (0x0a0, used as u32),
            (0x0a4, (used >> 32) as u32),
            (0x044, 1),
            (STATUS, RUNNING),
        ] {
            self.write(at, value);
        }
    }

    /// Asks the device for 16 bytes with the first chain of a fresh ring.
    fn ask(&self) {
        let memory = &self.slots.memory;
        memory.write_obj(BUFFER, GuestAddress(TABLE)).unwrap();
        memory.write_obj(16_u32, GuestAddress(TABLE + 8)).unwrap();
        memory.write_obj(2_u16, GuestAddress(TABLE + 12)).unwrap();
        memory.write_obj(0_u32, GuestAddress(AVAIL)).unwrap();
        memory.write_obj(0_u16, GuestAddress(AVAIL + 4)).unwrap();
        memory.write_obj(0_u32, GuestAddress(USED)).unwrap();
        memory.write_obj(1_u16, GuestAddress(AVAIL + 2)).unwrap();
        self.slots.handle(0, Event::Queue(0));
    }

    fn used(&self) -> u16 {
        self.slots.memory.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    fn interrupted(&self) -> bool {
        self.line.read().is_ok()
    }

    fn works(&self) {
        self.bring_up(TABLE, AVAIL, USED);
        assert_eq!(self.read(STATUS), RUNNING);
        let _ = self.line.read();
        self.ask();
        assert_eq!(self.used(), 1);
        assert!(self.interrupted());
    }
}

#[test]
fn a_driver_brings_the_device_up_and_is_interrupted_when_it_has_been_served() {
    let bus = Bus::new();
    assert!(!bus.slots.taken());
    bus.works();
    assert!(bus.slots.taken());
    let bytes: u128 = bus.slots.memory.read_obj(GuestAddress(BUFFER)).unwrap();
    assert_ne!(bytes, 0);
    assert_eq!(bus.read(INTERRUPT_STATUS), USED_RING);
    bus.write(INTERRUPT_ACK, USED_RING);
    assert_eq!(bus.read(INTERRUPT_STATUS), 0);
}

#[test]
fn an_empty_slot_is_a_device_that_is_not_there_until_one_is_plugged() {
    let bus = Bus::new();
    let id = |slot| {
        let mut data = [0; 4];
        bus.slots.read(slot_address(slot) + 8, &mut data);
        u32::from_le_bytes(data)
    };
    let mut magic = [0; 4];
    bus.slots.read(slot_address(1), &mut magic);
    assert_eq!((magic, id(1)), (*b"virt", 0));
    bus.slots
        .write(slot_address(1) + STATUS, &RUNNING.to_le_bytes());
    bus.slots.handle(1, Event::Queue(0));
    bus.slots.handle(1, Event::Host);
    bus.plug(1).unwrap();
    assert_eq!((id(0), id(1)), (4, 4));
    bus.works();
}

#[test]
fn a_slot_holds_one_device_and_there_are_only_so_many() {
    let bus = Bus::new();
    assert_eq!(
        bus.plug(0).unwrap_err().kind(),
        io::ErrorKind::AlreadyExists
    );
    assert_eq!(
        bus.plug(SLOT_COUNT).unwrap_err().kind(),
        io::ErrorKind::NotFound
    );
    bus.works();
}

#[test]
fn a_device_that_is_not_alive_gets_no_events() {
    let bus = Bus::new();
    bus.ask();
    assert_eq!(bus.used(), 0);
    bus.bring_up(TABLE, AVAIL, USED);
    bus.write(STATUS, 0);
    bus.ask();
    bus.slots.handle(0, Event::Host);
    assert_eq!(bus.used(), 0);
    assert!(!bus.interrupted());
    bus.works();
}

#[test]
fn rings_that_are_not_in_memory_or_not_aligned_make_the_device_ask_for_a_reset() {
    let end = 16 << 20;
    for (table, avail, used) in [
        (end, AVAIL, USED),
        (TABLE, end, USED),
        (TABLE, AVAIL, end),
        (end - 64, AVAIL, USED),
        (u64::MAX - 15, AVAIL, USED),
        (TABLE, u64::MAX - 1, USED),
        (TABLE, AVAIL, u64::MAX - 3),
        (TABLE + 1, AVAIL, USED),
        (TABLE, AVAIL + 1, USED),
        (TABLE, AVAIL, USED + 2),
        (SLOTS, AVAIL, USED),
    ] {
        let bus = Bus::new();
        bus.bring_up(table, avail, used);
        assert_eq!(
            bus.read(STATUS) & NEEDS_RESET,
            NEEDS_RESET,
            "{table:#x} {avail:#x} {used:#x}"
        );
        assert_eq!(bus.read(INTERRUPT_STATUS), CONFIGURATION);
        assert!(bus.interrupted());
        bus.ask();
        assert_eq!(bus.used(), 0);
        bus.works();
    }
}

#[test]
fn rings_over_one_another_and_over_the_buffer_do_no_harm() {
    for (table, avail, used) in [
        (TABLE, TABLE, TABLE),
        (TABLE, AVAIL, AVAIL),
        (BUFFER, AVAIL, BUFFER),
    ] {
        let bus = Bus::new();
        bus.bring_up(table, avail, used);
        bus.ask();
        bus.slots.handle(0, Event::Queue(0));
        bus.works();
    }
}

#[test]
fn a_broken_ring_silences_the_device_until_reset() {
    let bus = Bus::new();
    bus.works();
    bus.slots
        .memory
        .write_obj(999_u16, GuestAddress(AVAIL + 2))
        .unwrap();
    bus.slots.handle(0, Event::Queue(0));
    assert_eq!(bus.read(STATUS), RUNNING | NEEDS_RESET);
    assert_eq!(bus.read(INTERRUPT_STATUS) & CONFIGURATION, CONFIGURATION);
    assert!(bus.interrupted());
    bus.ask();
    assert_eq!(bus.used(), 0);
    bus.works();
}

#[test]
fn notifications_of_queues_and_slots_that_are_not_there_are_nothing() {
    let bus = Bus::new();
    bus.bring_up(TABLE, AVAIL, USED);
    for (slot, queue) in [
        (0, 1),
        (0, 31),
        (0, 254),
        (1, 0),
        (SLOT_COUNT, 0),
        (usize::MAX, 0),
    ] {
        bus.slots.handle(slot, Event::Queue(queue));
    }
    assert!(!bus.interrupted());
    bus.works();
}

#[test]
fn a_storm_of_notifications_without_work_makes_no_interrupts() {
    let bus = Bus::new();
    bus.bring_up(TABLE, AVAIL, USED);
    for _ in 0..100_000 {
        bus.slots.handle(0, Event::Queue(0));
    }
    assert!(!bus.interrupted());
    bus.works();
}

#[test]
fn accesses_of_odd_widths_and_places_read_as_nothing_and_change_nothing() {
    let bus = Bus::new();
    bus.works();
    for width in [1, 2, 3, 5, 8] {
        for at in (0..CONFIG).step_by(2) {
            let mut data = vec![0xaa; width];
            bus.slots.read(SLOTS + at, &mut data);
            assert_eq!(data, vec![0; width]);
            bus.slots.write(SLOTS + at, &data);
        }
    }
    for address in [
        0,
        SLOTS - 4,
        SLOTS + SLOT_COUNT as u64 * PAGE,
        u64::MAX - 3,
        u64::MAX,
    ] {
        let mut data = [0; 8];
        bus.slots.read(address, &mut data);
        assert_eq!(data, [0xff; 8]);
        bus.slots.write(address, &data);
    }
    bus.slots.read(SLOTS + PAGE - 1, &mut [0; 8]);
    bus.slots.write(SLOTS + PAGE - 1, &[1; 8]);
    assert_eq!(bus.read(STATUS), RUNNING);
    bus.works();
}

#[test]
fn resets_and_starts_while_the_device_works_end_in_a_device_that_works() {
    let bus = Bus::new();
    let until = Instant::now() + Duration::from_millis(300);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while Instant::now() < until {
                bus.bring_up(TABLE, AVAIL, USED);
                bus.write(STATUS, 0);
            }
        });
        scope.spawn(|| {
            let mut index = 0_u16;
            while Instant::now() < until {
                index = index.wrapping_add(1);
                bus.slots
                    .memory
                    .write_obj(index % 12, GuestAddress(AVAIL + 2))
                    .unwrap();
                bus.slots.handle(0, Event::Queue(0));
                bus.slots.handle(0, Event::Host);
            }
        });
        scope.spawn(|| {
            let mut word = 1_u64;
            while Instant::now() < until {
                word = word.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17);
                let at = TABLE + (word % 16) * 8;
                bus.slots.memory.write_obj(word, GuestAddress(at)).unwrap();
            }
        });
        while Instant::now() < until {
            bus.read(STATUS);
            bus.read(INTERRUPT_STATUS);
            bus.write(INTERRUPT_ACK, u32::MAX);
        }
    });
    assert!(bus.slots.memory.check_range(GuestAddress(TABLE), 16));
    bus.works();
}

#[test]
fn an_unplugged_device_is_gone_and_another_can_take_its_place() {
    let bus = Bus::new();
    bus.works();
    bus.slots.unplug(0);
    assert_eq!((bus.read(8), bus.read(STATUS)), (0, 0));
    assert_eq!(bus.read(INTERRUPT_STATUS), 0);
    bus.slots.handle(0, Event::Queue(0));
    bus.slots.unplug(0);
    bus.slots.unplug(SLOT_COUNT);
    bus.plug(0).unwrap();
    bus.works();
}

#[test]
fn a_fresh_slot_goes_on_where_the_one_whose_state_it_got_was() {
    let bus = Bus::new();
    bus.works();
    // One more request that the device has not looked at.
    let memory = &bus.slots.memory;
    memory.write_obj(0_u16, GuestAddress(AVAIL + 6)).unwrap();
    memory.write_obj(2_u16, GuestAddress(AVAIL + 2)).unwrap();
    let saved = serde_json::to_vec(&bus.slots.save(0).unwrap()).unwrap();
    assert!(bus.slots.save(1).is_none());

    let other = Bus::over(memory.clone());
    let state = serde_json::from_slice(&saved).unwrap();
    other.slots.restore(0, &state).unwrap();
    assert_eq!(other.slots.save(0).unwrap(), state);
    assert_eq!(other.read(STATUS), RUNNING);
    assert_eq!(other.read(INTERRUPT_STATUS), USED_RING);
    assert!(other.interrupted());
    other.slots.handle(0, Event::Queue(0));
    assert_eq!(other.used(), 2);
    assert!(other.interrupted());
}

#[test]
fn a_state_of_another_device_or_version_is_refused() {
    let bus = Bus::new();
    let saved = serde_json::to_value(bus.slots.save(0).unwrap()).unwrap();
    for (field, value) in [("version", 2), ("device_type", 26)] {
        let mut wrong = saved.clone();
        wrong[field] = value.into();
        let state = serde_json::from_value(wrong).unwrap();
        bus.slots.restore(0, &state).unwrap_err();
    }
    let mut features = saved.clone();
    features["registers"]["driver_features"] = (1_u64 << 63).into();
    let state = serde_json::from_value(features).unwrap();
    bus.slots.restore(0, &state).unwrap_err();
    let state = serde_json::from_value(saved).unwrap();
    bus.slots.restore(1, &state).unwrap_err();
    bus.slots.restore(SLOT_COUNT, &state).unwrap_err();
    bus.slots.restore(0, &state).unwrap();
    bus.works();
}
