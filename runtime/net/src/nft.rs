//! cloison's packet filter: the fixed rules, and what puts a network or a sandbox into them and takes it out.
//!
//! `rules.nft` is the fixed part in nft's own language; nothing runs that program. The kernel is sent batches of messages, each of
//! which it takes as a whole or not at all. What is put into them is an address, a number, or a name made here; never what somebody
//! wrote. Whatever was there before, afterwards there is what there should be: adding what is there is no error, and what cannot be
//! removed because some of it is missing is added before.

mod fixed;
mod message;
mod rule;
mod socket;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};

use self::message::Family::{Bridge, Inet};
use self::message::{
    Element, Mapped, NFTA_OBJ_DATA, NFTA_TABLE_NAME, Set, TABLE, Type, Value, Verdict,
    concatenation,
};
use self::rule::{DPORT, L4PROTO, Rule, octets};
use crate::network::Network;
use crate::publish::Protocol;
use crate::sandbox::Record;
use crate::{Namespace, Result};

pub(crate) use self::message::Batch;
pub(crate) use self::socket::Filter;

/// Most characters of a sandbox's ID in the kernel's log, whose prefixes have at most 127.
const LOGGED: usize = 64;
/// Refusals of a sandbox that are logged: a second, and at once.
const LOG_RATE: (u64, u32) = (10, 20);
/// What is being done by whoever makes a change.
const CHANGE: &str = "change the packet filter";
/// The set that says which version's the fixed rules are.
const REVISIONS: Set = Set {
    family: Inet,
    name: "revision",
    key: &[Type::Mark],
    mapped: Mapped::Nothing,
    interval: false,
};
/// The set of protocols that have ports.
const TRANSPORTS: &str = "transports";
/// The mark of what is bridged after its destination was changed.
const BRIDGED: u32 = 0x1000;
const LOOPBACK: IpNet = IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8));

const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_COUNTER_PACKETS: u16 = 2;

/// Makes a change that counts on the fixed rules, in the calling thread's namespace, and loads them before if they are missing or another
/// version's. That takes the kernel longer than all the rest, and so does refusing a batch.
pub(crate) fn add(batch: &Batch) -> Result<()> {
    let filter = Filter::open(CHANGE)?;
    if is_loaded(&filter)? {
        filter.change(batch)
    } else {
        filter.change(&with_rules(batch))
    }
}

/// Whether the fixed rules are there as this program has them. They stay longer than a program may.
fn is_loaded(filter: &Filter) -> Result<bool> {
    let asked = filter.ask(libc::NFT_MSG_GETSETELEM, false, libc::NFPROTO_INET, |ask| {
        message::element(ask, &revision());
    });
    match asked {
        Err(error) if error.os_error() == Some(libc::ENOENT) => Ok(false),
        asked => asked.map(|_| true),
    }
}

/// Takes everything away, if it is there, in the calling thread's namespace.
pub(crate) fn remove_all() -> Result<()> {
    let mut batch = Batch::default();
    for family in [Inet, Bridge] {
        batch.add_table(family);
        batch.remove_table(family);
    }
    Filter::open(CHANGE)?.change(&batch)
}

/// Loads everything, whatever is there, in the calling thread's namespace.
pub(crate) fn restore(batch: &Batch) -> Result<()> {
    Filter::open(CHANGE)?.change(&with_rules(batch))
}

/// The fixed rules, and then `batch`.
fn with_rules(batch: &Batch) -> Batch {
    let mut whole = fixed::load();
    whole.flush_set(&REVISIONS);
    whole.add_elements(&[revision()]);
    whole.append(batch);
    whole
}

/// The element that stands for the fixed rules as they are here.
fn revision() -> Element {
    Element::new(Inet, REVISIONS.name, &[&fixed::REVISION.to_ne_bytes()])
}

/// What of a network and its sandboxes is to be taken out together.
pub(crate) struct Removal<'a> {
    pub(crate) network: &'a Network,
    pub(crate) sandbox: Option<&'a Record>,
    /// Whether the network itself goes too.
    pub(crate) whole: bool,
}

/// Takes out a sandbox, a network, or both, in the calling thread's namespace. The socket by which that was done is best closed when some
/// time has passed.
pub(crate) fn remove(removal: &Removal<'_>) -> Result<Filter> {
    let Removal {
        network,
        sandbox,
        whole,
    } = *removal;
    let mut elements = Vec::new();
    if let Some(record) = sandbox {
        elements.extend(sandbox_elements(record, network));
    }
    if whole {
        elements.extend(network_elements(network));
    }
    let policy = sandbox.filter(|record| record.egress.is_some());
    let names = policy.map(|record| (chain(record.index), counter(record.index)));
    let mut batch = Batch::default();
    batch.remove_elements(&elements);
    if let Some((chain, counter)) = &names {
        batch.flush_chain(Inet, chain);
        batch.remove_chain(Inet, chain);
        batch.remove_counter(counter);
    }
    let first = || {
        let mut first = fixed::load();
        if let Some((chain, counter)) = &names {
            first.add_counter(counter);
            first.add_chain(Inet, chain, None);
        }
        first.add_elements(&elements);
        first
    };
    let filter = Filter::open(CHANGE)?;
    match filter.change(&batch) {
        // Something is missing, so that nothing was changed; if it is everything, there is nothing to take out.
        Err(error) if error.os_error() == Some(libc::ENOENT) && has_table(&filter)? => {
            let mut whole = first();
            whole.append(&batch);
            filter.change(&whole)?;
        }
        Err(error) if error.os_error() == Some(libc::ENOENT) => {}
        done => done?,
    }
    Ok(filter)
}

fn has_table(filter: &Filter) -> Result<bool> {
    let asked = filter.ask(libc::NFT_MSG_GETTABLE, false, libc::NFPROTO_INET, |ask| {
        ask.text(NFTA_TABLE_NAME, TABLE);
    });
    match asked {
        Err(error) if error.os_error() == Some(libc::ENOENT) => Ok(false),
        asked => asked.map(|_| true),
    }
}

/// Whether the kernel has a packet filter of this kind, for the calling thread's namespace.
pub(crate) fn available() -> bool {
    let everyones = libc::NFPROTO_UNSPEC;
    socket::ask(libc::NFT_MSG_GETGEN, false, everyones, |_| {}).is_ok()
}

/// How many packets beginning a connection have been refused to the sandbox with this index.
pub(crate) async fn refused(host: &Namespace, index: u32) -> Result<u64> {
    let name = counter(index);
    let asked = host.run_long(move || {
        socket::ask(libc::NFT_MSG_GETOBJ, false, libc::NFPROTO_INET, |request| {
            message::counter(request, &name);
        })
    });
    let found = match asked.await {
        Err(error) if error.os_error() == Some(libc::ENOENT) => return Ok(0),
        found => found?,
    };
    let data = found
        .iter()
        .find_map(|(_, attributes)| attribute(attributes, NFTA_OBJ_DATA));
    let counted = socket::attributes_in(data.unwrap_or_default())?;
    let packets = attribute(&counted, NFTA_COUNTER_PACKETS).and_then(<[u8]>::first_chunk);
    Ok(packets.map_or(0, |packets| u64::from_be_bytes(*packets)))
}

/// The chains of others that drop what they do not know when it is forwarded, as their family, table and name.
pub(crate) async fn obstacles(host: &Namespace) -> Result<Vec<String>> {
    let asked = host.run_long(|| {
        let everyones = libc::NFPROTO_UNSPEC;
        socket::ask(libc::NFT_MSG_GETCHAIN, true, everyones, |_| {})
    });
    let mut found = Vec::new();
    for (family, attributes) in asked.await? {
        let hook = attribute(&attributes, NFTA_CHAIN_HOOK).unwrap_or_default();
        let hook = socket::attributes_in(hook)?;
        let family = match i32::from(family) {
            libc::NFPROTO_INET => "inet",
            libc::NFPROTO_IPV4 => "ip",
            libc::NFPROTO_IPV6 => "ip6",
            libc::NFPROTO_BRIDGE => "bridge",
            _ => continue,
        };
        if number(&hook, NFTA_HOOK_HOOKNUM) == Some(libc::NF_INET_FORWARD)
            && number(&attributes, NFTA_CHAIN_POLICY) == Some(libc::NF_DROP)
        {
            let names = [NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME].map(|kind| {
                let name = attribute(&attributes, kind).unwrap_or_default();
                let name = name.strip_suffix(&[0]).unwrap_or(name);
                String::from_utf8_lossy(name).into_owned()
            });
            found.push(format!("{family} {}", names.join(" ")));
        }
    }
    Ok(found)
}

fn attribute(attributes: &[(u16, Vec<u8>)], kind: u16) -> Option<&[u8]> {
    let mut attributes = attributes.iter();
    attributes.find_map(|(is, value)| (*is == kind).then_some(value.as_slice()))
}

fn number(attributes: &[(u16, Vec<u8>)], kind: u16) -> Option<i32> {
    let value = attribute(attributes, kind)?;
    Some(i32::from_be_bytes(*value.first_chunk()?))
}

fn counter(index: u32) -> String {
    format!("refused-{index}")
}

fn chain(index: u32) -> String {
    format!("egress-{index}")
}

impl Batch {
    /// Puts a network in.
    pub(crate) fn add_network(&mut self, network: &Network) {
        self.add_elements(&network_elements(network));
    }

    /// Puts a sandbox in.
    pub(crate) fn add_sandbox(&mut self, id: &str, record: &Record, network: &Network) {
        self.set_egress(id, record);
        self.add_elements(&sandbox_elements(record, network));
    }

    /// Makes the chain of a sandbox's egress policy what its record has; nothing when there is none.
    pub(crate) fn set_egress(&mut self, id: &str, record: &Record) {
        let Some(policy) = &record.egress else {
            return;
        };
        let (chain, counter) = (chain(record.index), counter(record.index));
        let id: String = id.chars().take(LOGGED).collect();
        self.add_counter(&counter);
        self.add_chain(Inet, &chain, None);
        self.flush_chain(Inet, &chain);
        for (net, ports) in policy.allowed(&record.names) {
            let rule = Rule::new().to(net);
            let rule = match ports {
                None => rule,
                Some((first, last)) => rule.among(&[L4PROTO], TRANSPORTS).between(
                    DPORT,
                    &first.to_be_bytes(),
                    &last.to_be_bytes(),
                ),
            };
            self.add_rule(Inet, &chain, &rule.verdict(&Verdict::Return));
        }
        let (rate, burst) = LOG_RATE;
        let log = Rule::new().limit(rate, burst);
        for rule in [
            log.log(&format!("{TABLE} {id} refused: ")),
            // The kernel sends a host a message of ICMP a second, and some of those are redirects; resets it does not count.
            Rule::new()
                .protocol(libc::IPPROTO_TCP)
                .count(&counter)
                .reset(),
            Rule::new().count(&counter).prohibit(),
        ] {
            self.add_rule(Inet, &chain, &rule);
        }
    }
}

/// An interface's name, as long as the kernel has it.
fn interface(name: &str) -> [u8; libc::IFNAMSIZ] {
    let mut bytes = [0; libc::IFNAMSIZ];
    for (to, from) in bytes.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    bytes
}

fn network_elements(network: &Network) -> Vec<Element> {
    let bridge = interface(&network.bridge());
    let mut elements = vec![
        Element::new(Inet, "bridges", &[&bridge]),
        Element::new(Inet, "pairs", &[&bridge, &bridge]),
    ];
    elements.extend(range("subnets4", network.subnet.into()));
    if let Some(subnet) = network.subnet6 {
        elements.extend(range("subnets6", subnet.into()));
    }
    elements
}

/// A subnet as its first address and the first one behind it.
fn range(set: &'static str, net: IpNet) -> Vec<Element> {
    let first = Element::new(Inet, set, &[&octets(net.network())]);
    let behind = match net.broadcast() {
        IpAddr::V4(last) => last
            .to_bits()
            .checked_add(1)
            .map(Ipv4Addr::from_bits)
            .map(IpAddr::V4),
        IpAddr::V6(last) => {
            let next = last.to_bits().checked_add(1);
            next.map(|bits| IpAddr::V6(bits.into()))
        }
    };
    let behind = behind.map(|address| Element {
        ends: true,
        ..Element::new(Inet, set, &[&octets(address)])
    });
    std::iter::once(first).chain(behind).collect()
}

fn sandbox_elements(record: &Record, network: &Network) -> Vec<Element> {
    let (port, mac) = (interface(&record.port()), record.mac.bytes());
    let link_local = record.mac.link_local();
    let host = |set, address: &[u8]| Element::new(Bridge, set, &[&port, &mac, address]);
    let mut elements = vec![
        Element::new(Bridge, "ports", &[&port]),
        host("hosts4", &record.address.octets()),
        host("hosts6", &link_local.octets()),
    ];
    if let Some(address) = record.address6 {
        elements.push(host("hosts6", &address.octets()));
    }
    if record.egress.is_some() {
        let policy = |set, address: &[u8]| Element {
            value: Value::Verdict(Verdict::Jump(chain(record.index))),
            ..Element::new(Inet, set, &[address])
        };
        elements.push(policy("egress4", &record.address.octets()));
        for address in record.address6.into_iter().chain([link_local]) {
            elements.push(policy("egress6", &address.octets()));
        }
    }
    elements.extend(published(record, network));
    elements
}

/// The sandbox's published ports, and where they lead.
fn published(record: &Record, network: &Network) -> Vec<Element> {
    let ipv6 = network.subnet6.is_some();
    let mut elements = Vec::new();
    for mapping in record.publish.iter().flat_map(|p| p.mappings()) {
        let [.., protocol] = match mapping.protocol {
            Protocol::Tcp => libc::IPPROTO_TCP,
            Protocol::Udp => libc::IPPROTO_UDP,
        }
        .to_be_bytes();
        let (host, container) = (mapping.host.to_be_bytes(), mapping.container.to_be_bytes());
        for socket in mapping.sockets(ipv6) {
            let to = match (socket.ip(), record.address6) {
                (IpAddr::V4(_), _) => record.address.octets().to_vec(),
                (IpAddr::V6(_), Some(address)) => address.octets().to_vec(),
                (IpAddr::V6(_), None) => continue,
            };
            let at = octets(socket.ip());
            let everywhere: [&[u8]; 2] = [&[protocol], &host];
            let somewhere: [&[u8]; 3] = [&at, &[protocol], &host];
            let (set, key): (_, &[&[u8]]) = match (socket.ip(), socket.ip().is_unspecified()) {
                (IpAddr::V4(_), true) => ("publish4", &everywhere),
                (IpAddr::V6(_), true) => ("publish6", &everywhere),
                (IpAddr::V4(_), false) => ("publish4_at", &somewhere),
                (IpAddr::V6(_), false) => ("publish6_at", &somewhere),
            };
            elements.push(Element {
                value: Value::Data(concatenation(&[&to, &container])),
                ..Element::new(Inet, set, key)
            });
        }
    }
    elements
}
