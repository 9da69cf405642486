//! A dockerd of the tests' own, in a network namespace of its own, with its data and its cgroup: this machine's, or that of a tree with
//! a newer release (`tests/trees`).

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use serde_json::{Value, json};

use crate::host::{data, dist, emulated, image_tar, rootfs, succeed, text};
pub use crate::trees::Release;
use crate::trees::{child_of, in_tree};

/// A dockerd. Dropping it checks that nothing is left of its containers.
pub struct Daemon {
    dir: tempfile::TempDir,
    process: Child,
    /// The host's release has one of its own, as on any host; a tree's dockerd starts one itself.
    containerd: Option<Containerd>,
}

/// containerd, and the namespaces that it shares with its dockerd.
struct Containerd {
    process: Child,
    network: fs::File,
    mounts: fs::File,
}

const BOOTED: &str = "containerd successfully booted";

/// What dockerd says, to whoever debugs it, of a connection to containerd.
const CONNECTED: &str = "\"processing event stream\" module=libcontainerd namespace=moby";

const ON_HOST: &str =
    r#"ip link set lo up && mount -o remount,rw /proc/sys 2>/dev/null; exec "$@""#;

impl Daemon {
    /// The host's, which tests of the ordinary share; it goes with the last of them. None on a machine that has no room for docker.
    pub fn shared() -> Option<Arc<Self>> {
        static SHARED: Mutex<Weak<Daemon>> = Mutex::new(Weak::new());
        if emulated() {
            return None;
        }
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(daemon) = shared.upgrade() {
            return Some(daemon);
        }
        let daemon = Arc::new(Self::start(Release::Host, json!({})));
        *shared = Arc::downgrade(&daemon);
        Some(daemon)
    }

    /// One for the caller alone, configured with what `config` has beside cloison. None where there is no room for docker.
    pub fn own(release: Release, config: Value) -> Option<Self> {
        (!emulated()).then(|| Self::start(release, config))
    }

    fn start(release: Release, config: Value) -> Self {
        let dir = tempfile::TempDir::with_prefix("cloison-e2e-docker-").unwrap();
        let file = dir.path().join("daemon.json");
        fs::write(&file, config.to_string()).unwrap();
        let install = Command::new(dist().join("cloison"))
            .args(["install", "docker", "--config", file.to_str().unwrap()])
            .output()
            .unwrap();
        succeed(&install);
        let (process, containerd) = match release {
            Release::Host => {
                let containerd = Containerd::start(dir.path());
                (containerd.dockerd(dir.path()), Some(containerd))
            }
            Release::Tree(name) => {
                let mut command = in_tree(dir.path(), name);
                command.env("CLOISON_DATA_DIR", dir.path().join("cloison"));
                dockerd(&mut command, dir.path());
                (logged(&mut command, &dir.path().join("log")), None)
            }
        };
        await_line(&dir.path().join("log"), "API listen on");
        let daemon = Self {
            dir,
            process,
            containerd,
        };
        let (tar, root) = (daemon.path("image.tar"), daemon.path("rootfs"));
        rootfs(&root);
        image_tar(&root, &tar);
        succeed(&daemon.docker(&["import", tar.to_str().unwrap(), "busybox"]));
        daemon
    }

    /// A place below its directory, which the daemon sees under the same name.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Ends dockerd and starts it anew, as an upgrade of the host's does: its containerd stays.
    pub fn restart(&mut self, signal: i32) {
        let containerd = self.containerd.as_ref().unwrap();
        // SAFETY: kill(2) takes two integers, and the process is our child.
        unsafe { libc::kill(i32::try_from(self.process.id()).unwrap(), signal) };
        self.process.wait().unwrap();
        self.process = containerd.dockerd(self.dir.path());
        await_line(&self.path("log"), "API listen on");
    }

    /// Kills containerd and starts it anew. Until dockerd has noticed, it kills no container and hears of no container's end.
    pub fn restart_containerd(&mut self) {
        let log = self.path("log");
        let earlier = fs::read_to_string(&log).unwrap();
        let earlier = earlier.lines().filter(|line| line.contains(CONNECTED));
        let earlier = earlier.count();
        let containerd = self.containerd.as_mut().unwrap();
        containerd.process.kill().unwrap();
        containerd.process.wait().unwrap();
        containerd.process = containerd.enter(self.dir.path());
        await_line(&self.path("containerd.log"), BOOTED);
        await_lines(&log, CONNECTED, earlier + 1);
    }

    fn stop(&mut self) {
        let pid = match self.containerd {
            Some(_) => i32::try_from(self.process.id()).unwrap(),
            // The tree's init is dockerd.
            None => child_of(&self.process),
        };
        // SAFETY: kill(2) takes two integers, and the process is our child or its.
        unsafe { libc::kill(pid, libc::SIGTERM) };
        self.process.wait().unwrap();
        if let Some(containerd) = &mut self.containerd {
            containerd.process.kill().unwrap();
            containerd.process.wait().unwrap();
        }
    }

    /// The address of its API.
    pub fn address(&self) -> String {
        format!("unix://{}", self.path("sock").display())
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("/usr/bin/docker");
        command
            .arg("-H")
            .arg(self.address())
            .args(args)
            .stdin(Stdio::null());
        command
    }

    pub fn docker(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// What a command of docker's that must succeed says.
    pub fn say(&self, args: &[&str]) -> String {
        succeed(&self.docker(args)).trim().to_owned()
    }

    /// `docker run --rm --runtime cloison OPTIONS busybox COMMAND`.
    pub fn run(&self, options: &[&str], command: &[&str]) -> Output {
        let all = ["run", "--rm", "--runtime", "cloison"];
        let all: Vec<&str> = [&all, options, &["busybox"], command].concat();
        self.docker(&all)
    }

    pub fn shell(&self, options: &[&str], script: &str) -> String {
        succeed(&self.run(options, &["sh", "-c", script]))
    }

    /// A container in the background.
    pub fn detached(&self, name: &str, options: &[&str], script: &str) {
        let all = ["run", "-d", "--runtime", "cloison", "--name", name];
        let all: Vec<&str> = [&all, options, &["busybox", "sh", "-c", script]].concat();
        succeed(&self.docker(&all));
    }

    /// Waits until a container has written a line.
    pub fn until_logged(&self, name: &str, wanted: &str) {
        let mut follow = self.command(&["logs", "-f", name]);
        let mut follow = follow.stdout(Stdio::piped()).spawn().unwrap();
        let lines = std::io::BufRead::lines(std::io::BufReader::new(follow.stdout.take().unwrap()));
        let found = lines.map_while(Result::ok).any(|line| line == wanted);
        follow.kill().unwrap();
        follow.wait().unwrap();
        assert!(found, "{name} never wrote {wanted:?}");
    }

    /// Waits until there have been so many events that the filters let through.
    pub fn until_events(&self, count: usize, filters: &[&str]) {
        let mut args = vec!["events", "--since", "1h", "--format", "{{.Status}}"];
        for filter in filters {
            args.extend(["--filter", filter]);
        }
        let mut events = self.command(&args).stdout(Stdio::piped()).spawn().unwrap();
        let lines = std::io::BufRead::lines(std::io::BufReader::new(events.stdout.take().unwrap()));
        let seen = lines.map_while(Result::ok).take(count).count();
        events.kill().unwrap();
        events.wait().unwrap();
        assert_eq!(seen, count, "{filters:?}");
    }

    pub fn inspect(&self, name: &str, field: &str) -> String {
        self.say(&["inspect", "-f", &format!("{{{{{field}}}}}"), name])
    }

    /// Directories of sandboxes.
    pub fn sandboxes(&self) -> Vec<PathBuf> {
        let states = self.path("exec/runtime-runc/moby/sandboxes");
        let entries = fs::read_dir(states).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }

    /// Command lines that speak of this container.
    pub fn processes_of(&self, id: &str) -> Vec<String> {
        processes(id)
    }

    /// Cgroups that speak of this container.
    pub fn cgroups_of(&self, id: &str) -> Vec<PathBuf> {
        let all = children(&name_of(self.dir.path())).into_iter();
        all.filter(|path| path.to_str().is_some_and(|path| path.contains(id)))
            .collect()
    }
}

/// Waits until a log has a line with this in it.
fn await_line(log: &Path, words: &str) {
    await_lines(log, words, 1);
}

/// Waits until a log has so many lines with this in them.
fn await_lines(log: &Path, words: &str, count: usize) {
    let mut follow = Command::new("tail")
        .args(["-n", "+1", "-f", log.to_str().unwrap()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = std::io::BufRead::lines(std::io::BufReader::new(follow.stdout.take().unwrap()));
    let ready = lines
        .map_while(Result::ok)
        .filter(|line| line.contains(words) || line.contains("failed to start"))
        .nth(count - 1);
    follow.kill().unwrap();
    follow.wait().unwrap();
    let ready = ready.unwrap();
    assert!(ready.contains(words), "{ready}");
}

/// Processes whose command lines have all of these words.
pub fn pids(words: &[&str]) -> Vec<i32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let has = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = text(&line);
        words.iter().all(|word| line.contains(word))
    };
    pids.filter(has).collect()
}

/// Something by which to see a process end; none for one that is gone.
pub fn watch(pid: i32) -> Option<OwnedFd> {
    // SAFETY: pidfd_open(2) takes two integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the descriptor has just been made, and nothing else knows of it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Waits for the end of a process that is watched.
pub fn gone(watched: OwnedFd) {
    let mut poll = libc::pollfd {
        fd: watched.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: poll(2) reads and writes the one structure it is given.
    while unsafe { libc::poll(&raw mut poll, 1, -1) } < 0 {}
}

impl Containerd {
    fn start(dir: &Path) -> Self {
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = {:?}\n",
            dir.join("containerd/root"),
            dir.join("containerd/state"),
            dir.join("containerd.sock"),
        );
        fs::write(dir.join("containerd.toml"), config).unwrap();
        let mut command = Command::new("unshare");
        command.args(["--net", "--mount", "sh", "-c", ON_HOST, "sh"]);
        let process = Self::run(command, dir);
        await_line(&dir.join("containerd.log"), BOOTED);
        let namespace = |name| fs::File::open(format!("/proc/{}/ns/{name}", process.id()));
        let (network, mounts) = (namespace("net").unwrap(), namespace("mnt").unwrap());
        Self {
            process,
            network,
            mounts,
        }
    }

    /// One more in the same namespaces.
    fn enter(&self, dir: &Path) -> Child {
        Self::run(self.nsenter(), dir)
    }

    fn run(mut command: Command, dir: &Path) -> Child {
        command.env("CLOISON_DATA_DIR", data());
        command.arg("containerd").arg("--config");
        command.arg(dir.join("containerd.toml"));
        logged(&mut command, &dir.join("containerd.log"))
    }

    fn nsenter(&self) -> Command {
        let path = |of: &fs::File| format!("/proc/{}/fd/{}", std::process::id(), of.as_raw_fd());
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", path(&self.network)));
        command.arg(format!("--mount={}", path(&self.mounts)));
        command
    }

    fn dockerd(&self, dir: &Path) -> Child {
        let mut command = self.nsenter();
        dockerd(&mut command, dir);
        command.arg("--containerd").arg(dir.join("containerd.sock"));
        logged(&mut command, &dir.join("log"))
    }
}

/// dockerd's command line, on what is in `dir`.
fn dockerd(command: &mut Command, dir: &Path) {
    let at = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    command
        .args(["dockerd", "--log-level", "debug"])
        .args(["--config-file", &at("daemon.json")])
        .args(["--data-root", &at("data"), "--exec-root", &at("exec")])
        .args(["--pidfile", &at("pid")])
        .args(["-H", &format!("unix://{}", at("sock"))])
        .args(["--cgroup-parent", &format!("/{}", name_of(dir))]);
}

fn logged(command: &mut Command, log: &Path) -> Child {
    let log = fs::File::create(log).unwrap();
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .process_group(0)
        .spawn()
        .unwrap()
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let left = text(&self.docker(&["ps", "-aq"]).stdout);
        for id in left.lines() {
            self.docker(&["rm", "-f", id]);
        }
        let sandboxes = self.sandboxes();
        let name = name_of(self.dir.path());
        self.stop();
        let cgroups = children(&name);
        remove_cgroups(&name);
        if !std::thread::panicking() {
            assert_eq!(left, "", "containers are left");
            assert_eq!(sandboxes, Vec::<PathBuf>::new());
            assert_eq!(cgroups, Vec::<PathBuf>::new());
            assert_eq!(processes(&name), Vec::<String>::new());
        }
    }
}

/// Kills a process of the test's own daemon. One that there is not would be the test itself, or all processes.
pub fn kill(pid: i32) {
    assert!(pid > 1, "{pid}");
    // SAFETY: kill(2) takes two integers.
    unsafe { libc::kill(pid, libc::SIGKILL) };
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

/// Command lines that name something.
fn processes(name: &str) -> Vec<String> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let lines = all.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    let lines = lines.map(|line| text(&line).replace('\0', " "));
    lines.filter(|line| line.contains(name)).collect()
}
