//! Releases of docker and podman: this machine's, and newer ones, each in a root file system of its own (`tests/trees`) in which a first process
//! is started.

use std::fs;
use std::path::Path;
use std::process::{Child, Command};

use crate::host::{dist, tree};

/// Whose docker or podman it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// This machine's.
    Host,
    /// That of a tree.
    Tree(&'static str),
}

/// Makes the root file system of a tree, with the directories that are named after it, the calling process's own, and runs a command there.
/// A plain chroot will not do: dockerd remounts `/`.
const IN_TREE: &str = r#"
    set -e
    tree=$1 work=$2 dist=$3 parts=$4
    shift 4
    mount -t overlay overlay -o "lowerdir=$tree,upperdir=$work/upper,workdir=$work/work" "$work/root"
    cd "$work/root"
    mount -t proc proc proc
    mount --rbind /dev dev
    mount --rbind /sys sys
    if [ ! -e /sys/fs/cgroup/cgroup.controllers ]; then
        # podman takes a directory without a controller for one.
        mount -t tmpfs tmpfs sys/fs/cgroup
        for hierarchy in /sys/fs/cgroup/*/; do
            mountpoint -q "$hierarchy" || continue
            mkdir ".$hierarchy"
            mount --bind "$hierarchy" ".$hierarchy"
        done
    fi
    mount -t tmpfs tmpfs run
    mount -t tmpfs tmpfs tmp
    for shared in "$(dirname "$work")" "$dist" "$parts"; do
        mkdir -p ".$shared"
        mount --bind "$shared" ".$shared"
    done
    mkdir -p .old
    pivot_root . .old
    cd /
    umount -l .old
    ip link set lo up
    exec "$@"
"#;

/// A command that runs another, given as its further arguments, as the first process of a tree. It sees `dir`, and the product, where they are
/// outside. Its QEMU is another one, and so would be the templates of the tests' data directory: it needs one of its own.
pub fn in_tree(dir: &Path, name: &str) -> Command {
    let tree_dir = dir.join("tree");
    for part in ["upper", "work", "root"] {
        fs::create_dir_all(tree_dir.join(part)).unwrap();
    }
    let dist = dist();
    let parts = fs::canonicalize(dist.join("vmlinux")).unwrap();
    let mut command = Command::new("unshare");
    command.args(["--net", "--mount", "--pid", "--fork", "--kill-child"]);
    command.args(["sh", "-c", IN_TREE, "sh"]);
    command.arg(tree(name)).arg(tree_dir);
    command.arg(&dist).arg(parts.parent().unwrap());
    command
}

/// The only child of one of ours.
pub fn child_of(process: &Child) -> i32 {
    let parent = process.id();
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"));
    children.unwrap().trim().parse().unwrap()
}
