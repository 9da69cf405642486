//! The network device (virtio 1.3 §5.1): one pair of queues over a tap descriptor that was handed in. Frames move straight between the
//! tap and guest memory, with checksums and segmentation left to whoever needs them, as far as the tap and the guest can. The
//! device opens nothing and knows of no address but the guest's hardware address. It can be without a tap: nothing is connected then.

mod buffers;
mod header;
mod receive;
mod tap;
mod transmit;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::knob::Knob;
use crate::{Broken, Context, Device, QueueMask, config};
use tap::Tap;

const NAME: &str = "net";
/// Queues (§5.1.2).
const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZE: u16 = 256;
/// Length of the header before every frame (§5.1.6): with VERSION_1 it always has the field for merged buffers.
const HEADER_LENGTH: usize = 12;
/// Length of a frame's own header: destination, source, type.
const ETHERNET: usize = 14;
/// Most bytes of a frame that Linux hands out or takes: a segmented packet of 64 KiB behind a header with a VLAN tag.
const MAX_FRAME: usize = (64 << 10) + ETHERNET + 4;
/// Least MTU: what IPv6 requires (RFC 8200 §5).
const LEAST_MTU: u16 = 1280;
/// Most frames moved in one direction in one call.
const BATCH: usize = 64;
/// Version of [`NetState`].
const STATE_VERSION: u32 = 1;

/// A hardware address.
pub type MacAddress = [u8; 6];

/// What the guest is told of its network, and held to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetConfig {
    /// The guest's hardware address.
    pub mac: MacAddress,
    /// Most bytes in a packet, frame headers not counted; at least 1280.
    pub mtu: u16,
    /// Whether the guest may send frames from other hardware addresses than its own, as a bridge inside it would.
    pub spoofing: bool,
}

/// Why there is no network device.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The system refused something the device cannot be without.
    #[error("{what} for the network device failed")]
    Setup {
        /// What was being done.
        what: &'static str,
        /// What the system said.
        source: Errno,
    },
    /// The descriptor is of something else.
    #[error(
        "the network device's descriptor is not a tap with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"
    )]
    Unsuitable,
    /// No host has such an address.
    #[error("a guest's hardware address cannot be a group address or all zeroes")]
    Mac,
    /// The MTU is too small.
    #[error("an MTU of {0} is too small: give at least {LEAST_MTU}")]
    Mtu(u16),
    /// A saved state is not of this version.
    #[error(
        "the saved state of the network device has version {0}; this program knows version {STATE_VERSION}"
    )]
    StateVersion(u32),
    /// A saved state is of a device that told its guest something else.
    #[error("the saved state is of a network device with another hardware address or MTU")]
    StateConfig,
}

/// What is needed to give a restored guest the same device. Frames under way are not in it: networks lose some.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    version: u32,
    acked_features: u64,
    mac: MacAddress,
    mtu: u16,
    link_up: bool,
}

/// How many frames there were of each kind since the device was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NetCounters {
    /// Given to the guest.
    pub received: u64,
    /// Taken from the guest and given to the tap.
    pub transmitted: u64,
    /// Dropped because the guest's buffers were too small for them.
    pub unfit: u64,
    /// Dropped because the guest had forged or mangled them.
    pub malformed: u64,
    /// Dropped because the tap did not take them, or the link was down.
    pub refused: u64,
}

/// What a device and its handles share.
#[derive(Debug)]
struct Shared {
    /// Whether the link is up: 1 or 0.
    link: Knob,
    /// What the device is to be connected to, until it has seen to that.
    cable: Mutex<Option<Cable>>,
    counters: Counters,
}

/// What a device is to be connected to.
#[derive(Debug)]
enum Cable {
    /// A tap, behind which the guest is known by this hardware address.
    Plugged(Tap, MacAddress),
    /// Nothing.
    Pulled,
}

impl Shared {
    fn cable(&self) -> MutexGuard<'_, Option<Cable>> {
        // Nothing panics with the lock held.
        self.cable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lay(&self, cable: Cable, up: bool) {
        *self.cable() = Some(cable);
        self.link.set(up.into());
        self.link.again().ask();
    }
}

#[derive(Debug, Default)]
struct Counters {
    received: AtomicU64,
    transmitted: AtomicU64,
    unfit: AtomicU64,
    malformed: AtomicU64,
    refused: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Plugs the cable in and out, and counts frames, from other threads.
#[derive(Debug, Clone)]
pub struct NetHandle(Arc<Shared>);

impl NetHandle {
    /// Connects the device to `tap`, in place of what it is connected to, and brings the link up. From then on the guest may send
    /// from `mac` and no other address; it is for the guest's agent to give its interface that one.
    ///
    /// # Errors
    /// [`NetError`] when the tap or the address cannot be used; the device then stays as it is.
    pub fn connect(&self, tap: OwnedFd, mac: MacAddress) -> Result<(), NetError> {
        check_mac(mac)?;
        let tap = Tap::new(tap)?;
        self.0.lay(Cable::Plugged(tap, mac), true);
        Ok(())
    }

    /// Closes the tap. The link is down until the device is connected again.
    pub fn disconnect(&self) {
        self.0.lay(Cable::Pulled, false);
    }

    /// Sets whether the guest sees a link. While there is none, no frame goes either way.
    pub fn set_link(&self, up: bool) {
        self.0.link.set(up.into());
    }

    /// How many frames there were.
    pub fn counters(&self) -> NetCounters {
        let Counters {
            received,
            transmitted,
            unfit,
            malformed,
            refused,
        } = &self.0.counters;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NetCounters {
            received: load(received),
            transmitted: load(transmitted),
            unfit: load(unfit),
            malformed: load(malformed),
            refused: load(refused),
        }
    }
}

/// A virtio network device.
#[derive(Debug)]
pub struct Net {
    tap: Option<Tap>,
    /// Features of the first tap, which the guest has been promised.
    tap_features: u64,
    config: NetConfig,
    acked_features: u64,
    shared: Arc<Shared>,
    epoll: Epoll,
    /// A frame that has been read and found too few buffers; empty when there is none.
    held: Vec<u8>,
    /// Whether the guest has been given frames since it last offered buffers, and so has a reason to offer more.
    given: bool,
}

impl Net {
    /// A device over `tap`, a descriptor of a tap interface that was made with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR; it is made
    /// non-blocking, and its offloads become the guest's. The link is up.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn new(tap: OwnedFd, config: NetConfig) -> Result<Self, NetError> {
        Self::make(Some(Tap::new(tap)?), config)
    }

    /// A device that [`NetHandle::connect`] gives its tap. The link is down until then.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn unconnected(config: NetConfig) -> Result<Self, NetError> {
        Self::make(None, config)
    }

    fn make(tap: Option<Tap>, config: NetConfig) -> Result<Self, NetError> {
        check_mac(config.mac)?;
        if config.mtu < LEAST_MTU {
            return Err(NetError::Mtu(config.mtu));
        }
        let setup = |what| move |source| NetError::Setup { what, source };
        let link = Knob::new(tap.is_some().into()).map_err(setup("creating an eventfd"))?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map_err(setup("creating an epoll instance"))?;
        if let Some(tap) = &tap {
            watch(&epoll, tap).map_err(setup("watching the tap"))?;
        }
        epoll
            .add(link.fd(), EpollEvent::new(EpollFlags::EPOLLIN, 0))
            .map_err(setup("watching an eventfd"))?;
        let counters = Counters::default();
        // What only some taps can do is not promised in the name of one that is yet to come.
        let tap_features = tap.as_ref().map_or(Tap::features_of(false), Tap::features);
        Ok(Self {
            tap,
            tap_features,
            config,
            acked_features: 0,
            shared: Arc::new(Shared {
                link,
                cable: Mutex::new(None),
                counters,
            }),
            epoll,
            held: Vec::new(),
            given: false,
        })
    }

    /// A way to plug the cable in and out.
    pub fn handle(&self) -> NetHandle {
        NetHandle(Arc::clone(&self.shared))
    }

    /// The state from which [`Net::restore`] makes the same device.
    pub fn state(&self) -> NetState {
        NetState {
            version: STATE_VERSION,
            acked_features: self.acked_features,
            mac: self.config.mac,
            mtu: self.config.mtu,
            link_up: self.link_up(),
        }
    }

    /// Takes on `state`. The tap may be another; what it cannot do of what the guest was promised is lost with the frames that
    /// need it.
    ///
    /// # Errors
    /// [`NetError::StateVersion`], [`NetError::StateConfig`].
    pub fn restore(&mut self, state: &NetState) -> Result<(), NetError> {
        if state.version != STATE_VERSION {
            return Err(NetError::StateVersion(state.version));
        }
        if (state.mac, state.mtu) != (self.config.mac, self.config.mtu) {
            return Err(NetError::StateConfig);
        }
        self.set_acked_features(state.acked_features);
        self.shared.link.set(state.link_up.into());
        Ok(())
    }

    fn link_up(&self) -> bool {
        self.shared.link.get() != 0
    }

    fn acked(&self, feature: u32) -> bool {
        self.acked_features & 1 << feature != 0
    }

    /// The guest's hardware address.
    pub fn mac(&self) -> MacAddress {
        self.config.mac
    }

    /// Whether it has a tap.
    pub fn is_connected(&self) -> bool {
        self.tap.is_some()
    }

    /// Does what a handle has asked for.
    fn change_cable(&mut self) {
        let Some(cable) = self.shared.cable().take() else {
            return;
        };
        // A frame of another network has no business here. The tap that was is no longer watched once it is closed.
        self.held.clear();
        self.tap = None;
        let Cable::Plugged(tap, mac) = cable else {
            return;
        };
        if let Err(errno) = watch(&self.epoll, &tap) {
            return self.lose_tap(errno);
        }
        self.config.mac = mac;
        self.tap = Some(tap);
        self.set_acked_features(self.acked_features);
    }

    /// The tap is no more: to the guest, the cable has been pulled.
    fn lose_tap(&mut self, errno: Errno) {
        match errno {
            // It was removed, as when the sandbox has left its network.
            Errno::EBADFD => tracing::debug!("the network device's tap is gone"),
            errno => tracing::warn!("the network device has lost its tap: {errno}"),
        }
        self.shared.link.set(0);
    }
}

fn check_mac(mac: MacAddress) -> Result<(), NetError> {
    match mac[0] & 1 != 0 || mac == [0; 6] {
        true => Err(NetError::Mac),
        false => Ok(()),
    }
}

/// Edge-triggered, frames that wait for buffers do not make the descriptor readable again and again.
fn watch(epoll: &Epoll, tap: &Tap) -> Result<(), Errno> {
    let edge = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
    epoll.add(tap.fd(), EpollEvent::new(edge, 0))
}

impl Device for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_MTU
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | self.tap_features
    }

    fn set_acked_features(&mut self, features: u64) {
        self.acked_features = features & self.features();
        if let Some(tap) = &self.tap
            && let Err(errno) = tap.set_offloads(self.acked_features)
        {
            tracing::warn!("the tap does not take the guest's offloads: {errno}");
        }
    }

    /// `struct virtio_net_config` (§5.1.4). There is one pair of queues, and no speed to speak of.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut bytes = [0; 12];
        bytes[0..6].copy_from_slice(&self.config.mac);
        let status = if self.link_up() {
            VIRTIO_NET_S_LINK_UP as u16
        } else {
            0
        };
        bytes[6..8].copy_from_slice(&status.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.config.mtu.to_le_bytes());
        config::read(&bytes, offset, data);
    }

    fn config_generation(&self) -> u32 {
        self.shared.link.generation()
    }

    fn queue_event(
        &mut self,
        ctx: &mut Context<'_, '_>,
        index: usize,
    ) -> Result<QueueMask, Broken> {
        match index {
            RX => {
                self.given = false;
                self.receive(ctx)
            }
            TX => self.transmit(ctx),
            _ => Ok(QueueMask::NONE),
        }
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        use std::os::fd::AsFd;
        Some(self.epoll.0.as_fd())
    }

    fn host_event(&mut self, ctx: &mut Context<'_, '_>) -> Result<QueueMask, Broken> {
        // Which of the two it is does not matter; looking makes an edge of the tap's seen. It cannot fail but by a signal.
        let _ = self
            .epoll
            .wait(&mut [EpollEvent::empty(); 2], EpollTimeout::ZERO);
        self.shared.link.again().asked();
        self.change_cable();
        let mut used = self.receive(ctx)?;
        used.insert_all(self.transmit(ctx)?);
        Ok(used)
    }

    fn reset(&mut self) {
        self.set_acked_features(0);
        self.held = Vec::new();
        self.given = false;
    }
}

#[cfg(test)]
mod tests;
