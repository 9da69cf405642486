//! podman with this runtime, its storage in a temporary directory: this machine's, 4.3, and one of a tree, 5. What podman does with a container's
//! process on the host and its namespaces (exec, cp, pods) is tested with both, for that is its own and changed between the two. What it says in a
//! container's spec is tested with the newer one, and so are networks with names, for which this machine's has no server.

use std::fs::{self, File};
use std::io::{Read, Write, pipe};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};

use crate::host::{data, dist, emulated, fail, image_tar, rootfs, succeed, text};
use crate::oci::cgroups;
use crate::oci_descriptors::hand;
use crate::trees::{Release, child_of, in_tree};

pub struct Podman {
    dir: tempfile::TempDir,
    /// The command that runs another where this podman is.
    enter: Vec<String>,
    /// Who makes cgroups.
    manager: &'static str,
    /// What holds the tree that it is in, if it is in one.
    tree: Option<Child>,
}

/// podman 4.3 raises these limits to more than a machine may allow, unless it is told.
const LIMITS: [&str; 4] = [
    "--ulimit",
    "nofile=1024:1024",
    "--ulimit",
    "nproc=1024:1024",
];

/// The first process of a tree. It reaps what others leave behind.
const WAIT: &str = "echo ready; tail -f /dev/null; true";

impl Podman {
    fn new(release: Release) -> Self {
        let dir = tempfile::TempDir::with_prefix("cloison-e2e-podman-").unwrap();
        let (mut enter, mut tree) = (Vec::new(), None);
        if let Release::Tree(name) = release {
            let mut command = in_tree(dir.path(), name);
            let mut process = command
                .args(["env", "-i", "sh", "-c", WAIT])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut ready = [0; 6];
            process
                .stdout
                .as_mut()
                .unwrap()
                .read_exact(&mut ready)
                .unwrap();
            let pid = child_of(&process).to_string();
            enter = ["nsenter", "-m", "-n", "-p", "-t", &pid]
                .map(str::to_owned)
                .into();
            tree = Some(process);
        }
        Self::start(dir, enter, "cgroupfs", tree)
    }

    /// This machine's, with what a command of these words puts before another.
    pub fn behind(enter: Vec<String>, manager: &'static str) -> Self {
        let dir = tempfile::TempDir::with_prefix("cloison-e2e-podman-").unwrap();
        Self::start(dir, enter, manager, None)
    }

    fn start(
        dir: tempfile::TempDir,
        enter: Vec<String>,
        manager: &'static str,
        tree: Option<Child>,
    ) -> Self {
        let podman = Self {
            dir,
            enter,
            manager,
            tree,
        };
        *PODMANS.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        let (root, tar) = (podman.path("rootfs"), podman.path("image.tar"));
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

    /// A place below its directory, which it sees under the same name.
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn podman(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn command(&self, args: &[&str]) -> Command {
        let data = match self.tree {
            Some(_) => self.path("cloison"),
            None => data(),
        };
        let (enter, podman) = (self.enter.iter(), "podman".to_owned());
        let mut words = enter.chain([&podman]);
        let mut command = Command::new(words.next().unwrap());
        command
            .args(words)
            .env("CLOISON_DATA_DIR", data)
            .env("PODMAN_IGNORE_CGROUPSV1_WARNING", "1")
            .arg("--root")
            .arg(self.path("root"))
            .arg("--runroot")
            .arg(self.path("run"))
            // Where it has its log of events, from which it learns how an exec has ended.
            .arg("--tmpdir")
            .arg(self.path("tmp"))
            .args(["--events-backend", "file"])
            .args(["--cgroup-manager", self.manager, "--runtime"])
            .arg(dist().join("cloison-runtime"))
            .args(args)
            .stdin(Stdio::null());
        command
    }

    /// What a command of podman's that must succeed says.
    pub fn say(&self, args: &[&str]) -> String {
        succeed(&self.podman(args)).trim().to_owned()
    }

    pub fn inspect(&self, name: &str, field: &str) -> String {
        self.say(&["inspect", "-f", &format!("{{{{{field}}}}}"), name])
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
                let own = [Some(std::process::id()), self.tree.as_ref().map(Child::id)];
                let ours = text(&all).contains(dir) && !own.contains(&Some(pid));
                ours.then(|| text(&read("cmdline")).replace('\0', " "))
            });
        let whose = self
            .tree
            .as_ref()
            .map_or_else(|| "self".to_owned(), |tree| child_of(tree).to_string());
        let mounts = fs::read_to_string(format!("/proc/{whose}/mountinfo")).unwrap();
        let mounts = mounts.lines().map(str::to_owned);
        let (below, storage) = (format!(" {dir}/"), format!(" {dir}/root/overlay "));
        let mounts = mounts.filter(|line| line.contains(&below) && !line.contains(&storage));
        processes.chain(mounts).collect()
    }

    /// A container without a network, unless the options give it one.
    pub fn run(&self, options: &[&str], script: &str) -> Output {
        let network = match options.contains(&"--network") {
            true => &[][..],
            false => &["--network", "none"],
        };
        let command = ["localhost/busybox", "sh", "-c", script];
        self.podman(&[&["run"], network, &LIMITS, options, &command].concat())
    }

    /// What a container says that must succeed.
    fn said(&self, options: &[&str], script: &str) -> String {
        succeed(&self.run(&[&["--rm"], options].concat(), script))
    }
}

/// podman 4.3 takes a cgroup v1 controller that the kernel has and nobody has mounted for one that is, makes plain directories and files in
/// its place, and cannot remove them. These are what of it there is for all pods.
fn unmounted_controllers() -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let device = fs::metadata(root).unwrap().dev();
    let all = fs::read_dir(root).unwrap().flatten();
    let plain = all.filter(|entry| entry.metadata().is_ok_and(|found| found.dev() == device));
    plain
        .map(|entry| entry.path().join("libpod_parent"))
        .collect()
}

fn clear_unmounted_controllers(pod: &str) {
    for parent in unmounted_controllers() {
        let _ = fs::remove_dir_all(parent.join(pod));
    }
}

/// How many podmans there are. What podman leaves for all pods is taken away with the last.
static PODMANS: Mutex<usize> = Mutex::new(0);

/// Removes what is for all pods.
fn clear_all_unmounted_controllers() {
    // Where podman has its own processes.
    clear_unmounted_controllers("conmon");
    for parent in unmounted_controllers() {
        // Whoever else has a pod keeps it.
        let _ = fs::remove_dir(parent);
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        let left = text(&self.podman(&["ps", "-aq"]).stdout);
        for pod in text(&self.podman(&["pod", "ps", "-q", "--no-trunc"]).stdout).lines() {
            clear_unmounted_controllers(pod);
        }
        self.podman(&["pod", "rm", "-af", "-t", "0"]);
        self.podman(&["rm", "-af", "-t", "0"]);
        // Its storage is mounted below the directory.
        self.podman(&["system", "reset", "-f"]);
        let mut unmount = self.enter.clone();
        unmount.extend(["umount", "-R"].map(str::to_owned));
        unmount.push(self.path("root/overlay").to_str().unwrap().to_owned());
        let _ = Command::new(&unmount[0]).args(&unmount[1..]).output();
        if let Some(mut tree) = self.tree.take() {
            tree.kill().unwrap();
            tree.wait().unwrap();
        }
        {
            // A test that failed has failed, and no more.
            let mut podmans = PODMANS.lock().unwrap_or_else(PoisonError::into_inner);
            *podmans -= 1;
            if *podmans == 0 {
                clear_all_unmounted_controllers();
            }
        }
        if !std::thread::panicking() {
            assert_eq!(left, "", "containers are left");
        }
    }
}

#[test]
fn podman_runs_changes_and_stops_containers() {
    if emulated() {
        return;
    }
    let podman = Podman::new(Release::Host);
    life(&podman);
    files(&podman);
    descriptors(&podman);
}

#[test]
fn podman_5_runs_changes_and_stops_containers() {
    if emulated() {
        return;
    }
    let podman = Podman::new(Release::Tree("trixie"));
    let version = podman.say(&["version", "-f", "{{.Server.Version}}"]);
    assert!(version.starts_with("5."), "{version}");
    life(&podman);
    files(&podman);
    options(&podman);
    failures(&podman);
    networks(&podman);
    builds(&podman);
    assert_eq!(podman.left(), Vec::<String>::new());
}

fn life(podman: &Podman) {
    let output = podman.run(&["--rm"], "uname -r; exit 3");
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    assert_ne!(
        text(&output.stdout),
        fs::read_to_string("/proc/sys/kernel/osrelease").unwrap()
    );
    let limits = ["-m", "64m", "--pids-limit", "50"];
    let health = ["--health-cmd", "test -e /healthy"];
    let options = [&["-d", "--name", "one"], &limits[..], &health].concat();
    let script = "trap 'echo bye; exit 4' TERM; echo up; while :; do sleep 0.1; done";
    succeed(&podman.run(&options, script));
    let exec = podman.podman(&["exec", "one", "sh", "-c", "echo in; exit 5"]);
    assert_eq!(
        (exec.status.code(), text(&exec.stdout).as_str()),
        (Some(5), "in\n")
    );
    let limits = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max";
    assert_eq!(podman.shell("one", limits), "67108864\n50\n");
    let pid = podman.inspect("one", ".State.Pid");
    assert!(pid.parse::<u32>().unwrap() > 1);

    let check = podman.podman(&["healthcheck", "run", "one"]);
    assert_eq!(check.status.code(), Some(1), "{}", text(&check.stderr));
    podman.shell("one", "touch /healthy");
    succeed(&podman.podman(&["healthcheck", "run", "one"]));

    let format = "{{.Name}} {{.MemUsage}}";
    let stats = podman.say(&["stats", "--no-stream", "--format", format, "one"]);
    assert!(
        stats.starts_with("one ") && stats.contains("MB / "),
        "{stats}"
    );
    // It looks for processes of the host where the container has its files.
    let top = podman.say(&["top", "one"]);
    assert_eq!(top.lines().count(), 1, "{top}");

    podman.say(&["pause", "one"]);
    assert_eq!(podman.inspect("one", ".State.Status"), "paused");
    podman.say(&["unpause", "one"]);
    podman.say(&["update", "--memory", "60m", "one"]);
    let memory = podman.shell("one", "cat /sys/fs/cgroup/memory.max");
    assert_eq!(memory, "62914560\n");

    podman.say(&["restart", "one"]);
    // A signal that the first process does not catch yet means nothing to it; SIGTERM is the fifteenth bit.
    let caught = "until grep -q '^SigCgt.*[4-7c-f]...$' /proc/1/status; do sleep 0.1; done";
    podman.shell("one", caught);
    podman.say(&["stop", "one"]);
    assert_eq!(podman.inspect("one", ".State.ExitCode"), "4");
    assert_eq!(podman.say(&["logs", "one"]), "up\nbye\nup\nbye");
    podman.say(&["start", "one"]);
    podman.say(&["kill", "one"]);
    assert_eq!(podman.say(&["wait", "one"]), "137");
    let id = podman.inspect("one", ".Id");
    podman.say(&["rm", "one"]);
    assert_eq!(cgroups(&id), Vec::<PathBuf>::new());
}

/// `cp` enters the mount namespace of the container's process on the host, where the host's own files would be if the container's were not.
fn files(podman: &Podman) {
    let volume = podman.path("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("file"), "of the volume\n").unwrap();
    let bind = format!("{}:/v", volume.display());
    let options = ["-d", "--name", "two", "--tmpfs", "/t", "-v", &bind];
    // A link of the container's is followed within it.
    let script = "mkdir /d; echo of the guest >/d/file; ln -s /d /to; echo up; exec sleep 1000";
    succeed(&podman.run(&options, script));
    podman.shell("two", "until [ -e /to ]; do :; done");

    let (file, unique) = (podman.path("file"), format!("cp-{}", std::process::id()));
    fs::write(&file, "of the host\n").unwrap();
    let file = file.to_str().unwrap();
    for at in [format!("/tmp/{unique}"), "/to/new".into(), "/v/new".into()] {
        podman.say(&["cp", file, &format!("two:{at}")]);
        let until_there = format!("until cat {at} 2>/dev/null; do :; done");
        assert_eq!(podman.shell("two", &until_there), "of the host\n", "{at}");
    }
    let on_host = [&podman.enter[..], &["ls".into(), format!("/tmp/{unique}")]].concat();
    let on_host = Command::new(&on_host[0]).args(&on_host[1..]).output();
    assert!(!on_host.unwrap().status.success(), "it is on the host");
    assert_eq!(
        fs::read_to_string(volume.join("new")).unwrap(),
        "of the host\n"
    );

    let got = podman.path("got");
    for (from, content) in [
        ("/to/file", "of the guest\n"),
        ("/v/file", "of the volume\n"),
    ] {
        podman.say(&["cp", &format!("two:{from}"), got.to_str().unwrap()]);
        assert_eq!(fs::read_to_string(&got).unwrap(), content, "{from}");
    }
    // What is in the guest's memory alone is out of reach, and says so.
    let into = podman.podman(&["cp", file, "two:/t/new"]);
    fail(&into, 125, &["read-only file system"]);
    podman.shell("two", "echo hidden >/t/file; [ ! -e /t/new ]");
    let from = podman.podman(&["cp", "two:/t/file", got.to_str().unwrap()]);
    fail(&from, 125, &["/t/file", "no such file"]);
    let host = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let from = podman.podman(&[
        "cp",
        "two:/proc/sys/kernel/random/boot_id",
        got.to_str().unwrap(),
    ]);
    fail(&from, 125, &["boot_id"]);
    assert_ne!(fs::read_to_string(&got).unwrap(), host);
    podman.say(&["rm", "-f", "-t", "0", "two"]);
}

fn options(podman: &Podman) {
    let file = podman.path("secret");
    fs::write(&file, "hush").unwrap();
    podman.say(&["secret", "create", "secret", file.to_str().unwrap()]);
    let init = ["--init", "--init-path", "/usr/bin/docker-init"];
    let user = ["--user", "1000:1000", "--cap-drop", "ALL"];
    let locked = [
        "--security-opt",
        "no-new-privileges",
        "--ulimit",
        "core=0:0",
    ];
    // Not read-only as well: a secret has no place then, neither with runc.
    let secret = ["--secret", "secret,uid=1000"];
    let variable = ["--secret", "secret,type=env,target=HUSH"];
    let options = [&init[..], &user, &locked, &secret, &variable].concat();
    let script = "id -u; grep -E 'CapEff|NoNew' /proc/self/status; cat /run/secrets/secret; echo \" $HUSH\"; \
                  ps | grep -c '[p]odman-init'; ulimit -c";
    let expected = "1000\nCapEff:\t0000000000000000\nNoNewPrivs:\t1\nhush hush\n1\n0\n";
    assert_eq!(podman.said(&options, script), expected);
    podman.say(&["secret", "rm", "secret"]);

    let script = "touch /x 2>&1; touch /tmp/x && echo kept";
    let said = podman.said(&["--read-only"], script);
    assert_eq!(said, "touch: /x: Read-only file system\nkept\n");

    let named = ["-v", "named:/n"];
    podman.said(&named, "echo kept >/n/file");
    assert_eq!(podman.said(&named, "cat /n/file"), "kept\n");
    podman.say(&["volume", "rm", "named"]);
}

/// Descriptors beside stdio reach a container by way of conmon, and an exec too.
fn descriptors(podman: &Podman) {
    let file = podman.path("digits");
    fs::write(&file, "0123456789").unwrap();
    let given = |args: &[&str]| {
        let (reader, mut writer) = pipe().unwrap();
        writer.write_all(b"three\n").unwrap();
        let (mut from_four, four) = pipe().unwrap();
        let digits = File::open(&file).unwrap();
        let descriptors = vec![reader.into(), four.into(), digits.into()];
        let mut command = podman.command(args);
        hand(&mut command, descriptors);
        let output = command.output().unwrap();
        drop((command, writer));
        let mut four = String::new();
        from_four.read_to_string(&mut four).unwrap();
        (succeed(&output), four)
    };
    let script = "head -n 1 <&3; echo four >&4; cat <&5";
    let expected = ("three\n0123456789".to_owned(), "four\n".to_owned());
    let shell = ["sh", "-c", script];
    let run = ["run", "--rm", "--network", "none", "--preserve-fds", "3"];
    let run = [&run[..], &LIMITS, &["localhost/busybox"], &shell].concat();
    assert_eq!(given(&run), expected);
    succeed(&podman.run(&["-d", "--name", "fds"], "while :; do sleep 0.1; done"));
    let exec = [&["exec", "--preserve-fds", "3", "fds"][..], &shell].concat();
    assert_eq!(given(&exec), expected);
    podman.say(&["rm", "-f", "-t", "0", "fds"]);
}

fn failures(podman: &Podman) {
    let command = |name| {
        podman.podman(&[
            "run",
            "--rm",
            "--network",
            "none",
            "localhost/busybox",
            name,
        ])
    };
    fail(&command("nonsense"), 127, &["not found"]);
    fail(&command("/etc/passwd"), 126, &["permission denied"]);
    let host = podman.run(&["--rm", "--network", "host"], "true");
    fail(&host, 126, &["host's network"]);
    let oom = podman.run(&["--name", "oom", "-m", "32m"], "exec tail /dev/zero");
    assert_eq!(oom.status.code(), Some(137), "{}", text(&oom.stderr));
    assert_eq!(podman.inspect("oom", ".State.OOMKilled"), "true");
    podman.say(&["rm", "oom"]);
    let script = "echo 2 >/proc/sys/vm/panic_on_oom; exec tail /dev/zero";
    let panic = podman.run(&["--rm", "--privileged", "-m", "32m"], script);
    fail(&panic, 255, &["kernel panicked", "panic_on_oom"]);
}

/// Interfaces, a server of names, published ports.
fn networks(podman: &Podman) {
    podman.say(&["network", "create", "names"]);
    let network = ["--network", "names"];
    let serve = "echo answer >/tmp/index.html; exec httpd -f -p 80 -h /tmp";
    let options = ["-d", "--name", "server", "-p", "127.0.0.1:8080:80"];
    succeed(&podman.run(&[&network[..], &options].concat(), serve));
    let ask =
        "until wget -qO- http://server/; do :; done; ip -o -4 addr show eth0 | grep -c 'inet 10.'";
    assert_eq!(podman.said(&network, ask), "answer\n1\n");
    let ask = ["busybox", "wget", "-qO-", "http://127.0.0.1:8080/"].map(str::to_owned);
    // The host's busybox, in the tree's network.
    let ask = [
        &["nsenter", "-n", "-t"].map(str::to_owned)[..],
        &[podman.enter[5].clone()],
        &ask,
    ]
    .concat();
    let asked = Command::new(&ask[0]).args(&ask[1..]).output().unwrap();
    assert_eq!(succeed(&asked), "answer\n");
    podman.say(&["rm", "-f", "-t", "0", "server"]);
    podman.say(&["network", "rm", "names"]);
}

/// Every RUN is a container in a VM.
fn builds(podman: &Podman) {
    let dir = podman.path("context");
    fs::create_dir(&dir).unwrap();
    let build = |run: &str| {
        let file = format!("FROM localhost/busybox\nRUN {run}\nCMD cat /kernel\n");
        fs::write(dir.join("Dockerfile"), file).unwrap();
        let options = ["build", "--network", "none", "-t", "built"];
        podman.podman(&[&options[..], &[dir.to_str().unwrap()]].concat())
    };
    succeed(&build("uname -r >/kernel"));
    let kernel = podman.say(&["run", "--rm", "--network", "none", "localhost/built"]);
    let host = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_ne!(kernel, host.trim());
    let failing = build("echo why >&2; exit 3");
    assert_eq!(failing.status.code(), Some(3), "{}", text(&failing.stderr));
    assert!(text(&failing.stderr).contains("why"));
}

#[test]
fn a_pod_of_podman_is_one_vm_with_several_containers() {
    if !emulated() {
        pod(&Podman::new(Release::Host));
    }
}

#[test]
fn a_pod_of_podman_5_is_one_vm_with_several_containers() {
    if !emulated() {
        pod(&Podman::new(Release::Tree("trixie")));
    }
}

/// The pod's first container is podman's own; its VM is everybody's.
fn pod(podman: &Podman) {
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

    let file = podman.path("file");
    fs::write(&file, "copied\n").unwrap();
    podman.say(&["cp", file.to_str().unwrap(), "side:/tmp/file"]);
    let until_there = "until cat /tmp/file 2>/dev/null; do :; done";
    assert_eq!(podman.shell("side", until_there), "copied\n");

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
