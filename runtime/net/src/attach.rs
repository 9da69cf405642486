//! Attaching a sandbox to a network: it is written down first, and then made in steps, each of which can be the last that happens.
//! Whichever that is, `detach` finds the record and removes all there is.

use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::OwnedFd;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use rtnetlink::packet_route::route::RouteScope;

use crate::egress::Names;
use crate::links::{Change, Links};
use crate::network::is_name;
use crate::networks::{find, plan};
use crate::sandbox::Record;
use crate::store::State;
use crate::{
    Adopted, Attached, Attachment, Error, GuestAddress, GuestInterface, GuestRoute, Lease, Mac,
    Network, NetworkSpec, Networks, Reservation, Result, nft, ports, sys, sysctl,
};

/// How the sandbox's interface is called in its guest.
const INSIDE: &str = "eth0";
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
        let networks = self.clone();
        on_a_thread(move || {
            let id = lease.id.clone();
            let connected = networks.connect_until(lease, &mut || Ok(()));
            if connected.is_err()
                && let Err(another) = networks.detach_blocking(&id)
            {
                tracing::warn!("cannot clean up after a failure: {another}");
            }
            connected
        })
        .await
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
        self.connect_until(lease, between)
    }

    fn connect_until(&self, lease: Lease, between: Between<'_>) -> Result<Attached> {
        let Lease {
            id,
            addresses,
            names,
            network,
            reservation,
            record,
        } = lease;
        let (index, tap) = self.host.run(|| {
            let links = Links::open()?;
            let bridge = match find_bridge(&links, &network)? {
                Some(index) => index,
                None => {
                    // One at a time: while the kernel loads what bridges are made with for one, it tells others that it has none.
                    let _locked = self.store.lock_blocking()?;
                    make_bridge(&links, &network)?
                }
            };
            between()?;
            // Before there is anybody whom they are about.
            let mut rules = nft::Batch::default();
            rules.add_network(&network);
            rules.add_sandbox(&id, &record, &network);
            nft::add(&rules)?;
            between()?;
            let (index, tap) = make_port(&links, &record)?;
            between()?;
            links.make(&[
                Change::plug_in(index, bridge, network.mtu),
                // A sandbox can come back to itself by way of a port that it publishes.
                Change::hairpin(index),
            ])?;
            Ok((index, tap))
        })??;
        let interface = inside(index, &record, &network);
        Ok(Attached {
            adopted: Adopted { interface, tap },
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
}

/// The index of a network's bridge in the calling thread's namespace, if it has been made whole.
fn find_bridge(links: &Links, network: &Network) -> Result<Option<u32>> {
    let bridge = network.bridge();
    // It is brought up last.
    let link = links.find(&bridge)?.filter(|link| link.up);
    if link.is_some() {
        sysctl::set_up_host(&bridge, network.subnet6.is_some())?;
    }
    Ok(link.map(|link| link.index))
}

/// Makes a network's bridge in the calling thread's namespace, or what is missing of it. Returns its index.
fn make_bridge(links: &Links, network: &Network) -> Result<u32> {
    let bridge = network.bridge();
    links.make(&[Change::add_bridge(network)])?;
    let link = links.find(&bridge)?;
    let index = link
        .ok_or_else(|| Error::NoInterface(bridge.clone()))?
        .index;
    if network.subnet6.is_none() {
        sysctl::silence(&bridge)?;
    }
    sysctl::set_up_host(&bridge, network.subnet6.is_some())?;
    let mut changes: Vec<_> = gateways(network)
        .into_iter()
        .map(|address| Change::add_address(index, address))
        .collect();
    changes.push(Change::set_up(index));
    links.make(&changes)?;
    Ok(index)
}

/// Makes the tap that is to be the sandbox's port, in the calling thread's namespace, and answers its index too. It stays until it is removed:
/// whoever closed one that goes by itself would have to wait for the kernel.
fn make_port(links: &Links, record: &Record) -> Result<(u32, OwnedFd)> {
    let port = record.port();
    let doing = || format!("make the interface {port}");
    let tap = match sys::create_tap(&port) {
        // Left by somebody whose records are gone, too.
        Err(Errno::EBUSY) => {
            links.make(&[Change::remove(&port)])?;
            sys::create_tap(&port)
        }
        made => made,
    };
    let tap = tap.map_err(Error::errno(doing()))?;
    sys::keep_tap(&tap).map_err(Error::errno(doing()))?;
    sysctl::silence(&port)?;
    let index = if_nametoindex(port.as_str()).map_err(Error::errno(doing()))?;
    Ok((index, tap))
}

/// Does what waits for the kernel, and for nothing else, on a thread where it may.
pub(crate) async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| Error::system("finish work on the network")(e.into()))?
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

/// The sandbox's interface in its guest. All others, its network's too, are reached through the host; addresses are not asked for on the
/// cable, for only one can be the sandbox's.
fn inside(index: u32, record: &Record, network: &Network) -> GuestInterface {
    let alone = |address: IpAddr| GuestAddress {
        address,
        prefix: IpNet::from(address).prefix_len(),
        peer: None,
        broadcast: None,
    };
    let ipv4 = std::iter::once((network.gateway().into(), Ipv4Net::default().into()));
    let ipv6 = network
        .gateway6()
        .map(|at| (at.into(), Ipv6Net::default().into()));
    let routes = ipv4
        .chain(ipv6)
        .flat_map(|(gateway, everywhere): (IpAddr, _)| {
            let route = |destination, gateway, scope: RouteScope| GuestRoute {
                destination,
                gateway,
                source: None,
                metric: None,
                scope: scope.into(),
                onlink: false,
                mtu: None,
            };
            [
                route(gateway.into(), None, RouteScope::Link),
                route(everywhere, Some(gateway), RouteScope::Universe),
            ]
        });
    GuestInterface {
        index,
        name: INSIDE.to_owned(),
        mac: record.mac,
        mtu: network.mtu,
        ipv4_only: network.subnet6.is_none(),
        addresses: record.addresses().all().map(alone).collect(),
        routes: routes.collect(),
        neighbours: Vec::new(),
    }
}
