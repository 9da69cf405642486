//! Where templates are kept: one file for each kind of guest in a directory, under a name that says what the guest was made from. A file
//! gets its name when it is whole, and before that it has none, so that nothing has to be cleaned up after a process that died.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::libc;
use nix::unistd::linkat;
use sha2::{Digest, Sha256};

use super::command::{Inherited, Start, arguments};
use crate::spec::VmSpec;

/// The most templates that are kept, some 50 MiB each; beyond that the least recently used goes.
const MAX_TEMPLATES: usize = 4;

/// The place of one VM's template.
pub(super) struct Store {
    dir: PathBuf,
    name: String,
}

impl Store {
    /// The place of the template of a VM like `spec`, in `dir`, which need not exist.
    pub(super) fn new(dir: &Path, spec: &VmSpec) -> io::Result<Self> {
        Ok(Self {
            dir: dir.to_owned(),
            name: name(spec)?,
        })
    }

    fn path(&self) -> PathBuf {
        self.dir.join(&self.name)
    }

    /// Opens the template, if there is one, and notes that it is used.
    pub(super) fn find(&self) -> io::Result<Option<File>> {
        let file = match File::open(self.path()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        file.set_modified(SystemTime::now())?;
        Ok(Some(file))
    }

    /// Removes a template that is of no use.
    pub(super) fn discard(&self) -> io::Result<()> {
        fs::remove_file(self.path())
    }

    /// Makes a file without a name for a template that will be written later.
    pub(super) fn stage(&self) -> io::Result<Staged> {
        // Whoever reads guest memory knows the seeds of random numbers to come.
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)?;
        let file = OpenOptions::new()
            .write(true)
            .mode(0o600)
            .custom_flags(libc::O_TMPFILE)
            .open(&self.dir)?;
        let dir = File::open(&self.dir)?;
        Ok(Staged {
            file,
            dir,
            name: self.name.clone(),
        })
    }
}

/// A template's file on its way.
pub(super) struct Staged {
    pub(super) file: File,
    dir: File,
    name: String,
}

impl Staged {
    /// Gives the file its name, unless another process was faster, and removes templates beyond the limit. Nothing is forced onto the
    /// disk: after a crash of the host no template is of use.
    pub(super) fn keep(self) -> io::Result<()> {
        let unnamed = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let flags = AtFlags::AT_SYMLINK_FOLLOW;
        match linkat(
            AT_FDCWD,
            unnamed.as_str(),
            &self.dir,
            self.name.as_str(),
            flags,
        ) {
            Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        evict(Path::new(&format!(
            "/proc/self/fd/{}",
            self.dir.as_raw_fd()
        )))
    }
}

fn evict(dir: &Path) -> io::Result<()> {
    let entries = fs::read_dir(dir)?.map(|entry| {
        let entry = entry?;
        Ok((entry.metadata()?.modified()?, entry.path()))
    });
    // One that another process has just removed is one less.
    let mut templates: Vec<_> = entries.filter_map(io::Result::ok).collect();
    templates.sort();
    let surplus = templates.len().saturating_sub(MAX_TEMPLATES);
    for (_, path) in templates.iter().take(surplus) {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// A digest of all that the guest's state at its template depends on: this boot of the host, whose processor and clock the guest has
/// taken the measure of; the programs and files by their identity and last change; and QEMU's command line.
fn name(spec: &VmSpec) -> io::Result<String> {
    let mut digest = Sha256::new();
    digest.update(fs::read("/proc/sys/kernel/random/boot_id")?);
    let files = [
        Path::new("/proc/self/exe"),
        &spec.qemu,
        &spec.kernel,
        &spec.initramfs,
    ];
    for file in files {
        let file = fs::metadata(file)?;
        digest.update(file.dev().to_le_bytes());
        digest.update(file.ino().to_le_bytes());
        digest.update(file.size().to_le_bytes());
        for time in [
            file.mtime(),
            file.mtime_nsec(),
            file.ctime(),
            file.ctime_nsec(),
        ] {
            digest.update(time.to_le_bytes());
        }
    }
    let anyone = VmSpec {
        id: String::new(),
        ..spec.clone()
    };
    for word in arguments(&anyone, &Inherited::default(), Start::Save, None) {
        digest.update(word.as_bytes());
        digest.update([0]);
    }
    Ok(format!("{:x}", digest.finalize()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::spec::tests::spec;

    /// A VM made from files of its own.
    fn vm(dir: &Path) -> VmSpec {
        let file = |name: &str| {
            let path = dir.join(name);
            fs::write(&path, name).unwrap();
            path
        };
        VmSpec {
            kernel: file("kernel"),
            initramfs: file("initramfs"),
            qemu: file("qemu"),
            ..spec()
        }
    }

    fn keep(dir: &Path, spec: &VmSpec, text: &str) {
        let mut staged = Store::new(dir, spec).unwrap().stage().unwrap();
        staged.file.write_all(text.as_bytes()).unwrap();
        staged.keep().unwrap();
    }

    fn found(dir: &Path, spec: &VmSpec) -> bool {
        Store::new(dir, spec).unwrap().find().unwrap().is_some()
    }

    #[test]
    fn a_template_is_found_by_vms_of_its_kind_alone() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().join("templates");
        let spec = vm(temporary.path());
        assert!(!found(&dir, &spec));
        keep(&dir, &spec, "whole");
        let other_id = VmSpec {
            id: "another".into(),
            ..spec.clone()
        };
        assert!(found(&dir, &other_id));
        let memory = VmSpec {
            memory_mib: spec.memory_mib + 1,
            max_memory_mib: spec.memory_mib + 1,
            ..spec.clone()
        };
        let vcpus = VmSpec {
            vcpus: 2,
            max_vcpus: 2,
            ..spec.clone()
        };
        let cmdline = VmSpec {
            cmdline: "more".into(),
            ..spec.clone()
        };
        for other in [memory, vcpus, cmdline] {
            assert!(!found(&dir, &other), "{other:?}");
        }
        fs::write(&spec.kernel, "kernel of another release").unwrap();
        assert!(!found(&dir, &spec));
    }

    #[test]
    fn a_template_that_is_not_kept_leaves_nothing() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().join("templates");
        let spec = vm(temporary.path());
        drop(Store::new(&dir, &spec).unwrap().stage().unwrap());
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    }

    #[test]
    fn the_first_of_two_that_are_made_at_once_stays() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().join("templates");
        let spec = vm(temporary.path());
        keep(&dir, &spec, "first");
        keep(&dir, &spec, "second");
        let store = Store::new(&dir, &spec).unwrap();
        assert_eq!(fs::read_to_string(store.path()).unwrap(), "first");
        store.discard().unwrap();
        assert!(!found(&dir, &spec));
    }

    #[test]
    fn the_least_recently_used_go_first() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().join("templates");
        let vm = vm(temporary.path());
        let of = |memory_mib| VmSpec {
            memory_mib,
            ..vm.clone()
        };
        let sizes = 100..100 + MAX_TEMPLATES as u32;
        sizes
            .clone()
            .for_each(|memory| keep(&dir, &of(memory), "template"));
        assert!(found(&dir, &of(100)));
        keep(&dir, &of(99), "template");
        assert_eq!(fs::read_dir(&dir).unwrap().count(), MAX_TEMPLATES);
        assert!(found(&dir, &of(100)) && found(&dir, &of(99)));
        assert!(!found(&dir, &of(101)));
    }
}
