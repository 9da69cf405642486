//! What every attack has in common: a device under attack, a guest that does not mind breaking it, and what must be true afterwards.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use cloison_devices::Device;
use cloison_devices::testing::{Descriptor, Guest, host_ready};

use crate::heap;
use crate::subjects::Subject;

/// How long an attack may take. On an idle machine none takes a second.
const LIMIT: Duration = Duration::from_secs(120);
/// Most calls after which a device must have nothing more to do.
const MOST_CALLS: usize = 5_000;
/// Most bytes a device may take during an attack, beyond what it has when it works: two requests of the largest size, with lists of
/// all that an indirect table of 65,535 descriptors can name.
const MOST_BYTES: isize = 8 << 20;
/// Most bytes that may be left of an attack after a reset: room in collections that were never full before.
const MOST_LEFT: isize = 64 << 10;

/// A device under attack.
pub struct Bench {
    pub subject: Subject,
    pub guest: Guest,
}

/// Carries out `attack` on the device that `make` makes.
pub fn run(make: fn() -> Subject, attack: fn(&mut Bench)) {
    let (sender, receiver) = channel();
    let thread = std::thread::spawn(move || {
        let result = catch_unwind(AssertUnwindSafe(|| attacked(make(), attack)));
        let _ = sender.send(());
        result.unwrap_or_else(|panic| resume_unwind(panic));
    });
    match receiver.recv_timeout(LIMIT) {
        Err(RecvTimeoutError::Timeout) => panic!("the device never came back"),
        _ => {
            if let Err(panic) = thread.join() {
                resume_unwind(panic);
            }
        }
    }
}

fn attacked(subject: Subject, attack: fn(&mut Bench)) {
    let mut bench = Bench::new(subject);
    // A device that has worked once has the memory it works with.
    bench.works();
    let before = heap::live();
    heap::reset_peak();
    attack(&mut bench);
    bench.settle();
    let most = heap::peak() - before;
    assert!(most <= MOST_BYTES, "the device took {most} bytes");
    bench.works();
    let left = heap::live() - before;
    assert!(left <= MOST_LEFT, "the device kept {left} bytes");
}

impl Bench {
    fn new(mut subject: Subject) -> Self {
        subject.device.set_acked_features(subject.device.features());
        let guest = Guest::new(&*subject.device, true);
        Self { subject, guest }
    }

    pub fn device(&mut self) -> &mut dyn Device {
        &mut *self.subject.device
    }

    /// Resets the device and boots another guest on it.
    pub fn renew(&mut self) {
        self.subject.device.reset();
        let features = self.subject.device.features();
        self.subject.device.set_acked_features(features);
        self.guest = Guest::new(&*self.subject.device, true);
    }

    /// After a reset, the device works.
    fn works(&mut self) {
        self.renew();
        let Subject {
            device,
            works,
            host,
            ..
        } = &mut self.subject;
        works(&mut **device, &mut self.guest, &mut **host);
    }

    pub fn queues(&self) -> std::ops::Range<usize> {
        0..self.subject.device.queue_sizes().len()
    }

    pub fn queue_size(&self, queue: usize) -> u16 {
        self.subject.device.queue_sizes()[queue]
    }

    /// Notifies the device, and renews it if that was too much.
    pub fn kick(&mut self, queue: usize) {
        if self.guest.kick(&mut *self.subject.device, queue).is_err() {
            self.renew();
        }
        self.settle();
    }

    /// Lets the device do all that it wants to do by itself.
    pub fn settle(&mut self) {
        for _ in 0..MOST_CALLS {
            if !host_ready(&*self.subject.device, 0) {
                return;
            }
            if self.guest.host(&mut *self.subject.device, 0).is_err() {
                self.renew();
            }
        }
        panic!("the device is never done");
    }

    /// Has each queue take each of `chains`: descriptors as they are, the first at index 0.
    pub fn throw_all(&mut self, chains: &[&[Descriptor]]) {
        for queue in self.queues() {
            for chain in chains {
                self.throw(queue, chain);
            }
        }
    }

    pub fn throw(&mut self, queue: usize, chain: &[Descriptor]) {
        for (id, descriptor) in (0..).zip(chain.iter().take(self.queue_size(queue).into())) {
            self.guest.write_descriptor(queue, id, *descriptor);
        }
        self.guest.offer(queue, 0);
        self.kick(queue);
    }

    /// Has each queue take an indirect table of these descriptors, in memory that is free for such things.
    pub fn throw_table(&mut self, table: &[Descriptor]) {
        let bytes: Vec<u8> = table.iter().flat_map(|entry| bytes(*entry)).collect();
        self.guest.write(TABLE, &bytes);
        let flags = cloison_devices::testing::INDIRECT;
        self.throw_all(&[&[descriptor(TABLE, bytes.len() as u32, flags, 0)]]);
    }
}

/// Guest memory that nothing else is in.
pub const FREE: u64 = 0x40_0000;
/// Guest memory for indirect tables.
pub const TABLE: u64 = 0x80_0000;

pub fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        addr,
        len,
        flags,
        next,
    }
}

/// As it lies in memory (virtio 1.3 §2.7.5).
pub fn bytes(descriptor: Descriptor) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0..8].copy_from_slice(&descriptor.addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&descriptor.len.to_le_bytes());
    bytes[12..14].copy_from_slice(&descriptor.flags.to_le_bytes());
    bytes[14..16].copy_from_slice(&descriptor.next.to_le_bytes());
    bytes
}
