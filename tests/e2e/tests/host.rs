//! A host of a test's own: directories that no other test uses, commands that use them, and, at the end, the proof that nothing
//! is left behind.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// Kernel log and messages of a failed command say more than its status.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn variable(name: &str) -> PathBuf {
    std::env::var_os(name)
        .unwrap_or_else(|| panic!("{name} is not set: run the end-to-end tests through tests/all"))
        .into()
}

/// The engine under test.
pub fn engine() -> String {
    variable("CLOISON_ENGINE").to_str().unwrap().to_owned()
}

/// Whether the processor under the tests is emulated as well, in a machine with little room: less of the same must do.
pub fn emulated() -> bool {
    std::env::var_os("CLOISON_TEST_SMALL").is_some()
}

/// An image made by `tests/images`, as a reference.
pub fn image(name: &str) -> String {
    format!(
        "oci:{}",
        variable("CLOISON_TEST_IMAGES").join(name).display()
    )
}

/// The image that most tests use.
pub fn busybox() -> String {
    image("busybox")
}

/// Makes a root file system of the host's busybox, as the images have it.
pub fn rootfs(dir: &Path) {
    let script = "mkdir -p bin dev etc proc sys tmp && cp /bin/busybox bin && for a in $(busybox --list); do [ $a = busybox ] || ln -s busybox bin/$a; done && chmod 1777 tmp && echo root:x:0:0:root:/root:/bin/sh > etc/passwd";
    fs::create_dir_all(dir).unwrap();
    let made = Command::new("/bin/busybox")
        .args(["sh", "-c", script])
        .env("PATH", "/bin")
        .current_dir(dir)
        .output()
        .unwrap();
    succeed(&made);
}

/// Packs a root file system.
pub fn image_tar(root: &Path, tar: &Path) {
    let packed = Command::new("tar")
        .arg("-C")
        .arg(root)
        .arg("-cf")
        .arg(tar)
        .arg(".")
        .output();
    succeed(&packed.unwrap());
}

/// The data directory that the tests share: images are unpacked, and templates of guests made, once.
pub fn data() -> PathBuf {
    variable("CLOISON_TEST_DATA")
}

/// A root file system made by `tests/trees`.
pub fn tree(name: &str) -> PathBuf {
    variable("CLOISON_TEST_TREES").join(name)
}

/// The directory of the built product.
pub fn dist() -> PathBuf {
    variable("CLOISON_DIST")
}

/// A host of a test's own. Dropping it checks that nothing is left.
pub struct Host {
    dir: TempDir,
    data: PathBuf,
}

impl Host {
    /// Run directory of its own; unpacked images are shared with the other tests.
    pub fn new() -> Self {
        let dir = TempDir::with_prefix("cloison-e2e-").unwrap();
        Self { dir, data: data() }
    }

    /// Nothing shared.
    pub fn with_own_data() -> Self {
        let mut host = Self::new();
        host.data = host.dir.path().join("data");
        host
    }

    /// A place for the test's own files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes a file and names it.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }

    pub fn run_dir(&self) -> PathBuf {
        self.path("run")
    }

    pub fn data_dir(&self) -> &Path {
        &self.data
    }

    /// `cloison` with this host's directories.
    pub fn command(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
        let mut command = Command::new(dist().join("cloison"));
        command
            .args(args)
            .env("CLOISON_RUN_DIR", self.run_dir())
            .env("CLOISON_DATA_DIR", &self.data)
            // A test that is about networks says so, and leaves the machine's own alone.
            .env("CLOISON_NETWORK", "none")
            .stdin(Stdio::null());
        command
    }

    /// Runs `cloison` to its end.
    pub fn cloison(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs `cloison run --rm OPTIONS busybox COMMAND`, both as words.
    pub fn run(&self, options: &[&str], command: &[&str]) -> Output {
        let image = busybox();
        let args = ["run", "--rm"].iter().chain(options).copied();
        self.cloison(args.chain([image.as_str()]).chain(command.iter().copied()))
    }

    /// As [`Host::run`], and gives what the container wrote to stdout; it must succeed.
    pub fn stdout(&self, options: &[&str], command: &[&str]) -> String {
        succeed(&self.run(options, command))
    }

    /// A container whose output is the output of a shell command.
    pub fn shell(&self, options: &[&str], script: &str) -> String {
        self.stdout(options, &["sh", "-c", script])
    }

    /// Starts a detached container and gives its ID.
    pub fn detached(&self, options: &[&str], command: &[&str]) -> String {
        let image = busybox();
        let args = ["run", "-d"].iter().chain(options).copied();
        let output = self.cloison(args.chain([image.as_str()]).chain(command.iter().copied()));
        succeed(&output).trim().to_owned()
    }

    /// Follows a detached container's log until it has a line.
    pub fn until_logged(&self, id: &str, line: &str) {
        let mut follow = self.spawn(["logs", "-f", id]);
        let lines = BufReader::new(follow.stdout.take().unwrap()).lines();
        assert!(lines.map_while(Result::ok).any(|l| l == line));
        follow.kill().unwrap();
        follow.wait().unwrap();
    }

    /// Starts `cloison` without waiting for it.
    pub fn spawn(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Child {
        let mut command = self.command(args);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    /// What `cloison inspect` says of a container.
    pub fn inspect(&self, container: &str) -> Value {
        let output = self.cloison(["inspect", container]);
        let objects: Value = serde_json::from_str(&succeed(&output)).unwrap();
        objects[0].clone()
    }

    /// Every process that has this host's directory in its command line, its environment or its working directory.
    pub fn processes(&self) -> Vec<(i32, String)> {
        let needle = self.dir.path().to_str().unwrap();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<i32>().ok())
            else {
                continue;
            };
            let words = |file| {
                text(&fs::read(entry.path().join(file)).unwrap_or_default()).replace('\0', " ")
            };
            let (command, environment) = (words("cmdline"), words("environ"));
            let directory = fs::read_link(entry.path().join("cwd")).unwrap_or_default();
            if pid != i32::try_from(std::process::id()).unwrap()
                && (command.contains(needle)
                    || environment.contains(needle)
                    || directory.starts_with(needle))
            {
                found.push((pid, command));
            }
        }
        found
    }

    /// Names in one of this host's directories; none when the directory does not exist.
    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect()
    }

    /// Containers with a directory on this host.
    pub fn leftovers(&self) -> Vec<String> {
        let mut left = Self::names(&self.run_dir().join("sandboxes"));
        left.extend(Self::names(&self.run_dir().join("names")));
        for container in Self::names(&self.data.join("containers")) {
            let owner = fs::read_link(
                self.data
                    .join("containers")
                    .join(&container)
                    .join("sandbox"),
            );
            if owner.is_ok_and(|owner| owner.starts_with(self.dir.path())) {
                left.push(container);
            }
        }
        left
    }

    /// Fails when anything of this host's containers is left.
    pub fn assert_clean(&self) {
        assert_eq!(
            self.leftovers(),
            Vec::<String>::new(),
            "directories are left"
        );
        // The kernel takes a moment to take those apart that were killed.
        for (pid, _) in self.processes() {
            await_end(pid);
        }
        assert_eq!(self.processes(), Vec::new(), "processes are left");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let needle = self.run_dir();
        let mounts: Vec<&str> = mounts
            .lines()
            .filter(|line| line.contains(needle.to_str().unwrap()))
            .collect();
        assert!(mounts.is_empty(), "mounts are left: {mounts:?}");
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.cloison(["prune", "-f"]);
            for id in self.leftovers() {
                let _ = self.cloison(["rm", "-f", &id]);
            }
        } else {
            self.assert_clean();
        }
    }
}

/// Waits until a process that is not our child is gone.
pub fn await_end(pid: i32) {
    let Ok(pidfd) = pidfd(pid) else { return };
    let mut fds = [nix::poll::PollFd::new(
        std::os::fd::AsFd::as_fd(&pidfd),
        nix::poll::PollFlags::POLLIN,
    )];
    assert_eq!(nix::poll::poll(&mut fds, 20_000_u16), Ok(1), "{pid} stays");
}

fn pidfd(pid: i32) -> std::io::Result<std::os::fd::OwnedFd> {
    // SAFETY: the system call takes two integers, and the descriptor it returns is nobody else's.
    unsafe {
        match libc::syscall(libc::SYS_pidfd_open, pid, 0) {
            fd @ 0.. => Ok(std::os::fd::FromRawFd::from_raw_fd(fd as i32)),
            _ => Err(std::io::Error::last_os_error()),
        }
    }
}

/// What a command wrote to stdout; it must have succeeded.
pub fn succeed(output: &Output) -> String {
    assert!(
        output.status.success(),
        "it failed with {}\nstdout: {}\nstderr: {}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// Checks that a command failed with `status` and said each of `words` on stderr, and nothing on stdout.
pub fn fail(output: &Output, status: i32, words: &[&str]) {
    let stderr = text(&output.stderr);
    assert_eq!(
        output.status.code(),
        Some(status),
        "stdout: {}\nstderr: {stderr}",
        text(&output.stdout)
    );
    for word in words {
        assert!(stderr.contains(word), "{word:?} is not in: {stderr}");
    }
    assert_eq!(text(&output.stdout), "");
}
