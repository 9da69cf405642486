//! What a container may not do, see or change.

use serde_json::{Value, json};

use crate::agent::{Guest, spec};

/// What a shell and cat need, and nothing of what libcontainer does to set a container up.
pub const SYSTEM_CALLS: &[&str] = &[
    "execve",
    "arch_prctl",
    "brk",
    "mmap",
    "munmap",
    "mprotect",
    "mremap",
    "set_tid_address",
    "set_robust_list",
    "rseq",
    "prlimit64",
    "readlink",
    "getrandom",
    "read",
    "write",
    "open",
    "openat",
    "close",
    "fstat",
    "newfstatat",
    "stat",
    "lseek",
    "ioctl",
    "exit_group",
    "exit",
    "getpid",
    "getppid",
    "getuid",
    "geteuid",
    "getgid",
    "getegid",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "fcntl",
    "dup2",
    "fork",
    "vfork",
    "clone",
    "wait4",
    "sendfile",
    "access",
    "getcwd",
    "pipe",
    "pipe2",
    "poll",
    "uname",
    "sysinfo",
    "prctl",
    "futex",
    "setuid",
    "setgid",
    "setgroups",
    "getgroups",
    "capget",
];

fn with_user(uid: u32) -> Value {
    let mut spec = spec();
    spec["process"]["user"] = json!({"uid": uid, "gid": uid});
    spec
}

pub async fn capabilities_are_those_of_the_spec(guest: Guest) {
    let sets = "grep Cap /proc/self/status | tr '\\n' ' '";
    let nothing = "0000000000000000";
    // None in the spec means none.
    let (_, output) = guest.shell(spec(), sets).await;
    assert_eq!(output.matches(nothing).count(), 5, "{output}");

    // Bits 0 (CHOWN), 5 (KILL) and 10 (NET_BIND_SERVICE).
    let names = json!(["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    let mut root = spec();
    root["process"]["capabilities"] =
        json!({"bounding": names, "effective": names, "permitted": names});
    let (_, output) = guest.shell(root, sets).await;
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert!(
            output.contains(&format!("{set}:\t0000000000000421")),
            "{output}"
        );
    }
    assert!(output.contains(&format!("CapInh:\t{nothing}")), "{output}");

    // A user keeps what is ambient and nothing else.
    let mut user = with_user(33);
    user["process"]["capabilities"] = json!({
        "bounding": names, "effective": names, "permitted": names,
        "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL", "CAP_CHOWN"],
    });
    let (_, output) = guest.shell(user, sets).await;
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert!(
            output.contains(&format!("{set}:\t0000000000000020")),
            "{output}"
        );
    }
}

pub async fn a_filter_holds_for_a_user_without_no_new_privs(guest: Guest) {
    for (uid, no_new_privileges) in [
        (0, json!(false)),
        (33, json!(false)),
        (33, json!(null)),
        (33, json!(true)),
    ] {
        let mut spec = with_user(uid);
        spec["process"]["noNewPrivileges"] = no_new_privileges;
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 1,
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
            "syscalls": [{"action": "SCMP_ACT_ALLOW", "names": SYSTEM_CALLS}],
        });
        let (code, output) = guest
            .shell(
                spec,
                "grep Seccomp: /proc/self/status; mkdir /tmp/y 2>/dev/null && echo made",
            )
            .await;
        assert_eq!(
            (code, output.as_str()),
            (1, "Seccomp:\t2\n"),
            "as user {uid}"
        );
    }
}

pub async fn no_new_privs_is_set_only_when_asked(guest: Guest) {
    for (asked, expected) in [(json!(null), 0), (json!(false), 0), (json!(true), 1)] {
        let mut spec = spec();
        spec["process"]["noNewPrivileges"] = asked;
        let (_, output) = guest.shell(spec, "grep NoNewPrivs /proc/self/status").await;
        assert_eq!(output, format!("NoNewPrivs:\t{expected}\n"));
    }
}

pub async fn paths_are_masked_and_read_only(guest: Guest) {
    let mut spec = spec();
    spec["linux"]["maskedPaths"] = json!(["/masked", "/etc/passwd", "/proc/keys", "/no/such/path"]);
    spec["linux"]["readonlyPaths"] = json!(["/fixed", "/proc/sys", "/no/such/path"]);
    let script = "ls /masked; cat /etc/passwd; cat /fixed/file; touch /fixed/new 2>&1; \
                  (echo 1 >/proc/sys/kernel/panic) 2>&1; touch /tmp/writable && echo rest is writable";
    let (_, output) = guest.shell(spec, script).await;
    assert_eq!(
        output.matches("Read-only file system").count(),
        2,
        "{output}"
    );
    assert!(
        output.starts_with("text") && output.ends_with("rest is writable\n"),
        "{output}"
    );
}

pub async fn a_read_only_root_is_read_only(guest: Guest) {
    let mut spec = spec();
    spec["root"]["readonly"] = json!(true);
    let mount = json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]});
    spec["mounts"].as_array_mut().unwrap().push(mount);
    let (_, output) = guest
        .shell(spec, "touch /file 2>&1; touch /tmp/file && echo tmp")
        .await;
    assert!(
        output.contains("Read-only file system") && output.ends_with("tmp\n"),
        "{output}"
    );
}

pub async fn devices_are_denied_by_default(guest: Guest) {
    let mut spec = spec();
    let names = json!(["CAP_MKNOD"]);
    spec["process"]["capabilities"] =
        json!({"bounding": names, "effective": names, "permitted": names});
    spec["linux"]["resources"] = json!({"devices": [{"allow": false, "access": "rwm"}]});
    // 10:229 is FUSE's device; 1:5 is allowed to everyone. Nodes may be made, they do not open.
    let script = "mknod /tmp/fuse c 10 229 && mknod /tmp/zero c 1 5; head -c1 /tmp/zero | wc -c; \
                  (: </tmp/fuse) 2>&1; ls /dev; echo x >/dev/null && echo null";
    let (_, output) = guest.shell(spec.clone(), script).await;
    assert!(output.contains("peration not permitted"), "{output}");
    for device in [
        "full", "null", "random", "tty", "urandom", "zero", "ptmx", "fd", "stdin",
    ] {
        assert!(output.contains(device), "{device} in {output}");
    }
    assert!(output.ends_with("null\n"), "{output}");

    spec["linux"]["resources"] = json!({"devices": [{"allow": true, "access": "rwm"}]});
    let (_, output) = guest.shell(spec, "(: </tmp/fuse) && echo opened").await;
    assert_eq!(output, "opened\n");
}

pub async fn a_container_sees_only_itself(guest: Guest) {
    let script = "echo $$; ls /proc | grep -c '^[0-9]*$'; ls -d /container /init 2>/dev/null; \
                  cat /proc/self/cgroup; ls /proc/self/fd | wc -l; env";
    let (_, output) = guest.shell(spec(), script).await;
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(lines[0], "1");
    // The shell, ls and, by then or not, grep.
    assert!(["2", "3"].contains(&lines[1]), "{output}");
    assert_eq!(lines[2], "0::/");
    // Three streams and the directory ls reads.
    assert_eq!(lines[3], "4");
    let mut env = lines[4..].to_vec();
    env.retain(|line| {
        !line.starts_with("SHLVL=") && !line.starts_with("PWD=") && !line.starts_with("_=")
    });
    env.sort_unstable();
    assert_eq!(env, ["HOME=/root", "PATH=/bin"]);
}

pub async fn namespaces_hostname_and_sysctls_are_its_own(guest: Guest) {
    let mut spec = spec();
    spec["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "network"}));
    spec["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1", "kernel.shmmax": "12345678"});
    let script = "hostname; cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmax; ifconfig lo | grep -c UP";
    let (_, output) = guest.shell(spec, script).await;
    assert_eq!(output, "inside\n1\n12345678\n1\n");
    assert_ne!(
        std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap(),
        "inside\n"
    );
}

pub async fn a_user_namespace_maps_its_root(guest: Guest) {
    let mut spec = spec();
    spec["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "user"}));
    spec["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
    spec["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
    // A new sysfs needs a network namespace of the same owner.
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.retain(|mount| mount["type"] != "sysfs" && mount["type"] != "cgroup");
    let inside = "id -u; cat /proc/self/uid_map | tr -s ' '; echo x >/dev/stdout; \
                  (mknod /tmp/null2 c 1 3) 2>/dev/null || echo unprivileged";
    let expected = " 0 100000 1000\nx\nunprivileged\n";
    let (_, output) = guest.shell(spec.clone(), inside).await;
    assert_eq!(output, format!("0\n{expected}"));

    spec["process"]["args"] = json!(["sleep", "1000"]);
    let container = guest.run(&spec).await;
    for uid in [0, 33] {
        let names = json!(["CAP_MKNOD"]);
        let mut process = crate::agent::process();
        process["user"] = json!({"uid": uid, "gid": uid});
        process["capabilities"] =
            json!({"bounding": names, "effective": names, "permitted": names});
        let (_, output) = container.exec_shell(process.clone(), inside).await;
        assert_eq!(output, format!("{uid}\n{expected}"));
        process["terminal"] = json!(true);
        process["args"] = json!(["sh", "-c", "echo own terminal >/dev/tty"]);
        let mut exec = container.exec(process).await.unwrap();
        exec.streams.expect("own terminal\r\n").await;
    }
    container.delete(true).await.unwrap();
}

pub async fn identity_home_and_directory_are_the_users(guest: Guest) {
    let mut spec = with_user(33);
    spec["process"]["user"]["additionalGids"] = json!([5, 6]);
    spec["process"]["cwd"] = json!("/srv/made/for/it");
    let (_, output) = guest
        .shell(
            spec,
            "id -u; id -G; pwd; echo $HOME; cat /proc/self/oom_score_adj; cut -d' ' -f41 /proc/self/stat",
        )
        .await;
    assert_eq!(output, "33\n33 5 6\n/srv/made/for/it\n/tmp\n0\n0\n");
    let (_, output) = guest.shell(with_user(4242), "echo $HOME").await;
    assert_eq!(output, "/\n");
}
