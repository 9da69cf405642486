//! Opening a macvtap: an interface that is a tap already, by way of a character device whose number only sysfs tells.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open as open_node};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use crate::netlink::Link;
use crate::{Error, Namespace, Result, sys};

/// Opens the device of `link`, a macvtap in `namespace`, to speak as a tap with IFF_VNET_HDR.
///
/// A sysfs shows the namespace it was mounted in, and /dev has no node for an interface of another one; so both are made anew, in
/// a mount namespace that ends with this call's thread.
pub(crate) fn open(namespace: &Namespace, link: &Link) -> Result<OwnedFd> {
    let what = format!("open the macvtap {}", link.name);
    namespace
        .run(|| open_inside(link))?
        .map_err(Error::errno(what))
}

fn open_inside(link: &Link) -> nix::Result<OwnedFd> {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(
        Some("sysfs"),
        "/sys",
        Some("sysfs"),
        MsFlags::MS_RDONLY,
        none,
    )?;
    let (name, index) = (&link.name, link.index);
    let number = format!("/sys/class/net/{name}/tap{index}/dev");
    let number = fs::read_to_string(number).map_err(|_| Errno::ENODEV)?;
    let (major, minor) = parse(&number).ok_or(Errno::EINVAL)?;
    // Any directory does for a moment; /sys is hidden under it only here.
    mount(
        Some("tmpfs"),
        "/sys",
        Some("tmpfs"),
        MsFlags::MS_NOSUID,
        none,
    )?;
    let node = Path::new("/sys/tap");
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    mknod(node, SFlag::S_IFCHR, mode, makedev(major, minor))?;
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let tap = open_node(node, flags, Mode::empty())?;
    sys::set_up_macvtap(&tap)?;
    Ok(tap)
}

fn parse(number: &str) -> Option<(u64, u64)> {
    let (major, minor) = number.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}
