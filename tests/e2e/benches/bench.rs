//! The figures of `docs/benchmarks.md` that are times, rates and sizes: each is printed with how it was taken. Run by
//! `tests/bench/run`; nothing here passes or fails.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a measurement that cannot go on is none"
)]

#[path = "../tests/host.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod host;

use std::fs;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use sha2::{Digest, Sha256};

use host::{Host, busybox, dist, succeed};

/// Pairs of runs of which the medians are compared.
const BOOTS: usize = 21;
/// Bytes piped through a container.
const STREAM: usize = 1 << 30;

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn timed(mut command: Command) -> Duration {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let start = Instant::now();
    assert!(command.status().unwrap().success(), "{command:?} failed");
    start.elapsed()
}

/// The same kernel on the same machine, with nothing attached to it, to an init that ends it. The options and words are those of
/// the engine (`runtime/vmm/src/software/command.rs`) that are there for speed, whoever's start they speed up.
fn bare() -> Command {
    let mut qemu = Command::new("qemu-system-x86_64");
    let initramfs = std::env::var_os("CLOISON_BARE_INITRAMFS").unwrap();
    qemu.args(["-nodefaults", "-no-user-config", "-no-reboot"])
        .args(["-display", "none", "-accel", "tcg"])
        .args(["-cpu", "max,-erms,-fsrm"])
        .args(["-machine", BARE_MACHINE])
        .args(["-m", "1024M", "-object"])
        .arg("memory-backend-memfd,id=ram,share=on,size=1024M")
        .arg("-kernel")
        .arg(dist().join("vmlinux"))
        .arg("-initrd")
        .arg(PathBuf::from(initramfs))
        .args(["-append", BARE_COMMAND_LINE]);
    qemu
}

const BARE_MACHINE: &str =
    "microvm,pit=on,pic=on,rtc=on,acpi=off,x-option-roms=off,isa-serial=off,memory-backend=ram";
const BARE_COMMAND_LINE: &str =
    "quiet panic=-1 reboot=t noreplace-smp no_timer_check tsc=reliable nolapic_timer";

/// Processor time of all child processes that have ended so far, with their own.
fn processor_time() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap();
    let parts = [usage.user_time(), usage.system_time()];
    parts
        .map(|time| Duration::from_micros(time.num_microseconds().unsigned_abs()))
        .iter()
        .sum()
}

/// Wall and processor time of one run.
fn measured(command: Command) -> (Duration, Duration) {
    let before = processor_time();
    let wall = timed(command);
    (wall, processor_time() - before)
}

fn start_up() {
    let host = Host::new();
    let image = busybox();
    let run = || host.command(["run", "--rm", &image, "true"]);
    timed(run());
    succeed(&host.cloison(["prune", "-f"]));
    println!(
        "start-up, wall time of the first, which makes the template: {} ms",
        timed(run()).as_millis()
    );
    timed(bare());
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..BOOTS {
        theirs.push(measured(bare()));
        ours.push(measured(run()));
    }
    let (our_wall, our_work) = ours.into_iter().unzip();
    let (their_wall, their_work) = theirs.into_iter().unzip();
    for (what, ours, theirs) in [
        ("wall", our_wall, their_wall),
        ("processor", our_work, their_work),
    ] {
        let (ours, theirs) = (median(ours), median(theirs));
        println!(
            "start-up, {what} time: cloison run --rm IMAGE true {} ms, bare QEMU boot of the same kernel {} ms, ratio {:.2} (medians of {BOOTS} alternating runs)",
            ours.as_millis(),
            theirs.as_millis(),
            ours.as_secs_f64() / theirs.as_secs_f64()
        );
    }
}

/// A field of /proc/PID/status or smaps_rollup, KiB.
fn kib(pid: i32, file: &str, field: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .unwrap_or("0");
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// The host processes of the containers that are not an emulator's.
fn ours(host: &Host) -> Vec<(i32, String)> {
    let mut processes = host.processes();
    processes.retain(|(_, command)| !command.contains("qemu"));
    processes
}

fn stream() {
    let host = Host::new();
    let image = busybox();
    let mut child = host.spawn(["run", "--rm", "-i", &image, "cat"]);
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    // The guest must be up before the clock starts.
    stdin.write_all(&[0]).unwrap();
    stdout.read_exact(&mut [0]).unwrap();
    let processes: Vec<i32> = ours(&host).into_iter().map(|(pid, _)| pid).collect();
    // What is left out is memory of the guest's that the VM process has touched, which is QEMU's in the first place.
    let resident = || {
        let own = |pid| kib(pid, "status", "RssAnon:") + kib(pid, "status", "RssFile:");
        processes.iter().map(|&pid| own(pid)).sum::<u64>()
    };
    let before = resident();

    let start = Instant::now();
    let writer = std::thread::spawn(move || {
        let mut hash = Sha256::new();
        let block: Vec<u8> = (0..1u32 << 20)
            .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect();
        for _ in 0..STREAM / block.len() {
            hash.update(&block);
            stdin.write_all(&block).unwrap();
        }
        drop(stdin);
        hash.finalize()
    });
    let mut hash = Sha256::new();
    let mut block = vec![0u8; 1 << 20];
    let (mut total, mut peak) = (0, before);
    loop {
        let count = stdout.read(&mut block).unwrap();
        if count == 0 {
            break;
        }
        hash.update(&block[..count]);
        if total / (STREAM / 16) != (total + count) / (STREAM / 16) {
            peak = peak.max(resident());
        }
        total += count;
    }
    let elapsed = start.elapsed();
    assert_eq!(total, STREAM);
    assert_eq!(
        hash.finalize(),
        writer.join().unwrap(),
        "the stream did not arrive intact"
    );
    assert!(child.wait().unwrap().success());
    println!(
        "stream: 1 GiB through `cloison run -i IMAGE cat` intact at {:.0} MB/s; front end and VM process together {before} KiB resident before, {peak} KiB at most",
        STREAM as f64 / 1e6 / elapsed.as_secs_f64()
    );
}

fn idle() {
    let host = Host::new();
    let id = host.detached(&[], &["sleep", "1000"]);
    let ours = ours(&host);
    let pss: Vec<u64> = ours
        .iter()
        .map(|(pid, _)| kib(*pid, "smaps_rollup", "Pss:"))
        .collect();
    println!(
        "idle: {} host processes of one idle container, {} KiB PSS together ({pss:?} each)",
        ours.len(),
        pss.iter().sum::<u64>()
    );
    succeed(&host.cloison(["rm", "-f", &id]));
}

fn main() {
    start_up();
    stream();
    idle();
}
