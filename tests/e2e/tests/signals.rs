//! Signals that the front end gets in the foreground.

use std::io::{BufRead, BufReader};
use std::process::Child;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::host::{Host, busybox};

fn send(child: &Child, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
}

/// A container that says each line the script prints; the first has been read.
fn started(host: &Host, script: &str) -> (Child, impl Iterator<Item = String> + use<>) {
    let image = busybox();
    let mut child = host.spawn(["run", "--rm", &image, "sh", "-c", script]);
    let mut lines = BufReader::new(child.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok);
    assert_eq!(lines.next().as_deref(), Some("ready"));
    (child, lines)
}

#[test]
fn signals_are_passed_on_to_the_process() {
    let host = Host::new();
    let script = "for s in HUP USR1 USR2 QUIT; do trap \"echo $s\" $s; done; trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done";
    let (mut child, mut lines) = started(&host, script);
    for (signal, name) in [
        (Signal::SIGHUP, "HUP"),
        (Signal::SIGUSR1, "USR1"),
        (Signal::SIGUSR2, "USR2"),
        (Signal::SIGQUIT, "QUIT"),
    ] {
        send(&child, signal);
        assert_eq!(lines.next().as_deref(), Some(name));
    }
    send(&child, Signal::SIGTERM);
    assert_eq!(child.wait().unwrap().code(), Some(7));
}

#[test]
fn an_interrupt_ends_a_process_that_does_not_catch_it() {
    let host = Host::new();
    let image = busybox();
    let mut child = host.spawn([
        "run",
        "--rm",
        "--init",
        &image,
        "sh",
        "-c",
        "echo ready; exec sleep 1000",
    ]);
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    send(&child, Signal::SIGINT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn a_process_that_ignores_three_interrupts_is_left_to_its_end() {
    let host = Host::new();
    let (mut child, mut lines) = started(
        &host,
        "trap 'echo no' INT; echo ready; while :; do sleep 0.1; done",
    );
    for _ in 0..2 {
        send(&child, Signal::SIGINT);
        assert_eq!(lines.next().as_deref(), Some("no"));
    }
    send(&child, Signal::SIGINT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn an_interrupt_before_the_process_runs_leaves_nothing() {
    let host = Host::new();
    let image = busybox();
    let mut child = host.spawn(["run", "--rm", &image, "sleep", "1000"]);
    // The VM process is there, so the front end catches signals, and the guest has hardly begun to boot.
    while host.processes().len() < 2 {
        assert!(child.try_wait().unwrap().is_none());
    }
    send(&child, Signal::SIGTERM);
    assert_eq!(child.wait().unwrap().code(), Some(143));
}
