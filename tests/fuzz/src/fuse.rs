//! The FUSE parser: well-formed chains with requests in them that are anything but. The file system they reach is one of 32 MiB in a
//! mount namespace of the fuzzing thread, empty at the start of each input.

use std::cell::RefCell;
use std::fs;
use std::path::Path;

use cloison_devices::testing::{readable, writable};
use cloison_devices::{Fs, FsLimits};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::devices::{renew, settle};
use crate::input::Input;
use crate::subjects::{self, Subject};

const REQUESTS: usize = 1;
/// Where requests and replies are in guest memory.
const REQUEST: u64 = 0x40_0000;
const REPLY: u64 = 0x60_0000;

/// Names that requests are about.
const NAMES: [&str; 8] = [
    "a",
    "b",
    "..",
    ".",
    "",
    "a/b",
    "user.x",
    "security.capability",
];

struct Shared {
    subject: Subject,
    dir: tempfile::TempDir,
}

/// Runs `f` with a file system device over an empty directory.
pub fn with_device(f: impl FnOnce(&mut Subject)) {
    thread_local! {
        static SHARED: RefCell<Shared> = RefCell::new(make());
    }
    SHARED.with_borrow_mut(|shared| {
        shared.subject.device.reset();
        empty(shared.dir.path());
        f(&mut shared.subject);
    });
}

fn make() -> Shared {
    unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
    let none = None::<&str>;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(none, "/", none, private, none).expect("private mounts");
    let dir = tempfile::tempdir().expect("a directory");
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    let size = Some("size=32m,nr_inodes=4096");
    mount(Some("none"), dir.path(), Some("tmpfs"), flags, size).expect("a tmpfs");
    let limits = FsLimits {
        inodes: 1000,
        descriptors: 100,
        open: 100,
    };
    let device = Fs::new("cloison", dir.path(), limits).expect("the device");
    let subject = Subject {
        device: Box::new(device),
        ..subjects::fs()
    };
    Shared { subject, dir }
}

fn empty(dir: &Path) {
    for entry in fs::read_dir(dir).expect("the directory").flatten() {
        let path = entry.path();
        let _ = if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            fs::remove_dir_all(path)
        } else {
            fs::remove_file(path)
        };
    }
}

pub fn fuse(data: &[u8]) {
    with_device(|subject| {
        let mut guest = renew(subject);
        let mut input = Input::new(data);
        let init = subject.request.clone();
        let mut send = |bytes: &[u8], room: u32| {
            guest.write(REQUEST, bytes);
            guest.place(
                REQUESTS,
                &[readable(REQUEST, bytes.len() as u32), writable(REPLY, room)],
            );
            guest
                .kick(&mut *subject.device, REQUESTS)
                .expect("a ring in order");
            settle(subject, &mut guest);
            while guest.used(REQUESTS).is_some() {}
        };
        send(&init, 128);
        while !input.is_empty() {
            let bytes = request(&mut input);
            let room = if input.u8().is_multiple_of(8) {
                input.u16()
            } else {
                4096
            };
            send(&bytes, room.into());
        }
    });
}

/// A request: a header (include/uapi/linux/fuse.h, `struct fuse_in_header`), numbers, names, and rubbish.
fn request(input: &mut Input<'_>) -> Vec<u8> {
    let opcode = u32::from(input.u8());
    let node = if input.u8().is_multiple_of(8) {
        input.u64()
    } else {
        u64::from(input.u8() % 8)
    };
    let mut body = Vec::new();
    for _ in 0..input.u8() % 14 {
        let number = match input.u8() % 8 {
            0 => input.u64(),
            1 => u64::MAX,
            2 => 1 << 63,
            3 => u32::MAX.into(),
            _ => u64::from(input.u8() % 16),
        };
        let width = if input.u8().is_multiple_of(2) { 8 } else { 4 };
        body.extend(&number.to_le_bytes()[..width]);
    }
    for _ in 0..input.u8() % 3 {
        body.extend(NAMES[usize::from(input.u8()) % NAMES.len()].bytes());
        body.push(0);
    }
    let length = input.u8() % 32;
    body.extend(input.bytes(length.into()));
    let length = if input.u8().is_multiple_of(8) {
        input.u32()
    } else {
        40 + body.len() as u32
    };
    let mut bytes = Vec::new();
    bytes.extend(length.to_le_bytes());
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(2u64.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.extend(u32::from(input.u8() % 3).to_le_bytes());
    bytes.extend(u32::from(input.u8() % 3).to_le_bytes());
    bytes.extend([0; 8]);
    bytes.extend(body);
    bytes
}
