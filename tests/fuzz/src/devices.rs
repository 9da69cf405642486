//! Devices and their queues. The input is what a guest does, step by step: it writes memory, descriptors and indices, notifies, and
//! resets. A device is made once; what one input did to it must not matter to the next, after a reset.

use std::cell::RefCell;

use cloison_devices::testing::{Buffer, Descriptor, Guest, host_ready, readable, writable};

use crate::input::Input;
use crate::subjects::{self, Subject};

/// Most calls after which a device must have nothing more to do.
const MOST_CALLS: usize = 5_000;

/// Memory that nothing else is in.
const FREE: u64 = 0x40_0000;

/// Defines a target for each of these devices.
macro_rules! targets {
    ($($device:ident)*) => {
        $(pub fn $device(data: &[u8]) {
            thread_local! {
                static SUBJECT: RefCell<Subject> = RefCell::new(subjects::$device());
            }
            SUBJECT.with_borrow_mut(|subject| drive(subject, data));
        })*
    };
}

targets! { balloon blk console mem net pmem rng vsock }

/// As the others, on a file system that the guest cannot fill for good.
pub fn fs(data: &[u8]) {
    crate::fuse::with_device(|subject| drive(subject, data));
}

/// Resets the device and boots a guest on it.
pub fn renew(subject: &mut Subject) -> Guest {
    subject.device.reset();
    subject.device.set_acked_features(subject.device.features());
    Guest::new(&*subject.device, true)
}

/// Lets the device do all that it wants to do by itself.
pub fn settle(subject: &mut Subject, guest: &mut Guest) {
    for _ in 0..MOST_CALLS {
        if !host_ready(&*subject.device, 0) {
            return;
        }
        if guest.host(&mut *subject.device, 0).is_err() {
            *guest = renew(subject);
        }
    }
    panic!("the device is never done");
}

fn drive(subject: &mut Subject, data: &[u8]) {
    let mut input = Input::new(data);
    let mut guest = renew(subject);
    let queues = subject.device.queue_sizes().len();
    while !input.is_empty() {
        let step = input.u8();
        let queue = usize::from(step >> 4) % queues;
        match step & 15 {
            0 => guest.write(address_in_memory(&mut input), input.bytes(64)),
            1..=4 => {
                let id = u16::from(input.u8() % 16);
                let entry = entry(&mut input, &guest, queue);
                guest.write_descriptor(queue, id, entry);
            }
            5..=6 => guest.offer(queue, input.u8().into()),
            7 => guest.set_avail_idx(queue, input.u16()),
            8 => request(subject, &mut input, &mut guest),
            9 => {
                let (offset, length) = (input.u16(), input.u8());
                let mut data = vec![0; length.into()];
                subject.device.read_config(offset.into(), &mut data);
            }
            10 => {
                let offset = input.u16();
                subject.device.write_config(offset.into(), input.bytes(8));
            }
            11 => subject.device.set_acked_features(input.u64()),
            12 => guest = renew(subject),
            _ => {
                if guest.kick(&mut *subject.device, queue).is_err() {
                    guest = renew(subject);
                }
            }
        }
    }
    for queue in 0..queues {
        if guest.kick(&mut *subject.device, queue).is_err() {
            guest = renew(subject);
        }
    }
    settle(subject, &mut guest);
    guest = renew(subject);
    let Subject {
        device,
        works,
        host,
        ..
    } = subject;
    works(&mut **device, &mut guest, &mut **host);
}

/// A well-formed chain: a request with some bytes changed, and room for an answer.
fn request(subject: &mut Subject, input: &mut Input<'_>, guest: &mut Guest) {
    let queue = subject.queue;
    if guest.free_descriptors(queue) < 2 {
        return;
    }
    let mut request = subject.request.clone();
    for _ in 0..input.u8() % 8 {
        let at = usize::from(input.u16()) % request.len();
        request[at] = input.u8();
    }
    guest.write(FREE, &request);
    let room = if input.u8().is_multiple_of(4) {
        input.u16().into()
    } else {
        subject.room
    };
    let chain: [Buffer; 2] = [
        readable(FREE, request.len() as u32),
        writable(FREE + 0x1_0000, room),
    ];
    guest.place(queue, &chain);
    let _ = guest.kick(&mut *subject.device, queue);
}

/// A descriptor, whose address is more often than by chance one that means something.
fn entry(input: &mut Input<'_>, guest: &Guest, queue: usize) -> Descriptor {
    let addr = match input.u8() % 8 {
        0..=2 => address_in_memory(input),
        3 => guest.ring_addresses(queue)[usize::from(input.u8() % 3)],
        4 => Guest::HOLE,
        5 => Guest::BORDER - u64::from(input.u8()),
        6 => u64::MAX - u64::from(input.u8()),
        _ => input.u64(),
    };
    Descriptor {
        addr,
        len: if input.u8().is_multiple_of(4) {
            input.u32()
        } else {
            input.u8().into()
        },
        flags: input.u8().into(),
        next: input.u8().into(),
    }
}

fn address_in_memory(input: &mut Input<'_>) -> u64 {
    FREE + u64::from(input.u16())
}
