//! systemd as the cgroup driver: one of the tests' own, in namespaces of its own, makes the containers' cgroups and sees them go.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::json;

use crate::host::{data, emulated, fail, succeed};
use crate::oci::{Bundle, arguments};
use crate::podman::Podman;

/// Runs systemd as the first process of a PID namespace, with a bus, below cgroups of this name: v2 where that has controllers, otherwise
/// v1. It goes through three stages, for a cgroup v2 that has children must have no processes, but those that were in it first.
const INIT: &str = r#"
set -e
export stage units name hierarchies
move() {
    for hierarchy in $hierarchies; do
        echo 0 >"$hierarchy/$1/cgroup.procs"
    done
}
case $stage in
begin)
    hierarchies=$(sed -n 's/^[^ ]* \([^ ]*\) cgroup2* .*/\1/p' /proc/mounts)
    for hierarchy in $hierarchies; do
        mkdir "$hierarchy/$name"
        # A new one may have nothing to run on.
        for file in cpuset.cpus cpuset.mems; do
            [ ! -e "$hierarchy/$file" ] || cat "$hierarchy/$file" >"$hierarchy/$name/$file" 2>/dev/null || true
        done
    done
    move "$name"
    stage=leave
    exec /usr/bin/unshare --cgroup sh "$0"
    ;;
leave)
    move .
    stage=init
    exec /usr/bin/unshare --mount --net --pid --fork --kill-child sh "$0"
    ;;
init)
    move "$name"
    unified=$(sed -n 's/^[^ ]* \([^ ]*\) cgroup2 .*/\1/p' /proc/mounts)
    controllers=$(cat "$unified/$name/cgroup.controllers")
    mount --make-rprivate /
    mount -t proc proc /proc
    mount -t tmpfs tmpfs /run
    umount -l /sys/fs/cgroup
    case $controllers in
    *memory*) mount -t cgroup2 cgroup2 /sys/fs/cgroup ;;
    *)
        mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
        for kind in none,name=systemd cpu cpuacct cpuset memory pids blkio freezer devices; do
            mkdir "/sys/fs/cgroup/${kind#*=}"
            mount -t cgroup -o "$kind" cgroup "/sys/fs/cgroup/${kind#*=}"
        done
        ;;
    esac
    export container=cloison-e2e SYSTEMD_UNIT_PATH=$units:/run/systemd/system.control:/run/systemd/transient
    exec /lib/systemd/systemd --system --show-status=no --log-target=null
    ;;
esac
"#;

/// A bus on which everything is allowed, whose users are all root.
const BUS: &str = r#"<busconfig>
  <type>system</type>
  <listen>systemd:</listen>
  <policy context="default">
    <allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/>
  </policy>
</busconfig>"#;

/// A systemd, on whose cgroups containers depend. Dropping it ends all that is in its namespaces, and checks that no scope is left of a
/// container.
struct Systemd {
    dir: tempfile::TempDir,
    process: Child,
    /// Its PID here.
    pid: String,
}

impl Systemd {
    fn start() -> Self {
        let dir = tempfile::TempDir::with_prefix("cloison-e2e-systemd-").unwrap();
        let (bus, ready) = (dir.path().join("bus.conf"), dir.path().join("ready"));
        fs::write(&bus, BUS).unwrap();
        succeed(&Command::new("mkfifo").arg(&ready).output().unwrap());
        for (name, text) in [
            (
                "default.target",
                "[Unit]\nRequires=dbus.service ready.service\n".to_owned(),
            ),
            (
                "dbus.socket",
                "[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=/run/dbus/system_bus_socket\n".to_owned(),
            ),
            (
                "dbus.service",
                format!(
                    "[Unit]\nDefaultDependencies=no\nRequires=dbus.socket\n[Service]\nType=notify\n\
                     ExecStart=/usr/bin/dbus-daemon --config-file={} --nofork --nopidfile --systemd-activation\n",
                    bus.display()
                ),
            ),
            (
                // systemd comes to its bus after that has started.
                "ready.service",
                format!(
                    "[Unit]\nDefaultDependencies=no\nAfter=dbus.service\n[Service]\nType=oneshot\nExecStart=/bin/sh -c \
                     'until busctl status org.freedesktop.systemd1; do :; done; echo ready >{}'\n",
                    ready.display()
                ),
            ),
        ] {
            fs::create_dir_all(dir.path().join("units")).unwrap();
            fs::write(dir.path().join("units").join(name), text).unwrap();
        }
        fs::write(dir.path().join("init"), INIT).unwrap();
        let process = Command::new("sh")
            .arg(dir.path().join("init"))
            .env("stage", "begin")
            .env("units", dir.path().join("units"))
            .env("name", name_of(dir.path()))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut said = String::new();
        let mut fifo = fs::File::open(&ready).unwrap();
        fifo.read_to_string(&mut said).unwrap();
        assert_eq!(said, "ready\n");
        let parent = process.id();
        let pid = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap();
        Self {
            dir,
            process,
            pid: pid.trim().to_owned(),
        }
    }

    /// A command under it.
    fn command<I: IntoIterator<Item = String>>(&self, command: I) -> Command {
        let enter = self.enter();
        let mut entered = Command::new(&enter[0]);
        entered
            .env("CLOISON_DATA_DIR", data())
            .args(&enter[1..])
            .args(command)
            .stdin(Stdio::null());
        entered
    }

    /// What a command puts before another to run it there.
    fn enter(&self) -> Vec<String> {
        let words = ["/usr/bin/nsenter", "-t", &self.pid, "-m", "-n", "-p", "-C"];
        words.map(str::to_owned).into()
    }

    fn run<I: IntoIterator<Item = String>>(&self, command: I) -> Output {
        self.command(command).output().unwrap()
    }

    fn shell(&self, script: &str) -> String {
        succeed(&self.run(["sh", "-c", script].map(str::to_owned)))
    }

    /// A property of a unit.
    fn property(&self, unit: &str, name: &str) -> String {
        let value = self.shell(&format!("systemctl show --value -p {name} {unit}"));
        value.trim().to_owned()
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        // SAFETY: kill(2) takes two integers, and the process is our child.
        unsafe { libc::kill(i32::try_from(self.process.id()).unwrap(), libc::SIGKILL) };
        self.process.wait().unwrap();
        let name = name_of(self.dir.path());
        let own: Vec<_> = hierarchies().into_iter().map(|h| h.join(&name)).collect();
        let left: Vec<_> = own.iter().flat_map(|dir| below(dir)).collect();
        for dir in left.iter().chain(&own) {
            while fs::remove_dir(dir).is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY)) {
                // The namespace's last processes are on their way.
                std::thread::yield_now();
            }
        }
        let scopes: Vec<_> = left
            .iter()
            .filter(|dir| {
                let name = dir.to_string_lossy();
                name.contains("cloison-one")
                    || (name.contains("libpod-") && !name.contains("libpod-conmon-"))
            })
            .collect();
        if !std::thread::panicking() {
            assert_eq!(scopes, Vec::<&PathBuf>::new());
        }
    }
}

/// A container that a systemd makes the cgroup of.
struct Scoped {
    systemd: Systemd,
    bundle: Bundle,
}

impl Scoped {
    fn new(bundle: Bundle) -> Self {
        let systemd = Systemd::start();
        Self { systemd, bundle }
    }

    /// One of runc's verbs, for a container whose cgroup is a scope.
    fn runtime(&self, args: &[&str]) -> Output {
        self.systemd.run(verb(&self.bundle, args))
    }

    /// Creates the bundle's container, which keeps the output that it is given.
    fn create(&self) {
        let bundle = &self.bundle;
        let out = fs::File::create(bundle.host.path("out")).unwrap();
        let status = self
            .systemd
            .command(verb(bundle, &create(&bundle.dir())))
            .stdout(out.try_clone().unwrap())
            .stderr(out)
            .status()
            .unwrap();
        assert!(status.success(), "{}", bundle.written());
    }
}

impl Drop for Scoped {
    fn drop(&mut self) {
        // The container's processes have other numbers outside.
        self.runtime(&["delete", "--force", "one"]);
    }
}

fn create(bundle: &Path) -> [&str; 4] {
    ["create", "--bundle", bundle.to_str().unwrap(), "one"]
}

/// The runtime with one of runc's verbs and systemd as the cgroup driver.
fn verb(bundle: &Bundle, args: &[&str]) -> Vec<String> {
    let flag = ["--systemd-cgroup"].iter().chain(args);
    let flags = flag.map(|arg| (*arg).to_owned());
    arguments(&bundle.host).into_iter().chain(flags).collect()
}

fn name_of(dir: &Path) -> String {
    dir.file_name().unwrap().to_str().unwrap().to_owned()
}

fn hierarchies() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let fields = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>());
    let cgroups = fields.filter(|fields| fields[2].starts_with("cgroup"));
    cgroups.map(|fields| fields[1].into()).collect()
}

/// All directories below this one, the deepest first.
fn below(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let dirs = entries
        .map(|entry| entry.path())
        .filter(|path| path.is_dir());
    dirs.flat_map(|dir| {
        let mut all = below(&dir);
        all.push(dir);
        all
    })
    .collect()
}

const UNIT: &str = "cloison-one.scope";

#[test]
fn systemd_makes_a_containers_cgroup_and_sees_it_go() {
    let bundle = Bundle::shell("echo up; exec tail -f /dev/null").with(|config| {
        config["linux"]["cgroupsPath"] = "e2e-pods.slice:cloison:one".into();
        config["linux"]["resources"] = json!({
            "memory": { "limit": 64 << 20 },
            "cpu": { "shares": 512, "cpus": "0" },
        });
    });
    let container = Scoped::new(bundle);
    let systemd = &container.systemd;
    container.create();
    succeed(&container.runtime(&["start", "one"]));

    let state: serde_json::Value =
        serde_json::from_str(&succeed(&container.runtime(&["state", "one"]))).unwrap();
    let pid = &state["pid"];
    let path = format!("/e2e.slice/e2e-pods.slice/{UNIT}");
    let unit = systemd.shell(&format!("cat /proc/{pid}/cgroup"));
    let with_memory = |line: &&str| line.contains(":memory:") || line.starts_with("0::/e2e");
    let line = unit.lines().find(with_memory).unwrap();
    assert!(line.ends_with(&path), "{unit}");
    assert_eq!(systemd.property(UNIT, "Slice"), "e2e-pods.slice");
    assert_eq!(systemd.property(UNIT, "Delegate"), "yes");
    let (unified, legacy) = ("MemoryMax CPUWeight", "MemoryLimit CPUShares");
    let (names, shares, more) = match line.starts_with("0::") {
        true => (unified, "20", "79"),
        false => (legacy, "512", "2048"),
    };
    let (memory, cpu) = names.split_once(' ').unwrap();
    let limit: u64 = systemd.property(UNIT, memory).parse().unwrap();
    assert!((64 << 20..1 << 30).contains(&limit), "{limit}");
    assert_eq!(systemd.property(UNIT, cpu), shares);

    let exec = container.runtime(&["exec", "one", "echo", "in"]);
    assert_eq!(succeed(&exec), "in\n");
    let update = ["update", "--cpu-share", "2048", "one"];
    succeed(&container.runtime(&update));
    assert_eq!(systemd.property(UNIT, cpu), more);
    // What systemd is told it keeps.
    systemd.shell("systemctl daemon-reload");
    assert_eq!(systemd.property(UNIT, cpu), more);

    succeed(&container.runtime(&["kill", "one", "KILL"]));
    succeed(&container.runtime(&["delete", "--force", "one"]));
    assert_eq!(
        systemd.shell("systemctl list-units --all --no-legend 'cloison-*'"),
        ""
    );
}

#[test]
fn a_container_that_is_killed_leaves_no_unit_in_the_way_of_its_successor() {
    let bundle = Bundle::shell("exec tail -f /dev/null")
        .with(|config| config["linux"]["cgroupsPath"] = ":cloison:one".into());
    let container = Scoped::new(bundle);
    let systemd = &container.systemd;
    for _ in 0..2 {
        container.create();
        assert_eq!(systemd.property(UNIT, "Slice"), "system.slice");
        // All of it at once, as an administrator would.
        systemd.shell(&format!("systemctl kill -s KILL {UNIT}"));
        succeed(&container.runtime(&["delete", "--force", "one"]));
    }
}

#[test]
fn without_systemd_or_a_scopes_name_nothing_is_made() {
    let bundle = Bundle::shell("true");
    let nobody = |bundle: &Bundle, args: &[&str]| {
        let command = verb(bundle, args);
        Command::new(&command[0])
            .args(&command[1..])
            .env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    };
    let dir = bundle.dir();
    let refused = nobody(&bundle, &create(&dir));
    fail(&refused, 1, &["cgroupsPath", "SLICE:PREFIX:NAME"]);
    let bundle =
        bundle.with(|config| config["linux"]["cgroupsPath"] = "x.slice:cloison:one".into());
    let refused = nobody(&bundle, &create(&dir));
    fail(
        &refused,
        1,
        &["cannot reach systemd over D-Bus", "cgroupfs"],
    );
    succeed(&nobody(&bundle, &["delete", "--force", "one"]));
}

#[test]
fn podman_has_systemd_make_the_cgroups_of_its_containers() {
    if emulated() {
        return;
    }
    let systemd = Systemd::start();
    let podman = Podman::behind(systemd.enter(), "systemd");
    let script = "trap 'exit 4' TERM; echo up; while :; do sleep 0.1; done";
    succeed(&podman.run(&["-d", "--name", "one", "-m", "64m"], script));
    let unit = format!("libpod-{}.scope", podman.inspect("one", ".Id"));
    assert_eq!(systemd.property(&unit, "Slice"), "machine.slice");
    assert_eq!(systemd.property(&unit, "ActiveState"), "active");
    let pid = podman.inspect("one", ".State.Pid");
    let cgroup = systemd.shell(&format!("cat /proc/{pid}/cgroup"));
    assert!(
        cgroup.contains(&format!("/machine.slice/{unit}")),
        "{cgroup}"
    );
    let exec = ["exec", "one", "cat", "/sys/fs/cgroup/memory.max"];
    assert_eq!(podman.say(&exec), "67108864");
    podman.say(&["stop", "one"]);
    assert_eq!(podman.inspect("one", ".State.ExitCode"), "4");
    podman.say(&["start", "one"]);
    podman.say(&["rm", "-f", "-t", "0", "one"]);
    // The last process of podman's own ends a moment later.
    let units = "systemctl list-units --all --no-legend 'libpod-*'";
    let gone = format!(
        "for _ in $(seq 100); do [ -n \"$({units})\" ] || exit 0; sleep 0.1; done; {units}"
    );
    assert_eq!(systemd.shell(&gone), "");
}
