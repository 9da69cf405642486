//! What is done to the host's interfaces for a sandbox: changes that go to the kernel several at a time, in one datagram and without a
//! runtime. [`crate::netlink`] is for whoever watches a namespace.

use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use rtnetlink::packet_core::{
    ErrorBuffer, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR,
    NLMSG_NOOP, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::sys::{Socket, protocols::NETLINK_ROUTE};
use rtnetlink::{LinkBridge, LinkBridgePort, LinkUnspec};

use crate::direct::{self, each, nonsense, send};
use crate::netlink::Link;
use crate::{Error, Network, Result};

/// A socket to the interfaces of the namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Links(Socket);

/// A change, and the one refusal that says that nothing has to be changed.
#[derive(Debug)]
pub(crate) struct Change {
    /// Verb phrase with its object.
    doing: String,
    message: RouteNetlinkMessage,
    flags: u16,
    unless: Option<i32>,
}

impl Links {
    pub(crate) fn open() -> Result<Self> {
        let opened = direct::open(NETLINK_ROUTE);
        opened
            .map(Self)
            .map_err(Error::system("open a netlink socket"))
    }

    /// The interface called `name`; `None` when there is none.
    pub(crate) fn find(&self, name: &str) -> Result<Option<Link>> {
        let what = format!("look for the interface {name}");
        let mut message = LinkMessage::default();
        message
            .attributes
            .push(LinkAttribute::IfName(name.to_owned()));
        let bytes = encode(RouteNetlinkMessage::GetLink(message), 0, 0);
        let mut found = None;
        let mut refused = None;
        send(&self.0, &bytes, &what, |datagram| {
            each(datagram, |kind, _, payload| {
                if kind == NLMSG_ERROR {
                    refused = refusal(payload)?;
                }
                Ok(())
            })?;
            let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(datagram);
            if let Ok(NetlinkMessage {
                payload: NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)),
                ..
            }) = answer
            {
                found = Link::read(link);
            }
            Ok(())
        })?;
        match refused.map(|error| (error.raw_os_error(), error)) {
            None | Some((Some(libc::ENODEV), _)) => Ok(found),
            Some((_, error)) => Err(Error::system(what)(error)),
        }
    }

    /// Has the kernel make all of `changes`, in this order. The error is that of the first that it refuses, and those behind it have been
    /// tried.
    pub(crate) fn make(&self, changes: &[Change]) -> Result<()> {
        let mut bytes = Vec::new();
        for (sequence, change) in (0..).zip(changes) {
            let flags = change.flags | NLM_F_ACK;
            bytes.extend(encode(change.message.clone(), flags, sequence));
        }
        let what = changes
            .first()
            .map(|change| change.doing.as_str())
            .unwrap_or_default();
        let mut answers = 0;
        let mut failed: Option<Error> = None;
        send(&self.0, &bytes, what, |datagram| {
            each(datagram, |kind, sequence, payload| {
                let change = usize::try_from(sequence).ok().and_then(|n| changes.get(n));
                let (NLMSG_ERROR, Some(change)) = (kind, change) else {
                    return match kind {
                        NLMSG_NOOP | NLMSG_DONE => Ok(()),
                        _ => Err(nonsense()),
                    };
                };
                answers += 1;
                match refusal(payload)? {
                    Some(error) if error.raw_os_error() != change.unless => {
                        failed.get_or_insert_with(|| Error::system(change.doing.clone())(error));
                    }
                    _ => {}
                }
                Ok(())
            })
        })?;
        match failed {
            Some(error) => Err(error),
            None if answers < changes.len() => Err(nonsense()),
            None => Ok(()),
        }
    }
}

impl Change {
    /// Adds a network's bridge. It is no error when it is there.
    pub(crate) fn add_bridge(network: &Network) -> Self {
        // Ports forward at once: there is no loop to look for. Multicast goes everywhere, which is to the host.
        let bridge = network.bridge();
        let message = LinkBridge::new(&bridge)
            .mcast_snooping(false)
            .address(network.mac().bytes().to_vec())
            .mtu(network.mtu)
            .build();
        Self {
            doing: format!("make the bridge {bridge}"),
            message: RouteNetlinkMessage::NewLink(message),
            flags: NLM_F_CREATE | NLM_F_EXCL,
            unless: Some(libc::EEXIST),
        }
    }

    /// Gives an interface an address; it is no error when it has it. Nobody else can have it, so nobody is asked.
    pub(crate) fn add_address(index: u32, address: IpNet) -> Self {
        let mut message = AddressMessage::default();
        message.header.index = index;
        message.header.prefix_len = address.prefix_len();
        let at = address.addr();
        message.header.family = match at {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        message.attributes = vec![AddressAttribute::Local(at), AddressAttribute::Address(at)];
        message.attributes.push(match address {
            IpNet::V4(net) => AddressAttribute::Broadcast(net.broadcast()),
            IpNet::V6(_) => AddressAttribute::Flags(AddressFlags::Nodad),
        });
        Self {
            doing: format!("add the address {address}"),
            message: RouteNetlinkMessage::NewAddress(message),
            flags: NLM_F_CREATE | NLM_F_EXCL,
            unless: Some(libc::EEXIST),
        }
    }

    /// Brings an interface up.
    pub(crate) fn set_up(index: u32) -> Self {
        let message = LinkUnspec::new_with_index(index).up().build();
        Self::set("bring an interface up".to_owned(), message, None)
    }

    /// Has nothing come or go by the interface called `name`. It is no error when there is none.
    pub(crate) fn set_down(name: &str) -> Self {
        let message = LinkUnspec::new_with_name(name).down().build();
        let doing = format!("bring the interface {name} down");
        Self::set(doing, message, Some(libc::ENODEV))
    }

    /// Makes an interface a port of the bridge with the index `bridge`, and brings it up.
    pub(crate) fn plug_in(index: u32, bridge: u32, mtu: u32) -> Self {
        let message = LinkUnspec::new_with_index(index)
            .mtu(mtu)
            .controller(bridge)
            .up()
            .build();
        Self::set("make a port of a bridge".to_owned(), message, None)
    }

    /// Has a bridge send out at a port what came in there, too.
    pub(crate) fn hairpin(index: u32) -> Self {
        let message = LinkBridgePort::new(index).hairpin(true).build();
        Self {
            doing: "set up a port of a bridge".to_owned(),
            message: RouteNetlinkMessage::NewLink(message),
            flags: 0,
            unless: None,
        }
    }

    /// Removes the interface called `name`. It is no error when there is none.
    pub(crate) fn remove(name: &str) -> Self {
        let message = LinkUnspec::new_with_name(name).build();
        Self {
            doing: format!("remove the interface {name}"),
            message: RouteNetlinkMessage::DelLink(message),
            flags: 0,
            unless: Some(libc::ENODEV),
        }
    }

    fn set(doing: String, message: LinkMessage, unless: Option<i32>) -> Self {
        Self {
            doing,
            message: RouteNetlinkMessage::SetLink(message),
            flags: 0,
            unless,
        }
    }
}

fn encode(message: RouteNetlinkMessage, flags: u16, sequence: u32) -> Vec<u8> {
    let mut message = NetlinkMessage::from(message);
    message.header.flags = NLM_F_REQUEST | flags;
    message.header.sequence_number = sequence;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// What an NLMSG_ERROR says; `None` for a success.
fn refusal(payload: &[u8]) -> Result<Option<io::Error>> {
    let error = ErrorBuffer::new_checked(payload).map_err(|_| nonsense())?;
    let refused = |code: i32| io::Error::from_raw_os_error(code.saturating_neg());
    Ok(error.code().map(|code| refused(code.get())))
}
