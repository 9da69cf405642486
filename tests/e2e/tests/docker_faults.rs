//! docker, and something is killed: the container's processes on the host at any moment, its shim, containerd or dockerd. What is
//! required is that `docker rm -f` then leaves nothing, and that no dead VM is a success.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use serde_json::json;

use crate::dockerd::{Daemon, Release, gone, kill, pids, watch};
use crate::host::{dist, text};

/// Removes a container whatever state it is in, and checks that it has left nothing.
fn remove(docker: &Daemon, name: &str, id: &str) {
    docker.say(&["rm", "-f", name]);
    assert_eq!(docker.processes_of(id), Vec::<String>::new());
    assert!(
        docker.cgroups_of(id).is_empty(),
        "{:?}",
        docker.cgroups_of(id)
    );
    let sandboxes = docker.sandboxes();
    assert!(
        !sandboxes.iter().any(|dir| dir.ends_with(id)),
        "{sandboxes:?}"
    );
    let bundle = docker.path("containerd/state/io.containerd.runtime.v2.task/moby");
    assert!(!bundle.join(id).exists());
}

/// The processes of a container on the host, by their roles.
fn monitor(docker: &Daemon, name: &str) -> i32 {
    docker.inspect(name, ".State.Pid").parse().unwrap()
}

#[test]
fn a_container_whose_process_on_the_host_is_killed_has_failed_and_leaves_nothing() {
    let Some(docker) = Daemon::shared() else {
        return;
    };
    for victim in ["monitor", "cloison-vm", "qemu-system", "containerd-shim"] {
        let name = &format!("killed-{victim}");
        docker.detached(name, &[], "echo up; exec tail -f /dev/null");
        docker.until_logged(name, "up");
        let id = docker.inspect(name, ".Id");
        let stand_in = monitor(&docker, name);
        let watched = watch(stand_in).unwrap();
        let victims = match victim {
            "monitor" => vec![stand_in],
            role => pids(&[role, &id]),
        };
        assert!(!victims.is_empty(), "there is no {victim}");
        let mut wait = docker.command(&["wait", name]);
        let wait = wait.stdout(Stdio::piped()).spawn().unwrap();
        victims.iter().for_each(|pid| kill(*pid));
        // A shim that is gone is noticed by containerd, which then removes the container's task.
        let status = text(&wait.wait_with_output().unwrap().stdout);
        assert_ne!(status, "0\n", "{victim}");
        remove(&docker, name, &id);
        gone(watched);
    }
}

#[test]
fn an_exec_whose_process_on_the_host_is_killed_ends_in_the_guest_as_well() {
    let Some(docker) = Daemon::shared() else {
        return;
    };
    docker.detached(
        "execs",
        &["--network", "none"],
        "echo up; exec tail -f /dev/null",
    );
    docker.until_logged("execs", "up");
    let id = docker.inspect("execs", ".Id");
    let exec = ["exec", "execs", "sh", "-c", "echo in; exec sleep 987654"];
    let mut exec = docker
        .command(&exec)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = [0; 3];
    std::io::Read::read_exact(exec.stdout.as_mut().unwrap(), &mut said).unwrap();
    let stand_ins = docker.say(&["top", "execs", "-o", "pid"]);
    let monitor = monitor(&docker, "execs");
    let own: Vec<i32> = stand_ins
        .lines()
        .filter_map(|pid| pid.trim().parse().ok())
        .filter(|pid| *pid != monitor)
        .filter(|pid| {
            let name = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            name.contains("exec\0")
        })
        .collect();
    assert_eq!(own.len(), 1, "{stand_ins}");
    kill(own[0]);
    assert_ne!(exec.wait().unwrap().code(), Some(0));
    let until_gone = "while ps | grep -q '[s]leep 987654'; do :; done; echo gone";
    assert_eq!(
        docker.say(&["exec", "execs", "sh", "-c", until_gone]),
        "gone"
    );
    remove(&docker, "execs", &id);
}

#[test]
fn a_daemon_that_is_killed_while_containers_are_made_started_and_stopped_leaves_what_can_be_removed()
 {
    let Some(mut docker) = Daemon::own(Release::Host, json!({})) else {
        return;
    };
    // By these events of docker's a container's life is cut into pieces; the daemon is killed right after each.
    for (number, event) in ["create", "start", "exec_create", "kill"]
        .iter()
        .enumerate()
    {
        let name = &format!("cut-{number}");
        let script = "trap '' TERM; while :; do sleep 0.1; done";
        let life = format!(
            "docker -H {address} run -d --runtime cloison --name {name} busybox sh -c \"{script}\"; docker -H {address} exec {name} true; docker -H {address} stop -t 20 {name}",
            address = docker.address()
        );
        let life = std::process::Command::new("sh")
            .args(["-c", &life])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        docker.until_events(
            1,
            &[&format!("event={event}"), &format!("container={name}")],
        );
        docker.restart(libc::SIGKILL);
        life.unwrap().wait().unwrap();
        let id = docker.inspect(name, ".Id");
        remove(&docker, name, &id);
    }
}

#[test]
fn a_container_whose_containerd_is_killed_can_be_removed() {
    let Some(mut docker) = Daemon::own(Release::Host, json!({})) else {
        return;
    };
    docker.detached("orphan", &[], "echo up; exec tail -f /dev/null");
    docker.until_logged("orphan", "up");
    let id = docker.inspect("orphan", ".Id");
    docker.restart_containerd();
    remove(&docker, "orphan", &id);
}

/// A daemon whose runtime "broken" is cloison's after these lines of a shell, and the directory that holds it.
fn broken(lines: impl Fn(&Path) -> String) -> Option<(Daemon, tempfile::TempDir)> {
    let dir = tempfile::TempDir::with_prefix("cloison-e2e-broken-").unwrap();
    let (runtime, cloison) = (dir.path().join("runtime"), dist().join("cloison-runtime"));
    let script = format!(
        "#!/bin/sh\n{}\nexec {} \"$@\"\n",
        lines(dir.path()),
        cloison.display()
    );
    executable(&runtime, &script);
    let config = json!({ "runtimes": { "broken": { "path": runtime } } });
    Some((Daemon::own(Release::Host, config)?, dir))
}

fn executable(path: &Path, script: &str) {
    fs::write(path, script).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Runs a container that is not to come into being, and gives what is said of it.
fn refused(docker: &Daemon) -> String {
    let options = ["run", "--name", "refused", "--runtime", "broken"];
    let output = docker.docker(&[&options[..], &["busybox", "true"]].concat());
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert_ne!(docker.inspect("refused", ".State.ExitCode"), "0");
    remove(docker, "refused", &docker.inspect("refused", ".Id"));
    said
}

#[test]
fn a_guest_whose_kernel_panics_is_a_container_that_failed_with_its_last_words() {
    // An initial ramfs without an init is the surest way.
    let lines = |dir: &Path| {
        let empty = dir.join("initramfs");
        fs::write(&empty, [0u8; 512]).unwrap();
        format!("export CLOISON_INITRAMFS={}", empty.display())
    };
    let Some((docker, _dir)) = broken(lines) else {
        return;
    };
    let said = refused(&docker);
    assert!(
        said.contains("kernel panicked") && said.contains("VFS"),
        "{said}"
    );
}

#[test]
fn a_guest_whose_kernel_panics_later_is_a_container_that_failed_with_its_last_words_in_its_log() {
    let Some(docker) = Daemon::shared() else {
        return;
    };
    let script = "echo up; echo 2 >/proc/sys/vm/panic_on_oom; exec tail /dev/zero";
    docker.detached("panics", &["--privileged", "-m", "32m"], script);
    assert_eq!(docker.say(&["wait", "panics"]), "255");
    let logs = docker.docker(&["logs", "panics"]);
    assert_eq!(text(&logs.stdout), "up\n");
    let said = text(&logs.stderr);
    assert!(
        said.contains("kernel panicked") && said.contains("panic_on_oom"),
        "{said}"
    );
    remove(&docker, "panics", &docker.inspect("panics", ".Id"));
}

#[test]
fn a_host_that_cannot_give_a_vm_its_memory_says_so() {
    // Of the emulator's memory alone: docker's own hook has more address space than a VM.
    let lines = |dir: &Path| {
        let qemu = dir.join("qemu");
        let script = "#!/bin/sh\nulimit -v 1040000\nexec qemu-system-x86_64 \"$@\"\n";
        executable(&qemu, script);
        format!("export CLOISON_QEMU={}", qemu.display())
    };
    let Some((docker, _dir)) = broken(lines) else {
        return;
    };
    let said = refused(&docker);
    assert!(said.contains("Cannot allocate memory"), "{said}");
}

#[test]
fn a_container_may_have_a_limit_above_the_hosts_memory() {
    let Some(docker) = Daemon::shared() else {
        return;
    };
    let options = ["--network", "none", "-m", "4096g"];
    let limit = docker.shell(&options, "cat /sys/fs/cgroup/memory.max");
    assert_eq!(limit, format!("{}\n", 4096u64 << 30));
}
