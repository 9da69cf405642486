//! Fields of the OCI runtime specification that callers set one by one, as a container's process sees them.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::host::{fail, succeed};
use crate::oci::Bundle;

#[test]
fn a_process_has_its_scheduler_io_priority_and_personality() {
    let bundle = Bundle::shell(
        "set -- $(cat /proc/self/stat); echo ${19} ${41}; ionice -p $$; uname -m; touch /done; sleep 1000",
    )
    .with(|config| {
        config["process"]["scheduler"] = json!({ "policy": "SCHED_BATCH", "nice": 5 });
        config["process"]["ioPriority"] = json!({ "class": "IOPRIO_CLASS_BE", "priority": 6 });
        config["linux"]["personality"] = json!({ "domain": "LINUX32" });
    });
    bundle.create_and_start();
    let exec = bundle.run(&["exec", "one", "uname", "-m"]);
    assert_eq!(succeed(&exec), "i686\n", "an exec has the container's");
    let process = bundle.host.path("process.json");
    let exec = json!({
        "args": ["sh", "-c", "set -- $(cat /proc/self/stat); echo ${19} ${41}; ionice -p $$"],
        "cwd": "/",
        "env": ["PATH=/bin"],
        "user": { "uid": 0, "gid": 0 },
        "scheduler": { "policy": "SCHED_IDLE" },
        "ioPriority": { "class": "IOPRIO_CLASS_IDLE", "priority": 0 },
    });
    fs::write(&process, exec.to_string()).unwrap();
    let exec = bundle.run(&["exec", "--process", process.to_str().unwrap(), "one"]);
    let answer = succeed(&exec);
    assert!(answer.starts_with("0 5\nidle"), "{answer}");
    let done = "while [ ! -e /done ]; do sleep 0.1; done";
    succeed(&bundle.run(&["exec", "one", "sh", "-c", done]));
    // SCHED_BATCH is 3, SCHED_IDLE 5 (sched(7)).
    assert_eq!(bundle.written(), "5 3\nbest-effort: prio 6\ni686\n");
}

#[test]
fn a_scheduler_or_a_personality_that_cannot_be_is_an_error() {
    let bundle = Bundle::shell("true").with(|config| {
        config["process"]["scheduler"] = json!({ "policy": "SCHED_FIFO", "priority": 1000 });
    });
    fail(&bundle.output(), 1, &["sched"]);
    let bundle = bundle.with(|config| {
        config["process"]["scheduler"] = json!(null);
        config["linux"]["personality"] = json!({ "domain": "LINUX", "flags": ["NONSENSE"] });
    });
    assert!(!bundle.output().status.success());
}

#[test]
fn what_a_spec_leaves_out_or_asks_in_vain_is_no_error() {
    let bundle = Bundle::shell("pwd; touch /elsewhere 2>/dev/null || echo read-only; cat /sys/fs/cgroup/pids.max; grep -c ' /proc proc ' /proc/mounts").with(|config| {
        config["root"]["readonly"] = json!(true);
        config["process"]["cwd"] = json!("/made/for/it");
        let bounding = &mut config["process"]["capabilities"]["bounding"];
        let bounding = bounding.as_array_mut().unwrap();
        bounding.push(json!("CAP_OF_TOMORROW"));
        config["linux"]["resources"]["pids"] = json!({ "limit": 0 });
        for mount in config["mounts"].as_array_mut().unwrap() {
            mount.as_object_mut().unwrap().remove("source");
        }
    });
    let seen = succeed(&bundle.output());
    assert_eq!(seen, "/made/for/it\nread-only\nmax\n1\n");
    let log = bundle.log();
    assert!(
        log.contains("ignoring unknown") && log.contains("CAP_OF_TOMORROW"),
        "{log}"
    );
}

#[test]
fn dev_is_read_only_when_it_is_to_be_and_its_devices_work() {
    let script = "grep -o '^tmpfs /dev tmpfs ro,nosuid' /proc/mounts; echo > /dev/null && touch /dev/new || echo refused";
    let bundle = Bundle::shell(script).with(|config| {
        let mounts = config["mounts"].as_array_mut().unwrap();
        let dev = mounts
            .iter_mut()
            .find(|mount| mount["destination"] == "/dev");
        dev.unwrap()["options"]
            .as_array_mut()
            .unwrap()
            .push("ro".into());
    });
    let seen = succeed(&bundle.output());
    assert_eq!(seen, "tmpfs /dev tmpfs ro,nosuid\nrefused\n");
}

#[test]
fn propagation_is_the_guests_own() {
    let bundle = Bundle::shell(
        "grep -o ' /shared .*' /proc/self/mountinfo; grep -o ' / / .*' /proc/self/mountinfo",
    );
    let source = bundle.host.path("source");
    fs::create_dir(&source).unwrap();
    let bundle = bundle.with(|config| {
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.push(json!({ "destination": "/shared", "type": "bind", "source": source, "options": ["rbind", "rshared"] }));
        config["linux"]["rootfsPropagation"] = "rshared".into();
    });
    let seen = succeed(&bundle.output());
    let lines: Vec<_> = seen.lines().collect();
    assert_eq!(lines.len(), 2, "{seen}");
    assert!(lines.iter().all(|line| line.contains("shared:")), "{seen}");
    assert!(
        bundle.log().contains("shared within the guest"),
        "{}",
        bundle.log()
    );

    let bundle = bundle.with(|config| config["linux"]["rootfsPropagation"] = "rslave".into());
    succeed(&bundle.output());
    let bundle = bundle.with(|config| config["linux"]["rootfsPropagation"] = "sideways".into());
    fail(&bundle.output(), 1, &["rootfsPropagation", "sideways"]);
}

#[test]
fn a_container_with_a_user_namespace_has_its_files() {
    let bundle =
        Bundle::shell("id -u; cat /proc/self/uid_map; touch /made; ls -n /made | cut -d ' ' -f 1")
            .with(|config| {
                let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
                namespaces.push(json!({ "type": "user" }));
                let map = json!([{ "containerID": 0, "hostID": 1000, "size": 2000 }]);
                config["linux"]["uidMappings"] = map.clone();
                config["linux"]["gidMappings"] = map;
            });
    let rootfs = bundle.dir().join("rootfs");
    std::os::unix::fs::chown(&rootfs, Some(1000), Some(1000)).unwrap();
    let seen = succeed(&bundle.output());
    let words: Vec<_> = seen.split_whitespace().collect();
    assert_eq!(words[..4], ["0", "0", "1000", "2000"], "{seen}");
    use std::os::unix::fs::MetadataExt;
    assert_eq!(fs::metadata(rootfs.join("made")).unwrap().uid(), 1000);
}

#[test]
fn limits_that_concern_the_host_are_its_cgroups() {
    let bundle = Bundle::shell("exec tail -f /dev/null").with(|config| {
        config["linux"]["resources"] = json!({
            "memory": { "limit": 64 << 20 },
            "cpu": { "shares": 512, "cpus": "0", "mems": "0" },
        });
    });
    bundle.create_and_start();
    let read = |v1: &str, v2: &str| {
        let (controller, file) = v1.split_once('/').unwrap();
        let root = Path::new("/sys/fs/cgroup");
        let of_v1 = root.join(controller).join(bundle.cgroup()).join(file);
        let limit = match of_v1.exists() {
            true => of_v1,
            false => root.join(bundle.cgroup()).join(v2),
        };
        fs::read_to_string(limit).unwrap().trim().to_owned()
    };
    // The VM, and what its processes take.
    let memory: u64 = read("memory/memory.limit_in_bytes", "memory.max")
        .parse()
        .unwrap();
    assert!((64 << 20..1 << 30).contains(&memory), "{memory}");
    // Shares are 2 to 262144, weights 1 to 10000.
    let shares = || read("cpu/cpu.shares", "cpu.weight");
    assert!(["512", "20"].contains(&shares().as_str()), "{}", shares());
    assert_eq!(read("cpuset/cpuset.cpus", "cpuset.cpus"), "0");
    assert_eq!(read("cpuset/cpuset.mems", "cpuset.mems"), "0");
    let used = read("memory/memory.usage_in_bytes", "memory.current");
    assert!(used.parse::<u64>().unwrap() > 16 << 20, "{used}");
    succeed(&bundle.run(&["update", "--cpu-share", "2048", "one"]));
    assert!(["2048", "79"].contains(&shares().as_str()), "{}", shares());
    succeed(&bundle.run(&["delete", "--force", "one"]));
    let bundle = bundle.with(|config| {
        config["linux"]["resources"] = json!({ "cpu": { "cpus": "4095" } });
    });
    fail(&bundle.output(), 1, &["set the limits of the cgroup"]);
}

#[test]
fn block_io_limits_are_the_vms_on_the_host() {
    let Some(device) = block_device() else { return };
    let bundle = Bundle::shell("sleep 1000");
    let (major, minor) = device.split_once(':').unwrap();
    let (major, minor): (u64, u64) = (major.parse().unwrap(), minor.parse().unwrap());
    let bundle = bundle.with(|config| {
        config["linux"]["resources"]["blockIO"] = json!({
            "throttleReadBpsDevice": [{ "major": major, "minor": minor, "rate": 10_485_760 }],
        });
    });
    bundle.create();
    let limit = Path::new("/sys/fs/cgroup/blkio")
        .join(bundle.cgroup())
        .join("blkio.throttle.read_bps_device");
    assert_eq!(
        fs::read_to_string(limit).unwrap(),
        format!("{device} 10485760\n")
    );
    succeed(&bundle.run(&["delete", "--force", "one"]));
    let bundle = bundle.with(|config| {
        config["linux"]["resources"]["blockIO"] = json!({ "leafWeight": 100 });
    });
    fail(&bundle.output(), 1, &["blockIO"]);
}

/// A disk of this machine's, where cgroup v1 limits disks.
fn block_device() -> Option<String> {
    if !Path::new("/sys/fs/cgroup/blkio").is_dir() {
        return None;
    }
    let mut disks = fs::read_dir("/sys/block").ok()?.flatten();
    let disk = disks.find(|disk| disk.path().join("device").exists())?;
    let number = fs::read_to_string(disk.path().join("dev")).ok()?;
    Some(number.trim().to_owned())
}
