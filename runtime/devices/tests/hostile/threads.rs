//! The attacks of a guest with two processors: one notifies the device, the other changes what the device is reading.

use std::sync::atomic::{AtomicBool, Ordering};

use cloison_devices::testing::{Guest, INDIRECT, NEXT, WRITE};
use vm_memory::{Bytes, GuestAddress};

use crate::attacks::Random;
use crate::harness::{Bench, FREE, TABLE, bytes, descriptor};

/// How often the device is notified.
const ROUNDS: usize = 2_000;

pub fn descriptors_rewritten_while_they_are_read(bench: &mut Bench) {
    let tables: Vec<u64> = bench
        .queues()
        .map(|queue| bench.guest.ring_addresses(queue)[0])
        .collect();
    while_rewriting(bench, move |random| {
        let addr = [FREE, TABLE, Guest::HOLE, Guest::BORDER - 8, u64::MAX][random.below(5)];
        let len = [0, 16, 64, 4096, u32::MAX][random.below(5)];
        let flags = [0, NEXT, WRITE, NEXT | WRITE, INDIRECT][random.below(5)];
        let entry = bytes(descriptor(addr, len, flags, random.below(5) as u16));
        let table = [tables[random.below(tables.len())], TABLE][random.below(2)];
        (table + 16 * random.below(4) as u64, entry)
    });
}

pub fn indices_rewritten_while_they_are_read(bench: &mut Bench) {
    let rings: Vec<u64> = bench
        .queues()
        .flat_map(|queue| bench.guest.ring_addresses(queue)[1..].to_vec())
        .collect();
    while_rewriting(bench, move |random| {
        let mut entry = [0; 16];
        entry[2..4].copy_from_slice(&(random.below(9) as u16).to_le_bytes());
        entry[4..6].copy_from_slice(&(random.below(9) as u16).to_le_bytes());
        (rings[random.below(rings.len())], entry)
    });
}

pub fn requests_rewritten_while_they_are_read(bench: &mut Bench) {
    let length = bench.subject.request.len();
    while_rewriting(bench, move |random| {
        let mut entry = [0; 16];
        entry[..8].copy_from_slice(&random.next().to_le_bytes());
        (FREE + random.below(length) as u64, entry)
    });
}

/// Offers requests and notifies the device, while another thread writes what `change` says to guest memory.
fn while_rewriting(bench: &mut Bench, change: impl Fn(&mut Random) -> (u64, [u8; 16]) + Send) {
    let request = bench.subject.request.clone();
    let room = bench.subject.room;
    let memory = bench.guest.memory().clone();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stop = &over;
        scope.spawn(move || {
            let mut random = Random(0x2545_f491_4f6c_dd1d);
            while !stop.load(Ordering::Relaxed) {
                let (address, entry) = change(&mut random);
                memory
                    .write_slice(&entry, GuestAddress(address))
                    .expect("a write inside guest memory");
            }
        });
        for round in 0..ROUNDS {
            bench.guest.write(FREE, &request);
            let queue = round % bench.queues().end;
            for (id, entry) in [
                descriptor(FREE, request.len() as u32, NEXT, 1),
                descriptor(FREE + (1 << 20), room, WRITE, 0),
            ]
            .into_iter()
            .enumerate()
            {
                bench.guest.write_descriptor(queue, id as u16, entry);
            }
            bench.guest.offer(queue, 0);
            // The memory must stay the one that the other thread writes to: a device that is broken is reset, the guest is not.
            let Bench { subject, guest } = &mut *bench;
            if guest.kick(&mut *subject.device, queue).is_err()
                || guest.host(&mut *subject.device, 0).is_err()
            {
                subject.device.reset();
                guest.restart_queues();
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    bench.renew();
}
