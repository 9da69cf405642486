//! Where templates are kept: one file for each kind of guest in a directory, under a name that says what the guest was made from. A file
//! gets its name when it is whole, and before that it has none, so that nothing has to be cleaned up after a process that died.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::fcntl::{AT_FDCWD, AtFlags, Flock, FlockArg};
use nix::libc;
use nix::unistd::linkat;
use sha2::{Digest, Sha256};

use super::Kind;

/// The most templates that are kept, some 35 to 55 MiB each; beyond that the least recently used goes.
const MAX_TEMPLATES: usize = 8;

/// The place of one VM's template.
pub(super) struct Store {
    dir: PathBuf,
    name: String,
}

impl Store {
    /// The place of the template of VMs of this kind, in `dir`, which need not exist.
    pub(super) fn new(dir: &Path, kind: &Kind<'_>) -> io::Result<Self> {
        Ok(Self {
            dir: dir.to_owned(),
            name: name(kind)?,
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

    fn given_up(&self) -> PathBuf {
        self.dir.join(format!("{}.none", self.name))
    }

    /// Notes that there is to be no template, and removes it.
    pub(super) fn give_up(&self) -> io::Result<()> {
        File::create(self.given_up())?;
        self.discard()
    }

    /// Whether that has been noted.
    pub(super) fn is_given_up(&self) -> bool {
        self.given_up().exists()
    }

    /// Makes a file without a name for a template that will be written later.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] while another process makes a template: of many that are started at once one makes it.
    pub(super) fn stage(&self) -> io::Result<Staged> {
        // Whoever reads guest memory knows the seeds of random numbers to come.
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)?;
        let dir = File::open(&self.dir)?;
        let dir = Flock::lock(dir, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno)?;
        let file = OpenOptions::new()
            .write(true)
            .mode(0o600)
            .custom_flags(libc::O_TMPFILE)
            .open(&self.dir)?;
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
    dir: Flock<File>,
    name: String,
}

impl Staged {
    /// Gives the file its name, unless it is there already, and removes templates beyond the limit. Nothing is forced onto the
    /// disk: after a crash of the host no template is of use.
    pub(super) fn keep(self) -> io::Result<()> {
        let unnamed = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let flags = AtFlags::AT_SYMLINK_FOLLOW;
        match linkat(
            AT_FDCWD,
            unnamed.as_str(),
            &*self.dir,
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

/// A digest of the kind, this program, and this boot of the host.
fn name(kind: &Kind<'_>) -> io::Result<String> {
    let mut digest = Sha256::new();
    digest.update(fs::read("/proc/sys/kernel/random/boot_id")?);
    let program = Path::new("/proc/self/exe");
    for file in std::iter::once(&program).chain(&kind.files) {
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
    for word in &kind.words {
        digest.update(word.as_bytes());
        digest.update([0]);
    }
    Ok(format!("{:x}", digest.finalize()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// VMs that are made from a file.
    fn kind<'a>(file: &'a Path, words: &[&str]) -> Kind<'a> {
        Kind {
            files: vec![file],
            words: words.iter().map(Into::into).collect(),
        }
    }

    fn keep(dir: &Path, kind: &Kind<'_>, text: &str) {
        let mut staged = Store::new(dir, kind).unwrap().stage().unwrap();
        staged.file.write_all(text.as_bytes()).unwrap();
        staged.keep().unwrap();
    }

    fn found(dir: &Path, kind: &Kind<'_>) -> bool {
        Store::new(dir, kind).unwrap().find().unwrap().is_some()
    }

    /// A directory for templates that is yet to be made, and a file.
    fn places() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let temporary = tempfile::tempdir().unwrap();
        let file = temporary.path().join("kernel");
        fs::write(&file, "kernel").unwrap();
        let dir = temporary.path().join("templates");
        (temporary, dir, file)
    }

    #[test]
    fn a_template_is_found_by_vms_of_its_kind_alone() {
        let (_temporary, dir, file) = places();
        let words = kind(&file, &["256 MiB", "quiet"]);
        assert!(!found(&dir, &words));
        keep(&dir, &words, "whole");
        assert!(found(&dir, &words));
        for others in [
            &["257 MiB", "quiet"][..],
            &["256 MiB"],
            &["256 MiBquiet"],
            &[],
        ] {
            assert!(!found(&dir, &kind(&file, others)), "{others:?}");
        }
        fs::write(&file, "kernel of another release").unwrap();
        assert!(!found(&dir, &words));
    }

    #[test]
    fn a_template_that_is_not_kept_leaves_nothing() {
        let (_temporary, dir, file) = places();
        drop(Store::new(&dir, &kind(&file, &[])).unwrap().stage());
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    }

    #[test]
    fn one_is_made_at_a_time() {
        let (_temporary, dir, file) = places();
        let (one, other) = (kind(&file, &["one"]), kind(&file, &["other"]));
        let staged = Store::new(&dir, &one).unwrap().stage().unwrap();
        let refused = Store::new(&dir, &other).unwrap().stage().map(drop);
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(staged);
        keep(&dir, &other, "whole");
        assert!(found(&dir, &other));
    }

    #[test]
    fn the_first_of_two_that_are_made_stays() {
        let (_temporary, dir, file) = places();
        let kind = kind(&file, &[]);
        keep(&dir, &kind, "first");
        keep(&dir, &kind, "second");
        let store = Store::new(&dir, &kind).unwrap();
        assert_eq!(fs::read_to_string(store.path()).unwrap(), "first");
        store.discard().unwrap();
        assert!(!found(&dir, &kind));
    }

    #[test]
    fn the_least_recently_used_go_first() {
        let (_temporary, dir, file) = places();
        let names: Vec<String> = (0..=MAX_TEMPLATES).map(|n| n.to_string()).collect();
        let of = |name: &str| kind(&file, &[name]);
        let (last, first) = names.split_last().unwrap();
        first
            .iter()
            .for_each(|name| keep(&dir, &of(name), "template"));
        assert!(found(&dir, &of(&first[0])));
        keep(&dir, &of(last), "template");
        assert_eq!(fs::read_dir(&dir).unwrap().count(), MAX_TEMPLATES);
        assert!(found(&dir, &of(&first[0])) && found(&dir, &of(last)));
        assert!(!found(&dir, &of(&first[1])));
    }
}
