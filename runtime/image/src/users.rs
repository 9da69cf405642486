//! Users and groups by name, as the image's own `/etc/passwd` and `/etc/group` define them, by docker's rules. The files
//! are the image's and read as such: inside the root only, regular files only, of bounded size.

use std::path::Path;

use crate::error::{Error, Result};
use crate::root::Root;

/// Largest `/etc/passwd` or `/etc/group` read, bytes.
const MAX_ACCOUNTS: u64 = 4 << 20;

/// Largest number accepted as a user or group: what docker accepts, and far from the kernel's "no change" of 2³²−1.
const MAX_ID: u32 = i32::MAX as u32;

/// Most supplementary groups: the kernel's `NGROUPS_MAX`.
const MAX_GROUPS: usize = 65_536;

/// Who a container's process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// User ID.
    pub uid: u32,
    /// Primary group ID.
    pub gid: u32,
    /// Supplementary groups. The primary group comes first, so that a mode which denies a group something denies it to this
    /// process however it changes its primary group later.
    pub additional_gids: Vec<u32>,
    /// Home directory; `/` if `/etc/passwd` has none.
    pub home: String,
    /// Name, if `/etc/passwd` knows one.
    pub name: Option<String>,
}

/// Looks up `user[:group]`, each a name or a number, in the root filesystem at `rootfs`.
///
/// Empty means user 0. A number need not be in `/etc/passwd`; then the group is 0 unless given. Supplementary groups are those
/// that list the user, unless a group is given. A missing file counts as empty, and a line that makes no sense as absent.
pub fn resolve_user(rootfs: &Path, user: &str) -> Result<User> {
    let root = Root::open(rootfs).map_err(|source| Error::Io {
        action: "open the root filesystem",
        path: rootfs.to_owned(),
        source,
    })?;
    let read = |file: &str| {
        let content = root
            .read(Path::new(file), MAX_ACCOUNTS)
            .map_err(|source| Error::Io {
                action: "read the image's",
                path: Path::new("/").join(file),
                source,
            })?;
        Ok::<_, Error>(String::from_utf8_lossy(&content.unwrap_or_default()).into_owned())
    };
    look_up(user, &read("etc/passwd")?, &read("etc/group")?)
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or_default();
        (!name.is_empty() && uid <= MAX_ID && gid <= MAX_ID).then_some(Account {
            name,
            uid,
            gid,
            home,
        })
    })
}

fn groups(group: &str) -> impl Iterator<Item = Group<'_>> {
    group.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        let members = fields.next().unwrap_or_default();
        (!name.is_empty() && gid <= MAX_ID).then_some(Group { name, gid, members })
    })
}

fn look_up(wanted: &str, passwd: &str, group: &str) -> Result<User> {
    let (user, wanted_group) = match wanted.split_once(':') {
        Some((user, group)) => (user, (!group.is_empty()).then_some(group)),
        None => (wanted, None),
    };
    let number = if user.is_empty() { Some(0) } else { id(user) };
    let account =
        accounts(passwd).find(|a| (!user.is_empty() && a.name == user) || Some(a.uid) == number);
    let (uid, gid) = match (&account, number) {
        (Some(account), _) => (account.uid, account.gid),
        (None, Some(number)) => (number, 0),
        (None, None) => {
            return Err(Error::NoSuchUser {
                kind: "user",
                name: user.to_owned(),
                reason: "it is neither in its /etc/passwd nor a number up to 2147483647",
            });
        }
    };
    let (gid, supplementary) = match wanted_group {
        Some(name) => (find_group(name, group)?, Vec::new()),
        None => (
            gid,
            account
                .as_ref()
                .map_or_else(Vec::new, |a| groups_of(a.name, group)),
        ),
    };
    let mut additional_gids = vec![gid];
    additional_gids.extend(
        supplementary
            .into_iter()
            .filter(|g| *g != gid)
            .take(MAX_GROUPS - 1),
    );
    let home = account.as_ref().map_or("", |a| a.home);
    Ok(User {
        uid,
        gid,
        additional_gids,
        home: if home.is_empty() {
            "/".to_owned()
        } else {
            home.to_owned()
        },
        name: account.map(|a| a.name.to_owned()),
    })
}

fn find_group(name: &str, group: &str) -> Result<u32> {
    let number = id(name);
    let known = groups(group)
        .find(|g| g.name == name || Some(g.gid) == number)
        .map(|g| g.gid);
    known.or(number).ok_or_else(|| Error::NoSuchUser {
        kind: "group",
        name: name.to_owned(),
        reason: "it is neither in its /etc/group nor a number up to 2147483647",
    })
}

fn groups_of(user: &str, group: &str) -> Vec<u32> {
    let mut gids: Vec<u32> = groups(group)
        .filter(|g| g.members.split(',').any(|m| m.trim() == user))
        .map(|g| g.gid)
        .collect();
    gids.sort_unstable();
    gids.dedup();
    gids
}

fn id(text: &str) -> Option<u32> {
    text.parse()
        .ok()
        .filter(|n| *n <= MAX_ID && text.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\nwww:x:33:33::/var/www:/bin/false\nbad:x:nan:0::/:\n\
                          odd:x:4294967295:0::/:\n7:x:70:70::/seven:\nbare:x:50:51\n";
    const GROUP: &str =
        "root:x:0:\nadm:x:4:root,www\nwww:x:33:\nextra:x:90:www\nsame:x:33:www\nbroken:x:zz:www\n";

    fn user(wanted: &str) -> User {
        look_up(wanted, PASSWD, GROUP).unwrap()
    }

    #[test]
    fn nothing_given_is_root_with_its_home_and_groups() {
        let root = User {
            uid: 0,
            gid: 0,
            additional_gids: vec![0, 4],
            home: "/root".into(),
            name: Some("root".into()),
        };
        assert_eq!(user(""), root);
        assert_eq!(user("0"), root);
        assert_eq!(user("root"), root);
    }

    #[test]
    fn a_name_brings_its_group_home_and_supplementary_groups() {
        let www = User {
            uid: 33,
            gid: 33,
            additional_gids: vec![33, 4, 90],
            home: "/var/www".into(),
            name: Some("www".into()),
        };
        assert_eq!(user("www"), www);
        assert_eq!(user("33"), www);
        assert_eq!(user("www:"), www);
    }

    #[test]
    fn a_given_group_replaces_all_groups() {
        assert_eq!(
            (user("www:adm").gid, user("www:adm").additional_gids),
            (4, vec![4])
        );
        assert_eq!(user("33:90").gid, 90);
        assert_eq!(user(":adm").gid, 4);
    }

    #[test]
    fn numbers_need_not_be_known() {
        let unknown = User {
            uid: 1234,
            gid: 0,
            additional_gids: vec![0],
            home: "/".into(),
            name: None,
        };
        assert_eq!(user("1234"), unknown);
        assert_eq!(
            (user("1234:4321").gid, user("1234:4321").additional_gids),
            (4321, vec![4321])
        );
        assert_eq!(look_up("5:6", "", "").unwrap().gid, 6);
    }

    #[test]
    fn a_name_made_of_digits_wins_over_the_number() {
        assert_eq!(user("7").uid, 70);
    }

    #[test]
    fn an_account_without_a_home_lives_in_the_root() {
        assert_eq!(user("bare").home, "/");
    }

    #[test]
    fn who_is_unknown_is_refused() {
        for wanted in [
            "nobody",
            "bad",
            "odd",
            "-1",
            "+5",
            "4294967295",
            "2147483648",
            "www:nogroup",
            "www:broken",
            "www:-1",
            " www",
        ] {
            assert!(
                matches!(
                    look_up(wanted, PASSWD, GROUP),
                    Err(Error::NoSuchUser { .. })
                ),
                "{wanted}"
            );
        }
    }

    #[test]
    fn the_files_are_read_inside_the_root_only() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(dir.path().join("passwd"), "outside:x:1:1::/:\n").unwrap();
        symlink("../../passwd", root.join("etc/passwd")).unwrap();
        assert!(resolve_user(&root, "outside").is_err());
        fs::write(root.join("passwd"), "inside:x:2:2::/:\n").unwrap();
        assert_eq!(resolve_user(&root, "inside").unwrap().uid, 2);
    }

    #[test]
    fn files_that_are_no_files_are_refused_and_missing_ones_are_empty() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(resolve_user(dir.path(), "12").unwrap().uid, 12);
        fs::create_dir(dir.path().join("etc")).unwrap();
        rustix::fs::mkfifoat(
            rustix::fs::CWD,
            dir.path().join("etc/passwd"),
            rustix::fs::Mode::RUSR,
        )
        .unwrap();
        assert!(matches!(
            resolve_user(dir.path(), "12"),
            Err(Error::Io { .. })
        ));
    }
}
