//! What the guest is to be told of one of its interfaces: read from the interface that its caller prepared on the host, in a form
//! that the agent can act on without asking back.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteType,
};
use rtnetlink::packet_route::{AddressFamily, address::AddressMessage};
use serde::{Deserialize, Serialize};

use crate::netlink::{Link, Netlink};
use crate::{Mac, Result};

/// An interface as the guest shall have it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInterface {
    /// Index of the interface on the host, by which later changes to it are known.
    pub index: u32,
    /// Its name, at most 15 bytes.
    pub name: String,
    /// Its hardware address.
    pub mac: Mac,
    /// Most bytes in a packet, frame headers not counted.
    pub mtu: u32,
    /// Whether nobody speaks IPv6 there, so that it has no link-local address either.
    #[serde(default)]
    pub ipv4_only: bool,
    /// Its addresses. They bring no routes of their own (IFA_F_NOPREFIXROUTE): all routes are in `routes`.
    pub addresses: Vec<GuestAddress>,
    /// Its routes in the main table, in an order in which they can be added.
    pub routes: Vec<GuestRoute>,
    /// Its permanent neighbours.
    pub neighbours: Vec<GuestNeighbour>,
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestAddress {
    /// The address.
    pub address: IpAddr,
    /// Length of its prefix, bits.
    pub prefix: u8,
    /// The address of the other end of a point-to-point link.
    pub peer: Option<IpAddr>,
    /// The broadcast address of its subnet.
    pub broadcast: Option<Ipv4Addr>,
}

/// A route through an interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestRoute {
    /// Where it leads: all of an address family for a default route.
    pub destination: IpNet,
    /// The next hop; `None` when the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// The address to send from.
    pub source: Option<IpAddr>,
    /// Its priority: the lower goes first.
    pub metric: Option<u32>,
    /// `rtm_scope` (rtnetlink(7)): 0 is universe, 253 link.
    pub scope: u8,
    /// Whether the gateway is taken for a neighbour though no route says so.
    pub onlink: bool,
    /// Most bytes in a packet that takes this route.
    pub mtu: Option<u32>,
}

/// A neighbour whose hardware address is not asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestNeighbour {
    /// Its address.
    pub address: IpAddr,
    /// Its hardware address.
    pub mac: Mac,
}

/// All that the descriptions of a namespace's interfaces are made from, read at one time.
pub(crate) struct Snapshot {
    pub(crate) links: Vec<Link>,
    addresses: Vec<AddressMessage>,
    routes: Vec<RouteMessage>,
    neighbours: Vec<NeighbourMessage>,
}

impl Snapshot {
    pub(crate) async fn take(netlink: &Netlink) -> Result<Self> {
        Ok(Self {
            links: netlink.links().await?,
            addresses: netlink.addresses().await?,
            routes: netlink.routes().await?,
            neighbours: netlink.neighbours().await?,
        })
    }

    /// Describes an interface with the hardware address `mac`.
    pub(crate) fn describe(&self, link: &Link, mac: Mac) -> GuestInterface {
        let index = link.index;
        let addresses = self.addresses.iter().filter(|a| a.header.index == index);
        let mut routes: Vec<_> = self
            .routes
            .iter()
            .filter_map(|route| read_route(route, index))
            .collect();
        // A gateway can be added only once something says how it is reached.
        routes.sort_by_key(|route| route.gateway.is_some());
        let neighbours = self
            .neighbours
            .iter()
            .filter(|n| n.header.ifindex == index && n.header.state == NeighbourState::Permanent);
        GuestInterface {
            index,
            name: link.name.clone(),
            mac,
            mtu: link.mtu,
            ipv4_only: link.ipv6_disabled,
            addresses: addresses.filter_map(|a| read_address(a, mac)).collect(),
            routes,
            neighbours: neighbours.filter_map(read_neighbour).collect(),
        }
    }
}

/// `None` for an address that the guest's kernel finds by itself: the one made of `mac`, and those made of router advertisements,
/// which reach the guest too.
fn read_address(message: &AddressMessage, mac: Mac) -> Option<GuestAddress> {
    let (mut local, mut remote, mut broadcast) = (None, None, None);
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => remote = Some(*address),
            AddressAttribute::Broadcast(address) => broadcast = Some(*address),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    let address = local.or(remote)?;
    let found_by_itself = match address {
        IpAddr::V4(_) => false,
        IpAddr::V6(address) => {
            address == mac.link_local() || !flags.contains(AddressFlags::Permanent)
        }
    };
    (!found_by_itself).then(|| GuestAddress {
        address,
        prefix: message.header.prefix_len,
        peer: remote.filter(|remote| *remote != address),
        broadcast,
    })
}

/// `None` for a route that is not this interface's, or that the guest's kernel adds by itself.
fn read_route(message: &RouteMessage, index: u32) -> Option<GuestRoute> {
    let header = &message.header;
    if header.table != RouteHeader::RT_TABLE_MAIN || header.kind != RouteType::Unicast {
        return None;
    }
    let mut destination = match header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let mut route = GuestRoute {
        destination: IpNet::default(),
        gateway: None,
        source: None,
        metric: None,
        scope: header.scope.into(),
        onlink: header.flags.contains(RouteFlags::Onlink),
        mtu: None,
    };
    let mut through = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(interface) => through = Some(*interface),
            RouteAttribute::Destination(address) => destination = ip(address)?,
            RouteAttribute::Gateway(address) => route.gateway = ip(address),
            RouteAttribute::PrefSource(address) => route.source = ip(address),
            RouteAttribute::Priority(metric) => route.metric = Some(*metric),
            RouteAttribute::Metrics(metrics) => {
                route.mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    route.destination = IpNet::new(destination, header.destination_prefix_length).ok()?;
    let link_local =
        matches!(route.destination, IpNet::V6(net) if net.addr().is_unicast_link_local());
    (through == Some(index) && !link_local).then_some(route)
}

fn read_neighbour(message: &NeighbourMessage) -> Option<GuestNeighbour> {
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                address = Some(IpAddr::V4(*ip));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                address = Some(IpAddr::V6(*ip));
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = <[u8; 6]>::try_from(bytes.as_slice())
                    .ok()
                    .and_then(|bytes| Mac::new(bytes).ok());
            }
            _ => {}
        }
    }
    Some(GuestNeighbour {
        address: address?,
        mac: mac?,
    })
}

pub(crate) fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}
