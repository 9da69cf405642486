//! What a container's record says of its network, and how `ps` and `inspect` show it.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use cloison_net::{Addresses, Egress, Lease, Publication};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::NetworkOptions;

/// The name of the network that a program makes.
const USER: &str = "user";

/// What is kept of a container's network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// As `--network` has it.
    pub name: String,
    /// Its place on one of cloison's networks.
    place: Option<Place>,
    /// Ports of the host that lead to it.
    pub publish: Vec<Publication>,
    /// What it may connect to.
    pub egress: Option<Egress>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Place {
    addresses: Addresses,
    gateway: Ipv4Addr,
    prefix: u8,
    gateway6: Option<IpAddr>,
    prefix6: Option<u8>,
}

impl NetworkRecord {
    pub fn none() -> Self {
        Self::without_place("none".to_owned())
    }

    pub fn namespace(path: &Path) -> Self {
        Self::without_place(format!("ns:{}", path.display()))
    }

    pub fn user(options: &NetworkOptions) -> Self {
        Self {
            publish: options.publish.clone(),
            ..Self::without_place(USER.to_owned())
        }
    }

    /// Whether a program makes it.
    pub fn is_user(&self) -> bool {
        self.name == USER
    }

    /// Whether it has a place on a network of cloison's.
    pub fn is_leased(&self) -> bool {
        self.place.is_some()
    }

    /// The namespace somebody prepared whose interfaces it has.
    pub fn prepared(&self) -> Option<&Path> {
        self.name.strip_prefix("ns:").map(Path::new)
    }

    fn without_place(name: String) -> Self {
        Self {
            name,
            place: None,
            publish: Vec::new(),
            egress: None,
        }
    }

    pub fn leased(lease: &Lease, options: &NetworkOptions) -> Self {
        let network = &lease.network;
        Self {
            name: network.name.clone(),
            place: Some(Place {
                addresses: lease.addresses,
                gateway: network.gateway(),
                prefix: network.subnet.prefix_len(),
                gateway6: network.gateway6().map(IpAddr::V6),
                prefix6: network.subnet6.map(|subnet| subnet.prefix_len()),
            }),
            publish: options.publish.clone(),
            egress: options.egress.clone(),
        }
    }

    /// The published ports in `docker ps`'s notation.
    pub fn ports(&self) -> String {
        let shown = self.publish.iter().map(|publication| {
            let mut ports = publication.mappings();
            let Some(first) = ports.next() else {
                return String::new();
            };
            let last = ports.last().unwrap_or(first);
            let range = |from: u16, to: u16| match from == to {
                true => from.to_string(),
                false => format!("{from}-{to}"),
            };
            let address = match first.address {
                None => "0.0.0.0".to_owned(),
                Some(IpAddr::V6(address)) => format!("[{address}]"),
                Some(IpAddr::V4(address)) => address.to_string(),
            };
            format!(
                "{address}:{}->{}/{}",
                range(first.host, last.host),
                range(first.container, last.container),
                first.protocol
            )
        });
        shown.collect::<Vec<_>>().join(", ")
    }

    /// `docker inspect`'s NetworkSettings.
    pub fn settings(&self) -> Value {
        let mut ports: Map<String, Value> = Map::new();
        for mapping in self.publish.iter().flat_map(Publication::mappings) {
            let address = mapping
                .address
                .map_or_else(|| "0.0.0.0".to_owned(), |address| address.to_string());
            let host = json!({ "HostIp": address, "HostPort": mapping.host.to_string() });
            let port = format!("{}/{}", mapping.container, mapping.protocol);
            let hosts = ports.entry(port).or_insert_with(|| json!([]));
            if let Some(hosts) = hosts.as_array_mut() {
                hosts.push(host);
            }
        }
        let network = match &self.place {
            None => json!({}),
            Some(place) => json!({
                "IPAddress": place.addresses.ipv4,
                "IPPrefixLen": place.prefix,
                "Gateway": place.gateway,
                "GlobalIPv6Address": place.addresses.ipv6,
                "GlobalIPv6PrefixLen": place.prefix6,
                "IPv6Gateway": place.gateway6,
                "MacAddress": place.addresses.mac,
            }),
        };
        json!({
            "Ports": ports,
            "Networks": { &self.name: network },
            "Egress": self.egress,
        })
    }
}

impl Default for NetworkRecord {
    fn default() -> Self {
        Self::none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_shown_as_docker_shows_them() {
        let mut record = NetworkRecord::none();
        assert_eq!(record.ports(), "");
        let publish = ["8080:80", "127.0.0.1:53-54:1053-1054/udp", "[::1]:1:2"];
        record.publish = publish.map(|p| p.parse().unwrap()).to_vec();
        assert_eq!(
            record.ports(),
            "0.0.0.0:8080->80/tcp, 127.0.0.1:53-54->1053-1054/udp, [::1]:1->2/tcp"
        );
        let settings = record.settings();
        assert_eq!(settings["Ports"]["1054/udp"][0]["HostPort"], "54");
        assert_eq!(settings["Ports"]["80/tcp"][0]["HostIp"], "0.0.0.0");
    }
}
