//! `/etc/hosts`, `/etc/hostname` and `/etc/resolv.conf` of a container, as Docker writes them.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::str::FromStr;
use std::{fs, io};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What systemd-resolved's stub listens on, and where it keeps the name servers that it asks itself.
const RESOLVED_STUB: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 53));
const RESOLVED_CONF: &str = "run/systemd/resolve/resolv.conf";
/// Asked when the host has no name server that a container can reach, as Docker does.
const PUBLIC_SERVERS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(8, 8, 8, 8)),
    IpAddr::V4(Ipv4Addr::new(8, 8, 4, 4)),
];
const PUBLIC_SERVERS6: [IpAddr; 2] = [
    IpAddr::V6(Ipv6Addr::new(0x2001, 0x4860, 0x4860, 0, 0, 0, 0, 0x8888)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0x4860, 0x4860, 0, 0, 0, 0, 0x8844)),
];
/// Longest host name, bytes (sethostname(2)).
const MAX_HOSTNAME: usize = 64;

/// A line of `/etc/hosts` that a caller wants: `NAME:ADDRESS`, where the address can be `host-gateway`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtraHost {
    /// The name.
    pub name: String,
    /// Its address; `None` for the host's on the container's network.
    pub address: Option<IpAddr>,
}

impl FromStr for ExtraHost {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let invalid = |why| Error::Syntax {
            what: "the extra host",
            given: text.to_owned(),
            why,
        };
        // Docker takes an equals sign too, which suits IPv6 addresses better.
        let (name, address) = text
            .split_once(['=', ':'])
            .ok_or_else(|| invalid("give NAME:ADDRESS"))?;
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_graphic() && b != b'#') {
            return Err(invalid("what is before the colon is no host name"));
        }
        let bare = address
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
            .unwrap_or(address);
        let address = match bare {
            "host-gateway" => None,
            bare => Some(bare.parse().map_err(|_| {
                invalid("what is after the colon is neither an IP address nor host-gateway")
            })?),
        };
        Ok(Self {
            name: name.to_owned(),
            address,
        })
    }
}

/// Checks a host name.
///
/// # Errors
/// [`Error::Syntax`].
pub fn check_hostname(name: &str) -> Result<()> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let starts_well = name
        .bytes()
        .next()
        .is_some_and(|b| b.is_ascii_alphanumeric());
    if starts_well && name.len() <= MAX_HOSTNAME && name.bytes().all(allowed) {
        return Ok(());
    }
    Err(Error::Syntax {
        what: "the host name",
        given: name.chars().take(MAX_HOSTNAME).collect(),
        why: "give 1 to 64 letters, digits, \"-\", \"_\" or \".\", a letter or a digit first",
    })
}

/// `/etc/hosts` of a container with the host name `hostname`.
///
/// # Errors
/// [`Error::Syntax`] when `extra` asks for the host's address and there is no `gateway`.
pub fn hosts(
    hostname: &str,
    addresses: impl IntoIterator<Item = IpAddr>,
    extra: &[ExtraHost],
    gateway: Option<IpAddr>,
) -> Result<String> {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::\tip6-localnet\n\
         ff00::\tip6-mcastprefix\n\
         ff02::1\tip6-allnodes\n\
         ff02::2\tip6-allrouters\n",
    );
    for host in extra {
        let address = host.address.or(gateway).ok_or_else(|| Error::Syntax {
            what: "the extra host",
            given: format!("{}:host-gateway", host.name),
            why: "the container is on no network that the host has an address on",
        })?;
        push(&mut text, address, &host.name);
    }
    let names = match hostname.split_once('.') {
        Some((first, _)) => format!("{hostname} {first}"),
        None => hostname.to_owned(),
    };
    for address in addresses {
        push(&mut text, address, &names);
    }
    Ok(text)
}

fn push(text: &mut String, address: IpAddr, names: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{address}\t{names}");
}

/// `/etc/hostname`.
pub fn hostname(name: &str) -> String {
    format!("{name}\n")
}

/// What a caller wants in `/etc/resolv.conf` in place of the host's own. What is empty is the host's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Name servers.
    pub servers: Vec<IpAddr>,
    /// Domains to look a name up in; a single "." for none.
    pub search: Vec<String>,
    /// Options (resolv.conf(5)).
    pub options: Vec<String>,
}

/// The host's `resolv.conf` that tells of name servers which others can ask too. `root` is where the host's files are: "/".
///
/// # Errors
/// When there is one that cannot be read.
pub fn host_resolv_conf(root: &Path) -> Result<String> {
    let read = |path: &str| {
        let path = root.join(path);
        match fs::read_to_string(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            read => read.map_err(Error::system(format!("read {}", path.display()))),
        }
    };
    let conf = read("etc/resolv.conf")?;
    if parse(&conf).servers == [RESOLVED_STUB.to_string()] {
        let behind = read(RESOLVED_CONF)?;
        if !behind.is_empty() {
            return Ok(behind);
        }
    }
    Ok(conf)
}

/// `/etc/resolv.conf` of a container that has IPv6 if `ipv6`. `host` is the host's.
///
/// The host's name servers on loopback addresses are left out, since the container's loopback is another, and so are those
/// the container has no protocol for; when none is left, public ones take their place.
pub fn resolv_conf(host: &str, wanted: &Dns, ipv6: bool) -> String {
    let host = parse(host);
    let servers: Vec<String> = if wanted.servers.is_empty() {
        let reachable = |server: &&String| {
            // A server with a zone is on a link of the host's.
            server
                .parse::<IpAddr>()
                .is_ok_and(|a| !a.is_loopback() && (ipv6 || a.is_ipv4()))
        };
        let mut found: Vec<_> = host.servers.iter().filter(reachable).cloned().collect();
        if found.is_empty() {
            let public6 = PUBLIC_SERVERS6.iter().filter(|_| ipv6);
            let public = PUBLIC_SERVERS.iter().chain(public6);
            found = public.map(IpAddr::to_string).collect();
        }
        found
    } else {
        wanted.servers.iter().map(IpAddr::to_string).collect()
    };
    let or_hosts = |wanted: &[String], host: Vec<String>| {
        if wanted.is_empty() {
            host
        } else {
            wanted.to_vec()
        }
    };
    let search = or_hosts(&wanted.search, host.search);
    let options = or_hosts(&wanted.options, host.options);
    let mut text = String::new();
    for server in servers {
        text += &format!("nameserver {server}\n");
    }
    if !search.is_empty() && search != ["."] {
        text += &format!("search {}\n", search.join(" "));
    }
    if !options.is_empty() {
        text += &format!("options {}\n", options.join(" "));
    }
    text
}

#[derive(Debug, Default)]
struct ResolvConf {
    servers: Vec<String>,
    search: Vec<String>,
    options: Vec<String>,
}

fn parse(text: &str) -> ResolvConf {
    let mut conf = ResolvConf::default();
    for line in text.lines() {
        let mut words = line
            .split_whitespace()
            .take_while(|word| !word.starts_with(['#', ';']))
            .map(str::to_owned);
        match words.next().as_deref() {
            Some("nameserver") => conf.servers.extend(words.next()),
            // The last one counts.
            Some("search" | "domain") => conf.search = words.collect(),
            Some("options") => conf.options.extend(words),
            _ => {}
        }
    }
    conf
}

#[cfg(test)]
mod tests;
