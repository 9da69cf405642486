//! docker of newer releases than this machine's, each in a tree of its own: 26, which brings a container's interfaces before
//! `create` has ended, and 28 or later, which brings them between `create` and `start`.

use serde_json::json;

use crate::dockerd::{Daemon, Release};
use crate::host::{succeed, text};

#[test]
fn docker_26_runs_containers_as_with_runc() {
    essentials("trixie", "26.");
}

#[test]
fn docker_28_or_later_runs_containers_as_with_runc() {
    essentials("sid", "");
}

fn essentials(tree: &'static str, release: &str) {
    let Some(docker) = Daemon::own(Release::Tree(tree), json!({})) else {
        return;
    };
    let version = docker.say(&["version", "--format", "{{.Server.Version}}"]);
    assert!(version.starts_with(release), "{version}");
    streams_and_statuses(&docker);
    networks_and_names(&docker);
    life(&docker);
    out_of_memory(&docker);
}

fn streams_and_statuses(docker: &Daemon) {
    let script = "echo out; echo err >&2; exit 7";
    let output = docker.run(&["--network", "none"], &["sh", "-c", script]);
    assert_eq!(output.status.code(), Some(7), "{}", text(&output.stderr));
    assert_eq!(
        (text(&output.stdout).as_str(), text(&output.stderr).as_str()),
        ("out\n", "err\n")
    );
    let missing = docker.run(&["--network", "none"], &["nonsense"]);
    assert_eq!(missing.status.code(), Some(127));
}

/// Interfaces are there when the process starts, whenever they came; names resolve; a port is published.
fn networks_and_names(docker: &Daemon) {
    for network in ["one", "two"] {
        docker.say(&["network", "create", network]);
    }
    let serve = "echo answer > /tmp/index.html; exec httpd -f -p 80 -h /tmp";
    let options = [
        "--network",
        "one",
        "--network-alias",
        "other",
        "-p",
        "127.0.0.1:8080:80",
    ];
    docker.detached("server", &options, serve);
    let script = "ip -o -4 addr show eth0 | grep -c 'inet 172'; until wget -qO- http://server/; do :; done; wget -qO- http://other/; \
                  nslookup nobody >/dev/null || echo none";
    let said = docker.shell(&["--network", "one"], script);
    assert_eq!(said, "1\nanswer\nanswer\nnone\n");
    let args = ["--runtime", "runc", "--network", "host"];
    let runc = [
        &["run", "--rm"],
        &args[..],
        &["busybox", "wget", "-qO-", "http://127.0.0.1:8080"],
    ];
    assert_eq!(docker.say(&runc.concat()), "answer");
    let create = ["create", "--name", "both", "--runtime", "cloison"];
    let script = "ip -o -4 addr | grep -c ' eth[01] '; wget -qO- http://server/";
    docker.say(
        &[
            &create[..],
            &["--network", "two", "busybox", "sh", "-c", script],
        ]
        .concat(),
    );
    docker.say(&["network", "connect", "one", "both"]);
    let both = docker.docker(&["start", "-a", "both"]);
    assert_eq!(succeed(&both), "2\nanswer\n");
    docker.say(&["rm", "-f", "both", "server"]);
    docker.say(&["network", "rm", "one", "two"]);
}

fn life(docker: &Daemon) {
    let script = "trap 'echo bye; exit 4' TERM; echo up; while :; do sleep 0.1; done";
    docker.detached("life", &["-m", "64m"], script);
    let exec = |script: &str| docker.docker(&["exec", "life", "sh", "-c", script]);
    assert_eq!(
        succeed(&exec("cat /sys/fs/cgroup/memory.max")),
        "67108864\n"
    );
    assert_eq!(exec("exit 9").status.code(), Some(9));
    docker.until_logged("life", "up");
    docker.say(&["stop", "life"]);
    assert_eq!(docker.inspect("life", ".State.ExitCode"), "4");
    assert_eq!(docker.say(&["logs", "life"]), "up\nbye");
    docker.say(&["start", "life"]);
    let id = docker.inspect("life", ".Id");
    assert_ne!(docker.processes_of(&id), Vec::<String>::new());
    docker.say(&["rm", "-f", "life"]);
    assert_eq!(docker.processes_of(&id), Vec::<String>::new());
}

fn out_of_memory(docker: &Daemon) {
    let options = ["run", "--name", "oom", "--runtime", "cloison", "-m", "32m"];
    let command = ["--network", "none", "busybox", "tail", "/dev/zero"];
    let output = docker.docker(&[&options[..], &command].concat());
    assert_eq!(output.status.code(), Some(137), "{}", text(&output.stderr));
    assert_eq!(docker.inspect("oom", ".State.OOMKilled"), "true");
    docker.say(&["rm", "oom"]);
}
