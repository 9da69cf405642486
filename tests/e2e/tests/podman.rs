//! podman with this runtime, its storage in a temporary directory.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::host::{data, dist, emulated, image_tar, rootfs, succeed, text};
use crate::oci::cgroups;

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
        let pause = root.join("bin/pause");
        fs::write(
            &pause,
            "#!/bin/sh\ntrap 'exit 0' TERM\nwhile :; do sleep 1 & wait; done\n",
        )
        .unwrap();
        fs::set_permissions(&pause, fs::Permissions::from_mode(0o755)).unwrap();
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
            // Where it has its log of events, from which it learns how an exec has ended.
            .arg("--tmpdir")
            .arg(at("tmp"))
            .args(["--cgroup-manager", "cgroupfs", "--runtime"])
            .arg(dist().join("cloison-runtime"))
            .args(args)
            .output()
            .unwrap()
    }

    /// Runs a container in the background, in a pod.
    fn member(&self, pod: &str, name: &str, script: &str) {
        let options = ["run", "-d", "--pod", pod, "--name", name];
        let command = ["localhost/busybox", "sh", "-c", script];
        succeed(&self.podman(&[&options[..], &LIMITS, &command].concat()));
    }

    fn shell(&self, name: &str, script: &str) -> String {
        succeed(&self.podman(&["exec", name, "sh", "-c", script]))
    }

    /// Every process of the host that has this podman's directory in its command line or environment, and every mount below it
    /// but the storage's own.
    fn left(&self) -> Vec<String> {
        let dir = self.dir.path().to_str().unwrap();
        let processes = fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter_map(|entry| {
                let read = |file: &str| fs::read(entry.path().join(file)).unwrap_or_default();
                let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
                let all = [read("cmdline"), read("environ")].concat();
                let ours = text(&all).contains(dir) && pid != std::process::id();
                ours.then(|| text(&read("cmdline")).replace('\0', " "))
            });
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mounts = mounts.lines().map(str::to_owned);
        let storage = self.dir.path().join("root/overlay");
        let mounts =
            mounts.filter(|line| line.contains(dir) && line.split(' ').nth(4) != storage.to_str());
        processes.chain(mounts).collect()
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

/// podman 4.3 takes a cgroup v1 controller that the kernel has and nobody has mounted for one that is, makes plain directories and files in
/// its place, and cannot remove them.
fn clear_unmounted_controllers(pod: &str) {
    let root = Path::new("/sys/fs/cgroup");
    let device = fs::metadata(root).unwrap().dev();
    for entry in fs::read_dir(root).unwrap().flatten() {
        if entry.metadata().is_ok_and(|found| found.dev() == device) {
            let place = entry.path().join("libpod_parent").join(pod);
            let _ = fs::remove_dir_all(place);
        }
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        let left = text(&self.podman(&["ps", "-aq"]).stdout);
        for pod in text(&self.podman(&["pod", "ps", "-q", "--no-trunc"]).stdout).lines() {
            clear_unmounted_controllers(pod);
        }
        self.podman(&["pod", "rm", "-af", "-t", "0"]);
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

/// The pod's first container is podman's own; its VM is everybody's.
#[test]
fn a_pod_of_podman_is_one_vm_with_several_containers() {
    if emulated() {
        return;
    }
    let podman = Podman::new();
    let created = podman.podman(&[
        "pod",
        "create",
        "--name",
        "pod",
        "--network",
        "none",
        "--infra-image",
        "localhost/busybox",
        "--infra-command",
        "/bin/pause",
    ]);
    let id = succeed(&created);
    let serve = "echo hello >/tmp/index.html; echo serving; httpd -p 127.0.0.1:8000 -h /tmp; trap 'exit 3' TERM; while :; do sleep 0.1; done";
    podman.member("pod", "web", serve);
    podman.member("pod", "side", "echo beside; exec sleep 1000");
    let boot = "cat /proc/sys/kernel/random/boot_id";
    let guest = podman.shell("web", boot);
    assert_eq!(podman.shell("side", boot), guest);
    assert_ne!(
        fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap(),
        guest
    );
    assert_eq!(podman.shell("side", "uname -n"), "pod\n");
    assert_eq!(podman.shell("web", "uname -n"), "pod\n");
    assert_eq!(
        podman.shell("side", "wget -q -O - http://127.0.0.1:8000/index.html"),
        "hello\n"
    );
    assert_eq!(succeed(&podman.podman(&["logs", "web"])), "serving\n");
    assert_eq!(succeed(&podman.podman(&["logs", "side"])), "beside\n");

    let options = ["run", "--rm", "-t", "--pod", "pod"];
    let terminal = podman.podman(&[&options[..], &LIMITS, &["localhost/busybox", "tty"]].concat());
    assert!(succeed(&terminal).starts_with("/dev/pts/"));

    // One of them ends and begins again; the other one lives on.
    succeed(&podman.podman(&["kill", "side"]));
    succeed(&podman.podman(&["wait", "side"]));
    let code = podman.podman(&["inspect", "-f", "{{.State.ExitCode}}", "side"]);
    assert_eq!(succeed(&code), "137\n");
    assert_eq!(podman.shell("web", boot), guest);
    succeed(&podman.podman(&["start", "side"]));
    assert_eq!(podman.shell("side", boot), guest);
    succeed(&podman.podman(&["rm", "-f", "-t", "0", "side"]));
    assert_eq!(podman.shell("web", boot), guest);

    succeed(&podman.podman(&["pod", "stop", "-t", "5", "pod"]));
    let code = podman.podman(&["inspect", "-f", "{{.State.ExitCode}}", "web"]);
    assert_eq!(succeed(&code), "3\n");
    succeed(&podman.podman(&["pod", "start", "pod"]));
    assert_eq!(podman.shell("web", "uname -n"), "pod\n");
    assert_ne!(podman.shell("web", boot), guest, "it is another VM");
    clear_unmounted_controllers(id.trim());
    succeed(&podman.podman(&["pod", "rm", "-f", "-t", "0", "pod"]));
    assert_eq!(podman.left(), Vec::<String>::new());
    // The pod's own in a hierarchy without controllers, which podman does not know, is left with any runtime.
    let mut left = cgroups(&format!("libpod_parent/{}", id.trim()));
    left.retain(|cgroup| {
        !(cgroup.starts_with("/sys/fs/cgroup/systemd") && fs::remove_dir(cgroup).is_ok())
    });
    assert_eq!(left, Vec::<PathBuf>::new());
}
