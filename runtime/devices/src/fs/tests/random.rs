//! Requests with anything in them: what matters is that the device survives and keeps within its bounds.

use std::fs;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::client::*;
use super::mounts::{privately, tmpfs};

/// Sends anything; what matters is that the device survives it.
fn anything(client: &mut Client, opcode: u32, node: u64, body: &[u8], len: Option<u32>) {
    let mut header = client.header(opcode, node, body.len());
    header.len = len.unwrap_or(header.len);
    let _ = client.send(header, body, 4096);
}

#[test]
fn every_opcode_survives_every_extreme() {
    // On a small file system of its own: some of this allocates.
    privately(|| {
        let mut client = small();
        for opcode in 0..60 {
            for node in [0, ROOT, 2, 3, 4, 5, u64::MAX] {
                for fill in [0, 1, 2, 0x7f, 0x80, 0xff] {
                    for length in [0, 1, 8, 16, 24, 40, 64, 88, 104, 1000] {
                        let mut body = vec![fill; length];
                        anything(&mut client, opcode, node, &body, None);
                        // A handle that exists, and names that end.
                        if length >= 16 {
                            body[..8].copy_from_slice(&1u64.to_le_bytes());
                            body[length - 1] = 0;
                            body[length / 2] = 0;
                            anything(&mut client, opcode, node, &body, None);
                        }
                    }
                }
            }
            populate(&mut client);
        }
        client.getattr(ROOT).unwrap();
    });
}

/// A guest with a few files of its own and a file system of 32 MiB.
fn small() -> Client {
    let mut client = Client::new();
    let at = client.dir.path().to_owned();
    tmpfs(&at);
    client.fs = crate::Fs::new("cloison", &at, WIDE).unwrap();
    populate(&mut client);
    client
}

/// Mounts anew, with nodes 2 to 5 and handles 1 to 3 (or larger numbers) in use.
fn populate(client: &mut Client) {
    client.mount();
    for entry in fs::read_dir(client.dir.path()).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            fs::remove_dir_all(entry.path()).unwrap();
        } else {
            fs::remove_file(entry.path()).unwrap();
        }
    }
    client.create(ROOT, "f", libc::O_RDWR, 0o644, 0).unwrap();
    let dir = client.mkdir(ROOT, "d", 0o755, 0).unwrap().node;
    client.symlink(ROOT, "l", "/etc/passwd").unwrap();
    client.mknod(dir, "p", libc::S_IFIFO | 0o644, 0).unwrap();
    client.opendir(dir).unwrap();
}

#[test]
fn no_sequence_of_random_requests_breaks_the_device() {
    privately(|| {
        let mut client = small();
        let number = prop_oneof![
            0u64..8,
            Just(u64::MAX),
            Just(1 << 63),
            Just(1 << 31),
            Just(1 << 20),
            any::<u64>(),
        ];
        let request = (
            prop_oneof![4 => 0u32..54, 1 => any::<u32>()],
            prop_oneof![4 => 0u64..10, 1 => any::<u64>()],
            prop::collection::vec(number, 0..14),
            prop::collection::vec(
                prop::sample::select(vec![
                    "f", "d", "l", "p", "..", ".", "a/b", "user.x", "new", "",
                ]),
                0..3,
            ),
            prop::option::weighted(0.1, any::<u32>()),
            (any::<u32>(), any::<u32>()),
        );
        let mut runner = TestRunner::new(ProptestConfig {
            cases: 3000,
            failure_persistence: None,
            ..ProptestConfig::default()
        });
        let client = std::cell::RefCell::new(&mut client);
        runner
            .run(
                &request,
                |(opcode, node, numbers, names, len, (uid, gid))| {
                    let client = &mut *client.borrow_mut();
                    (client.uid, client.gid) = (uid % 3, gid % 3);
                    let mut body: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
                    names.iter().for_each(|at| body.extend(name(at)));
                    anything(client, opcode, node, &body, len);
                    (client.uid, client.gid) = (0, 0);
                    prop_assert!(client.getattr(ROOT).is_ok());
                    let usage = client.fs.usage();
                    prop_assert!(usage.descriptors <= WIDE.descriptors && usage.open <= WIDE.open);
                    Ok(())
                },
            )
            .unwrap();
    });
}
