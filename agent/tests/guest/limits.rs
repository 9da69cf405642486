//! Resources: limits, their change, and what is used.

use serde_json::json;
use ttrpc::Code;

use crate::agent::{Guest, refused, script, spec};

pub async fn memory_beyond_the_limit_is_an_oom_kill(guest: Guest) {
    let mut hungry = script("dd if=/dev/zero of=/dev/null bs=200M count=1");
    hungry["linux"]["resources"] = json!({"memory": {"limit": 32 << 20, "swap": 64 << 20}});
    let container = guest.run(&hungry).await;
    let wait = container.wait().await;
    assert!(wait.oom_killed);
    assert_eq!(wait.exit_code, 137);
    assert!(container.stats().await.oom_kills > 0);
    container.delete(false).await.unwrap();
    // The agent and others live on, and are not blamed.
    let container = guest.run(&script("true")).await;
    assert!(!container.wait().await.oom_killed);
    container.delete(false).await.unwrap();
}

pub async fn processes_beyond_the_limit_are_refused(guest: Guest) {
    let mut spec = spec();
    spec["linux"]["resources"] = json!({"pids": {"limit": 5}});
    let (_, output) = guest
        .shell(spec, "for i in $(seq 10); do sleep 5 & done; echo alive")
        .await;
    assert!(
        !output.contains("alive") || output.contains("fork"),
        "{output}"
    );
}

pub async fn rlimits_are_those_of_the_spec(guest: Guest) {
    let mut limited = spec();
    limited["process"]["user"] = json!({"uid": 33, "gid": 33});
    limited["process"]["rlimits"] = json!([
        {"type": "RLIMIT_NOFILE", "soft": 5, "hard": 10},
        {"type": "RLIMIT_FSIZE", "soft": 0, "hard": 0},
        {"type": "RLIMIT_NPROC", "soft": 50, "hard": 60},
    ]);
    let (_, output) = guest
        .shell(
            limited.clone(),
            "ulimit -n; ulimit -Hn; ulimit -f; ulimit -u",
        )
        .await;
    assert_eq!(output, "5\n10\n0\n50\n");
    let (_, output) = guest.shell(spec(), "ulimit -n").await;
    assert_eq!(output, "1048576\n");

    // More than fs.nr_open is refused by the kernel.
    limited["process"]["rlimits"] =
        json!([{"type": "RLIMIT_NOFILE", "soft": 5, "hard": 2_000_000_000}]);
    let container = guest.create(&limited).await.unwrap();
    refused(
        container.start().await,
        Code::INVALID_ARGUMENT,
        "RLIMIT_NOFILE",
    );
    container.delete(true).await.unwrap();
}

pub async fn limits_can_be_changed_while_it_runs(guest: Guest) {
    let mut spec = script("sleep 1000");
    spec["linux"]["resources"] = json!({
        "devices": [{"allow": true, "access": "rwm"}],
        "memory": {"limit": 64 << 20},
        "cpu": {"shares": 512, "quota": 50_000, "period": 100_000},
    });
    let container = guest.run(&spec).await;
    assert_eq!(container.stats().await.memory_limit_bytes, 64 << 20);
    container
        .update(json!({"memory": {"limit": 48 << 20, "swap": 96 << 20}, "pids": {"limit": 77}}))
        .await
        .unwrap();
    assert_eq!(container.stats().await.memory_limit_bytes, 48 << 20);
    container
        .update(json!({"memory": {"limit": -1, "swap": -1}}))
        .await
        .unwrap();
    assert_eq!(container.stats().await.memory_limit_bytes, 0);
    refused(
        container.update(json!({"memory": 5})).await,
        Code::INVALID_ARGUMENT,
        "not OCI resources",
    );
    refused(
        container.update(json!({"unified": {"no.such": "1"}})).await,
        Code::INTERNAL,
        "changing the limits",
    );
    // The devices it was allowed are still allowed.
    let names = json!(["CAP_MKNOD"]);
    let mut process = crate::agent::process();
    process["capabilities"] = json!({"bounding": names, "effective": names, "permitted": names});
    let (_, output) = container
        .exec_shell(
            process,
            "mknod /tmp/fuse2 c 10 229; (: </tmp/fuse2) && echo opened",
        )
        .await;
    assert_eq!(output, "opened\n");
    container.delete(true).await.unwrap();
}

pub async fn stats_and_processes_are_reported(guest: Guest) {
    let container = guest
        .run(&script("sleep 1000 & while true; do :; done"))
        .await;
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    let stats = container.stats().await;
    assert!(stats.cpu_usage_ns > 0 && stats.memory_usage_bytes > 0);
    assert_eq!(stats.pids, 2);
    let (_, init) = container.state().await.unwrap();
    let processes = container.processes().await;
    assert_eq!(processes.len(), 2);
    assert!(processes.contains(&init));
    container.delete(true).await.unwrap();
}

pub async fn what_cannot_be_given_is_an_error(guest: Guest) {
    let mut spec = spec();
    spec["linux"]["resources"] = json!({"memory": {"limit": 1 << 25, "disableOOMKiller": true}});
    refused(
        guest.create(&spec).await,
        Code::INVALID_ARGUMENT,
        "disableOOMKiller",
    );
    let mut spec = crate::agent::spec();
    spec["process"]["apparmorProfile"] = json!("docker-default");
    refused(guest.create(&spec).await, Code::INTERNAL, "apparmor");
}
