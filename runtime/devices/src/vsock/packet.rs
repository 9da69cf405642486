//! The header of a vsock packet (virtio 1.3 §5.10.6) and what its fields may say. Pure: it copies 44 bytes in or out and
//! never touches guest memory or a descriptor.

/// Length of a packet's header in bytes.
pub(super) const HEADER_LEN: usize = 44;

/// Most payload bytes in one packet, either way. Linux never sends more, and a packet from the guest that does is refused.
pub(super) const MAX_PAYLOAD: usize = 64 << 10;

/// The host's context ID (virtio 1.3 §5.10.4).
pub(super) const HOST_CID: u64 = 2;

/// `type` of a stream socket (virtio 1.3 §5.10.6).
pub(super) const TYPE_STREAM: u16 = 1;

/// A header, every field as the sender wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    /// Payload bytes that follow.
    pub len: u32,
    pub socket_type: u16,
    pub op: u16,
    pub flags: u32,
    /// Bytes the sender is willing to buffer for this stream.
    pub buf_alloc: u32,
    /// Bytes of this stream the sender's user has taken so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    pub(super) fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Self {
        Self {
            src_cid: u64::from_le_bytes(field(bytes, 0)),
            dst_cid: u64::from_le_bytes(field(bytes, 8)),
            src_port: u32::from_le_bytes(field(bytes, 16)),
            dst_port: u32::from_le_bytes(field(bytes, 20)),
            len: u32::from_le_bytes(field(bytes, 24)),
            socket_type: u16::from_le_bytes(field(bytes, 28)),
            op: u16::from_le_bytes(field(bytes, 30)),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.socket_type.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The RST that answers this packet when no connection of ours does: everything about the sender turned round, and no
    /// credit, since there is no stream.
    pub(super) fn refusal(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            socket_type: self.socket_type,
            op: Op::Rst as u16,
            ..Self::default()
        }
    }
}

/// `N` bytes of a header at a constant offset.
fn field<const N: usize>(bytes: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
    let mut value = [0; N];
    value.copy_from_slice(&bytes[at..at + N]);
    value
}

/// What a packet asks for (virtio 1.3 §5.10.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    Request = 1,
    Response = 2,
    Rst = 3,
    Shutdown = 4,
    Rw = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    /// The operation of that number, if there is one.
    pub(super) fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Rst,
            4 => Self::Shutdown,
            5 => Self::Rw,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// Directions of a stream in which the sender of a SHUTDOWN is finished (virtio 1.3 §5.10.6.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Shutdown(u32);

impl Shutdown {
    pub(super) const NONE: Self = Self(0);
    /// The sender will receive no more.
    pub(super) const RECEIVE: Self = Self(1);
    /// The sender will send no more.
    pub(super) const SEND: Self = Self(2);
    pub(super) const BOTH: Self = Self(3);

    /// The directions a packet's flags name; bits without a meaning are dropped.
    pub(super) fn from_flags(flags: u32) -> Self {
        Self(flags & Self::BOTH.0)
    }

    pub(super) fn flags(self) -> u32 {
        self.0
    }

    pub(super) fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    pub(super) fn insert(&mut self, other: Self) {
        self.0 |= other.0;
    }

    /// What is in `self` and not in `other`.
    pub(super) fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_lies_where_the_standard_puts_it() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 0x1112_1314_1516_1718,
            src_port: 0x2122_2324,
            dst_port: 0x3132_3334,
            len: 0x4142_4344,
            socket_type: 0x5152,
            op: 0x6162,
            flags: 0x7172_7374,
            buf_alloc: 0x8182_8384,
            fwd_cnt: 0x9192_9394,
        };
        let bytes = header.to_bytes();
        assert_eq!(bytes[0], 0x08);
        assert_eq!(bytes[8], 0x18);
        assert_eq!(bytes[16], 0x24);
        assert_eq!(bytes[20], 0x34);
        assert_eq!(bytes[24], 0x44);
        assert_eq!(bytes[28..32], [0x52, 0x51, 0x62, 0x61]);
        assert_eq!(bytes[32], 0x74);
        assert_eq!(bytes[36], 0x84);
        assert_eq!(bytes[40..44], [0x94, 0x93, 0x92, 0x91]);
        assert_eq!(Header::from_bytes(&bytes), header);
    }

    #[test]
    fn only_the_seven_operations_have_a_number() {
        for number in 0..=u16::MAX {
            match Op::from_number(number) {
                Some(op) => assert_eq!(op as u16, number),
                None => assert!(number == 0 || number > 7),
            }
        }
    }

    #[test]
    fn shutdown_flags_without_a_meaning_are_dropped() {
        assert_eq!(Shutdown::from_flags(u32::MAX), Shutdown::BOTH);
        assert_eq!(Shutdown::from_flags(!3), Shutdown::NONE);
    }
}
