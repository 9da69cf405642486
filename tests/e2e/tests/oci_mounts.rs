//! What a container of `cloison-runtime` has mounted: as its spec says, for itself and for whoever enters its mount namespace.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::host::{emulated, fail, succeed, text};
use crate::oci::Bundle;

#[test]
fn mounts_of_the_host_reach_the_guest_as_they_were_meant() {
    let bundle = Bundle::shell(
        "cat /a/file /b; echo new > /a/written; echo x > /ro/file; touch /scratch/x && df -m /scratch | tail -n 1 | awk '{ print $2 }'",
    );
    let dir = bundle.host.path("shared");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("file"), "in the directory\n").unwrap();
    let bundle = bundle.with(|config| {
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.push(json!({ "destination": "/a", "type": "bind", "source": dir, "options": ["rbind", "rprivate"] }));
        mounts.push(json!({ "destination": "/b", "type": "none", "source": dir.join("file"), "options": ["bind", "ro"] }));
        mounts.push(json!({ "destination": "/ro", "type": "bind", "source": dir, "options": ["rbind", "rro"] }));
        mounts.push(json!({ "destination": "/scratch", "type": "tmpfs", "source": "tmpfs", "options": ["size=3m", "tmpcopyup"] }));
    });
    let output = bundle.output();
    assert_eq!(
        text(&output.stdout),
        "in the directory\nin the directory\n3\n",
        "{}{}",
        text(&output.stderr),
        bundle.log()
    );
    assert!(text(&output.stderr).contains("Read-only file system"));
    assert_eq!(fs::read_to_string(dir.join("written")).unwrap(), "new\n");
    assert_eq!(
        fs::read_to_string(dir.join("file")).unwrap(),
        "in the directory\n"
    );
}

#[test]
fn a_tmpfs_can_begin_with_what_it_covers() {
    let script = "cd /data && stat -c '%n %a %u:%g %h' . file sub sub/again && readlink sub/link && cat file vol/own
        echo more >sub/new && cat sub/new; touch /fixed/new; cat /fixed/file; df /fixed | tail -n 1 | cut -d ' ' -f 1";
    let bundle = Bundle::shell(script);
    let (data, fixed) = (
        bundle.dir().join("rootfs/data"),
        bundle.dir().join("rootfs/fixed"),
    );
    fs::create_dir_all(data.join("sub")).unwrap();
    fs::create_dir_all(data.join("vol")).unwrap();
    fs::create_dir(&fixed).unwrap();
    fs::write(fixed.join("file"), "fixed\n").unwrap();
    fs::write(data.join("file"), "of the image\n").unwrap();
    fs::write(data.join("vol/own"), "covered\n").unwrap();
    fs::hard_link(data.join("file"), data.join("sub/again")).unwrap();
    symlink("../file", data.join("sub/link")).unwrap();
    chown(data.join("file"), Some(1000), Some(2000)).unwrap();
    chown(data.join("sub"), Some(1), Some(2)).unwrap();
    for (name, mode) in [("file", 0o4714), ("sub", 0o1777), ("", 0o750)] {
        fs::set_permissions(data.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    let volume = bundle.host.path("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("own"), "of the volume\n").unwrap();
    let bundle = bundle.with(|config| {
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.push(json!({ "destination": "/data", "type": "tmpfs", "source": "tmpfs", "options": ["size=3m", "mode=700", "tmpcopyup"] }));
        mounts.push(json!({ "destination": "/data/vol", "type": "bind", "source": volume, "options": ["rbind"] }));
        mounts.push(json!({ "destination": "/fixed", "type": "tmpfs", "source": "tmpfs", "options": ["ro", "tmpcopyup"] }));
    });
    let output = bundle.output();
    assert_eq!(
        text(&output.stdout),
        ". 750 0:0 4\nfile 4714 1000:2000 2\nsub 1777 1:2 2\nsub/again 4714 1000:2000 2\n../file\nof the image\nof the volume\nmore\nfixed\ntmpfs\n",
        "{}{}",
        text(&output.stderr),
        bundle.log()
    );
    assert!(text(&output.stderr).contains("Read-only file system"));
    assert!(!data.join("sub/new").exists());
    // What does not fit is an error that names the place.
    fs::write(data.join("large"), vec![1; 4 << 20]).unwrap();
    succeed(&bundle.run(&["delete", "--force", "one"]));
    fail(&bundle.output(), 1, &["tmpfs at /data", "No space left"]);
}

#[test]
fn the_files_of_a_mount_can_belong_to_others() {
    let script = "stat -c '%n %u:%g' /data/* /below/sub/file; echo x >/data/new && stat -c %u:%g /data/new; mkdir /data/dir; stat -c %u /data";
    let bundle = Bundle::shell(script);
    let (data, below) = (bundle.host.path("data"), bundle.host.path("below"));
    for dir in [&data, &below] {
        fs::create_dir_all(dir.join("sub")).unwrap();
        fs::write(dir.join("sub/file"), "").unwrap();
        fs::set_permissions(dir, fs::Permissions::from_mode(0o777)).unwrap();
    }
    for (name, owner) in [("a", 0), ("b", 5), ("outside", 50)] {
        fs::write(data.join(name), "").unwrap();
        chown(data.join(name), Some(owner), Some(owner + 1)).unwrap();
    }
    let ranges = json!([{ "containerID": 0, "hostID": 1000, "size": 10 }]);
    let bundle = bundle.with(|config| {
        config["process"]["user"] = json!({ "uid": 1003, "gid": 1004 });
        let mounts = config["mounts"].as_array_mut().unwrap();
        for (place, source, word) in [("/data", &data, "idmap"), ("/below", &below, "ridmap")] {
            mounts.push(json!({
                "destination": place, "type": "bind", "source": source, "options": ["rbind", word],
                "uidMappings": ranges, "gidMappings": ranges,
            }));
        }
    });
    let output = bundle.output();
    if text(&output.stderr).contains("cannot be ID-mapped on this host") {
        // tmpfs can since Linux 6.3. It is the host that says so.
        assert!(text(&output.stderr).contains("the IDs of") && emulated());
        return;
    }
    assert_eq!(
        text(&output.stdout),
        "/data/a 1000:1001\n/data/b 1005:1006\n/data/outside 65534:65534\n/data/sub 1000:1000\n/below/sub/file 1000:1000\n1003:1004\n1000\n",
        "{}{}",
        text(&output.stderr),
        bundle.log()
    );
    for name in ["new", "dir"] {
        let made = fs::metadata(data.join(name)).unwrap();
        assert_eq!((made.uid(), made.gid()), (3, 4), "{name}");
    }
    // proc has no such mounts, on any host.
    succeed(&bundle.run(&["delete", "--force", "one"]));
    let bundle = bundle.with(|config| {
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.push(json!({
            "destination": "/p", "type": "bind", "source": "/proc", "options": ["bind", "idmap"],
            "uidMappings": ranges, "gidMappings": ranges,
        }));
    });
    fail(&bundle.output(), 1, &["/proc", "cannot be ID-mapped"]);
    // Two of one ID.
    let twice = json!([{ "containerID": 0, "hostID": 5, "size": 9 }, { "containerID": 0, "hostID": 90, "size": 1 }]);
    let bundle = bundle.with(|config| {
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.pop();
        mounts.last_mut().unwrap()["uidMappings"] = twice;
    });
    fail(&bundle.output(), 1, &["map the IDs"]);
}

#[test]
fn the_mount_namespace_of_the_pid_has_the_containers_files_and_nothing_of_the_host() {
    let bundle = Bundle::shell("echo made >/made; exec tail -f /dev/null");
    let volume = bundle.host.path("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("file"), "of the host\n").unwrap();
    let bundle = bundle.with(|config| {
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.push(json!({ "destination": "/v", "type": "bind", "source": volume, "options": ["rbind", "ro"] }));
    });
    let pid = bundle.create_and_start();
    let until_made = ["exec", "one", "sh", "-c", "until [ -s /made ]; do :; done"];
    succeed(&bundle.run(&until_made));
    // Of the first thread, whose namespaces are those of the pid.
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let identity = |path: &Path| fs::metadata(path).map(|found| found.ino()).unwrap();
    assert_eq!(identity(&root), identity(&bundle.dir().join("rootfs")));
    let read = |name: &str| fs::read_to_string(root.join(name)).unwrap();
    assert_eq!(
        (read("made").as_str(), read("v/file").as_str()),
        ("made\n", "of the host\n")
    );
    let list = |name: &str| fs::read_dir(root.join(name)).unwrap().count();
    assert_eq!((list("proc"), list("dev")), (0, 0));
    for place in ["v/new", "proc/new", "dev/new"] {
        let error = fs::write(root.join(place), "").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ReadOnlyFilesystem, "{place}");
    }
    fs::write(root.join("given"), "given\n").unwrap();
    let until_given = "until cat /given 2>/dev/null; do :; done";
    let given = bundle.run(&["exec", "one", "sh", "-c", until_given]);
    assert_eq!(succeed(&given), "given\n");
    succeed(&bundle.run(&["delete", "--force", "one"]));
}
