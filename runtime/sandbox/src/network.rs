//! A sandbox's network: its guest has the interfaces of a network namespace, as whoever prepared that left them, and as they change.
//! Interfaces that are there before the VM are its own from the start; the others come to it when they come. The namespace
//! and the interfaces in it are the caller's to make and to remove.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::IpAddr;
use std::os::fd::AsFd;

use cloison_agent_api::agent as api;
use cloison_net::{Adopted, Adopter, Change, GuestInterface, Namespace};
use cloison_vmm::{ControlClient, DeviceKind, MacAddress, Nic, Plugged};

use crate::{Agent, Error};

/// The interfaces of a namespace, on their way to a guest or there.
///
/// The order is: [`Network::early`], or not; the VM's launch; [`Network::settle`] when the agent answers; and then, as long as the VM runs,
/// [`Network::follow`]. Before the agent answers nothing is asked of the VM process, which has a template to make, it may be, and answers
/// nobody meanwhile.
#[derive(Default)]
pub struct Network {
    /// `None` when they are all there are.
    adopter: Option<Adopter>,
    /// By their indices on the host.
    interfaces: BTreeMap<u32, Interface>,
    /// Those that were given to the VM at its launch, in that order, until it has said where they are.
    early: Vec<GuestInterface>,
    /// Those that came after the launch and that the VM has not been given.
    arrived: Vec<Adopted>,
}

/// An interface that the guest has.
struct Interface {
    name: String,
    place: Plugged,
    /// The hardware address by which the guest knows its device.
    device: MacAddress,
}

impl Network {
    /// The interfaces of `namespace`. To be called in a tokio runtime.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn new(namespace: &Namespace) -> Result<Self, Error> {
        let adopter = Some(Adopter::new(namespace)?);
        Ok(Self {
            adopter,
            ..Self::default()
        })
    }

    /// One interface, which does not change.
    pub fn of(adopted: Adopted) -> Self {
        Self {
            arrived: vec![adopted],
            ..Self::default()
        }
    }

    async fn changes(&mut self) -> Result<Vec<Change>, Error> {
        match &mut self.adopter {
            Some(adopter) => Ok(adopter.changes().await?),
            None => Ok(Vec::new()),
        }
    }

    /// The interfaces that are there already, for the VM's launch. To be called once; without it all come to a VM that runs.
    ///
    /// # Errors
    /// When there is one that a guest cannot have.
    pub async fn early(&mut self) -> Result<Vec<Nic>, Error> {
        let mut nics = Vec::new();
        for change in self.changes().await? {
            match change {
                Change::Arrived(Adopted { interface, tap }) => {
                    let mac = interface.mac.bytes();
                    nics.push(Nic { tap, mac });
                    self.early.push(interface);
                }
                Change::Refused { name, error } => return Err(refused(name, error)),
                // Nothing was there before.
                Change::Changed(_) | Change::Gone(_) => {}
            }
        }
        Ok(nics)
    }

    /// Waits until there is an interface, which is for [`Network::settle`].
    ///
    /// # Errors
    /// When there is one that the guest cannot have, or the namespace cannot be watched.
    pub async fn arrival(&mut self) -> Result<(), Error> {
        while self.arrived.is_empty() {
            match self.changed().await? {
                Change::Arrived(adopted) => self.arrived.push(adopted),
                Change::Refused { name, error } => return Err(refused(name, error)),
                // Nothing was there before.
                Change::Changed(_) | Change::Gone(_) => {}
            }
        }
        Ok(())
    }

    /// Gives the guest all interfaces there are by now. When it returns, they can be used. May be called again.
    ///
    /// # Errors
    /// When there is one that the guest cannot have.
    pub async fn settle(&mut self, agent: &Agent, vm: &ControlClient) -> Result<(), Error> {
        if !self.early.is_empty() {
            let status = vm
                .status()
                .map_err(control("ask for its network devices"))?;
            for (interface, place) in std::mem::take(&mut self.early).iter().zip(status.nics) {
                self.add(agent, interface, place).await?;
            }
        }
        for adopted in std::mem::take(&mut self.arrived) {
            self.apply(agent, vm, Change::Arrived(adopted)).await?;
        }
        for change in self.changes().await? {
            self.apply(agent, vm, change).await?;
        }
        Ok(())
    }

    /// Has the guest follow what changes, for as long as this is polled. An interface that it cannot have is told of in the log, and the
    /// guest goes on without. May be dropped at any time; one that is under way then may be lost.
    ///
    /// # Errors
    /// When the namespace cannot be watched any more.
    pub async fn follow(&mut self, agent: &Agent, vm: &ControlClient) -> Result<Infallible, Error> {
        loop {
            let change = self.changed().await?;
            if let Err(error) = self.apply(agent, vm, change).await {
                tracing::warn!("{}", chain(&error));
            }
        }
    }

    /// Waits for the next change of the namespace's interfaces, which is for [`Network::apply`]; without a namespace, for ever. Nothing is
    /// lost when the future is dropped.
    ///
    /// # Errors
    /// When the namespace cannot be watched any more.
    pub async fn changed(&mut self) -> Result<Change, Error> {
        match &mut self.adopter {
            Some(adopter) => Ok(adopter.next().await?),
            None => std::future::pending().await,
        }
    }

    /// Brings a change to the guest.
    ///
    /// # Errors
    /// When it cannot have that; it goes on without.
    pub async fn apply(
        &mut self,
        agent: &Agent,
        vm: &ControlClient,
        change: Change,
    ) -> Result<(), Error> {
        match change {
            Change::Arrived(adopted) => {
                let place = plug(vm, &adopted)?;
                self.add(agent, &adopted.interface, place).await
            }
            Change::Changed(interface) => {
                let Some(known) = self.interfaces.get_mut(&interface.index) else {
                    return Ok(());
                };
                known.name.clone_from(&interface.name);
                let message = message(&interface, known.device);
                let configured = agent.configure_interface(&message).await;
                configured
                    .map_err(Error::from)
                    .map_err(in_interface(&interface.name))
            }
            Change::Gone(index) => match self.interfaces.remove(&index) {
                Some(interface) => remove(agent, vm, interface).await,
                None => Ok(()),
            },
            Change::Refused { name, error } => Err(refused(name, error)),
        }
    }

    /// Makes a device that the VM has an interface of the guest's.
    async fn add(
        &mut self,
        agent: &Agent,
        interface: &GuestInterface,
        place: Plugged,
    ) -> Result<(), Error> {
        let device = place.present.unwrap_or(interface.mac.bytes());
        let known = Interface {
            name: interface.name.clone(),
            place,
            device,
        };
        self.interfaces.insert(interface.index, known);
        let message = api::Interface {
            slot: place.present.is_none().then_some(place.slot),
            ..message(interface, device)
        };
        let configured = agent.configure_interface(&message).await;
        configured
            .map_err(Error::from)
            .map_err(in_interface(&interface.name))
    }
}

fn plug(vm: &ControlClient, adopted: &Adopted) -> Result<Plugged, Error> {
    let Adopted { interface, tap } = adopted;
    let mac = interface.mac.bytes();
    let plugged = vm.plug(DeviceKind::Net { mac }, Some(tap.as_fd()));
    plugged
        .map_err(control("plug a network device"))
        .map_err(in_interface(&interface.name))
}

fn unplug(vm: &ControlClient, place: Plugged) -> Result<(), Error> {
    vm.unplug(place.slot)
        .map_err(control("unplug a network device"))
}

async fn remove(agent: &Agent, vm: &ControlClient, interface: Interface) -> Result<(), Error> {
    let removed = async {
        agent.remove_interface(interface.device).await?;
        if interface.place.present.is_none() {
            agent.release_device(interface.place.slot).await?;
        }
        unplug(vm, interface.place)
    };
    removed.await.map_err(in_interface(&interface.name))
}

fn control(what: &'static str) -> impl Fn(cloison_vmm::ControlError) -> Error {
    move |source| Error::Control { what, source }
}

fn refused(name: String, error: cloison_net::Error) -> Error {
    in_interface(&name)(error.into())
}

fn in_interface(name: &str) -> impl FnOnce(Error) -> Error {
    let name = name.to_owned();
    move |source| Error::Interface {
        name,
        source: Box::new(source),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

fn message(interface: &GuestInterface, device: MacAddress) -> api::Interface {
    let addresses = interface.addresses.iter().map(|address| api::Address {
        address: octets(address.address),
        prefix: address.prefix.into(),
        peer: address.peer.map(octets).unwrap_or_default(),
        broadcast: address
            .broadcast
            .map(|broadcast| octets(broadcast.into()))
            .unwrap_or_default(),
        ..Default::default()
    });
    let routes = interface.routes.iter().map(|route| api::Route {
        destination: octets(route.destination.addr()),
        prefix: route.destination.prefix_len().into(),
        gateway: route.gateway.map(octets).unwrap_or_default(),
        source: route.source.map(octets).unwrap_or_default(),
        metric: route.metric,
        scope: route.scope.into(),
        onlink: route.onlink,
        mtu: route.mtu,
        ..Default::default()
    });
    let neighbours = interface.neighbours.iter().map(|neighbour| api::Neighbour {
        address: octets(neighbour.address),
        mac: neighbour.mac.bytes().to_vec(),
        ..Default::default()
    });
    api::Interface {
        device: device.to_vec(),
        name: interface.name.clone(),
        mac: interface.mac.bytes().to_vec(),
        mtu: interface.mtu,
        ipv4_only: interface.ipv4_only,
        addresses: addresses.collect(),
        routes: routes.collect(),
        neighbours: neighbours.collect(),
        ..Default::default()
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}
