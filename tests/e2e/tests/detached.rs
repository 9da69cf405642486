//! Containers in the background: `run -d`, `ps`, `logs`, `wait`, `stop`, `kill`, `rm`, `inspect`, `prune`.

use crate::host::{Host, busybox, engine, fail, succeed, text};

#[test]
fn a_detached_container_is_listed_logged_waited_for_and_removed() {
    let host = Host::new();
    let id = host.detached(
        &["--name", "job"],
        &["sh", "-c", "echo out; echo err >&2; sleep 0.5; exit 9"],
    );
    assert_eq!(id.len(), 64);
    let listed = succeed(&host.cloison(["ps"]));
    assert!(
        listed.contains(&id[..12]) && listed.contains("job") && listed.contains("Up "),
        "{listed}"
    );
    assert_eq!(
        succeed(&host.cloison(["ps", "-q", "--no-trunc"])).trim(),
        id
    );
    fail(&host.cloison(["rm", "job"]), 1, &["job", "running"]);

    assert_eq!(succeed(&host.cloison(["wait", "job"])), "9\n");
    let logs = host.cloison(["logs", "job"]);
    assert_eq!(
        (text(&logs.stdout), text(&logs.stderr)),
        ("out\n".into(), "err\n".into())
    );
    assert_eq!(succeed(&host.cloison(["ps", "-q"])), "");
    let listed = succeed(&host.cloison(["ps", "-a"]));
    assert!(listed.contains("Exited (9)"), "{listed}");

    let inspected = host.inspect("job");
    assert_eq!(inspected["State"]["ExitCode"], 9);
    assert_eq!(inspected["State"]["Status"], "exited");
    assert_eq!(inspected["Engine"]["Name"], engine());
    assert_eq!(inspected["Name"], "job");
    assert_eq!(
        succeed(&host.cloison(["wait", "job"])),
        "9\n",
        "waiting again gives the same"
    );
    assert!(succeed(&host.cloison(["rm", "job"])).contains(&id[..12]));
    let output = host.cloison(["inspect", "job"]);
    assert_eq!(
        (text(&output.stdout), output.status.code()),
        ("[]\n".into(), Some(1)),
        "as docker says it"
    );
}

#[test]
fn stop_asks_first_and_kills_then() {
    let host = Host::new();
    let polite = host.detached(
        &[],
        &[
            "sh",
            "-c",
            "trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done",
        ],
    );
    let stubborn = host.detached(
        &[],
        &[
            "sh",
            "-c",
            "trap '' TERM; echo ready; while :; do sleep 0.1; done",
        ],
    );
    for id in [&polite, &stubborn] {
        host.until_logged(id, "ready");
    }
    succeed(&host.cloison(["stop", "-t", "20", &polite]));
    assert_eq!(host.inspect(&polite)["State"]["ExitCode"], 5);
    succeed(&host.cloison(["stop", "-t", "1", &stubborn]));
    assert_eq!(host.inspect(&stubborn)["State"]["ExitCode"], 137);
    succeed(&host.cloison(["stop", &stubborn]));
    succeed(&host.cloison(["prune", "-f"]));
}

#[test]
fn the_images_or_the_options_stop_signal_is_used() {
    let host = Host::new();
    let script = "trap 'exit 6' USR1; echo ready; while :; do sleep 0.1; done";
    let id = host.detached(&["--stop-signal", "USR1"], &["sh", "-c", script]);
    host.until_logged(&id, "ready");
    succeed(&host.cloison(["stop", &id]));
    assert_eq!(host.inspect(&id)["State"]["ExitCode"], 6);
    succeed(&host.cloison(["rm", &id]));
}

#[test]
fn signals_reach_the_process_and_kill_defaults_to_kill() {
    let host = Host::new();
    let script = "trap 'echo hup' HUP; trap 'exit 8' INT; echo ready; while :; do sleep 0.1; done";
    let id = host.detached(&[], &["sh", "-c", script]);
    host.until_logged(&id, "ready");
    succeed(&host.cloison(["kill", "-s", "SIGHUP", &id]));
    host.until_logged(&id, "hup");
    succeed(&host.cloison(["kill", "--signal", "2", &id]));
    assert_eq!(succeed(&host.cloison(["wait", &id])), "8\n");
    fail(&host.cloison(["kill", &id]), 1, &["not running"]);
    succeed(&host.cloison(["rm", &id]));

    let id = host.detached(&[], &["sleep", "1000"]);
    succeed(&host.cloison(["kill", &id]));
    assert_eq!(host.inspect(&id)["State"]["ExitCode"], 137);
    succeed(&host.cloison(["rm", &id]));
}

#[test]
fn a_container_to_be_removed_removes_itself_and_still_says_how_it_ended() {
    let host = Host::new();
    let id = host.detached(&["--rm"], &["sh", "-c", "sleep 0.5; exit 4"]);
    assert_eq!(succeed(&host.cloison(["wait", &id])), "4\n");
    host.assert_clean();
}

#[test]
fn rm_force_ends_a_running_container() {
    let host = Host::new();
    let id = host.detached(&["--name", "x"], &["sleep", "1000"]);
    let other = host.detached(&[], &["sleep", "1000"]);
    let output = host.cloison(["rm", "-f", "nonesuch", "x"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stdout).contains(&id[..12]),
        "one that fails must not keep the others from their turn"
    );
    assert_eq!(succeed(&host.cloison(["ps", "-q"])).trim(), &other[..12]);
    succeed(&host.cloison(["rm", "-f", &other]));
}

#[test]
fn logs_follow_tail_and_show_times() {
    let host = Host::new();
    let id = host.detached(
        &[],
        &[
            "sh",
            "-c",
            "for n in 1 2 3 4 5; do echo $n; sleep 0.1; done",
        ],
    );
    assert_eq!(
        succeed(&host.cloison(["logs", "-f", &id])),
        "1\n2\n3\n4\n5\n"
    );
    assert_eq!(
        succeed(&host.cloison(["logs", "--tail", "2", &id])),
        "4\n5\n"
    );
    let stamped = succeed(&host.cloison(["logs", "-t", "-n", "1", &id]));
    let (time, line) = stamped.split_once(' ').unwrap();
    assert!(
        time.ends_with('Z') && time.contains('T') && line == "5\n",
        "{stamped}"
    );
    succeed(&host.cloison(["rm", "-f", &id]));
}

#[test]
fn a_detached_container_that_cannot_start_says_so_at_once() {
    let host = Host::new();
    let image = busybox();
    fail(
        &host.cloison(["run", "-d", &image, "nonesuch"]),
        127,
        &["nonesuch"],
    );
    host.assert_clean();
}

#[test]
fn a_container_in_the_foreground_is_listed_too_and_its_id_written_where_asked() {
    let host = Host::new();
    let image = busybox();
    let file = host.path("cid");
    let mut child = host.spawn([
        "run",
        "--rm",
        "-i",
        "--cidfile",
        file.to_str().unwrap(),
        &image,
        "cat",
    ]);
    let mut stdin = child.stdin.take().unwrap();
    std::io::Write::write_all(&mut stdin, b"x").unwrap();
    let mut byte = [0];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut byte).unwrap();
    let id = std::fs::read_to_string(&file).unwrap();
    assert_eq!(
        succeed(&host.cloison(["ps", "-q", "--no-trunc"])).trim(),
        id
    );
    fail(
        &host.cloison(["run", "--cidfile", file.to_str().unwrap(), &image, "true"]),
        125,
        &["cid"],
    );
    drop(stdin);
    assert!(child.wait().unwrap().success());
}
