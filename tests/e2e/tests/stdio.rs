//! Standard streams: whole, separate, in order, with their ends.

use std::fs::File;
use std::io::{Read, Write};
use std::process::Stdio;

use sha2::{Digest, Sha256};

use crate::host::{Host, busybox, emulated, succeed, text};

#[test]
fn stdout_and_stderr_stay_separate() {
    let host = Host::new();
    let output = host.run(&[], &["sh", "-c", "echo out; echo err >&2; exit 3"]);
    assert_eq!(text(&output.stdout), "out\n");
    let stderr = text(&output.stderr);
    let own: Vec<&str> = stderr
        .lines()
        .filter(|line| !line.starts_with("cloison: "))
        .collect();
    assert_eq!((own, output.status.code()), (vec!["err"], Some(3)));
}

#[test]
fn a_large_stream_arrives_whole_in_both_directions() {
    let rounds = if emulated() { 16 } else { 64u32 };
    let host = Host::new();
    let image = busybox();
    let mut child = host.spawn(["run", "--rm", "-i", &image, "cat"]);
    let mut stdin = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || {
        let mut hash = Sha256::new();
        let mut block = vec![0u8; 1 << 20];
        for round in 0..rounds {
            for (place, byte) in block.iter_mut().enumerate() {
                *byte = (place as u32)
                    .wrapping_mul(2_654_435_761)
                    .wrapping_add(round) as u8;
            }
            hash.update(&block);
            stdin.write_all(&block).unwrap();
        }
        hash.finalize()
    });
    let mut hash = Sha256::new();
    let mut out = child.stdout.take().unwrap();
    let mut block = vec![0u8; 1 << 16];
    let mut total = 0;
    loop {
        let count = out.read(&mut block).unwrap();
        if count == 0 {
            break;
        }
        total += count;
        hash.update(&block[..count]);
    }
    assert_eq!(total, (rounds as usize) << 20);
    assert_eq!(hash.finalize(), writer.join().unwrap());
    assert!(child.wait().unwrap().success());
}

#[test]
fn the_end_of_stdin_reaches_the_process_while_its_output_goes_on() {
    let host = Host::new();
    let image = busybox();
    let mut child = host.spawn([
        "run",
        "--rm",
        "-i",
        &image,
        "sh",
        "-c",
        "wc -c; sleep 0.3; echo after",
    ]);
    child.stdin.take().unwrap().write_all(b"12345").unwrap();
    assert_eq!(succeed(&child.wait_with_output().unwrap()), "5\nafter\n");
}

#[test]
fn without_interactive_stdin_is_empty() {
    let host = Host::new();
    let image = busybox();
    let mut child = host.spawn(["run", "--rm", &image, "wc", "-c"]);
    // The front end never reads this, and may be gone before it is written.
    let _ = child.stdin.take().unwrap().write_all(b"unseen");
    assert_eq!(succeed(&child.wait_with_output().unwrap()), "0\n");
}

#[test]
fn a_reader_that_goes_away_ends_the_writer() {
    let host = Host::new();
    let image = busybox();
    let mut child = host.spawn(["run", "--rm", "--init", &image, "yes"]);
    let mut some = [0u8; 1000];
    child.stdout.take().unwrap().read_exact(&mut some).unwrap();
    let status = child.wait().unwrap();
    assert!(!status.success(), "{status}");
    assert!(some.starts_with(b"y\ny\n"));
}

#[test]
fn files_work_as_streams_and_keep_their_offset() {
    let host = Host::new();
    let image = busybox();
    let input = host.file("in", "from a file\n");
    let output = File::create(host.path("out")).unwrap();
    (&output).write_all(b"before\n").unwrap();
    let mut command = host.command(["run", "--rm", "-i", &image, "cat"]);
    command
        .stdin(File::open(input).unwrap())
        .stdout(output.try_clone().unwrap());
    assert!(command.status().unwrap().success());
    (&output).write_all(b"after\n").unwrap();
    let written = std::fs::read_to_string(host.path("out")).unwrap();
    assert_eq!(written, "before\nfrom a file\nafter\n");
}

#[test]
fn the_callers_own_descriptors_stay_blocking() {
    let host = Host::new();
    let image = busybox();
    let (reader, writer) = std::io::pipe().unwrap();
    let mut command = host.command(["run", "--rm", "-i", &image, "true"]);
    command.stdin(Stdio::from(reader.try_clone().unwrap()));
    assert!(command.status().unwrap().success());
    let flags = nix::fcntl::fcntl(&reader, nix::fcntl::FcntlArg::F_GETFL).unwrap();
    assert_eq!(flags & nix::libc::O_NONBLOCK, 0);
    drop(writer);
}

#[test]
fn all_output_arrives_before_the_command_returns() {
    let host = Host::new();
    let lines = host.stdout(&[], &["seq", "1", "20000"]);
    assert_eq!(lines.lines().count(), 20_000);
    assert!(lines.ends_with("\n20000\n"));
}
