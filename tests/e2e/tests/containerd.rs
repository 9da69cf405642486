//! containerd with this runtime behind its own shim for runc, by a containerd of the test's own.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};

use crate::host::{data, dist, emulated, rootfs, succeed, text};

struct Containerd {
    dir: tempfile::TempDir,
    process: Child,
}

impl Containerd {
    fn start() -> Self {
        let dir = tempfile::TempDir::with_prefix("cloison-e2e-containerd-").unwrap();
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let config = format!(
            "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[plugins.\"io.containerd.internal.v1.opt\"]\npath = \"{}\"\n",
            at("opt")
        );
        fs::write(dir.path().join("config.toml"), config).unwrap();
        let mut process = Command::new("containerd")
            .env("CLOISON_DATA_DIR", data())
            .args(["--config", &at("config.toml"), "--root", &at("root")])
            .args(["--state", &at("state"), "--address", &at("sock")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let mut lines = lines.map_while(Result::ok);
        assert!(lines.any(|line| line.contains("containerd successfully booted")));
        // Whatever else it has to say must not fill the pipe.
        std::thread::spawn(move || lines.for_each(drop));
        Self { dir, process }
    }

    fn ctr(&self, args: &[&str]) -> Output {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(self.dir.path().join("sock"));
        command.args(args).stdin(Stdio::null()).output().unwrap()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // SAFETY: kill(2) takes two integers, and the process is our child.
        unsafe { libc::kill(i32::try_from(self.process.id()).unwrap(), libc::SIGTERM) };
        self.process.wait().unwrap();
    }
}

#[test]
fn containerds_shim_for_runc_drives_the_runtime() {
    if emulated() {
        return;
    }
    let containerd = Containerd::start();
    let root = containerd.dir.path().join("rootfs");
    rootfs(&root);
    let binary = dist().join("cloison-runtime");
    let run = |id: &str, options: &[&str], command: &[&str]| {
        let all = ["run", "--runc-binary", binary.to_str().unwrap()];
        let place = ["--rootfs", root.to_str().unwrap(), id];
        containerd.ctr(&[&all, options, &place, command].concat())
    };
    let output = run("one", &["--rm"], &["sh", "-c", "uname -r; exit 3"]);
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    assert_ne!(
        text(&output.stdout),
        fs::read_to_string("/proc/sys/kernel/osrelease").unwrap()
    );

    let script = "trap 'exit 4' TERM; while :; do sleep 0.1; done";
    succeed(&run("two", &["-d"], &["sh", "-c", script]));
    let exec = containerd.ctr(&[
        "task",
        "exec",
        "--exec-id",
        "e",
        "two",
        "sh",
        "-c",
        "echo in; exit 5",
    ]);
    assert_eq!(
        (exec.status.code(), text(&exec.stdout).as_str()),
        (Some(5), "in\n")
    );
    let tasks = succeed(&containerd.ctr(&["task", "ls"]));
    assert!(
        tasks.contains("two") && tasks.contains("RUNNING"),
        "{tasks}"
    );
    let status = || {
        let tasks = succeed(&containerd.ctr(&["task", "ls"]));
        let two = tasks.lines().find(|line| line.starts_with("two "));
        two.unwrap().split_whitespace().last().unwrap().to_owned()
    };
    succeed(&containerd.ctr(&["task", "pause", "two"]));
    assert_eq!(status(), "PAUSED");
    succeed(&containerd.ctr(&["task", "resume", "two"]));
    assert_eq!(status(), "RUNNING");
    let metrics = succeed(&containerd.ctr(&["task", "metrics", "--format", "json", "two"]));
    let metrics: serde_json::Value = serde_json::from_str(&metrics).unwrap();
    assert!(
        metrics["pids"]["current"].as_u64().unwrap() > 0,
        "{metrics}"
    );
    succeed(&containerd.ctr(&["task", "kill", "--signal", "SIGTERM", "two"]));
    while status() != "STOPPED" {}
    let removed = containerd.ctr(&["task", "rm", "two"]);
    let said = text(&removed.stderr);
    assert!(
        removed.status.success() && said.contains("exit code 4"),
        "{said}"
    );
    succeed(&containerd.ctr(&["container", "rm", "two"]));
}
