//! `rules.nft`, which says what all this is for, in the kernel's terms. A test holds that `nft` makes the same of that file.

use super::message::Family::{Bridge, Inet};
use super::message::Type::{Ether, Icmpv6, Ifname, Ipv4, Ipv6, Protocol, Service};
use super::message::{Batch, Element, Hook, Mapped, Set};
use super::rule::{
    ARP_SADDR, CT_STATE, CT_STATUS, DNAT, DPORT, ESTABLISHED_OR_RELATED, ETHER_SADDR, ETHER_TYPE,
    Field, ICMP_TYPE, IIFNAME, IP_DADDR, IP_SADDR, IP6_DADDR, IP6_SADDR, L4PROTO, MARK, OIFNAME,
    Rule, ethertype,
};
use super::{BRIDGED, LOOPBACK, REVISIONS, TRANSPORTS};

/// Changes with what is here: a digest of it, which a test computes.
pub(super) const REVISION: u32 = 0xb53a_e4c0;

const ND_ROUTER_SOLICIT: u8 = 133;
const ND_NEIGHBOR_SOLICIT: u8 = 135;
const ND_NEIGHBOR_ADVERT: u8 = 136;
const ND_REDIRECT: u8 = 137;
const ICMP_REDIRECT: u8 = 5;

const SETS: [Set; 16] = [
    REVISIONS,
    set("bridges", &[Ifname]),
    set("pairs", &[Ifname, Ifname]),
    subnets("subnets4", &[Ipv4]),
    subnets("subnets6", &[Ipv6]),
    set(TRANSPORTS, &[Protocol]),
    set("neighbour_discovery", &[Icmpv6]),
    map("publish4", &[Protocol, Service], &[Ipv4, Service]),
    map("publish6", &[Protocol, Service], &[Ipv6, Service]),
    map("publish4_at", &[Ipv4, Protocol, Service], &[Ipv4, Service]),
    map("publish6_at", &[Ipv6, Protocol, Service], &[Ipv6, Service]),
    policies("egress4", &[Ipv4]),
    policies("egress6", &[Ipv6]),
    of_bridge("ports", &[Ifname]),
    of_bridge("hosts4", &[Ifname, Ether, Ipv4]),
    of_bridge("hosts6", &[Ifname, Ether, Ipv6]),
];

const fn set(name: &'static str, key: &'static [super::message::Type]) -> Set {
    Set {
        family: Inet,
        name,
        key,
        mapped: Mapped::Nothing,
        interval: false,
    }
}

const fn subnets(name: &'static str, key: &'static [super::message::Type]) -> Set {
    Set {
        interval: true,
        ..set(name, key)
    }
}

const fn map(
    name: &'static str,
    key: &'static [super::message::Type],
    to: &'static [super::message::Type],
) -> Set {
    Set {
        mapped: Mapped::To(to),
        ..set(name, key)
    }
}

const fn policies(name: &'static str, key: &'static [super::message::Type]) -> Set {
    Set {
        mapped: Mapped::Verdicts,
        ..set(name, key)
    }
}

const fn of_bridge(name: &'static str, key: &'static [super::message::Type]) -> Set {
    Set {
        family: Bridge,
        ..set(name, key)
    }
}

/// The chains, and what calls them.
const CHAINS: [(super::message::Family, &str, Option<Hook>); 12] = [
    (
        Inet,
        "loopback",
        hook("filter", libc::NF_INET_PRE_ROUTING, -300),
    ),
    (Inet, "publish", None),
    (
        Inet,
        "prerouting",
        hook("nat", libc::NF_INET_PRE_ROUTING, -100),
    ),
    (Inet, "output", hook("nat", libc::NF_INET_LOCAL_OUT, -100)),
    (
        Inet,
        "bridged",
        hook("filter", libc::NF_INET_PRE_ROUTING, -90),
    ),
    (Inet, "from_sandbox", None),
    (Inet, "input", hook("filter", libc::NF_INET_LOCAL_IN, 0)),
    (Inet, "forward", hook("filter", libc::NF_INET_FORWARD, 0)),
    (
        Inet,
        "redirects",
        hook("filter", libc::NF_INET_LOCAL_OUT, 0),
    ),
    (
        Inet,
        "postrouting",
        hook("nat", libc::NF_INET_POST_ROUTING, 100),
    ),
    (
        Bridge,
        "prerouting",
        hook("filter", libc::NF_BR_PRE_ROUTING, -300),
    ),
    (Bridge, "forward", hook("filter", libc::NF_BR_FORWARD, 0)),
];

const fn hook(kind: &'static str, number: libc::c_int, priority: i32) -> Option<Hook> {
    Some(Hook {
        kind,
        number,
        priority,
    })
}

/// Loads the fixed part, or loads it again.
pub(super) fn load() -> Batch {
    let mut batch = Batch::default();
    batch.add_table(Inet);
    batch.add_table(Bridge);
    for set in &SETS {
        batch.add_set(set);
    }
    batch.add_elements(&constants());
    for (family, chain, hook) in CHAINS {
        batch.add_chain(family, chain, hook);
        batch.flush_chain(family, chain);
    }
    for (chain, rule) in inet() {
        batch.add_rule(Inet, chain, &rule);
    }
    for (chain, rule) in bridge() {
        batch.add_rule(Bridge, chain, &rule);
    }
    batch
}

/// The sets that are the same on every host.
fn constants() -> Vec<Element> {
    let transports = [libc::IPPROTO_TCP, libc::IPPROTO_UDP].map(|protocol| {
        let [.., number] = protocol.to_be_bytes();
        Element::new(Inet, TRANSPORTS, &[&[number]])
    });
    let discovery = [ND_ROUTER_SOLICIT, ND_NEIGHBOR_SOLICIT, ND_NEIGHBOR_ADVERT]
        .map(|kind| Element::new(Inet, "neighbour_discovery", &[&[kind]]));
    transports.into_iter().chain(discovery).collect()
}

fn inet() -> Vec<(&'static str, Rule)> {
    let from_bridge = || Rule::new().among(&[IIFNAME], "bridges");
    let to_bridge = || Rule::new().among(&[OIFNAME], "bridges");
    let to_this_host = || {
        let local = u32::from(libc::RTN_LOCAL);
        Rule::new()
            .is(Field::DestinationType, &local.to_ne_bytes())
            .among(&[L4PROTO], TRANSPORTS)
            .jump("publish")
    };
    let (ipv4, ipv6) = (|| Rule::new().ipv4(), || Rule::new().ipv6());
    let at4 = [IP_DADDR, L4PROTO, DPORT];
    let at6 = [IP6_DADDR, L4PROTO, DPORT];
    let port = [L4PROTO, DPORT];
    vec![
        (
            "loopback",
            from_bridge().ipv4().within(IP_DADDR, LOOPBACK).drop(),
        ),
        (
            "publish",
            ipv4().dnat(&at4, "publish4_at", libc::NFPROTO_IPV4),
        ),
        (
            "publish",
            Rule::new().dnat(&port, "publish4", libc::NFPROTO_IPV4),
        ),
        (
            "publish",
            ipv6().dnat(&at6, "publish6_at", libc::NFPROTO_IPV6),
        ),
        (
            "publish",
            Rule::new().dnat(&port, "publish6", libc::NFPROTO_IPV6),
        ),
        ("prerouting", to_this_host()),
        ("output", to_this_host()),
        ("bridged", from_bridge().has(CT_STATUS, DNAT).mark(BRIDGED)),
        (
            "from_sandbox",
            Rule::new().has(CT_STATE, ESTABLISHED_OR_RELATED).accept(),
        ),
        (
            "from_sandbox",
            ipv6()
                .protocol(libc::IPPROTO_ICMPV6)
                .among(&[ICMP_TYPE], "neighbour_discovery")
                .accept(),
        ),
        ("from_sandbox", ipv4().verdict_of(&[IP_SADDR], "egress4")),
        ("from_sandbox", ipv6().verdict_of(&[IP6_SADDR], "egress6")),
        ("input", from_bridge().jump("from_sandbox")),
        ("forward", from_bridge().jump("from_sandbox")),
        (
            "forward",
            to_bridge().has(CT_STATE, ESTABLISHED_OR_RELATED).accept(),
        ),
        ("forward", to_bridge().has(CT_STATUS, DNAT).accept()),
        (
            "forward",
            Rule::new().among(&[IIFNAME, OIFNAME], "pairs").accept(),
        ),
        ("forward", to_bridge().drop()),
        (
            "redirects",
            to_bridge()
                .ipv4()
                .protocol(libc::IPPROTO_ICMP)
                .is(ICMP_TYPE, &[ICMP_REDIRECT])
                .drop(),
        ),
        (
            "redirects",
            to_bridge()
                .ipv6()
                .protocol(libc::IPPROTO_ICMPV6)
                .is(ICMP_TYPE, &[ND_REDIRECT])
                .drop(),
        ),
        (
            "postrouting",
            ipv4()
                .within(IP_SADDR, LOOPBACK)
                .among(&[OIFNAME], "bridges")
                .masquerade(),
        ),
        (
            "postrouting",
            ipv4()
                .among(&[IP_SADDR], "subnets4")
                .among(&[IP_DADDR], "subnets4")
                .has(CT_STATUS, DNAT)
                .masquerade(),
        ),
        (
            "postrouting",
            ipv6()
                .among(&[IP6_SADDR], "subnets6")
                .among(&[IP6_DADDR], "subnets6")
                .has(CT_STATUS, DNAT)
                .masquerade(),
        ),
        (
            "postrouting",
            ipv4()
                .among(&[IP_SADDR], "subnets4")
                .not_among(&[OIFNAME], "bridges")
                .masquerade(),
        ),
        (
            "postrouting",
            ipv6()
                .among(&[IP6_SADDR], "subnets6")
                .not_among(&[OIFNAME], "bridges")
                .masquerade(),
        ),
    ]
}

fn bridge() -> Vec<(&'static str, Rule)> {
    let from_port = || Rule::new().among(&[IIFNAME], "ports");
    vec![
        (
            "prerouting",
            Rule::new().not_among(&[IIFNAME], "ports").accept(),
        ),
        (
            "prerouting",
            Rule::new()
                .carries(libc::ETH_P_IP)
                .among(&[IIFNAME, ETHER_SADDR, IP_SADDR], "hosts4")
                .accept(),
        ),
        (
            "prerouting",
            Rule::new()
                .is(ETHER_TYPE, &ethertype(libc::ETH_P_ARP))
                .among(&[IIFNAME, ETHER_SADDR, ARP_SADDR], "hosts4")
                .accept(),
        ),
        (
            "prerouting",
            Rule::new()
                .carries(libc::ETH_P_IPV6)
                .among(&[IIFNAME, ETHER_SADDR, IP6_SADDR], "hosts6")
                .accept(),
        ),
        (
            "prerouting",
            Rule::new()
                .carries(libc::ETH_P_IPV6)
                .is(IP6_SADDR, &[0; 16])
                .protocol(libc::IPPROTO_ICMPV6)
                .is(ICMP_TYPE, &[ND_NEIGHBOR_SOLICIT])
                .accept(),
        ),
        ("prerouting", Rule::new().drop()),
        ("forward", from_port().has_all(MARK, BRIDGED).accept()),
        ("forward", from_port().drop()),
    ]
}
