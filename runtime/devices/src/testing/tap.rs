//! A tap in a network namespace of its own, for tests of the network device: the descriptor a device gets, and what the host's kernel
//! sees of the frames. It needs CAP_NET_ADMIN and CAP_NET_RAW.

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};

const NAME: &[u8] = b"tap0";

/// The host's end of a tap.
#[derive(Debug)]
pub struct HostEnd {
    socket: OwnedFd,
}

/// A tap interface that is up, as the descriptor for a device and the host's end. The calling thread is in a new network namespace
/// afterwards, in which nothing else sends frames.
///
/// # Panics
/// When the system refuses.
pub fn tap() -> (OwnedFd, HostEnd) {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
    // IPv6 greets its neighbours on every new interface. Kernels without it have no such file.
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    let tap = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .expect("/dev/net/tun");
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    ioctl(&tap, libc::TUNSETIFF, &mut request(flags as i16));
    let any = socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
    ioctl(&any, libc::SIOCSIFFLAGS, &mut request(libc::IFF_UP as i16));
    let mut index = request(0);
    ioctl(&any, libc::SIOCGIFINDEX, &mut index);
    // SAFETY: the call above has filled in the index; and any bytes are a number.
    let index = unsafe { index.ifr_ifru.ifru_ifindex };
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    let socket = socket(libc::AF_PACKET, libc::SOCK_RAW, protocol.into());
    // SAFETY: as below.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = index;
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the address is one, of that length.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    Errno::result(bound).expect("a packet socket on the tap");
    (tap.into(), HostEnd { socket })
}

impl HostEnd {
    /// Sends a frame to the device; whether the tap had room for it.
    pub fn send(&self, frame: &[u8]) -> bool {
        nix::unistd::write(&self.socket, frame) == Ok(frame.len())
    }

    /// The next frame that has come from the device, of those that have come already. Frames sent from here are not among them.
    pub fn receive(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 1 << 17];
        loop {
            // SAFETY: `sockaddr_ll` is plain data for which all zeroes is a value.
            let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            let mut length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            // SAFETY: the buffer and the address are ours, writable, and of the lengths given.
            let received = unsafe {
                libc::recvfrom(
                    self.socket.as_raw_fd(),
                    frame.as_mut_ptr().cast(),
                    frame.len(),
                    libc::MSG_DONTWAIT,
                    (&raw mut from).cast(),
                    &raw mut length,
                )
            };
            let received = usize::try_from(received).ok()?;
            if from.sll_pkttype != libc::PACKET_OUTGOING {
                frame.truncate(received);
                return Some(frame);
            }
        }
    }
}

fn request(value: i16) -> libc::ifreq {
    // SAFETY: `ifreq` is plain data for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(NAME) {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = value;
    request
}

fn ioctl(fd: &impl AsRawFd, what: libc::Ioctl, request: &mut libc::ifreq) {
    // SAFETY: the requests made here take a pointer to an ifreq.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), what, request) };
    Errno::result(done).expect("an ioctl on a tap");
}

fn socket(family: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> OwnedFd {
    // SAFETY: the call takes numbers.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    let fd = Errno::result(fd).expect("a socket");
    // SAFETY: the descriptor was just made, and nothing else knows of it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
