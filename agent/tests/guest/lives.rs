//! A container's life and end.

use std::fs;
use std::path::Path;
use std::time::Instant;

use cloison_agent_api::agent::{HelloRequest, ShutdownRequest, Status};
use cloison_agent_api::{MAX_ENTROPY, PROTOCOL};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use ttrpc::Code;

use crate::agent::{Guest, context, refusal, refused, script, spec};

pub async fn hello_agrees_on_the_protocol_and_sets_the_clock(guest: Guest) {
    let mut request = HelloRequest::new();
    request.protocol = PROTOCOL;
    request.realtime_ns = 2_000_000_000_000_000_000;
    let response = guest.client.hello(context(), &request).await.unwrap();
    assert_eq!(response.protocol, PROTOCOL);
    assert!(response.kernel.starts_with("6."), "{}", response.kernel);
    assert!(response.memory_bytes > 100 << 20);
    let clock = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    assert_eq!(clock.as_secs() / 1000, 2_000_000);

    let random = || std::fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap();
    let before = random();
    for (length, taken) in [(1, true), (MAX_ENTROPY, true), (MAX_ENTROPY + 1, false)] {
        request.entropy = vec![7; length];
        let response = guest.client.hello(context(), &request).await;
        assert_eq!(response.is_ok(), taken, "{length} bytes");
    }
    assert_ne!(random(), before);
    request.entropy.clear();

    request.protocol = 99;
    let refused = guest
        .client
        .hello(context(), &request)
        .await
        .map_err(refusal)
        .unwrap_err();
    assert_eq!(refused.0, Code::FAILED_PRECONDITION);
    assert!(
        refused.1.contains(&format!("protocol {PROTOCOL}")) && refused.1.contains("99"),
        "{}",
        refused.1
    );
}

/// With `agent/tests/run --icount` a microsecond is a thousand instructions.
pub async fn cost_of_a_container(guest: Guest) {
    let mut filtered = script("echo; read x");
    filtered["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [{"action": "SCMP_ACT_ALLOW", "names": crate::security::SYSTEM_CALLS}],
    });
    for (what, spec) in [
        ("first", script("echo; read x")),
        ("second", script("echo; read x")),
        ("filtered", filtered),
    ] {
        let begun = Instant::now();
        let mut container = guest.create(&spec).await.unwrap();
        let created = begun.elapsed();
        container.start().await.unwrap();
        let started = begun.elapsed();
        container
            .streams
            .stdout
            .as_mut()
            .unwrap()
            .read_u8()
            .await
            .unwrap();
        let heard = begun.elapsed();
        assert_eq!(
            container
                .exec_shell(crate::agent::process(), "true")
                .await
                .0,
            0
        );
        let executed = begun.elapsed();
        container.streams.stdin = None;
        container.wait().await;
        let ended = begun.elapsed();
        container.delete(false).await.unwrap();
        println!(
            "cost of the {what} container: create {} us, start {} us, first byte {} us, exec {} us, end {} us, \
             delete {} us",
            created.as_micros(),
            (started - created).as_micros(),
            (heard - started).as_micros(),
            (executed - heard).as_micros(),
            (ended - executed).as_micros(),
            (begun.elapsed() - ended).as_micros(),
        );
    }
}

pub async fn a_container_runs_and_says_how_it_ended(guest: Guest) {
    let mut container = guest.create(&script("echo hello; exit 7")).await.unwrap();
    assert_eq!(container.state().await.unwrap().0, Status::CREATED);
    container.start().await.unwrap();
    assert_eq!(container.streams.output().await, "hello\n");
    for _ in 0..2 {
        let wait = container.wait().await;
        assert_eq!(
            (wait.exit_code, wait.signal, wait.oom_killed),
            (7, 0, false)
        );
        assert!(wait.exited_at_ns > 0);
    }
    assert_eq!(container.state().await.unwrap().0, Status::STOPPED);
    container.delete(false).await.unwrap();
    refused(
        container.state().await,
        Code::NOT_FOUND,
        "no such container",
    );
}

pub async fn a_container_killed_by_a_signal_says_so(guest: Guest) {
    for (trap, signal, code) in [("", 9, 137), ("trap 'exit 3' TERM;", 15, 3)] {
        let text = format!("{trap} echo up; while true; do sleep 1; done");
        let mut container = guest.run(&script(&text)).await;
        let mut up = [0; 3];
        tokio::io::AsyncReadExt::read_exact(container.streams.stdout.as_mut().unwrap(), &mut up)
            .await
            .unwrap();
        refused(
            container.signal(65, false).await,
            Code::INVALID_ARGUMENT,
            "signal",
        );
        container.signal(0, false).await.unwrap();
        container.signal(signal, false).await.unwrap();
        assert_eq!(container.wait().await.exit_code, code);
        refused(
            container.signal(15, false).await,
            Code::NOT_FOUND,
            "no such process",
        );
        refused(
            container.signal(15, true).await,
            Code::NOT_FOUND,
            "no such process",
        );
        container.delete(false).await.unwrap();
    }
}

pub async fn every_verb_is_refused_in_the_wrong_state(guest: Guest) {
    let container = guest.create(&script("sleep 1000")).await.unwrap();
    refused(
        container.pause().await,
        Code::FAILED_PRECONDITION,
        "not started",
    );
    refused(
        container.delete(false).await,
        Code::FAILED_PRECONDITION,
        "not started",
    );
    refused(
        container.resume().await,
        Code::FAILED_PRECONDITION,
        "not started",
    );
    container.start().await.unwrap();
    refused(
        container.start().await,
        Code::FAILED_PRECONDITION,
        "running",
    );
    refused(
        container.resume().await,
        Code::FAILED_PRECONDITION,
        "running",
    );
    refused(
        container.delete(false).await,
        Code::FAILED_PRECONDITION,
        "running",
    );
    refused(
        container.resize(80, 24).await,
        Code::FAILED_PRECONDITION,
        "no terminal",
    );
    container.signal(9, true).await.unwrap();
    container.wait().await;
    refused(
        container.start().await,
        Code::FAILED_PRECONDITION,
        "stopped",
    );
    refused(
        container.pause().await,
        Code::FAILED_PRECONDITION,
        "stopped",
    );
    refused(
        container.update(json!({})).await,
        Code::FAILED_PRECONDITION,
        "stopped",
    );
    refused(
        container.exec(crate::agent::process()).await,
        Code::FAILED_PRECONDITION,
        "stopped",
    );
    container.delete(false).await.unwrap();
}

pub async fn unknown_names_are_not_found(guest: Guest) {
    let mut container = guest.run(&script("sleep 1000")).await;
    container.exec = "nobody".into();
    refused(
        container.try_wait().await,
        Code::NOT_FOUND,
        "no such exec: nobody",
    );
    container.exec = "a/b".into();
    refused(
        container.try_wait().await,
        Code::INVALID_ARGUMENT,
        "invalid exec ID",
    );
    let id = std::mem::replace(&mut container.id, "nobody".into());
    refused(
        container.start().await,
        Code::NOT_FOUND,
        "no such container: nobody",
    );
    container.id = "../etc".into();
    refused(
        container.start().await,
        Code::INVALID_ARGUMENT,
        "invalid container ID",
    );
    container.id = id;
    container.delete(true).await.unwrap();
}

pub async fn a_broken_spec_is_refused_and_leaves_nothing(guest: Guest) {
    let before = leftovers();
    let mut no_root = spec();
    no_root["root"]["path"] = json!("/no/such/root");
    let mut no_source = spec();
    let bad = json!({"destination": "/x", "type": "bind", "source": "/no/such/file", "options": ["bind"]});
    no_source["mounts"].as_array_mut().unwrap().push(bad);
    let mut no_filesystem = spec();
    let bad = json!({"destination": "/x", "type": "nofs", "source": "nofs"});
    no_filesystem["mounts"].as_array_mut().unwrap().push(bad);
    for (spec, text) in [
        (no_root, "No such file"),
        (no_source, "/no/such/file"),
        (no_filesystem, "nofs"),
    ] {
        refused(guest.create(&spec).await, Code::INTERNAL, text);
    }
    let mut hostname = spec();
    hostname["linux"]["namespaces"] = json!([{"type": "mount"}]);
    refused(
        guest.create(&hostname).await,
        Code::INTERNAL,
        "UTS namespace",
    );
    let mut empty = spec();
    empty["process"]["args"] = json!([]);
    refused(
        guest.create(&empty).await,
        Code::INVALID_ARGUMENT,
        "args is empty",
    );
    assert_eq!(leftovers(), before);
}

pub async fn a_program_that_is_not_there_is_not_found(guest: Guest) {
    for (program, text) in [
        ("nope", "exec: \"nope\": executable file not found in $PATH"),
        (
            "/bin/nope",
            "exec: \"/bin/nope\": no such file or directory",
        ),
    ] {
        let mut spec = spec();
        spec["process"]["args"] = json!([program]);
        refused(guest.create(&spec).await, Code::NOT_FOUND, text);
    }
}

pub async fn a_file_that_cannot_be_executed_is_permission_denied(guest: Guest) {
    for (program, uid, text) in [
        ("/etc/data", 0, "permission denied"),
        ("/etc", 0, "is a directory"),
        ("/bin/secret", 33, "permission denied"),
    ] {
        let mut spec = spec();
        spec["process"]["args"] = json!([program]);
        spec["process"]["user"] = json!({"uid": uid, "gid": uid});
        refused(guest.create(&spec).await, Code::PERMISSION_DENIED, text);
    }
    // Only executing it shows that this is no program.
    let mut spec = spec();
    spec["process"]["args"] = json!(["nonsense"]);
    let container = guest.create(&spec).await.unwrap();
    refused(
        container.start().await,
        Code::PERMISSION_DENIED,
        "exec format error",
    );
    container.wait().await;
    container.delete(false).await.unwrap();
}

fn leftovers() -> Vec<String> {
    let mut found = Vec::new();
    for directory in [
        "/run/cloison/state",
        "/run/cloison/bundle",
        "/run/cloison/console",
        "/sys/fs/cgroup/cloison",
    ] {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        let names =
            entries.filter(|e| e.file_type().unwrap().is_dir() || !directory.starts_with("/sys"));
        found.extend(names.map(|e| e.path().display().to_string()));
    }
    found.sort();
    found
}

pub async fn deleting_leaves_nothing_in_the_guest(guest: Guest) {
    assert_eq!(leftovers(), Vec::<String>::new());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let descriptors = fs::read_dir("/proc/self/fd").unwrap().count();
    let mut with_terminal = script("mkdir /sys/fs/cgroup/x; sleep 1000 & sleep 1000");
    with_terminal["process"]["terminal"] = json!(true);
    for spec in [script("sleep 1000 & sleep 1000"), with_terminal] {
        let container = guest.run(&spec).await;
        container
            .exec(
                json!({"user": {"uid": 0, "gid": 0}, "args": ["sleep", "1000"], "cwd": "/",
            "env": ["PATH=/bin"]}),
            )
            .await
            .unwrap();
        assert!(!leftovers().is_empty());
        container.delete(true).await.unwrap();
        assert_eq!(leftovers(), Vec::<String>::new());
    }
    assert_eq!(fs::read_to_string("/proc/self/mountinfo").unwrap(), mounts);
    tokio::task::yield_now().await;
    let now = fs::read_dir("/proc/self/fd").unwrap().count();
    assert!(
        now <= descriptors + 1,
        "{now} descriptors, {descriptors} before"
    );
}

pub async fn orphans_are_reaped(guest: Guest) {
    // In the guest's own PID namespace the children of a dead shell become the agent's.
    let mut spec = script("for i in $(seq 20); do (sleep 0.2 & ); done; echo done");
    spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "uts"}]);
    let container = guest.run(&spec).await;
    assert_eq!(container.wait().await.exit_code, 0);
    while !container.processes().await.is_empty() {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    container.delete(true).await.unwrap();
    let zombies = fs::read_dir("/proc").unwrap().flatten().filter(|entry| {
        let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        status.contains("State:\tZ") && status.contains("PPid:\t1\n")
    });
    assert_eq!(zombies.count(), 0);
}

pub async fn containers_are_created_side_by_side(guest: Guest) {
    let all: Vec<_> = (0..8)
        .map(|number| {
            let guest = guest.clone();
            tokio::spawn(async move {
                guest
                    .shell(spec(), &format!("echo {number}; exit {number}"))
                    .await
            })
        })
        .collect();
    for (number, task) in all.into_iter().enumerate() {
        assert_eq!(task.await.unwrap(), (number as u32, format!("{number}\n")));
    }
    let mut same = script("sleep 1000");
    same["linux"]["cgroupsPath"] = json!("/cloison/same");
    let first = guest.create(&same).await.unwrap();
    refused(
        guest.create(&same).await,
        Code::INVALID_ARGUMENT,
        "another container uses cgroup",
    );
    let id = first.id.clone();
    let mut request = cloison_agent_api::agent::CreateContainerRequest::new();
    request.container_id = id;
    request.spec = spec().to_string().into_bytes();
    let twice = guest
        .client
        .create_container(context(), &request)
        .await
        .map_err(refusal);
    refused(twice, Code::ALREADY_EXISTS, "exists already");
    first.delete(true).await.unwrap();
}

pub async fn a_lost_connection_changes_nothing(guest: Guest) {
    let other = guest.connect().await;
    let mut container = guest.create(&script("cat")).await.unwrap();
    let mut request = cloison_agent_api::agent::ContainerRequest::new();
    request.container_id = container.id.clone();
    other.start_container(context(), &request).await.unwrap();
    let mut wait = cloison_agent_api::agent::ProcessRequest::new();
    wait.container_id = container.id.clone();
    let waiter = tokio::spawn({
        let other = other.clone();
        async move { other.wait(context(), &wait).await }
    });
    tokio::task::yield_now().await;
    waiter.abort();
    drop(other);
    let mut stdin = container.streams.stdin.take().unwrap();
    stdin.write_all(b"still here").await.unwrap();
    drop(stdin);
    assert_eq!(container.streams.output().await, "still here");
    assert_eq!(container.wait().await.exit_code, 0);
    container.delete(false).await.unwrap();
}

pub async fn a_paused_container_stands_still_and_can_be_killed(guest: Guest) {
    let container = guest.run(&script("while true; do :; done")).await;
    container.pause().await.unwrap();
    assert_eq!(container.state().await.unwrap().0, Status::PAUSED);
    let before = container.stats().await.cpu_usage_ns;
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    assert_eq!(container.stats().await.cpu_usage_ns, before);
    refused(
        container.exec(crate::agent::process()).await,
        Code::FAILED_PRECONDITION,
        "paused",
    );
    container.resume().await.unwrap();
    assert_eq!(container.state().await.unwrap().0, Status::RUNNING);
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    assert!(container.stats().await.cpu_usage_ns > before);
    container.pause().await.unwrap();
    container.signal(9, true).await.unwrap();
    assert_eq!(container.wait().await.exit_code, 137);
    container.delete(false).await.unwrap();
}

pub async fn shutdown_kills_everything(guest: Guest) {
    let container = guest
        .run(&script("trap '' TERM; sleep 1000 & sleep 1000"))
        .await;
    guest
        .client
        .shutdown(context(), &ShutdownRequest::new())
        .await
        .unwrap();
    assert_eq!(container.wait().await.exit_code, 137);
    assert_eq!(container.processes().await, Vec::<u32>::new());
    assert!(Path::new("/proc/1").exists());
}
