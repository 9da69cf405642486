//! The real agent in a real guest, reached over the vsock device: the whole path from a launch to an answer.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use cloison_agent_api::agent::{HelloRequest, HelloResponse};
use cloison_agent_api::agent_ttrpc::AgentClient;
use cloison_agent_api::{AGENT_PORT, PROTOCOL};
use cloison_vmm::{Attachment, EndReason, Engine, State, VSOCK_SOCKET, VmProcess};
use ttrpc::r#async::{Client, transport::Socket};

use crate::support::{Bench, engine, wait};

crate::tests![
    an_agent_answers_over_the_stream_that_was_there_before_the_guest,
    an_agent_answers_whoever_connects_through_the_vsock_socket,
    a_vm_process_with_an_idle_guest_is_small,
    a_guest_with_the_least_memory_gets_as_far_as_its_agent,
    a_guest_with_two_vcpus_gets_as_far_as_its_agent,
];

/// Says hello over `stream`.
fn hello(bench: &Bench, stream: UnixStream) -> HelloResponse {
    stream.set_nonblocking(true).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let stream = tokio::net::UnixStream::from_std(stream).unwrap();
        let client = AgentClient::new(Client::new(Socket::new(stream)));
        let request = HelloRequest {
            protocol: PROTOCOL,
            ..Default::default()
        };
        let patience = ttrpc::context::with_duration(Duration::from_secs(60));
        client
            .hello(patience, &request)
            .await
            .unwrap_or_else(|error| {
                let log = bench.control().kernel_log();
                panic!("{error}; the guest's log:\n{}", log.unwrap_or_default());
            })
    })
}

/// Launches with a stream to the agent attached; returns when the agent has answered.
fn launch_and_greet(bench: &mut Bench) -> (VmProcess, HelloResponse) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let theirs = OwnedFd::from(theirs);
    bench.attachments.push(Attachment {
        port: AGENT_PORT,
        read: Some(theirs.try_clone().unwrap()),
        write: Some(theirs),
        done: None,
    });
    let begun = Instant::now();
    let process = bench.launch().unwrap();
    let answer = hello(bench, ours);
    println!(
        "    the agent answered after {} ms",
        begun.elapsed().as_millis()
    );
    (process, answer)
}

fn finish(bench: &Bench, mut process: VmProcess) {
    bench.control().kill().unwrap();
    assert_eq!(wait(&mut process).reason, EndReason::Killed);
}

fn an_agent_answers_over_the_stream_that_was_there_before_the_guest() {
    let Some(mut bench) = Bench::with_agent() else {
        return;
    };
    let (process, answer) = launch_and_greet(&mut bench);
    assert_eq!(answer.protocol, PROTOCOL);
    assert!(answer.kernel.ends_with("-cloison"), "{}", answer.kernel);
    assert_eq!(bench.control().status().unwrap().state, State::Running);
    finish(&bench, process);
}

fn an_agent_answers_whoever_connects_through_the_vsock_socket() {
    let Some(mut bench) = Bench::with_agent() else {
        return;
    };
    let (process, _) = launch_and_greet(&mut bench);
    let mut stream = UnixStream::connect(bench.path().join(VSOCK_SOCKET)).unwrap();
    writeln!(stream, "CONNECT {AGENT_PORT}").unwrap();
    let mut answer = String::new();
    BufReader::with_capacity(32, &stream)
        .read_line(&mut answer)
        .unwrap();
    assert!(answer.starts_with("OK "), "{answer}");
    assert_eq!(hello(&bench, stream).protocol, PROTOCOL);
    finish(&bench, process);
}

fn a_vm_process_with_an_idle_guest_is_small() {
    // Under KVM the guest's memory has no name by which it could be told apart; tests/bench/in-lab tells it by its place.
    if engine() != Engine::Software {
        return;
    }
    let Some(mut bench) = Bench::with_agent() else {
        return;
    };
    let (process, _) = launch_and_greet(&mut bench);
    let maps = std::fs::read_to_string(format!("/proc/{}/smaps", process.pid())).unwrap();
    let (guest, own) = proportional_sizes(&maps);
    println!("    PSS: {own} KiB of its own, {guest} KiB of guest memory that it shares with QEMU");
    let limit = if cfg!(debug_assertions) {
        12 << 10
    } else {
        6 << 10
    };
    assert!(own <= limit, "the VM process takes {own} KiB");
    finish(&bench, process);
}

/// Proportional set sizes, KiB: of guest memory, and of all else.
fn proportional_sizes(smaps: &str) -> (u64, u64) {
    let (mut guest, mut own, mut of_guest) = (0, 0, false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Pss:") => {
                let size: u64 = words.next().unwrap().parse().unwrap();
                if of_guest { guest += size } else { own += size }
            }
            Some(word) if !word.ends_with(':') => of_guest = line.contains("/memfd:"),
            _ => {}
        }
    }
    (guest, own)
}

fn a_guest_with_the_least_memory_gets_as_far_as_its_agent() {
    let Some(mut bench) = Bench::with_agent() else {
        return;
    };
    bench.spec.memory_mib = cloison_vmm::VmSpec::MIN_MEMORY_MIB;
    bench.spec.max_memory_mib = bench.spec.memory_mib;
    let (process, _) = launch_and_greet(&mut bench);
    finish(&bench, process);
}

fn a_guest_with_two_vcpus_gets_as_far_as_its_agent() {
    let Some(mut bench) = Bench::with_agent() else {
        return;
    };
    (bench.spec.vcpus, bench.spec.max_vcpus) = (2, 2);
    let (process, _) = launch_and_greet(&mut bench);
    finish(&bench, process);
}
