//! Descriptors that a process has beside stdio.

use std::fs;

use cloison_agent_api::SHARED_DIR;
use cloison_agent_api::agent::descriptor::What;
use cloison_agent_api::agent::{Descriptor, File};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use ttrpc::Code;

use crate::agent::{Guest, process, refused, script};

/// Says the numbers of a shell's descriptors, and one more: that of the directory that ls reads.
const NUMBERS: &str = "echo $(ls /proc/self/fd)";

fn descriptor(what: What) -> Descriptor {
    Descriptor {
        what: Some(what),
        ..Default::default()
    }
}

fn file(path: &str) -> File {
    File {
        path: path.into(),
        read: true,
        ..Default::default()
    }
}

async fn read(stream: &mut UnixStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

pub async fn a_process_has_what_is_preserved_and_nothing_else(guest: Guest) {
    fs::create_dir_all(SHARED_DIR).unwrap();
    let path = format!("{SHARED_DIR}/digits");
    fs::write(&path, "0123456789").unwrap();
    let text = format!("{NUMBERS}; cat <&3; echo four >&4; cat <&5; echo answer >&5; cat <&6");
    let preserved = |ports: [u32; 3]| {
        let digits = File {
            offset: 4,
            ..file(&path)
        };
        let [three, four, five] = ports;
        [
            What::Input(three),
            What::Output(four),
            What::Socket(five),
            What::File(digits),
        ]
        .map(descriptor)
        .into()
    };
    let sleeper = guest.run(&script("sleep 1000")).await;
    for in_exec in [false, true] {
        let (three, mut host_three) = guest.stream();
        let (four, mut host_four) = guest.stream();
        let (five, mut host_five) = guest.stream();
        let preserved = preserved([three, four, five]);
        let mut container = match in_exec {
            false => {
                let mut spec = script(&text);
                spec["process"]["user"] = json!({"uid": 33, "gid": 33});
                let container = guest.create_with(&spec, preserved).await.unwrap();
                container.start().await.unwrap();
                container
            }
            true => {
                let mut shell = process();
                shell["args"] = json!(["sh", "-c", text]);
                sleeper
                    .exec_with("preserved", shell, preserved)
                    .await
                    .unwrap()
            }
        };
        host_three.write_all(b"three\n").await.unwrap();
        drop(host_three);
        host_five.write_all(b"question\n").await.unwrap();
        host_five.shutdown().await.unwrap();
        let said = container.streams.output().await;
        assert_eq!(said, "0 1 2 3 4 5 6 7\nthree\nquestion\n456789");
        assert_eq!(read(&mut host_four).await, "four\n");
        assert_eq!(read(&mut host_five).await, "answer\n");
        assert_eq!(container.wait().await.exit_code, 0);
        if !in_exec {
            container.delete(false).await.unwrap();
        }
    }
    sleeper.delete(true).await.unwrap();
    fs::remove_file(path).unwrap();
}

pub async fn many_preserved_descriptors_are_in_nobodys_way(guest: Guest) {
    let (ports, mut hosts): (Vec<_>, Vec<_>) = (0..64).map(|_| guest.stream()).unzip();
    let preserved = ports.into_iter().map(|port| descriptor(What::Output(port)));
    let spec = script(&format!(
        "{NUMBERS} | wc -w; for n in $(seq 3 66); do eval \"echo $n >&$n\"; done"
    ));
    let mut container = guest.create_with(&spec, preserved.collect()).await.unwrap();
    container.start().await.unwrap();
    for (number, host) in (3..).zip(&mut hosts) {
        assert_eq!(read(host).await, format!("{number}\n"));
    }
    assert_eq!(container.streams.output().await, "68\n");
    assert_eq!(container.wait().await.exit_code, 0);
    container.delete(false).await.unwrap();
}

pub async fn what_cannot_be_preserved_is_refused_and_leaves_nothing(guest: Guest) {
    let spec = script("true");
    let input = || descriptor(What::Input(1));
    for (preserved, text) in [
        (vec![Descriptor::new()], "3 is nothing"),
        (vec![descriptor(What::Socket(0))], "3 has no port"),
        (
            vec![descriptor(What::File(file("/etc/passwd")))],
            "/etc/passwd",
        ),
        (vec![input(); 65], "65 of them"),
    ] {
        let created = guest.create_with(&spec, preserved).await;
        refused(created, Code::INVALID_ARGUMENT, text);
    }
    let missing = descriptor(What::File(file(&format!("{SHARED_DIR}/missing"))));
    let created = guest.create_with(&spec, vec![missing]).await;
    refused(created, Code::INTERNAL, "opening");
    let unknown = descriptor(What::Output(u32::MAX));
    let created = guest.create_with(&spec, vec![unknown]).await;
    refused(created, Code::INTERNAL, "port 4294967295");
    let null = descriptor(What::File(file("/dev/null")));
    let container = guest.create_with(&spec, vec![null]).await.unwrap();
    container.delete(true).await.unwrap();
}
