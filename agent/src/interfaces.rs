//! The guest's network interfaces: each is a virtio device that gets the name, the addresses and the routes of an interface of the
//! host's, and follows it as that changes. The agent changes only what it has set itself: what a container has added stays.

mod kernel;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use cloison_agent_api::agent as api;
use tokio::sync::Mutex;

use crate::error::{Doing, Error, Result};
use crate::slots;
use kernel::Kernel;

/// Longest name, bytes (IFNAMSIZ, less the zero that ends it).
const MAX_NAME: usize = 15;
/// Most interfaces, and most addresses, routes or neighbours of one.
const MAX_INTERFACES: usize = 64;
const MAX_ENTRIES: usize = 4096;
/// Least and most MTU that Linux knows (RFC 791).
const MTUS: std::ops::RangeInclusive<u32> = 68..=65535;

/// A hardware address.
pub type HardwareAddress = [u8; 6];

/// An interface as it shall be, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// The slot of its device, if the kernel may not have looked there.
    slot: Option<u32>,
    device: HardwareAddress,
    name: String,
    mac: HardwareAddress,
    mtu: u32,
    ipv4_only: bool,
    addresses: Vec<Address>,
    routes: Vec<Route>,
    neighbours: Vec<Neighbour>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Address {
    address: IpAddr,
    prefix: u8,
    peer: Option<IpAddr>,
    broadcast: Option<Ipv4Addr>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Route {
    destination: IpAddr,
    prefix: u8,
    gateway: Option<IpAddr>,
    source: Option<IpAddr>,
    metric: Option<u32>,
    scope: u8,
    onlink: bool,
    mtu: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Neighbour {
    address: IpAddr,
    mac: HardwareAddress,
}

/// Those that have been configured, by their devices. Cheap to clone; every clone is the same.
#[derive(Debug, Clone, Default)]
pub struct Interfaces(Arc<Mutex<HashMap<HardwareAddress, Interface>>>);

impl Interfaces {
    /// Makes the interface what it shall be.
    pub async fn configure(&self, wanted: Interface) -> Result<()> {
        let mut configured = self.0.lock().await;
        if !configured.contains_key(&wanted.device) && configured.len() >= MAX_INTERFACES {
            return Err(Error::TooMany("network interfaces"));
        }
        let mut others = configured.values().filter(|i| i.device != wanted.device);
        if others.any(|other| other.name == wanted.name) {
            return Err(invalid(format!("another is called {}", wanted.name)));
        }
        let before = configured.get(&wanted.device).cloned();
        let name = wanted.name.clone();
        let (set, now) = if configured.is_empty() {
            // The first one of a guest comes before its containers, and takes less time than the start of a thread.
            (set(&wanted, None), wanted)
        } else {
            off_loop(move || {
                let set = set(&wanted, before.as_ref());
                (set, wanted)
            })
            .await?
        };
        // What was set before it failed is to be taken away one day, too, unless there was nothing to set it on.
        if !matches!(&set, Err(error) if error.kind() == io::ErrorKind::NotFound) {
            configured.insert(now.device, now);
        }
        set.doing(|| format!("configuring the network interface {name}"))
    }

    /// Leaves the device without an address, down and out of the way.
    pub async fn remove(&self, device: HardwareAddress) -> Result<()> {
        let mut configured = self.0.lock().await;
        let Some(interface) = configured.remove(&device) else {
            return Ok(());
        };
        let name = interface.name;
        let done = off_loop(move || Kernel::open()?.retire(device)).await?;
        done.doing(|| format!("removing the network interface {name}"))
    }
}

/// Does what may wait for the kernel on a thread of its own.
async fn off_loop<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(io::Error::other)
        .doing(|| "waiting for the kernel".into())
}

fn set(wanted: &Interface, before: Option<&Interface>) -> io::Result<()> {
    if let Some(slot) = wanted.slot {
        slots::take(slot)?;
    }
    let kernel = Kernel::open()?;
    let (index, mut changes) = kernel.set_link(wanted)?;
    if let Some(before) = before {
        // In the order in which they depend on each other.
        let routes = gone(&before.routes, &wanted.routes).rev();
        changes.extend(routes.map(|route| kernel::remove_route(index, route)));
        let addresses = gone(&before.addresses, &wanted.addresses);
        changes.extend(addresses.map(|address| kernel::remove_address(index, address)));
        let neighbours = gone(&before.neighbours, &wanted.neighbours);
        changes.extend(neighbours.map(|neighbour| kernel::remove_neighbour(index, neighbour)));
    }
    let addresses = wanted.addresses.iter();
    changes.extend(addresses.map(|address| kernel::add_address(index, address)));
    let neighbours = wanted.neighbours.iter();
    changes.extend(neighbours.map(|neighbour| kernel::add_neighbour(index, neighbour)));
    let routes = wanted.routes.iter();
    changes.extend(routes.map(|route| kernel::add_route(index, route)));
    kernel.make(&changes)
}

/// What was and shall not be any more.
fn gone<'a, T: PartialEq>(
    before: &'a [T],
    wanted: &'a [T],
) -> impl DoubleEndedIterator<Item = &'a T> {
    before.iter().filter(|entry| !wanted.contains(entry))
}

fn invalid(why: impl Into<String>) -> Error {
    Error::Invalid {
        what: "network interface",
        why: why.into(),
    }
}

/// Reads and checks what the host asks for.
pub fn read(request: &api::Interface) -> Result<Interface> {
    let name = &request.name;
    let nameable = |b: u8| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'%');
    let good = (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(nameable);
    if !good || name == "." || name == ".." || name == "lo" {
        return Err(invalid(format!("{name:?} is no name for one")));
    }
    if !MTUS.contains(&request.mtu) {
        return Err(invalid(format!("an MTU of {} is none", request.mtu)));
    }
    let lengths = [
        request.addresses.len(),
        request.routes.len(),
        request.neighbours.len(),
    ];
    if lengths.iter().any(|length| *length > MAX_ENTRIES) {
        return Err(Error::TooMany("addresses, routes or neighbours"));
    }
    Ok(Interface {
        slot: request.slot,
        device: hardware_address(&request.device)?,
        name: name.clone(),
        mac: hardware_address(&request.mac)?,
        mtu: request.mtu,
        ipv4_only: request.ipv4_only,
        addresses: request
            .addresses
            .iter()
            .map(read_address)
            .collect::<Result<_>>()?,
        routes: request
            .routes
            .iter()
            .map(read_route)
            .collect::<Result<_>>()?,
        neighbours: request
            .neighbours
            .iter()
            .map(read_neighbour)
            .collect::<Result<_>>()?,
    })
}

fn read_address(address: &api::Address) -> Result<Address> {
    let ip = ip(&address.address)?;
    let broadcast = match optional(&address.broadcast, ip)? {
        Some(IpAddr::V4(broadcast)) => Some(broadcast),
        Some(IpAddr::V6(_)) => return Err(invalid("IPv6 has no broadcast addresses")),
        None => None,
    };
    Ok(Address {
        address: ip,
        prefix: prefix(address.prefix, ip)?,
        peer: optional(&address.peer, ip)?,
        broadcast,
    })
}

fn read_route(route: &api::Route) -> Result<Route> {
    let destination = ip(&route.destination)?;
    let scope = u8::try_from(route.scope);
    Ok(Route {
        destination,
        prefix: prefix(route.prefix, destination)?,
        // An IPv4 route can go by way of an IPv6 neighbour.
        gateway: match &route.gateway[..] {
            [] => None,
            gateway => Some(ip(gateway)?),
        },
        source: optional(&route.source, destination)?,
        metric: route.metric,
        scope: scope.map_err(|_| invalid(format!("a route's scope is {}", route.scope)))?,
        onlink: route.onlink,
        mtu: route.mtu,
    })
}

fn read_neighbour(neighbour: &api::Neighbour) -> Result<Neighbour> {
    Ok(Neighbour {
        address: ip(&neighbour.address)?,
        mac: hardware_address(&neighbour.mac)?,
    })
}

/// Reads the address of one interface: neither a group's nor all zeroes.
pub fn hardware_address(bytes: &[u8]) -> Result<HardwareAddress> {
    match HardwareAddress::try_from(bytes) {
        Ok(address) if address[0] & 1 == 0 && address != [0; 6] => Ok(address),
        _ => Err(invalid(format!("{bytes:x?} is no hardware address of one"))),
    }
}

fn ip(bytes: &[u8]) -> Result<IpAddr> {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Ok(bytes.into());
    }
    match <[u8; 16]>::try_from(bytes) {
        Ok(bytes) => Ok(bytes.into()),
        Err(_) => Err(invalid(format!(
            "an IP address has 4 or 16 bytes, not {}",
            bytes.len()
        ))),
    }
}

/// An address of the same family as `with`, or none.
fn optional(bytes: &[u8], with: IpAddr) -> Result<Option<IpAddr>> {
    if bytes.is_empty() {
        return Ok(None);
    }
    match ip(bytes)? {
        address if address.is_ipv4() == with.is_ipv4() => Ok(Some(address)),
        address => Err(invalid(format!("{address} does not go with {with}"))),
    }
}

fn prefix(bits: u32, of: IpAddr) -> Result<u8> {
    let most = if of.is_ipv4() { 32 } else { 128 };
    match u8::try_from(bits) {
        Ok(bits) if bits <= most => Ok(bits),
        _ => Err(invalid(format!("{of} has no prefix of {bits} bits"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> api::Interface {
        let address = api::Address {
            address: vec![10, 0, 0, 2],
            prefix: 24,
            broadcast: vec![10, 0, 0, 255],
            ..Default::default()
        };
        let route = api::Route {
            destination: vec![0; 4],
            gateway: vec![10, 0, 0, 1],
            ..Default::default()
        };
        let neighbour = api::Neighbour {
            address: vec![10, 0, 0, 1],
            mac: vec![2, 0, 0, 0, 0, 9],
            ..Default::default()
        };
        api::Interface {
            device: vec![2, 0, 0, 0, 0, 1],
            name: "eth0".into(),
            mac: vec![2, 0, 0, 0, 0, 2],
            mtu: 1500,
            addresses: vec![address],
            routes: vec![route],
            neighbours: vec![neighbour],
            ..Default::default()
        }
    }

    #[test]
    fn an_ordinary_interface_is_read() {
        let interface = read(&request()).unwrap();
        assert_eq!(interface.addresses[0].prefix, 24);
        assert_eq!(interface.routes[0].gateway, Some([10, 0, 0, 1].into()));
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_reason() {
        type Change = fn(&mut api::Interface);
        let changes: &[(Change, &str)] = &[
            (|i| i.name = String::new(), "no name"),
            (|i| i.name = "..".into(), "no name"),
            (|i| i.name = "lo".into(), "no name"),
            (|i| i.name = "a/b".into(), "no name"),
            (|i| i.name = "a b".into(), "no name"),
            (|i| i.name = "eth%d".into(), "no name"),
            (|i| i.name = "sixteen-bytes-xx".into(), "no name"),
            (|i| i.mtu = 0, "MTU"),
            (|i| i.mtu = 65536, "MTU"),
            (|i| i.device = vec![], "hardware address"),
            (|i| i.device = vec![1; 6], "hardware address"),
            (|i| i.mac = vec![0; 6], "hardware address"),
            (|i| i.mac = vec![2; 7], "hardware address"),
            (|i| i.addresses[0].address = vec![1; 5], "4 or 16 bytes"),
            (|i| i.addresses[0].prefix = 33, "no prefix of 33"),
            (|i| i.addresses[0].peer = vec![0; 16], "does not go with"),
            (|i| i.addresses[0].broadcast = vec![1], "4 or 16 bytes"),
            (
                |i| {
                    i.addresses[0].address = vec![0; 16];
                    i.addresses[0].broadcast = vec![0; 16];
                },
                "no broadcast",
            ),
            (|i| i.routes[0].destination = vec![], "4 or 16 bytes"),
            (|i| i.routes[0].prefix = 256, "no prefix of 256"),
            (|i| i.routes[0].source = vec![0; 16], "does not go with"),
            (|i| i.routes[0].scope = 256, "scope is 256"),
            (|i| i.neighbours[0].mac = vec![3; 6], "hardware address"),
            (
                |i| i.neighbours = vec![i.neighbours[0].clone(); 5000],
                "too many",
            ),
        ];
        for (change, why) in changes {
            let mut request = request();
            change(&mut request);
            let error = read(&request).unwrap_err().to_string();
            assert!(error.contains(why), "{error} instead of {why}");
        }
    }
}
