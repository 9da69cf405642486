//! Published ports: what `-p` means, and making sure that a host port is free before anything is built on it.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Error;

/// A transport protocol that has ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// Ports of the host that lead to as many of a container: `[IP:]HOST:CONTAINER[/PROTOCOL]`, where both may be ranges of the same
/// length.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Publication {
    /// The host's address; `None` for all.
    pub(crate) address: Option<IpAddr>,
    /// The host's first port.
    pub(crate) host: u16,
    /// The container's first port.
    pub(crate) container: u16,
    /// How many ports there are of each; at least one.
    pub(crate) count: u16,
    /// Their protocol.
    pub(crate) protocol: Protocol,
}

/// One published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// The host's address; `None` for all.
    pub address: Option<IpAddr>,
    /// The host's port.
    pub host: u16,
    /// The container's port.
    pub container: u16,
    /// Their protocol.
    pub protocol: Protocol,
}

impl Publication {
    /// Its ports, one by one.
    pub fn mappings(&self) -> impl Iterator<Item = Mapping> + '_ {
        (0..self.count).map(|offset| Mapping {
            address: self.address,
            host: self.host + offset,
            container: self.container + offset,
            protocol: self.protocol,
        })
    }

    /// The first port of which not both can have it.
    pub(crate) fn conflict(&self, other: &Self) -> Option<u16> {
        let same_address = match (self.address, other.address) {
            (Some(a), Some(b)) => a == b || a.is_ipv4() == b.is_ipv4() && covers_all(a, b),
            // One of them is for all addresses.
            _ => true,
        };
        let first = self.host.max(other.host);
        let last = (self.host + (self.count - 1)).min(other.host + (other.count - 1));
        (same_address && self.protocol == other.protocol && first <= last).then_some(first)
    }
}

fn covers_all(a: IpAddr, b: IpAddr) -> bool {
    a.is_unspecified() || b.is_unspecified()
}

impl Mapping {
    /// Where on the host it listens. Without an address that is everywhere, over IPv6 too if `ipv6`.
    pub(crate) fn sockets(&self, ipv6: bool) -> impl Iterator<Item = SocketAddr> + use<> {
        let every_ipv6 = ipv6.then_some(IpAddr::V6(Ipv6Addr::UNSPECIFIED));
        let (first, second) = match self.address {
            Some(address) => (address, None),
            None => (IpAddr::V4(Ipv4Addr::UNSPECIFIED), every_ipv6),
        };
        let port = self.host;
        [Some(first), second]
            .into_iter()
            .flatten()
            .map(move |address| SocketAddr::new(address, port))
    }
}

impl FromStr for Publication {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        parse(text).map_err(|why| Error::Syntax {
            what: "the published port",
            given: text.to_owned(),
            why,
        })
    }
}

impl TryFrom<String> for Publication {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Publication> for String {
    fn from(publication: Publication) -> Self {
        publication.to_string()
    }
}

fn parse(text: &str) -> Result<Publication, &'static str> {
    let (rest, protocol) = match text.rsplit_once('/') {
        None => (text, Protocol::Tcp),
        Some((rest, "tcp")) => (rest, Protocol::Tcp),
        Some((rest, "udp")) => (rest, Protocol::Udp),
        Some(_) => return Err("the protocol is tcp or udp"),
    };
    let no_host = "give a host port and a container port: [IP:]HOST:CONTAINER[/udp]";
    let (rest, container) = rest.rsplit_once(':').ok_or(no_host)?;
    let (address, host) = match rest.rsplit_once(':') {
        None => (None, rest),
        Some((address, host)) => (Some(parse_address(address)?), host),
    };
    if host.is_empty() {
        return Err(no_host);
    }
    let (host, last_host) = parse_range(host)?;
    let (container, last_container) = parse_range(container)?;
    let length = last_host - host;
    if length != last_container - container {
        return Err("the two ranges differ in length");
    }
    Ok(Publication {
        address,
        host,
        container,
        // Port 0 is none, so there are at most 65535.
        count: length + 1,
        protocol,
    })
}

fn parse_address(text: &str) -> Result<IpAddr, &'static str> {
    if let Some(inner) = text.strip_prefix('[') {
        let inner = inner.strip_suffix(']').ok_or("a bracket is not closed")?;
        return inner
            .parse::<Ipv6Addr>()
            .map(IpAddr::V6)
            .map_err(|_| "what is in the brackets is no IPv6 address");
    }
    if text.contains(':') {
        return Err("an IPv6 address goes in brackets");
    }
    text.parse::<Ipv4Addr>()
        .map(IpAddr::V4)
        .map_err(|_| "what is before the ports is no IP address")
}

pub(crate) fn parse_range(text: &str) -> Result<(u16, u16), &'static str> {
    let port = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let port = digits.then(|| text.parse::<u16>().ok()).flatten();
        port.filter(|port| *port != 0)
            .ok_or("a port is a number from 1 to 65535")
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (port(first)?, port(last)?);
    if last < first {
        return Err("a range goes from the lower port to the higher");
    }
    Ok((first, last))
}

impl fmt::Display for Publication {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            None => {}
        }
        let last = self.count - 1;
        match last {
            0 => write!(f, "{}:{}", self.host, self.container)?,
            _ => write!(
                f,
                "{}-{}:{}-{}",
                self.host,
                self.host + last,
                self.container,
                self.container + last
            )?,
        }
        write!(f, "/{}", self.protocol)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_published_is_read_as_docker_reads_it() {
        for (given, shown) in [
            ("8080:80", "8080:80/tcp"),
            ("8080:80/udp", "8080:80/udp"),
            ("127.0.0.1:8080:80/tcp", "127.0.0.1:8080:80/tcp"),
            ("[::1]:8080:80", "[::1]:8080:80/tcp"),
            ("8000-8010:80-90", "8000-8010:80-90/tcp"),
            ("1-65535:1-65535/udp", "1-65535:1-65535/udp"),
            ("0.0.0.0:53:53/udp", "0.0.0.0:53:53/udp"),
        ] {
            let publication: Publication = given.parse().unwrap();
            assert_eq!(publication.to_string(), shown);
        }
    }

    #[test]
    fn what_cannot_be_published_is_refused_with_the_reason() {
        for (given, why) in [
            ("", "give a host port"),
            ("80", "give a host port"),
            ("127.0.0.1::80", "give a host port"),
            (":80", "give a host port"),
            ("8080:", "a number from 1"),
            ("0:80", "a number from 1"),
            ("65536:80", "a number from 1"),
            ("+80:80", "a number from 1"),
            ("80 :80", "a number from 1"),
            ("http:80", "a number from 1"),
            ("8010-8000:80-90", "lower port"),
            ("8000-8010:80", "differ in length"),
            ("8000-8010:80-91", "differ in length"),
            ("8080:80/sctp", "tcp or udp"),
            ("8080:80/TCP", "tcp or udp"),
            ("8080:80/", "tcp or udp"),
            ("::1:8080:80", "in brackets"),
            ("[::1:8080:80", "not closed"),
            ("[127.0.0.1]:8080:80", "no IPv6 address"),
            ("localhost:8080:80", "no IP address"),
            ("127.0.0.256:8080:80", "no IP address"),
            ("1.2.3.4:5:6:7", "in brackets"),
        ] {
            let error = given.parse::<Publication>().unwrap_err().to_string();
            assert!(error.contains(why), "{given}: {error}");
        }
    }

    #[test]
    fn two_publications_conflict_where_they_share_a_port_of_an_address() {
        for (a, b, conflict) in [
            ("8080:80", "8080:81", Some(8080)),
            ("8080:80", "8081:80", None),
            ("8080:80", "8080:80/udp", None),
            ("8080-8090:80-90", "8085:80", Some(8085)),
            ("8080-8090:80-90", "8090-8095:80-85", Some(8090)),
            ("127.0.0.1:8080:80", "127.0.0.2:8080:80", None),
            ("127.0.0.1:8080:80", "8080:80", Some(8080)),
            ("127.0.0.1:8080:80", "0.0.0.0:8080:80", Some(8080)),
            ("[::1]:8080:80", "0.0.0.0:8080:80", None),
            ("1-65535:1-65535", "65535:1", Some(65535)),
        ] {
            let (a, b): (Publication, Publication) = (a.parse().unwrap(), b.parse().unwrap());
            assert_eq!(a.conflict(&b), conflict, "{a} and {b}");
            assert_eq!(b.conflict(&a), conflict, "{b} and {a}");
        }
    }
}
