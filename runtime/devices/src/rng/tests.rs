//! What the entropy device gives, and what no guest can do to it.

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::*;
use crate::testing::{Descriptor, Guest, INDIRECT, NEXT, WRITE, readable, writable};
use crate::{Broken, QueueMask};

struct Bench {
    rng: Rng,
    guest: Guest,
}

impl Bench {
    fn new() -> Self {
        let rng = Rng::new().unwrap();
        let guest = Guest::new(&rng, true);
        Self { rng, guest }
    }

    fn kick(&mut self) -> Result<QueueMask, Broken> {
        self.guest.kick(&mut self.rng, Rng::QUEUE)
    }

    fn works_after_reset(mut self) {
        self.rng.reset();
        self.guest = Guest::new(&self.rng, true);
        let address = self.guest.alloc(32);
        self.guest.place(Rng::QUEUE, &[writable(address, 32)]);
        assert!(self.kick().unwrap().contains(Rng::QUEUE));
        assert_eq!(self.guest.used(Rng::QUEUE).unwrap().len, 32);
    }
}

#[test]
fn every_request_gets_other_bytes() {
    let mut bench = Bench::new();
    let (one, two) = (bench.guest.alloc(64), bench.guest.alloc(64));
    bench.guest.place(Rng::QUEUE, &[writable(one, 64)]);
    bench
        .guest
        .place(Rng::QUEUE, &[writable(two, 32), writable(two + 32, 32)]);
    assert!(bench.kick().unwrap().contains(Rng::QUEUE));
    assert_eq!(bench.guest.used(Rng::QUEUE).unwrap().len, 64);
    assert_eq!(bench.guest.used(Rng::QUEUE).unwrap().len, 64);
    assert_ne!(bench.guest.read(one, 64), [0; 64]);
    assert_ne!(bench.guest.read(one, 64), bench.guest.read(two, 64));
    bench.works_after_reset();
}

#[test]
fn a_buffer_over_the_border_of_two_mappings_is_filled_on_both_sides() {
    let mut bench = Bench::new();
    let address = Guest::BORDER - 32;
    bench.guest.place(Rng::QUEUE, &[writable(address, 64)]);
    bench.kick().unwrap();
    assert_ne!(bench.guest.read(address, 32), [0; 32]);
    assert_ne!(bench.guest.read(address + 32, 32), [0; 32]);
}

#[test]
fn a_request_for_more_gets_a_little_and_says_so() {
    for len in [257, 4096, 1 << 20, u32::MAX] {
        let mut bench = Bench::new();
        bench.guest.place(Rng::QUEUE, &[writable(0x10_0000, len)]);
        bench.kick().unwrap();
        assert_eq!(
            bench.guest.used(Rng::QUEUE).unwrap().len as usize,
            MOST_OF_A_CHAIN
        );
        assert_eq!(bench.guest.read(0x10_0000 + 256, 16), [0; 16]);
        bench.works_after_reset();
    }
}

#[test]
fn what_cannot_be_written_is_not_claimed_to_be() {
    for (buffers, written) in [
        (vec![readable(0x10_0000, 64)], 0),
        (vec![writable(Guest::HOLE, 64)], 0),
        (vec![writable(Guest::END, 64)], 0),
        (vec![writable(Guest::END - 4, 64)], 0),
        (vec![writable(u64::MAX, 64)], 0),
        (vec![writable(u64::MAX - 7, u32::MAX)], 0),
        (vec![writable(0x10_0000, 0)], 0),
        (
            vec![
                writable(0x10_0000, 16),
                writable(Guest::HOLE, 16),
                writable(0x10_1000, 16),
            ],
            16,
        ),
        (vec![readable(0x10_0000, 16), writable(0x10_1000, 16)], 16),
    ] {
        let mut bench = Bench::new();
        bench.guest.place(Rng::QUEUE, &buffers);
        assert!(bench.kick().unwrap().contains(Rng::QUEUE));
        assert_eq!(
            bench.guest.used(Rng::QUEUE).unwrap().len,
            written,
            "{buffers:x?}"
        );
        bench.works_after_reset();
    }
}

#[test]
fn chains_that_loop_or_leave_their_table_end() {
    let entry = |flags, next| Descriptor {
        addr: 0x10_0000,
        len: 4,
        flags: WRITE | flags,
        next,
    };
    for table in [
        vec![entry(NEXT, 0)],
        vec![entry(NEXT, 1), entry(NEXT, 0)],
        vec![entry(NEXT, 999)],
        vec![entry(INDIRECT, 0)],
        vec![entry(INDIRECT | NEXT, 0)],
        vec![entry(u16::MAX, 0)],
    ] {
        let mut bench = Bench::new();
        bench.guest.place_raw(Rng::QUEUE, &table);
        bench.kick().unwrap();
        let used = bench.guest.used(Rng::QUEUE).unwrap();
        assert!(used.len as usize <= MOST_OF_A_CHAIN);
        bench.works_after_reset();
    }
}

#[test]
fn an_available_index_that_jumps_breaks_the_device_until_reset() {
    for jump in [QUEUE_SIZE + 1, 1000, u16::MAX] {
        let mut bench = Bench::new();
        bench.guest.set_avail_idx(Rng::QUEUE, jump);
        assert_eq!(bench.kick().unwrap_err().device, Rng::NAME);
        bench.works_after_reset();
    }
}

#[test]
fn notifications_without_work_and_of_queues_that_are_not_there_do_nothing() {
    let mut bench = Bench::new();
    for index in [0, 1, 31, usize::MAX] {
        assert!(bench.guest.kick(&mut bench.rng, index).unwrap().is_empty());
    }
    bench.works_after_reset();
}

#[test]
fn a_queue_that_is_not_ready_is_left_alone() {
    let mut bench = Bench::new();
    bench.guest.place(Rng::QUEUE, &[writable(0x10_0000, 4)]);
    virtio_queue::QueueT::set_ready(bench.guest.queue(Rng::QUEUE), false);
    assert!(bench.kick().unwrap().is_empty());
    assert_eq!(bench.guest.read(0x10_0000, 4), [0; 4]);
}

#[test]
fn a_state_makes_the_same_device_and_one_of_another_version_is_refused() {
    let mut rng = Rng::new().unwrap();
    rng.set_acked_features(1 << VIRTIO_F_VERSION_1);
    let text = serde_json::to_string(&rng.state()).unwrap();
    let mut other = Rng::new().unwrap();
    other
        .restore(&serde_json::from_str(&text).unwrap())
        .unwrap();
    assert_eq!(other.state(), rng.state());
    let newer = RngState {
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
