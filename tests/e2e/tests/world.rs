//! A network of a test's own: a namespace in the host's place, with nothing in it but what the test and cloison make, and at the end the
//! proof that cloison has left nothing.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};
use serde_json::Value;

use crate::host::{Host, busybox, succeed, text};

/// How long something may take that is sure to happen.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A network namespace that lasts as long as this.
#[derive(Clone)]
pub struct Netns(Arc<File>);

impl Netns {
    /// With loopback up.
    pub fn new() -> Self {
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        let netns = Self(Arc::new(made.join().unwrap()));
        netns.ip("link set lo up");
        netns
    }

    /// A path that leads to it.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Has a command run inside.
    pub fn enter(&self, mut command: Command) -> Command {
        let netns = Arc::clone(&self.0);
        // SAFETY: one system call between fork and exec.
        unsafe { command.pre_exec(move || Ok(setns(&*netns, CloneFlags::CLONE_NEWNET)?)) };
        command
    }

    /// Runs a program inside, given as words.
    pub fn run(&self, line: &str) -> Output {
        let mut words = line.split_whitespace();
        let mut command = Command::new(words.next().unwrap());
        command.args(words);
        self.enter(command).output().unwrap()
    }

    /// Runs `ip` inside, once a line.
    pub fn ip(&self, lines: &str) {
        for line in lines.lines().map(str::trim).filter(|l| !l.is_empty()) {
            succeed(&self.run(&format!("ip {line}")));
        }
    }

    /// Does something on a thread inside.
    pub fn inside<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&*self.0, CloneFlags::CLONE_NEWNET).unwrap();
                f()
            });
            thread.join().unwrap()
        })
    }

    /// Whether `to` answers a ping of `size` bytes.
    pub fn pings(&self, to: &str, size: u16) -> bool {
        let program = if to.contains(':') { "ping6" } else { "ping" };
        let line = format!("busybox {program} -c 1 -w 5 -s {size} {to}");
        self.run(&line).status.success()
    }

    /// What a TCP server says to a line, or why it does not.
    pub fn asks(&self, server: &str, line: &str) -> io::Result<String> {
        self.inside(|| {
            let address = server.to_socket_addrs()?.next().unwrap();
            let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(3))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(line.as_bytes())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        })
    }

    /// Gets a page, again and again until its server listens.
    pub fn page(&self, server: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.asks(server, "GET / HTTP/1.0\r\n\r\n") {
                Ok(page) if !page.is_empty() => return page,
                result => assert!(Instant::now() < deadline, "{server}: {result:?}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Connects this namespace by a veth with another; the ends are up.
    pub fn veth(&self, name: &str, other: &Self, others: &str) {
        let path = other.path();
        self.ip(&format!(
            "link add {name} type veth peer name {others} netns {path}
             link set {name} up"
        ));
        other.ip(&format!("link set {others} up"));
    }

    /// Answers every question for a name's address with `address`, once.
    pub fn name_server(&self, at: &str, address: [u8; 4]) {
        let socket = self.inside(|| UdpSocket::bind((at, 53)).unwrap());
        std::thread::spawn(move || {
            let mut question = [0; 512];
            while let Ok((length, from)) = socket.recv_from(&mut question) {
                // The question again, flagged as an answer, with one record that points at the question's name (RFC 1035 §4).
                let mut answer = question[..length].to_vec();
                answer[2] |= 0x80;
                let wants_ipv4 = answer[length - 4..length - 2] == [0, 1];
                if wants_ipv4 {
                    answer[7] = 1;
                    answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
                    answer.extend(address);
                }
                let _ = socket.send_to(&answer, from);
            }
        });
    }
}

/// A host with a network of its own.
pub struct World {
    pub host: Host,
    pub netns: Netns,
}

impl World {
    pub fn new() -> Self {
        let world = Self {
            host: Host::with_own_data(),
            netns: Netns::new(),
        };
        // Unpacked once, so that no test's time is about that.
        succeed(&world.run(&["--network", "none"], &["true"]));
        world
    }

    pub fn command(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
        let mut command = self.host.command(args);
        command.env_remove("CLOISON_NETWORK");
        self.netns.enter(command)
    }

    pub fn cloison(&self, line: &[&str]) -> Output {
        self.command(line).output().unwrap()
    }

    pub fn run(&self, options: &[&str], command: &[&str]) -> Output {
        let image = busybox();
        let words = ["run", "--rm"].iter().chain(options).copied();
        let words = words.chain([image.as_str()]).chain(command.iter().copied());
        self.command(words).output().unwrap()
    }

    pub fn shell(&self, options: &[&str], script: &str) -> String {
        succeed(&self.run(options, &["sh", "-c", script]))
    }

    pub fn detached(&self, options: &[&str], script: &str) -> String {
        let image = busybox();
        let words = ["run", "-d"].iter().chain(options).copied();
        let words = words.chain([image.as_str(), "sh", "-c", script]);
        let output = self.command(words).output().unwrap();
        succeed(&output).trim().to_owned()
    }

    pub fn exec(&self, container: &str, script: &str) -> Output {
        self.cloison(&["exec", container, "sh", "-c", script])
    }

    /// Runs a script in a container until it succeeds.
    pub fn until(&self, container: &str, script: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let output = self.exec(container, script);
            if output.status.success() {
                return text(&output.stdout);
            }
            let said = (text(&output.stdout), text(&output.stderr));
            assert!(Instant::now() < deadline, "{script}: {said:?}");
        }
    }

    /// A container that serves a page at port 80.
    pub fn server(&self, options: &[&str], page: &str) -> String {
        let script = format!("mkdir /www; echo {page} >/www/index.html; exec httpd -f -h /www");
        self.detached(options, &script)
    }

    /// What `inspect` says of a container's place on a network.
    pub fn place(&self, container: &str, network: &str) -> Value {
        let output = succeed(&self.cloison(&["inspect", container]));
        let objects: Value = serde_json::from_str(&output).unwrap();
        objects[0]["NetworkSettings"]["Networks"][network].clone()
    }

    pub fn remove(&self, containers: &[&str]) {
        let words = ["rm", "-f"].iter().chain(containers).copied();
        succeed(&self.cloison(&words.collect::<Vec<_>>()));
    }

    /// Fails when cloison has left anything on this host's network but what belongs to a network, or anything at all after `prune`.
    pub fn assert_clean(&self) {
        let links = text(&self.netns.run("ip -o link").stdout);
        let ports: Vec<&str> = links
            .lines()
            .filter(|line| line.contains(": clv"))
            .collect();
        assert!(ports.is_empty(), "interfaces are left: {ports:?}");
        let filter = text(&self.netns.run("nft list ruleset").stdout);
        assert!(!filter.contains("clv"), "rules are left: {filter}");
        succeed(&self.cloison(&["prune", "-f"]));
        let links = text(&self.netns.run("ip -o link").stdout);
        let left = |line: &&str| line.contains(": clv") || line.contains(": cloison");
        let left: Vec<&str> = links.lines().filter(left).collect();
        assert!(left.is_empty(), "interfaces are left: {left:?}");
        let rules = text(&self.netns.run("nft list ruleset").stdout);
        assert!(!rules.contains("cloison"), "rules are left: {rules}");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.cloison(&["prune", "-f"]);
            for id in self.host.leftovers() {
                let _ = self.cloison(&["rm", "-f", &id]);
            }
        } else {
            self.assert_clean();
        }
    }
}
