//! Guests that boot, and all the ways they can end.

use std::time::{Duration, Instant};

use cloison_vmm::{EndReason, Engine, State};

use crate::support::{Bench, engine, kill, readable, wait};

crate::tests![
    a_guest_that_says_so_and_reboots_has_shut_down,
    a_guest_that_reboots_without_a_word_was_reset,
    a_guest_that_panics_is_reported_with_its_reason_and_its_last_lines,
    a_killed_qemu_ends_a_running_guest,
    a_guest_that_floods_its_console_is_not_felt,
    a_paused_guest_stands_still_until_it_is_resumed,
];

fn a_guest_that_reboots_without_a_word_was_reset() {
    let Some(mut bench) = Bench::with_init("/busybox reboot -f") else {
        return;
    };
    let end = bench.run();
    assert_eq!(end.reason, EndReason::GuestReset, "{end:?}");
}

fn a_guest_that_says_so_and_reboots_has_shut_down() {
    let Some(mut bench) =
        Bench::with_init("echo cloison-agent: shutting down >/dev/hvc0; /busybox reboot -f")
    else {
        return;
    };
    let end = bench.run();
    assert_eq!(end.reason, EndReason::Shutdown, "{end:?}");
}

fn a_guest_that_panics_is_reported_with_its_reason_and_its_last_lines() {
    let Some(mut bench) = Bench::with_init("exit 3") else {
        return;
    };
    let end = bench.run();
    assert_eq!(end.reason, EndReason::GuestPanic, "{end:?}");
    assert!(
        end.message.contains("Attempted to kill init"),
        "{}",
        end.message
    );
    assert!(
        end.kernel_log_tail.contains("Kernel panic"),
        "{}",
        end.kernel_log_tail
    );
}

fn a_killed_qemu_ends_a_running_guest() {
    if engine() != Engine::Software {
        return;
    }
    let Some(mut bench) = Bench::with_init("echo ready >/dev/hvc0; /busybox sleep 1000") else {
        return;
    };
    let mut process = bench.launch().unwrap();
    let control = bench.control();
    let begun = Instant::now();
    while !control.kernel_log().unwrap().contains("ready") {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "no word from the guest"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let status = control.status().unwrap();
    assert_eq!(status.state, State::Running);
    kill(status.engine_pids[0] as i32);
    let end = wait(&mut process);
    assert_eq!(end.reason, EndReason::EngineFailed);
    assert!(end.kernel_log_tail.contains("ready"));
}

fn a_guest_that_floods_its_console_is_not_felt() {
    let Some(mut bench) = Bench::with_init("/busybox yes flood >/dev/hvc0") else {
        return;
    };
    let mut process = bench.launch().unwrap();
    let control = bench.control();
    let begun = Instant::now();
    while !control.kernel_log().unwrap().contains("flood") {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "no word from the guest"
        );
    }
    let pid = control.status().unwrap().pid;
    // What the guest itself has written to its kernel's data counts as the VM process's on the KVM engine, so only growth tells.
    let before = anonymous_kib(pid);
    let begun = Instant::now();
    let mut replies = 0;
    while begun.elapsed() < Duration::from_secs(5) {
        let asked = Instant::now();
        control.status().unwrap();
        assert!(
            asked.elapsed() < Duration::from_secs(2),
            "the flood delays the control socket"
        );
        replies += 1;
    }
    assert!(replies > 100, "{replies} replies");
    let growth = anonymous_kib(pid).saturating_sub(before);
    assert!(growth < 2048, "the VM process has grown by {growth} KiB");
    control.kill().unwrap();
    assert!(readable(&control));
    assert_eq!(wait(&mut process).reason, EndReason::Killed);
}

/// Memory of a process that is in no file, KiB.
pub fn anonymous_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon"));
    let size = line.unwrap().split_whitespace().nth(1).unwrap();
    size.parse().unwrap()
}

fn a_paused_guest_stands_still_until_it_is_resumed() {
    let script = "n=0; while true; do echo tick $n >/dev/hvc0; n=$((n + 1)); done";
    let Some(mut bench) = Bench::with_init(script) else {
        return;
    };
    let mut process = bench.launch().unwrap();
    let control = bench.control();
    let until_it_ticks = |since: &str| {
        let begun = Instant::now();
        loop {
            let log = control.kernel_log().unwrap();
            if log.contains("tick") && log != since {
                return log;
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "no tick");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    let mut log = until_it_ticks("");
    for _ in 0..20 {
        control.pause().unwrap();
        control.pause().unwrap();
        assert_eq!(control.status().unwrap().state, State::Paused);
        // What the guest had written before may still be on its way.
        std::thread::sleep(Duration::from_millis(20));
        log = control.kernel_log().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(control.kernel_log().unwrap(), log);
        control.resume().unwrap();
        control.resume().unwrap();
        assert_eq!(control.status().unwrap().state, State::Running);
        until_it_ticks(&log);
    }
    drop(log);
    control.pause().unwrap();
    control.kill().unwrap();
    assert_eq!(wait(&mut process).reason, EndReason::Killed);
}
