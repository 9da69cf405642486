//! Mounts: what is bound from the host goes through the shared directory, everything else is the guest's own.

use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use cloison_sandbox::BindOptions;
use oci_spec::runtime::Mount;

/// File systems that a guest's kernel makes anew.
const GUEST_KINDS: [&str; 7] = [
    "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2",
];
/// Mount options that would carry the container's own mounts to the host.
const TO_THE_HOST: [&str; 2] = ["shared", "rshared"];
/// Mount options that have host's later mounts below the source appear in the container.
const FROM_THE_HOST: [&str; 2] = ["slave", "rslave"];

/// Something of the host that the guest is to see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// Absolute.
    pub source: PathBuf,
    /// How.
    pub options: BindOptions,
    /// Which of the spec's mounts uses it.
    pub mount: usize,
}

/// The mounts for the guest, sources of binds left to be filled in, and what they need of the host.
pub(super) fn adapt(
    mounts: Vec<Mount>,
    bundle: &Path,
    rootfs: &Path,
) -> Result<(Vec<Mount>, Vec<Bind>)> {
    let mut adapted = Vec::with_capacity(mounts.len());
    let mut binds = Vec::new();
    for mut mount in mounts {
        let place = mount.destination().display().to_string();
        let mut options = mount.options().clone().unwrap_or_default();
        let has = |options: &[String], words: &[&str]| {
            options
                .iter()
                .any(|option| words.contains(&option.as_str()))
        };
        if has(&options, &["idmap", "ridmap"])
            || mount.uid_mappings().as_ref().is_some_and(|m| !m.is_empty())
        {
            bail!("mount {place}: ID-mapped mounts are not supported");
        }
        let kind = mount.typ().clone().unwrap_or_default();
        if kind == "bind" || has(&options, &["bind", "rbind"]) {
            ensure!(
                !has(&options, &TO_THE_HOST),
                "mount {place}: a shared mount would carry the container's mounts to the host, which a VM cannot: use rslave or rprivate"
            );
            let source = mount
                .source()
                .clone()
                .with_context(|| format!("mount {place}: source is missing"))?;
            let source = bundle.join(source);
            let kind = fs::metadata(&source)
                .with_context(|| {
                    format!("mount {place}: cannot find the source {}", source.display())
                })?
                .file_type();
            refuse_socket(kind, &source, &place)?;
            if !has(&options, &["bind", "rbind"]) {
                // libcontainer goes by the option.
                options.push("bind".into());
            }
            binds.push(Bind {
                source,
                options: BindOptions {
                    recursive: has(&options, &["rbind"]),
                    read_only: has(&options, &["ro", "rro"]),
                    read_only_below: has(&options, &["rro"]),
                    follow_host: has(&options, &FROM_THE_HOST),
                },
                mount: adapted.len(),
            });
            mount.set_typ(Some("bind".into()));
        } else {
            ensure!(
                GUEST_KINDS.contains(&kind.as_str()),
                "mount {place}: file system type {kind:?} is not supported: a guest has {}",
                GUEST_KINDS.join(", ")
            );
            if has(&options, &["tmpcopyup"]) {
                refuse_copy(rootfs, mount.destination(), &place)?;
                options.retain(|option| option != "tmpcopyup");
            }
        }
        mount.set_options(Some(options));
        adapted.push(mount);
    }
    Ok((adapted, binds))
}

/// A socket's other end listens on the host, and its file in the guest leads nowhere.
fn refuse_socket(kind: fs::FileType, source: &Path, place: &str) -> Result<()> {
    use std::os::unix::fs::FileTypeExt;
    ensure!(
        !kind.is_socket(),
        "mount {place}: {} is a socket of the host, and a process in a VM cannot connect to it",
        source.display()
    );
    Ok(())
}

/// A tmpfs that is to begin with a copy of what it covers is an ordinary one where that is nothing.
fn refuse_copy(rootfs: &Path, destination: &Path, place: &str) -> Result<()> {
    let root = cloison_image::Root::open(rootfs)
        .with_context(|| format!("cannot open the root file system {}", rootfs.display()))?;
    let covered = match root.open_dir(destination) {
        Ok(dir) => fs::read_dir(format!("/proc/self/fd/{}", dir.as_raw_fd()))
            .with_context(|| format!("mount {place}: cannot look into what it covers"))?
            .next()
            .is_some(),
        Err(_) => false,
    };
    ensure!(
        !covered,
        "mount {place}: tmpcopyup is not supported where the directory has files in the image"
    );
    Ok(())
}
