//! What is asked of the kernel about an interface. Layouts and numbers are rtnetlink(7)'s, those that libc lacks from Linux's
//! include/uapi/linux/rtnetlink.h.

use std::io;
use std::net::IpAddr;

use super::{Address, HardwareAddress, Interface, Neighbour, Route};
use crate::netlink::{Change, Netlink, Request, attributes};
use crate::sys;

/// Length of `struct ifinfomsg`.
const LINK: usize = 16;
/// RTAX_MTU, within RTA_METRICS.
const METRIC_MTU: u16 = 2;
/// RTEXT_FILTER_SKIP_STATS: a list of interfaces without what they have counted.
const SKIP_STATISTICS: u32 = 1 << 3;
/// AF_INET6 as the type of an attribute in IFLA_AF_SPEC, IFLA_INET6_ADDR_GEN_MODE in that, and IN6_ADDR_GEN_MODE_NONE.
const AF_INET6: u16 = libc::AF_INET6 as u16;
const ADDR_GEN_MODE: u16 = 8;
const ADDR_GEN_MODE_NONE: u8 = 1;
/// RTNH_F_ONLINK.
const ONLINK: u32 = 4;
/// How interfaces are called that are nobody's; the index follows.
const SPARE: &str = "spare";

pub struct Kernel(Netlink);

/// An interface that there is.
struct Link {
    index: i32,
    name: String,
    /// The hardware address that it has, and the one that its device came with.
    mac: Option<HardwareAddress>,
    permanent: Option<HardwareAddress>,
}

impl Kernel {
    pub fn open() -> io::Result<Self> {
        Netlink::open().map(Self)
    }

    /// What gives the device its name, hardware address and MTU, and brings it up; and its index.
    pub fn set_link(&self, wanted: &Interface) -> io::Result<(i32, Vec<Change>)> {
        let mut changes = Vec::new();
        // A device that is called so already is found by its name: to list all interfaces takes a guest from a template half a millisecond, for
        // all that the kernel looks at there.
        let (links, link) = match self.called(&wanted.name) {
            Some(link) if link.mac == Some(wanted.device) => (Vec::new(), link),
            _ => {
                let mut links = self.links()?;
                let position = find(&links, wanted.device)?;
                let link = links.swap_remove(position);
                (links, link)
            }
        };
        if let Some(holder) = links.iter().find(|other| other.name == wanted.name) {
            // The kernel names devices as it finds them. No other that was configured has this name.
            changes.push(rename(holder.index, &format!("{SPARE}{}", holder.index)));
        }
        let up = libc::IFF_UP;
        let mut request = Request::new(libc::RTM_NEWLINK, 0, &link_fixed(link.index, up))
            .attribute(libc::IFLA_MTU, &wanted.mtu.to_ne_bytes());
        if link.name != wanted.name {
            request = request.attribute(libc::IFLA_IFNAME, &name(&wanted.name));
        }
        if link.mac != Some(wanted.mac) {
            request = request.attribute(libc::IFLA_ADDRESS, &wanted.mac);
        }
        if wanted.ipv4_only {
            // Before it is up, which is when the address is made.
            let mode = nested(AF_INET6, ADDR_GEN_MODE, &[ADDR_GEN_MODE_NONE]);
            let quiet = Request::new(libc::RTM_NEWLINK, 0, &link_unchanged(link.index))
                .attribute(libc::IFLA_AF_SPEC, &mode);
            // A kernel without IPv6.
            changes.push(Change::new(quiet).unless(libc::EAFNOSUPPORT));
        }
        changes.push(Change::new(request));
        Ok((link.index, changes))
    }

    /// The interface with this name, without asking for more than its index and hardware address.
    fn called(&self, name: &str) -> Option<Link> {
        let (index, mac) = sys::interface(self.0.socket(), name).ok()?;
        Some(Link {
            index,
            name: name.to_owned(),
            mac: Some(mac),
            permanent: None,
        })
    }

    /// Has the kernel make all of `changes`.
    pub fn make(&self, changes: &[Change]) -> io::Result<()> {
        self.0.make(changes)
    }

    /// Takes a device down, and with that all its addresses and routes, and its name from it. One that is gone is no error.
    pub fn retire(&self, device: HardwareAddress) -> io::Result<()> {
        let links = self.links()?;
        let Ok(position) = find(&links, device) else {
            return Ok(());
        };
        let index = links[position].index;
        let mut changes = vec![Change::new(Request::new(
            libc::RTM_NEWLINK,
            0,
            &link_fixed(index, 0),
        ))];
        self.0.make(&changes)?;
        changes.clear();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let mut addresses = Vec::new();
            let mut fixed = [0; 8];
            fixed[0] = family as u8;
            let all = Request::new(libc::RTM_GETADDR, libc::NLM_F_DUMP, &fixed);
            self.0.list(all, |_, body| {
                if let Some((fixed, rest)) = body.split_at_checked(8)
                    && fixed[4..] == index.to_ne_bytes()
                {
                    addresses.push((fixed.to_vec(), rest.to_vec()));
                }
            })?;
            for (fixed, rest) in addresses {
                let mut request = Request::new(libc::RTM_DELADDR, 0, &fixed);
                for (kind, value) in attributes(&rest) {
                    if matches!(kind, libc::IFA_LOCAL | libc::IFA_ADDRESS) {
                        request = request.attribute(kind, value);
                    }
                }
                // The kernel's own goes by itself.
                changes.push(Change::new(request).unless(libc::EADDRNOTAVAIL));
            }
        }
        changes.push(rename(index, &format!("{SPARE}{index}")));
        self.0.make(&changes)
    }

    fn links(&self) -> io::Result<Vec<Link>> {
        let mut links = Vec::new();
        let all = Request::new(libc::RTM_GETLINK, libc::NLM_F_DUMP, &[0; LINK])
            .attribute(libc::IFLA_EXT_MASK, &SKIP_STATISTICS.to_ne_bytes());
        self.0.list(all, |_, body| links.extend(read_link(body)))?;
        Ok(links)
    }
}

pub fn add_address(index: i32, address: &Address) -> Change {
    // Routes come by themselves, and who has the address was found out on the host.
    let flags = libc::IFA_F_NOPREFIXROUTE | libc::IFA_F_NODAD;
    let create = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
    let request = address_request(libc::RTM_NEWADDR, create, index, address)
        .attribute(libc::IFA_FLAGS, &flags.to_ne_bytes());
    let broadcast = address.broadcast.map(|broadcast| broadcast.octets());
    let broadcast = broadcast.as_ref().map(<[u8; 4]>::as_slice);
    Change::new(request.maybe(libc::IFA_BROADCAST, broadcast))
}

pub fn remove_address(index: i32, address: &Address) -> Change {
    let request = address_request(libc::RTM_DELADDR, 0, index, address);
    Change::new(request).unless(libc::EADDRNOTAVAIL)
}

pub fn add_route(index: i32, route: &Route) -> Change {
    // There may be another route to the same place, through another interface.
    let create = libc::NLM_F_CREATE | libc::NLM_F_APPEND;
    let request = route_request(libc::RTM_NEWROUTE, create, index, route);
    Change::new(request).unless(libc::EEXIST)
}

pub fn remove_route(index: i32, route: &Route) -> Change {
    // It may have gone with an address.
    let request = route_request(libc::RTM_DELROUTE, 0, index, route);
    Change::new(request).unless(libc::ESRCH)
}

pub fn add_neighbour(index: i32, neighbour: &Neighbour) -> Change {
    let create = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
    Change::new(neighbour_request(
        libc::RTM_NEWNEIGH,
        create,
        index,
        neighbour,
    ))
}

pub fn remove_neighbour(index: i32, neighbour: &Neighbour) -> Change {
    let request = neighbour_request(libc::RTM_DELNEIGH, 0, index, neighbour);
    Change::new(request).unless(libc::ENOENT)
}

fn rename(index: i32, to: &str) -> Change {
    let request = Request::new(libc::RTM_NEWLINK, 0, &link_unchanged(index));
    Change::new(request.attribute(libc::IFLA_IFNAME, &name(to)))
}

fn read_link(body: &[u8]) -> Option<Link> {
    let (fixed, rest) = body.split_at_checked(LINK)?;
    let mut link = Link {
        index: i32::from_ne_bytes(*fixed.get(4..)?.first_chunk()?),
        name: String::new(),
        mac: None,
        permanent: None,
    };
    for (kind, value) in attributes(rest) {
        match kind {
            libc::IFLA_IFNAME => {
                let text = value.strip_suffix(&[0]).unwrap_or(value);
                link.name = String::from_utf8_lossy(text).into_owned();
            }
            libc::IFLA_ADDRESS => link.mac = value.try_into().ok(),
            libc::IFLA_PERM_ADDRESS => link.permanent = value.try_into().ok(),
            _ => {}
        }
    }
    Some(link)
}

/// Where the interface is of the device that came with this address.
fn find(links: &[Link], device: HardwareAddress) -> io::Result<usize> {
    let permanent = links.iter().position(|link| link.permanent == Some(device));
    permanent
        .or_else(|| links.iter().position(|link| link.mac == Some(device)))
        .ok_or_else(|| {
            let [a, b, c, d, e, f] = device;
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("no device came with the hardware address {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}"),
            )
        })
}

/// `struct ifinfomsg`: family, type, index, flags, and which of the flags are meant.
fn link_fixed(index: i32, flags: libc::c_int) -> Vec<u8> {
    link_message(index, flags, libc::IFF_UP)
}

fn link_unchanged(index: i32) -> Vec<u8> {
    link_message(index, 0, 0)
}

fn link_message(index: i32, flags: libc::c_int, meant: libc::c_int) -> Vec<u8> {
    let mut fixed = vec![0; 4];
    for number in [index, flags, meant] {
        fixed.extend(number.to_ne_bytes());
    }
    fixed
}

/// An attribute with one attribute in it.
fn nested(outer: u16, inner: u16, value: &[u8]) -> Vec<u8> {
    let attribute = |kind: u16, value: &[u8]| {
        // Both are a few bytes.
        let length = (4 + value.len()) as u16;
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    };
    attribute(outer, &attribute(inner, value))
}

fn name(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// Behind a `struct ifaddrmsg`: family, prefix, flags, scope, index.
fn address_request(kind: u16, flags: libc::c_int, index: i32, address: &Address) -> Request {
    let mut fixed = vec![family(address.address), address.prefix, 0, 0];
    fixed.extend(index.to_ne_bytes());
    let other = address.peer.unwrap_or(address.address);
    Request::new(kind, flags, &fixed)
        .attribute(libc::IFA_LOCAL, &octets(address.address))
        .attribute(libc::IFA_ADDRESS, &octets(other))
}

/// Behind a `struct rtmsg`: family, prefixes of destination and source, type of service, table, who made it, scope, type, flags.
fn route_request(kind: u16, flags: libc::c_int, index: i32, route: &Route) -> Request {
    let onlink = if route.onlink { ONLINK } else { 0 };
    let mut fixed = vec![
        family(route.destination),
        route.prefix,
        0,
        0,
        libc::RT_TABLE_MAIN,
        libc::RTPROT_STATIC,
        route.scope,
        libc::RTN_UNICAST,
    ];
    fixed.extend(onlink.to_ne_bytes());
    let mut request =
        Request::new(kind, flags, &fixed).attribute(libc::RTA_OIF, &index.to_ne_bytes());
    if route.prefix > 0 {
        request = request.attribute(libc::RTA_DST, &octets(route.destination));
    }
    request = match route.gateway {
        Some(gateway) if family(gateway) == family(route.destination) => {
            request.attribute(libc::RTA_GATEWAY, &octets(gateway))
        }
        // `struct rtvia`: a family, and an address of it.
        Some(gateway) => {
            let mut via = u16::from(family(gateway)).to_ne_bytes().to_vec();
            via.extend(octets(gateway));
            request.attribute(libc::RTA_VIA, &via)
        }
        None => request,
    };
    let source = route.source.map(octets);
    let metric = route.metric.map(u32::to_ne_bytes);
    request = request
        .maybe(libc::RTA_PREFSRC, source.as_deref())
        .maybe(libc::RTA_PRIORITY, metric.as_ref().map(<[u8; 4]>::as_slice));
    match route.mtu {
        Some(mtu) => {
            let mut metrics = 8u16.to_ne_bytes().to_vec();
            metrics.extend(METRIC_MTU.to_ne_bytes());
            metrics.extend(mtu.to_ne_bytes());
            request.attribute(libc::RTA_METRICS, &metrics)
        }
        None => request,
    }
}

/// Behind a `struct ndmsg`: family, padding, index, state, flags, type.
fn neighbour_request(kind: u16, flags: libc::c_int, index: i32, neighbour: &Neighbour) -> Request {
    let mut fixed = vec![family(neighbour.address), 0, 0, 0];
    fixed.extend(index.to_ne_bytes());
    fixed.extend(libc::NUD_PERMANENT.to_ne_bytes());
    fixed.extend([0, 0]);
    Request::new(kind, flags, &fixed)
        .attribute(libc::NDA_DST, &octets(neighbour.address))
        .attribute(libc::NDA_LLADDR, &neighbour.mac)
}
