//! The vsock packet parser and the streams behind it: packets in well-formed chains, from a guest that has buffers for answers, to a
//! host port where a pipe waits and to one where nobody is.

use std::os::fd::OwnedFd;

use cloison_devices::testing::{Guest, readable, writable};
use cloison_devices::{Attachment, Device, Vsock, VsockConfig};
use nix::fcntl::OFlag;

use crate::input::Input;

const RX: usize = 0;
const TX: usize = 1;
const HEADER: usize = 44;
/// Host port of the pipe.
const PORT: u32 = 1024;
/// Where packets to the device are in guest memory.
const OUT: u64 = 0x40_0000;
/// Where answers are, a page each.
const IN: u64 = 0x60_0000;
const BUFFERS: u16 = 32;
const MOST_CALLS: usize = 5_000;

pub fn vsock_packet(data: &[u8]) {
    let mut vsock = Vsock::new(VsockConfig {
        attachments: vec![attachment()],
        ..VsockConfig::default()
    })
    .expect("the device");
    vsock.set_acked_features(vsock.features());
    let mut guest = Guest::new(&vsock, true);
    for id in 0..BUFFERS {
        guest.place(RX, &[writable(IN + 4096 * u64::from(id), 4096)]);
    }
    guest.kick(&mut vsock, RX).expect("a ring in order");
    let mut input = Input::new(data);
    while !input.is_empty() {
        let packet = packet(&mut input);
        guest.write(OUT, &packet);
        let (header, payload) = (HEADER as u32, (packet.len() - HEADER) as u32);
        if payload == 0 {
            guest.place(TX, &[readable(OUT, header)]);
        } else {
            guest.place(
                TX,
                &[
                    readable(OUT, header),
                    readable(OUT + HEADER as u64, payload),
                ],
            );
        }
        guest.kick(&mut vsock, TX).expect("a ring in order");
        settle(&mut vsock, &mut guest);
        while guest.used(TX).is_some() {}
        while guest.used(RX).is_some() {
            let free = IN + 4096 * u64::from(BUFFERS);
            guest.place(RX, &[writable(free, 4096)]);
        }
        guest.kick(&mut vsock, RX).expect("a ring in order");
        if guest.free_descriptors(TX) < 2 {
            return;
        }
    }
    settle(&mut vsock, &mut guest);
}

fn settle(vsock: &mut Vsock, guest: &mut Guest) {
    for _ in 0..MOST_CALLS {
        if !guest.host(vsock, 0).expect("a ring in order") {
            return;
        }
    }
    panic!("the device is never done");
}

/// A pipe whose other ends are closed when the input is over.
fn attachment() -> Attachment {
    let flags = OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let (reader, writer) = nix::unistd::pipe2(flags).expect("a pipe");
    Attachment {
        port: PORT,
        read: Some(reader),
        write: Some(writer),
        done: None::<OwnedFd>,
    }
}

/// A packet (virtio 1.3 §5.10.6), more often than by chance one of a stream that there is.
fn packet(input: &mut Input<'_>) -> Vec<u8> {
    let odd = input.u8();
    let or = |bit: u8, odd_value: u64, value: u64| {
        if odd & 1 << bit == 0 {
            value
        } else {
            odd_value
        }
    };
    let payload = input.bytes(usize::from(odd & 0x3f) % 40).to_vec();
    let mut packet = Vec::with_capacity(HEADER + payload.len());
    packet.extend(or(7, input.u64(), 3).to_le_bytes());
    packet.extend(or(6, input.u64(), 2).to_le_bytes());
    packet.extend((5000 + u32::from(input.u8() % 4)).to_le_bytes());
    packet.extend((PORT + u32::from(input.u8().is_multiple_of(8))).to_le_bytes());
    let length = if input.u8().is_multiple_of(8) {
        input.u32()
    } else {
        payload.len() as u32
    };
    packet.extend(length.to_le_bytes());
    let kind = if input.u8().is_multiple_of(16) {
        input.u16()
    } else {
        1
    };
    packet.extend(kind.to_le_bytes());
    packet.extend(u16::from(input.u8() % 10).to_le_bytes());
    packet.extend(u32::from(input.u8() % 5).to_le_bytes());
    let credit = if input.u8().is_multiple_of(2) {
        input.u32()
    } else {
        1 << 18
    };
    packet.extend(credit.to_le_bytes());
    let taken = if input.u8().is_multiple_of(4) {
        input.u32()
    } else {
        0
    };
    packet.extend(taken.to_le_bytes());
    packet.extend(payload);
    packet
}
