//! Giving a guest the interfaces of a network namespace that somebody else prepared. Each gets a tap, and whatever comes in at one
//! goes out at the other.
//!
//! The interface keeps its addresses. The redirection takes every frame before the host's network stack sees it, so the
//! host answers nothing in the guest's place; and who prepared the interface finds it as it was left, which a CNI plugin's CHECK
//! insists on. The namespace is taken to be the sandbox's alone: nobody else shapes or filters traffic on its interfaces.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;

use futures_util::{FutureExt, StreamExt};
use rtnetlink::packet_route::link::InfoKind;
use rtnetlink::{LinkUnspec, packet_route::link::LinkMessage};

use crate::guest::{GuestInterface, Snapshot};
use crate::netlink::{Link, Netlink, Notices, tolerate};
use crate::{Error, Namespace, Result, macvtap, sys, sysctl};

/// How the taps are called; the interface's index follows.
const TAP: &str = "cltap";
/// Where the filters of an interface's ingress hang (`TC_H_INGRESS`, Linux's include/uapi/linux/pkt_sched.h).
const INGRESS: u32 = 0xffff_0000;

/// An interface that a guest can be given.
#[derive(Debug)]
pub struct Adopted {
    /// What to tell the guest.
    pub interface: GuestInterface,
    /// A tap with IFF_VNET_HDR and no offloads: the network device sets those its guest takes. An interface of somebody else's stays
    /// redirected as long as this is open.
    pub tap: OwnedFd,
}

/// What happened to a namespace's interfaces.
#[derive(Debug)]
pub enum Change {
    /// There is one more.
    Arrived(Adopted),
    /// One has other addresses, routes, neighbours, another name or MTU.
    Changed(GuestInterface),
    /// The one with this index is gone.
    Gone(u32),
    /// One cannot be adopted. It is not tried again.
    Refused {
        /// Its name.
        name: String,
        /// Why.
        error: Error,
    },
}

/// Adopts a namespace's interfaces: those that are there, and those that come.
///
/// An interface counts from when it is up. Until then whoever prepares it may still be naming and addressing it.
pub struct Adopter {
    namespace: Namespace,
    netlink: Netlink,
    notices: Notices,
    /// By index. `None` for one that was refused.
    adopted: BTreeMap<u32, Option<GuestInterface>>,
    changes: VecDeque<Change>,
    /// Whether there was a notice since the last complete look.
    noticed: bool,
}

impl Adopter {
    /// Watches `namespace`. To be called in a tokio runtime.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn new(namespace: &Namespace) -> Result<Self> {
        let (netlink, notices) = Netlink::watch(namespace)?;
        Ok(Self {
            namespace: namespace.clone(),
            netlink,
            notices,
            adopted: BTreeMap::new(),
            changes: VecDeque::new(),
            noticed: true,
        })
    }

    /// The changes up to this moment; on the first call, all interfaces that there are.
    ///
    /// # Errors
    /// When the namespace's interfaces cannot be listed.
    pub async fn changes(&mut self) -> Result<Vec<Change>> {
        self.look().await?;
        Ok(self.changes.drain(..).collect())
    }

    /// Waits for the next change. Nothing is lost when the future is dropped.
    ///
    /// # Errors
    /// When the namespace's interfaces cannot be listed or watched any more.
    pub async fn next(&mut self) -> Result<Change> {
        loop {
            if let Some(change) = self.changes.pop_front() {
                return Ok(change);
            }
            if !self.noticed && self.notices.next().await.is_none() {
                return Err(Error::System {
                    what: "watch the network namespace".to_owned(),
                    source: std::io::ErrorKind::BrokenPipe.into(),
                });
            }
            self.noticed = true;
            self.look().await?;
        }
    }

    /// Compares what is there with what was.
    async fn look(&mut self) -> Result<()> {
        // A configuration tool makes many small changes; one look serves all that came so far.
        while let Some(Some(())) = self.notices.next().now_or_never() {}
        let snapshot = Snapshot::take(&self.netlink).await?;
        let there: BTreeMap<u32, &Link> = snapshot
            .links
            .iter()
            .filter(|link| !link.name.starts_with(TAP))
            .map(|link| (link.index, link))
            .collect();
        let changes = &mut self.changes;
        self.adopted.retain(|index, adopted| {
            let stays = there.contains_key(index);
            if !stays && adopted.is_some() {
                changes.push_back(Change::Gone(*index));
            }
            stays
        });
        for (index, link) in there {
            // Loopback and tunnels are no Ethernet interfaces and have no such address.
            let Some(mac) = link.mac else { continue };
            let described = snapshot.describe(link, mac);
            match self.adopted.get_mut(&index) {
                None if !link.up => {}
                None => {
                    let adopted = self.adopt(link, described.clone()).await;
                    // One that has gone meanwhile never was.
                    let gone = |error: &Error| {
                        matches!(error.os_error(), Some(libc::ENODEV | libc::ENXIO))
                    };
                    if adopted.as_ref().is_err_and(gone) {
                        continue;
                    }
                    self.adopted
                        .insert(index, adopted.is_ok().then_some(described));
                    self.changes.push_back(match adopted {
                        Ok(adopted) => Change::Arrived(adopted),
                        Err(error) => Change::Refused {
                            name: link.name.clone(),
                            error,
                        },
                    });
                }
                Some(Some(known)) if *known != described => {
                    if known.mtu != described.mtu {
                        let resized = set_tap_mtu(&self.netlink, link).await;
                        tolerate(libc::ENODEV, resized)?;
                    }
                    *known = described.clone();
                    self.changes.push_back(Change::Changed(described));
                }
                Some(_) => {}
            }
        }
        self.noticed = false;
        Ok(())
    }

    async fn adopt(&self, link: &Link, interface: GuestInterface) -> Result<Adopted> {
        let tap = if link.kind == Some(InfoKind::MacVtap) {
            macvtap::open(&self.namespace, link)?
        } else {
            self.redirect(link).await?
        };
        Ok(Adopted { interface, tap })
    }

    /// Makes a tap and has each of the two take what comes in at the other.
    async fn redirect(&self, link: &Link) -> Result<OwnedFd> {
        let name = tap_name(link);
        let doing = || format!("make a tap for the interface {}", link.name);
        let tap = self.namespace.run(|| {
            let tap = sys::create_tap(&name).map_err(Error::errno(doing()))?;
            sysctl::silence(&name)?;
            Ok::<_, Error>(tap)
        })??;
        set_tap_mtu(&self.netlink, link).await?;
        let tap_index = self.netlink.index(&name).await?;
        for (from, to) in [(link.index, tap_index), (tap_index, link.index)] {
            redirect_ingress(&self.netlink, from, to).await?;
        }
        self.netlink.set_up(tap_index).await?;
        Ok(tap)
    }
}

fn tap_name(link: &Link) -> String {
    format!("{TAP}{}", link.index)
}

async fn set_tap_mtu(netlink: &Netlink, link: &Link) -> Result<()> {
    let message: LinkMessage = LinkUnspec::new_with_name(&tap_name(link))
        .mtu(link.mtu)
        .build();
    let what = format!("give the tap of {} an MTU of {}", link.name, link.mtu);
    netlink.set_link(&what, message).await
}

/// Sends everything that comes in at one interface out at another, before the network stack sees it.
async fn redirect_ingress(netlink: &Netlink, from: u32, to: u32) -> Result<()> {
    remove_ingress(netlink, from).await?;
    let what = "redirect an interface's traffic";
    let signed = from.cast_signed();
    let added = netlink.raw().qdisc().add(signed).ingress().execute().await;
    added.map_err(Error::netlink(what))?;
    let filter = netlink.raw().traffic_filter(signed).add();
    // The protocol is in network byte order.
    let all = u16::try_from(libc::ETH_P_ALL).unwrap_or_default().to_be();
    let filter = filter.parent(INGRESS).priority(1).protocol(all);
    let filter = filter.redirect(to).map_err(Error::netlink(what))?;
    filter.execute().await.map_err(Error::netlink(what))
}

/// It is no error when there is nothing to remove: the kernel says EINVAL or ENOENT then.
async fn remove_ingress(netlink: &Netlink, index: u32) -> Result<()> {
    let mut request = netlink.raw().qdisc().del(index.cast_signed());
    let header = &mut request.message_mut().header;
    header.parent = rtnetlink::packet_route::tc::TcHandle::INGRESS;
    header.handle = INGRESS.into();
    let removed = request.execute().await;
    let removed = removed.map_err(Error::netlink("end an interface's redirection"));
    tolerate(libc::EINVAL, tolerate(libc::ENOENT, removed))
}

/// Leaves the interfaces of `namespace` as they were before any was adopted, by this process or by one that is gone. Taps go
/// when they are closed.
///
/// # Errors
/// When the namespace cannot be entered, or the kernel refuses.
pub async fn release(namespace: &Namespace) -> Result<()> {
    let netlink = Netlink::connect(namespace)?;
    for link in netlink.links().await? {
        if link.mac.is_some() && !link.name.starts_with(TAP) {
            tolerate(libc::ENODEV, remove_ingress(&netlink, link.index).await)?;
        }
    }
    Ok(())
}

impl std::fmt::Debug for Adopter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Adopter")
            .field("namespace", &self.namespace)
            .field("adopted", &self.adopted)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
