//! What a container may not do, and what options change about it.

use crate::host::{Host, fail, succeed};

fn capabilities(host: &Host, options: &[&str]) -> u64 {
    let line = host.shell(options, "grep CapEff /proc/self/status");
    u64::from_str_radix(line.trim().trim_start_matches("CapEff:").trim(), 16).unwrap()
}

#[test]
fn capabilities_are_dockers_and_change_with_the_options() {
    let host = Host::new();
    // chown dac_override fowner fsetid kill setgid setuid setpcap net_bind_service net_raw sys_chroot mknod audit_write setfcap
    let default = 0xa804_25fb;
    let (mknod, net_admin) = (1 << 27, 1 << 12);
    assert_eq!(capabilities(&host, &[]), default);
    assert_eq!(
        capabilities(&host, &["--cap-drop", "mknod", "--cap-add", "NET_ADMIN"]),
        default & !mknod | net_admin
    );
    assert_eq!(capabilities(&host, &["--cap-drop", "ALL"]), 0);
    assert_eq!(capabilities(&host, &["--cap-add", "ALL"]).count_ones(), 41);
    fail(
        &host.run(&["--cap-add", "EVERYTHING"], &["true"]),
        125,
        &["EVERYTHING"],
    );
}

#[test]
fn what_a_capability_allows_fails_without_it() {
    let host = Host::new();
    let script =
        "chown 1:1 /tmp && echo chown || echo no chown; hostname x && echo named || echo not named";
    assert_eq!(
        host.shell(&[], &format!("{{ {script}; }} 2>/dev/null")),
        "chown\nnot named\n"
    );
    assert_eq!(
        host.shell(
            &["--cap-drop", "CHOWN"],
            &format!("{{ {script}; }} 2>/dev/null")
        ),
        "no chown\nnot named\n"
    );
}

#[test]
fn no_new_privileges_is_set_when_asked_for() {
    let host = Host::new();
    let script = "grep NoNewPrivs /proc/self/status";
    assert_eq!(host.shell(&[], script), "NoNewPrivs:\t0\n");
    assert_eq!(
        host.shell(&["--security-opt", "no-new-privileges"], script),
        "NoNewPrivs:\t1\n"
    );
}

#[test]
fn a_seccomp_profile_is_enforced() {
    let host = Host::new();
    let profile = host.file(
        "profile.json",
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":1}]}"#,
    );
    let option = format!("seccomp={}", profile.display());
    let script =
        "mkdir /tmp/x 2>/dev/null && echo made || echo refused; grep Seccomp: /proc/self/status";
    assert_eq!(
        host.shell(&["--security-opt", &option], script),
        "refused\nSeccomp:\t2\n"
    );
    assert_eq!(
        host.shell(&["--security-opt", "seccomp=unconfined"], script),
        "made\nSeccomp:\t0\n"
    );
    let broken = host.file("broken.json", "{");
    let option = format!("seccomp={}", broken.display());
    fail(
        &host.run(&["--security-opt", &option], &["true"]),
        125,
        &["broken.json"],
    );
    fail(
        &host.run(&["--security-opt", "apparmor=x"], &["true"]),
        125,
        &["apparmor=x"],
    );
}

#[test]
fn the_guests_kernel_and_the_other_containers_files_are_out_of_reach() {
    let host = Host::new();
    let script = "cat /proc/kcore >/dev/null 2>&1 && echo kcore; echo 1 2>/dev/null > /proc/sys/kernel/panic && echo sysctl
        ls /run/cloison 2>/dev/null && echo share; mount -t tmpfs x /tmp 2>/dev/null && echo mount; echo done";
    assert_eq!(host.shell(&[], script), "done\n");
}

#[test]
fn devices_other_than_the_usual_cannot_be_opened() {
    let host = Host::new();
    // Major 10, minor 1 would be the mouse, 1:1 memory; what counts is that opening is refused, not that nothing is there.
    let script = "mknod /tmp/mem c 1 1 && head -c 1 /tmp/mem 2>&1 >/dev/null | grep -o 'Operation not permitted'";
    assert_eq!(host.shell(&[], script), "Operation not permitted\n");
}

#[test]
fn a_device_node_never_opens_the_hosts_device() {
    let host = Host::new();
    let dir = host.path("shared");
    std::fs::create_dir(&dir).unwrap();
    let volume = format!("{}:/data", dir.display());
    let script =
        "mknod /data/null c 1 3 && echo x > /data/null && test -c /data/null && echo guest device";
    let output = host.run(&["-v", &volume], &["sh", "-c", script]);
    assert_eq!(succeed(&output), "guest device\n");
}
