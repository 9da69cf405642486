//! docker with this runtime: what a person does with docker.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use serde_json::json;

use crate::dockerd::Daemon;
use crate::host::{engine, fail, succeed, text};
use crate::pty::Terminal;

#[test]
fn a_container_runs_in_a_vm_with_its_status_streams_and_address() {
    let Some(docker) = Daemon::shared() else {
        return;
    };
    let host = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_ne!(docker.shell(&["--network", "none"], "uname -r"), host);
    let output = docker.run(
        &["--network", "none"],
        &["sh", "-c", "echo out; echo err >&2; exit 7"],
    );
    assert_eq!(output.status.code(), Some(7));
    assert_eq!(
        (text(&output.stdout).as_str(), text(&output.stderr).as_str()),
        ("out\n", "err\n")
    );
    let network = docker.shell(
        &[],
        "ip -o addr show eth0; ping -c 1 $(ip route | awk '/default/ { print $3 }')",
    );
    assert!(
        network.contains("inet 172.") && network.contains(" 0% packet loss"),
        "{network}"
    );
    fail(
        &docker.run(&["--network", "host"], &["true"]),
        125,
        &["host's network"],
    );
}

#[test]
fn what_cannot_be_executed_has_dockers_statuses() {
    let Some(docker) = Daemon::shared() else {
        return;
    };
    let status = |command: &str| docker.run(&["--network", "none"], &[command]).status.code();
    assert_eq!(status("nonsense"), Some(127));
    assert_eq!(status("/etc/passwd"), Some(126));
    assert_eq!(status("/etc"), Some(126));
}

#[test]
fn a_container_in_the_background_is_looked_at_changed_and_stopped() {
    let Some(docker) = Daemon::shared() else {
        return;
    };
    let script = "trap 'echo bye; exit 4' TERM; echo up; while :; do sleep 0.1; done";
    docker.detached(
        "life",
        &[
            "-m",
            "64m",
            "--pids-limit",
            "50",
            "--health-cmd",
            "true",
            "--health-interval",
            "1s",
        ],
        script,
    );
    let exec = |script: &str| docker.docker(&["exec", "life", "sh", "-c", script]);
    let limits = exec("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max");
    assert_eq!(succeed(&limits), "67108864\n50\n");
    assert_eq!(exec("exit 9").status.code(), Some(9));
    let pid = docker.inspect("life", ".State.Pid");
    assert!(Path::new("/proc").join(&pid).exists());
    assert!(succeed(&docker.docker(&["top", "life"])).contains(&pid));
    let stats = succeed(&docker.docker(&[
        "stats",
        "--no-stream",
        "--format",
        "{{.MemUsage}} {{.PIDs}}",
        "life",
    ]));
    assert!(stats.contains("MiB / "), "{stats}");
    succeed(&docker.docker(&["update", "-m", "60m", "--memory-swap", "-1", "life"]));
    assert_eq!(
        succeed(&exec("cat /sys/fs/cgroup/memory.max")),
        "62914560\n"
    );
    let more = |limit| docker.docker(&["update", "-m", limit, "--memory-swap", "-1", "life"]);
    succeed(&more("400m"));
    // It runs in memory of the guest.
    let use_it = exec(
        "dd if=/dev/zero of=/dev/shm/x bs=1M count=60 2>&1 | tail -n 1; cat /dev/shm/x /dev/shm/x | wc -c; rm /dev/shm/x; cat /sys/fs/cgroup/memory.max",
    );
    let used = succeed(&use_it);
    assert!(used.ends_with("125829120\n419430400\n"), "{used}");
    if engine() == "software" {
        fail(&more("2g"), 1, &["cannot be raised", "1024 MiB"]);
        assert_eq!(docker.inspect("life", ".HostConfig.Memory"), "419430400");
    }
    let file = docker.path("file");
    fs::write(&file, "copied\n").unwrap();
    succeed(&docker.docker(&["cp", file.to_str().unwrap(), "life:/tmp/file"]));
    assert_eq!(succeed(&exec("cat /tmp/file")), "copied\n");
    docker.until_events(1, &["event=health_status: healthy", "container=life"]);
    succeed(&docker.docker(&["stop", "life"]));
    assert_eq!(docker.inspect("life", ".State.ExitCode"), "4");
    assert_eq!(succeed(&docker.docker(&["logs", "life"])), "up\nbye\n");
    succeed(&docker.docker(&["restart", "life"]));
    let wait = docker
        .command(&["wait", "life"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    succeed(&docker.docker(&["kill", "life"]));
    // A kill that comes before the wait leaves the same status.
    assert_eq!(text(&wait.wait_with_output().unwrap().stdout), "137\n");
    succeed(&docker.docker(&["start", "life"]));
    // Without health checks: one that a pause stops in its start keeps docker 20.10 from answering `inspect`, since its client of containerd
    // waits for the end of an exec whose start it gave up.
    docker.detached("still", &[], script);
    succeed(&docker.docker(&["pause", "still"]));
    assert_eq!(docker.inspect("still", ".State.Status"), "paused");
    succeed(&docker.docker(&["unpause", "still"]));
    assert_eq!(docker.inspect("still", ".State.Status"), "running");
    succeed(&docker.docker(&["rm", "-f", "still"]));
    succeed(&docker.docker(&["rm", "-f", "life"]));
}

#[test]
fn options_of_processes_and_mounts_hold() {
    let Some(docker) = Daemon::shared() else {
        return;
    };
    let dir = docker.path("volume");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("file"), "from the host\n").unwrap();
    let (bind, mount) = (
        format!("{}:/v:ro", dir.display()),
        format!("type=bind,src={},dst=/m", dir.display()),
    );
    let options = [
        "--network",
        "none",
        "--read-only",
        "--tmpfs",
        "/t:size=1m",
        "--user",
        "1000:1000",
        "--cap-drop",
        "ALL",
        "--ulimit",
        "nofile=77:88",
        "--init",
        "-v",
        &bind,
        "--mount",
        &mount,
        "-v",
        "named:/named",
        "--security-opt",
        "no-new-privileges",
    ];
    let script = "cat /v/file; touch /x /v/x 2>&1 | grep -c Read-only; ulimit -n; id -u; grep -E 'CapEff|NoNew' /proc/self/status; \
                  touch /t/x && ps | grep -c '[d]ocker-init'; mount | grep -c ' /named '";
    let expected = "from the host\n2\n77\n1000\nCapEff:\t0000000000000000\nNoNewPrivs:\t1\n1\n1\n";
    assert_eq!(docker.shell(&options, script), expected);
    docker.shell(
        &["--network", "none", "-v", "named:/named"],
        "echo kept > /named/file",
    );
    assert_eq!(
        docker.shell(
            &["--network", "none", "-v", "named:/named"],
            "cat /named/file"
        ),
        "kept\n"
    );
    docker.shell(
        &["--network", "none", "--mount", &mount],
        "echo new > /m/new",
    );
    assert_eq!(fs::read_to_string(dir.join("new")).unwrap(), "new\n");
    docker.shell(
        &["--network", "none", "--privileged"],
        "mount -t tmpfs x /mnt 2>/dev/null || mkdir /mnt && mount -t tmpfs x /mnt",
    );
}

#[test]
fn limits_of_processes_and_of_system_calls_hold() {
    let Some(docker) = Daemon::shared() else {
        return;
    };
    let none = ["--network", "none"];
    let script = "for i in 1 2 3 4 5 6 7 8 9; do sleep 1000 & done; ps | grep -c ' sleep 1000$'";
    let many = docker.run(
        &[&none[..], &["--pids-limit", "5"]].concat(),
        &["sh", "-c", script],
    );
    assert!(text(&many.stderr).contains("fork"), "{many:?}");
    assert_eq!(docker.shell(&none, script), "9\n");

    let profile = docker.path("seccomp.json");
    let rule = json!({ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO" });
    let rules = json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule] });
    fs::write(&profile, rules.to_string()).unwrap();
    let seccomp = format!("seccomp={}", profile.display());
    let options = [&none[..], &["--security-opt", &seccomp]].concat();
    let script = "touch /file && mkdir /dir 2>&1 || true";
    let refused = "mkdir: can't create directory '/dir': Operation not permitted\n";
    assert_eq!(docker.shell(&options, script), refused);
    let options = [&none[..], &["--security-opt", "seccomp=unconfined"]].concat();
    assert_eq!(docker.shell(&options, script), "");
}

#[test]
fn a_container_that_takes_too_much_memory_is_said_to_have() {
    let Some(docker) = Daemon::shared() else {
        return;
    };
    let args = [
        "run",
        "--name",
        "oom",
        "--runtime",
        "cloison",
        "--network",
        "none",
        "-m",
        "32m",
        "busybox",
        "tail",
        "/dev/zero",
    ];
    assert_eq!(docker.docker(&args).status.code(), Some(137));
    assert_eq!(docker.inspect("oom", ".State.OOMKilled"), "true");
    succeed(&docker.docker(&["rm", "oom"]));
}

#[test]
fn a_person_works_at_a_terminal_in_a_container_and_in_an_exec() {
    let Some(docker) = Daemon::shared() else {
        return;
    };
    let args = [
        "run",
        "-it",
        "--name",
        "tty",
        "--runtime",
        "cloison",
        "--network",
        "none",
        "busybox",
        "sh",
    ];
    let mut terminal = Terminal::start(docker.command(&args), 81, 25);
    terminal.expect("# ");
    // docker tells of the size when the container has started.
    terminal.type_("until [ \"$(stty size 2>&1)\" = '25 81' ]; do sleep 0.1; done; echo siz''ed\r");
    terminal.expect("sized");
    let exec = docker.command(&[
        "exec",
        "-it",
        "tty",
        "sh",
        "-c",
        "tty && read line && echo got $line",
    ]);
    let mut exec = Terminal::start(exec, 80, 24);
    exec.expect("/dev/");
    exec.type_("hello\r");
    exec.expect("got hello");
    assert_eq!(exec.child.wait().unwrap().code(), Some(0));
    terminal.resize(100, 30);
    terminal.type_("until [ \"$(stty size)\" = '30 100' ]; do sleep 0.1; done; echo resize''d\r");
    terminal.expect("resized");
    terminal.type_("exit 3\r");
    assert_eq!(terminal.child.wait().unwrap().code(), Some(3));
    succeed(&docker.docker(&["rm", "tty"]));
}

#[test]
fn twenty_containers_are_started_at_once() {
    let Some(docker) = Daemon::shared() else {
        return;
    };
    let args = ["run", "--rm", "--runtime", "cloison", "busybox"];
    let start = |number: usize| {
        let mut command = docker.command(&args);
        command.args([
            "sh",
            "-c",
            &format!("ip -o -4 addr show eth0 | wc -l; exit {number}"),
        ]);
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let all: Vec<_> = (1..=20).map(start).collect();
    for (number, one) in (1..).zip(all) {
        let output = one.wait_with_output().unwrap();
        let (said, why) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(
            (output.status.code(), said.as_str()),
            (Some(number), "1\n"),
            "{why}"
        );
    }
}

#[test]
fn a_container_that_has_the_namespaces_of_another_is_in_its_vm() {
    let Some(docker) = Daemon::shared() else {
        return;
    };
    let script = "echo hello >/tmp/index.html; httpd -p 127.0.0.1:8000 -h /tmp; echo up; while :; do sleep 0.1; done";
    docker.detached("owner", &["--ipc", "shareable"], script);
    docker.until_logged("owner", "up");
    let boot = "cat /proc/sys/kernel/random/boot_id";
    let guest = docker.say(&["exec", "owner", "sh", "-c", boot]);
    let network = ["--network", "container:owner"];
    let script = format!(
        "{boot}; wget -q -O - http://127.0.0.1:8000/index.html; ip -o -4 addr show eth0 | wc -l"
    );
    let all = docker.shell(&network, &script);
    assert_eq!(all, format!("{guest}\nhello\n1\n"));
    let options = [
        &network[..],
        &["--pid", "container:owner", "--ipc", "container:owner"],
    ]
    .concat();
    assert!(docker.shell(&options, "ps").contains("httpd -p"));
    fail(
        &docker.run(&["--pid", "container:owner"], &["true"]),
        125,
        &["--network container:"],
    );
    // It ends with the other one, at the latest.
    docker.detached("member", &network, "echo up; exec sleep 1000");
    docker.until_logged("member", "up");
    succeed(&docker.docker(&["kill", "owner"]));
    assert_eq!(docker.say(&["wait", "member"]), "137");
    succeed(&docker.docker(&["rm", "owner", "member"]));
}
