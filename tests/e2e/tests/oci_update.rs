//! `cloison-runtime update`: what a container may use while it runs, in its guest, of the VM, and on the host.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::host::{engine, fail, succeed};
use crate::oci::Bundle;

/// Memory that the guest has in all, MiB.
fn guest_memory(bundle: &Bundle) -> u64 {
    let text = guest(
        bundle,
        "sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo",
    );
    text.trim().parse::<u64>().unwrap() >> 10
}

fn guest(bundle: &Bundle, script: &str) -> String {
    succeed(&bundle.run(&["exec", "one", "sh", "-c", script]))
}

fn update(bundle: &Bundle, args: &[&str]) {
    succeed(&bundle.run(&[&["update", "one"], args].concat()));
}

/// A file of the container's cgroup on the host, under its names on cgroup v1 and v2.
fn on_host(bundle: &Bundle, v1: &str, v2: &str) -> String {
    let root = Path::new("/sys/fs/cgroup");
    let (controller, file) = v1.split_once('/').unwrap();
    let of_v1 = root.join(controller).join(bundle.cgroup()).join(file);
    let file = match of_v1.exists() {
        true => of_v1,
        false => root.join(bundle.cgroup()).join(v2),
    };
    fs::read_to_string(file).unwrap().trim().to_owned()
}

fn host_memory(bundle: &Bundle) -> Option<u64> {
    let limit = on_host(bundle, "memory/memory.limit_in_bytes", "memory.max");
    let limit = limit.parse::<u64>().ok();
    // What cgroup v1 has for none is about as much as can be counted.
    limit.map(|limit| limit >> 20).filter(|mib| *mib < 1 << 40)
}

const LIMIT: &str = "cat /sys/fs/cgroup/memory.max";

#[test]
fn a_vm_grows_and_shrinks_with_its_containers_memory_limit() {
    let bundle = Bundle::shell("sleep 1000").with(|config| {
        config["linux"]["resources"]["memory"] = json!({ "limit": 128 << 20 });
    });
    bundle.create_and_start();
    let small = guest_memory(&bundle);
    let held = host_memory(&bundle).unwrap();
    let of_software = engine() == "software";
    // There the guest has all that it can ever have, and may use no more of it than its container's limit takes.
    let least = if of_software { 960 } else { 128 };
    assert!(
        (least..least + 128).contains(&small) && (128..1024).contains(&held),
        "{small} {held}"
    );
    if of_software {
        let refused = bundle.run(&["update", "--memory", "1025M", "one"]);
        let most = "cannot have more than 1024 MiB";
        fail(&refused, 1, &["cannot be raised to 1074790400 bytes", most]);
        assert_eq!(guest(&bundle, LIMIT), "134217728\n");
        assert_eq!(host_memory(&bundle), Some(held));
    }
    update(&bundle, &["--memory", "512M", "--memory-swap", "512M"]);
    assert_eq!(guest(&bundle, LIMIT), "536870912\n");
    let grown = if of_software { small } else { small + 384 };
    assert_eq!(guest_memory(&bundle), grown);
    assert_eq!(host_memory(&bundle), Some(held + 384));
    let use_it = "mount -t tmpfs -o size=400m tmpfs /tmp && dd if=/dev/zero of=/tmp/x bs=1M count=300 2>/dev/null && stat -c %s /tmp/x";
    let used = bundle.run(&["exec", "--cap", "CAP_SYS_ADMIN", "one", "sh", "-c", use_it]);
    assert_eq!(succeed(&used), "314572800\n");
    guest(&bundle, "rm /tmp/x");
    update(&bundle, &["--memory", "64M"]);
    assert_eq!(guest(&bundle, LIMIT), "67108864\n");
    if of_software {
        // What the guest has had is still there.
        assert_eq!(host_memory(&bundle), Some(held + 384));
        update(&bundle, &["--memory", "1024M"]);
        assert_eq!(guest(&bundle, LIMIT), "1073741824\n");
        assert_eq!(host_memory(&bundle), Some(1024 + 512));
        return;
    }
    // It keeps what it was started with, and perhaps some that it cannot spare.
    let (now, held_now) = (guest_memory(&bundle), host_memory(&bundle).unwrap());
    assert!((small..small + 192).contains(&now), "{small} {now}");
    // The guest may go on giving back what it was not waited for.
    assert!(
        held_now - now >= held - small && held_now < held + 384,
        "{held_now} {now}"
    );
    update(&bundle, &["--memory", "-1"]);
    assert_eq!(guest(&bundle, LIMIT), "max\n");
    assert_eq!(host_memory(&bundle), None);
}

#[test]
fn a_container_without_a_memory_limit_can_be_given_one() {
    let bundle = Bundle::shell("sleep 1000");
    bundle.create_and_start();
    assert_eq!(host_memory(&bundle), None);
    update(&bundle, &["--memory", "100M"]);
    assert_eq!(guest(&bundle, LIMIT), "104857600\n");
    // That of the VM, which is as large as before.
    let held = host_memory(&bundle).unwrap();
    assert!((1024..2048).contains(&held), "{held}");
    for (limit, why) in [
        ("5M", "too small"),
        ("many", "not a size"),
        ("-2", "not a size"),
    ] {
        fail(
            &bundle.run(&["update", "--memory", limit, "one"]),
            1,
            &[why],
        );
    }
    assert_eq!(guest(&bundle, LIMIT), "104857600\n");
}

#[test]
fn a_vm_has_the_cpus_that_its_containers_quota_is_for() {
    let bundle = Bundle::shell("sleep 1000").with(|config| {
        config["linux"]["resources"]["cpu"] = json!({ "quota": 200_000, "period": 100_000 });
    });
    bundle.create_and_start();
    let cpus = || guest(&bundle, "nproc; cat /sys/fs/cgroup/cpu.max");
    assert_eq!(cpus(), "2\n200000 100000\n");
    update(&bundle, &["--cpu-quota", "50000"]);
    assert_eq!(cpus(), "1\n50000 100000\n");
    // What is not named stays.
    update(&bundle, &["--cpu-period", "25000"]);
    assert_eq!(cpus(), "2\n50000 25000\n");
    update(&bundle, &["--cpu-quota", "-1"]);
    assert_eq!(cpus(), "2\nmax 25000\n");
    let refused = bundle.run(&[
        "update",
        "--cpu-quota",
        "9000000",
        "--cpu-period",
        "100000",
        "one",
    ]);
    fail(
        &refused,
        1,
        &["cannot be raised to 90 CPUs", "cannot have more than"],
    );
    assert_eq!(cpus(), "2\nmax 25000\n");
}

#[test]
fn a_vm_is_given_more_cpus_than_it_was_started_with() {
    if std::thread::available_parallelism().unwrap().get() < 2 {
        eprintln!("skipped: the host has one CPU");
        return;
    }
    let bundle = Bundle::shell("sleep 1000");
    bundle.create_and_start();
    let cpus = || guest(&bundle, "nproc; grep -c ^processor /proc/cpuinfo");
    assert_eq!(cpus(), "1\n1\n");
    update(&bundle, &["--cpu-quota", "150000"]);
    assert_eq!(cpus(), "2\n2\n");
    // Each does its work.
    let both = "taskset 1 sh -c 'i=0; while [ $i -lt 99 ]; do i=$((i+1)); done; echo $i'; taskset 2 cat /sys/fs/cgroup/cpu.max";
    assert_eq!(guest(&bundle, both), "99\n150000 100000\n");
    update(&bundle, &["--cpu-quota", "100000"]);
    assert_eq!(cpus(), "1\n1\n");
}

#[test]
fn an_update_names_any_of_runcs_limits() {
    let bundle = Bundle::shell("sleep 1000");
    bundle.create_and_start();
    update(
        &bundle,
        &[
            "--cpuset-cpus",
            "0",
            "--cpuset-mems",
            "0",
            "--cpu-share",
            "512",
            "--pids-limit",
            "40",
        ],
    );
    assert_eq!(on_host(&bundle, "cpuset/cpuset.cpus", "cpuset.cpus"), "0");
    assert_eq!(on_host(&bundle, "cpuset/cpuset.mems", "cpuset.mems"), "0");
    let shares = on_host(&bundle, "cpu/cpu.shares", "cpu.weight");
    assert!(["512", "20"].contains(&shares.as_str()), "{shares}");
    assert_eq!(guest(&bundle, "cat /sys/fs/cgroup/pids.max"), "40\n");
    update(&bundle, &["--cpu-idle", "1"]);
    assert_eq!(guest(&bundle, "cat /sys/fs/cgroup/cpu.idle"), "1\n");
    for args in [["--cpu-rt-period", "1000000"], ["--cpu-rt-runtime", "1"]] {
        let refused = bundle.run(&[&["update", "one"], &args[..]].concat());
        fail(&refused, 1, &["real-time limits are not supported"]);
    }
    fail(
        &bundle.run(&["update", "--cpuset-cpus", "4095", "one"]),
        1,
        &["set the limits of the cgroup"],
    );
}
