//! The attacks of a guest with one processor. Each goes at every queue of the device.

use cloison_devices::testing::{Buffer, Guest, INDIRECT, NEXT, WRITE, readable, writable};
use virtio_queue::QueueT;

use crate::harness::{Bench, FREE, TABLE, descriptor};

/// Both directions.
const DIRECTIONS: [u16; 2] = [0, WRITE];

pub fn a_descriptor_that_names_itself(bench: &mut Bench) {
    for flags in DIRECTIONS {
        for len in [0, 1, 64, 4096] {
            bench.throw_all(&[&[descriptor(FREE, len, NEXT | flags, 0)]]);
        }
    }
}

pub fn descriptors_in_a_ring(bench: &mut Bench) {
    for [one, two] in [[0, 0], [0, WRITE], [WRITE, 0], [WRITE, WRITE]] {
        bench.throw_all(&[&[
            descriptor(FREE, 64, NEXT | one, 1),
            descriptor(FREE + 4096, 64, NEXT | two, 0),
        ]]);
    }
}

pub fn a_next_beyond_the_table(bench: &mut Bench) {
    for queue in bench.queues() {
        for next in [bench.queue_size(queue), 4096, 0x7fff, u16::MAX] {
            for flags in DIRECTIONS {
                bench.throw(queue, &[descriptor(FREE, 64, NEXT | flags, next)]);
            }
        }
    }
}

pub fn a_chain_as_long_as_the_table(bench: &mut Bench) {
    for queue in bench.queues() {
        let size = bench.queue_size(queue);
        for split in [0, 1, size / 2, size - 1, size] {
            let chain: Vec<_> = (0..size)
                .map(|id| {
                    let write = if id < split { 0 } else { WRITE };
                    let next = if id + 1 < size { NEXT } else { 0 };
                    descriptor(FREE + u64::from(id) * 16, 16, write | next, id + 1)
                })
                .collect();
            bench.throw(queue, &chain);
        }
    }
}

pub fn buffers_of_no_length(bench: &mut Bench) {
    for addr in [0, FREE, Guest::HOLE, Guest::END, u64::MAX] {
        both_ways(bench, addr, 0);
    }
}

pub fn buffers_of_four_gibibytes(bench: &mut Bench) {
    for addr in [0, FREE, Guest::HOLE, Guest::END - 1] {
        for len in [u32::MAX, 1 << 31, 1 << 24] {
            both_ways(bench, addr, len);
        }
    }
}

pub fn very_many_buffers_of_much_memory(bench: &mut Bench) {
    // All of guest memory, again and again: more bytes than any request may have, in a chain that is otherwise in order.
    for flags in DIRECTIONS {
        let table: Vec<_> = (1..=1024)
            .map(|next| {
                let more = if next < 1024 { NEXT } else { 0 };
                descriptor(0, 2 * Guest::BORDER as u32, flags | more, next)
            })
            .collect();
        bench.throw_table(&table);
    }
}

pub fn an_address_and_length_beyond_all_addresses(bench: &mut Bench) {
    for addr in [u64::MAX, u64::MAX - 7, u64::MAX - 4095, 1 << 63] {
        for len in [1, 8, 9, 4096, u32::MAX] {
            both_ways(bench, addr, len);
        }
    }
}

pub fn buffers_in_a_hole(bench: &mut Bench) {
    for len in [1, 64, 4096, 1 << 20] {
        both_ways(bench, Guest::HOLE, len);
        both_ways(bench, 2 * Guest::BORDER - 4, len.max(5));
    }
}

pub fn buffers_that_end_beyond_memory(bench: &mut Bench) {
    for len in [1, 64, 4096, 1 << 20] {
        both_ways(bench, Guest::END, len);
        both_ways(bench, Guest::END - 1, len + 1);
    }
}

pub fn buffers_over_a_border_of_mappings(bench: &mut Bench) {
    for len in [2, 64, 4096, 1 << 20] {
        both_ways(bench, Guest::BORDER - 1, len);
    }
}

pub fn buffers_over_the_descriptor_table(bench: &mut Bench) {
    buffers_over_part(bench, 0);
}

pub fn buffers_over_the_available_ring(bench: &mut Bench) {
    buffers_over_part(bench, 1);
}

pub fn buffers_over_the_used_ring(bench: &mut Bench) {
    buffers_over_part(bench, 2);
}

fn buffers_over_part(bench: &mut Bench, part: usize) {
    for queue in bench.queues() {
        for len in [1, 16, 64, 4096] {
            let addr = bench.guest.ring_addresses(queue)[part];
            request_at(bench, queue, addr);
            for flags in DIRECTIONS {
                bench.throw(queue, &[descriptor(addr, len, flags, 0)]);
                bench.throw(
                    queue,
                    &[
                        descriptor(FREE, len, NEXT, 1),
                        descriptor(addr, len, flags, 0),
                    ],
                );
            }
        }
    }
}

/// Has the device answer a proper request at `addr`.
fn request_at(bench: &mut Bench, queue: usize, addr: u64) {
    let request = bench.subject.request.clone();
    let room = bench.subject.room;
    bench.guest.write(FREE, &request);
    bench.throw(
        queue,
        &[
            descriptor(FREE, request.len() as u32, NEXT, 1),
            descriptor(addr, room, WRITE, 0),
        ],
    );
}

pub fn nothing_to_write(bench: &mut Bench) {
    one_way(bench, 0);
}

pub fn nothing_to_read(bench: &mut Bench) {
    one_way(bench, WRITE);
}

fn one_way(bench: &mut Bench, flags: u16) {
    let request = bench.subject.request.clone();
    for len in [1, request.len() as u32, 64, 4096, 1 << 16] {
        bench.guest.write(FREE, &request);
        bench.throw_all(&[
            &[descriptor(FREE, len, flags, 0)],
            &[
                descriptor(FREE, len, NEXT | flags, 1),
                descriptor(FREE + (1 << 16), len, flags, 0),
            ],
        ]);
    }
}

pub fn answers_before_questions(bench: &mut Bench) {
    let request = bench.subject.request.clone();
    for len in [0, 1, 64, 4096] {
        bench.guest.write(FREE, &request);
        bench.throw_all(&[&[
            descriptor(FREE + (1 << 16), len, NEXT | WRITE, 1),
            descriptor(FREE, request.len() as u32, 0, 0),
        ]]);
    }
}

pub fn directions_that_alternate(bench: &mut Bench) {
    let chain = |first: u16| -> Vec<_> {
        (0..8)
            .map(|id| {
                let write = if id % 2 == first { WRITE } else { 0 };
                let next = if id < 7 { NEXT } else { 0 };
                descriptor(FREE + u64::from(id) * 64, 64, write | next, id + 1)
            })
            .collect()
    };
    bench.throw_all(&[&chain(0), &chain(1)]);
    bench.throw_table(&chain(0));
    bench.throw_table(&chain(1));
}

pub fn every_flag_at_once(bench: &mut Bench) {
    for flags in (0..16).map(|bit| 1 << bit).chain([u16::MAX, 0xfff8]) {
        bench.throw_all(&[
            &[descriptor(FREE, 64, flags, 0)],
            &[
                descriptor(FREE, 64, flags, 1),
                descriptor(FREE, 64, flags, 2),
                descriptor(FREE, 64, 0, 0),
            ],
        ]);
    }
}

pub fn indirect_tables_of_odd_sizes(bench: &mut Bench) {
    for len in [0, 1, 15, 17, 31, 0xffff, 0xffff_fff0, u32::MAX] {
        bench.throw_all(&[&[descriptor(TABLE, len, INDIRECT, 0)]]);
    }
}

pub fn indirect_tables_that_are_not_there(bench: &mut Bench) {
    for addr in [
        Guest::HOLE,
        2 * Guest::BORDER - 8,
        Guest::END,
        Guest::END - 8,
        u64::MAX,
        u64::MAX - 15,
        1,
    ] {
        for len in [16, 32, 4096] {
            bench.throw_all(&[&[descriptor(addr, len, INDIRECT, 0)]]);
        }
    }
}

pub fn indirect_tables_in_indirect_tables(bench: &mut Bench) {
    for flags in [INDIRECT, INDIRECT | NEXT, INDIRECT | WRITE] {
        bench.throw_table(&[
            descriptor(TABLE + 4096, 32, flags, 1),
            descriptor(FREE, 64, 0, 0),
        ]);
        bench.throw_table(&[
            descriptor(TABLE, 32, flags, 1),
            descriptor(TABLE, 32, flags, 0),
        ]);
    }
}

pub fn indirect_tables_in_the_middle_of_a_chain(bench: &mut Bench) {
    for flags in DIRECTIONS {
        bench.throw_all(&[
            &[
                descriptor(FREE, 64, NEXT | flags, 1),
                descriptor(TABLE, 32, INDIRECT, 0),
            ],
            &[
                descriptor(TABLE, 32, INDIRECT | NEXT, 1),
                descriptor(FREE, 64, flags, 0),
            ],
            &[
                descriptor(TABLE, 32, INDIRECT | NEXT | flags, 1),
                descriptor(TABLE, 32, INDIRECT | NEXT | flags, 0),
            ],
        ]);
    }
}

pub fn indirect_tables_that_loop(bench: &mut Bench) {
    for flags in DIRECTIONS {
        for next in [0, 1, 2, 3, u16::MAX] {
            bench.throw_table(&[
                descriptor(FREE, 64, NEXT | flags, 1),
                descriptor(FREE, 64, NEXT | flags, next),
                descriptor(FREE, 64, NEXT | flags, 0),
            ]);
        }
    }
}

pub fn an_indirect_table_of_itself(bench: &mut Bench) {
    for flags in DIRECTIONS {
        bench.throw_table(&[
            descriptor(TABLE, 48, NEXT | flags, 1),
            descriptor(TABLE, 48, NEXT | flags, 2),
            descriptor(TABLE, 48, flags, 0),
        ]);
    }
}

pub fn indirect_tables_without_end(bench: &mut Bench) {
    // As many entries as a table can have, of which each goes on.
    let size = u32::from(u16::MAX);
    let table: Vec<_> = (1..=size)
        .map(|next| {
            descriptor(
                FREE,
                1,
                NEXT | (WRITE * u16::from(next > 1000)),
                next as u16,
            )
        })
        .collect();
    bench.throw_table(&table);
}

pub fn an_available_index_far_ahead(bench: &mut Bench) {
    for queue in bench.queues() {
        let size = bench.queue_size(queue);
        for jump in [size, size + 1, 1000, 0x7fff, 0x8000, u16::MAX] {
            bench.guest.set_avail_idx(queue, jump);
            bench.kick(queue);
            bench.renew();
        }
    }
}

pub fn an_available_index_that_goes_back(bench: &mut Bench) {
    for queue in bench.queues() {
        request_at(bench, queue, FREE + 4096);
        request_at(bench, queue, FREE + 4096);
        for idx in [1, 0, u16::MAX, 2] {
            bench.guest.set_avail_idx(queue, idx);
            bench.kick(queue);
        }
        bench.renew();
    }
}

pub fn heads_beyond_the_table(bench: &mut Bench) {
    for queue in bench.queues() {
        let size = bench.queue_size(queue);
        for head in [size, size + 1, 0x7fff, u16::MAX] {
            bench.guest.offer(queue, head);
            bench.kick(queue);
        }
    }
}

pub fn one_head_offered_many_times(bench: &mut Bench) {
    for queue in bench.queues() {
        let size = bench.queue_size(queue);
        request_at(bench, queue, FREE + 4096);
        for _ in 0..20 {
            for _ in 0..size {
                bench.guest.offer(queue, 0);
            }
            bench.kick(queue);
        }
        bench.renew();
    }
}

pub fn rings_that_are_not_in_memory(bench: &mut Bench) {
    for queue in bench.queues() {
        for part in 0..3 {
            for addr in [
                Guest::HOLE,
                Guest::END,
                Guest::END - 16,
                1 << 40,
                u64::MAX - 4095,
            ] {
                let (low, high) = (Some(addr as u32), Some((addr >> 32) as u32));
                let target = bench.guest.queue(queue);
                match part {
                    0 => target.set_desc_table_address(low, high),
                    1 => target.set_avail_ring_address(low, high),
                    _ => target.set_used_ring_address(low, high),
                }
                request_at(bench, queue, FREE + 4096);
                bench.renew();
            }
        }
    }
}

pub fn rings_over_one_another(bench: &mut Bench) {
    for queue in bench.queues() {
        let [table, avail, used] = bench.guest.ring_addresses(queue);
        for [table, avail, used] in [
            [table, table, used],
            [table, avail, table],
            [table, avail, avail],
            [avail, avail, avail],
            [used, avail, used],
        ] {
            let target = bench.guest.queue(queue);
            target.set_desc_table_address(Some(table as u32), Some(0));
            target.set_avail_ring_address(Some(avail as u32), Some(0));
            target.set_used_ring_address(Some(used as u32), Some(0));
            for _ in 0..3 {
                request_at(bench, queue, FREE + 4096);
            }
            bench.renew();
        }
    }
}

pub fn queues_that_are_not_there(bench: &mut Bench) {
    let count = bench.queues().end;
    for queue in [count, count + 1, 31, 32, 1000, usize::MAX] {
        let used = bench.guest.kick(&mut *bench.subject.device, queue);
        assert!(used.unwrap().is_empty());
    }
}

pub fn queues_that_are_not_ready(bench: &mut Bench) {
    let queues = bench.queues();
    for queue in queues.clone() {
        bench.guest.queue(queue).set_ready(false);
    }
    for queue in queues {
        request_at(bench, queue, FREE + 4096);
        let used = bench.guest.kick(&mut *bench.subject.device, queue);
        assert!(used.unwrap().is_empty());
    }
}

pub fn a_storm_of_notifications(bench: &mut Bench) {
    for queue in bench.queues() {
        for _ in 0..20_000 {
            if bench.guest.kick(&mut *bench.subject.device, queue).is_err() {
                panic!("notifications alone broke the device");
            }
        }
    }
}

pub fn a_storm_of_host_events(bench: &mut Bench) {
    let Bench { subject, guest } = bench;
    for _ in 0..20_000 {
        guest
            .with_context(|ctx| subject.device.host_event(ctx))
            .expect("events without cause");
    }
}

pub fn a_storm_of_resets(bench: &mut Bench) {
    for _ in 0..500 {
        bench.device().reset();
        bench.device().reset();
        let features = bench.device().features();
        bench.device().set_acked_features(features);
    }
}

pub fn a_reset_with_work_to_do(bench: &mut Bench) {
    let request = bench.subject.request.clone();
    let room = bench.subject.room;
    for _ in 0..20 {
        bench.guest.write(FREE, &request);
        for queue in bench.queues() {
            bench
                .guest
                .write_descriptor(queue, 0, descriptor(FREE, request.len() as u32, NEXT, 1));
            bench
                .guest
                .write_descriptor(queue, 1, descriptor(FREE + 4096, room, WRITE, 0));
            for _ in 0..bench.queue_size(queue) {
                bench.guest.offer(queue, 0);
            }
            let _ = bench.guest.kick(&mut *bench.subject.device, queue);
        }
        // With whatever the device has left for later.
        bench.renew();
    }
}

pub fn configuration_read_everywhere(bench: &mut Bench) {
    for offset in (0..300).chain([4096, 1 << 31, 1 << 32, 1 << 63, u64::MAX - 8, u64::MAX]) {
        for len in [0, 1, 2, 4, 8, 64, 4096] {
            let mut data = vec![0xff; len];
            bench.device().read_config(offset, &mut data);
            assert!(offset < 256 || data.iter().all(|byte| *byte == 0));
        }
    }
}

pub fn configuration_written_everywhere(bench: &mut Bench) {
    for offset in (0..300).chain([4096, 1 << 31, 1 << 32, 1 << 63, u64::MAX - 8, u64::MAX]) {
        for len in [0, 1, 2, 4, 8, 64, 4096] {
            bench.device().write_config(offset, &vec![0xff; len]);
            bench.device().write_config(offset, &vec![0; len]);
        }
    }
    bench.settle();
}

pub fn features_that_were_not_offered(bench: &mut Bench) {
    for features in (0..64).map(|bit| 1 << bit).chain([0, u64::MAX, 1 << 32]) {
        bench.device().set_acked_features(features);
        for queue in bench.queues() {
            request_at(bench, queue, FREE + 4096);
        }
        bench.renew();
    }
}

pub fn requests_cut_off_anywhere(bench: &mut Bench) {
    let request = bench.subject.request.clone();
    for len in 0..request.len() {
        ask(bench, &request[..len], bench.subject.room);
    }
}

pub fn requests_with_every_field_at_its_extremes(bench: &mut Bench) {
    let request = bench.subject.request.clone();
    for width in [1, 2, 4, 8] {
        for at in (0..request.len()).step_by(width) {
            let end = (at + width).min(request.len());
            for fill in [0, 1, 0x7f, 0x80, 0xfe, 0xff] {
                let mut changed = request.clone();
                // The most significant byte is the last.
                changed[at..end].fill(if fill == 0x7f || fill == 0xfe {
                    0xff
                } else {
                    0
                });
                changed[if fill == 1 || fill == 0xfe {
                    at
                } else {
                    end - 1
                }] = fill;
                if fill == 0xff {
                    changed[at..end].fill(0xff);
                }
                ask(bench, &changed, bench.subject.room);
            }
        }
    }
}

pub fn answers_with_too_little_room(bench: &mut Bench) {
    let request = bench.subject.request.clone();
    for room in 0..bench.subject.room.min(600) {
        ask(bench, &request, room);
    }
}

pub fn a_flood_of_requests(bench: &mut Bench) {
    let request = bench.subject.request.clone();
    for queue in bench.queues() {
        offer_room(bench, queue);
    }
    for _ in 0..10_000 {
        ask(bench, &request, bench.subject.room);
    }
}

pub fn a_flood_of_requests_whose_answers_nobody_takes(bench: &mut Bench) {
    let request = bench.subject.request.clone();
    for _ in 0..10_000 {
        ask(bench, &request, 0);
    }
}

/// Makes memory available in the other queues, for answers that go there.
fn offer_room(bench: &mut Bench, queue: usize) {
    if queue == bench.subject.queue {
        return;
    }
    for _ in 0..bench.queue_size(queue) / 2 {
        let addr = bench.guest.alloc(4096);
        bench.guest.place(queue, &[writable(addr, 4096)]);
    }
    bench.kick(queue);
}

/// Has the device take these bytes as a request, with so much room for an answer, and takes all answers.
fn ask(bench: &mut Bench, request: &[u8], room: u32) {
    let queue = bench.subject.queue;
    if bench.guest.free_descriptors(queue) < 2 {
        // The device takes no more requests until the guest takes its answers, which this one never does.
        bench.renew();
    }
    bench.guest.write(FREE, request);
    let mut chain: Vec<Buffer> = Vec::new();
    if !request.is_empty() {
        chain.push(readable(FREE, request.len() as u32));
    }
    if room > 0 {
        chain.push(writable(FREE + (1 << 20), room));
    }
    if chain.is_empty() {
        chain.push(readable(FREE, 0));
    }
    bench.guest.place(queue, &chain);
    bench.kick(queue);
    while bench.guest.used(queue).is_some() {}
}

pub fn rubbish(bench: &mut Bench) {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..300 {
        for queue in bench.queues() {
            let size = bench.queue_size(queue);
            for id in 0..size.min(16) {
                let addr =
                    [FREE, 0, Guest::BORDER - 8, Guest::HOLE, random.next()][random.below(5)];
                let len = [0, 1, 16, 64, 4096, random.next() as u32][random.below(6)];
                let next = random.below(usize::from(size) + 1) as u16;
                bench.guest.write_descriptor(
                    queue,
                    id,
                    descriptor(addr, len, random.next() as u16 & 7, next),
                );
            }
            let bytes: Vec<u8> = (0..256).map(|_| random.next() as u8).collect();
            bench.guest.write(FREE, &bytes);
            let head = random.below(usize::from(size).min(17)) as u16;
            bench.guest.offer(queue, head);
            bench.kick(queue);
        }
        if round % 50 == 49 {
            bench.renew();
        }
    }
}

/// Throws a buffer at every queue, read and written, alone and behind a proper request.
fn both_ways(bench: &mut Bench, addr: u64, len: u32) {
    let request = bench.subject.request.clone();
    for flags in DIRECTIONS {
        bench.guest.write(FREE, &request);
        bench.throw_all(&[
            &[descriptor(addr, len, flags, 0)],
            &[
                descriptor(FREE, request.len() as u32, NEXT, 1),
                descriptor(addr, len, flags, 0),
            ],
            &[
                descriptor(FREE, request.len() as u32, NEXT, 1),
                descriptor(addr, len, NEXT | flags, 2),
                descriptor(FREE + (1 << 20), 4096, WRITE, 0),
            ],
        ]);
    }
}

/// Numbers that are the same in every run (xorshift).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}
