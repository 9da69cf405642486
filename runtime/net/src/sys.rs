//! The few requests that have no safe wrapper elsewhere: a tap's, and asking what kind a namespace is.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

/// A tap sends and receives whole frames, each behind a `struct virtio_net_hdr` by which checksums and segmentation are left to
/// whoever needs them (Linux's Documentation/networking/tuntap.rst).
const TAP: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Makes a tap interface called `name` in the calling thread's network namespace. It is there as long as the descriptor.
pub(crate) fn create_tap(name: &str) -> nix::Result<OwnedFd> {
    let fd = open(
        "/dev/net/tun",
        OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK,
        Mode::empty(),
    )?;
    // IFF_TUN_EXCL: an interface of that name is never opened in place of a fresh one.
    set_iff(&fd, name, TAP | libc::IFF_TUN_EXCL)?;
    Ok(fd)
}

/// Makes a macvtap's descriptor speak as [`create_tap`]'s does.
pub(crate) fn set_up_macvtap(fd: &impl AsFd) -> nix::Result<()> {
    set_iff(fd, "", TAP)
}

/// Has a tap stay when its descriptor is closed, until it is removed or its namespace ends.
pub(crate) fn keep_tap(fd: &impl AsFd) -> nix::Result<()> {
    // SAFETY: TUNSETPERSIST takes a number.
    let kept = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TUNSETPERSIST, 1) };
    Errno::result(kept).map(drop)
}

fn set_iff(fd: &impl AsFd, name: &str, flags: libc::c_int) -> nix::Result<()> {
    // SAFETY: `ifreq` is plain data for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays the zero that ends the name.
    if name.len() >= request.ifr_name.len() {
        return Err(Errno::ENAMETOOLONG);
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF takes a pointer to an `ifreq`, which outlives the call.
    let set = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    Errno::result(set).map(drop)
}

/// The `CLONE_NEW…` flag of the kind of namespace that `fd`, a file of nsfs, is of.
pub(crate) fn namespace_kind(fd: &impl AsFd) -> nix::Result<libc::c_int> {
    // SAFETY: NS_GET_NSTYPE takes no argument and writes nothing.
    let kind = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::NS_GET_NSTYPE as libc::Ioctl) };
    Errno::result(kind)
}
