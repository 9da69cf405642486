//! The tap descriptor: what it can do, and moving one frame at a time. A frame here is always behind a header of
//! [`HEADER_LENGTH`] bytes (Linux's Documentation/networking/tuntap.rst, and its `struct virtio_net_hdr_mrg_rxbuf`).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libc::{
    TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_USO4, TUN_F_USO6, TUNGETIFF,
    TUNSETOFFLOAD, TUNSETVNETHDRSZ,
};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
};

use super::{HEADER_LENGTH, NetError};
use crate::iovecs::Iovecs;

/// What every tap can leave to the guest, and the feature by which a guest says that it can take it.
const OFFLOADS: [(u32, u32); 4] = [
    (TUN_F_CSUM, VIRTIO_NET_F_GUEST_CSUM),
    (TUN_F_TSO4, VIRTIO_NET_F_GUEST_TSO4),
    (TUN_F_TSO6, VIRTIO_NET_F_GUEST_TSO6),
    (TUN_F_TSO_ECN, VIRTIO_NET_F_GUEST_ECN),
];
/// The same for taps of Linux 6.2 and newer, which take both or neither.
const UDP_OFFLOADS: [(u32, u32); 2] = [
    (TUN_F_USO4, VIRTIO_NET_F_GUEST_USO4),
    (TUN_F_USO6, VIRTIO_NET_F_GUEST_USO6),
];

/// A tap.
#[derive(Debug)]
pub(super) struct Tap {
    fd: OwnedFd,
    /// Whether it can segment UDP.
    udp: bool,
}

impl Tap {
    /// Checks what `fd` is, makes it non-blocking, and finds out what it can do.
    pub(super) fn new(fd: OwnedFd) -> Result<Self, NetError> {
        let setup = |what| move |source| NetError::Setup { what, source };
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if flags(fd.as_fd()).is_none_or(|flags| flags & wanted != wanted) {
            return Err(NetError::Unsuitable);
        }
        let status = fcntl(&fd, FcntlArg::F_GETFL).map_err(setup("fcntl"))?;
        let status = OFlag::from_bits_retain(status) | OFlag::O_NONBLOCK;
        fcntl(&fd, FcntlArg::F_SETFL(status)).map_err(setup("fcntl"))?;
        let length = HEADER_LENGTH as libc::c_int;
        // SAFETY: the request takes a pointer to an int, which it only reads.
        let set = unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &raw const length) };
        Errno::result(set).map_err(setup("setting the length of the tap's headers"))?;
        let tap = Self { fd, udp: true };
        let udp = tap.set_offloads(tap.features()).is_ok();
        let tap = Self { udp, ..tap };
        tap.set_offloads(0)
            .map_err(setup("switching the tap's offloads off"))?;
        Ok(tap)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The feature bits that stand for what it can do, in both directions.
    pub(super) fn features(&self) -> u64 {
        Self::features_of(self.udp)
    }

    /// The same of any tap that can, or cannot, segment UDP.
    pub(super) fn features_of(udp: bool) -> u64 {
        let from_guest = [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
        ];
        let udp_from_guest = udp.then_some(VIRTIO_NET_F_HOST_USO);
        let to_guest = offloads_of(udp).map(|(_, feature)| feature);
        from_guest
            .into_iter()
            .chain(udp_from_guest)
            .chain(to_guest)
            .fold(0, |features, feature| features | 1 << feature)
    }

    /// Leaves to the guest what it has accepted with `features`; nothing without checksums, on which all else depends.
    pub(super) fn set_offloads(&self, features: u64) -> Result<(), Errno> {
        let mut offloads = 0;
        if features & 1 << VIRTIO_NET_F_GUEST_CSUM != 0 {
            for (offload, feature) in offloads_of(self.udp) {
                if features & 1 << feature != 0 {
                    offloads |= offload;
                }
            }
            // The kernel knows of congestion notifications only in connection with segments.
            if offloads & (TUN_F_TSO4 | TUN_F_TSO6) == 0 {
                offloads &= !TUN_F_TSO_ECN;
            }
            // It segments UDP over both versions of IP or over none.
            if offloads & TUN_F_USO4 == 0 || offloads & TUN_F_USO6 == 0 {
                offloads &= !(TUN_F_USO4 | TUN_F_USO6);
            }
        }
        let offloads = libc::c_ulong::from(offloads);
        // SAFETY: the request takes a number.
        let set = unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETOFFLOAD, offloads) };
        Errno::result(set).map(drop)
    }

    /// Reads one frame into `to`, cut off where that ends; answers its length, header included.
    pub(super) fn read(&self, to: &Iovecs<'_>) -> Result<usize, Errno> {
        again(|| {
            // SAFETY: every iovec points into a mapping of guest memory that `to` borrows for longer than this call, with a
            // length that was checked against it. Only the kernel goes through the pointers, so that no Rust reference to
            // shared memory exists.
            unsafe { libc::readv(self.fd.as_raw_fd(), to.as_ptr(), count(to)) }
        })
    }

    /// As [`Tap::read`], into memory of ours.
    pub(super) fn read_own(&self, to: &mut [u8]) -> Result<usize, Errno> {
        nix::unistd::read(&self.fd, to)
    }

    /// Writes one frame; answers its length, header included.
    pub(super) fn write(&self, from: &Iovecs<'_>) -> Result<usize, Errno> {
        again(|| {
            // SAFETY: as in `read`; the iovecs that point to memory of ours are borrowed as long, and are only read.
            unsafe { libc::writev(self.fd.as_raw_fd(), from.as_ptr(), count(from)) }
        })
    }
}

fn offloads_of(udp: bool) -> impl Iterator<Item = (u32, u32)> {
    let udp = if udp { &UDP_OFFLOADS[..] } else { &[] };
    OFFLOADS.iter().chain(udp).copied()
}

/// The flags of the interface that `fd` stands for, if it stands for one.
fn flags(fd: BorrowedFd<'_>) -> Option<libc::c_int> {
    // SAFETY: `ifreq` is plain data for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: the request takes a pointer to an ifreq, which it fills.
    let got = unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETIFF, &raw mut request) };
    // SAFETY: the request has filled in the flags; and any bytes are a number.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    // The 16 bits are flags, so that the sign means nothing.
    (got == 0).then_some(libc::c_int::from(flags) & 0xffff)
}

/// At most `MAX_IOVECS`.
fn count(iovecs: &Iovecs<'_>) -> libc::c_int {
    iovecs.count() as libc::c_int
}

/// Repeats `call` when a signal has interrupted it.
fn again(call: impl Fn() -> isize) -> Result<usize, Errno> {
    loop {
        match Errno::result(call()) {
            Err(Errno::EINTR) => {}
            // What is not negative fits.
            result => return result.map(|done| done as usize),
        }
    }
}
