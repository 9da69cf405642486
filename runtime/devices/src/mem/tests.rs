//! What the guest can plug and unplug, and what it is refused.

use std::sync::Mutex;

use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::*;
use crate::testing::{Guest, host_ready, readable, writable};

const START: u64 = 1 << 32;
const COUNT: u64 = 64;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

/// What the device did to memory, and whether that works.
#[derive(Default)]
struct Log {
    did: Vec<(char, u64, u64)>,
    fails: bool,
}

struct Notes(Arc<Mutex<Log>>);

impl Notes {
    fn note(&self, what: char, start: GuestAddress, length: u64) -> io::Result<()> {
        let mut log = self.0.lock().unwrap();
        assert!(start.0 >= START && start.0 + length <= START + COUNT * BLOCK);
        log.did
            .push((what, (start.0 - START) / BLOCK, length / BLOCK));
        if log.fails {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(())
    }
}

impl HotMemory for Notes {
    fn plug(&mut self, start: GuestAddress, length: u64) -> io::Result<()> {
        self.note('+', start, length)
    }

    fn unplug(&mut self, start: GuestAddress, length: u64) -> io::Result<()> {
        self.note('-', start, length)
    }
}

struct Bench {
    mem: Mem,
    guest: Guest,
    log: Arc<Mutex<Log>>,
    request: u64,
    answer: u64,
}

fn mem() -> (Mem, Arc<Mutex<Log>>) {
    let log = Arc::default();
    let notes = Box::new(Notes(Arc::clone(&log)));
    let mem = Mem::new(GuestAddress(START), COUNT * BLOCK, notes).unwrap();
    (mem, log)
}

impl Bench {
    /// A guest that should have `blocks` blocks.
    fn new(blocks: u64) -> Self {
        let (mut mem, log) = mem();
        mem.set_acked_features(mem.features());
        mem.handle().request(blocks * BLOCK, None).unwrap();
        let mut guest = Guest::new(&mem, true);
        let (request, answer) = (guest.alloc(24), guest.alloc(10));
        Self {
            mem,
            guest,
            log,
            request,
            answer,
        }
    }

    fn raw(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
        let mut bytes = [0; 24];
        bytes[0..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&address.to_le_bytes());
        bytes[16..18].copy_from_slice(&count.to_le_bytes());
        self.guest.write(self.request, &bytes);
        self.guest.write(self.answer, &[0xff; 10]);
        self.guest.place(
            QUEUE,
            &[readable(self.request, 24), writable(self.answer, 10)],
        );
        assert!(
            self.guest
                .kick(&mut self.mem, QUEUE)
                .unwrap()
                .contains(QUEUE)
        );
        assert_eq!(self.guest.used(QUEUE).unwrap().len, 10);
        let answer = self.guest.read(self.answer, 10);
        let word = |at: usize| u16::from_le_bytes([answer[at], answer[at + 1]]);
        (word(0), word(8))
    }

    fn ask(&mut self, kind: u16, first: u64, count: u16) -> u16 {
        self.raw(kind, START + first * BLOCK, count).0
    }

    fn state(&mut self, first: u64, count: u16) -> u16 {
        let (answer, state) = self.raw(STATE, START + first * BLOCK, count);
        assert_eq!(answer, ACK);
        state
    }

    fn did(&self) -> Vec<(char, u64, u64)> {
        std::mem::take(&mut self.log.lock().unwrap().did)
    }

    fn plugged(&self) -> u64 {
        let plugged = self.mem.handle().plugged();
        let mut config = [0; 8];
        self.mem.read_config(40, &mut config);
        assert_eq!(u64::from_le_bytes(config), plugged);
        plugged / BLOCK
    }
}

#[test]
fn memory_is_plugged_and_unplugged() {
    let mut bench = Bench::new(10);
    assert_eq!(bench.ask(PLUG, 2, 4), ACK);
    assert_eq!(bench.ask(PLUG, 6, 1), ACK);
    assert_eq!(bench.plugged(), 5);
    assert_eq!(
        (bench.state(2, 5), bench.state(0, 2), bench.state(1, 2)),
        (0, 1, 2)
    );
    assert_eq!(bench.ask(UNPLUG, 3, 2), ACK);
    assert_eq!(bench.plugged(), 3);
    assert_eq!(bench.did(), [('+', 2, 4), ('+', 6, 1), ('-', 3, 2)]);
    assert_eq!(bench.ask(UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(bench.did(), [('-', 2, 1), ('-', 5, 2)]);
    assert_eq!((bench.plugged(), bench.state(0, COUNT as u16)), (0, 1));
}

/// Whether the descriptor that went along with a request is still kept.
fn kept(read: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(read.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).unwrap() == 0
}

#[test]
fn whoever_waits_learns_when_the_guest_has_what_was_asked_for() {
    let mut bench = Bench::new(1);
    let handle = bench.mem.handle();
    let (read, write) = nix::unistd::pipe().unwrap();
    handle.request(3 * BLOCK, Some(write)).unwrap();
    assert_eq!(bench.ask(PLUG, 0, 2), ACK);
    assert!(kept(&read));
    assert_eq!(bench.ask(PLUG, 2, 1), ACK);
    assert!(!kept(&read));

    let (nothing_to_do, write) = nix::unistd::pipe().unwrap();
    handle.request(3 * BLOCK, Some(write)).unwrap();
    assert!(!kept(&nothing_to_do));

    let (overtaken, write) = nix::unistd::pipe().unwrap();
    handle.request(2 * BLOCK, Some(write)).unwrap();
    assert!(kept(&overtaken));
    handle.request(BLOCK, None).unwrap();
    assert!(!kept(&overtaken));

    let (refused, write) = nix::unistd::pipe().unwrap();
    assert!(handle.request(BLOCK + 1, Some(write)).is_err());
    assert!(!kept(&refused));
}

#[test]
fn no_more_is_plugged_than_was_asked_for() {
    let mut bench = Bench::new(4);
    assert_eq!(bench.ask(PLUG, 0, 5), NACK);
    assert_eq!(bench.ask(PLUG, 0, 3), ACK);
    assert_eq!(bench.ask(PLUG, 3, 2), NACK);
    assert_eq!(bench.ask(PLUG, 3, 1), ACK);
    assert_eq!(bench.ask(PLUG, 4, 1), NACK);
    bench.mem.handle().request(2 * BLOCK, None).unwrap();
    assert_eq!(bench.ask(UNPLUG, 0, 1), ACK);
    assert_eq!(
        bench.ask(PLUG, 0, 1),
        NACK,
        "less than there is was asked for"
    );
    assert_eq!(bench.plugged(), 3);
}

#[test]
fn blocks_in_the_wrong_state_are_an_error_and_stay_as_they_are() {
    let mut bench = Bench::new(COUNT);
    assert_eq!(bench.ask(PLUG, 4, 4), ACK);
    bench.did();
    for (kind, first, count) in [
        (PLUG, 4, 1),
        (PLUG, 3, 2),
        (PLUG, 7, 2),
        (PLUG, 0, 64),
        (UNPLUG, 3, 2),
        (UNPLUG, 7, 2),
        (UNPLUG, 0, 1),
        (UNPLUG, 0, 64),
    ] {
        assert_eq!(
            bench.ask(kind, first, count),
            ERROR,
            "{kind} {first} {count}"
        );
    }
    assert_eq!((bench.plugged(), bench.did()), (4, vec![]));
}

#[test]
fn blocks_that_are_not_there_are_an_error() {
    let mut bench = Bench::new(COUNT);
    for kind in [PLUG, UNPLUG, STATE] {
        for (address, count) in [
            (START, 0),
            (START, COUNT as u16 + 1),
            (START, u16::MAX),
            (START + COUNT * BLOCK, 1),
            (START + (COUNT - 1) * BLOCK, 2),
            (START - BLOCK, 1),
            (START - BLOCK, 2),
            (START + 1, 1),
            (START + 4096, 1),
            (0, 1),
            (u64::MAX, 1),
            (u64::MAX - BLOCK + 1, u16::MAX),
            (1 << 63, 1),
        ] {
            assert_eq!(
                bench.raw(kind, address, count).0,
                ERROR,
                "{kind} {address:#x} {count}"
            );
        }
    }
    for kind in [4, 5, 255, 256, u16::MAX] {
        assert_eq!(bench.ask(kind, 0, 1), ERROR);
    }
    assert_eq!(bench.did(), []);
}

#[test]
fn a_host_without_memory_is_busy_and_nothing_has_happened() {
    let mut bench = Bench::new(COUNT);
    assert_eq!(bench.ask(PLUG, 0, 2), ACK);
    bench.log.lock().unwrap().fails = true;
    assert_eq!(bench.ask(PLUG, 2, 1), BUSY);
    assert_eq!(bench.ask(UNPLUG, 0, 1), BUSY);
    assert_eq!(bench.ask(UNPLUG_ALL, 0, 0), BUSY);
    assert_eq!(bench.plugged(), 2);
    bench.log.lock().unwrap().fails = false;
    assert_eq!(bench.ask(UNPLUG_ALL, 0, 0), ACK);
}

#[test]
fn what_the_guest_cannot_be_told_of_is_not_done() {
    let mut bench = Bench::new(COUNT);
    let (request, answer) = (bench.request, bench.answer);
    bench.guest.write(request + 8, &START.to_le_bytes());
    bench.guest.write(request + 16, &1u16.to_le_bytes());
    for chain in [
        vec![readable(request, 24)],
        vec![readable(request, 24), writable(answer, 9)],
        vec![readable(request, 24), writable(Guest::HOLE, 10)],
        vec![writable(answer, 10), readable(request, 24)],
    ] {
        bench.guest.place(QUEUE, &chain);
        bench.guest.kick(&mut bench.mem, QUEUE).unwrap();
        assert_eq!(bench.guest.used(QUEUE).unwrap().len, 0);
    }
    for length in [0, 1, 23] {
        bench
            .guest
            .place(QUEUE, &[readable(request, length), writable(answer, 10)]);
        bench.guest.kick(&mut bench.mem, QUEUE).unwrap();
        assert_eq!(bench.guest.used(QUEUE).unwrap().len, 10);
        assert_eq!(bench.guest.read(answer, 2), ERROR.to_le_bytes());
    }
    assert_eq!(bench.did(), []);
}

#[test]
fn what_is_asked_for_is_announced_and_can_be_read() {
    let mut bench = Bench::new(0);
    let handle = bench.mem.handle();
    let before = bench.mem.config_generation();
    handle.request(3 * BLOCK, None).unwrap();
    assert!(bench.guest.host(&mut bench.mem, 0).unwrap());
    assert!(!host_ready(&bench.mem, 0));
    assert_ne!(bench.mem.config_generation(), before);
    let mut config = [0; 56];
    bench.mem.read_config(0, &mut config);
    let words: Vec<u64> = config
        .chunks_exact(8)
        .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
        .collect();
    let length = COUNT * BLOCK;
    assert_eq!(words, [BLOCK, 0, START, length, length, 0, 3 * BLOCK]);
    for bytes in [1, BLOCK - 1, BLOCK + 1, length + BLOCK, u64::MAX] {
        assert!(matches!(
            handle.request(bytes, None),
            Err(MemError::Request { .. })
        ));
    }
    assert_eq!(handle.requested(), 3 * BLOCK);
}

#[test]
fn regions_that_cannot_be_are_refused() {
    for (start, length) in [
        (0, 0),
        (4096, BLOCK),
        (0, BLOCK + 4096),
        (0, MAX_REGION + BLOCK),
        (u64::MAX - BLOCK + 1, BLOCK),
        (0, u64::MAX - BLOCK + 1),
    ] {
        let notes = Box::new(Notes(Arc::default()));
        let mem = Mem::new(GuestAddress(start), length, notes);
        assert!(
            matches!(mem, Err(MemError::Region { .. })),
            "{start:#x} {length:#x}"
        );
    }
}

#[test]
fn a_reset_leaves_memory_plugged() {
    let mut bench = Bench::new(4);
    assert_eq!(bench.ask(PLUG, 0, 4), ACK);
    bench.mem.reset();
    bench.guest = Guest::new(&bench.mem, true);
    (bench.request, bench.answer) = (bench.guest.alloc(24), bench.guest.alloc(10));
    assert_eq!(bench.state(0, 4), 0);
    assert_eq!(bench.ask(UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(bench.plugged(), 0);
}

#[test]
fn a_state_makes_the_same_device_in_the_same_place_alone() {
    let mut bench = Bench::new(10);
    assert_eq!(bench.ask(PLUG, 0, 2), ACK);
    assert_eq!(bench.ask(PLUG, 62, 2), ACK);
    let text = serde_json::to_string(&bench.mem.state()).unwrap();
    let state: MemState = serde_json::from_str(&text).unwrap();
    let (mut other, log) = mem();
    other.restore(&state).unwrap();
    assert_eq!(other.state(), bench.mem.state());
    assert_eq!(log.lock().unwrap().did, [('+', 0, 2), ('+', 62, 2)]);
    bench.mem = other;
    assert_eq!((bench.state(0, 2), bench.ask(UNPLUG, 63, 1)), (0, ACK));

    let run = |first, count| Run { first, count };
    for wrong in [
        MemState {
            version: 2,
            ..state.clone()
        },
        MemState {
            start: 0,
            ..state.clone()
        },
        MemState {
            length: BLOCK,
            ..state.clone()
        },
        MemState {
            requested: 1,
            ..state.clone()
        },
        MemState {
            requested: u64::MAX - BLOCK + 1,
            ..state.clone()
        },
        MemState {
            plugged: vec![run(63, 2)],
            ..state.clone()
        },
        MemState {
            plugged: vec![run(0, 0)],
            ..state.clone()
        },
        MemState {
            plugged: vec![run(u32::MAX, 2)],
            ..state.clone()
        },
        MemState {
            plugged: vec![run(0, 2), run(1, 1)],
            ..state.clone()
        },
    ] {
        let (mut other, log) = mem();
        other.restore(&wrong).unwrap_err();
        assert_eq!(log.lock().unwrap().did, [], "{wrong:?}");
    }
    let (mut other, log) = mem();
    log.lock().unwrap().fails = true;
    assert!(matches!(other.restore(&state), Err(MemError::StatePlug(_))));
}
