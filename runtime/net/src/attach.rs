//! Attaching a sandbox to a network: it is written down first, and then made in steps, each of which can be the last that happens.
//! Whichever that is, `detach` finds the record and removes all there is.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use nix::net::if_::if_nametoindex;
use rtnetlink::packet_route::link::{InfoData, InfoVeth};
use rtnetlink::{LinkBridge, LinkBridgePort, LinkUnspec, LinkVeth};

use crate::egress::Names;
use crate::netlink::Netlink;
use crate::network::is_name;
use crate::networks::{find, if_missing, plan};
use crate::sandbox::Record;
use crate::store::State;
use crate::{
    Attached, Attachment, Error, Lease, Mac, Namespace, Network, NetworkSpec, Networks,
    Reservation, Result, nft, ports, sysctl,
};

/// How the sandbox's interface is called inside.
const INSIDE: &str = "eth0";
/// The index of every namespace's loopback interface (the kernel's LOOPBACK_IFINDEX).
const LOOPBACK: u32 = 1;
/// Longest ID of a sandbox, bytes.
const MAX_ID: usize = 128;

/// Called after each step; when it fails, the rest is not done and nothing is undone. Tests stop there, as a killed process would.
pub(crate) type Between<'a> = &'a mut (dyn FnMut() -> Result<()> + Send);

impl Networks {
    /// Leases a sandbox its addresses and ports on a network, the first of the two steps of putting it there: whatever it asks for and
    /// cannot have is an error here. When it fails, nothing is left of it; otherwise [`Networks::detach`] ends the lease.
    ///
    /// # Errors
    /// [`Error`] of what `wanted` asks for and cannot have.
    pub async fn lease(&self, wanted: &Attachment) -> Result<Lease> {
        let mut names = Names::new();
        if let Some(egress) = &wanted.egress {
            egress.resolve(&mut names).await?;
        }
        let (record, network, reservation) = self.write_down(wanted, names).await?;
        Ok(Lease {
            id: wanted.id.clone(),
            addresses: record.addresses(),
            names: record.names.clone(),
            network,
            reservation,
            record,
        })
    }

    /// Connects a sandbox to the network it has a lease on. When it fails, nothing is left of it, the lease included.
    ///
    /// # Errors
    /// [`Error`] of what the host refuses.
    pub async fn connect(&self, lease: Lease) -> Result<Attached> {
        let id = lease.id.clone();
        let connected = self.connect_until(lease, &mut || Ok(())).await;
        if connected.is_err()
            && let Err(another) = self.detach(&id).await
        {
            tracing::warn!("cannot clean up after a failure: {another}");
        }
        connected
    }

    /// Puts a sandbox on a network: [`Networks::lease`] and [`Networks::connect`].
    ///
    /// # Errors
    /// Theirs.
    pub async fn attach(&self, wanted: &Attachment) -> Result<Attached> {
        self.connect(self.lease(wanted).await?).await
    }

    #[cfg(test)]
    pub(crate) async fn attach_until(
        &self,
        wanted: &Attachment,
        between: Between<'_>,
    ) -> Result<Attached> {
        let lease = self.lease(wanted).await?;
        between()?;
        self.connect_until(lease, between).await
    }

    async fn connect_until(&self, lease: Lease, between: Between<'_>) -> Result<Attached> {
        let Lease {
            id,
            addresses,
            names,
            network,
            reservation,
            record,
        } = lease;
        let netlink = Netlink::connect(&self.host)?;
        let bridge = self.make_bridge(&netlink, &network).await?;
        between()?;
        let namespace = match &record.namespace {
            Some(path) => Namespace::persistent(path)?,
            None => Namespace::anonymous()?,
        };
        between()?;
        // Before there is anybody whom they are about.
        let mut rules = nft::Batch::default();
        rules.add_network(&network);
        rules.add_sandbox(&id, &record, &network);
        nft::add(&self.host, rules).await?;
        between()?;
        self.lay_cable(&netlink, &namespace, &record, (bridge, &network))
            .await?;
        between()?;
        configure(&namespace, &record, &network).await?;
        Ok(Attached {
            namespace,
            reservation,
            addresses,
            names,
            network,
        })
    }

    /// Chooses what is to be chosen, and writes the sandbox down. When all addresses are taken, those of sandboxes that are gone are
    /// reclaimed first.
    async fn write_down(
        &self,
        wanted: &Attachment,
        names: Names,
    ) -> Result<(Record, Network, Reservation)> {
        let known = self.store.read()?.networks.contains_key(&wanted.network);
        let surroundings = match known || wanted.network != Self::DEFAULT {
            true => None,
            false => Some(self.surroundings().await?),
        };
        for reclaimed in [false, true] {
            let mut locked = self.store.lock().await?;
            let state = &mut locked.state;
            if let Some(surroundings) = &surroundings
                && !state.networks.contains_key(Self::DEFAULT)
            {
                let spec = NetworkSpec {
                    name: Self::DEFAULT.to_owned(),
                    ..NetworkSpec::default()
                };
                plan(&spec, state, surroundings)?;
            }
            match choose(wanted, names.clone(), state) {
                Err(Error::Exhausted(_)) if !reclaimed => {
                    drop(locked);
                    self.prune().await?;
                }
                chosen => {
                    let (record, network) = chosen?;
                    // What is there is somebody else's, and must not be taken for this sandbox's when that is removed.
                    if let Some(path) = record.namespace.as_ref().filter(|path| path.exists()) {
                        let what = format!("make the network namespace {}", path.display());
                        return Err(Error::system(what)(ErrorKind::AlreadyExists.into()));
                    }
                    let ipv6 = network.subnet6.is_some();
                    let reservation = ports::reserve(&self.host, &record.publish, ipv6)?;
                    let id = wanted.id.clone();
                    locked.state.sandboxes.insert(id, record.clone());
                    locked.write()?;
                    return Ok((record, network, reservation));
                }
            }
        }
        Err(Error::Exhausted(wanted.network.clone()))
    }

    /// Makes a network's bridge, or makes sure of it. Returns its index.
    async fn make_bridge(&self, netlink: &Netlink, network: &Network) -> Result<u32> {
        let bridge = network.bridge();
        // It is brought up last.
        if let Some(link) = netlink.link(&bridge).await?.filter(|link| link.up) {
            sysctl::set_up_host(&self.host, &bridge, network.subnet6.is_some())?;
            return Ok(link.index);
        }
        let doing = format!("make the bridge {bridge}");
        // Ports forward at once: there is no loop to look for. Multicast goes everywhere, which is to the host.
        let message = LinkBridge::new(&bridge)
            .mcast_snooping(false)
            .address(network.mac().bytes().to_vec())
            .mtu(network.mtu)
            .build();
        let made = netlink.raw().link().add(message).execute().await;
        if_missing(made.map_err(Error::netlink(doing)))?;
        let index = netlink.index(&bridge).await?;
        sysctl::set_up_host(&self.host, &bridge, network.subnet6.is_some())?;
        for address in gateways(network) {
            netlink.add_address(index, address).await?;
        }
        netlink.set_up(index).await?;
        Ok(index)
    }

    /// Connects the bridge with the namespace.
    async fn lay_cable(
        &self,
        netlink: &Netlink,
        namespace: &Namespace,
        record: &Record,
        (bridge, network): (u32, &Network),
    ) -> Result<()> {
        let port = record.port();
        let doing = || format!("make the interface {port}");
        let inside = LinkUnspec::new_with_name(INSIDE)
            .address(record.mac.bytes().to_vec())
            .mtu(network.mtu)
            .setns_by_fd(namespace.as_fd().as_raw_fd())
            .build();
        let message = LinkVeth::new(&port, INSIDE)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(inside)))
            .mtu(network.mtu)
            .controller(bridge)
            .build();
        let make = || netlink.raw().link().add(message.clone()).execute();
        let mut made = make().await.map_err(Error::netlink(doing()));
        if made
            .as_ref()
            .is_err_and(|e| e.os_error() == Some(libc::EEXIST))
        {
            // Left by somebody whose records are gone, too.
            netlink.remove_link(&port).await?;
            made = make().await.map_err(Error::netlink(doing()));
        }
        made?;
        let index = self.host.run(|| {
            sysctl::silence(&port)?;
            if_nametoindex(port.as_str()).map_err(Error::errno(doing()))
        })??;
        // A sandbox can come back to itself by way of a port that it publishes.
        let message = LinkBridgePort::new(index).hairpin(true).up().build();
        let set = netlink.raw().link().set_port(message).execute().await;
        set.map_err(Error::netlink(doing()))
    }
}

/// The host's addresses on a network.
fn gateways(network: &Network) -> Vec<IpNet> {
    let ipv4 = Ipv4Net::new_assert(network.gateway(), network.subnet.prefix_len());
    let ipv6 = network
        .gateway6()
        .zip(network.subnet6)
        .map(|(address, subnet)| Ipv6Net::new_assert(address, subnet.prefix_len()).into());
    std::iter::once(ipv4.into()).chain(ipv6).collect()
}

/// What of `state` the sandbox can have of what it wants.
fn choose(wanted: &Attachment, names: Names, state: &State) -> Result<(Record, Network)> {
    if !is_name(&wanted.id, MAX_ID) {
        return Err(Error::SandboxId(wanted.id.chars().take(MAX_ID).collect()));
    }
    if state.sandboxes.contains_key(&wanted.id) {
        return Err(Error::SandboxExists(wanted.id.clone()));
    }
    let network = find(state, &wanted.network)?.clone();
    let address = network.lease(wanted.address, state)?;
    let mac = wanted.mac.unwrap_or(Mac::of(address));
    for (id, record) in &state.sandboxes {
        if record.mac == mac {
            let (mac, why) = (mac.to_string(), format!("it is the sandbox {id}'s"));
            return Err(Error::Mac { mac, why });
        }
        for (ours, theirs) in wanted
            .publish
            .iter()
            .flat_map(|ours| record.publish.iter().map(move |theirs| (ours, theirs)))
        {
            if let Some(port) = ours.conflict(theirs) {
                return Err(Error::PortInUse {
                    port: format!("{port}/{}", ours.protocol),
                    owner: Some(format!("the sandbox {id}")),
                });
            }
        }
    }
    check_publications(wanted, &network)?;
    let in_use = |index: &u32| state.sandboxes.values().any(|r| r.index == *index);
    let record = Record {
        index: (0..).find(|index| !in_use(index)).unwrap_or(u32::MAX),
        network: network.name.clone(),
        home: wanted.home.clone(),
        namespace: wanted.namespace.clone(),
        address,
        address6: network.address6(address),
        mac,
        publish: wanted.publish.clone(),
        egress: wanted.egress.clone(),
        names,
    };
    Ok((record, network))
}

/// What a sandbox publishes must not conflict with itself, nor want an address family that its network lacks.
fn check_publications(wanted: &Attachment, network: &Network) -> Result<()> {
    for (position, publication) in wanted.publish.iter().enumerate() {
        let invalid = |why| Error::Syntax {
            what: "the published port",
            given: publication.to_string(),
            why,
        };
        let mut others = wanted.publish[..position].iter();
        if others.any(|other| publication.conflict(other).is_some()) {
            return Err(invalid("a port of it is published twice"));
        }
        if publication.address.is_some_and(|a| a.is_ipv6()) && network.subnet6.is_none() {
            return Err(invalid("the network has no IPv6"));
        }
        if publication.address == Some(IpAddr::V6(Ipv6Addr::LOCALHOST)) {
            return Err(invalid(
                "IPv6 has no way from the host's loopback address to a sandbox; use 127.0.0.1",
            ));
        }
    }
    Ok(())
}

/// Gives the sandbox's end of its cable its addresses. All others, its network's too, are reached through the host.
async fn configure(namespace: &Namespace, record: &Record, network: &Network) -> Result<()> {
    let netlink = Netlink::connect(namespace)?;
    netlink.set_up(LOOPBACK).await?;
    let index = netlink.index(INSIDE).await?;
    // Addresses are not asked for on the cable: only one can be the sandbox's.
    for address in record.addresses().all() {
        netlink.add_address(index, address.into()).await?;
    }
    netlink.set_up(index).await?;
    let everywhere = Ipv4Net::default().into();
    let everywhere6 = Ipv6Net::default().into();
    let ipv4 = std::iter::once((network.gateway().into(), everywhere));
    let ipv6 = network.gateway6().map(|at| (at.into(), everywhere6));
    for (gateway, everywhere) in ipv4.chain(ipv6) {
        netlink.add_route(index, IpNet::from(gateway), None).await?;
        netlink.add_route(index, everywhere, Some(gateway)).await?;
    }
    Ok(())
}
