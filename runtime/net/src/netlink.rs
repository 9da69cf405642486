//! rtnetlink in a given namespace, in this crate's words. A netlink socket belongs to the namespace of the thread that makes it, so
//! only its making happens inside.

use std::future::Future;
use std::net::{Ipv4Addr, Ipv6Addr};

use futures_util::{Stream, StreamExt, TryStreamExt};
use rtnetlink::packet_core::NetlinkMessage;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::AddressMessage;
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType,
    LinkMessage,
};
use rtnetlink::packet_route::neighbour::NeighbourMessage;
use rtnetlink::packet_route::route::RouteMessage;
use rtnetlink::sys::AsyncSocket;
use rtnetlink::{Handle, LinkUnspec, MulticastGroup, RouteMessageBuilder};

use crate::{Error, Mac, Namespace, Result};

/// Requests to one namespace's kernel side.
#[derive(Debug, Clone)]
pub(crate) struct Netlink(Handle);

/// Something has changed in the namespace; each item says what, but only that it came matters here.
pub(crate) type Notices = Box<dyn Stream<Item = ()> + Send + Unpin>;

/// An interface, as far as it matters here.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    /// `None` when it is no Ethernet interface.
    pub(crate) mac: Option<Mac>,
    pub(crate) mtu: u32,
    pub(crate) up: bool,
    /// Whether IPv6 is switched off there (net.ipv6.conf.NAME.disable_ipv6).
    pub(crate) ipv6_disabled: bool,
    pub(crate) kind: Option<InfoKind>,
}

impl Netlink {
    /// Requests to `namespace`. To be called in a tokio runtime, which the connection then lives in.
    pub(crate) fn connect(namespace: &Namespace) -> Result<Self> {
        Self::open(namespace, &[]).map(|(netlink, _)| netlink)
    }

    /// The same, and notices of whatever changes about interfaces, addresses, routes and neighbours.
    pub(crate) fn watch(namespace: &Namespace) -> Result<(Self, Notices)> {
        Self::open(
            namespace,
            &[
                MulticastGroup::Link,
                MulticastGroup::Neigh,
                MulticastGroup::Ipv4Ifaddr,
                MulticastGroup::Ipv6Ifaddr,
                MulticastGroup::Ipv4Route,
                MulticastGroup::Ipv6Route,
            ],
        )
    }

    fn open(namespace: &Namespace, groups: &[MulticastGroup]) -> Result<(Self, Notices)> {
        let runtime = tokio::runtime::Handle::current();
        let (mut connection, handle, messages) = namespace
            .run(|| {
                let _runtime = runtime.enter();
                rtnetlink::new_multicast_connection(groups)
            })?
            .map_err(Error::system("open a netlink socket"))?;
        // A notice that finds no room is no error: those before it cause the same look, and that comes later.
        let socket = connection.socket_mut().socket_mut();
        socket
            .set_no_enobufs(true)
            .map_err(Error::system("set up a netlink socket"))?;
        runtime.spawn(connection);
        let notices = messages.map(|_: (NetlinkMessage<RouteNetlinkMessage>, _)| ());
        Ok((Self(handle), Box::new(notices)))
    }

    pub(crate) fn raw(&self) -> &Handle {
        &self.0
    }

    pub(crate) async fn links(&self) -> Result<Vec<Link>> {
        let links: Vec<_> = collect("list the interfaces", self.0.link().get().execute()).await?;
        Ok(links.into_iter().filter_map(Link::read).collect())
    }

    /// The interface called `name`; `None` when there is none.
    pub(crate) async fn link(&self, name: &str) -> Result<Option<Link>> {
        let found = self.0.link().get().match_name(name).execute();
        let found: Result<Vec<_>> = collect(format!("look for the interface {name}"), found).await;
        match found {
            Err(error) if error.os_error() == Some(libc::ENODEV) => Ok(None),
            found => Ok(found?.into_iter().find_map(Link::read)),
        }
    }

    pub(crate) async fn index(&self, name: &str) -> Result<u32> {
        let link = self.link(name).await?;
        link.map(|link| link.index)
            .ok_or_else(|| Error::NoInterface(name.to_owned()))
    }

    pub(crate) async fn set_link(&self, what: &str, message: LinkMessage) -> Result<()> {
        let set = self.0.link().set(message).execute().await;
        set.map_err(Error::netlink(what))
    }

    pub(crate) async fn set_up(&self, index: u32) -> Result<()> {
        let message = LinkUnspec::new_with_index(index).up().build();
        self.set_link("bring an interface up", message).await
    }

    pub(crate) async fn addresses(&self) -> Result<Vec<AddressMessage>> {
        collect("list the addresses", self.0.address().get().execute()).await
    }

    /// The routes of every table.
    pub(crate) async fn routes(&self) -> Result<Vec<RouteMessage>> {
        let what = "list the routes";
        let ipv4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let ipv6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
        let mut routes: Vec<_> = collect(what, self.0.route().get(ipv4).execute()).await?;
        match collect(what, self.0.route().get(ipv6).execute()).await {
            // A kernel without IPv6.
            Err(error) if error.os_error() == Some(libc::EOPNOTSUPP) => {}
            found => routes.extend(found?),
        }
        Ok(routes)
    }

    pub(crate) async fn neighbours(&self) -> Result<Vec<NeighbourMessage>> {
        collect("list the neighbours", self.0.neighbours().get().execute()).await
    }
}

impl Link {
    pub(crate) fn read(message: LinkMessage) -> Option<Self> {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            mac: None,
            mtu: 0,
            up: message.header.flags.contains(LinkFlags::Up),
            ipv6_disabled: false,
            kind: None,
        };
        let ethernet = message.header.link_layer_type == LinkLayerType::Ether;
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::Address(bytes) if ethernet => {
                    link.mac = <[u8; 6]>::try_from(bytes.as_slice())
                        .ok()
                        .and_then(|bytes| Mac::new(bytes).ok());
                }
                LinkAttribute::AfSpecUnspec(families) => {
                    link.ipv6_disabled = families.into_iter().any(disables_ipv6);
                }
                LinkAttribute::LinkInfo(infos) => {
                    link.kind = infos.into_iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        (!link.name.is_empty()).then_some(link)
    }
}

fn disables_ipv6(family: AfSpecUnspec) -> bool {
    let AfSpecUnspec::Inet6(settings) = family else {
        return false;
    };
    let mut settings = settings.into_iter();
    settings.any(|setting| matches!(setting, AfSpecInet6::DevConf(all) if all.disable_ipv6 != 0))
}

fn collect<T>(
    what: impl Into<String>,
    stream: impl Stream<Item = std::result::Result<T, rtnetlink::Error>>,
) -> impl Future<Output = Result<Vec<T>>> {
    let what = what.into();
    async move { stream.try_collect().await.map_err(Error::netlink(what)) }
}

/// Takes one error number for a success: what was to be is already so.
pub(crate) fn tolerate(errno: i32, result: Result<()>) -> Result<()> {
    match result {
        Err(error) if error.os_error() == Some(errno) => Ok(()),
        result => result,
    }
}
