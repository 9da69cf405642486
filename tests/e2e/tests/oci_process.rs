//! What a container's process may do and when, as runc has it: system calls that a profile does not know, hooks in the container, and
//! containers and execs for which a freezer is in the way.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::{Value, json};

use crate::host::{fail, succeed, text};
use crate::oci::{Bundle, command};

/// An executable that makes one system call and exits with its errno: a header, one segment, and a few instructions.
fn caller(number: u32) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u16 = 64 + 56;
    let [a, b, c, d] = number.to_le_bytes();
    // mov eax, number; syscall; neg eax; mov edi, eax; mov eax, exit_group; syscall
    let code = [
        &[0xb8, a, b, c, d, 0x0f, 0x05, 0xf7, 0xd8][..],
        &[0x89, 0xc7, 0xb8, 231, 0, 0, 0, 0x0f, 0x05],
    ]
    .concat();
    let size = u64::from(HEADERS) + code.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    let halves = |file: &mut Vec<u8>, all: &[u16]| {
        file.extend(all.iter().flat_map(|n| n.to_le_bytes()));
    };
    let words = |file: &mut Vec<u8>, all: &[u32]| {
        file.extend(all.iter().flat_map(|n| n.to_le_bytes()));
    };
    let doubles = |file: &mut Vec<u8>, all: &[u64]| {
        file.extend(all.iter().flat_map(|n| n.to_le_bytes()));
    };
    // An executable for x86-64 that begins behind the headers.
    halves(&mut file, &[2, 62]);
    words(&mut file, &[1]);
    doubles(&mut file, &[BASE + u64::from(HEADERS), 64, 0]);
    words(&mut file, &[0]);
    halves(&mut file, &[64, 56, 1, 0, 0, 0]);
    // All of it, to be read and executed.
    words(&mut file, &[1, 5]);
    doubles(&mut file, &[0, BASE, BASE, size, size, 4096]);
    file.extend(code);
    file
}

/// A container that makes system calls, each by a program of its number.
fn calling(numbers: &[u32], profile: Value) -> Bundle {
    let each = numbers.iter().map(u32::to_string).collect::<Vec<_>>();
    let bundle = Bundle::shell(&format!(
        "for n in {}; do /call$n; echo $n $?; done",
        each.join(" ")
    ));
    for number in numbers {
        let file = bundle.dir().join(format!("rootfs/call{number}"));
        fs::write(&file, caller(*number)).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    }
    bundle.with(|config| config["linux"]["seccomp"] = profile)
}

/// What a shell needs that runs programs, getppid for one that is known, and statx as the newest.
const CALLS: &[&str] = &[
    "access",
    "arch_prctl",
    "brk",
    "chdir",
    "clone",
    "close",
    "dup",
    "dup2",
    "execve",
    "exit",
    "exit_group",
    "fcntl",
    "fork",
    "fstat",
    "futex",
    "getcwd",
    "getdents64",
    "getegid",
    "geteuid",
    "getgid",
    "getgroups",
    "getppid",
    "getrandom",
    "getuid",
    "ioctl",
    "lseek",
    "lstat",
    "madvise",
    "mmap",
    "mprotect",
    "mremap",
    "munmap",
    "newfstatat",
    "open",
    "openat",
    "pipe",
    "poll",
    "prctl",
    "prlimit64",
    "read",
    "readlink",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "set_robust_list",
    "set_tid_address",
    "setgid",
    "setuid",
    "stat",
    "statx",
    "uname",
    "vfork",
    "wait4",
    "write",
];

#[test]
fn a_system_call_that_is_newer_than_a_profile_does_not_exist_and_others_are_forbidden() {
    let profile = |errno: Value| {
        json!({
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": errno,
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [
                { "names": CALLS, "action": "SCMP_ACT_ALLOW" },
                { "names": ["unheard_of"], "action": "SCMP_ACT_ALLOW" },
            ],
        })
    };
    // getpid and pkey_free, which are not named; statx is 332.
    let bundle = calling(&[39, 331, 333, 1000], profile(Value::Null));
    let said = |bundle: &Bundle| {
        let output = bundle.output();
        let log = bundle.log();
        assert!(output.status.success(), "{}{log}", text(&output.stderr));
        text(&output.stdout)
    };
    assert_eq!(said(&bundle), "39 1\n331 1\n333 38\n1000 38\n");
    // Another errno is for what is known; ENOSYS leaves nothing to tell apart.
    for (errno, expected) in [
        (5, "39 5\n331 5\n333 38\n1000 38\n"),
        (38, "39 38\n331 38\n333 38\n1000 38\n"),
    ] {
        succeed(&bundle.run(&["delete", "--force", "one"]));
        let changed = calling(&[39, 331, 333, 1000], profile(errno.into()));
        assert_eq!(said(&changed), expected);
    }
    let odd = json!([{ "index": 9, "value": 0, "op": "SCMP_CMP_EQ" }]);
    let rule = json!({ "names": ["read"], "action": "SCMP_ACT_ALLOW", "args": odd });
    let broken = bundle.with(|config| config["linux"]["seccomp"]["syscalls"] = json!([rule]));
    fail(&broken.output(), 1, &["seccomp filter", "rule for read"]);
}

#[test]
fn a_rule_can_look_at_some_bits_of_an_argument() {
    // Permissions for others than the owner: a mask, and what is left with it.
    let masked = json!([{ "index": 1, "value": 0o77, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ" }]);
    let bundle = Bundle::shell(
        "for mode in 600 700 755 640; do chmod $mode /file 2>/dev/null && echo yes || echo no; done",
    )
    .with(|config| {
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{ "names": ["chmod"], "action": "SCMP_ACT_ERRNO", "args": masked }],
        });
    });
    fs::write(bundle.dir().join("rootfs/file"), "").unwrap();
    assert_eq!(text(&bundle.output().stdout), "no\nno\nyes\nyes\n");
}

#[test]
fn a_hook_in_the_container_is_under_its_filter_and_a_failure_of_it_is_the_containers() {
    let bundle = Bundle::shell("cat /hook").with(|config| {
        config["annotations"] = json!({ "who": "test" });
        config["process"]["env"] = json!(["PATH=/bin", "MARK=42"]);
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO" }],
        });
        let script = "mkdir /made 2>/dev/null || echo forbidden >/hook; echo $MARK >>/hook
            grep -o '\"status\":\"[a-z]*\"' >>/hook; grep Seccomp: /proc/self/status >>/hook";
        config["hooks"] =
            json!({ "startContainer": [{ "path": "/bin/sh", "args": ["sh", "-c", script] }] });
    });
    let output = bundle.output();
    assert_eq!(
        text(&output.stdout),
        "forbidden\n42\n\"status\":\"created\"\nSeccomp:\t2\n",
        "{}{}",
        text(&output.stderr),
        bundle.log()
    );
    assert!(!bundle.dir().join("rootfs/made").exists());
    succeed(&bundle.run(&["delete", "--force", "one"]));
    let bundle = bundle.with(|config| {
        config["hooks"] =
            json!({ "startContainer": [{ "path": "/bin/sh", "args": ["sh", "-c", "exit 3"] }] });
    });
    fail(&bundle.output(), 1, &["startContainer", "3"]);
}

/// Somebody's cgroup, frozen: the file that says so, and what it says.
struct Frozen {
    directory: PathBuf,
    file: &'static str,
    thaw: &'static str,
}

impl Frozen {
    fn new(name: &str) -> Self {
        let v1 = Path::new("/sys/fs/cgroup/freezer");
        let (root, file, freeze, thaw) = match v1.is_dir() {
            true => (v1, "freezer.state", "FROZEN", "THAWED"),
            false => (Path::new("/sys/fs/cgroup"), "cgroup.freeze", "1", "0"),
        };
        let directory = root.join(name);
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join(file), freeze).unwrap();
        Self {
            directory,
            file,
            thaw,
        }
    }

    fn thaw(&self) {
        fs::write(self.directory.join(self.file), self.thaw).unwrap();
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // A container that was made here after all has taken it away.
        let _ = fs::remove_dir(&self.directory);
    }
}

#[test]
fn a_cgroup_that_somebody_has_frozen_is_refused_until_it_is_thawed() {
    let bundle = Bundle::shell("echo ran");
    let frozen = Frozen::new(&bundle.cgroup());
    let place = frozen.directory.join(frozen.file);
    let words = [
        "container's cgroup unexpectedly frozen",
        place.to_str().unwrap(),
        frozen.thaw,
    ];
    let dir = bundle.dir();
    let create = ["create", "--bundle", dir.to_str().unwrap(), "one"];
    fail(&bundle.run(&create), 1, &words);
    fail(&bundle.output(), 1, &words);
    fail(&bundle.run(&["state", "one"]), 1, &["does not exist"]);
    // What is made below it would be frozen as well.
    let below = format!("/{}/below", bundle.cgroup());
    let bundle = bundle.with(|config| config["linux"]["cgroupsPath"] = below.into());
    fail(&bundle.output(), 1, &words);
    let own = format!("/{}", bundle.cgroup());
    let bundle = bundle.with(|config| config["linux"]["cgroupsPath"] = own.into());
    frozen.thaw();
    assert_eq!(succeed(&bundle.output()), "ran\n");
}

#[test]
fn an_exec_in_a_paused_container_waits_for_its_resumption_when_it_is_told_to() {
    let bundle = Bundle::shell("sleep 1000");
    bundle.create_and_start();
    succeed(&bundle.run(&["pause", "one"]));
    fail(
        &bundle.run(&["exec", "one", "true"]),
        255,
        &["paused container"],
    );
    let waiting = |word: &str| {
        let mut exec = command(&bundle.host);
        exec.args(["exec", "--ignore-paused", "one", "echo", word]);
        let exec = exec.stdout(Stdio::piped()).stderr(Stdio::piped());
        exec.spawn().unwrap()
    };
    let (mut first, killed) = (waiting("first"), waiting("killed"));
    // Other verbs go on meanwhile, and it waits.
    succeed(&bundle.run(&["events", "--stats", "one"]));
    succeed(&bundle.run(&["update", "--memory", "100M", "one"]));
    assert!(first.try_wait().unwrap().is_none());
    // SAFETY: kill(2) takes two integers.
    unsafe { libc::kill(killed.id().cast_signed(), libc::SIGKILL) };
    assert_eq!(text(&killed.wait_with_output().unwrap().stdout), "");
    succeed(&bundle.run(&["resume", "one"]));
    assert_eq!(succeed(&first.wait_with_output().unwrap()), "first\n");
    // In one that runs it changes nothing.
    assert_eq!(
        succeed(&waiting("running").wait_with_output().unwrap()),
        "running\n"
    );

    succeed(&bundle.run(&["pause", "one"]));
    let last = waiting("never");
    succeed(&bundle.run(&["delete", "--force", "one"]));
    let output = last.wait_with_output().unwrap();
    assert_ne!(output.status.code(), Some(0), "{}", text(&output.stdout));
    assert_eq!(text(&output.stdout), "");
}
