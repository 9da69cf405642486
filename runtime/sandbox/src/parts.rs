//! The parts of a VM that are files of the host: the guest kernel, the initial ramfs, QEMU.

use std::env;
use std::path::{Path, PathBuf};

use crate::Error;

/// Where an installation keeps the guest's files, in order of preference, after the directory of the executable.
const LIBRARY_DIRS: [&str; 2] = ["/usr/local/lib/cloison", "/usr/lib/cloison"];
/// QEMU's name in PATH.
const QEMU: &str = "qemu-system-x86_64";

/// What somebody has said about the parts; whatever is left out is looked for where an installation has it.
#[derive(Debug, Clone, Default)]
pub struct Parts {
    /// The guest kernel.
    pub kernel: Option<PathBuf>,
    /// The guest's initial ramfs.
    pub initramfs: Option<PathBuf>,
    /// QEMU.
    pub qemu: Option<PathBuf>,
}

impl Parts {
    /// As the environment has them: `CLOISON_KERNEL`, `CLOISON_INITRAMFS`, `CLOISON_QEMU`.
    pub fn from_env() -> Self {
        let path = |name| env::var_os(name).map(PathBuf::from);
        Self {
            kernel: path("CLOISON_KERNEL"),
            initramfs: path("CLOISON_INITRAMFS"),
            qemu: path("CLOISON_QEMU"),
        }
    }

    /// The guest kernel.
    ///
    /// # Errors
    /// When there is none.
    pub fn kernel(&self) -> Result<PathBuf, Error> {
        find("guest kernel", "vmlinux", self.kernel.as_deref())
    }

    /// The guest's initial ramfs.
    ///
    /// # Errors
    /// When there is none.
    pub fn initramfs(&self) -> Result<PathBuf, Error> {
        find(
            "guest's initial ramfs",
            "initramfs",
            self.initramfs.as_deref(),
        )
    }

    /// QEMU: the one asked for, or the one in PATH. Whether it exists is for its start to say, since not every engine needs it.
    pub fn qemu(&self) -> PathBuf {
        let given = self.qemu.clone();
        given
            .or_else(|| in_path(QEMU))
            .unwrap_or_else(|| QEMU.into())
    }
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

fn find(what: &'static str, name: &'static str, given: Option<&Path>) -> Result<PathBuf, Error> {
    if let Some(file) = given {
        if !file.is_file() {
            return Err(Error::NoPart {
                what,
                path: file.to_owned(),
            });
        }
        return std::path::absolute(file).map_err(Error::path("find", file));
    }
    // /proc/self/exe leads through any link by which we were called to where the file itself is.
    let executable = env::current_exe().map_err(Error::system("find this program's own file"))?;
    let beside = executable.parent().map(Path::to_owned);
    let places: Vec<PathBuf> = beside
        .into_iter()
        .chain(LIBRARY_DIRS.map(PathBuf::from))
        .collect();
    let found = places
        .iter()
        .map(|dir| dir.join(name))
        .find(|file| file.is_file());
    found.ok_or_else(|| Error::PartNotFound {
        what,
        name,
        places: places
            .iter()
            .map(|place| place.display().to_string())
            .collect::<Vec<_>>()
            .join(", "),
    })
}
