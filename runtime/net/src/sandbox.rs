//! A sandbox on one of cloison's networks: what its caller asks for, and what is written down of it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::egress::Names;
use crate::{Adopted, Egress, Mac, Network, Publication, Reservation};

/// What a sandbox asks for when it is attached to a network.
#[derive(Debug, Clone)]
pub struct Attachment {
    /// Its ID.
    pub id: String,
    /// The sandbox's directory. Once that is gone the sandbox is taken to be gone, and its addresses may be given to another.
    pub home: PathBuf,
    /// The network's name.
    pub network: String,
    /// The address it wants; any when `None`.
    pub address: Option<Ipv4Addr>,
    /// The hardware address it wants; one made of its address when `None`.
    pub mac: Option<Mac>,
    /// Ports of the host that lead to it.
    pub publish: Vec<Publication>,
    /// What it may connect to; everything when `None`.
    pub egress: Option<Egress>,
}

/// What a sandbox has been promised on a network, and is not connected to yet.
#[derive(Debug)]
pub struct Lease {
    pub(crate) id: String,
    /// Its addresses.
    pub addresses: Addresses,
    /// The addresses of the names in its egress policy.
    pub names: Names,
    /// The network.
    pub network: Network,
    pub(crate) reservation: Reservation,
    pub(crate) record: Record,
}

impl Lease {
    /// The sandbox whose it is.
    pub fn id(&self) -> &str {
        &self.id
    }
}

/// A sandbox on a network.
#[derive(Debug)]
pub struct Attached {
    /// Its interface, a port of its network's bridge. The tap stays when it is closed, until the sandbox is detached.
    pub adopted: Adopted,
    /// The host's ports that are published. To be held as long as the sandbox lives.
    pub reservation: Reservation,
    /// Its addresses.
    pub addresses: Addresses,
    /// The addresses of the names in its egress policy, for its `/etc/hosts`: a policy does not let it ask a name server
    /// unless it says so.
    pub names: Names,
    /// The network it is on.
    pub network: Network,
}

/// A sandbox's addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    /// IPv4.
    pub ipv4: Ipv4Addr,
    /// IPv6, if its network has it.
    pub ipv6: Option<Ipv6Addr>,
    /// Its interface's.
    pub mac: Mac,
}

impl Addresses {
    /// Its IP addresses.
    pub fn all(&self) -> impl Iterator<Item = IpAddr> {
        let ipv6 = self.ipv6.map(IpAddr::V6);
        std::iter::once(IpAddr::V4(self.ipv4)).chain(ipv6)
    }
}

/// What is written down of a sandbox before anything is made for it: enough to find and remove all of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Names its interface on the host and its chain in the packet filter; nobody else has it.
    pub(crate) index: u32,
    pub(crate) network: String,
    pub(crate) home: PathBuf,
    pub(crate) address: Ipv4Addr,
    pub(crate) address6: Option<Ipv6Addr>,
    pub(crate) mac: Mac,
    pub(crate) publish: Vec<Publication>,
    pub(crate) egress: Option<Egress>,
    pub(crate) names: Names,
}

impl Record {
    /// Its port of the bridge.
    pub(crate) fn port(&self) -> String {
        format!("clv{}", self.index)
    }

    pub(crate) fn addresses(&self) -> Addresses {
        Addresses {
            ipv4: self.address,
            ipv6: self.address6,
            mac: self.mac,
        }
    }

    #[cfg(test)]
    pub(crate) fn example(index: u32, network: &str, address: Ipv4Addr) -> Self {
        Self {
            index,
            network: network.to_owned(),
            home: PathBuf::new(),
            address,
            address6: None,
            mac: Mac::of(address),
            publish: Vec::new(),
            egress: None,
            names: Names::new(),
        }
    }
}
