//! Taking ports of the host. A port that is published is also bound, so that nobody else can have it, and so that a port which
//! somebody has is found out before anything is made.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket, sockopt,
};

use crate::publish::Protocol;
use crate::{Error, Namespace, Publication, Result};

/// Ports that nobody else can bind while this is held. Without it the ports still lead to the sandbox; but a service that binds
/// one of them later will wait for connections in vain.
#[derive(Debug, Default)]
pub struct Reservation(Vec<OwnedFd>);

impl Reservation {
    /// The sockets, for passing them on to a process that lives as long as the sandbox.
    pub fn into_sockets(self) -> Vec<OwnedFd> {
        self.0
    }
}

/// Binds every port of `publications` in the namespace `host`.
///
/// # Errors
/// [`Error::PortInUse`].
pub fn reserve(host: &Namespace, publications: &[Publication], ipv6: bool) -> Result<Reservation> {
    if publications.is_empty() {
        return Ok(Reservation::default());
    }
    host.run(|| {
        let mut sockets = Vec::new();
        for publication in publications {
            for mapping in publication.mappings() {
                for address in mapping.sockets(ipv6) {
                    sockets.push(take(address, mapping.protocol)?);
                }
            }
        }
        Ok(Reservation(sockets))
    })?
}

fn take(address: SocketAddr, protocol: Protocol) -> Result<OwnedFd> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let kind = match protocol {
        Protocol::Tcp => SockType::Stream,
        Protocol::Udp => SockType::Datagram,
    };
    let bound: nix::Result<OwnedFd> = (|| {
        let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
        // Not SO_REUSEADDR: whoever sets it too could then listen in spite of this socket.
        if address.is_ipv6() {
            setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
        }
        bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
        Ok(socket)
    })();
    bound.map_err(|errno| match errno {
        Errno::EADDRINUSE => Error::PortInUse {
            port: format!("{address}/{protocol}"),
            owner: owner(address, protocol),
        },
        errno => Error::errno(format!("bind the port {address}/{protocol}"))(errno),
    })
}

/// Which process has a port in the calling thread's namespace: its name and ID, where `/proc` tells.
fn owner(address: SocketAddr, protocol: Protocol) -> Option<String> {
    let inode = ["", "6"].iter().find_map(|version| {
        let table = fs::read_to_string(format!("/proc/thread-self/net/{protocol}{version}"));
        let table = table.ok()?;
        let mut lines = table.lines().skip(1);
        lines.find_map(|line| owning_inode(line, address, protocol))
    })?;
    let wanted = format!("socket:[{inode}]");
    let processes = fs::read_dir("/proc").ok()?.flatten();
    processes
        .filter(|entry| entry.file_name().as_encoded_bytes()[0].is_ascii_digit())
        .find(|process| {
            let descriptors = fs::read_dir(process.path().join("fd"));
            descriptors.into_iter().flatten().flatten().any(|fd| {
                fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == wanted.as_str())
            })
        })
        .map(|process| {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            let pid = process.file_name().to_string_lossy().into_owned();
            format!("the process {} (pid {pid})", name.trim())
        })
}

/// The inode of the socket that a line of `/proc/net/{tcp,udp}{,6}` (proc_pid_net(5)) is about, when that one has `wanted`.
fn owning_inode(line: &str, wanted: SocketAddr, protocol: Protocol) -> Option<u64> {
    let fields: Vec<_> = line.split_whitespace().collect();
    let (address, port) = fields.get(1)?.split_once(':')?;
    if u16::from_str_radix(port, 16).ok()? != wanted.port() {
        return None;
    }
    // A TCP socket that is bound without listening has no line, and a connection is in nobody's way.
    const LISTEN: &str = "0A";
    if protocol == Protocol::Tcp && *fields.get(3)? != LISTEN {
        return None;
    }
    let has = parse_address(address)?;
    let both = |a: IpAddr, b: IpAddr| a.is_unspecified() || b.is_unspecified() || a == b;
    // A socket on every IPv6 address has mostly every IPv4 address too.
    let either = has.is_unspecified() && has.is_ipv6();
    let meets = either || has.is_ipv4() == wanted.is_ipv4() && both(has, wanted.ip());
    let inode = fields.get(9)?.parse().ok()?;
    meets.then_some(inode)
}

/// An address as the kernel prints it: words of 32 bits in the machine's byte order.
fn parse_address(text: &str) -> Option<IpAddr> {
    let word = |at: usize| {
        let word = text.get(at..at + 8)?;
        u32::from_str_radix(word, 16).ok().map(u32::to_ne_bytes)
    };
    match text.len() {
        8 => word(0).map(|bytes| IpAddr::V4(Ipv4Addr::from(bytes))),
        32 => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?];
            let bytes: [u8; 16] = words.concat().try_into().ok()?;
            Some(IpAddr::V6(Ipv6Addr::from(bytes)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;
    use crate::testing::namespace;

    fn publications(texts: &[&str]) -> Vec<Publication> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn a_port_in_use_is_an_error_that_names_its_owner() {
        let host = namespace();
        let _tcp = host.run(|| TcpListener::bind("127.0.0.1:8080")).unwrap();
        let _udp = host.run(|| UdpSocket::bind("0.0.0.0:53")).unwrap();
        let _tcp6 = host.run(|| TcpListener::bind("[::]:9090")).unwrap();
        let me = format!("(pid {})", std::process::id());
        for taken in [
            "8080:80",
            "127.0.0.1:8080:80",
            "8079-8081:79-81",
            "53:53/udp",
            "127.0.0.1:53:53/udp",
            "9090:80",
        ] {
            let error = reserve(&host, &publications(&[taken]), true).unwrap_err();
            let error = error.to_string();
            assert!(error.contains("in use by the process"), "{taken}: {error}");
            assert!(error.ends_with(&me), "{taken}: {error}");
        }
        let free = ["127.0.0.2:8080:80", "8080:80/udp", "53:53/tcp", "8081:80"];
        reserve(&host, &publications(&free), true).unwrap();
    }

    #[test]
    fn a_reserved_port_is_nobody_elses_until_it_is_let_go() {
        let host = namespace();
        let held = reserve(&host, &publications(&["8080:80", "53:53/udp"]), false).unwrap();
        let listen = || host.run(|| TcpListener::bind("0.0.0.0:8080")?.local_addr());
        // Rust sets SO_REUSEADDR, as most servers do.
        assert!(listen().unwrap().is_err());
        assert!(host.run(|| UdpSocket::bind("0.0.0.0:53")).unwrap().is_err());
        drop(held);
        listen().unwrap().unwrap();
        host.run(|| UdpSocket::bind("0.0.0.0:53")).unwrap().unwrap();
    }

    #[test]
    fn addresses_are_read_as_the_kernel_prints_them() {
        assert_eq!(parse_address("0100007F"), "127.0.0.1".parse().ok());
        let loopback = "00000000000000000000000001000000";
        assert_eq!(parse_address(loopback), "::1".parse().ok());
        for bad in ["", "0100007", "0100007G", "0100007F0"] {
            assert_eq!(parse_address(bad), None);
        }
    }
}
