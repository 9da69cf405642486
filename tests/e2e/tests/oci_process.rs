//! What keeps a container's process from going on, as runc has it: a freezer that is in the way.

use std::fs;
use std::path::{Path, PathBuf};

use crate::host::{fail, succeed};
use crate::oci::Bundle;

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
