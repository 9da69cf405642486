//! The parts of a VM that are files of the host: the guest kernel, the initial ramfs, QEMU.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::args::Global;

/// Where an installation keeps the guest's files, in order of preference, after the directory of the executable.
const LIBRARY_DIRS: [&str; 2] = ["/usr/local/lib/cloison", "/usr/lib/cloison"];
/// QEMU's name in PATH.
const QEMU: &str = "qemu-system-x86_64";

/// The guest kernel.
///
/// # Errors
/// When there is none.
pub fn kernel(global: &Global) -> Result<PathBuf> {
    find(
        "guest kernel",
        "vmlinux",
        "--kernel",
        global.kernel.as_deref(),
    )
}

/// The guest's initial ramfs.
///
/// # Errors
/// When there is none.
pub fn initramfs(global: &Global) -> Result<PathBuf> {
    find(
        "guest's initial ramfs",
        "initramfs",
        "--initramfs",
        global.initramfs.as_deref(),
    )
}

/// QEMU: the one asked for, or the one in PATH. Whether it exists is for its start to say, since not every engine needs it.
pub fn qemu(global: &Global) -> PathBuf {
    let given = global.qemu.clone();
    given
        .or_else(|| in_path(QEMU))
        .unwrap_or_else(|| QEMU.into())
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

fn find(what: &str, name: &str, flag: &str, given: Option<&Path>) -> Result<PathBuf> {
    if let Some(file) = given {
        if !file.is_file() {
            bail!(
                "the {what} {} does not exist: {flag} names it",
                file.display()
            );
        }
        return std::path::absolute(file)
            .with_context(|| format!("cannot find the {what} {}", file.display()));
    }
    // /proc/self/exe leads through any link by which we were called to where the file itself is.
    let executable = env::current_exe().context("cannot find this program's own file")?;
    let beside = executable.parent().map(Path::to_owned);
    let places: Vec<PathBuf> = beside
        .into_iter()
        .chain(LIBRARY_DIRS.map(PathBuf::from))
        .collect();
    match places
        .iter()
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
    {
        Some(file) => Ok(file),
        None => bail!(
            "cannot find the {what}: there is no file \"{name}\" in {}; build it with \"make build\" or name it with {flag}",
            places
                .iter()
                .map(|p| p.display().to_string())
                .collect::<Vec<_>>()
                .join(", ")
        ),
    }
}
