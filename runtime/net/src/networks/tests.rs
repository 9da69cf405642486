//! Each test has a host of its own: a namespace with a neighbour outside, rules of an administrator's, and cloison's networks. A
//! sandbox is a namespace in a guest's place.

mod clean_up;
mod policy;
mod traffic;

use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;

use crate::egress::Names;
use crate::testing::{Guest, command, ip, namespace, veth};
use crate::{
    Addresses, Attached, Attachment, Namespace, Network, NetworkSpec, Networks, Reservation, Result,
};

struct World {
    host: Namespace,
    outside: Namespace,
    networks: Networks,
    dir: TempDir,
}

/// A guest that is on a network.
struct Sandbox {
    namespace: Namespace,
    network: Network,
    addresses: Addresses,
    names: Names,
    _guest: Guest,
    _reservation: Reservation,
}

impl Sandbox {
    fn new(attached: Attached) -> Self {
        let mut guest = Guest::new();
        guest.plug(attached.adopted);
        Self {
            namespace: guest.namespace.clone(),
            network: attached.network,
            addresses: attached.addresses,
            names: attached.names,
            _guest: guest,
            _reservation: attached.reservation,
        }
    }
}

impl World {
    fn new() -> Self {
        let (host, outside) = (namespace(), namespace());
        // Making sure of an address takes a second, in which routes change.
        let ask = "/proc/sys/net/ipv6/conf/default/accept_dad";
        host.run(|| fs::write(ask, "0")).unwrap().unwrap();
        veth(&host, "uplink", &outside, "eth0");
        ip(
            &outside,
            "addr add 192.0.2.1/24 dev eth0
             addr add 2001:db8::1/64 dev eth0 nodad",
        );
        ip(
            &host,
            "addr add 192.0.2.2/24 dev uplink
             addr add 2001:db8::2/64 dev uplink nodad
             route add default via 192.0.2.1
             route add default via 2001:db8::1",
        );
        // A forwarding host has routes that another one lacks, so that what it was before could not be compared.
        let forwarding = "/proc/sys/net/ipv6/conf/all/forwarding";
        host.run(|| fs::write(forwarding, "1")).unwrap().unwrap();
        command(&host, "nft add table inet administrators").unwrap();
        let chain =
            "nft add chain inet administrators forward { type filter hook forward priority 0 ; }";
        command(&host, chain).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (run, data) = (dir.path().join("run"), dir.path().join("data"));
        let networks = Networks::new(host.clone(), &run, &data);
        Self {
            host,
            outside,
            networks,
            dir,
        }
    }

    fn home(&self, id: &str) -> PathBuf {
        self.dir.path().join("sandboxes").join(id)
    }

    fn wanted(&self, id: &str) -> Attachment {
        fs::create_dir_all(self.home(id)).unwrap();
        Attachment {
            id: id.to_owned(),
            home: self.home(id),
            network: Networks::DEFAULT.to_owned(),
            address: None,
            mac: None,
            publish: Vec::new(),
            egress: None,
        }
    }

    async fn attach(&self, id: &str) -> Sandbox {
        self.attach_as(&self.wanted(id)).await.unwrap()
    }

    async fn attach_as(&self, wanted: &Attachment) -> Result<Sandbox> {
        self.networks.attach(wanted).await.map(Sandbox::new)
    }

    async fn publish(&self, id: &str, publish: &[&str]) -> Sandbox {
        let publish = publish.iter().map(|text| text.parse().unwrap()).collect();
        let wanted = Attachment {
            publish,
            ..self.wanted(id)
        };
        self.attach_as(&wanted).await.unwrap()
    }

    async fn restrict(&self, id: &str, policy: &str) -> Sandbox {
        let wanted = Attachment {
            egress: Some(policy.parse().unwrap()),
            ..self.wanted(id)
        };
        self.attach_as(&wanted).await.unwrap()
    }

    /// Everything that could be left behind on the host.
    fn traces(&self) -> String {
        let show = |line| command(&self.host, line).unwrap();
        let leases = fs::read_to_string(self.dir.path().join("run/leases.json"));
        [
            // Whether a cable is plugged in at its other end changes a moment later.
            show("ip -o link")
                .lines()
                .map(|line| format!("{}\n", line.split(" <").next().unwrap_or_default()))
                .collect(),
            show("ip -o addr"),
            show("ip route show table all").replace(" linkdown", ""),
            show("nft list ruleset"),
            leases.unwrap_or_else(|_| "{}".to_owned()),
        ]
        .join("\n")
    }
}

fn network(name: &str, subnet: &str) -> NetworkSpec {
    NetworkSpec {
        name: name.to_owned(),
        subnet: Some(subnet.parse().unwrap()),
        ..NetworkSpec::default()
    }
}

fn ipv4(sandbox: &Sandbox) -> String {
    sandbox.addresses.ipv4.to_string()
}

fn ipv6(sandbox: &Sandbox) -> String {
    sandbox.addresses.ipv6.unwrap().to_string()
}

/// Compares two accounts of traces, and tells which lines differ.
#[track_caller]
fn assert_same(now: &str, before: &str, when: &str) {
    let lacks = |a: &str, b: &str| -> Vec<String> {
        let there: Vec<_> = b.lines().collect();
        let missing = a.lines().filter(|line| !there.contains(line));
        missing.map(str::to_owned).collect()
    };
    let (new, gone) = (lacks(now, before), lacks(before, now));
    assert!(now == before, "{when}: new: {new:#?}, gone: {gone:#?}");
}
