//! Acting on the host as the guest's user: who owns what is created, which bits of its mode are masked, and whose writes
//! clear setuid. Each change is the calling thread's (the umask: the process's) and is undone when its guard is dropped,
//! whatever happened in between.

use std::io;

use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::umask;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

/// While it lives, files this thread creates belong to a user and group of the guest.
///
/// The thread keeps its capabilities: the guest's kernel has already checked permissions (FUSE `default_permissions`), with
/// the supplementary groups, user namespaces and security modules that only it knows. A second check on the host without
/// them would refuse what is allowed.
#[derive(Debug)]
pub struct Creator {
    uid: Uid,
    gid: Gid,
    capabilities: CapabilitySets,
}

impl Creator {
    /// Becomes the owner of what is created next; `None` when that is already so.
    ///
    /// # Errors
    /// EPERM when this thread may not; EINVAL for the IDs that mean "unchanged" to the kernel.
    pub fn new(uid: u32, gid: u32) -> io::Result<Option<Self>> {
        if uid == u32::MAX || gid == u32::MAX {
            return Err(Errno::INVAL.into());
        }
        // These calls report no error; asking for an impossible ID answers the present one.
        let present = (
            setfsuid(Uid::from_raw(u32::MAX)),
            setfsgid(Gid::from_raw(u32::MAX)),
        );
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        if present == (uid, gid) {
            return Ok(None);
        }
        let before = Self {
            uid: present.0,
            gid: present.1,
            capabilities: capabilities(None)?,
        };
        setfsgid(gid);
        setfsuid(uid);
        if setfsgid(gid) != gid || setfsuid(uid) != uid {
            return Err(Errno::PERM.into());
        }
        // Leaving user 0 has taken the file capabilities away (capabilities(7), "Effect of user ID changes").
        set_capabilities(None, before.capabilities)?;
        Ok(Some(before))
    }
}

impl Drop for Creator {
    fn drop(&mut self) {
        setfsuid(self.uid);
        setfsgid(self.gid);
        // Lowering to what this thread had is always allowed.
        let _ = set_capabilities(None, self.capabilities);
    }
}

/// While it lives, this process's umask is that of a process in the guest. The host's kernel must apply it, not this
/// device: in a directory with a default ACL it takes the ACL's place (umask(2)).
///
/// The umask belongs to the whole process. Nothing else in a process that serves a guest creates files.
#[derive(Debug)]
pub struct Umask(Mode);

impl Umask {
    /// Sets the umask; bits that are not permissions are ignored.
    pub fn new(mask: u32) -> Self {
        Self(umask(Mode::from_raw_mode(mask & 0o777)))
    }
}

impl Drop for Umask {
    fn drop(&mut self) {
        umask(self.0);
    }
}

/// While it lives, a write or truncation by this thread clears the file's setuid and setgid bits, as one by an ordinary
/// user does. The guest asks for it because only it knows who is writing (`FUSE_HANDLE_KILLPRIV_V2`).
#[derive(Debug)]
pub struct Unprivileged(CapabilitySets);

impl Unprivileged {
    /// Gives CAP_FSETID up if `asked` to; `None` also when this thread does not have it.
    ///
    /// # Errors
    /// Those of capset(2).
    pub fn when(asked: bool) -> io::Result<Option<Self>> {
        if !asked {
            return Ok(None);
        }
        let before = capabilities(None)?;
        if !before.effective.contains(CapabilitySet::FSETID) {
            return Ok(None);
        }
        let mut without = before;
        without.effective.remove(CapabilitySet::FSETID);
        set_capabilities(None, without)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for Unprivileged {
    fn drop(&mut self) {
        // Raising what is still permitted is always allowed.
        let _ = set_capabilities(None, self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> (Uid, Gid, CapabilitySets) {
        (
            setfsuid(Uid::from_raw(u32::MAX)),
            setfsgid(Gid::from_raw(u32::MAX)),
            capabilities(None).unwrap(),
        )
    }

    #[test]
    fn a_creator_keeps_capabilities_and_leaves_no_trace() {
        let before = now();
        for (uid, gid) in [(1000, 1001), (0, 5), (7, 0)] {
            let creator = Creator::new(uid, gid).unwrap().unwrap();
            assert_eq!(now(), (Uid::from_raw(uid), Gid::from_raw(gid), before.2));
            drop(creator);
            assert_eq!(now(), before);
        }
        assert!(Creator::new(0, 0).unwrap().is_none());
    }

    #[test]
    fn an_id_that_means_unchanged_creates_nothing() {
        let before = now();
        for (uid, gid) in [(u32::MAX, 0), (0, u32::MAX), (u32::MAX, u32::MAX)] {
            let error = Creator::new(uid, gid).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        }
        assert_eq!(now(), before);
    }

    #[test]
    fn an_unprivileged_writer_gets_its_capability_back() {
        let before = now();
        assert!(Unprivileged::when(false).unwrap().is_none());
        let guard = Unprivileged::when(true).unwrap().unwrap();
        assert!(!now().2.effective.contains(CapabilitySet::FSETID));
        assert!(Unprivileged::when(true).unwrap().is_none());
        drop(guard);
        assert_eq!(now(), before);
    }
}
