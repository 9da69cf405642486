//! The rate of the time stamp counter, which TCG lets its guests read as it is. A kernel left to itself measures it against an emulated
//! timer at its boot, and where the host is busy meanwhile it gives up and has no clock finer than its tick of 4 ms, the guests of a
//! template that is made then for as long as the host is up.

use std::arch::x86_64::_rdtsc;
use std::hint::spin_loop;

use nix::time::{ClockId, clock_gettime};

/// How long the counter is watched, ns. What is uncertain of the two readings, some 40 ns, is a fiftieth of a thousandth of that.
const WATCHED: i64 = 2_000_000;

/// Readings of which the most certain is taken.
const READINGS: usize = 8;

/// What a counter may run at, kHz; the kernel would believe any number.
const PLAUSIBLE: std::ops::Range<i64> = 100_000..20_000_000;

/// Both clocks at one moment.
#[derive(Clone, Copy)]
struct Reading {
    ticks: i64,
    nanoseconds: i64,
    /// Ticks within which the other clock was read.
    doubt: i64,
}

/// Measures the rate in kHz by the host's clock, which a discipline of it (NTP) does not touch. None where the result could not be of a
/// counter that keeps time.
pub(super) fn measure_khz() -> Option<i64> {
    let first = read()?;
    loop {
        let last = read()?;
        let (ticks, nanoseconds) = (
            last.ticks.checked_sub(first.ticks)?,
            last.nanoseconds - first.nanoseconds,
        );
        if nanoseconds >= WATCHED {
            let khz = ticks.checked_mul(1_000_000)? / nanoseconds;
            return PLAUSIBLE.contains(&khz).then_some(khz);
        }
        spin_loop();
    }
}

fn read() -> Option<Reading> {
    let readings = (0..READINGS).map(|_| {
        let before = ticks();
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC_RAW).ok()?;
        let doubt = ticks().checked_sub(before)?;
        Some(Reading {
            ticks: before + doubt / 2,
            nanoseconds: now.tv_sec() * 1_000_000_000 + now.tv_nsec(),
            doubt,
        })
    });
    readings.flatten().min_by_key(|reading| reading.doubt)
}

fn ticks() -> i64 {
    // SAFETY: every x86-64 processor has the instruction, and it only reads.
    let ticks = unsafe { _rdtsc() };
    ticks.cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree_to_a_thousandth() {
        let (one, other) = (measure_khz().unwrap(), measure_khz().unwrap());
        assert!((one - other).abs() * 1_000 < one, "{one} and {other} kHz");
    }
}
