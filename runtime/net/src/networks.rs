//! cloison's own networks on one host: creating, listing, inspecting and removing them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use ipnet::IpNet;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::{RouteAttribute, RouteType};
use serde::Serialize;

use crate::attach::on_a_thread;
use crate::guest::ip;
use crate::links::Links;
use crate::netlink::Netlink;
use crate::network::Surroundings;
use crate::store::{State, Store};
use crate::{Addresses, Error, Namespace, Network, NetworkSpec, Result, nft};

/// The local table (rtnetlink(7)), in which a route says what is the host's own.
const LOCAL_TABLE: u8 = 255;

/// The networks of one host, which is a network namespace, and of one pair of directories.
#[derive(Debug, Clone)]
pub struct Networks {
    pub(crate) host: Namespace,
    pub(crate) store: Store,
}

/// A network, and who is on it.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// The network.
    #[serde(flatten)]
    pub network: Network,
    /// The addresses of its sandboxes, by their ID.
    pub sandboxes: BTreeMap<String, Addresses>,
}

impl Networks {
    /// The network that sandboxes are on unless they say otherwise. It is created when it is first needed.
    pub const DEFAULT: &str = "bridge";

    /// The networks of `host`. What ends with the host's uptime is kept in `run`, what lasts in `data`; neither needs to exist.
    pub fn new(host: Namespace, run: &Path, data: &Path) -> Self {
        Self {
            host,
            store: Store::new(run, data),
        }
    }

    /// Whether networks can be had in the calling thread's namespace: whether its kernel has what they are made with, nf_tables, and
    /// the caller may use it.
    pub fn available() -> bool {
        nft::available()
    }

    /// Creates a network. Its bridge comes with its first sandbox.
    ///
    /// # Errors
    /// [`Error::NetworkExists`], and those about what `spec` asks for.
    pub async fn create(&self, spec: &NetworkSpec) -> Result<Network> {
        let surroundings = self.surroundings().await?;
        let mut locked = self.store.lock().await?;
        let network = plan(spec, &mut locked.state, &surroundings)?;
        locked.write()?;
        Ok(network)
    }

    /// All networks, by name.
    ///
    /// # Errors
    /// When the state cannot be read.
    pub fn list(&self) -> Result<Vec<Network>> {
        Ok(self.store.read()?.networks.into_values().collect())
    }

    /// A network, and who is on it.
    ///
    /// # Errors
    /// [`Error::NoNetwork`].
    pub fn inspect(&self, name: &str) -> Result<Inspection> {
        let mut state = self.store.read()?;
        let network = state
            .networks
            .remove(name)
            .ok_or_else(|| Error::NoNetwork(name.to_owned()))?;
        let on_it = state
            .sandboxes
            .into_iter()
            .filter(|(_, r)| r.network == name);
        Ok(Inspection {
            network,
            sandboxes: on_it.map(|(id, record)| (id, record.addresses())).collect(),
        })
    }

    /// Removes a network that no sandbox is on.
    ///
    /// # Errors
    /// [`Error::NoNetwork`], [`Error::NetworkInUse`].
    pub async fn remove_network(&self, name: &str) -> Result<()> {
        let mut locked = self.store.lock().await?;
        let network = find(&locked.state, name)?.clone();
        let sandboxes: Vec<_> = on(&locked.state, name).cloned().collect();
        if !sandboxes.is_empty() {
            let name = name.to_owned();
            return Err(Error::NetworkInUse { name, sandboxes });
        }
        let networks = self.clone();
        on_a_thread(move || {
            networks.remove_bridges(&[&network], &locked.state)?;
            locked.state.networks.remove(&network.name);
            locked.write()
        })
        .await
    }

    /// Chains of the administrator's or another program's by which the host forwards nothing that it was not told to, as "FAMILY
    /// TABLE CHAIN". Docker's is one. No rule of cloison's can let through what they drop: somebody has to let the networks' bridges
    /// pass there (`iptables -I DOCKER-USER -i cloison+ -j ACCEPT`, and the same with `-o`).
    ///
    /// # Errors
    /// When the packet filter cannot be read.
    pub async fn obstacles(&self) -> Result<Vec<String>> {
        nft::obstacles(&self.host).await
    }

    /// Puts everything into the packet filter again, after somebody flushed it whole.
    ///
    /// # Errors
    /// When the packet filter refuses.
    pub async fn restore(&self) -> Result<()> {
        let locked = self.store.lock().await?;
        let networks = self.clone();
        on_a_thread(move || {
            networks.host.run(|| {
                let links = Links::open()?;
                let mut rules = nft::Batch::default();
                for network in locked.state.networks.values() {
                    if links.find(&network.bridge())?.is_some() {
                        rules.add_network(network);
                    }
                }
                for (id, record) in &locked.state.sandboxes {
                    rules.add_sandbox(id, record, find(&locked.state, &record.network)?);
                }
                nft::restore(&rules)
            })?
        })
        .await
    }

    /// What there is on the host besides cloison's networks.
    pub(crate) async fn surroundings(&self) -> Result<Surroundings> {
        let netlink = Netlink::connect(&self.host)?;
        let links = netlink.links().await?;
        let mut found = Surroundings::default();
        for route in netlink.routes().await? {
            let header = &route.header;
            let mut destination = None;
            let mut through = None;
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Destination(address) => destination = ip(address),
                    RouteAttribute::Oif(index) => {
                        through = links.iter().find(|link| link.index == *index);
                    }
                    _ => {}
                }
            }
            if header.table == LOCAL_TABLE || header.kind != RouteType::Unicast {
                continue;
            }
            let length = header.destination_prefix_length;
            match destination.and_then(|address| IpNet::new(address, length).ok()) {
                Some(net) if length > 0 => {
                    let name = through.map_or("several interfaces", |link| link.name.as_str());
                    found.routes.push((net, name.to_owned()));
                }
                _ => {
                    found.ipv6 |= header.address_family == AddressFamily::Inet6;
                    if let Some(link) = through {
                        let least = found.mtu.map_or(link.mtu, |mtu| mtu.min(link.mtu));
                        found.mtu = Some(least);
                    }
                }
            }
        }
        Ok(found)
    }
}

/// Plans a network and puts it into `state`.
pub(crate) fn plan(
    spec: &NetworkSpec,
    state: &mut State,
    surroundings: &Surroundings,
) -> Result<Network> {
    let mut random = [0; 7];
    File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut random))
        .map_err(Error::system("read /dev/urandom"))?;
    let network = Network::plan(spec, state, surroundings, random)?;
    state.networks.insert(spec.name.clone(), network.clone());
    Ok(network)
}

pub(crate) fn find<'a>(state: &'a State, name: &str) -> Result<&'a Network> {
    let network = state.networks.get(name);
    network.ok_or_else(|| Error::NoNetwork(name.to_owned()))
}

/// The IDs of the sandboxes on a network.
pub(crate) fn on<'a>(state: &'a State, name: &'a str) -> impl Iterator<Item = &'a String> {
    let sandboxes = state.sandboxes.iter();
    sandboxes.filter_map(move |(id, record)| (record.network == name).then_some(id))
}

#[cfg(test)]
mod tests;
