//! Containers that share a VM, as callers of runc ask for it: the spec of one names namespaces of another by the process that stands for
//! that one's init.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::host::{await_end, fail, rootfs, succeed, text};
use crate::oci::{Bundle, cgroups, command};

/// What podman's pods share.
const USUAL: [&str; 3] = ["network", "ipc", "uts"];

/// A first container, whose VM others come to.
struct Pod {
    first: Bundle,
    pid: i32,
}

impl Pod {
    /// The first one says hello to whoever asks it over the loopback interface.
    fn new() -> Self {
        let script = "echo hello >/tmp/index.html; httpd -p 127.0.0.1:8000 -h /tmp; trap 'exit 3' TERM; while :; do sleep 0.1; done";
        let first = Bundle::shell(script);
        // As podman has it, for all containers of a pod.
        let shm = first.host.path("shm");
        fs::create_dir(&shm).unwrap();
        let first = first.with(|config| {
            config["hostname"] = "pod".into();
            let mounts = config["mounts"].as_array_mut().unwrap();
            mounts.retain(|mount| mount["destination"] != "/dev/shm");
            mounts.push(json!({ "destination": "/dev/shm", "type": "bind", "source": shm, "options": ["rbind", "nosuid"] }));
        });
        let pid = first.create_and_start();
        Self { first, pid }
    }

    /// A bundle for one that shares these namespaces with the process.
    fn bundle(&self, id: &str, shared: &[&str], pid: i32, script: &str) -> Value {
        let dir = self.dir(id);
        if !dir.exists() {
            rootfs(&dir.join("rootfs"));
        }
        fs::write(dir.join("rootfs/whose"), id).unwrap();
        let config = fs::read(self.first.dir().join("config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&config).unwrap();
        config["hostname"] = id.into();
        config["process"]["args"] = json!(["sh", "-c", script]);
        config["linux"]["cgroupsPath"] = format!("/{}-{id}", self.first.cgroup()).into();
        for namespace in config["linux"]["namespaces"].as_array_mut().unwrap() {
            let kind = namespace["type"].as_str().unwrap().to_owned();
            if shared.contains(&kind.as_str()) {
                let file = if kind == "network" { "net" } else { &kind };
                namespace["path"] = format!("/proc/{pid}/ns/{file}").into();
            }
        }
        self.write(id, &config);
        config
    }

    fn write(&self, id: &str, config: &Value) {
        let text = serde_json::to_vec(config).unwrap();
        fs::write(self.dir(id).join("config.json"), text).unwrap();
    }

    fn dir(&self, id: &str) -> PathBuf {
        self.first.host.path(&format!("bundle-{id}"))
    }

    /// Creates and starts one that shares the usual.
    fn member(&self, id: &str, script: &str) -> i32 {
        self.bundle(id, &USUAL, self.pid, script);
        self.launch(id)
    }

    fn launch(&self, id: &str) -> i32 {
        let (pid, out) = (self.dir(id).join("pid"), self.dir(id).join("out"));
        let out = File::create(out).unwrap();
        let status = command(&self.first.host)
            .args(["create", "--pid-file", pid.to_str().unwrap()])
            .args(["--bundle", self.dir(id).to_str().unwrap(), id])
            .stdout(out.try_clone().unwrap())
            .stderr(out)
            .status()
            .unwrap();
        assert!(status.success(), "{}{}", self.written(id), self.first.log());
        succeed(&self.run(&["start", id]));
        fs::read_to_string(pid).unwrap().parse().unwrap()
    }

    fn written(&self, id: &str) -> String {
        fs::read_to_string(self.dir(id).join("out")).unwrap()
    }

    fn run(&self, args: &[&str]) -> Output {
        self.first.run(args)
    }

    /// Runs one in the foreground.
    fn output(&self, id: &str) -> Output {
        self.run(&["run", "--bundle", self.dir(id).to_str().unwrap(), id])
    }

    fn shell(&self, id: &str, script: &str) -> String {
        succeed(&self.run(&["exec", id, "sh", "-c", script]))
    }

    fn status(&self, id: &str) -> String {
        let state: Value = serde_json::from_str(&succeed(&self.run(&["state", id]))).unwrap();
        state["status"].as_str().unwrap().to_owned()
    }

    /// Places in the first one's sandbox, and mounts there, that are not its own.
    fn left(&self) -> Vec<String> {
        let sandbox = self.first.host.run_dir().join("sandboxes/one");
        let shared = fs::read_dir(sandbox.join("shared")).unwrap().flatten();
        let shared = shared.map(|entry| entry.file_name().into_string().unwrap());
        let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", self.pid)).unwrap();
        let at = |line: &str| line.split(' ').nth(4).unwrap().to_owned();
        let sandboxes = self.first.host.run_dir().join("sandboxes");
        let mounts = mounts.lines().map(at);
        let others = mounts.filter(|at| {
            at.starts_with(sandboxes.to_str().unwrap())
                && !at.starts_with(sandbox.join("shared/one").to_str().unwrap())
                && *at != sandbox.join("shared").to_str().unwrap()
        });
        shared.filter(|name| name != "one").chain(others).collect()
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        for id in ["two", "three", "four"] {
            self.run(&["delete", "--force", id]);
        }
    }
}

const BOOT_ID: &str = "cat /proc/sys/kernel/random/boot_id";

#[test]
fn a_second_container_is_in_the_vm_of_the_first_and_lives_for_itself() {
    let pod = Pod::new();
    let script =
        "echo out; echo err >&2; trap 'echo ended; exit 5' TERM; while :; do sleep 0.1; done";
    let pid = pod.member("two", script);
    assert_ne!(pid, pod.pid);
    let theirs = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert_eq!(pod.shell("two", BOOT_ID), pod.shell("one", BOOT_ID));
    assert_ne!(pod.shell("two", BOOT_ID), theirs);
    // What they share, and what they do not.
    assert_eq!(pod.shell("two", "uname -n"), "pod\n");
    assert_eq!(
        pod.shell("two", "wget -q -O - http://127.0.0.1:8000/index.html"),
        "hello\n"
    );
    for (kind, same) in [
        ("net", true),
        ("ipc", true),
        ("uts", true),
        ("pid", false),
        ("mnt", false),
        ("cgroup", false),
    ] {
        let namespace = format!("readlink /proc/1/ns/{kind}");
        let (one, two) = (pod.shell("one", &namespace), pod.shell("two", &namespace));
        assert_eq!(one == two, same, "{kind}: {one} {two}");
    }
    assert_eq!(pod.shell("two", "cat /whose"), "two");
    fail(
        &pod.run(&["exec", "one", "cat", "/whose"]),
        1,
        &["No such file"],
    );
    // What they map of their shared memory is common to them only if it is one file for the guest's kernel.
    let shm = "grep ' /dev/shm ' /proc/self/mountinfo | cut -d ' ' -f 3,4";
    assert_eq!(pod.shell("one", shm), pod.shell("two", shm));
    pod.shell("one", "echo common > /dev/shm/x");
    assert_eq!(pod.shell("two", "cat /dev/shm/x"), "common\n");
    // On the host the network is the same as well, and the cgroup is its own.
    let net = |pid| fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_eq!(net(pid), net(pod.pid));
    let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert!(
        cgroup.contains(&format!("/{}-two", pod.first.cgroup())),
        "{cgroup}"
    );

    succeed(&pod.run(&["pause", "two"]));
    assert_eq!(
        (pod.status("one"), pod.status("two")),
        ("running".into(), "paused".into())
    );
    assert_eq!(pod.shell("one", "echo runs"), "runs\n");
    succeed(&pod.run(&["resume", "two"]));
    let events = succeed(&pod.run(&["events", "--stats", "two"]));
    assert!(
        events.starts_with(r#"{"type":"stats","id":"two""#),
        "{events}"
    );
    succeed(&pod.run(&["update", "--memory", "64m", "two"]));
    assert_eq!(
        pod.shell("two", "cat /sys/fs/cgroup/memory.max"),
        "67108864\n"
    );
    assert_eq!(pod.shell("one", "cat /sys/fs/cgroup/memory.max"), "max\n");

    succeed(&pod.run(&["kill", "two", "TERM"]));
    await_end(pid);
    assert_eq!(pod.status("two"), "stopped");
    assert_eq!(pod.written("two"), "out\nerr\nended\n");
    succeed(&pod.run(&["delete", "two"]));
    assert_eq!(pod.left(), Vec::<String>::new());
    assert_eq!(
        cgroups(&format!("{}-two", pod.first.cgroup())),
        Vec::<PathBuf>::new()
    );
    assert_eq!(pod.shell("one", "echo runs"), "runs\n");

    // One in the foreground has its own streams and status, and the ID may be used again.
    pod.bundle("two", &USUAL, pod.pid, "echo again; exit 7");
    let output = pod.output("two");
    assert_eq!(output.status.code(), Some(7), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "again\n");
    assert_eq!(pod.left(), Vec::<String>::new());
}

#[test]
fn a_container_whose_stand_in_is_killed_is_gone_from_the_guest_and_can_be_made_anew() {
    let pod = Pod::new();
    let script = "httpd -p 127.0.0.1:9000 -h /; while :; do sleep 0.1; done";
    let pid = pod.member("two", script);
    let reach = "wget -q -O - http://127.0.0.1:9000/whose";
    assert_eq!(
        pod.shell(
            "one",
            &format!("until {reach} 2>/dev/null; do sleep 0.1; done")
        ),
        "two"
    );
    succeed(
        &Command::new("kill")
            .args(["-KILL", &pid.to_string()])
            .output()
            .unwrap(),
    );
    pod.shell(
        "one",
        &format!("while {reach}; do sleep 0.1; done 2>/dev/null; true"),
    );
    assert_eq!(pod.status("two"), "stopped");
    succeed(&pod.run(&["delete", "--force", "two"]));
    assert_eq!(pod.left(), Vec::<String>::new());
    pod.launch("two");
    assert_eq!(
        pod.shell(
            "one",
            &format!("until {reach} 2>/dev/null; do sleep 0.1; done")
        ),
        "two"
    );
    succeed(&pod.run(&["delete", "--force", "two"]));
    assert_eq!(pod.shell("one", "echo runs"), "runs\n");
}

#[test]
fn the_end_of_the_first_is_the_end_of_all_who_do_not_end_in_time() {
    let pod = Pod::new();
    let two = pod.member("two", "while :; do sleep 0.1; done");
    // A third one that came by way of the second, and takes its time to end.
    let script = "trap 'sleep 1; echo ended; exit 6' TERM; while :; do sleep 0.1; done";
    pod.bundle("three", &USUAL, two, script);
    let three = pod.launch("three");
    assert_eq!(pod.shell("three", BOOT_ID), pod.shell("one", BOOT_ID));
    // As podman stops a pod: all at once.
    for id in ["one", "three"] {
        succeed(&pod.run(&["kill", id, "TERM"]));
    }
    await_end(three);
    assert_eq!(pod.written("three"), "ended\n");
    succeed(&pod.run(&["kill", "one", "KILL"]));
    for pid in [two, pod.pid] {
        await_end(pid);
    }
    for id in ["one", "two", "three"] {
        assert_eq!(pod.status(id), "stopped", "{id}");
    }
    fail(&pod.run(&["exec", "two", "true"]), 255, &["stopped"]);
    // Nobody can come to it any more.
    for (shared, words) in [
        (&USUAL[..], "cannot find the network namespace"),
        (&["ipc"], "no running container"),
    ] {
        pod.bundle("four", shared, pod.pid, "true");
        fail(&pod.output("four"), 1, &[words]);
    }
    succeed(&pod.run(&["delete", "one"]));
    for id in ["two", "three"] {
        succeed(&pod.run(&["delete", id]));
    }
}

#[test]
fn processes_are_shared_when_asked_for() {
    let pod = Pod::new();
    let shared = ["network", "ipc", "uts", "pid"];
    pod.bundle(
        "two",
        &shared,
        pod.pid,
        "sleep 1000 & while :; do sleep 0.1; done",
    );
    pod.launch("two");
    assert!(pod.shell("two", "ps").contains("httpd -p 127.0.0.1:8000"));
    assert!(pod.shell("one", "ps").contains("sleep 1000"));
    succeed(&pod.run(&["delete", "--force", "two"]));
    assert!(!pod.shell("one", "ps").contains("sleep 1000"));
}

#[test]
fn what_cannot_be_shared_is_refused_with_the_reason() {
    let pod = Pod::new();
    let refused = |shared: &[&str], pid, change: &dyn Fn(&mut Value), words: &[&str]| {
        let mut config = pod.bundle("two", shared, pid, "true");
        change(&mut config);
        pod.write("two", &config);
        fail(&pod.output("two"), 1, words);
    };
    let nothing = |_: &mut Value| {};
    let us = std::process::id().cast_signed();
    refused(
        &["ipc"],
        us,
        &nothing,
        &["ipc namespace", "no running container"],
    );
    refused(&["ipc"], 99_999_999, &nothing, &["no running container"]);
    refused(&["network"], 99_999_999, &nothing, &["network namespace"]);
    refused(&["ipc", "uts"], pod.pid, &nothing, &["network", "one"]);
    refused(
        &["network", "ipc", "mount"],
        pod.pid,
        &nothing,
        &["mount namespace"],
    );
    let cpus = |config: &mut Value| config["linux"]["resources"]["cpu"] = json!({ "cpus": "0" });
    refused(&USUAL, pod.pid, &cpus, &["set of CPUs", "one"]);
    let users = |config: &mut Value| {
        let all = config["linux"]["namespaces"].as_array_mut().unwrap();
        all.push(json!({ "type": "user" }));
        let mapping = json!([{ "containerID": 0, "hostID": 1000, "size": 1000 }]);
        config["linux"]["uidMappings"] = mapping.clone();
        config["linux"]["gidMappings"] = mapping;
    };
    refused(&USUAL, pod.pid, &users, &["user namespace"]);
    assert_eq!(pod.left(), Vec::<String>::new());

    // More memory than the VM has is a limit that is never reached.
    let mut config = pod.bundle("two", &USUAL, pod.pid, "cat /sys/fs/cgroup/memory.max");
    config["linux"]["resources"]["memory"] = json!({ "limit": 8_u64 << 30 });
    pod.write("two", &config);
    assert_eq!(succeed(&pod.output("two")), "8589934592\n");
    assert!(
        pod.first
            .log()
            .contains("may use more memory than there is")
    );
}
