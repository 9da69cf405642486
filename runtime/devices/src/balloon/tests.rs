//! What the balloon frees, and what it leaves alone.

use std::sync::Mutex;

use super::*;
use crate::testing::{Guest, host_ready, readable, writable};

type Freed = Arc<Mutex<Vec<(u64, u64)>>>;

/// Notes what it is given.
struct Notes {
    freed: Freed,
    fails: bool,
}

impl Reclaim for Notes {
    fn discard(&mut self, start: GuestAddress, length: u64) -> io::Result<()> {
        assert!(start.0.is_multiple_of(PAGE) && length.is_multiple_of(PAGE) && length > 0);
        self.freed.lock().unwrap().push((start.0, length));
        if self.fails {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(())
    }
}

struct Bench {
    balloon: Balloon,
    guest: Guest,
    freed: Freed,
}

impl Bench {
    fn new() -> Self {
        Self::with(false)
    }

    fn with(fails: bool) -> Self {
        let freed = Freed::default();
        let notes = Notes {
            freed: Arc::clone(&freed),
            fails,
        };
        let mut balloon = Balloon::new(Box::new(notes)).unwrap();
        balloon.set_acked_features(balloon.features());
        let guest = Guest::new(&balloon, true);
        Self {
            balloon,
            guest,
            freed,
        }
    }

    fn kick(&mut self, queue: usize) {
        assert!(
            self.guest
                .kick(&mut self.balloon, queue)
                .unwrap()
                .contains(queue)
        );
        while let Some(used) = self.guest.used(queue) {
            assert_eq!(used.len, 0);
        }
    }

    fn inflate(&mut self, pages: &[u32]) -> Vec<(u64, u64)> {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        let at = self.guest.alloc_bytes(&bytes);
        self.guest
            .place(INFLATE, &[readable(at, bytes.len() as u32)]);
        self.kick(INFLATE);
        self.freed()
    }

    fn report(&mut self, start: u64, length: u32) -> Vec<(u64, u64)> {
        self.guest.place(REPORT, &[writable(start, length)]);
        self.kick(REPORT);
        self.freed()
    }

    fn freed(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.freed.lock().unwrap())
    }
}

#[test]
fn pages_in_the_balloon_are_freed_in_runs() {
    let mut bench = Bench::new();
    assert_eq!(bench.inflate(&[300]), [(300 << 12, 4096)]);
    assert_eq!(
        bench.inflate(&[302, 301, 300, 304]),
        [(300 << 12, 3 << 12), (304 << 12, 4096)]
    );
    assert_eq!(bench.inflate(&[300, 300, 301]), [(300 << 12, 2 << 12)]);
    assert_eq!(bench.inflate(&[]), []);
}

#[test]
fn pages_that_come_back_cost_nothing() {
    let mut bench = Bench::new();
    let at = bench.guest.alloc_bytes(&300u32.to_le_bytes());
    bench.guest.place(DEFLATE, &[readable(at, 4)]);
    bench.kick(DEFLATE);
    assert_eq!(bench.freed(), []);
}

#[test]
fn pages_that_are_not_in_memory_are_left_alone() {
    let mut bench = Bench::new();
    let hole = (Guest::HOLE >> 12) as u32;
    let end = (Guest::END >> 12) as u32;
    assert_eq!(
        bench.inflate(&[hole, end, u32::MAX, u32::MAX - 1, 300]),
        [(300 << 12, 4096)]
    );
    // The last page before a hole, and one in it.
    let last = ((2 * Guest::BORDER) >> 12) as u32 - 1;
    assert_eq!(
        bench.inflate(&[last, last + 1]),
        [(u64::from(last) << 12, 4096)]
    );
}

#[test]
fn a_run_over_the_border_of_two_regions_is_freed_in_two() {
    let mut bench = Bench::new();
    let border = (Guest::BORDER >> 12) as u32;
    let expected = [(Guest::BORDER - 4096, 4096), (Guest::BORDER, 4096)];
    assert_eq!(bench.inflate(&[border - 1, border]), expected);
    assert_eq!(bench.report(Guest::BORDER - 4096, 8192), expected);
}

#[test]
fn of_very_many_pages_some_are_freed() {
    let mut bench = Bench::new();
    let pages: Vec<u32> = (1000..1000 + 2 * MAX_PAGES as u32).collect();
    let bytes = MAX_PAGES as u64 * PAGE;
    assert_eq!(bench.inflate(&pages), [(1000 << 12, bytes)]);
}

#[test]
fn half_a_number_is_no_page() {
    let mut bench = Bench::new();
    let at = bench.guest.alloc_bytes(&[0; 8]);
    for length in [1, 3] {
        bench.guest.place(INFLATE, &[readable(at, length)]);
        bench.kick(INFLATE);
        assert_eq!(bench.freed(), []);
    }
}

#[test]
fn reported_memory_is_freed_untouched() {
    let mut bench = Bench::new();
    bench.guest.write(0x20_0000, &[1; 4096]);
    assert_eq!(bench.report(0x20_0000, 2 << 20), [(0x20_0000, 2 << 20)]);
    assert_eq!(bench.guest.read(0x20_0000, 4096), [1; 4096]);
}

#[test]
fn of_reported_memory_only_whole_pages_are_freed() {
    let mut bench = Bench::new();
    for (start, length, freed) in [
        (0x20_0001, 4096, vec![]),
        (0x20_0001, 8191, vec![(0x20_1000, 4096)]),
        (0x20_0000, 4095, vec![]),
        (0x20_0000, 0, vec![]),
        (0x20_0fff, 4098, vec![(0x20_1000, 4096)]),
    ] {
        assert_eq!(bench.report(start, length), freed, "{start:#x} {length}");
    }
}

#[test]
fn reports_beyond_memory_free_what_is_in_it() {
    let mut bench = Bench::new();
    assert_eq!(bench.report(Guest::HOLE, 1 << 20), []);
    assert_eq!(bench.report(Guest::END, u32::MAX), []);
    assert_eq!(bench.report(u64::MAX, u32::MAX), []);
    assert_eq!(bench.report(u64::MAX - 4095, 4096), []);
    let end = Guest::END - 8192;
    assert_eq!(bench.report(end, u32::MAX), [(end, 8192)]);
    // Read by the device: no report.
    bench.guest.place(REPORT, &[readable(0x20_0000, 4096)]);
    bench.kick(REPORT);
    assert_eq!(bench.freed(), []);
}

#[test]
fn memory_that_cannot_be_freed_is_no_harm() {
    let mut bench = Bench::with(true);
    assert_eq!(bench.inflate(&[300, 302]).len(), 2);
}

#[test]
fn a_new_target_is_announced_once_and_can_be_read() {
    let mut bench = Bench::new();
    let handle = bench.balloon.handle();
    let before = bench.balloon.config_generation();
    assert!(!host_ready(&bench.balloon, 0));
    handle.set_target((64 << 20) + 5);
    assert!(bench.guest.host(&mut bench.balloon, 0).unwrap());
    assert!(!host_ready(&bench.balloon, 0));
    let after = bench.balloon.config_generation();
    assert_ne!(before, after);
    let mut pages = [0; 4];
    bench.balloon.read_config(0, &mut pages);
    assert_eq!(u32::from_le_bytes(pages), 64 << 8);
    assert_eq!(handle.target(), 64 << 20);
    handle.set_target(64 << 20);
    assert_eq!(
        bench.balloon.config_generation(),
        after,
        "nothing has changed"
    );
    handle.set_target(u64::MAX);
    assert_eq!(handle.target(), u64::from(u32::MAX) * PAGE);
}

#[test]
fn the_guest_says_how_much_it_has_given_and_can_write_nothing_else() {
    let mut bench = Bench::new();
    let handle = bench.balloon.handle();
    bench.balloon.write_config(4, &256u32.to_le_bytes());
    assert_eq!(handle.actual(), 1 << 20);
    for (offset, data) in [
        (0, &[1; 4][..]),
        (4, &[1; 3]),
        (4, &[1; 8]),
        (5, &[1; 4]),
        (8, &[1; 4]),
        (u64::MAX, &[1; 4]),
        (4, &[]),
    ] {
        bench.balloon.write_config(offset, data);
    }
    assert_eq!((handle.actual(), handle.target()), (1 << 20, 0));
    bench.balloon.reset();
    assert_eq!(handle.actual(), 0);
}

#[test]
fn a_state_makes_the_same_device_and_one_of_another_version_is_refused() {
    let mut bench = Bench::new();
    bench.balloon.handle().set_target(1 << 20);
    bench.balloon.write_config(4, &7u32.to_le_bytes());
    let text = serde_json::to_string(&bench.balloon.state()).unwrap();
    let state: BalloonState = serde_json::from_str(&text).unwrap();
    let mut other = Bench::new();
    other.balloon.restore(&state).unwrap();
    assert_eq!(other.balloon.state(), bench.balloon.state());
    // The guest's rings go on with the device that was restored.
    std::mem::swap(&mut bench.balloon, &mut other.balloon);
    bench.freed = Arc::clone(&other.freed);
    assert_eq!(bench.inflate(&[300]), [(300 << 12, 4096)]);
    let newer = BalloonState {
        version: 2,
        ..state
    };
    let error = bench.balloon.restore(&newer).unwrap_err();
    assert!(error.to_string().contains("version 2"));
}
