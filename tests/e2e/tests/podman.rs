//! podman with this runtime, its storage in a temporary directory.

use std::fs;
use std::process::{Command, Output};

use crate::host::{data, dist, emulated, image_tar, rootfs, succeed, text};

struct Podman {
    dir: tempfile::TempDir,
}

/// podman raises these limits to more than a machine may allow, unless it is told.
const LIMITS: [&str; 4] = [
    "--ulimit",
    "nofile=1024:1024",
    "--ulimit",
    "nproc=1024:1024",
];

impl Podman {
    fn new() -> Self {
        let dir = tempfile::TempDir::with_prefix("cloison-e2e-podman-").unwrap();
        let podman = Self { dir };
        let (root, tar) = (
            podman.dir.path().join("rootfs"),
            podman.dir.path().join("image.tar"),
        );
        rootfs(&root);
        image_tar(&root, &tar);
        succeed(&podman.podman(&["import", tar.to_str().unwrap(), "busybox"]));
        podman
    }

    fn podman(&self, args: &[&str]) -> Output {
        let at = |name: &str| self.dir.path().join(name);
        Command::new("podman")
            .env("CLOISON_DATA_DIR", data())
            .arg("--root")
            .arg(at("root"))
            .arg("--runroot")
            .arg(at("run"))
            .args(["--cgroup-manager", "cgroupfs", "--runtime"])
            .arg(dist().join("cloison-runtime"))
            .args(args)
            .output()
            .unwrap()
    }

    fn run(&self, options: &[&str], script: &str) -> Output {
        let all = ["run", "--network", "none"];
        self.podman(
            &[
                &all,
                &LIMITS[..],
                options,
                &["localhost/busybox", "sh", "-c", script],
            ]
            .concat(),
        )
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        let left = text(&self.podman(&["ps", "-aq"]).stdout);
        self.podman(&["rm", "-af"]);
        // Its storage is mounted below the directory.
        self.podman(&["system", "reset", "-f"]);
        let root = self.dir.path().join("root");
        let _ = Command::new("umount")
            .arg("-R")
            .arg(root.join("overlay"))
            .output();
        if !std::thread::panicking() {
            assert_eq!(left, "", "containers are left");
        }
    }
}

#[test]
fn podman_runs_execs_and_stops_containers() {
    if emulated() {
        return;
    }
    let podman = Podman::new();
    let output = podman.run(&["--rm"], "uname -r; exit 3");
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    assert_ne!(
        text(&output.stdout),
        fs::read_to_string("/proc/sys/kernel/osrelease").unwrap()
    );
    let script = "trap 'echo bye; exit 4' TERM; echo up; while :; do sleep 0.1; done";
    succeed(&podman.run(&["-d", "--name", "one", "--tmpfs", "/t"], script));
    let exec = podman.podman(&["exec", "one", "sh", "-c", "echo in; touch /t/x; exit 5"]);
    assert_eq!(
        (exec.status.code(), text(&exec.stdout).as_str()),
        (Some(5), "in\n")
    );
    succeed(&podman.podman(&["stop", "one"]));
    let code = podman.podman(&["inspect", "-f", "{{.State.ExitCode}}", "one"]);
    assert_eq!(succeed(&code), "4\n");
    assert_eq!(succeed(&podman.podman(&["logs", "one"])), "up\nbye\n");
    succeed(&podman.podman(&["rm", "one"]));
}
