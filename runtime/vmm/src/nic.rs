//! Network interfaces of a guest, as whoever launches its VM speaks of them: a tap, and a hardware address by which the guest finds the
//! device. What the interface is called and which addresses it has is between the launcher and the guest's agent.

use std::os::fd::OwnedFd;

use cloison_devices::{MacAddress, Net, NetConfig, NetError};
use serde::{Deserialize, Serialize};

/// The MTU of every device: the most there is, so that the interface's own can be any and can change while the guest runs.
const MTU: u16 = u16::MAX;

/// An interface that a guest has from its start.
#[derive(Debug)]
pub struct Nic {
    /// A tap with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR.
    pub tap: OwnedFd,
    /// The guest's hardware address; it may send from no other.
    pub mac: MacAddress,
}

/// Where a guest finds a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plugged {
    /// The slot it is in, by which it is unplugged.
    pub slot: u32,
    /// The hardware address by which the guest has known the device since its start. `None` for one that the guest's kernel finds in the
    /// slot: at its start, or when it is told to look there.
    pub present: Option<MacAddress>,
}

/// Makes the device behind which `nic` is.
pub(crate) fn connected(nic: Nic) -> Result<Net, NetError> {
    Net::new(nic.tap, config(nic.mac))
}

/// The address of the `number`-th device that waits for a tap, only for the guest to tell it by.
pub(crate) const fn spare_mac(number: u8) -> MacAddress {
    [0x02, 0xc1, 0xff, 0xff, 0xff, number]
}

/// Makes the `number`-th device that waits for a tap.
pub(crate) fn spare(number: u8) -> Result<Net, NetError> {
    Net::unconnected(config(spare_mac(number)))
}

fn config(mac: MacAddress) -> NetConfig {
    NetConfig {
        mac,
        mtu: MTU,
        spoofing: false,
    }
}
