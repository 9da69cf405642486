//! What the console passes on, and what no guest can do to it.

use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::*;
use crate::testing::{Buffer, Descriptor, Guest, INDIRECT, NEXT, WRITE, readable, writable};
use crate::{Broken, QueueMask};

struct Bench {
    console: Console,
    guest: Guest,
    output: Arc<Mutex<Vec<u8>>>,
}

impl Bench {
    fn new() -> Self {
        let output = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&output);
        let console = Console::new(Box::new(move |bytes| {
            assert!(bytes.len() <= PIECE);
            sink.lock().unwrap().extend_from_slice(bytes);
        }))
        .unwrap();
        let guest = Guest::new(&console, true);
        Self {
            console,
            guest,
            output,
        }
    }

    fn kick(&mut self) -> Result<QueueMask, Broken> {
        self.guest.kick(&mut self.console, Console::QUEUE)
    }

    fn output(&self) -> Vec<u8> {
        std::mem::take(&mut self.output.lock().unwrap())
    }

    fn text(&mut self, text: &[u8]) -> Buffer {
        readable(
            self.guest.alloc_bytes(text),
            u32::try_from(text.len()).unwrap(),
        )
    }

    /// The device works, whatever has been done to it, once the guest has reset it.
    fn works_after_reset(mut self) {
        self.console.reset();
        self.guest = Guest::new(&self.console, true);
        let _ = self.output();
        let buffer = self.text(b"alive\n");
        self.guest.place(Console::QUEUE, &[buffer]);
        assert!(self.kick().unwrap().contains(Console::QUEUE));
        assert_eq!(self.output(), b"alive\n");
    }
}

#[test]
fn what_the_guest_writes_comes_out_in_order() {
    let mut bench = Bench::new();
    let (one, two, three) = (
        bench.text(b"one "),
        bench.text(b"two "),
        bench.text(b"three"),
    );
    bench.guest.place(Console::QUEUE, &[one, two]);
    let head = bench.guest.place_indirect(Console::QUEUE, &[three]);
    assert!(bench.kick().unwrap().contains(Console::QUEUE));
    assert_eq!(bench.output(), b"one two three");
    assert_eq!(bench.guest.used(Console::QUEUE).unwrap().len, 0);
    assert_eq!(bench.guest.used(Console::QUEUE).unwrap().head, head);
    bench.works_after_reset();
}

#[test]
fn a_buffer_over_the_border_of_two_mappings_is_whole() {
    let mut bench = Bench::new();
    let address = Guest::BORDER - 3;
    bench.guest.write(address, b"across");
    bench.guest.place(Console::QUEUE, &[readable(address, 6)]);
    bench.kick().unwrap();
    assert_eq!(bench.output(), b"across");
}

#[test]
fn a_line_is_sent_once_and_only_where_the_guest_has_made_room() {
    let mut bench = Bench::new();
    bench.console.say(b"go on\n");
    let (first, second) = (bench.guest.alloc(2), bench.guest.alloc(64));
    let wrong = bench.text(b"not writable");
    for (buffer, sent) in [
        (wrong, 0),
        (writable(Guest::HOLE, 16), 0),
        (writable(first, 2), 2),
        (writable(second, 64), 4),
    ] {
        bench.guest.place(TO_GUEST, &[buffer]);
        let used = bench.guest.kick(&mut bench.console, TO_GUEST).unwrap();
        assert!(used.contains(TO_GUEST));
        assert_eq!(bench.guest.used(TO_GUEST).unwrap().len, sent);
    }
    assert_eq!(bench.guest.read(first, 2), b"go");
    assert_eq!(bench.guest.read(second, 4), b" on\n");
    bench.guest.place(TO_GUEST, &[writable(second, 64)]);
    let used = bench.guest.kick(&mut bench.console, TO_GUEST).unwrap();
    assert!(used.is_empty() && bench.guest.used(TO_GUEST).is_none());
    bench.works_after_reset();
}

#[test]
fn a_queue_that_cannot_be_breaks_the_device_that_has_a_line_to_send() {
    let mut bench = Bench::new();
    bench.console.say(b"line\n");
    bench.guest.set_avail_idx(TO_GUEST, 0x8000);
    assert!(bench.guest.kick(&mut bench.console, TO_GUEST).is_err());
    bench.works_after_reset();
}

#[test]
fn nothing_is_sent_to_the_guest_that_nobody_said() {
    let mut bench = Bench::new();
    let address = bench.guest.alloc(4096);
    bench.guest.place(0, &[writable(address, 4096)]);
    assert!(bench.guest.kick(&mut bench.console, 0).unwrap().is_empty());
    assert!(bench.guest.used(0).is_none());
}

#[test]
fn buffers_in_the_wrong_direction_give_nothing_and_come_back() {
    let mut bench = Bench::new();
    let address = bench.guest.alloc(64);
    bench.guest.place(Console::QUEUE, &[writable(address, 64)]);
    bench.kick().unwrap();
    assert_eq!(bench.output(), b"");
    assert_eq!(bench.guest.used(Console::QUEUE).unwrap().len, 0);
    bench.works_after_reset();
}

#[test]
fn buffers_that_are_not_in_memory_come_back() {
    for buffer in [
        readable(Guest::HOLE, 16),
        readable(Guest::END, 1),
        readable(Guest::END - 4, 4096),
        readable(u64::MAX, 1),
        readable(u64::MAX - 7, 16),
        readable(u64::MAX - 7, u32::MAX),
        readable(0, 0),
    ] {
        let mut bench = Bench::new();
        bench.guest.place(Console::QUEUE, &[buffer]);
        assert!(
            bench.kick().unwrap().contains(Console::QUEUE),
            "{buffer:x?}"
        );
        assert!(bench.output().len() <= PIECE, "{buffer:x?}");
        assert!(bench.guest.used(Console::QUEUE).is_some());
        bench.works_after_reset();
    }
}

#[test]
fn of_four_gibibytes_only_the_beginning_is_taken() {
    let mut bench = Bench::new();
    bench
        .guest
        .place(Console::QUEUE, &[readable(0x1000, u32::MAX)]);
    bench.kick().unwrap();
    assert_eq!(bench.output().len(), MOST_OF_A_CHAIN);
    bench.works_after_reset();
}

#[test]
fn a_chain_of_many_buffers_has_the_same_bound_as_one() {
    let mut bench = Bench::new();
    let buffers = [readable(0x1000, 60 << 10); 8];
    bench.guest.place(Console::QUEUE, &buffers);
    bench.kick().unwrap();
    assert_eq!(bench.output().len(), MOST_OF_A_CHAIN);
}

#[test]
fn chains_that_loop_or_leave_their_table_end() {
    let text = |next| Descriptor {
        addr: 0x1000,
        len: 4,
        flags: NEXT,
        next,
    };
    for table in [
        vec![text(0)],
        vec![text(1), text(0)],
        vec![text(999)],
        vec![text(u16::MAX)],
    ] {
        let mut bench = Bench::new();
        bench.guest.place_raw(Console::QUEUE, &table);
        bench.kick().unwrap();
        assert!(bench.output().len() <= 4 * usize::from(QUEUE_SIZE));
        bench.works_after_reset();
    }
}

#[test]
fn indirect_tables_of_odd_sizes_places_and_depths_end() {
    let entry = |addr, len, flags| Descriptor {
        addr,
        len,
        flags,
        next: 0,
    };
    for descriptor in [
        entry(0x1000, 0, INDIRECT),
        entry(0x1000, 15, INDIRECT),
        entry(0x1000, u32::MAX, INDIRECT),
        entry(0x1000, 0xffff_fff0, INDIRECT),
        entry(0x1000, 1 << 20, INDIRECT),
        entry(Guest::HOLE, 64, INDIRECT),
        entry(u64::MAX - 15, 32, INDIRECT),
        entry(0x1000, 64, INDIRECT | NEXT),
        entry(0x1000, 64, INDIRECT | WRITE),
        entry(0x1000, 64, u16::MAX),
    ] {
        let mut bench = Bench::new();
        bench.guest.place_raw(Console::QUEUE, &[descriptor]);
        bench.kick().unwrap();
        assert!(bench.output().len() <= MOST_OF_A_CHAIN);
        bench.works_after_reset();
    }
    let mut bench = Bench::new();
    let inner = entry(0x1000, 32, INDIRECT);
    bench.guest.place_table(Console::QUEUE, &[inner, inner]);
    bench.kick().unwrap();
    assert_eq!(bench.output(), b"");
    bench.works_after_reset();
}

#[test]
fn an_available_index_that_jumps_breaks_the_device_until_reset() {
    for jump in [QUEUE_SIZE + 1, 1000, u16::MAX] {
        let mut bench = Bench::new();
        bench.guest.set_avail_idx(Console::QUEUE, jump);
        let error = bench.kick().unwrap_err();
        assert_eq!(error.device, Console::NAME);
        bench.works_after_reset();
    }
}

#[test]
fn an_available_ring_that_names_no_descriptor_breaks_the_device_or_gives_nothing() {
    for head in [QUEUE_SIZE, 1000, u16::MAX] {
        let mut bench = Bench::new();
        bench.guest.offer(Console::QUEUE, head);
        match bench.kick() {
            Ok(_) => assert_eq!(bench.output(), b""),
            Err(error) => assert_eq!(error.device, Console::NAME),
        }
        bench.works_after_reset();
    }
}

#[test]
fn notifications_without_work_cost_nothing_and_do_nothing() {
    let mut bench = Bench::new();
    for index in [0, 1, 1, 0, 2, 31, 1000] {
        assert!(
            bench
                .guest
                .kick(&mut bench.console, index)
                .unwrap()
                .is_empty()
        );
    }
    assert_eq!(bench.output(), b"");
    bench.works_after_reset();
}

#[test]
fn a_queue_that_is_not_ready_is_left_alone() {
    let mut bench = Bench::new();
    let buffer = bench.text(b"x");
    bench.guest.place(Console::QUEUE, &[buffer]);
    virtio_queue::QueueT::set_ready(bench.guest.queue(Console::QUEUE), false);
    assert!(bench.kick().unwrap().is_empty());
    assert_eq!(bench.output(), b"");
}

#[test]
fn a_guest_that_refills_its_ring_for_ever_is_served_in_turns() {
    let mut bench = Bench::new();
    // The same chain offered over and over, as a second thread of the guest could: one call takes a batch and asks for another.
    let buffer = bench.text(b"x");
    let head = bench.guest.place(Console::QUEUE, &[buffer]);
    let mut taken = 0;
    bench.kick().unwrap();
    taken += bench.output().len();
    for _ in 0..10 {
        for _ in 0..QUEUE_SIZE {
            bench.guest.offer(Console::QUEUE, head);
        }
        bench.kick().unwrap();
        let output = bench.output().len();
        assert!(output <= Console::BATCH);
        taken += output;
    }
    assert_eq!(taken, 10 * usize::from(QUEUE_SIZE) + 1);
    bench.works_after_reset();
}

#[test]
fn reading_the_configuration_anywhere_gives_zeros() {
    let bench = Bench::new();
    for offset in [0, 1, 8, 4096, u64::MAX] {
        let mut data = [0xff; 8];
        bench.console.read_config(offset, &mut data);
        assert_eq!(data, [0; 8]);
    }
}

#[test]
fn a_state_makes_the_same_device_and_one_of_another_version_is_refused() {
    let mut console = Bench::new().console;
    console.set_acked_features(1 << VIRTIO_F_VERSION_1);
    let text = serde_json::to_string(&console.state()).unwrap();
    let mut other = Bench::new().console;
    other
        .restore(&serde_json::from_str(&text).unwrap())
        .unwrap();
    assert_eq!(other.state(), console.state());
    let newer = ConsoleState {
        version: 2,
        acked_features: 0,
    };
    assert!(
        other
            .restore(&newer)
            .unwrap_err()
            .to_string()
            .contains("version 2")
    );
}
