//! Chains and rings that no driver would make.

use virtio_queue::QueueT;

use super::*;
use crate::testing::{Descriptor, INDIRECT, NEXT, WRITE};

/// A rig with an open stream, whose output tells whether packets get through.
fn open() -> (Rig, File) {
    let (output, writer) = pipe();
    let mut rig = Rig::new(vec![attachment(NONE, Some(writer))]);
    rig.connect();
    rig.packets();
    (rig, output)
}

/// Lets the device see what lies in the transmit queue, and checks that it gave it back and that the stream is unharmed.
fn assert_dropped(mut rig: Rig, mut output: File) {
    rig.kick(TX).unwrap();
    assert_eq!(rig.guest.used(TX).map(|used| used.len), Some(0));
    assert_eq!(rig.guest.used(TX), None);
    assert_eq!(rig.heard(), []);
    rig.say_data(b"unharmed");
    assert_eq!(drain(&mut output), b"unharmed");
}

/// Puts a packet of data into guest memory at `addr`; answers its length.
fn lay_packet(rig: &Rig, addr: u64, data: &[u8]) -> u32 {
    let header = Header {
        len: data.len() as u32,
        ..packet(Op::Rw)
    };
    rig.guest.write(addr, &header.to_bytes());
    rig.guest.write(addr + HEADER_LEN as u64, data);
    (HEADER_LEN + data.len()) as u32
}

#[test]
fn a_packet_in_one_buffer_is_read() {
    let (mut rig, mut output) = open();
    let addr = rig.guest.alloc(4096);
    let len = lay_packet(&rig, addr, b"together");
    rig.guest.place(TX, &[readable(addr, len)]);
    rig.kick(TX).unwrap();
    assert_eq!(drain(&mut output), b"together");
}

#[test]
fn a_packet_in_many_buffers_of_odd_sizes_is_read() {
    let (mut rig, mut output) = open();
    let addr = rig.guest.alloc(4096);
    let len = lay_packet(&rig, addr, b"torn to pieces");
    let mut chain = Vec::new();
    let mut at = 0;
    while at < len {
        let size = (at % 7 + 1).min(len - at);
        chain.push(readable(addr + u64::from(at), size));
        chain.push(readable(addr, 0));
        at += size;
    }
    rig.guest.place(TX, &chain);
    rig.kick(TX).unwrap();
    assert_eq!(drain(&mut output), b"torn to pieces");
}

#[test]
fn a_packet_in_an_indirect_table_is_read() {
    let (mut rig, mut output) = open();
    let addr = rig.guest.alloc(4096);
    let len = lay_packet(&rig, addr, b"indirect");
    let chain = [readable(addr, 44), readable(addr + 44, len - 44)];
    rig.guest.place_indirect(TX, &chain);
    rig.kick(TX).unwrap();
    assert_eq!(drain(&mut output), b"indirect");
}

#[test]
fn a_packet_across_two_host_mappings_is_read_and_one_is_written() {
    let zero = File::open("/dev/zero").unwrap();
    let (mut output, writer) = pipe();
    let attachments = vec![attachment(Some(zero), Some(writer))];
    let mut rig = Rig::starved(VsockConfig {
        attachments,
        ..VsockConfig::default()
    });
    rig.send(packet(Op::Request), &[]);
    rig.offer(1, 4096);
    assert_eq!(rig.receive_now().unwrap().0.op, Op::Response as u16);
    let addr = Guest::BORDER - 50;
    let len = lay_packet(&rig, addr, b"over the border");
    rig.guest.place(TX, &[readable(addr, len)]);
    rig.kick(TX).unwrap();
    assert_eq!(drain(&mut output), b"over the border");
    rig.guest.write(Guest::BORDER - 60, &[0xff; 200]);
    rig.offer_at(Guest::BORDER - 60, 150);
    rig.kick(RX).unwrap();
    let (header, payload) = rig.receive_now().unwrap();
    assert_eq!((header.op, payload), (Op::Rw as u16, vec![0; 106]));
    assert_eq!(
        rig.guest.read(Guest::BORDER + 90, 50),
        [0xff; 50],
        "and not a byte beyond"
    );
}

#[test]
fn a_chain_of_the_queue_s_size_is_read_and_a_longer_one_dropped() {
    let (mut rig, mut output) = open();
    let addr = rig.guest.alloc(4096);
    lay_packet(&rig, addr, &[9; 84]);
    let chain: Vec<_> = (0..128).map(|i| readable(addr + i, 1)).collect();
    rig.guest.place_indirect(TX, &chain);
    rig.kick(TX).unwrap();
    assert_eq!(drain(&mut output), [9; 84]);
    rig.guest.used(TX).unwrap();
    let chain: Vec<_> = (0..129).map(|i| readable(addr + i, 1)).collect();
    rig.guest.place_indirect(TX, &chain);
    assert_dropped(rig, output);
}

#[test]
fn a_packet_shorter_than_its_header_is_dropped() {
    for len in [0, 1, 43] {
        let (mut rig, output) = open();
        let addr = rig.guest.alloc(4096);
        lay_packet(&rig, addr, b"");
        rig.guest.place(TX, &[readable(addr, len)]);
        assert_dropped(rig, output);
    }
}

#[test]
fn a_packet_the_device_is_to_write_is_dropped() {
    let (mut rig, output) = open();
    let addr = rig.guest.alloc(4096);
    let len = lay_packet(&rig, addr, b"wrong way");
    rig.guest.place(TX, &[writable(addr, len)]);
    assert_dropped(rig, output);
}

#[test]
fn a_packet_whose_payload_the_device_is_to_write_is_dropped() {
    let (mut rig, output) = open();
    let addr = rig.guest.alloc(4096);
    let len = lay_packet(&rig, addr, b"wrong way");
    rig.guest
        .place(TX, &[readable(addr, 44), writable(addr + 44, len - 44)]);
    assert_dropped(rig, output);
}

#[test]
fn buffers_outside_of_memory_are_dropped() {
    for (addr, len) in [
        (Guest::HOLE, 100),
        (Guest::END, 100),
        (Guest::END - 10, 100),
        (2 * Guest::BORDER - 10, 100),
        (0x1000, u32::MAX),
        (u64::MAX, 100),
        (u64::MAX - 50, 100),
        (u64::MAX, u32::MAX),
    ] {
        let (mut rig, output) = open();
        rig.guest.place(TX, &[readable(addr, len)]);
        assert_dropped(rig, output);
        let (mut rig, output) = open();
        let header = rig.guest.alloc(4096);
        lay_packet(&rig, header, b"");
        rig.guest
            .place(TX, &[readable(header, 44), readable(addr, len)]);
        assert_dropped(rig, output);
    }
}

#[test]
fn a_chain_that_bites_its_tail_is_dropped() {
    let (mut rig, output) = open();
    let addr = rig.guest.alloc(4096);
    lay_packet(&rig, addr, b"round and round");
    let link = |next| Descriptor {
        addr,
        len: 59,
        flags: NEXT,
        next,
    };
    rig.guest.place_raw(TX, &[link(1), link(0)]);
    assert_dropped(rig, output);
}

#[test]
fn a_chain_that_leads_beyond_the_table_is_dropped() {
    let (mut rig, output) = open();
    let addr = rig.guest.alloc(4096);
    lay_packet(&rig, addr, b"over the edge");
    for next in [128, 1000, u16::MAX] {
        rig.guest.place_raw(
            TX,
            &[Descriptor {
                addr,
                len: 57,
                flags: NEXT,
                next,
            }],
        );
        rig.kick(TX).unwrap();
        assert_eq!(rig.guest.used(TX).map(|used| used.len), Some(0));
    }
    rig.guest.place_raw(
        TX,
        &[Descriptor {
            addr,
            len: 57,
            flags: NEXT,
            next: 128,
        }],
    );
    assert_dropped(rig, output);
}

#[test]
fn indirect_tables_that_are_none_are_dropped() {
    let inner = Descriptor {
        addr: 0x10_0000,
        len: 44,
        flags: 0,
        next: 0,
    };
    let table = |addr, len| Descriptor {
        addr,
        len,
        flags: INDIRECT,
        next: 0,
    };
    let nested = move |rig: &mut Rig| {
        rig.guest.place_table(TX, &[table(0x10_0000, 16)]);
    };
    let looped = move |rig: &mut Rig| {
        rig.guest.place_table(
            TX,
            &[Descriptor {
                flags: NEXT,
                next: 0,
                ..inner
            }],
        );
    };
    let beyond = move |rig: &mut Rig| {
        rig.guest.place_table(
            TX,
            &[Descriptor {
                flags: NEXT,
                next: 1,
                ..inner
            }],
        );
    };
    let raw = |descriptor: Descriptor| {
        move |rig: &mut Rig| {
            rig.guest.place_raw(TX, &[descriptor]);
        }
    };
    type Case = Box<dyn Fn(&mut Rig)>;
    let cases: Vec<Case> = vec![
        Box::new(nested),
        Box::new(looped),
        Box::new(beyond),
        Box::new(raw(table(0x10_0000, 0))),
        Box::new(raw(table(0x10_0000, 15))),
        Box::new(raw(table(0x10_0000, 17))),
        Box::new(raw(table(Guest::HOLE, 16))),
        Box::new(raw(table(u64::MAX - 15, 16))),
        Box::new(raw(table(0x10_0000, 16 << 20))),
        Box::new(raw(table(0x10_0000, 16 * 65535))),
    ];
    for (i, case) in cases.iter().enumerate() {
        let (mut rig, output) = open();
        // Where the tables above point: descriptors without a buffer in them, one after the other.
        rig.guest.write(
            0x10_0000,
            &[0u8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0].repeat(256),
        );
        case(&mut rig);
        println!("case {i}");
        assert_dropped(rig, output);
    }
}

#[test]
fn bad_buffers_for_packets_to_the_guest_come_back_unused_and_good_ones_are_used() {
    let (reader, mut input) = pipe();
    let (_out, writer) = pipe();
    let attachments = vec![attachment(Some(reader), Some(writer))];
    let mut rig = Rig::starved(VsockConfig {
        attachments,
        ..VsockConfig::default()
    });
    rig.say(Op::Request);
    input.write_all(b"hello").unwrap();
    let good = rig.guest.alloc(4096);
    for (addr, len, flags) in [
        (good, 43, WRITE),
        (good, 0, WRITE),
        (good, 100, 0),
        (Guest::HOLE, 100, WRITE),
        (Guest::END - 43, 44, WRITE),
        (u64::MAX, u32::MAX, WRITE),
        (good, 100, WRITE | NEXT),
    ] {
        rig.guest.place_raw(
            RX,
            &[Descriptor {
                addr,
                len,
                flags,
                next: 0,
            }],
        );
        rig.kick(RX).unwrap();
        assert_eq!(
            rig.guest.used(RX).map(|used| used.len),
            Some(0),
            "{addr:#x} {len} {flags}"
        );
    }
    rig.offer(2, 100);
    assert_eq!(
        rig.heard(),
        [Heard::Op(Op::Response), Heard::Data(b"hello".to_vec())]
    );
}

#[test]
fn a_buffer_with_room_for_a_header_only_carries_what_needs_no_more() {
    let (reader, mut input) = pipe();
    let (_out, writer) = pipe();
    let attachments = vec![attachment(Some(reader), Some(writer))];
    let mut rig = Rig::starved(VsockConfig {
        attachments,
        ..VsockConfig::default()
    });
    input.write_all(b"hello").unwrap();
    rig.say(Op::Request);
    rig.offer(4, 44);
    assert_eq!(rig.heard(), [Heard::Op(Op::Response)]);
    assert_eq!(
        rig.guest.free_descriptors(RX),
        128,
        "the others are of no use and come back"
    );
    rig.offer(1, 45);
    assert_eq!(rig.heard(), [Heard::Data(b"h".to_vec())]);
    rig.offer(1, 4096);
    assert_eq!(rig.heard(), [Heard::Data(b"ello".to_vec())]);
}

#[test]
fn a_header_is_written_across_buffers() {
    let mut rig = Rig::starved(VsockConfig::default());
    rig.say(Op::Rw);
    let addr = rig.guest.alloc(4096);
    let chain: Vec<_> = (0..11).map(|i| writable(addr + 4 * i, 4)).collect();
    rig.guest.place(RX, &chain);
    rig.kick(RX).unwrap();
    assert_eq!(rig.guest.used(RX).unwrap().len, 44);
    let bytes = rig.guest.read(addr, 44);
    let header = Header::from_bytes(bytes[..].try_into().unwrap());
    assert_eq!(header, packet(Op::Rw).refusal());
}

#[test]
fn a_buffer_within_its_own_descriptor_table_harms_the_guest_only() {
    let (mut rig, _output) = open();
    let table = rig.guest.queue(TX).desc_table();
    for offset in [0, 16, 2000] {
        rig.guest.place(TX, &[readable(table + offset, 44)]);
        rig.kick(TX).unwrap();
        assert!(rig.guest.used(TX).is_some());
    }
}

#[test]
fn an_available_index_too_far_ahead_breaks_the_device() {
    for queue in [RX, TX] {
        let (mut rig, _output) = open();
        rig.send(
            Header {
                src_port: 9,
                ..packet(Op::Rw)
            },
            &[],
        );
        let idx = rig.guest.queue(queue).next_avail();
        rig.guest.set_avail_idx(queue, idx.wrapping_add(129));
        let outcome = rig.kick(TX).and_then(|_| {
            rig.guest.place(TX, &[readable(rig.outgoing, 44)]);
            rig.kick(TX)
        });
        let broken = outcome.unwrap_err();
        assert_eq!(broken.device, "vsock");
        rig.device.reset();
        assert_eq!(rig.device.stream_count(), 0);
    }
}

#[test]
fn a_head_beyond_the_table_breaks_the_device() {
    for head in [128, u16::MAX] {
        let (mut rig, _output) = open();
        rig.guest.offer(TX, head);
        assert!(rig.kick(TX).is_err());
    }
}

#[test]
fn rings_outside_of_memory_break_the_device_and_hang_nothing() {
    for queue in [RX, TX] {
        for hole in [Guest::HOLE, Guest::END - 4, u64::MAX - 3] {
            for ring in ["table", "avail", "used"] {
                let (mut rig, _output) = open();
                rig.guest.place(TX, &[readable(rig.outgoing, 44)]);
                let (low, high) = (Some(hole as u32 & !15), Some((hole >> 32) as u32));
                match ring {
                    "table" => rig.guest.queue(queue).set_desc_table_address(low, high),
                    "avail" => rig.guest.queue(queue).set_avail_ring_address(low, high),
                    _ => rig.guest.queue(queue).set_used_ring_address(low, high),
                }
                // Whether the device can go on depends on what it needs of the ring; that it returns is the point.
                let outcome = rig.kick(TX);
                if queue == TX && ring != "table" {
                    assert!(outcome.is_err(), "{ring} at {hole:#x}");
                }
                if outcome.is_ok() {
                    let _ = rig.guest.host(&mut rig.device, 0);
                }
            }
        }
    }
}

#[test]
fn a_queue_that_is_not_ready_is_left_alone() {
    let (mut rig, _output) = open();
    rig.guest.place(TX, &[readable(rig.outgoing, 44)]);
    rig.guest.queue(TX).set_ready(false);
    rig.guest.queue(RX).set_ready(false);
    for queue in [RX, TX, EVENT] {
        assert!(rig.kick(queue).unwrap().is_empty());
    }
    assert_eq!(rig.guest.used(TX), None);
}

#[test]
fn a_notification_of_a_queue_there_is_not_is_harmless() {
    let (mut rig, _output) = open();
    assert!(rig.kick(17).unwrap().is_empty());
}

#[test]
fn the_guest_is_told_which_used_rings_have_grown() {
    let mut rig = Rig::new(vec![]);
    rig.guest.write(rig.outgoing, &packet(Op::Rw).to_bytes());
    rig.guest.place(TX, &[readable(rig.outgoing, 44)]);
    let mask = rig.kick(TX).unwrap();
    assert!(mask.contains(RX) && mask.contains(TX) && !mask.contains(EVENT));
    assert!(rig.kick(TX).unwrap().is_empty());
}

#[test]
fn the_guest_need_not_notify_while_it_has_buffers_on_offer() {
    let mut rig = Rig::starved(VsockConfig::default());
    rig.offer(10, 4096);
    rig.say(Op::Rw);
    assert_eq!(rig.packets().len(), 1);
    let addr = rig.guest.alloc(4096);
    rig.offer_at(addr, 4096);
    assert!(!rig.guest.must_kick(RX));
    for _ in 0..11 {
        rig.say(Op::Rw);
    }
    assert_eq!(rig.packets().len(), 10);
    let addr = rig.guest.alloc(4096);
    rig.offer_at(addr, 4096);
    assert!(rig.guest.must_kick(RX), "now the device waits for one");
}
