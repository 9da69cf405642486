//! What keeps services running and talking to each other: restart policies, names on networks, links, compose, a daemon that is
//! restarted below them.

use std::fs;
use std::io::Read;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::dockerd::{Daemon, Release, kill};
use crate::host::{succeed, text};

const SERVE: &str = "echo answer > /tmp/index.html; exec httpd -f -p 80 -h /tmp";
const ASK: &str = "until wget -qO- http://server/; do :; done";

#[test]
fn containers_find_each_other_by_name_and_by_link() {
    let Some(docker) = Daemon::shared() else {
        return;
    };
    docker.say(&["network", "create", "names"]);
    let options = ["--network", "names", "--name", "server"];
    let runc = ["run", "-d", "--runtime", "runc"];
    docker.say(&[&runc[..], &options, &["busybox", "sh", "-c", SERVE]].concat());
    assert_eq!(docker.shell(&["--network", "names"], ASK), "answer\n");
    docker.say(&["rm", "-f", "server"]);
    docker.detached("server", &["--network", "names"], SERVE);
    assert_eq!(docker.shell(&["--network", "names"], ASK), "answer\n");
    // It may have its own server of names.
    let script = "nslookup server 127.0.0.11 | grep -c 'Name:.*server'";
    assert_eq!(docker.shell(&["--network", "names"], script), "1\n");
    docker.say(&["rm", "-f", "server"]);
    docker.say(&["network", "rm", "names"]);
    docker.say(
        &[
            &runc[..],
            &["--name", "linked", "busybox", "sh", "-c", SERVE],
        ]
        .concat(),
    );
    assert_eq!(docker.shell(&["--link", "linked:server"], ASK), "answer\n");
    docker.say(&["rm", "-f", "linked"]);
}

#[test]
fn a_published_port_leads_to_a_container_and_its_health_is_watched() {
    let Some(docker) = Daemon::shared() else {
        return;
    };
    let publish = ["-p", "127.0.0.1:8081:80"];
    let health = [
        "--health-cmd",
        "! test -e /sick",
        "--health-interval",
        "1s",
        "--health-retries",
        "1",
    ];
    docker.detached("public", &[&publish[..], &health].concat(), SERVE);
    assert_eq!(docker.say(&["port", "public", "80"]), "127.0.0.1:8081");
    let ask = "until wget -qO- http://127.0.0.1:8081/; do :; done";
    let host = ["run", "--rm", "--runtime", "runc", "--network", "host"];
    let asked = docker.say(&[&host[..], &["busybox", "sh", "-c", ask]].concat());
    assert_eq!(asked, "answer");
    docker.until_events(1, &["event=health_status: healthy", "container=public"]);
    docker.say(&["exec", "public", "touch", "/sick"]);
    docker.until_events(1, &["event=health_status: unhealthy", "container=public"]);
    docker.say(&["rm", "-f", "public"]);
    let freed = docker.docker(
        &[
            &host[..],
            &["busybox", "wget", "-qO-", "http://127.0.0.1:8081/"],
        ]
        .concat(),
    );
    assert!(!freed.status.success());
}

#[test]
fn containers_are_restarted_as_their_policies_say() {
    let Some(docker) = Daemon::shared() else {
        return;
    };
    let none = ["--network", "none"];
    docker.detached(
        "failing",
        &[&none[..], &["--restart", "on-failure:2"]].concat(),
        "echo try; exit 3",
    );
    docker.until_events(3, &["container=failing", "event=die"]);
    assert_eq!(docker.inspect("failing", ".RestartCount"), "2");
    assert_eq!(docker.inspect("failing", ".State.ExitCode"), "3");
    docker.detached(
        "always",
        &[&none[..], &["--restart", "always"]].concat(),
        "echo up; exec tail -f /dev/null",
    );
    docker.until_logged("always", "up");
    let pid = docker.inspect("always", ".State.Pid");
    kill(pid.parse().unwrap());
    docker.until_events(2, &["container=always", "event=start"]);
    assert_ne!(docker.inspect("always", ".State.Pid"), pid);
    docker.say(&["rm", "-f", "failing", "always"]);
}

#[test]
fn a_person_attaches_to_a_container_and_files_are_copied_both_ways() {
    let Some(docker) = Daemon::shared() else {
        return;
    };
    let options = ["-i", "--network", "none"];
    let script = "echo up; read line; echo got $line; mkdir /out; echo of the guest > /out/file; ln -s file /out/link; read line; exit 5";
    docker.detached("attached", &options, script);
    docker.until_logged("attached", "up");
    let mut attach = docker.command(&["attach", "attached"]);
    let mut attach = attach
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = attach.stdin.take().unwrap();
    std::io::Write::write_all(&mut input, b"hello\n").unwrap();
    let mut said = [0; 10];
    attach
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut said)
        .unwrap();
    assert_eq!(&said, b"got hello\n");
    let until_copied = docker.docker(&[
        "exec",
        "attached",
        "sh",
        "-c",
        "until [ -e /out/link ]; do :; done",
    ]);
    succeed(&until_copied);
    let out = docker.path("out");
    docker.say(&["cp", "attached:/out", out.to_str().unwrap()]);
    assert_eq!(
        fs::read_to_string(out.join("file")).unwrap(),
        "of the guest\n"
    );
    assert_eq!(
        fs::read_link(out.join("link")).unwrap().to_str(),
        Some("file")
    );
    let dir = docker.path("in");
    fs::create_dir_all(dir.join("below")).unwrap();
    fs::write(dir.join("below/file"), "of the host\n").unwrap();
    docker.say(&["cp", dir.to_str().unwrap(), "attached:/in"]);
    let cat = [
        "exec",
        "attached",
        "sh",
        "-c",
        "until cat /in/below/file 2>/dev/null; do :; done",
    ];
    assert_eq!(docker.say(&cat), "of the host");
    let wait = docker
        .command(&["wait", "attached"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut input, b"end\n").unwrap();
    assert_eq!(attach.wait().unwrap().code(), Some(5));
    assert_eq!(text(&wait.wait_with_output().unwrap().stdout), "5\n");
    docker.say(&["rm", "attached"]);
}

const COMPOSE: &str = r#"
version: "2.4"
services:
  server:
    image: busybox
    runtime: cloison
    command: sh -c 'echo answer > /data/index.html; exec httpd -f -p 80 -h /data'
    volumes: ["data:/data"]
    networks: [front, back]
    healthcheck: { test: "wget -qO- http://127.0.0.1/", interval: 1s, retries: 60 }
  relay:
    image: busybox
    runtime: cloison
    command: sh -c 'until wget -qO /tmp/index.html http://server/; do :; done; exec httpd -f -p 80 -h /tmp'
    environment: { WORD: relayed }
    networks: [front, back]
    depends_on: { server: { condition: service_healthy } }
  client:
    image: busybox
    runtime: cloison
    command: sh -c 'until wget -qO- http://relay/; do :; done'
    networks: [front]
    depends_on: [relay]
networks: { front: {}, back: {} }
volumes: { data: {} }
"#;

#[test]
fn compose_brings_up_three_services_that_talk_and_takes_them_down() {
    let Some(docker) = Daemon::shared() else {
        return;
    };
    let file = docker.path("compose.yml");
    fs::write(&file, COMPOSE).unwrap();
    let compose = |args: &[&str]| {
        let mut command = Command::new("docker-compose");
        command.args(["-H", &docker.address(), "-p", "three", "-f"]);
        command.arg(&file).args(args).stdin(Stdio::null());
        // What three VMs take on a loaded machine.
        command.env("COMPOSE_HTTP_TIMEOUT", "300");
        command.output().unwrap()
    };
    succeed(&compose(&["up", "-d"]));
    assert_eq!(docker.say(&["wait", "three_client_1"]), "0");
    assert_eq!(docker.say(&["logs", "three_client_1"]), "answer");
    let word = compose(&["exec", "-T", "relay", "sh", "-c", "echo $WORD"]);
    assert_eq!(succeed(&word), "relayed\n");
    succeed(&compose(&["down", "-v", "-t", "1"]));
    assert_eq!(docker.say(&["ps", "-aq", "--filter", "name=three_"]), "");
}

#[test]
fn containers_live_on_while_the_daemon_is_restarted() {
    let config = json!({ "live-restore": true });
    let Some(mut docker) = Daemon::own(Release::Host, config) else {
        return;
    };
    let script = "trap 'echo bye; exit 4' TERM; echo up; while :; do sleep 0.1; done";
    docker.detached("survivor", &[], script);
    docker.until_logged("survivor", "up");
    let pid = docker.inspect("survivor", ".State.Pid");
    for signal in [libc::SIGTERM, libc::SIGKILL] {
        docker.restart(signal);
        assert_eq!(docker.inspect("survivor", ".State.Pid"), pid);
        assert_eq!(docker.inspect("survivor", ".State.Running"), "true");
        assert_eq!(docker.say(&["exec", "survivor", "echo", "here"]), "here");
    }
    docker.say(&["stop", "survivor"]);
    assert_eq!(docker.inspect("survivor", ".State.ExitCode"), "4");
    assert_eq!(docker.say(&["logs", "survivor"]), "up\nbye");
    docker.say(&["rm", "survivor"]);
}
