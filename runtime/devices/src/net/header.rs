//! The header the guest puts before a frame (virtio 1.3 §5.1.6), and what it may say. Pure: it sees twelve bytes and the length of
//! the frame.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP_L4,
};

use super::{ETHERNET, HEADER_LENGTH};

/// A header is not one that a driver with these features makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    #[error("the guest wants an offload that it has not agreed on")]
    Features,
    #[error("a checksum is to be put outside its frame")]
    Checksum,
    #[error("a frame is to be cut into pieces of an impossible size")]
    Segments,
}

/// What a driver with `features` may say of a frame of `length` bytes; answers the header for the tap, with nothing in it that
/// was not looked at.
pub(super) fn check(
    header: [u8; HEADER_LENGTH],
    length: usize,
    features: u64,
) -> Result<Checked, Malformed> {
    let acked = |feature: u32| features & 1 << feature != 0;
    let word = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let mut checked = [0; HEADER_LENGTH];
    // Flags without a meaning here are ignored (§5.1.6.2.2).
    let needs_checksum = header[0] & VIRTIO_NET_HDR_F_NEEDS_CSUM as u8 != 0;
    if needs_checksum {
        if !acked(VIRTIO_NET_F_CSUM) {
            return Err(Malformed::Features);
        }
        let (start, offset) = (usize::from(word(6)), usize::from(word(8)));
        if start < ETHERNET || start + offset + 2 > length {
            return Err(Malformed::Checksum);
        }
        checked[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
        checked[6..10].copy_from_slice(&header[6..10]);
    }
    let congestion = header[1] & VIRTIO_NET_HDR_GSO_ECN as u8 != 0;
    let kind = u32::from(header[1]) & !VIRTIO_NET_HDR_GSO_ECN;
    let feature = match kind {
        VIRTIO_NET_HDR_GSO_NONE if !congestion => {
            return Ok(Checked {
                header: checked,
                segmented: false,
            });
        }
        VIRTIO_NET_HDR_GSO_TCPV4 => VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_HDR_GSO_TCPV6 => VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_HDR_GSO_UDP_L4 if !congestion => VIRTIO_NET_F_HOST_USO,
        _ => return Err(Malformed::Features),
    };
    if !acked(feature) || congestion && !acked(VIRTIO_NET_F_HOST_ECN) || !needs_checksum {
        return Err(Malformed::Features);
    }
    let (headers, size) = (usize::from(word(2)), usize::from(word(4)));
    if size == 0 || headers > length {
        return Err(Malformed::Segments);
    }
    checked[1..6].copy_from_slice(&header[1..6]);
    Ok(Checked {
        header: checked,
        segmented: true,
    })
}

/// A header that was checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Checked {
    /// For the tap.
    pub header: [u8; HEADER_LENGTH],
    /// The frame is to be cut into smaller ones.
    pub segmented: bool,
}
