//! Linux capabilities as docker's options give them.

use std::collections::HashSet;
use std::str::FromStr;

use anyhow::{Result, anyhow};
use caps::Capability;
use oci_spec::runtime::{LinuxCapabilities, LinuxCapabilitiesBuilder, Process};

/// What docker leaves a container.
const DEFAULT: [Capability; 14] = [
    Capability::CAP_AUDIT_WRITE,
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_KILL,
    Capability::CAP_MKNOD,
    Capability::CAP_NET_BIND_SERVICE,
    Capability::CAP_NET_RAW,
    Capability::CAP_SETFCAP,
    Capability::CAP_SETGID,
    Capability::CAP_SETPCAP,
    Capability::CAP_SETUID,
    Capability::CAP_SYS_CHROOT,
];

/// A container's capabilities.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities(HashSet<Capability>);

fn parse(name: &str) -> Result<Capability> {
    let upper = name.to_ascii_uppercase();
    let full = if upper.starts_with("CAP_") {
        upper
    } else {
        format!("CAP_{upper}")
    };
    Capability::from_str(&full)
        .map_err(|_| anyhow!("unknown capability \"{name}\": give a name as in capabilities(7), such as NET_ADMIN, or ALL"))
}

fn is_all(name: &str) -> bool {
    name.eq_ignore_ascii_case("ALL") || name.eq_ignore_ascii_case("CAP_ALL")
}

impl Capabilities {
    /// Docker's rule: ALL first, then what is dropped, then what is added.
    ///
    /// # Errors
    /// When a name is not a capability's.
    pub fn choose(add: &[String], drop: &[String]) -> Result<Self> {
        let named = |names: &[String]| -> Result<HashSet<_>> {
            names
                .iter()
                .filter(|n| !is_all(n))
                .map(|n| parse(n))
                .collect()
        };
        let (added, dropped) = (named(add)?, named(drop)?);
        let mut set: HashSet<_> = if add.iter().any(|n| is_all(n)) {
            caps::all()
        } else if drop.iter().any(|n| is_all(n)) {
            HashSet::new()
        } else {
            DEFAULT.into()
        };
        set.retain(|capability| !dropped.contains(capability));
        set.extend(added);
        Ok(Self(set))
    }

    /// What a container's own process may have at most.
    ///
    /// # Errors
    /// When the spec names a capability that does not exist.
    pub fn bounding(container: &Process) -> Result<Self> {
        let bounding = container
            .capabilities()
            .as_ref()
            .and_then(|c| c.bounding().as_ref());
        let named = bounding
            .into_iter()
            .flatten()
            .map(|c| parse(&c.to_string()));
        named.collect::<Result<_>>().map(Self)
    }

    /// The names, with their prefix.
    pub fn names(&self) -> Vec<String> {
        self.0.iter().map(ToString::to_string).collect()
    }

    /// For a process of user `uid`: only root has them from the start, others can get them by executing a file.
    ///
    /// # Errors
    /// When the OCI crate knows a capability by no name.
    pub fn for_user(&self, uid: u32) -> Result<LinuxCapabilities> {
        let oci = || -> Result<oci_spec::runtime::Capabilities> {
            self.0
                .iter()
                .map(|c| Ok(serde_json::from_value(c.to_string().into())?))
                .collect()
        };
        let held = if uid == 0 { oci()? } else { HashSet::new() };
        Ok(LinuxCapabilitiesBuilder::default()
            .bounding(oci()?)
            .effective(held.clone())
            .permitted(held)
            .inheritable(HashSet::new())
            .ambient(HashSet::new())
            .build()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(add: &[&str], drop: &[&str]) -> Result<HashSet<Capability>> {
        let own = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        Capabilities::choose(&own(add), &own(drop)).map(|c| c.0)
    }

    #[test]
    fn names_are_taken_with_and_without_prefix_in_any_case() {
        let set = choose(&["net_admin", "CAP_SYS_TIME"], &["Mknod"]).unwrap();
        assert!(
            set.contains(&Capability::CAP_NET_ADMIN) && set.contains(&Capability::CAP_SYS_TIME)
        );
        assert!(!set.contains(&Capability::CAP_MKNOD));
        assert_eq!(set.len(), DEFAULT.len() + 1);
    }

    #[test]
    fn all_comes_before_single_names() {
        assert_eq!(
            choose(&["CHOWN"], &["ALL"]).unwrap(),
            HashSet::from([Capability::CAP_CHOWN])
        );
        let set = choose(&["ALL"], &["SYS_ADMIN"]).unwrap();
        assert!(
            !set.contains(&Capability::CAP_SYS_ADMIN) && set.contains(&Capability::CAP_SYS_BOOT)
        );
        assert!(choose(&[], &["all"]).unwrap().is_empty());
    }

    #[test]
    fn unknown_names_are_refused() {
        for name in ["", "CAP_", "ROOT", "CAP_ALLL"] {
            assert!(choose(&[name], &[]).is_err(), "{name}");
            assert!(choose(&[], &[name]).is_err(), "{name}");
        }
    }

    #[test]
    fn a_user_other_than_root_starts_without() {
        let capabilities = Capabilities::choose(&[], &[]).unwrap();
        let user = capabilities.for_user(1000).unwrap();
        assert!(user.effective().as_ref().unwrap().is_empty());
        assert_eq!(user.bounding().as_ref().unwrap().len(), DEFAULT.len());
        assert_eq!(
            capabilities
                .for_user(0)
                .unwrap()
                .effective()
                .as_ref()
                .unwrap()
                .len(),
            DEFAULT.len()
        );
    }
}
