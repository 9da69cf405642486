//! Configuration space, rings, and chains of descriptors that no driver would make.

use fuse_backend_rs::abi::fuse_abi::*;
use proptest::prelude::*;
use virtio_queue::QueueT;
use vm_memory::ByteValued;

use super::client::*;
use crate::testing::{Buffer, Descriptor, Guest, INDIRECT, NEXT, Used, WRITE, readable, writable};
use crate::{Device, Fs, FsError};

/// A guest with a GETATTR of the root in its memory: the guest, the request, its length, and a page for the reply.
fn with_getattr() -> (Client, u64, u32, u64) {
    let mut client = Client::new();
    let header = client.header(Opcode::Getattr as u32, ROOT, 16);
    let request = body(header, GetattrIn::default().as_slice());
    let at = client.guest.alloc_bytes(&request);
    let reply = client.guest.alloc(4096);
    (client, at, request.len() as u32, reply)
}

/// Handles what has been placed; answers how many bytes the device says it wrote.
fn kick(client: &mut Client) -> u32 {
    client.guest.kick(&mut client.fs, REQUESTS).unwrap();
    let used = client.guest.used(REQUESTS).unwrap();
    assert_eq!(client.guest.used(REQUESTS), None);
    used.len
}

/// The error in the reply at `at`.
fn error(client: &Client, at: u64) -> i32 {
    take::<OutHeader>(&client.guest.read(at, 16)).error
}

/// The device still does what it is there for.
fn works(client: &mut Client) {
    assert_eq!(
        client.getattr(ROOT).unwrap().mode & libc::S_IFMT,
        libc::S_IFDIR
    );
}

#[test]
fn the_driver_finds_a_file_system_with_its_tag_and_one_request_queue() {
    let client = Client::new();
    assert_eq!(client.fs.device_type(), 26);
    assert_eq!(client.fs.queue_sizes(), [512, 512]);
    assert_eq!(client.fs.features(), 1 << 32 | 1 << 29 | 1 << 28);
    let mut config = [0xff; 48];
    client.fs.read_config(0, &mut config);
    assert_eq!(&config[..8], b"cloison\0");
    assert!(config[8..36].iter().all(|byte| *byte == 0));
    assert_eq!(config[36..40], 1u32.to_le_bytes());
    assert_eq!(config[40..], [0; 8]);
    for offset in [37, 40, 41, u64::MAX - 1, u64::MAX] {
        let mut data = [0xff; 8];
        client.fs.read_config(offset, &mut data);
        assert_eq!(data, [0; 8], "{offset}");
    }
    client.fs.read_config(u64::MAX, &mut []);
}

#[test]
fn a_tag_that_does_not_fit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for tag in ["", "a\0b", &"x".repeat(37)] {
        let made = Fs::new(tag, dir.path(), WIDE);
        assert!(matches!(made, Err(FsError::Tag(_))), "{tag:?}");
    }
    assert!(Fs::new(&"x".repeat(36), dir.path(), WIDE).is_ok());
}

#[test]
fn only_a_directory_that_is_there_can_be_shared() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), b"").unwrap();
    for at in ["missing", "file"] {
        let Err(error) = Fs::new("tag", &dir.path().join(at), WIDE) else {
            panic!("{at} was shared");
        };
        assert!(error.to_string().contains(at), "{error}");
        assert!(std::error::Error::source(&error).is_some());
    }
}

#[test]
fn a_saved_state_restores_an_unmounted_device_of_the_same_tag_only() {
    let dir = tempfile::tempdir().unwrap();
    let mut fs = Fs::new("one", dir.path(), WIDE).unwrap();
    fs.set_acked_features(1 << 32);
    let saved = serde_json::to_string(&fs.state()).unwrap();
    let state = serde_json::from_str(&saved).unwrap();
    let mut other = Fs::new("one", dir.path(), WIDE).unwrap();
    other.restore(&state).unwrap();
    assert_eq!(other.state(), fs.state());
    let mut two = Fs::new("two", dir.path(), WIDE).unwrap();
    assert!(matches!(two.restore(&state), Err(FsError::StateTag { .. })));
    let newer = serde_json::from_str(&saved.replace("\"version\":1", "\"version\":2")).unwrap();
    assert!(matches!(
        other.restore(&newer),
        Err(FsError::StateVersion(2))
    ));

    let mut client = Client::new();
    client.mkdir(ROOT, "d", 0o755, 0).unwrap();
    let state = client.fs.state();
    let mut other = Fs::new("cloison", dir.path(), WIDE).unwrap();
    assert!(matches!(
        other.restore(&state),
        Err(FsError::StateMounted(_))
    ));
}

#[test]
fn a_busy_guest_is_served_in_portions_and_completely() {
    let (mut client, request, length, reply) = with_getattr();
    for _ in 0..100 {
        client
            .guest
            .place(REQUESTS, &[readable(request, length), writable(reply, 200)]);
    }
    let mask = client.guest.kick(&mut client.fs, REQUESTS).unwrap();
    assert!(mask.contains(REQUESTS) && !mask.contains(HIPRIO));
    let mut done = 0;
    while client.guest.used(REQUESTS).is_some() {
        done += 1;
    }
    assert_eq!(done, 32);
    while client.go_on() {}
    while client.guest.used(REQUESTS).is_some() {
        done += 1;
    }
    assert_eq!(done, 100);
    assert!(client.guest.must_kick(REQUESTS) || done == 100);
}

#[test]
fn a_queue_that_is_not_ready_is_left_alone() {
    let (mut client, request, length, reply) = with_getattr();
    client
        .guest
        .place(REQUESTS, &[readable(request, length), writable(reply, 200)]);
    client.guest.queue(REQUESTS).set_ready(false);
    let mask = client.guest.kick(&mut client.fs, REQUESTS).unwrap();
    assert!(mask.is_empty());
    assert!(client.guest.kick(&mut client.fs, 31).unwrap().is_empty());
    client.guest.queue(REQUESTS).set_ready(true);
    assert_eq!(kick(&mut client), 120);
}

#[test]
fn a_request_in_single_bytes_is_understood() {
    let (mut client, request, length, reply) = with_getattr();
    let mut chain: Vec<Buffer> = (0..u64::from(length))
        .map(|i| readable(request + i, 1))
        .collect();
    chain.extend((0..120).map(|i| writable(reply + i, 1)));
    client.guest.place(REQUESTS, &chain);
    assert_eq!(kick(&mut client), 120);
    assert_eq!(error(&client, reply), 0);
    client.guest.place_indirect(REQUESTS, &chain);
    assert_eq!(kick(&mut client), 120);
}

#[test]
fn buffers_of_no_length_change_nothing() {
    let (mut client, request, length, reply) = with_getattr();
    let chain = [
        readable(request, 0),
        readable(request, length),
        readable(request, 0),
        writable(reply, 0),
        writable(reply, 16),
        writable(reply, 0),
        writable(reply + 16, 104),
        writable(reply, 0),
    ];
    client.guest.place(REQUESTS, &chain);
    assert_eq!(kick(&mut client), 120);
    assert_eq!(error(&client, reply), 0);
}

#[test]
fn a_chain_without_room_for_a_reply_comes_back_empty() {
    let (mut client, request, length, reply) = with_getattr();
    client.guest.place(REQUESTS, &[readable(request, length)]);
    assert_eq!(kick(&mut client), 0);
    for room in [0, 1, 15] {
        client.guest.place(
            REQUESTS,
            &[readable(request, length), writable(reply, room)],
        );
        assert_eq!(kick(&mut client), 0, "{room}");
    }
    // Room for an error, but not for the attributes.
    for room in [16, 17, 119] {
        client.guest.place(
            REQUESTS,
            &[readable(request, length), writable(reply, room)],
        );
        assert_eq!(kick(&mut client), 16, "{room}");
        assert_eq!(error(&client, reply), -libc::EIO);
    }
    works(&mut client);
}

#[test]
fn a_chain_without_a_whole_header_comes_back_empty() {
    let (mut client, request, _, reply) = with_getattr();
    client.guest.place(REQUESTS, &[writable(reply, 200)]);
    assert_eq!(kick(&mut client), 0);
    for length in [0, 1, 39] {
        client
            .guest
            .place(REQUESTS, &[readable(request, length), writable(reply, 200)]);
        assert_eq!(kick(&mut client), 0, "{length}");
    }
    // A header, but not all of the body.
    for length in [40, 41, 55] {
        client
            .guest
            .place(REQUESTS, &[readable(request, length), writable(reply, 200)]);
        assert_eq!(kick(&mut client), 16, "{length}");
        assert_eq!(error(&client, reply), -libc::EIO);
    }
    works(&mut client);
}

#[test]
fn buffers_outside_memory_are_not_touched() {
    let (mut client, request, length, reply) = with_getattr();
    for bad in [
        Guest::HOLE,
        Guest::END,
        Guest::END - 1,
        u64::MAX,
        u64::MAX - 8,
        1 << 63,
    ] {
        client
            .guest
            .place(REQUESTS, &[readable(bad, length), writable(reply, 200)]);
        assert_eq!(kick(&mut client), 0, "{bad:x}");
        client
            .guest
            .place(REQUESTS, &[readable(request, length), writable(bad, 200)]);
        assert_eq!(kick(&mut client), 0, "{bad:x}");
        client.guest.place(
            REQUESTS,
            &[
                readable(request, length),
                writable(reply, 200),
                writable(bad, 1 << 20),
            ],
        );
        assert_eq!(kick(&mut client), 0, "{bad:x}");
    }
    works(&mut client);
}

#[test]
fn a_buffer_over_a_border_between_mappings_is_refused_and_harmless() {
    let (mut client, request, length, reply) = with_getattr();
    let bytes = client.guest.read(request, length as usize);
    client.guest.write(Guest::BORDER - 20, &bytes);
    client.guest.place(
        REQUESTS,
        &[readable(Guest::BORDER - 20, length), writable(reply, 200)],
    );
    assert_eq!(kick(&mut client), 0);
    // In two descriptors it is two buffers.
    client.guest.place(
        REQUESTS,
        &[
            readable(Guest::BORDER - 20, 20),
            readable(Guest::BORDER, length - 20),
            writable(reply, 200),
        ],
    );
    assert_eq!(kick(&mut client), 120);
}

#[test]
fn chains_that_loop_nest_or_break_off_come_back() {
    let (mut client, request, length, reply) = with_getattr();
    let read = Descriptor {
        addr: request,
        len: length,
        flags: NEXT,
        next: 1,
    };
    let write = Descriptor {
        addr: reply,
        len: 200,
        flags: WRITE,
        next: 0,
    };
    // Round and round.
    let looped = Descriptor {
        flags: WRITE | NEXT,
        ..write
    };
    client.guest.place_raw(REQUESTS, &[read, looped]);
    assert_eq!(kick(&mut client), 120);
    client.guest.place_table(REQUESTS, &[read, looped]);
    assert_eq!(kick(&mut client), 120);
    // Next descriptor beyond the table.
    let away = Descriptor { next: 600, ..read };
    client.guest.place_raw(REQUESTS, &[away]);
    assert_eq!(kick(&mut client), 0);
    // A table within a table, of no descriptor, and of a part of one.
    let table = client.guest.alloc(64);
    for (flags, len) in [(INDIRECT, 32), (INDIRECT, 0), (INDIRECT | NEXT, 17)] {
        let nested = Descriptor {
            addr: table,
            len,
            flags,
            next: 0,
        };
        client.guest.place_table(REQUESTS, &[nested, nested]);
        assert_eq!(kick(&mut client), 0);
        client.guest.place_raw(REQUESTS, &[nested]);
        assert_eq!(kick(&mut client), 0);
    }
    // A table in a hole.
    let lost = Descriptor {
        addr: Guest::HOLE,
        len: 32,
        flags: INDIRECT,
        next: 0,
    };
    client.guest.place_raw(REQUESTS, &[lost]);
    assert_eq!(kick(&mut client), 0);
    works(&mut client);
}

#[test]
fn the_reply_may_come_before_the_request_in_a_chain() {
    let (mut client, request, length, reply) = with_getattr();
    client
        .guest
        .place(REQUESTS, &[writable(reply, 200), readable(request, length)]);
    assert_eq!(kick(&mut client), 120);
}

#[test]
fn a_reply_over_the_request_itself_is_only_the_guests_own_loss() {
    let (mut client, request, length, _) = with_getattr();
    client.guest.place(
        REQUESTS,
        &[readable(request, length), writable(request, 200)],
    );
    assert_eq!(kick(&mut client), 120);
}

#[test]
fn a_request_of_gigabytes_in_few_pages_is_refused_unread() {
    let mut client = Client::new();
    // IOCTL is the one request whose server takes its own word for how much there is.
    let ioctl = IoctlIn {
        in_size: u32::MAX - 1000,
        out_size: u32::MAX,
        ..IoctlIn::default()
    };
    let header = client.header(Opcode::Ioctl as u32, ROOT, 32);
    let request = body(header, ioctl.as_slice());
    let at = client.guest.alloc_bytes(&request);
    let reply = client.guest.alloc(4096);
    let mut chain = vec![readable(at, request.len() as u32)];
    chain.extend(vec![readable(0, 16 << 20); 255]);
    chain.push(writable(reply, 16));
    client.guest.place(REQUESTS, &chain);
    assert_eq!(kick(&mut client), 16);
    assert_eq!(error(&client, reply), -libc::EIO);
    // The same for a reply.
    let mut chain = vec![readable(at, request.len() as u32), writable(reply, 16)];
    chain.extend(vec![writable(Guest::BORDER, 16 << 20); 255]);
    client.guest.place(REQUESTS, &chain);
    assert_eq!(kick(&mut client), 16);
    assert_eq!(error(&client, reply), -libc::EIO);
    works(&mut client);
}

#[test]
fn a_length_in_the_header_that_lies_is_not_believed() {
    let mut client = Client::new();
    std::fs::write(client.host("a"), b"").unwrap();
    for (len, expected) in [
        (0, Some(libc::EIO)),
        (1, Some(libc::EIO)),
        (39, Some(libc::EIO)),
        // No name at all.
        (40, Some(libc::EIO)),
        // A name without its end.
        (41, Some(libc::EIO)),
        (42, None),
        (43, Some(libc::EIO)),
        (4096, Some(libc::EIO)),
        ((1 << 20) + 4096, Some(libc::EIO)),
        ((1 << 20) + 4097, Some(libc::ENOMEM)),
        (u32::MAX, Some(libc::ENOMEM)),
    ] {
        let header = client.header(Opcode::Lookup as u32, ROOT, 0);
        let reply = client.send(InHeader { len, ..header }, b"a\0", 200);
        assert_eq!(reply.unwrap().err(), expected, "{len}");
    }
    works(&mut client);
}

#[test]
fn rings_that_cannot_be_right_break_the_device_until_it_is_reset() {
    for forge in [
        (|guest| guest.set_avail_idx(REQUESTS, 1000)) as fn(&mut Guest),
        |guest| guest.offer(REQUESTS, 512),
        |guest| guest.offer(REQUESTS, u16::MAX),
    ] {
        let mut client = Client::new();
        forge(&mut client.guest);
        let broken = client.guest.kick(&mut client.fs, REQUESTS).unwrap_err();
        assert!(broken.to_string().contains("fs"), "{broken}");
        client.reset();
        client.guest = Guest::new(&client.fs, false);
        // The client's own buffers lie where the new driver's would.
        client.guest.alloc(4 << 20);
        works(&mut client);
    }
}

#[test]
fn a_reset_leaves_nothing_of_the_guest() {
    let mut client = Client::new();
    let dir = client.mkdir(ROOT, "d", 0o755, 0).unwrap().node;
    client.create(dir, "f", libc::O_RDWR, 0o644, 0).unwrap();
    client.opendir(dir).unwrap();
    let usage = client.fs.usage();
    assert_eq!((usage.inodes, usage.descriptors, usage.open), (3, 3, 2));
    client.reset();
    let usage = client.fs.usage();
    assert_eq!((usage.inodes, usage.descriptors, usage.open), (1, 1, 0));
    assert_eq!(client.getattr(dir).unwrap_err(), libc::ESTALE);
    works(&mut client);
    assert_ne!(client.lookup(ROOT, "d").unwrap().node, dir);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_chain_of_descriptors_breaks_the_device(
        chains in prop::collection::vec(
            prop::collection::vec(
                (
                    prop_oneof![
                        Just(0x1000u64),
                        Just(Guest::BORDER - 8),
                        Just(Guest::HOLE),
                        Just(Guest::END - 4),
                        any::<u64>(),
                    ],
                    prop_oneof![Just(0u32), 1u32..100, Just(4096), any::<u32>()],
                    0u16..8,
                    0u16..6,
                ),
                1..6,
            ),
            1..8,
        ),
    ) {
        let mut client = Client::new();
        for chain in &chains {
            let table: Vec<Descriptor> = chain
                .iter()
                .map(|&(addr, len, flags, next)| Descriptor { addr, len, flags, next })
                .collect();
            client.guest.place_raw(REQUESTS, &table);
        }
        // Replies may have been written over the rings themselves.
        if client.guest.kick(&mut client.fs, REQUESTS).is_ok() {
            let usage = client.fs.usage();
            prop_assert!(usage.inodes <= 1 + chains.len());
        }
    }
}

#[test]
fn used_entries_name_the_chains_in_order() {
    let (mut client, request, length, reply) = with_getattr();
    let heads: Vec<u16> = (0..5)
        .map(|_| {
            client
                .guest
                .place(REQUESTS, &[readable(request, length), writable(reply, 200)])
        })
        .collect();
    client.guest.kick(&mut client.fs, REQUESTS).unwrap();
    for head in heads {
        assert_eq!(client.guest.used(REQUESTS), Some(Used { head, len: 120 }));
    }
}
