//! From the guest to the tap.

use super::*;

#[test]
fn a_frame_reaches_the_host() {
    let mut bench = Bench::new();
    bench.send(PLAIN, &frame(60));
    assert_eq!(bench.host.receive().unwrap(), frame(60));
    assert_eq!(bench.host.receive(), None);
    assert_eq!(bench.counters().transmitted, 1);
}

#[test]
fn a_frame_in_pieces_of_any_size_is_whole() {
    let mut bench = Bench::new();
    let bytes = [&PLAIN[..], &frame(500)].concat();
    let at = bench.guest.alloc_bytes(&bytes);
    let cuts = [0, 1, 5, 12, 20, 26, 27, 300, 512];
    let pieces: Vec<_> = cuts
        .windows(2)
        .map(|cut| readable(at + cut[0], (cut[1] - cut[0]) as u32))
        .collect();
    bench.guest.place(TX, &pieces);
    bench.guest.kick(&mut bench.net, TX).unwrap();
    assert_eq!(bench.host.receive().unwrap(), frame(500));
}

#[test]
fn the_tap_is_left_a_checksum_that_the_guest_has_left_to_it() {
    let mut bench = Bench::new();
    let mut packet = udp(32);
    // The guest leaves the pseudo header's sum in the field.
    packet[40..42].copy_from_slice(&[0x12, 0x34]);
    let mut header = PLAIN;
    header[0] = 1;
    header[6..8].copy_from_slice(&34u16.to_le_bytes());
    header[8..10].copy_from_slice(&6u16.to_le_bytes());
    bench.send(header, &packet);
    assert_eq!(bench.host.receive().unwrap().len(), packet.len());
    assert_eq!(bench.counters().transmitted, 1);
}

#[test]
fn a_large_segment_passes_as_one() {
    let mut bench = Bench::new();
    let mut header = PLAIN;
    header[0..2].copy_from_slice(&[1, 1]);
    header[2..4].copy_from_slice(&54u16.to_le_bytes());
    header[4..6].copy_from_slice(&1400u16.to_le_bytes());
    header[6..8].copy_from_slice(&34u16.to_le_bytes());
    header[8..10].copy_from_slice(&16u16.to_le_bytes());
    let packet = tcp(20_000);
    bench.send(header, &packet);
    assert_eq!(bench.host.receive().unwrap().len(), packet.len());
    assert_eq!(bench.counters().transmitted, 1);
}

/// A UDP packet with `length` bytes of data.
fn udp(length: usize) -> Vec<u8> {
    ip(
        17,
        &[
            &[0, 7, 0, 7, 0, 8 + length as u8, 0, 0][..],
            &vec![1; length],
        ]
        .concat(),
    )
}

/// A TCP packet with `length` bytes of data.
fn tcp(length: usize) -> Vec<u8> {
    let mut segment = vec![
        0, 7, 0, 7, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0,
    ];
    segment.resize(20 + length, 1);
    ip(6, &segment)
}

fn ip(protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = frame(12);
    packet.extend([8, 0]);
    let length = (20 + payload.len()) as u16;
    packet.extend([0x45, 0]);
    packet.extend(length.to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    packet.extend(payload);
    packet
}

#[test]
fn frames_of_other_sources_are_dropped_unless_they_are_allowed() {
    let mut forged = frame(60);
    forged[6] = 6;
    let mut bench = Bench::new();
    bench.send(PLAIN, &forged);
    assert_eq!(bench.host.receive(), None);
    assert_eq!(bench.counters().malformed, 1);
    let mut bench = Bench::with(NetConfig {
        spoofing: true,
        ..CONFIG
    });
    bench.send(PLAIN, &forged);
    assert_eq!(bench.host.receive().unwrap(), forged);
}

#[test]
fn runts_and_giants_are_dropped() {
    let mut bench = Bench::new();
    let at = bench.guest.alloc(1 << 18);
    let bytes = [&PLAIN[..], &frame(1 << 17)].concat();
    bench.guest.write(at, &bytes);
    let lengths = [
        0,
        1,
        11,
        12,
        13,
        25,
        12 + 1519,
        12 + 9000,
        12 + 65536,
        1 << 17,
    ];
    for length in lengths {
        bench.guest.place(TX, &[readable(at, length)]);
        bench.guest.kick(&mut bench.net, TX).unwrap();
        assert!(bench.guest.used(TX).is_some());
        assert_eq!(bench.host.receive(), None, "{length}");
    }
    assert_eq!(bench.counters().malformed, lengths.len() as u64);
    // The shortest and the longest there may be.
    for length in [14, 1518] {
        bench.send(PLAIN, &frame(length));
        assert_eq!(bench.host.receive().unwrap().len(), length);
    }
}

#[test]
fn headers_that_no_driver_makes_are_dropped() {
    let header = |flags: u8, kind: u8, headers: u16, size: u16, start: u16, offset: u16| {
        let mut header = [0; HEADER_LENGTH];
        header[0..2].copy_from_slice(&[flags, kind]);
        for (at, word) in [(2, headers), (4, size), (6, start), (8, offset)] {
            header[at..at + 2].copy_from_slice(&word.to_le_bytes());
        }
        header
    };
    let mut bench = Bench::new();
    let headers = [
        // Checksums outside the frame.
        header(1, 0, 0, 0, 0, 0),
        header(1, 0, 0, 0, 13, 0),
        header(1, 0, 0, 0, 99, 0),
        header(1, 0, 0, 0, 100, 0),
        header(1, 0, 0, 0, 14, 85),
        header(1, 0, 0, 0, u16::MAX, u16::MAX),
        header(1, 0, 0, 0, 14, u16::MAX),
        // Segments without a size, without a checksum, with headers longer than the frame.
        header(1, 1, 54, 0, 34, 16),
        header(0, 1, 54, 1400, 34, 16),
        header(1, 1, 101, 1400, 34, 16),
        header(1, 1, u16::MAX, 1400, 34, 16),
        // Kinds of segments that there are not, or were not agreed on.
        header(1, 2, 54, 1400, 34, 16),
        header(1, 3, 54, 1400, 34, 16),
        header(1, 6, 54, 1400, 34, 16),
        header(1, 0x7f, 54, 1400, 34, 16),
        header(1, 0x80, 54, 1400, 34, 16),
        header(1, 0x85, 54, 1400, 34, 6),
        header(1, 0xff, 54, 1400, 34, 16),
    ];
    for header in headers {
        bench.send(header, &frame(100));
        assert_eq!(bench.host.receive(), None, "{header:?}");
    }
    assert_eq!(bench.counters().malformed, headers.len() as u64);
    // What was not agreed on is not done, either.
    bench.net.set_acked_features(1 << VIRTIO_F_VERSION_1);
    for header in [header(1, 0, 0, 0, 34, 16), header(1, 1, 54, 1400, 34, 16)] {
        bench.send(header, &frame(100));
        assert_eq!(bench.host.receive(), None, "{header:?}");
    }
    // Flags without a meaning, and what belongs to none, are ignored.
    bench.send(
        header(0xfe, 0, u16::MAX, u16::MAX, u16::MAX, u16::MAX),
        &frame(100),
    );
    assert_eq!(bench.host.receive().unwrap(), frame(100));
}

#[test]
fn frames_in_very_many_pieces_are_dropped() {
    let mut bench = Bench::new();
    let bytes = [&PLAIN[..], &frame(1000)].concat();
    let at = bench.guest.alloc_bytes(&bytes);
    let pieces: Vec<_> = (0..101).map(|i| readable(at + i * 10, 10)).collect();
    bench.guest.place(TX, &pieces);
    bench.guest.kick(&mut bench.net, TX).unwrap();
    assert_eq!(bench.host.receive(), None);
    assert_eq!(bench.counters().malformed, 1);
}

#[test]
fn while_the_link_is_down_nothing_goes_out() {
    let mut bench = Bench::new();
    bench.net.handle().set_link(false);
    bench.send(PLAIN, &frame(60));
    assert_eq!(bench.host.receive(), None);
    assert_eq!(bench.counters().refused, 1);
    bench.net.handle().set_link(true);
    bench.send(PLAIN, &frame(60));
    assert!(bench.host.receive().is_some());
}
