use serde_json::{Value, json};

use super::*;

fn id() -> ContainerId {
    ContainerId::parse("c1").unwrap()
}

fn minimal() -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 1000, "gid": 100, "additionalGids": [5, 6], "umask": 18},
            "args": ["sh", "-c", "true"],
            "env": ["PATH=/bin", "A=b=c"],
            "cwd": "/srv",
        },
        "root": {"path": "/run/cloison/shared/rootfs"},
        "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}]},
    })
}

fn parse(spec: &Value) -> Result<ContainerSpec> {
    container(&id(), spec.to_string().as_bytes(), None)
}

fn with(pointer: &str, key: &str, value: Value) -> Value {
    let mut spec = minimal();
    spec.pointer_mut(pointer).unwrap()[key] = value;
    spec
}

#[track_caller]
fn refused(spec: &Value, because: &str) {
    match parse(spec) {
        Err(Error::Invalid { why, .. }) => assert!(why.contains(because), "{why}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn identity_goes_to_the_workload_and_libcontainer_gets_root() {
    let parsed = parse(&minimal()).unwrap();
    assert_eq!((parsed.workload.uid, parsed.workload.gid), (1000, 100));
    assert_eq!(parsed.workload.groups, [5, 6]);
    assert_eq!(parsed.workload.cwd, Path::new("/srv"));
    assert_eq!(parsed.workload.env, ["PATH=/bin", "A=b=c"]);
    assert!(parsed.workload.make_cwd);
    assert_eq!(parsed.cgroup, Path::new("/cloison/c1"));

    let config: Spec = serde_json::from_slice(&parsed.config).unwrap();
    let process = config.process().as_ref().unwrap();
    assert_eq!(process.user().uid(), 0);
    assert_eq!(process.user().umask(), Some(18));
    assert_eq!(process.user().additional_gids(), &None);
    assert_eq!(process.capabilities(), &None);
    assert_eq!(process.cwd(), Path::new("/"));
}

#[test]
fn missing_capabilities_mean_none() {
    let parsed = parse(&minimal()).unwrap();
    assert_eq!(parsed.workload.capabilities, no_capabilities());
}

#[test]
fn no_new_privileges_reaches_libcontainer_only_when_true() {
    for (given, expected) in [(true, Some(true)), (false, None)] {
        let parsed = parse(&with("/process", "noNewPrivileges", json!(given))).unwrap();
        let config: Spec = serde_json::from_slice(&parsed.config).unwrap();
        assert_eq!(
            config.process().as_ref().unwrap().no_new_privileges(),
            expected
        );
    }
}

#[test]
fn an_exec_inherits_what_it_does_not_say() {
    let mut spec = minimal();
    spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 10, "hard": 20}]);
    spec["process"]["capabilities"] = json!({"bounding": ["CAP_KILL"]});
    spec["process"]["noNewPrivileges"] = json!(true);
    spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW"});
    let defaults = parse(&spec).unwrap().defaults;

    let process = json!({"user": {"uid": 7, "gid": 7}, "args": ["id"], "cwd": "/"});
    let parsed = exec(process.to_string().as_bytes(), &defaults, Some((80, 24))).unwrap();
    assert_eq!(parsed.workload.uid, 7);
    assert_eq!(parsed.workload.rlimits.len(), 1);
    assert_eq!(parsed.workload.terminal, None);
    assert!(parsed.workload.capabilities.bounding().is_some());
    assert!(parsed.workload.seccomp.is_some());
    assert!(!parsed.workload.make_cwd);
    let process: Process = serde_json::from_slice(&parsed.process).unwrap();
    assert_eq!(process.no_new_privileges(), Some(true));
}

#[test]
fn only_a_terminal_has_a_size() {
    for terminal in [true, false] {
        let spec = with("/process", "terminal", json!(terminal)).to_string();
        let parsed = container(&id(), spec.as_bytes(), Some((80, 24))).unwrap();
        let expected = terminal.then_some(Terminal {
            owner: Some(1000),
            size: Some((80, 24)),
        });
        assert_eq!(parsed.workload.terminal, expected);
    }
}

#[test]
fn users_of_a_user_namespace_are_others_outside() {
    let mut spec = minimal();
    assert_eq!(parse(&spec).unwrap().defaults.outside(7), Some(7));
    spec["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "user"}));
    spec["linux"]["uidMappings"] = json!([
        {"containerID": 0, "hostID": 1000, "size": 10},
        {"containerID": 50, "hostID": 4_294_967_290_u32, "size": 10},
    ]);
    let defaults = parse(&spec).unwrap().defaults;
    assert!(defaults.maps_users());
    assert_eq!(defaults.outside(0), Some(1000));
    assert_eq!(defaults.outside(9), Some(1009));
    assert_eq!(defaults.outside(10), None);
    assert_eq!(defaults.outside(51), Some(4_294_967_291));
    assert_eq!(defaults.outside(59), None);
}

#[test]
fn a_spec_without_its_parts_is_refused() {
    refused(&json!({"ociVersion": "1.0.2"}), "root is missing");
    for part in ["process", "root", "linux"] {
        let mut spec = minimal();
        spec.as_object_mut().unwrap().remove(part);
        refused(&spec, &format!("{part} is missing"));
    }
}

#[test]
fn bytes_that_are_no_spec_are_refused() {
    for bytes in [
        &b""[..],
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"{\"ociVersion\":1}",
    ] {
        assert!(matches!(
            container(&id(), bytes, None),
            Err(Error::Invalid { .. })
        ));
        let defaults = parse(&minimal()).unwrap().defaults;
        assert!(matches!(
            exec(bytes, &defaults, None),
            Err(Error::Invalid { .. })
        ));
    }
}

#[test]
fn a_process_that_cannot_be_executed_is_refused() {
    refused(&with("/process", "args", json!([])), "args is empty");
    refused(&with("/process", "args", json!([""])), "args is empty");
    refused(&with("/process", "args", json!(["a\0b"])), "NUL");
    refused(&with("/process", "env", json!(["A=\0"])), "NUL");
    refused(&with("/process", "env", json!(["NOVALUE"])), "NAME=value");
    refused(&with("/process", "env", json!(["=x"])), "NAME=value");
    refused(
        &with("/process", "cwd", json!("relative/path")),
        "not absolute",
    );
}

#[test]
fn an_empty_working_directory_is_the_root() {
    let parsed = parse(&with("/process", "cwd", json!(""))).unwrap();
    assert_eq!(parsed.workload.cwd, Path::new("/"));
}

#[test]
fn a_spec_that_would_mount_into_the_agents_namespace_is_refused() {
    refused(
        &with("/linux", "namespaces", json!([{"type": "pid"}])),
        "mount namespace",
    );
}

#[test]
fn an_empty_namespace_path_means_a_new_namespace() {
    let spaces = json!([{"type": "mount", "path": ""}, {"type": "network", "path": ""}]);
    let parsed = parse(&with("/linux", "namespaces", spaces)).unwrap();
    assert!(parsed.workload.new_network);
    let config: Spec = serde_json::from_slice(&parsed.config).unwrap();
    let linux = config.linux().as_ref().unwrap();
    assert!(
        linux
            .namespaces()
            .as_ref()
            .unwrap()
            .iter()
            .all(|n| n.path().is_none())
    );
}

#[test]
fn cgroup_paths_stay_below_the_hierarchys_root() {
    for (given, expected) in [
        ("", "/cloison/c1"),
        ("/docker/abc", "/docker/abc"),
        ("kubepods/x", "/kubepods/x"),
        ("//a/./b", "/a/b"),
        ("system.slice:docker:abc", "/system.slice:docker:abc"),
    ] {
        let parsed = parse(&with("/linux", "cgroupsPath", json!(given))).unwrap();
        assert_eq!(parsed.cgroup, Path::new(expected));
    }
    for path in ["/", ".", "//"] {
        refused(&with("/linux", "cgroupsPath", json!(path)), "root");
    }
    for path in ["..", "/a/../../b"] {
        refused(&with("/linux", "cgroupsPath", json!(path)), "..");
    }
}

#[test]
fn hooks_of_the_host_are_refused_and_the_containers_are_kept() {
    for name in ["prestart", "createRuntime", "poststart", "poststop"] {
        let mut spec = minimal();
        spec["hooks"] = json!({name: [{"path": "/bin/true"}]});
        refused(&spec, name);
        spec["hooks"] = json!({name: []});
        assert!(parse(&spec).is_ok());
    }
    let mut spec = minimal();
    spec["hooks"] = json!({"createContainer": [{"path": "/bin/true"}]});
    assert!(parse(&spec).is_ok());
}

#[test]
fn seccomp_notification_is_refused() {
    let by_default = json!({"defaultAction": "SCMP_ACT_NOTIFY"});
    refused(&with("/linux", "seccomp", by_default), "SCMP_ACT_NOTIFY");
    let by_rule = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}],
    });
    refused(&with("/linux", "seccomp", by_rule), "SCMP_ACT_NOTIFY");
}

#[test]
fn swap_limits_are_dropped_in_a_guest_without_swap() {
    let json = br#"{"memory": {"limit": 1048576, "swap": 2097152}}"#;
    let (parsed, _) = resources(json).unwrap();
    let memory = parsed.memory().unwrap();
    assert_eq!((memory.limit(), memory.swap()), (Some(1_048_576), None));
}

#[test]
fn a_memory_limit_of_minus_one_means_none() {
    let (parsed, _) = resources(br#"{"memory": {"limit": -1, "swap": -1}}"#).unwrap();
    assert_eq!(parsed.memory().unwrap().limit(), None);
    assert_eq!(parsed.unified().as_ref().unwrap()["memory.max"], "max");
}

#[test]
fn rules_for_devices_are_kept_from_libcontainer() {
    let json = br#"{"devices": [{"allow": true, "access": "rwm"}]}"#;
    let (parsed, rules) = resources(json).unwrap();
    assert_eq!((parsed.devices(), rules.len()), (&None, 1));
    let (_, rules) = resources(br#"{"pids": {"limit": 5}}"#).unwrap();
    assert!(rules.is_empty());
}

#[test]
fn resources_that_cgroup_v2_cannot_give_are_refused() {
    for json in [
        &br#"{"memory": {"disableOOMKiller": true}}"#[..],
        br#"{"rdma": {"mlx5_1": {"hcaHandles": 3}}}"#,
        br#"{"memory": 5}"#,
        b"",
    ] {
        assert!(matches!(resources(json), Err(Error::Invalid { .. })));
    }
}

#[test]
fn the_propagation_of_mounts_is_the_last_steps_business() {
    let mount = |options: Value| json!([{"destination": "/m", "type": "bind", "source": "/s", "options": options}]);
    let of = |options| {
        parse(&with("", "mounts", mount(options)))
            .unwrap()
            .workload
            .mount_changes
    };
    let place = PathBuf::from("/m");
    assert_eq!(
        of(json!(["rbind", "rshared"])),
        [(place.clone(), libc::MS_SHARED | libc::MS_REC)]
    );
    assert_eq!(of(json!(["unbindable"])), [(place, libc::MS_UNBINDABLE)]);
    assert_eq!(of(json!(["rbind", "rprivate", "rslave", "ro"])), []);
}

#[test]
fn a_read_only_dev_becomes_so_when_all_is_in_it() {
    let of = |kind: &str, options: Value| {
        let dev =
            json!([{"destination": "/dev", "type": kind, "source": "/s", "options": options}]);
        let spec = parse(&with("", "mounts", dev)).unwrap();
        spec.workload.mount_changes
    };
    let flags = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY | libc::MS_NOSUID;
    assert_eq!(
        of("tmpfs", json!(["nosuid", "mode=755", "ro"])),
        [(PathBuf::from("/dev"), flags)]
    );
    assert_eq!(of("tmpfs", json!(["nosuid"])), []);
    assert_eq!(of("bind", json!(["rbind", "ro"])), []);
}

#[test]
fn shared_memory_is_what_is_bound_to_it() {
    let mounted = |mount: Value| {
        let spec = with("", "mounts", json!([mount]));
        parse(&spec).unwrap().shared_memory
    };
    let bound =
        json!({ "destination": "/dev/shm", "source": "/s", "options": ["nosuid", "rbind"] });
    assert_eq!(mounted(bound), Some(PathBuf::from("/s")));
    let own = json!({ "destination": "/dev/shm", "type": "tmpfs", "source": "shm" });
    assert_eq!(mounted(own), None);
    let other = json!({ "destination": "/x", "source": "/s", "options": ["bind"] });
    assert_eq!(mounted(other), None);
}

#[test]
fn the_cgroup_of_an_exec_stays_below_the_containers() {
    let below = |path| cgroup_below(Path::new("/cloison/c1"), path);
    assert_eq!(
        below("own/deep").unwrap(),
        Path::new("/cloison/c1/own/deep")
    );
    for path in ["../c2", "own/../../c2", "/c2", ".", "a\0b"] {
        assert!(below(path).is_err(), "{path:?}");
    }
}

#[test]
fn a_tmpfs_that_is_filled_first_is_read_only_afterwards() {
    let mounts = json!([
        { "destination": "/a", "type": "tmpfs", "options": ["ro", "nosuid", "tmpcopyup"] },
        { "destination": "/b", "type": "tmpfs", "options": ["ro"] },
    ]);
    let spec = parse(&with("", "mounts", mounts)).unwrap();
    let copied = CopyUp {
        root: "/run/cloison/shared/rootfs".into(),
        place: "/a".into(),
    };
    assert_eq!(spec.workload.copy_up, [copied]);
    let flags = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY | libc::MS_NOSUID;
    assert_eq!(spec.workload.mount_changes, [("/a".into(), flags)]);
    let config: Value = serde_json::from_slice(&spec.config).unwrap();
    assert_eq!(config["mounts"][0]["options"], json!(["nosuid"]));
    assert_eq!(config["mounts"][1]["options"], json!(["ro"]));
}

#[test]
fn hooks_that_run_in_the_container_are_the_agents() {
    let mut spec = minimal();
    spec["annotations"] = json!({"a": "b"});
    spec["hooks"] = json!({
        "createContainer": [{"path": "/bin/early"}],
        "startContainer": [{"path": "/bin/late", "timeout": 5}],
    });
    let parsed = parse(&spec).unwrap();
    let start = parsed.workload.start.unwrap();
    assert_eq!(start.hooks[0].path(), Path::new("/bin/late"));
    assert_eq!(
        (start.container_id.as_str(), &start.annotations["a"]),
        ("c1", &"b".to_owned())
    );
    let config: Spec = serde_json::from_slice(&parsed.config).unwrap();
    let left = config.hooks().as_ref().unwrap();
    assert_eq!(left.start_container(), &None);
    assert!(left.create_container().is_some());

    spec["hooks"] = json!({"startContainer": []});
    assert!(parse(&spec).unwrap().workload.start.is_none());
    spec["hooks"] = json!({"startContainer": [{}]});
    assert!(parse(&spec).is_err());
}
