//! What `--memory`, `--cpus` and `--ulimit` do.

use crate::host::{Host, fail, succeed};

#[test]
fn memory_and_cpu_limits_hold_in_the_guest() {
    let host = Host::new();
    let script = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max; nproc";
    assert_eq!(
        host.shell(&["-m", "64m", "--cpus", "1.5"], script),
        "67108864\n150000 100000\n2\n"
    );
}

#[test]
fn a_container_that_takes_more_memory_than_it_may_is_killed_and_says_so() {
    let host = Host::new();
    // tail keeps what it reads until a line ends, which /dev/zero never does.
    let id = host.detached(&["--memory", "24m"], &["tail", "/dev/zero"]);
    assert_eq!(succeed(&host.cloison(["wait", &id])), "137\n");
    assert_eq!(host.inspect(&id)["State"]["OOMKilled"], true);
    succeed(&host.cloison(["rm", &id]));
}

#[test]
fn programs_whose_pages_were_dropped_for_lack_of_memory_run_on() {
    let host = Host::new();
    // Each round drops the program's own pages and reads them again, into places that held others of its pages.
    let script = "for i in 1 2 3 4 5 6; do tail /dev/zero; echo $?; done";
    assert_eq!(host.shell(&["--memory", "24m"], script), "137\n".repeat(6));
}

#[test]
fn without_a_limit_the_guests_own_memory_is_the_end_and_the_guest_survives_it() {
    let host = Host::new();
    let id = host.detached(&[], &["sh", "-c", "awk 'BEGIN { s = \"x\"; for (i = 0; i < 20; i++) s = s s; while (1) a[n++] = s n }'; echo $?"]);
    assert_eq!(succeed(&host.cloison(["wait", &id])), "0\n");
    assert_eq!(succeed(&host.cloison(["logs", &id])), "137\n");
    succeed(&host.cloison(["rm", &id]));
}

#[test]
fn limits_that_make_no_sense_are_refused_before_anything_is_made() {
    let host = Host::new();
    fail(
        &host.run(&["-m", "1m"], &["true"]),
        125,
        &["too small", "6m"],
    );
    fail(&host.run(&["-m", "lots"], &["true"]), 125, &["lots"]);
    fail(&host.run(&["--cpus", "0"], &["true"]), 125, &["cpus"]);
    fail(
        &host.run(&["--ulimit", "nofile=2:1"], &["true"]),
        125,
        &["nofile"],
    );
    host.assert_clean();
}

#[test]
fn resource_limits_of_processes_are_set() {
    let host = Host::new();
    let output = host.shell(
        &["--ulimit", "nofile=100:200", "--ulimit", "core=0"],
        "ulimit -n; ulimit -Hn; ulimit -c",
    );
    assert_eq!(output, "100\n200\n0\n");
}
