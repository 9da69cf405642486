//! Standard streams and terminals.

use std::time::Instant;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::agent::{Guest, script, spec};

pub async fn standard_streams_are_separate(guest: Guest) {
    let mut container = guest.run(&script("cat; echo out; echo err >&2")).await;
    let mut stdin = container.streams.stdin.take().unwrap();
    stdin.write_all(b"in\n").await.unwrap();
    drop(stdin);
    assert_eq!(container.streams.output().await, "in\nout\n");
    assert_eq!(container.streams.errors().await, "err\n");
    assert_eq!(container.wait().await.exit_code, 0);
    container.delete(false).await.unwrap();
}

pub async fn megabytes_pass_through_a_container_unchanged(guest: Guest) {
    let mut container = guest.run(&script("cat | cat")).await;
    let sent: Vec<u8> = (0..6_000_011_u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let mut stdin = container.streams.stdin.take().unwrap();
    let copy = sent.clone();
    let writer = tokio::spawn(async move {
        stdin.write_all(&copy).await.unwrap();
        stdin.shutdown().await.unwrap();
        stdin
    });
    let mut received = Vec::new();
    container
        .streams
        .stdout
        .as_mut()
        .unwrap()
        .read_to_end(&mut received)
        .await
        .unwrap();
    assert!(
        received == sent,
        "{} bytes of {}",
        received.len(),
        sent.len()
    );
    writer.await.unwrap();
    container.wait().await;
    container.delete(false).await.unwrap();
}

pub async fn stdout_can_be_opened_again_by_any_user(guest: Guest) {
    for uid in [0, 33] {
        let mut spec = spec();
        spec["process"]["user"] = json!({"uid": uid, "gid": uid});
        let (code, output) = guest
            .shell(spec, "echo one >/dev/stdout; echo two >/proc/self/fd/1")
            .await;
        assert_eq!((code, output.as_str()), (0, "one\ntwo\n"), "as user {uid}");
    }
}

pub async fn a_writer_nobody_reads_gets_sigpipe(guest: Guest) {
    let mut container = guest.run(&script("yes; echo $? >&2")).await;
    let mut some = [0; 1000];
    container
        .streams
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut some)
        .await
        .unwrap();
    container.streams.stdout = None;
    assert_eq!(container.streams.errors().await, "141\n");
    container.wait().await;
    container.delete(false).await.unwrap();
    let mut spec = spec();
    spec["process"]["args"] = json!(["grep", "-E", "Sig(Ign|Blk)", "/proc/self/status"]);
    let mut container = guest.run(&spec).await;
    let ignored = container.streams.output().await;
    container.wait().await;
    container.delete(false).await.unwrap();
    assert_eq!(ignored.matches("0000000000000000").count(), 2, "{ignored}");
}

fn terminal(text: &str) -> serde_json::Value {
    let mut spec = script(text);
    spec["process"]["terminal"] = json!(true);
    spec
}

pub async fn a_terminal_has_its_size_and_follows_a_resize(guest: Guest) {
    let mut container = guest
        .run(&terminal(
            "stty size; test -t 2 && echo tty; trap 'stty size' WINCH; read x; echo \"read $x\"; while true; do sleep 0.1; done",
        ))
        .await;
    container.streams.expect("33 101\r\ntty\r\n").await;
    container.streams.type_in("go\n").await;
    // By what the shell says, and not by the terminal's echo, the trap is set.
    container.streams.expect("read go\r\n").await;
    container.resize(70_000, 1).await.unwrap_err();
    container.resize(120, 40).await.unwrap();
    container.streams.expect("40 120").await;
    container.signal(9, true).await.unwrap();
    container.wait().await;
    container.delete(false).await.unwrap();
}

pub async fn a_terminal_belongs_to_the_user_and_passes_ctrl_c(guest: Guest) {
    let mut spec = terminal(
        "echo again >/dev/tty; trap 'echo stopped; exit 4' INT; echo ready; while true; do sleep 1; done",
    );
    spec["process"]["user"] = json!({"uid": 33, "gid": 33});
    let mut container = guest.run(&spec).await;
    container.streams.expect("again\r\nready").await;
    container.streams.type_in("\u{3}").await;
    container.streams.expect("stopped").await;
    assert_eq!(container.wait().await.exit_code, 4);
    container.delete(false).await.unwrap();
}

pub async fn a_terminal_that_is_hung_up_ends_its_shell(guest: Guest) {
    let mut container = guest
        .run(&terminal(
            "trap 'exit 6' HUP; echo tick; while true; do sleep 0.1; done",
        ))
        .await;
    container.streams.expect("tick").await;
    container.streams.stdin = None;
    assert_eq!(container.wait().await.exit_code, 6);
    container.delete(false).await.unwrap();
}

pub async fn throughput_of_a_stream(guest: Guest) {
    const BYTES: usize = 64 << 20;
    let mut container = guest.run(&script("cat")).await;
    let mut stdin = container.streams.stdin.take().unwrap();
    let begun = Instant::now();
    let writer = tokio::spawn(async move {
        let block = vec![1; 1 << 20];
        for _ in 0..BYTES >> 20 {
            stdin.write_all(&block).await.unwrap();
        }
    });
    let mut stdout = container.streams.stdout.take().unwrap();
    let (mut total, mut buffer) = (0, vec![0; 1 << 20]);
    loop {
        match stdout.read(&mut buffer).await.unwrap() {
            0 => break,
            count => total += count,
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    writer.await.unwrap();
    assert_eq!(total, BYTES);
    // Both of the host's ends run in this guest too, so this is well below what a host sees.
    println!(
        "throughput through cat: {:.0} MB/s",
        BYTES as f64 / 1e6 / seconds
    );
    container.wait().await;
    container.delete(false).await.unwrap();
}
