//! What the disk does, and what it refuses.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::request::MAX_RANGE_SECTORS;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::*;
use crate::testing::{Buffer, Guest, readable, writable};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Sectors of the disk.
const SECTORS: u64 = 2048;

struct Bench {
    blk: Blk,
    guest: Guest,
    file: File,
    header: u64,
    data: u64,
    status: u64,
}

impl Bench {
    fn new() -> Self {
        Self::with(false)
    }

    fn with(read_only: bool) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SECTORS * SECTOR).unwrap();
        let mut blk = Blk::new(file.try_clone().unwrap(), read_only, "cloison-0").unwrap();
        blk.set_acked_features(blk.features());
        let mut guest = Guest::new(&blk, true);
        let (header, data, status) = (guest.alloc(16), guest.alloc(1 << 20), guest.alloc(1));
        Self {
            blk,
            guest,
            file,
            header,
            data,
            status,
        }
    }

    /// Makes a request with these buffers between header and status; answers its status and the length the device says it wrote.
    fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.guest.write(self.header, &header);
        self.guest.write(self.status, &[0xff]);
        let mut chain = vec![readable(self.header, 16)];
        chain.extend(data);
        chain.push(writable(self.status, 1));
        self.guest.place_indirect(Blk::QUEUE, &chain);
        let used = self.guest.kick(&mut self.blk, Blk::QUEUE).unwrap();
        assert!(used.contains(Blk::QUEUE));
        let written = self.guest.used(Blk::QUEUE).unwrap().len;
        (self.guest.read(self.status, 1)[0], written)
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let mut bytes = Vec::new();
        for (sector, count, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(count.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.guest.write(self.data, &bytes);
        let data = [readable(self.data, bytes.len() as u32)];
        self.request(kind, 0, &data).0
    }

    fn on_disk(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        self.blk.read_config(0, &mut config);
        config
    }
}

#[test]
fn what_is_written_is_on_the_disk_and_can_be_read() {
    let mut bench = Bench::new();
    let bytes: Vec<u8> = (0..8192u32).map(|i| (i % 251) as u8).collect();
    bench.guest.write(bench.data, &bytes);
    let data = bench.data;
    let written = bench.request(OUT, 5, &[readable(data, 4096), readable(data + 4096, 4096)]);
    assert_eq!(written, (OK, 1));
    assert_eq!(bench.on_disk(5 * SECTOR, 8192), bytes);
    let room = data + 0x1_0000;
    let pieces = [
        writable(room, 512),
        writable(room + 512, 7168),
        writable(room + 7680, 512),
    ];
    assert_eq!(bench.request(IN, 5, &pieces), (OK, 8193));
    assert_eq!(bench.guest.read(room, 8192), bytes);
}

#[test]
fn a_buffer_over_the_border_of_two_mappings_is_whole() {
    let mut bench = Bench::new();
    bench.file.write_all_at(&[7; 1024], 0).unwrap();
    let address = Guest::BORDER - 100;
    assert_eq!(bench.request(IN, 0, &[writable(address, 1024)]).0, OK);
    assert_eq!(bench.guest.read(address, 1024), [7; 1024]);
}

#[test]
fn a_request_of_more_pieces_than_one_system_call_takes_is_done_as_a_whole() {
    let mut bench = Bench::new();
    let bytes: Vec<u8> = (0..126 * 512u32).map(|i| (i % 253) as u8).collect();
    bench.guest.write(bench.data, &bytes);
    let pieces: Vec<Buffer> = (0..126)
        .map(|i| readable(bench.data + i * 512, 512))
        .collect();
    assert_eq!(bench.request(OUT, 100, &pieces).0, OK);
    assert_eq!(bench.on_disk(100 * SECTOR, bytes.len()), bytes);
}

#[test]
fn status_and_data_may_share_a_buffer_and_a_header_be_in_pieces() {
    let mut bench = Bench::new();
    bench.file.write_all_at(&[9; 512], 0).unwrap();
    bench.guest.write(bench.header, &[0; 16]);
    let chain = [
        readable(bench.header, 3),
        readable(bench.header + 3, 13),
        writable(bench.data, 513),
    ];
    bench.guest.place(Blk::QUEUE, &chain);
    bench.guest.kick(&mut bench.blk, Blk::QUEUE).unwrap();
    assert_eq!(bench.guest.used(Blk::QUEUE).unwrap().len, 513);
    assert_eq!(bench.guest.read(bench.data, 512), [9; 512]);
    assert_eq!(bench.guest.read(bench.data + 512, 1), [OK]);
}

#[test]
fn flushes_and_names_are_answered() {
    let mut bench = Bench::new();
    assert_eq!(bench.request(FLUSH, 0, &[]), (OK, 1));
    let room = [writable(bench.data, 20)];
    assert_eq!(bench.request(GET_ID, 0, &room), (OK, 21));
    let mut name = [0; 20];
    name[..9].copy_from_slice(b"cloison-0");
    assert_eq!(bench.guest.read(bench.data, 20), name);
    for length in [1, 19, 21, 512] {
        let room = [writable(bench.data, length)];
        assert_eq!(bench.request(GET_ID, 0, &room), (IOERR, 1));
    }
}

#[test]
fn without_flushes_every_write_goes_through() {
    let mut bench = Bench::new();
    bench.blk.set_acked_features(1 << VIRTIO_F_VERSION_1);
    bench.guest.write(bench.data, &[3; 512]);
    let data = [readable(bench.data, 512)];
    assert_eq!(bench.request(OUT, 0, &data).0, OK);
    assert_eq!(bench.on_disk(0, 512), [3; 512]);
    assert_eq!(bench.ranges(DISCARD, &[(0, 1, 0)]), OK);
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeroes_and_others_stay() {
    let mut bench = Bench::new();
    for (kind, flags) in [(DISCARD, 0), (WRITE_ZEROES, 1), (WRITE_ZEROES, 0)] {
        bench.file.write_all_at(&[5; 65536], 0).unwrap();
        let status = bench.ranges(kind, &[(8, 8, flags), (24, 16, flags), (0, 0, flags)]);
        if (kind, flags, status) == (WRITE_ZEROES, 0, UNSUPP) {
            // The temporary directory's file system cannot; the guest writes the zeroes itself.
            continue;
        }
        assert_eq!(status, OK);
        let expected: Vec<u8> = (0..128u64)
            .flat_map(|sector| {
                let cleared = (8..16).contains(&sector) || (24..40).contains(&sector);
                [if cleared { 0 } else { 5 }; 512]
            })
            .collect();
        assert_eq!(bench.on_disk(0, 65536), expected);
        assert_eq!(bench.file.metadata().unwrap().len(), SECTORS * SECTOR);
    }
}

#[test]
fn ranges_past_the_end_are_refused_before_anything_is_done() {
    let mut bench = Bench::new();
    bench.file.write_all_at(&[5; 4096], 0).unwrap();
    let data = bench.data;
    for (sector, length) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (u64::MAX - 1, 1024),
        (1 << 55, 512),
        (1 << 63, 512),
    ] {
        assert_eq!(
            bench.request(IN, sector, &[writable(data, length)]),
            (IOERR, 1)
        );
        assert_eq!(
            bench.request(OUT, sector, &[readable(data, length)]),
            (IOERR, 1)
        );
        let sectors = length / 512;
        for kind in [DISCARD, WRITE_ZEROES] {
            let status = bench.ranges(kind, &[(0, 8, 0), (sector, sectors, 0)]);
            assert_eq!(status, IOERR);
        }
    }
    for sectors in [MAX_RANGE_SECTORS + 1, u32::MAX] {
        assert_eq!(bench.ranges(DISCARD, &[(0, sectors, 0)]), IOERR);
    }
    assert_eq!(bench.on_disk(0, 4096), [5; 4096]);
    assert_eq!(bench.file.metadata().unwrap().len(), SECTORS * SECTOR);
    assert_eq!(
        bench.request(IN, SECTORS, &[]),
        (OK, 1),
        "nothing, at the very end"
    );
}

#[test]
fn lengths_that_are_no_sectors_or_too_much_are_refused() {
    let mut bench = Bench::new();
    let data = bench.data;
    for length in [1, 511, 513, 1023] {
        assert_eq!(bench.request(IN, 0, &[writable(data, length)]), (IOERR, 1));
        assert_eq!(bench.request(OUT, 0, &[readable(data, length)]), (IOERR, 1));
    }
    let most = [writable(0x1000, 8 << 20); 2];
    assert_eq!(bench.request(IN, 0, &most), (IOERR, 1));
    for length in [1, 15, 17, 272] {
        let ranges = [readable(data, length)];
        assert_eq!(bench.request(DISCARD, 0, &ranges), (IOERR, 1));
    }
}

#[test]
fn flags_and_kinds_without_a_meaning_are_unsupported() {
    let mut bench = Bench::new();
    assert_eq!(bench.ranges(DISCARD, &[(0, 8, 1)]), UNSUPP);
    assert_eq!(bench.ranges(WRITE_ZEROES, &[(0, 8, 2)]), UNSUPP);
    assert_eq!(bench.ranges(WRITE_ZEROES, &[(0, 8, u32::MAX)]), UNSUPP);
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 100, 1 << 31, u32::MAX] {
        assert_eq!(bench.request(kind, 0, &[]), (UNSUPP, 1), "{kind}");
    }
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let mut bench = Bench::with(true);
    bench.file.write_all_at(&[5; 4096], 0).unwrap();
    let data = [readable(bench.data, 512)];
    assert_eq!(bench.request(OUT, 0, &data), (IOERR, 1));
    assert_eq!(bench.ranges(DISCARD, &[(0, 8, 0)]), IOERR);
    assert_eq!(bench.ranges(WRITE_ZEROES, &[(0, 8, 1)]), IOERR);
    assert_eq!(bench.request(FLUSH, 0, &[]), (OK, 1));
    assert_eq!(bench.on_disk(0, 4096), [5; 4096]);
    let offered = bench.blk.features();
    assert_ne!(offered & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(
        offered & (1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES),
        0
    );
    assert_eq!(bench.config()[36..], [0; 24]);
}

#[test]
fn a_file_that_shrinks_meanwhile_is_an_error() {
    let mut bench = Bench::new();
    bench.file.set_len(512).unwrap();
    let data = bench.data;
    assert_eq!(bench.request(IN, 0, &[writable(data, 1024)]), (IOERR, 1));
    assert_eq!(bench.request(IN, 0, &[writable(data, 512)]), (OK, 513));
}

#[test]
fn requests_without_a_whole_header_or_room_for_a_status_do_nothing() {
    let mut bench = Bench::new();
    for chain in [
        vec![readable(bench.header, 16)],
        vec![readable(bench.header, 16), writable(bench.status, 0)],
        vec![writable(bench.status, 1), readable(bench.header, 16)],
        vec![readable(bench.header, 16), writable(Guest::HOLE, 1)],
        vec![readable(bench.header, 16), writable(u64::MAX, 2)],
    ] {
        bench.guest.place(Blk::QUEUE, &chain);
        bench.guest.kick(&mut bench.blk, Blk::QUEUE).unwrap();
        assert_eq!(bench.guest.used(Blk::QUEUE).unwrap().len, 0, "{chain:x?}");
    }
    for length in [0, 1, 15] {
        let chain = [readable(bench.header, length), writable(bench.status, 1)];
        bench.guest.place(Blk::QUEUE, &chain);
        bench.guest.kick(&mut bench.blk, Blk::QUEUE).unwrap();
        assert_eq!(bench.guest.used(Blk::QUEUE).unwrap().len, 1);
        assert_eq!(bench.guest.read(bench.status, 1), [IOERR]);
    }
}

#[test]
fn a_busy_queue_is_served_in_turns() {
    let mut bench = Bench::new();
    bench.guest.write(bench.header, &FLUSH.to_le_bytes());
    for _ in 0..BATCH + 3 {
        let chain = [readable(bench.header, 16), writable(bench.status, 1)];
        bench.guest.place(Blk::QUEUE, &chain);
    }
    bench.guest.kick(&mut bench.blk, Blk::QUEUE).unwrap();
    let done = std::iter::from_fn(|| bench.guest.used(Blk::QUEUE)).count();
    assert_eq!(done, BATCH);
    assert!(bench.guest.host(&mut bench.blk, 0).unwrap());
    let done = std::iter::from_fn(|| bench.guest.used(Blk::QUEUE)).count();
    assert_eq!(done, 3);
    assert!(!bench.guest.host(&mut bench.blk, 0).unwrap());
}

#[test]
fn the_configuration_says_how_large_the_disk_is() {
    let bench = Bench::new();
    let config = bench.config();
    assert_eq!(config[0..8], SECTORS.to_le_bytes());
    assert_eq!(config[12..16], 126u32.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    assert_eq!(config[56], 1);
}

#[test]
fn what_is_no_disk_is_refused() {
    let small = |length| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(length).unwrap();
        Blk::new(file, false, "")
    };
    for length in [0, 1, 511, 513] {
        assert!(matches!(small(length), Err(BlkError::Size(found)) if found == length));
    }
    let named = tempfile::NamedTempFile::new().unwrap();
    named.as_file().set_len(512).unwrap();
    let open = |options: &mut std::fs::OpenOptions| options.open(named.path()).unwrap();
    let mut options = File::options();
    let unsuitable =
        |file, read_only| matches!(Blk::new(file, read_only, ""), Err(BlkError::Unsuitable(_)));
    assert!(unsuitable(open(options.read(true)), false));
    assert!(!unsuitable(open(options.read(true)), true));
    assert!(unsuitable(open(options.append(true)), false));
    assert!(unsuitable(open(File::options().write(true)), true));
    assert!(unsuitable(File::open("/").unwrap(), true));
    assert!(unsuitable(File::open("/dev/null").unwrap(), true));
    for id in ["123456789012345678901", "a b", "a\0", "é"] {
        let file = named.reopen().unwrap();
        assert!(
            matches!(Blk::new(file, true, id), Err(BlkError::Id(_))),
            "{id}"
        );
    }
}

#[test]
fn a_state_makes_the_same_device_of_the_same_disk_alone() {
    let mut bench = Bench::new();
    let text = serde_json::to_string(&bench.blk.state()).unwrap();
    let state: BlkState = serde_json::from_str(&text).unwrap();
    let other = Blk::new(bench.file.try_clone().unwrap(), false, "").unwrap();
    let running = std::mem::replace(&mut bench.blk, other);
    bench.blk.restore(&state).unwrap();
    assert_eq!(bench.blk.state(), running.state());
    bench.file.write_all_at(&[1; 512], 0).unwrap();
    let room = [writable(bench.data, 512)];
    assert_eq!(
        bench.request(IN, 0, &room),
        (OK, 513),
        "the same queue goes on"
    );

    let newer = BlkState {
        version: 2,
        ..state.clone()
    };
    assert!(matches!(
        bench.blk.restore(&newer),
        Err(BlkError::StateVersion(2))
    ));
    let larger = BlkState {
        sectors: SECTORS + 1,
        ..state.clone()
    };
    assert!(matches!(
        bench.blk.restore(&larger),
        Err(BlkError::StateDisk { .. })
    ));
    let read_only = BlkState {
        read_only: true,
        ..state
    };
    assert!(bench.blk.restore(&read_only).is_err());
}
