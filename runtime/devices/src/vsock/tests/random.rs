//! Packets and chains by chance, many of them near to valid: no panic, no call without end, no growth beyond the limits, and a
//! device that still works afterwards.

use std::os::unix::net::UnixListener;

use proptest::prelude::*;

use super::*;
use crate::testing::{Descriptor, INDIRECT, NEXT, WRITE};
use crate::vsock::table::MAX_CONNECTIONS;

#[derive(Debug, Clone)]
enum Act {
    Packet {
        header: Header,
        payload: usize,
    },
    Chain {
        queue: usize,
        descriptors: Vec<Descriptor>,
    },
    Offer(u32),
    Input(usize),
    Output,
    Host,
    Client(u32),
}

fn near<T: Clone + std::fmt::Debug + 'static>(
    usual: T,
    any: impl Strategy<Value = T> + 'static,
) -> impl Strategy<Value = T> {
    prop_oneof![9 => Just(usual), 1 => any]
}

fn header() -> impl Strategy<Value = Header> {
    (
        (near(3, any::<u64>()), near(2, any::<u64>())),
        (
            prop_oneof![Just(80u32), 1..4u32],
            prop_oneof![Just(0x8000_0000u32), 1..4u32],
        ),
        near(1, any::<u16>()),
        prop_oneof![19 => 1..8u16, 1 => any::<u16>()],
        0..4u32,
        prop_oneof![Just(1 << 16), 0..100u32, any::<u32>()],
        prop_oneof![18 => Just(0), 1 => 0..100u32, 1 => any::<u32>()],
        near(None, any::<u32>().prop_map(Some)),
    )
        .prop_map(
            |(cids, ports, socket_type, op, flags, buf_alloc, fwd_cnt, len)| Header {
                src_cid: cids.0,
                dst_cid: cids.1,
                src_port: ports.0,
                dst_port: ports.1,
                // Zero stands for the payload's own length.
                len: len.unwrap_or(0),
                socket_type,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
            },
        )
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    (
        prop_oneof![
            0x10_0000..0x11_0000u64,
            Just(Guest::BORDER - 20),
            any::<u64>()
        ],
        prop_oneof![0..200u32, any::<u32>()],
        prop_oneof![
            Just(0),
            Just(NEXT),
            Just(WRITE),
            Just(WRITE | NEXT),
            Just(INDIRECT),
            any::<u16>()
        ],
        prop_oneof![0..4u16, any::<u16>()],
    )
        .prop_map(|(addr, len, flags, next)| Descriptor {
            addr,
            len,
            flags,
            next,
        })
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        12 => (header(), prop_oneof![Just(0), 1..100usize, Just(65_536)])
            .prop_map(|(header, payload)| Act::Packet { header, payload }),
        2 => (0..3usize, prop::collection::vec(descriptor(), 1..4))
            .prop_map(|(queue, descriptors)| Act::Chain { queue, descriptors }),
        3 => prop_oneof![Just(4096), 0..100u32].prop_map(Act::Offer),
        2 => (1..5000usize).prop_map(Act::Input),
        2 => Just(Act::Output),
        4 => Just(Act::Host),
        1 => prop_oneof![Just(80), 1..4u32].prop_map(Act::Client),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn whatever_the_guest_does_the_device_survives(acts in prop::collection::vec(act(), 1..80)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = Some(UnixListener::bind(&path).unwrap());
        let listen_prefix = Some(path.clone());
        let mut rig = Rig::starved(VsockConfig { listener, listen_prefix, attachments: vec![] });
        let handle = rig.device.handle();
        let mut inputs = Vec::new();
        let mut outputs = Vec::new();
        let mut clients = Vec::new();
        let pool = rig.guest.alloc(4096);
        let table = rig.guest.alloc(4096);
        for act in acts {
            for port in 1..3 {
                let ((reader, input), (output, writer)) = (pipe(), pipe());
                let both = Attachment { port, ..attachment(Some(reader), Some(writer)) };
                if handle.attach(both).is_ok() {
                    inputs.push(input);
                    outputs.push(output);
                }
            }
            let outcome = match act {
                Act::Packet { mut header, payload } => {
                    if rig.guest.free_descriptors(TX) < 2 {
                        rig.settle();
                        while rig.guest.used(TX).is_some() {}
                        if rig.guest.free_descriptors(TX) < 2 {
                            continue;
                        }
                    }
                    if header.len == 0 {
                        header.len = payload as u32;
                    }
                    rig.guest.write(rig.outgoing, &header.to_bytes());
                    rig.guest.place(TX, &[readable(rig.outgoing, (HEADER_LEN + payload) as u32)]);
                    rig.kick(TX)
                }
                Act::Chain { queue, descriptors } => {
                    if rig.guest.free_descriptors(queue) < descriptors.len() {
                        continue;
                    }
                    rig.guest.write(table, &[0x11; 4096]);
                    rig.guest.place_raw(queue, &descriptors);
                    rig.kick(queue)
                }
                Act::Offer(size) => {
                    if rig.guest.free_descriptors(RX) == 0 {
                        continue;
                    }
                    rig.guest.place(RX, &[writable(pool, size)]);
                    rig.kick(RX)
                }
                Act::Input(count) => {
                    for input in &mut inputs {
                        let _ = input.write(&vec![1; count]);
                    }
                    Ok(crate::QueueMask::NONE)
                }
                Act::Output => {
                    for output in &mut outputs {
                        drain(&mut *output);
                    }
                    Ok(crate::QueueMask::NONE)
                }
                Act::Host => rig.guest.host(&mut rig.device, 0).map(|_| crate::QueueMask::NONE),
                Act::Client(port) => {
                    if clients.len() < 8 {
                        let mut client = std::os::unix::net::UnixStream::connect(&path).unwrap();
                        writeln!(client, "CONNECT {port}").unwrap();
                        clients.push(client);
                    }
                    Ok(crate::QueueMask::NONE)
                }
            };
            prop_assert!(outcome.is_ok(), "the rings themselves were never bad: {outcome:?}");
            prop_assert!(rig.device.stream_count() <= MAX_CONNECTIONS);
            while rig.guest.used(RX).is_some() {}
            while rig.guest.used(TX).is_some() {}
            while rig.guest.used(EVENT).is_some() {}
        }
        rig.settle();
        prop_assert!(!rig.host_ready());
        rig.device.reset();
        prop_assert_eq!(rig.device.stream_count(), 0);

        let mut rig = Rig::around(rig.device);
        let (mut out, writer) = pipe();
        handle.attach(Attachment { port: 99, ..attachment(NONE, Some(writer)) }).unwrap();
        rig.offer(8, 4096);
        rig.send(Header { dst_port: 99, ..packet(Op::Request) }, &[]);
        rig.send(Header { dst_port: 99, ..packet(Op::Rw) }, b"alive");
        prop_assert_eq!(drain(&mut out), b"alive");
    }
}
