//! `cloison-runtime` as a caller of runc drives it: a bundle made by hand, runc's verbs, flags, files and messages.
//! What is mounted in a container is looked at in `oci_mounts`.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::{Value, json};

use crate::host::{Host, await_end, data, dist, fail, rootfs, succeed, text};

/// A bundle, the state directory that its container is in, and the runtime's log.
pub struct Bundle {
    pub host: Host,
    config: Value,
}

impl Bundle {
    /// One whose process is a shell with this script.
    pub fn shell(script: &str) -> Self {
        let host = Host::new();
        fs::create_dir(host.path("bundle")).unwrap();
        rootfs(&host.path("bundle/rootfs"));
        let output = runtime(
            &host,
            &["spec", "-b", host.path("bundle").to_str().unwrap()],
        );
        succeed(&output);
        let config = fs::read(host.path("bundle/config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&config).unwrap();
        config["process"]["terminal"] = false.into();
        config["process"]["args"] = json!(["sh", "-c", script]);
        config["root"]["readonly"] = false.into();
        config["linux"]["cgroupsPath"] = format!("/{}", name_of(&host)).into();
        let bundle = Self { host, config };
        bundle.write();
        bundle
    }

    pub fn with(mut self, change: impl FnOnce(&mut Value)) -> Self {
        change(&mut self.config);
        self.write();
        self
    }

    fn write(&self) {
        let text = serde_json::to_vec(&self.config).unwrap();
        fs::write(self.dir().join("config.json"), text).unwrap();
    }

    pub fn dir(&self) -> PathBuf {
        self.host.path("bundle")
    }

    /// The container's cgroup, which no other test uses.
    pub fn cgroup(&self) -> String {
        name_of(&self.host)
    }

    pub fn run(&self, args: &[&str]) -> Output {
        runtime(&self.host, args)
    }

    /// Runs the container in the foreground.
    pub fn output(&self) -> Output {
        let dir = self.dir();
        self.run(&["run", "--bundle", dir.to_str().unwrap(), "one"])
    }

    /// Creates the container, its output in a file, and gives the pid that its caller gets.
    pub fn create(&self) -> i32 {
        let (pid, out) = (self.host.path("pid"), self.host.path("out"));
        let out = File::create(out).unwrap();
        let status = command(&self.host)
            .args(["create", "--pid-file", pid.to_str().unwrap()])
            .args(["--bundle", self.dir().to_str().unwrap(), "one"])
            .stdout(out.try_clone().unwrap())
            .stderr(out)
            .status()
            .unwrap();
        assert!(status.success(), "{}{}", self.written(), self.log());
        fs::read_to_string(pid).unwrap().parse().unwrap()
    }

    pub fn create_and_start(&self) -> i32 {
        let pid = self.create();
        succeed(&self.run(&["start", "one"]));
        pid
    }

    pub fn written(&self) -> String {
        fs::read_to_string(self.host.path("out")).unwrap()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.host.path("log.json")).unwrap_or_default()
    }

    fn state(&self) -> Value {
        serde_json::from_str(&succeed(&self.run(&["state", "one"]))).unwrap()
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        succeed(&self.run(&["delete", "--force", "one"]));
        assert_eq!(succeed(&self.run(&["list", "-q"])), "");
        assert_eq!(cgroups(&self.cgroup()), Vec::<PathBuf>::new());
    }
}

/// The cgroups of a container on cgroup v1 and v2.
pub fn cgroups(name: &str) -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let v1 = fs::read_dir(root)
        .unwrap()
        .flatten()
        .map(|entry| entry.path());
    let all = v1
        .chain([root.to_owned()])
        .map(|hierarchy| hierarchy.join(name));
    all.filter(|path| path.is_dir()).collect()
}

/// A name that no other test uses.
fn name_of(host: &Host) -> String {
    let dir = host.path("x");
    let dir = dir.parent().unwrap().file_name().unwrap();
    dir.to_str().unwrap().to_owned()
}

pub fn command(host: &Host) -> Command {
    let mut command = Command::new(dist().join("cloison-runtime"));
    command
        .env("CLOISON_DATA_DIR", data())
        .args(&arguments(host)[1..])
        .stdin(Stdio::null());
    command
}

/// The runtime and its global flags.
pub fn arguments(host: &Host) -> Vec<String> {
    let (runtime, log) = (dist().join("cloison-runtime"), host.path("log.json"));
    let paths = [runtime, host.run_dir(), log].map(|path| path.to_str().unwrap().to_owned());
    let [runtime, root, log] = paths;
    let flags = ["--root", &root, "--log-format", "json", "--log", &log].map(str::to_owned);
    std::iter::once(runtime).chain(flags).collect()
}

fn runtime(host: &Host, args: &[&str]) -> Output {
    command(host).args(args).output().unwrap()
}

#[test]
fn a_container_lives_through_runcs_verbs() {
    let bundle =
        Bundle::shell("trap 'echo ended; exit 5' TERM; echo up; while :; do sleep 0.1; done")
            .with(|config| config["annotations"] = json!({ "who": "test" }));
    let pid = bundle.create();
    let state = bundle.state();
    assert_eq!(state["status"], "created");
    assert_eq!((&state["id"], &state["pid"]), (&"one".into(), &pid.into()));
    assert_eq!(state["bundle"], bundle.dir().to_str().unwrap());
    assert_eq!(state["annotations"]["who"], "test");
    assert!(state["ociVersion"].as_str().unwrap().starts_with("1."));
    fail(
        &bundle.run(&["create", "-b", bundle.dir().to_str().unwrap(), "one"]),
        1,
        &["already exists"],
    );

    assert_eq!(
        succeed(&bundle.run(&["exec", "one", "echo", "early"])),
        "early\n"
    );
    succeed(&bundle.run(&["start", "one"]));
    assert_eq!(bundle.state()["status"], "running");
    succeed(&bundle.run(&["kill", "one", "0"]));
    fail(
        &bundle.run(&["start", "one"]),
        1,
        &["cannot start an already running container"],
    );
    fail(
        &bundle.run(&["delete", "one"]),
        1,
        &["is not stopped: running"],
    );
    let list: Value = serde_json::from_str(&succeed(&bundle.run(&["list", "-f", "json"]))).unwrap();
    assert_eq!(
        (&list[0]["pid"], &list[0]["owner"]),
        (&pid.into(), &"root".into())
    );
    let pids: Vec<i32> =
        serde_json::from_str(&succeed(&bundle.run(&["ps", "-f", "json", "one"]))).unwrap();
    assert!(pids.contains(&pid) && pids.len() > 1, "{pids:?}");

    succeed(&bundle.run(&["pause", "one"]));
    assert_eq!(bundle.state()["status"], "paused");
    fail(
        &bundle.run(&["exec", "one", "true"]),
        255,
        &["paused container"],
    );
    succeed(&bundle.run(&["resume", "one"]));
    succeed(&bundle.run(&["update", "--memory", "100M", "one"]));
    let limit = bundle.run(&["exec", "one", "cat", "/sys/fs/cgroup/memory.max"]);
    assert_eq!(succeed(&limit), "104857600\n");
    let stats: Value =
        serde_json::from_str(&succeed(&bundle.run(&["events", "--stats", "one"]))).unwrap();
    assert!(stats["data"]["memory"]["usage"]["usage"].as_u64().unwrap() > 0);

    let exec = bundle.run(&[
        "exec",
        "-e",
        "A=b",
        "--cwd",
        "/tmp",
        "-u",
        "1000",
        "one",
        "sh",
        "-c",
        "echo $A $PWD $(id -u); exit 3",
    ]);
    assert_eq!(
        (exec.status.code(), text(&exec.stdout).as_str()),
        (Some(3), "b /tmp 1000\n")
    );
    fail(
        &bundle.run(&["exec", "one", "nonsense"]),
        255,
        &["\"nonsense\"", "executable file not found"],
    );

    succeed(&bundle.run(&["kill", "one", "TERM"]));
    await_end(pid);
    assert_eq!(bundle.written(), "up\nended\n");
    let state = bundle.state();
    assert_eq!(
        (&state["status"], &state["pid"]),
        (&"stopped".into(), &0.into())
    );
    fail(
        &bundle.run(&["kill", "one", "KILL"]),
        1,
        &["container not running"],
    );
    // Nobody is left, so everybody has got it.
    succeed(&bundle.run(&["kill", "--all", "one", "KILL"]));
    assert_eq!(succeed(&bundle.run(&["ps", "-f", "json", "one"])), "[]\n");
    fail(
        &bundle.run(&["exec", "one", "true"]),
        255,
        &["stopped container"],
    );
    fail(&bundle.run(&["start", "one"]), 1, &["has stopped"]);
    succeed(&bundle.run(&["delete", "one"]));
    fail(&bundle.run(&["state", "one"]), 1, &["does not exist"]);
    fail(&bundle.run(&["delete", "one"]), 1, &["does not exist"]);
    succeed(&bundle.run(&["delete", "--force", "one"]));
    let errors = bundle.log();
    let last: Value = serde_json::from_str(errors.lines().last().unwrap()).unwrap();
    assert_eq!(last["level"], "error");
    assert!(last["msg"].as_str().unwrap().contains("does not exist"));
}

#[test]
fn run_gives_the_containers_output_and_status_and_leaves_nothing() {
    let bundle = Bundle::shell("echo out; echo err >&2; exit 7");
    let output = bundle.output();
    assert_eq!(output.status.code(), Some(7), "{}", bundle.log());
    assert_eq!(
        (text(&output.stdout).as_str(), text(&output.stderr).as_str()),
        ("out\n", "err\n")
    );
}

#[test]
fn the_pid_that_a_caller_gets_takes_signals_and_its_death_is_the_containers() {
    let bundle = Bundle::shell("trap 'echo usr1' USR1; echo up; while :; do sleep 0.1; done");
    let pid = bundle.create_and_start();
    let exec_pid = bundle.host.path("exec-pid");
    let script = "trap 'exit 9' USR2; while :; do sleep 0.1; done";
    let mut detached = command(&bundle.host);
    detached.args(["exec", "-d", "--pid-file", exec_pid.to_str().unwrap()]);
    detached.args(["one", "sh", "-c", script]);
    // Its streams are the process's for as long as that lives.
    let null = || Stdio::null();
    let status = detached.stdout(null()).stderr(null()).status();
    assert!(status.unwrap().success(), "{}", bundle.log());
    let exec: i32 = fs::read_to_string(exec_pid).unwrap().parse().unwrap();
    let count = "ps | grep -c '[U]SR2;'";
    assert_eq!(
        succeed(&bundle.run(&["exec", "one", "sh", "-c", count])),
        "1\n"
    );
    signal(exec, libc::SIGKILL);
    await_end(exec);
    // The lifeline is cut, and the guest's process goes.
    let gone = format!("while [ $({count}) != 0 ]; do sleep 0.1; done");
    succeed(&bundle.run(&["exec", "one", "sh", "-c", &gone]));

    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert!(cgroups.contains(&bundle.cgroup()), "{cgroups}");
    let own = fs::read_link("/proc/self/ns/net").unwrap();
    assert_ne!(fs::read_link(format!("/proc/{pid}/ns/net")).unwrap(), own);
    signal(pid, libc::SIGUSR1);
    signal(pid, libc::SIGKILL);
    await_end(pid);
    assert_eq!(bundle.state()["status"], "stopped");
}

fn signal(pid: i32, number: i32) {
    // SAFETY: kill(2) takes two integers.
    assert_eq!(unsafe { libc::kill(pid, number) }, 0);
}

#[test]
fn hooks_run_where_and_when_they_should() {
    let script = "cat $LOG/place 2>/dev/null; exit 0";
    let bundle = Bundle::shell(script);
    let log = bundle.host.path("hooks");
    let hook = |name: &str| {
        let script = format!(
            "printf '%s ' {name} >> {log}; sed 's/.*\"status\":\"\\([a-z]*\\)\".*/\\1/' >> {log}; echo >> {log}",
            log = log.display()
        );
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"], "timeout": 20 }])
    };
    let inside = json!([{ "path": "/bin/sh", "args": ["sh", "-c", "echo inside > /started"] }]);
    let bundle = bundle.with(|config| {
        config["hooks"] = json!({
            "prestart": hook("prestart"), "createRuntime": hook("createRuntime"),
            "createContainer": hook("createContainer"), "startContainer": inside,
            "poststart": hook("poststart"), "poststop": hook("poststop"),
        });
    });
    let output = bundle.output();
    assert!(output.status.success(), "{}", bundle.log());
    let ran = fs::read_to_string(bundle.host.path("hooks")).unwrap();
    let ran: Vec<&str> = ran.lines().filter(|line| !line.is_empty()).collect();
    assert_eq!(
        ran,
        [
            "prestart creating",
            "createRuntime creating",
            "createContainer creating",
            "poststart running",
            "poststop stopped"
        ]
    );
    let started = fs::read_to_string(bundle.dir().join("rootfs/started"));
    assert_eq!(started.unwrap(), "inside\n");
}

#[test]
fn a_hook_that_fails_ends_the_container_before_it_is_one() {
    let bundle = Bundle::shell("true").with(|config| {
        config["hooks"] = json!({ "createRuntime": [{ "path": "/bin/sh", "args": ["sh", "-c", "echo oh no; exit 1"] }] });
    });
    fail(&bundle.output(), 1, &["createRuntime", "oh no"]);
    fail(&bundle.run(&["state", "one"]), 1, &["does not exist"]);
}

#[test]
fn a_vm_that_dies_is_the_reason_and_not_the_hook_that_misses_it() {
    // As docker's own does, it looks for the namespace of the pid that it was told.
    let script = "read -r state; pid=${state#*\\\"pid\\\":}; pid=${pid%%[,\\}]*}; while [ -e /proc/$pid/ns/net ]; do sleep 0.1; done; echo no namespace; exit 1";
    let bundle = Bundle::shell("true").with(|config| {
        config["hooks"] =
            json!({ "createRuntime": [{ "path": "/bin/sh", "args": ["sh", "-c", script] }] });
    });
    // An initial ramfs without an init is the surest way.
    let empty = bundle.host.file("initramfs", [0u8; 512]);
    let output = command(&bundle.host)
        .env("CLOISON_INITRAMFS", empty)
        .args(["run", "--bundle", bundle.dir().to_str().unwrap(), "one"])
        .output()
        .unwrap();
    fail(&output, 1, &["panicked"]);
    fail(&bundle.run(&["state", "one"]), 1, &["does not exist"]);
}

#[test]
fn an_exec_can_be_in_a_cgroup_below_the_containers() {
    let bundle = Bundle::shell(
        "mount -t cgroup2 none /mnt && mkdir -p /mnt/own/deep && echo made; sleep 1000",
    );
    fs::create_dir_all(bundle.dir().join("rootfs/mnt")).unwrap();
    let bundle = bundle.with(|config| {
        for set in ["bounding", "effective", "permitted"] {
            let set = config["process"]["capabilities"][set]
                .as_array_mut()
                .unwrap();
            set.push("CAP_SYS_ADMIN".into());
        }
    });
    bundle.create_and_start();
    let begun = std::time::Instant::now();
    while !bundle.written().contains("made") {
        assert!(begun.elapsed().as_secs() < 60, "{}", bundle.written());
    }
    let of =
        |path: &str| bundle.run(&["exec", "--cgroup", path, "one", "cat", "/proc/self/cgroup"]);
    assert_eq!(succeed(&of("/own/deep")), "0::/own/deep\n");
    assert_eq!(succeed(&of("own")), "0::/own\n");
    assert_eq!(succeed(&of("/")), "0::/\n");
    fail(&of("/missing"), 255, &["missing", "No such file"]);
    fail(&of("../other"), 255, &["is not a sub cgroup path"]);
    fail(&of("cpu:/own"), 255, &["names controllers"]);
}

#[test]
fn a_file_can_be_a_descriptor_of_the_callers() {
    let bundle = Bundle::shell("sleep 1000");
    bundle.create_and_start();
    let process = bundle.host.path("process.json");
    fs::write(
        &process,
        r#"{ "cwd": "/", "args": ["/bin/echo", "given"] }"#,
    )
    .unwrap();
    // As shells do with <(COMMAND).
    let with = |number: u32| {
        let script = format!("exec {number}<\"$0\"; exec \"$@\" exec -p /proc/self/fd/9 one");
        let mut command = Command::new("busybox");
        command.args(["sh", "-c", &script]).arg(&process);
        command.args(arguments(&bundle.host)).output().unwrap()
    };
    assert_eq!(succeed(&with(9)), "given\n");
    fail(&with(8), 255, &["cannot read /proc/self/fd/9"]);
}

#[test]
fn a_guests_kernel_log_can_be_given_to_a_container() {
    let script = "echo '<6>from the container' >/dev/kmsg; timeout 2 cat /dev/kmsg | grep -o 'from the container'";
    let bundle = Bundle::shell(script);
    let bundle = bundle.with(|config| {
        config["linux"]["devices"] =
            json!([{ "path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11, "fileMode": 438 }]);
        // As on any host that keeps its log from others (kernel.dmesg_restrict).
        for set in ["bounding", "effective", "permitted"] {
            let set = config["process"]["capabilities"][set]
                .as_array_mut()
                .unwrap();
            set.push("CAP_SYSLOG".into());
        }
        let rule = json!({ "allow": true, "type": "c", "major": 1, "minor": 11, "access": "rw" });
        config["linux"]["resources"]["devices"]
            .as_array_mut()
            .unwrap()
            .push(rule);
    });
    let output = bundle.output();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(out, "from the container\n", "{err}");
}

/// What cannot be done is refused before anything is made.
#[test]
fn what_a_vm_cannot_do_is_refused_with_the_reason() {
    let without = |kind: &'static str| {
        move |config: &mut Value| {
            let all = config["linux"]["namespaces"].as_array_mut().unwrap();
            all.retain(|namespace| namespace["type"] != kind);
        }
    };
    type Change = Box<dyn FnOnce(&mut Value)>;
    let cases: Vec<(Change, &str)> = vec![
        (Box::new(without("network")), "network namespace"),
        (Box::new(without("pid")), "PID namespace"),
        (
            Box::new(|c| {
                c["linux"]["namespaces"][0] = json!({ "type": "pid", "path": "/proc/1/ns/pid" })
            }),
            "only such a container's can be joined",
        ),
        (
            Box::new(|c| {
                c["linux"]["devices"] =
                    json!([{ "path": "/dev/sda", "type": "b", "major": 8, "minor": 0 }])
            }),
            "/dev/sda",
        ),
        (
            Box::new(|c| c["linux"]["intelRdt"] = json!({ "closID": "x" })),
            "intelRdt",
        ),
        (
            Box::new(|c| c["linux"]["resources"]["blockIO"] = json!({ "leafWeight": 10 })),
            "blockIO",
        ),
        (
            Box::new(|c| c["linux"]["resources"]["memory"] = json!({ "limit": 1024 })),
            "too small",
        ),
        (Box::new(|c| c["ociVersion"] = "2.0.0".into()), "ociVersion"),
        (
            Box::new(|c| c["root"]["path"] = "nowhere".into()),
            "nowhere",
        ),
        (
            Box::new(|c| c["annotations"] = json!({ "io.cloison.engine": "magic" })),
            "io.cloison.engine",
        ),
        (
            Box::new(|c| {
                c["mounts"]
                    .as_array_mut()
                    .unwrap()
                    .push(json!({ "destination": "/x", "type": "nfs", "source": "x" }))
            }),
            "nfs",
        ),
        (
            Box::new(|c| {
                c["mounts"].as_array_mut().unwrap().push(json!({ "destination": "/x", "type": "bind", "source": "/gone", "options": ["bind"] }))
            }),
            "/gone",
        ),
    ];
    let mut bundle = Bundle::shell("true");
    let good = bundle.config.clone();
    for (change, word) in cases {
        bundle.config = good.clone();
        change(&mut bundle.config);
        bundle.write();
        fail(&bundle.output(), 1, &[word]);
    }
    fs::write(bundle.dir().join("config.json"), "{").unwrap();
    fail(&bundle.output(), 1, &["config.json"]);
    let none = bundle.run(&["create", "--bundle", "/nonexistent", "one"]);
    fail(&none, 1, &["/nonexistent"]);
    fail(&bundle.run(&["checkpoint", "one"]), 1, &["not supported"]);
    succeed(&bundle.run(&["checkpoint", "--help"]));
}

#[test]
fn a_vm_that_dies_is_no_success_and_leaves_its_last_words_in_the_log() {
    let bundle = Bundle::shell("echo c > /proc/sysrq-trigger; sleep 100").with(|config| {
        let all = json!(["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"]);
        config["process"]["capabilities"] =
            json!({ "bounding": all, "effective": all, "permitted": all });
        config["linux"]["readonlyPaths"] = json!([]);
        config["linux"]["maskedPaths"] = json!([]);
    });
    let vm = bundle.create_and_start();
    // Whatever the guest makes of the above, its VM is gone in the end.
    let pids: Vec<i32> =
        serde_json::from_str(&text(&bundle.run(&["ps", "-f", "json", "one"]).stdout))
            .unwrap_or_default();
    for pid in pids.into_iter().filter(|pid| *pid != vm) {
        // SAFETY: kill(2) takes two integers; a process that is gone already is no error here.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
    await_end(vm);
    assert!(
        bundle.log().contains("the VM has ended"),
        "{}",
        bundle.log()
    );
    assert_eq!(bundle.state()["status"], "stopped");
}

#[test]
fn the_version_and_the_features_are_what_callers_parse() {
    let host = Host::new();
    let version = succeed(&runtime(&host, &["--version"]));
    assert_eq!(version.lines().count(), 3);
    assert!(version.contains(" version ") && version.contains("\nspec: 1."));
    let features: Value = serde_json::from_str(&succeed(&runtime(&host, &["features"]))).unwrap();
    assert_eq!(features["linux"]["apparmor"]["enabled"], false);
    fail(&runtime(&host, &["delete", "gone"]), 1, &["does not exist"]);
    succeed(&runtime(&host, &["delete", "--force", "gone"]));
}

#[test]
fn output_that_the_container_closes_is_over_for_its_caller_too() {
    let bundle = Bundle::shell("echo up; exec >/dev/null 2>&1; exec sleep 1000");
    let dir = bundle.dir();
    let run = ["run", "--detach", "-b", dir.to_str().unwrap(), "one"];
    // Whoever reads to the end does so while it runs.
    assert_eq!(succeed(&bundle.run(&run)), "up\n");
    assert_eq!(bundle.state()["status"], "running");
}

#[test]
fn a_container_can_be_deleted_while_its_vm_is_on_its_way_out() {
    let bundle = Bundle::shell("echo done");
    let dir = bundle.dir();
    for _ in 0..4 {
        let (mut output, end) = std::io::pipe().unwrap();
        let created = command(&bundle.host)
            .args(["create", "--bundle", dir.to_str().unwrap(), "one"])
            .stdout(end.try_clone().unwrap())
            .stderr(end)
            .status();
        assert!(created.unwrap().success(), "{}", bundle.log());
        succeed(&bundle.run(&["start", "one"]));
        let mut all = String::new();
        output.read_to_string(&mut all).unwrap();
        assert_eq!(all, "done\n");
        succeed(&bundle.run(&["delete", "--force", "one"]));
        assert_eq!(cgroups(&bundle.cgroup()), Vec::<PathBuf>::new());
    }
}

#[test]
fn a_name_of_another_runtimes_is_this_runtimes_too() {
    let host = Host::new();
    let name = host.path("runc");
    std::os::unix::fs::symlink(dist().join("cloison"), &name).unwrap();
    let output = Command::new(&name).arg("--version").output().unwrap();
    assert_eq!(succeed(&output), succeed(&runtime(&host, &["--version"])),);
}
