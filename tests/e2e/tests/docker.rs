//! docker with this runtime, by a dockerd of the tests' own in a network namespace of its own: what a person does with docker.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex, Weak};

use crate::host::{data, dist, emulated, fail, image_tar, rootfs, succeed, text};
use crate::pty::Terminal;

/// A dockerd, its data and its cgroup. The tests share one; it goes with the last of them.
struct Daemon {
    dir: tempfile::TempDir,
    process: Child,
}

static DAEMON: Mutex<Weak<Daemon>> = Mutex::new(Weak::new());

/// The daemon; none on a machine that has no room for docker.
fn daemon() -> Option<Arc<Daemon>> {
    if emulated() {
        return None;
    }
    let mut shared = DAEMON
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(daemon) = shared.upgrade() {
        return Some(daemon);
    }
    let daemon = Arc::new(Daemon::start());
    *shared = Arc::downgrade(&daemon);
    Some(daemon)
}

impl Daemon {
    fn start() -> Self {
        let dir = tempfile::TempDir::with_prefix("cloison-e2e-docker-").unwrap();
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let install = Command::new(dist().join("cloison"))
            .args(["install", "docker", "--config", &at("daemon.json")])
            .output()
            .unwrap();
        succeed(&install);
        let script =
            "ip link set lo up && mount -o remount,rw /proc/sys 2>/dev/null; exec dockerd \"$@\"";
        let log = fs::File::create(dir.path().join("log")).unwrap();
        let process = Command::new("unshare")
            .env("CLOISON_DATA_DIR", data())
            .args(["--net", "--mount", "sh", "-c", script, "dockerd"])
            .args([
                "--config-file",
                &at("daemon.json"),
                "--data-root",
                &at("data"),
            ])
            .args(["--exec-root", &at("exec"), "--pidfile", &at("pid")])
            .args(["-H", &format!("unix://{}", at("sock"))])
            .args(["--cgroup-parent", &format!("/{}", name_of(dir.path()))])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let daemon = Self { dir, process };
        daemon.await_ready();
        let tar = daemon.dir.path().join("image.tar");
        let root = daemon.dir.path().join("rootfs");
        rootfs(&root);
        image_tar(&root, &tar);
        succeed(&daemon.docker(&["import", tar.to_str().unwrap(), "busybox"]));
        daemon
    }

    /// dockerd says in its log when it answers.
    fn await_ready(&self) {
        let log = self.dir.path().join("log");
        let mut follow = Command::new("tail")
            .args(["-n", "+1", "-f", log.to_str().unwrap()])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = std::io::BufRead::lines(std::io::BufReader::new(follow.stdout.take().unwrap()));
        let ready = lines
            .map_while(Result::ok)
            .find(|line| line.contains("API listen on") || line.contains("failed to start daemon"));
        follow.kill().unwrap();
        follow.wait().unwrap();
        let ready = ready.unwrap();
        assert!(ready.contains("API listen on"), "{ready}");
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("/usr/bin/docker");
        command
            .arg("-H")
            .arg(format!("unix://{}", self.dir.path().join("sock").display()))
            .args(args)
            .stdin(Stdio::null());
        command
    }

    fn docker(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// `docker run --rm --runtime cloison OPTIONS busybox COMMAND`.
    fn run(&self, options: &[&str], command: &[&str]) -> Output {
        let all = ["run", "--rm", "--runtime", "cloison"];
        let all: Vec<&str> = [&all, options, &["busybox"], command].concat();
        self.docker(&all)
    }

    fn shell(&self, options: &[&str], script: &str) -> String {
        succeed(&self.run(options, &["sh", "-c", script]))
    }

    /// A container in the background.
    fn detached(&self, name: &str, options: &[&str], script: &str) {
        let all = ["run", "-d", "--runtime", "cloison", "--name", name];
        let all: Vec<&str> = [&all, options, &["busybox", "sh", "-c", script]].concat();
        succeed(&self.docker(&all));
    }

    fn inspect(&self, name: &str, field: &str) -> String {
        let format = format!("{{{{{field}}}}}");
        succeed(&self.docker(&["inspect", "-f", &format, name]))
            .trim()
            .to_owned()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let left = text(&self.docker(&["ps", "-aq"]).stdout);
        for id in left.lines() {
            self.docker(&["rm", "-f", id]);
        }
        let states = self.dir.path().join("exec/runtime-runc/moby/sandboxes");
        let sandboxes = fs::read_dir(states).map_or(0, |entries| entries.count());
        let name = name_of(self.dir.path());
        // SAFETY: kill(2) takes two integers, and the process is our child.
        unsafe { libc::kill(i32::try_from(self.process.id()).unwrap(), libc::SIGTERM) };
        self.process.wait().unwrap();
        let cgroups = children(&name);
        remove_cgroups(&name);
        if !std::thread::panicking() {
            assert_eq!(left, "", "containers are left");
            assert_eq!(sandboxes, 0, "sandboxes are left");
            assert_eq!(cgroups, Vec::<PathBuf>::new());
            assert_eq!(processes(&name), Vec::<String>::new());
        }
    }
}

fn name_of(dir: &Path) -> String {
    dir.file_name().unwrap().to_str().unwrap().to_owned()
}

fn hierarchies() -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let inner = fs::read_dir(root)
        .unwrap()
        .flatten()
        .map(|entry| entry.path());
    inner.chain([root.to_owned()]).collect()
}

/// Cgroups of containers, which are below the daemon's parent.
fn children(parent: &str) -> Vec<PathBuf> {
    let below = |dir: PathBuf| fs::read_dir(dir).into_iter().flatten().flatten();
    let all = hierarchies()
        .into_iter()
        .flat_map(|h| below(h.join(parent)));
    all.map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect()
}

fn remove_cgroups(parent: &str) {
    for path in children(parent) {
        let _ = fs::remove_dir(path);
    }
    for hierarchy in hierarchies() {
        let _ = fs::remove_dir(hierarchy.join(parent));
    }
}

/// Command lines that name the daemon's directory.
fn processes(name: &str) -> Vec<String> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let lines = all.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    let lines = lines.map(|line| text(&line).replace('\0', " "));
    lines.filter(|line| line.contains(name)).collect()
}

#[test]
fn a_container_runs_in_a_vm_with_its_status_streams_and_address() {
    let Some(docker) = daemon() else { return };
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
    let Some(docker) = daemon() else { return };
    let status = |command: &str| docker.run(&["--network", "none"], &[command]).status.code();
    assert_eq!(status("nonsense"), Some(127));
    assert_eq!(status("/etc/passwd"), Some(126));
}

#[test]
fn a_container_in_the_background_is_looked_at_changed_and_stopped() {
    let Some(docker) = daemon() else { return };
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
    succeed(&docker.docker(&["pause", "life"]));
    assert_eq!(docker.inspect("life", ".State.Status"), "paused");
    succeed(&docker.docker(&["unpause", "life"]));
    succeed(&docker.docker(&["update", "-m", "60m", "--memory-swap", "-1", "life"]));
    assert_eq!(
        succeed(&exec("cat /sys/fs/cgroup/memory.max")),
        "62914560\n"
    );
    let file = docker.dir.path().join("file");
    fs::write(&file, "copied\n").unwrap();
    succeed(&docker.docker(&["cp", file.to_str().unwrap(), "life:/tmp/file"]));
    assert_eq!(succeed(&exec("cat /tmp/file")), "copied\n");
    let healthy = [
        "events",
        "--since",
        "1m",
        "--filter",
        "event=health_status: healthy",
        "--format",
        "{{.Status}}",
    ];
    let mut events = docker
        .command(&healthy)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut byte = [0];
    std::io::Read::read_exact(events.stdout.as_mut().unwrap(), &mut byte).unwrap();
    events.kill().unwrap();
    events.wait().unwrap();
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
    succeed(&docker.docker(&["rm", "-f", "life"]));
}

#[test]
fn options_of_processes_and_mounts_hold() {
    let Some(docker) = daemon() else { return };
    let dir = docker.dir.path().join("volume");
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
fn a_container_that_takes_too_much_memory_is_said_to_have() {
    let Some(docker) = daemon() else { return };
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
    let Some(docker) = daemon() else { return };
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
    terminal.type_("stty size\r");
    terminal.expect("25 81");
    terminal.resize(100, 30);
    terminal.type_("until [ \"$(stty size)\" = '30 100' ]; do sleep 0.1; done; echo resize''d\r");
    terminal.expect("resized");
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
    terminal.type_("exit 3\r");
    assert_eq!(terminal.child.wait().unwrap().code(), Some(3));
    succeed(&docker.docker(&["rm", "tty"]));
}
