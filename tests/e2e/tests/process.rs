//! What a container's process is: command, environment, user, directory, status.

use crate::host::{Host, busybox, fail, succeed, text};

#[test]
fn a_container_runs_on_a_kernel_of_its_own() {
    let host = Host::new();
    let guest = host.stdout(&[], &["uname", "-r"]);
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_ne!(guest, release);
    assert!(guest.trim().ends_with("-cloison"), "{guest}");
}

#[test]
fn the_exit_status_is_the_commands() {
    let host = Host::new();
    for status in [0, 1, 3, 255] {
        let output = host.run(&[], &["sh", "-c", &format!("exit {status}")]);
        assert_eq!(
            output.status.code(),
            Some(status),
            "{}",
            text(&output.stderr)
        );
    }
    let output = host.run(&[], &["sh", "-c", "kill -KILL $$; :"]);
    assert_eq!(
        output.status.code(),
        Some(0),
        "process 1 of a container cannot kill itself"
    );
    let output = host.run(&["--init"], &["sh", "-c", "kill -KILL $$"]);
    assert_eq!(output.status.code(), Some(137), "{}", text(&output.stderr));
}

#[test]
fn a_command_that_is_missing_gives_127_and_one_that_cannot_be_executed_126() {
    let host = Host::new();
    fail(
        &host.run(&[], &["nonesuch"]),
        127,
        &["nonesuch", "not found"],
    );
    fail(&host.run(&[], &["/bin/nonesuch"]), 127, &["/bin/nonesuch"]);
    fail(
        &host.run(&[], &["/etc/passwd"]),
        126,
        &["/etc/passwd", "ermission denied"],
    );
    fail(&host.run(&[], &["/etc"]), 126, &["/etc"]);
    assert!(
        host.leftovers().is_empty(),
        "a container that could not start is left"
    );
}

#[test]
fn environment_directory_and_host_name_are_what_the_options_say() {
    let host = Host::new();
    let file = host.file("env", "# comment\nFROM_FILE=file\nBOTH=file\n");
    let script = "echo $FROM_FILE $BOTH $FLAG; pwd; hostname; echo $HOSTNAME $HOME $PATH";
    let mut options = vec![
        "--env-file",
        file.to_str().unwrap(),
        "-e",
        "BOTH=flag",
        "-e",
        "FLAG=a b",
    ];
    options.extend(["-w", "/made/here", "--hostname", "bulkhead"]);
    let output = host.shell(&options, script);
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(
        output,
        format!("file flag a b\n/made/here\nbulkhead\nbulkhead /root {path}\n")
    );
}

#[test]
fn a_variable_without_a_value_is_passed_on() {
    let host = Host::new();
    let image = busybox();
    let mut command = host.command([
        "run", "--rm", "-e", "PASSED", "-e", "NOT_SET", &image, "env",
    ]);
    let output = command
        .env("PASSED", "on")
        .env_remove("NOT_SET")
        .output()
        .unwrap();
    let output = succeed(&output);
    assert!(
        output.contains("PASSED=on\n") && !output.contains("NOT_SET"),
        "{output}"
    );
}

#[test]
fn users_are_found_by_name_and_by_number_in_the_image() {
    let host = Host::new();
    let id = |user| host.stdout(&["-u", user], &["id"]);
    assert!(
        id("user").starts_with("uid=1000(user) gid=1000(user) groups=1000(user),2000(extra)"),
        "{}",
        id("user")
    );
    assert!(
        id("1234").starts_with("uid=1234 gid=0(root)"),
        "{}",
        id("1234")
    );
    assert!(
        id("user:extra").starts_with("uid=1000(user) gid=2000(extra)"),
        "{}",
        id("user:extra")
    );
    assert_eq!(host.shell(&["-u", "user"], "echo $HOME"), "/home/user\n");
    fail(
        &host.run(&["-u", "nobody-here"], &["id"]),
        125,
        &["nobody-here"],
    );
}

#[test]
fn an_entrypoint_replaces_the_images() {
    let host = Host::new();
    assert_eq!(host.stdout(&["--entrypoint", "echo"], &["a", "b"]), "a b\n");
    fail(&host.run(&["--entrypoint", ""], &[]), 125, &["no command"]);
}

#[test]
fn with_init_process_one_reaps_and_passes_signals_on() {
    let host = Host::new();
    // The orphan's parent exits at once; if nobody reaped it, it would be listed as a zombie.
    let script = "sh -c 'sleep 0.01 & exit' ; sleep 0.2; ps -o pid,stat,comm";
    let output = host.shell(&["--init"], script);
    assert!(!output.contains('Z'), "{output}");
    assert!(
        !output
            .lines()
            .any(|line| line.trim().starts_with("1 ") && line.contains(" sh")),
        "{output}"
    );

    let id = host.detached(
        &["--init"],
        &[
            "sh",
            "-c",
            "trap 'exit 42' TERM; echo ready; while :; do sleep 0.1; done",
        ],
    );
    host.until_logged(&id, "ready");
    succeed(&host.cloison(["kill", "-s", "TERM", &id]));
    assert_eq!(succeed(&host.cloison(["wait", &id])), "42\n");
    succeed(&host.cloison(["rm", &id]));
}

#[test]
fn a_container_has_its_own_processes_and_the_devices_it_should() {
    let host = Host::new();
    assert_eq!(host.shell(&[], "echo $$"), "1\n");
    let script = "for d in null zero full random urandom tty; do test -c /dev/$d || echo $d is missing; done
        echo x > /dev/null && head -c 3 /dev/zero | wc -c; ls -l /dev/stdout /proc/self/fd/1 > /dev/null && echo hi > /dev/stdout";
    assert_eq!(host.shell(&[], script), "3\nhi\n");
    assert_eq!(
        host.shell(&[], "ip addr show lo | grep -c 127.0.0.1"),
        "1\n"
    );
}

#[test]
fn the_clock_is_the_hosts() {
    let host = Host::new();
    let guest: u64 = host.stdout(&[], &["date", "+%s"]).trim().parse().unwrap();
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    assert!(now.abs_diff(guest) < 120, "guest {guest}, host {now}");
}
