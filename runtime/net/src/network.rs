//! Networks of cloison's own: what one is, and choosing and checking its addresses. A network is a bridge on the host, made when its
//! first sandbox comes and removed when its last one has gone.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::store::State;
use crate::{Error, Mac, Result};

/// Subnets that nobody asked for come from here. It is private (RFC 1918) and apart from what Docker, podman and Kubernetes' usual
/// plugins take.
const POOL: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 192, 0, 0), 10);
/// Length of the prefix of such a subnet, bits: 4093 sandboxes.
const POOL_PREFIX: u8 = 20;
/// Longest prefix with room for four addresses: the network's, the host's, one sandbox's and the broadcast address.
const LONGEST_PREFIX: u8 = 30;
/// Length of the prefix of an IPv6 subnet, bits.
const PREFIX6: u8 = 64;
/// Least MTU of IPv4 (RFC 791) and of IPv6 (RFC 8200 §5), and the most that an interface takes.
const LEAST_MTU: u32 = 68;
const LEAST_MTU6: u32 = 1280;
const MOST_MTU: u32 = 65535;
/// Longest name, bytes.
const MAX_NAME: usize = 63;

/// What a network shall be. What is `None` is chosen.
#[derive(Debug, Clone, Default)]
pub struct NetworkSpec {
    /// Its name.
    pub name: String,
    /// Its IPv4 subnet.
    pub subnet: Option<Ipv4Net>,
    /// Its IPv6 subnet, of 64 bits; when none is given, a unique local one (RFC 4193) if `ipv6`.
    pub subnet6: Option<Ipv6Net>,
    /// Whether it has IPv6; by default, if the host has a default IPv6 route.
    pub ipv6: Option<bool>,
    /// Most bytes in a packet; by default, what the host's default route allows.
    pub mtu: Option<u32>,
}

/// A network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its name.
    pub name: String,
    /// Its number, which its bridge is named by.
    pub(crate) index: u32,
    /// Its IPv4 subnet, of which the host has the first address.
    pub subnet: Ipv4Net,
    /// Its IPv6 subnet, of which the host has the first address.
    pub subnet6: Option<Ipv6Net>,
    /// Most bytes in a packet.
    pub mtu: u32,
}

/// What matters of the host when a network is made.
#[derive(Debug, Clone, Default)]
pub(crate) struct Surroundings {
    /// Where each route leads that is not a default route, and through which interface.
    pub(crate) routes: Vec<(IpNet, String)>,
    /// The MTU of the interface of the default route.
    pub(crate) mtu: Option<u32>,
    /// Whether there is a default IPv6 route.
    pub(crate) ipv6: bool,
}

impl Network {
    /// The name of its bridge on the host.
    pub fn bridge(&self) -> String {
        format!("cloison{}", self.index)
    }

    /// The host's address on it, which is the sandboxes' way out.
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.subnet.network()) + 1)
    }

    /// The host's IPv6 address on it.
    pub fn gateway6(&self) -> Option<Ipv6Addr> {
        let first = |subnet: Ipv6Net| Ipv6Addr::from(u128::from(subnet.network()) + 1);
        self.subnet6.map(first)
    }

    /// The hardware address of its bridge, which else would change with every port.
    pub(crate) fn mac(&self) -> Mac {
        Mac::of(self.gateway())
    }

    /// The IPv6 address that goes with an IPv4 address: the same number in its subnet.
    pub(crate) fn address6(&self, address: Ipv4Addr) -> Option<Ipv6Addr> {
        let host = u32::from(address) - u32::from(self.subnet.network());
        let within =
            |subnet: Ipv6Net| Ipv6Addr::from(u128::from(subnet.network()) + u128::from(host));
        self.subnet6.map(within)
    }

    /// Makes `spec` a network that fits among `state`'s and into the host's surroundings. `random` makes an IPv6 subnet unique.
    pub(crate) fn plan(
        spec: &NetworkSpec,
        state: &State,
        host: &Surroundings,
        random: [u8; 7],
    ) -> Result<Self> {
        check_name(&spec.name)?;
        if state.networks.contains_key(&spec.name) {
            return Err(Error::NetworkExists(spec.name.clone()));
        }
        let taken = || taken(state, host);
        let subnet = match spec.subnet {
            Some(subnet) => {
                check_subnet(subnet)?;
                check_free(subnet.into(), &taken())?;
                subnet
            }
            None => {
                let taken = taken();
                let mut candidates = subnets(POOL);
                candidates
                    .find(|candidate| check_free((*candidate).into(), &taken).is_ok())
                    .ok_or(Error::NoSubnet(POOL.into()))?
            }
        };
        let wants_ipv6 = spec.ipv6.unwrap_or(host.ipv6 || spec.subnet6.is_some());
        let subnet6 = match spec.subnet6 {
            Some(subnet) if wants_ipv6 => {
                check_subnet6(subnet)?;
                check_free(subnet.into(), &taken())?;
                Some(subnet)
            }
            None if wants_ipv6 => Some(unique_local(random)),
            _ => None,
        };
        let mtu = spec.mtu.or(host.mtu).unwrap_or(1500);
        check_mtu(mtu, subnet6.is_some())?;
        let in_use = |index: &u32| state.networks.values().any(|n| n.index == *index);
        let index = (0..).find(|index| !in_use(index)).unwrap_or(u32::MAX);
        Ok(Self {
            name: spec.name.clone(),
            index,
            subnet,
            subnet6,
            mtu,
        })
    }

    /// Chooses an address for a sandbox: the one that is wanted, or the lowest that is free.
    pub(crate) fn lease(&self, wanted: Option<Ipv4Addr>, state: &State) -> Result<Ipv4Addr> {
        let leased: std::collections::BTreeMap<Ipv4Addr, &String> = state
            .sandboxes
            .iter()
            .filter(|(_, record)| record.network == self.name)
            .map(|(id, record)| (record.address, id))
            .collect();
        let Some(wanted) = wanted else {
            // The network's own address and the host's come first.
            let mut hosts = self.subnet.hosts().skip(1);
            return hosts
                .find(|address| !leased.contains_key(address))
                .ok_or_else(|| Error::Exhausted(self.name.clone()));
        };
        let in_use = |owner: String| Error::AddressInUse {
            address: wanted.into(),
            owner,
        };
        let ends = [self.subnet.network(), self.subnet.broadcast()];
        if !self.subnet.contains(&wanted) || ends.contains(&wanted) {
            return Err(Error::AddressOutside {
                address: wanted.into(),
                subnet: self.subnet.into(),
            });
        }
        if wanted == self.gateway() {
            return Err(in_use("the host".to_owned()));
        }
        match leased.get(&wanted) {
            Some(id) => Err(in_use(format!("the sandbox {id}"))),
            None => Ok(wanted),
        }
    }
}

fn subnets(pool: Ipv4Net) -> impl Iterator<Item = Ipv4Net> {
    // Both prefixes are constants, the second the longer.
    pool.subnets(POOL_PREFIX).into_iter().flatten()
}

/// Everything that a subnet must not overlap, in words.
fn taken(state: &State, host: &Surroundings) -> Vec<(IpNet, String)> {
    let networks = state.networks.values().flat_map(|network| {
        let nets = [Some(network.subnet.into()), network.subnet6.map(IpNet::V6)];
        let words = format!("the network {}", network.name);
        nets.into_iter()
            .flatten()
            .map(move |net| (net, format!("{words} ({net})")))
    });
    let routes = host
        .routes
        .iter()
        .map(|(net, through)| (*net, format!("the host's route to {net} through {through}")));
    networks.chain(routes).collect()
}

fn check_free(subnet: IpNet, taken: &[(IpNet, String)]) -> Result<()> {
    // Two subnets overlap when one holds the other.
    let overlaps = |net: &IpNet| net.contains(&subnet) || subnet.contains(net);
    match taken.iter().find(|(net, _)| overlaps(net)) {
        Some((_, with)) => Err(Error::Overlap {
            subnet,
            with: with.clone(),
        }),
        None => Ok(()),
    }
}

fn check_name(name: &str) -> Result<()> {
    if is_name(name, MAX_NAME) {
        Ok(())
    } else {
        let name = name.chars().take(MAX_NAME).collect();
        Err(Error::NetworkName(name))
    }
}

/// Whether a string can be put into a file name, a message and a packet filter's script.
pub(crate) fn is_name(text: &str, max: usize) -> bool {
    let starts_well = text
        .bytes()
        .next()
        .is_some_and(|b| b.is_ascii_alphanumeric());
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    starts_well && text.len() <= max && text.bytes().all(allowed)
}

fn check_subnet(subnet: Ipv4Net) -> Result<()> {
    let address = subnet.network();
    let why = if subnet.trunc() != subnet {
        "it has bits set after its prefix"
    } else if subnet.prefix_len() > LONGEST_PREFIX {
        "it has no room for the host and a sandbox"
    } else if subnet.prefix_len() < 8 {
        "it is larger than any private network"
    } else if address.is_loopback() || address.is_multicast() || address.octets()[0] == 0 {
        "its addresses are not for hosts"
    } else {
        return Ok(());
    };
    Err(Error::Subnet {
        subnet: subnet.into(),
        why,
    })
}

fn check_subnet6(subnet: Ipv6Net) -> Result<()> {
    let address = subnet.network();
    let why = if subnet.trunc() != subnet {
        "it has bits set after its prefix"
    } else if subnet.prefix_len() != PREFIX6 {
        "an IPv6 network has a prefix of 64 bits"
    } else if address.is_loopback() || address.is_multicast() || address.is_unicast_link_local() {
        "its addresses are not for hosts"
    } else {
        return Ok(());
    };
    Err(Error::Subnet {
        subnet: subnet.into(),
        why,
    })
}

fn check_mtu(mtu: u32, ipv6: bool) -> Result<()> {
    let why = if mtu < LEAST_MTU {
        "IPv4 needs at least 68"
    } else if mtu < LEAST_MTU6 && ipv6 {
        "IPv6 needs at least 1280; give more, or a network without IPv6"
    } else if mtu > MOST_MTU {
        "no interface takes more than 65535"
    } else {
        return Ok(());
    };
    Err(Error::Mtu { mtu, why })
}

/// A subnet that nobody else is likely to have (RFC 4193 §3.2): 40 random bits, and 16 for the subnet.
fn unique_local(random: [u8; 7]) -> Ipv6Net {
    let mut bytes = [0; 16];
    bytes[0] = 0xfd;
    bytes[1..8].copy_from_slice(&random);
    Ipv6Net::new_assert(bytes.into(), PREFIX6)
}

/// Parses what a person gives as a network's subnet: either family.
///
/// # Errors
/// [`Error::Syntax`].
pub fn parse_subnet(text: &str) -> Result<IpNet> {
    text.parse().map_err(|_| Error::Syntax {
        what: "the subnet",
        given: text.to_owned(),
        why: "give an address and the length of its prefix, like 10.1.0.0/16",
    })
}

#[cfg(test)]
mod tests;
