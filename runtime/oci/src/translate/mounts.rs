//! Mounts: what is bound from the host goes through the shared directory, or is a socket to be reached; everything else is the guest's
//! own.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use cloison_sandbox::{BindOptions, IdMap, MAX_SOCKETS};
use oci_spec::runtime::{LinuxIdMapping, Mount};

/// File systems that a guest's kernel makes anew.
const GUEST_KINDS: [&str; 7] = [
    "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2",
];
/// Mount options that, without a VM, would carry the container's own mounts to the host.
const TO_THE_HOST: [&str; 2] = ["shared", "rshared"];
/// Mount options that have files belong to others.
const ID_MAPPED: [&str; 2] = ["idmap", "ridmap"];
/// Mount options that have host's later mounts below the source appear in the container.
const FROM_THE_HOST: [&str; 2] = ["slave", "rslave"];

/// Something of the host that the guest is to see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// Absolute.
    pub source: PathBuf,
    /// How.
    pub options: BindOptions,
    /// Whom its files belong to.
    pub ids: Option<IdMap>,
    /// Which of the spec's mounts uses it.
    pub mount: usize,
}

/// A socket of the host that processes in the guest are to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Socket {
    /// Absolute.
    pub source: PathBuf,
    /// Which of the spec's mounts uses it.
    pub mount: usize,
}

/// Mounts for the guest, and what they need of the host.
pub(super) struct Adapted {
    /// Sources of binds and sockets are left to be filled in.
    pub mounts: Vec<Mount>,
    pub binds: Vec<Bind>,
    pub sockets: Vec<Socket>,
}

pub(super) fn adapt(
    mounts: Vec<Mount>,
    bundle: &Path,
    rootfs: &Path,
    users: Option<&IdMap>,
    notes: &mut Vec<String>,
) -> Result<Adapted> {
    let mut adapted = Vec::with_capacity(mounts.len());
    let mut binds = Vec::new();
    let mut sockets = Vec::new();
    for mut mount in mounts {
        let place = mount.destination().display().to_string();
        let mut options = mount.options().clone().unwrap_or_default();
        let has = |options: &[String], words: &[&str]| {
            options
                .iter()
                .any(|option| words.contains(&option.as_str()))
        };
        let ids = id_map(&mount, &options, users).with_context(|| format!("mount {place}"))?;
        mount.set_uid_mappings(None).set_gid_mappings(None);
        options.retain(|option| !ID_MAPPED.contains(&option.as_str()));
        let kind = mount.typ().clone().unwrap_or_default();
        if kind == "bind" || has(&options, &["bind", "rbind"]) {
            if has(&options, &TO_THE_HOST) {
                notes.push(format!(
                    "mount {place}: it is shared within the guest; what the container mounts below it does not appear on the host"
                ));
            }
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
            if !has(&options, &["bind", "rbind"]) {
                // libcontainer goes by the option.
                options.push("bind".into());
            }
            let index = adapted.len();
            if kind.is_socket() {
                refuse_datagrams(&source, &place)?;
                ensure!(ids.is_none(), "mount {place}: a socket cannot be ID-mapped");
                sockets.push(Socket {
                    source,
                    mount: index,
                });
            } else {
                binds.push(Bind {
                    source,
                    options: BindOptions {
                        recursive: has(&options, &["rbind"]),
                        read_only: has(&options, &["ro", "rro"]),
                        read_only_below: has(&options, &["rro"]),
                        follow_host: has(&options, &FROM_THE_HOST),
                    },
                    ids,
                    mount: index,
                });
            }
            mount.set_typ(Some("bind".into()));
        } else {
            ensure!(
                ids.is_none(),
                "mount {place}: only what is bound from the host can be ID-mapped"
            );
            ensure!(
                GUEST_KINDS.contains(&kind.as_str()),
                "mount {place}: file system type {kind:?} is not supported: a guest has {}",
                GUEST_KINDS.join(", ")
            );
            if matches!(kind.as_str(), "proc" | "sysfs") {
                refuse_link(rootfs, mount.destination(), &kind)?;
            }
            // Nothing is looked for there, and the specification lets it be left out.
            if mount.source().is_none() {
                mount.set_source(Some(kind.clone().into()));
            }
            if kind == "sysfs" && users.is_some() {
                bind_sysfs(&mut mount, &mut options);
            }
            if has(&options, &["tmpcopyup"]) {
                match covered_by(&adapted, mount.destination()) {
                    None => {}
                    Some(other) if other.typ().as_deref() == Some("bind") => bail!(
                        "mount {place}: tmpcopyup is not supported below another mount, {}",
                        other.destination().display()
                    ),
                    // There is nothing in it yet.
                    Some(_) => options.retain(|option| option != "tmpcopyup"),
                }
            }
        }
        mount.set_options(Some(options));
        adapted.push(mount);
    }
    ensure!(
        sockets.len() <= MAX_SOCKETS as usize,
        "{} mounts are sockets of the host, and a guest can be given {MAX_SOCKETS}",
        sockets.len()
    );
    Ok(Adapted {
        mounts: adapted,
        binds,
        sockets,
    })
}

/// Whom the files of a mount are to belong to: as its own mappings say, or those of the container's user namespace.
fn id_map(mount: &Mount, options: &[String], users: Option<&IdMap>) -> Result<Option<IdMap>> {
    let given =
        |ranges: &Option<Vec<LinuxIdMapping>>| ranges.as_deref().is_some_and(|r| !r.is_empty());
    let own = match (given(mount.uid_mappings()), given(mount.gid_mappings())) {
        (false, false) => None,
        (true, true) => Some(super::id_map(mount.uid_mappings(), mount.gid_mappings())),
        _ => bail!("uidMappings and gidMappings must be given both or not at all"),
    };
    let asked = options
        .iter()
        .rfind(|option| ID_MAPPED.contains(&option.as_str()));
    if own.is_none() && asked.is_none() {
        return Ok(None);
    }
    let map = own.or_else(|| users.cloned());
    let map = map.context(
        "an ID-mapped mount needs uidMappings and gidMappings where the container has no user namespace of its own",
    )?;
    Ok(Some(IdMap {
        recursive: asked.is_some_and(|option| option == "ridmap"),
        ..map
    }))
}

/// A user namespace may mount the sysfs of its own network namespace only, and the container's is the guest's: so it is given the guest's.
fn bind_sysfs(mount: &mut Mount, options: &mut Vec<String>) {
    mount
        .set_typ(Some("bind".into()))
        .set_source(Some("/sys".into()));
    // With what is mounted below, as the kernel lets no user namespace uncover it, and with the flags that it lets none take away.
    for word in ["rbind", "nosuid", "noexec", "nodev"] {
        if !options.iter().any(|option| option == word) {
            options.push(word.into());
        }
    }
}

/// A link in the image must not lead what the kernel shows to where nothing masks it. In runc's words, which are looked for.
fn refuse_link(rootfs: &Path, destination: &Path, kind: &str) -> Result<()> {
    let place = rootfs.join(destination.strip_prefix("/").unwrap_or(destination));
    let is_link = fs::symlink_metadata(&place).is_ok_and(|found| found.is_symlink());
    ensure!(
        !is_link,
        "filesystem {kind:?} must be mounted on ordinary directory, and {} of the image is a symbolic link",
        destination.display()
    );
    Ok(())
}

/// What goes to the guest is streams. A socket that takes datagrams is told by its letting one of its kind connect, which it does not
/// notice; one that takes streams refuses that without noticing either.
fn refuse_datagrams(source: &Path, place: &str) -> Result<()> {
    let probe = UnixDatagram::unbound().context("cannot make a socket")?;
    ensure!(
        probe.connect(source).is_err(),
        "mount {place}: {} is a socket for datagrams, and only streams can be carried into a VM",
        source.display()
    );
    Ok(())
}

/// The last of the mounts at or above a place, which covers what the image has there.
fn covered_by<'a>(mounts: &'a [Mount], place: &Path) -> Option<&'a Mount> {
    let mut mounts = mounts.iter().rev();
    mounts.find(|mount| place.starts_with(mount.destination()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use serde_json::json;

    use super::*;

    fn adapted(mounts: serde_json::Value, has_users: bool) -> Result<(Adapted, Vec<String>)> {
        let dir = tempfile::tempdir().unwrap();
        let mut notes = Vec::new();
        let mounts = serde_json::from_value(mounts).unwrap();
        let users = IdMap {
            users: Vec::new(),
            groups: Vec::new(),
            recursive: false,
        };
        let users = has_users.then_some(&users);
        let adapted = adapt(mounts, dir.path(), dir.path(), users, &mut notes)?;
        Ok((adapted, notes))
    }

    #[test]
    fn a_socket_is_no_bind_and_keeps_its_number_among_the_mounts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let _listener = UnixListener::bind(&path).unwrap();
        let (adapted, _) = adapted(
            json!([
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/s", "type": "bind", "source": path, "options": ["rbind"] },
                { "destination": "/d", "type": "bind", "source": dir.path(), "options": ["rbind"] },
            ]),
            false,
        )
        .unwrap();
        assert_eq!((adapted.sockets.len(), adapted.sockets[0].mount), (1, 1));
        assert_eq!((adapted.binds.len(), adapted.binds[0].mount), (1, 2));
    }

    #[test]
    fn a_socket_for_datagrams_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let _bound = UnixDatagram::bind(&path).unwrap();
        let mounts =
            json!([{ "destination": "/dev/log", "type": "bind", "source": path, "options": [] }]);
        let error = adapted(mounts, false).err().unwrap().to_string();
        assert!(error.contains("datagrams"), "{error}");
    }

    #[test]
    fn a_link_is_no_place_for_proc_or_sysfs() {
        for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys")] {
            let dir = tempfile::tempdir().unwrap();
            let mounts = json!([{ "destination": place, "type": kind, "source": kind }]);
            let mounts: Vec<Mount> = serde_json::from_value(mounts).unwrap();
            let try_adapt = || {
                adapt(
                    mounts.clone(),
                    dir.path(),
                    dir.path(),
                    None,
                    &mut Vec::new(),
                )
            };
            try_adapt().unwrap();
            let link = dir.path().join(&place[1..]);
            std::os::unix::fs::symlink("/elsewhere", link).unwrap();
            let error = try_adapt().err().unwrap().to_string();
            assert!(
                error.contains("must be mounted on ordinary directory"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_file_system_of_the_guests_needs_no_source_and_a_bind_does() {
        let proc = json!([{ "destination": "/proc", "type": "proc" }]);
        let (adapted_proc, _) = adapted(proc, false).unwrap();
        let source = adapted_proc.mounts[0].source().as_deref();
        assert_eq!(source, Some(Path::new("proc")));
        let bind = json!([{ "destination": "/x", "type": "bind" }]);
        let error = adapted(bind, false).err().unwrap().to_string();
        assert!(error.contains("source is missing"), "{error}");
    }

    #[test]
    fn a_user_namespace_gets_the_guests_sysfs() {
        let mounts = json!([{ "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "ro"] }]);
        let (with, _) = adapted(mounts.clone(), true).unwrap();
        assert_eq!(with.mounts[0].typ().as_deref(), Some("bind"));
        let options = with.mounts[0].options().clone().unwrap();
        assert_eq!(options, ["nosuid", "ro", "rbind", "noexec", "nodev"]);
        assert!(
            with.binds.is_empty(),
            "its source is the guest's, not the host's"
        );
        let (without, _) = adapted(mounts, false).unwrap();
        assert_eq!(without.mounts[0].typ().as_deref(), Some("sysfs"));
    }

    #[test]
    fn a_tmpfs_is_filled_from_the_image_and_from_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let filled = |first: serde_json::Value| {
            let tmpfs =
                json!({ "destination": "/a/b", "type": "tmpfs", "options": ["ro", "tmpcopyup"] });
            let (adapted, _) = adapted(json!([first, tmpfs]), false)?;
            let options = adapted.mounts[1].options().clone().unwrap();
            anyhow::Ok(options.iter().any(|option| option == "tmpcopyup"))
        };
        let bind = |place: &str| json!({ "destination": place, "type": "bind", "source": dir.path(), "options": ["rbind"] });
        assert!(filled(bind("/a/c")).unwrap());
        assert!(filled(bind("/ab")).unwrap());
        assert!(!filled(json!({ "destination": "/a", "type": "tmpfs" })).unwrap());
        for place in ["/a", "/a/b"] {
            let error = filled(bind(place)).unwrap_err().to_string();
            assert!(
                error.contains(&format!("below another mount, {place}")),
                "{error}"
            );
        }
    }

    #[test]
    fn a_mount_is_id_mapped_by_its_own_mappings_or_the_containers() {
        let dir = tempfile::tempdir().unwrap();
        let ranges = json!([{ "containerID": 0, "hostID": 1000, "size": 10 }]);
        let mount = |options: &[&str], uids: bool, gids: bool| {
            let mut mount = json!({ "destination": "/x", "type": "bind", "source": dir.path(), "options": options });
            if uids {
                mount["uidMappings"] = ranges.clone();
            }
            if gids {
                mount["gidMappings"] = ranges.clone();
            }
            json!([mount])
        };
        let mapped = |options: &[&str], own: bool, has_users| {
            let (adapted, _) = adapted(mount(options, own, own), has_users)?;
            let guest = &adapted.mounts[0];
            assert!(guest.uid_mappings().is_none());
            assert_eq!(guest.options().as_deref().unwrap(), ["rbind"]);
            anyhow::Ok(adapted.binds[0].ids.clone())
        };
        assert_eq!(mapped(&["rbind"], false, true).unwrap(), None);
        let own = mapped(&["rbind"], true, false).unwrap().unwrap();
        assert_eq!((own.users[0].inside, own.users[0].outside), (0, 1000));
        assert!(!own.recursive);
        assert!(
            mapped(&["rbind", "ridmap"], true, false)
                .unwrap()
                .unwrap()
                .recursive
        );
        assert!(mapped(&["rbind", "idmap"], false, true).unwrap().is_some());
        assert!(mapped(&["rbind", "idmap"], false, false).is_err());
        assert!(adapted(mount(&["rbind"], true, false), false).is_err());
        let tmpfs = json!([{ "destination": "/x", "type": "tmpfs", "options": ["idmap"] }]);
        assert!(adapted(tmpfs, true).is_err());
    }

    #[test]
    fn a_shared_mount_is_the_guests_and_the_log_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let mounts = json!([{ "destination": "/x", "type": "bind", "source": dir.path(), "options": ["rbind", "rshared"] }]);
        let (_, notes) = adapted(mounts, false).unwrap();
        assert!(notes[0].contains("/x"), "{notes:?}");
    }
}
