//! From the tap to the guest.

use super::*;

#[test]
fn a_frame_arrives_behind_a_header() {
    let mut bench = Bench::new();
    let at = bench.offer(4, 2048)[0];
    assert!(bench.host.send(&frame(60)));
    assert_eq!(bench.received(), [72]);
    assert_eq!(
        bench.guest.read(at, 12),
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    );
    assert_eq!(bench.guest.read(at + 12, 60), frame(60));
    assert_eq!(bench.counters().received, 1);
}

#[test]
fn frames_that_came_before_their_buffers_arrive_in_order() {
    let mut bench = Bench::new();
    for length in [60, 61, 62] {
        assert!(bench.host.send(&frame(length)));
    }
    assert!(bench.received().is_empty());
    bench.offer(2, 2048);
    assert_eq!(bench.received(), [72, 73]);
    bench.offer(2, 2048);
    assert_eq!(bench.received(), [74]);
}

#[test]
fn a_frame_is_spread_over_several_buffers_and_seen_as_a_whole() {
    let mut bench = Bench::new();
    let at = bench.offer(5, 400);
    assert!(bench.host.send(&frame(1000)));
    assert_eq!(bench.received(), [400, 400, 212]);
    assert_eq!(bench.guest.read(at[0] + 10, 2), [3, 0]);
    let mut bytes = bench.guest.read(at[0] + 12, 388);
    bytes.extend(bench.guest.read(at[1], 400));
    bytes.extend(bench.guest.read(at[2], 212));
    assert_eq!(bytes, frame(1000));
    assert!(bench.host.send(&frame(100)));
    assert_eq!(
        bench.received(),
        [112],
        "the buffers left over are used next"
    );
    assert_eq!(bench.guest.read(at[3] + 12, 100), frame(100));
}

#[test]
fn many_large_buffers_take_frames_without_a_copy_and_in_order() {
    let mut bench = Bench::new();
    bench.offer(64, 4096);
    for length in 60..100 {
        assert!(bench.host.send(&frame(length)));
    }
    let expected: Vec<u32> = (72..112).collect();
    assert_eq!(bench.received(), expected);
}

#[test]
fn the_guest_is_told_of_every_buffer_that_came_back() {
    let mut bench = Bench::new();
    bench.offer(8, 400);
    assert!(bench.host.send(&frame(1000)));
    let used = bench
        .guest
        .with_context(|ctx| bench.net.host_event(ctx))
        .unwrap();
    assert!(used.contains(RX));
    // The driver's `used_event` is 0: it wants to know of the first buffer, of which three are the last step.
    let needs = bench.guest.with_context(|ctx| {
        virtio_queue::QueueT::needs_notification(ctx.queues[RX], ctx.memory).unwrap()
    });
    assert!(needs);
}

#[test]
fn a_full_ring_waits_and_costs_nothing_meanwhile() {
    let mut bench = Bench::new();
    bench.offer(1, 2048);
    for _ in 0..10 {
        assert!(bench.host.send(&frame(60)));
    }
    assert_eq!(bench.received(), [72]);
    assert!(!crate::testing::host_ready(&bench.net, 0), "no spinning");
    bench.offer(20, 2048);
    assert_eq!(bench.received(), [72; 9]);
}

#[test]
fn a_frame_waits_for_buffers_that_are_on_their_way_and_no_longer() {
    let mut bench = Bench::new();
    bench.offer(4, 400);
    assert!(bench.host.send(&frame(60)));
    assert!(bench.host.send(&frame(1400)));
    assert!(bench.host.send(&frame(61)));
    assert_eq!(
        bench.received(),
        [72],
        "three buffers are too few for the second"
    );
    assert!(bench.guest.free_descriptors(RX) > 0);
    bench.offer(2, 400);
    assert_eq!(bench.received(), [400, 400, 400, 212, 73]);
    assert_eq!(bench.counters().unfit, 0);

    // All the guest has, and still too little: no other frame shall wait for this one.
    assert!(bench.host.send(&frame(1400)));
    assert!(bench.host.send(&frame(62)));
    bench.offer(2, 400);
    assert_eq!(bench.received(), [74]);
    assert_eq!(bench.counters().unfit, 1);
}

#[test]
fn the_guest_is_asked_to_notify_when_buffers_are_too_few() {
    let mut bench = Bench::new();
    bench.offer(3, 400);
    assert!(bench.host.send(&frame(60)));
    assert!(bench.host.send(&frame(1400)));
    bench.settle();
    let address = bench.guest.alloc(4096);
    bench.guest.place(RX, &[writable(address, 4096)]);
    assert!(bench.guest.must_kick(RX));
}

#[test]
fn without_merged_buffers_a_frame_must_fit_into_one() {
    let mut bench = Bench::new();
    bench.net.set_acked_features(1 << VIRTIO_F_VERSION_1);
    let at = bench.offer(4, 512);
    assert!(bench.host.send(&frame(60)));
    assert!(bench.host.send(&frame(501)));
    assert!(bench.host.send(&frame(500)));
    assert_eq!(bench.received(), [72, 512]);
    assert_eq!(bench.guest.read(at[1] + 10, 2), [1, 0]);
    assert_eq!(bench.counters().unfit, 1);
}

#[test]
fn buffers_of_no_use_come_back_empty_and_others_are_used() {
    let mut bench = Bench::new();
    for buffer in [
        readable(0x10_0000, 2048),
        writable(Guest::HOLE, 2048),
        writable(0x10_0000, 11),
        writable(0x10_0000, 0),
        writable(u64::MAX, 2048),
    ] {
        bench.guest.place(RX, &[buffer]);
    }
    bench.offer(2, 2048);
    assert!(bench.host.send(&frame(60)));
    assert_eq!(bench.received(), [0, 0, 0, 0, 0, 72]);
}

#[test]
fn a_useless_buffer_behind_good_ones_keeps_their_order() {
    let mut bench = Bench::new();
    bench.offer(1, 400);
    bench.guest.place(RX, &[writable(Guest::HOLE, 400)]);
    bench.offer(1, 400);
    assert!(bench.host.send(&frame(60)));
    assert!(bench.host.send(&frame(61)));
    assert_eq!(bench.received(), [72, 0, 73]);
}

#[test]
fn a_buffer_of_very_many_pieces_is_of_no_use() {
    let mut bench = Bench::new();
    let at = bench.guest.alloc(4096);
    let pieces: Vec<_> = (0..100).map(|i| writable(at + i * 32, 32)).collect();
    bench.guest.place_indirect(RX, &pieces);
    bench.offer(1, 2048);
    assert!(bench.host.send(&frame(60)));
    assert_eq!(bench.received(), [0, 72]);
}

#[test]
fn tiny_buffers_do_not_let_a_frame_through_nor_stop_others() {
    let mut bench = Bench::new();
    bench.offer(100, 12);
    assert!(bench.host.send(&frame(1000)));
    assert!(bench.host.send(&frame(60)));
    assert_eq!(bench.received(), [12; 6]);
    assert_eq!(bench.counters().unfit, 1);
}

#[test]
fn while_the_link_is_down_nothing_arrives() {
    let mut bench = Bench::new();
    bench.offer(4, 2048);
    bench.net.handle().set_link(false);
    assert!(bench.host.send(&frame(60)));
    assert!(bench.received().is_empty());
    bench.net.handle().set_link(true);
    assert_eq!(bench.received(), [72]);
}

#[test]
fn a_flood_is_taken_in_turns() {
    let mut bench = Bench::new();
    bench.offer(200, 2048);
    for _ in 0..200 {
        assert!(bench.host.send(&frame(60)));
    }
    assert!(bench.guest.host(&mut bench.net, 0).unwrap());
    let count = std::iter::from_fn(|| bench.guest.used(RX)).count();
    assert!(count <= BATCH, "{count}");
    assert_eq!(bench.received().len(), 200 - count);
}
