//! Rules, in the steps of nf_tables' virtual machine: a packet's fields are loaded into registers from the first on, and compared,
//! looked up or replaced there. A step that does not match ends its rule.

use std::net::IpAddr;

use ipnet::IpNet;

use super::message::{Attributes, NFT_OBJECT_COUNTER, Verdict};

const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_PAYLOAD_DREG: u16 = 1;
const NFTA_PAYLOAD_BASE: u16 = 2;
const NFTA_PAYLOAD_OFFSET: u16 = 3;
const NFTA_PAYLOAD_LEN: u16 = 4;
const NFTA_META_DREG: u16 = 1;
const NFTA_META_KEY: u16 = 2;
const NFTA_META_SREG: u16 = 3;
const NFTA_CT_DREG: u16 = 1;
const NFTA_CT_KEY: u16 = 2;
const NFTA_FIB_DREG: u16 = 1;
const NFTA_FIB_RESULT: u16 = 2;
const NFTA_FIB_FLAGS: u16 = 3;
const NFT_FIB_RESULT_ADDRTYPE: u32 = 3;
const NFTA_FIB_F_DADDR: u32 = 1 << 1;
const NFTA_CMP_SREG: u16 = 1;
const NFTA_CMP_OP: u16 = 2;
const NFTA_CMP_DATA: u16 = 3;
const NFTA_BITWISE_SREG: u16 = 1;
const NFTA_BITWISE_DREG: u16 = 2;
const NFTA_BITWISE_LEN: u16 = 3;
const NFTA_BITWISE_MASK: u16 = 4;
const NFTA_BITWISE_XOR: u16 = 5;
const NFTA_LOOKUP_SET: u16 = 1;
const NFTA_LOOKUP_SREG: u16 = 2;
const NFTA_LOOKUP_DREG: u16 = 3;
const NFTA_LOOKUP_FLAGS: u16 = 5;
const NFTA_IMMEDIATE_DREG: u16 = 1;
const NFTA_IMMEDIATE_DATA: u16 = 2;
const NFTA_NAT_TYPE: u16 = 1;
const NFTA_NAT_FAMILY: u16 = 2;
const NFTA_NAT_REG_ADDR_MIN: u16 = 3;
const NFTA_NAT_REG_PROTO_MIN: u16 = 5;
const NFTA_LIMIT_RATE: u16 = 1;
const NFTA_LIMIT_UNIT: u16 = 2;
const NFTA_LIMIT_BURST: u16 = 3;
const NFTA_LIMIT_TYPE: u16 = 4;
const NFTA_LOG_PREFIX: u16 = 2;
const NFTA_OBJREF_IMM_TYPE: u16 = 1;
const NFTA_OBJREF_IMM_NAME: u16 = 2;
const NFTA_REJECT_TYPE: u16 = 1;
const NFTA_REJECT_ICMP_CODE: u16 = 2;

/// Something of a packet.
#[derive(Debug, Clone, Copy)]
pub(super) enum Field {
    /// Bytes of it: which header, from where, how many.
    Payload(libc::c_int, u32, u32),
    /// Something about it, and how many bytes that has.
    Meta(libc::c_int, u32),
    /// Something of its connection, four bytes.
    Connection(libc::c_int),
    /// What kind of address its destination is to this host (`RTN_…`), four bytes.
    DestinationType,
}

pub(super) const IIFNAME: Field = Field::Meta(libc::NFT_META_IIFNAME, 16);
pub(super) const OIFNAME: Field = Field::Meta(libc::NFT_META_OIFNAME, 16);
pub(super) const MARK: Field = Field::Meta(libc::NFT_META_MARK, 4);
pub(super) const L4PROTO: Field = Field::Meta(libc::NFT_META_L4PROTO, 1);
const NFPROTO: Field = Field::Meta(libc::NFT_META_NFPROTO, 1);
const PROTOCOL: Field = Field::Meta(libc::NFT_META_PROTOCOL, 2);
pub(super) const CT_STATE: Field = Field::Connection(libc::NFT_CT_STATE);
pub(super) const CT_STATUS: Field = Field::Connection(libc::NFT_CT_STATUS);
pub(super) const ETHER_SADDR: Field = Field::Payload(libc::NFT_PAYLOAD_LL_HEADER, 6, 6);
pub(super) const ETHER_TYPE: Field = Field::Payload(libc::NFT_PAYLOAD_LL_HEADER, 12, 2);
pub(super) const ARP_SADDR: Field = Field::Payload(libc::NFT_PAYLOAD_NETWORK_HEADER, 14, 4);
pub(super) const IP_SADDR: Field = Field::Payload(libc::NFT_PAYLOAD_NETWORK_HEADER, 12, 4);
pub(super) const IP_DADDR: Field = Field::Payload(libc::NFT_PAYLOAD_NETWORK_HEADER, 16, 4);
pub(super) const IP6_SADDR: Field = Field::Payload(libc::NFT_PAYLOAD_NETWORK_HEADER, 8, 16);
pub(super) const IP6_DADDR: Field = Field::Payload(libc::NFT_PAYLOAD_NETWORK_HEADER, 24, 16);
/// The type of a message of ICMP or ICMPv6.
pub(super) const ICMP_TYPE: Field = Field::Payload(libc::NFT_PAYLOAD_TRANSPORT_HEADER, 0, 1);
pub(super) const DPORT: Field = Field::Payload(libc::NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2);

/// `ct state established,related` (the kernel's NF_CT_STATE_BIT of each).
pub(super) const ESTABLISHED_OR_RELATED: u32 = 1 << 1 | 1 << 2;
/// `ct status dnat` (the kernel's IPS_DST_NAT).
pub(super) const DNAT: u32 = 1 << 5;

impl Field {
    fn length(self) -> u32 {
        match self {
            Self::Payload(_, _, length) | Self::Meta(_, length) => length,
            Self::Connection(_) | Self::DestinationType => 4,
        }
    }
}

/// The register that begins so many words of four bytes behind the first.
fn register(word: u32) -> u32 {
    libc::NFT_REG32_00.cast_unsigned() + word
}

/// A rule.
#[derive(Debug, Clone, Default)]
pub(super) struct Rule {
    expressions: Attributes,
}

impl Rule {
    pub(super) fn new() -> Self {
        Self::default()
    }

    pub(super) fn put(&self, list: &mut Attributes) {
        list.0.extend(&self.expressions.0);
    }

    fn step(mut self, name: &str, fill: impl FnOnce(&mut Attributes)) -> Self {
        self.expressions.nest(NFTA_LIST_ELEM, |expression| {
            expression
                .text(NFTA_EXPR_NAME, name)
                .nest(NFTA_EXPR_DATA, fill);
        });
        self
    }

    /// Loads a concatenation.
    fn load(self, fields: &[Field]) -> Self {
        let mut word = 0;
        fields.iter().fold(self, |rule, field| {
            let to = register(word);
            word += field.length().div_ceil(4);
            match *field {
                Field::Payload(base, offset, length) => rule.step("payload", |load| {
                    load.number(NFTA_PAYLOAD_DREG, to)
                        .constant(NFTA_PAYLOAD_BASE, base)
                        .number(NFTA_PAYLOAD_OFFSET, offset)
                        .number(NFTA_PAYLOAD_LEN, length);
                }),
                Field::Meta(key, _) => rule.step("meta", |load| {
                    load.number(NFTA_META_DREG, to).constant(NFTA_META_KEY, key);
                }),
                Field::Connection(key) => rule.step("ct", |load| {
                    load.number(NFTA_CT_DREG, to).constant(NFTA_CT_KEY, key);
                }),
                Field::DestinationType => rule.step("fib", |load| {
                    load.number(NFTA_FIB_DREG, to)
                        .number(NFTA_FIB_RESULT, NFT_FIB_RESULT_ADDRTYPE)
                        .number(NFTA_FIB_FLAGS, NFTA_FIB_F_DADDR);
                }),
            }
        })
    }

    fn compare(self, operator: libc::c_int, value: &[u8]) -> Self {
        self.step("cmp", |compare| {
            compare
                .number(NFTA_CMP_SREG, register(0))
                .constant(NFTA_CMP_OP, operator)
                .value(NFTA_CMP_DATA, value);
        })
    }

    /// Keeps the bits of `mask` and turns over those of `xor`.
    fn bitwise(self, mask: &[u8], xor: &[u8]) -> Self {
        self.step("bitwise", |bits| {
            bits.number(NFTA_BITWISE_SREG, register(0))
                .number(NFTA_BITWISE_DREG, register(0))
                .number(
                    NFTA_BITWISE_LEN,
                    u32::try_from(mask.len()).unwrap_or_default(),
                )
                .value(NFTA_BITWISE_MASK, mask)
                .value(NFTA_BITWISE_XOR, xor);
        })
    }

    fn lookup(self, set: &str, fill: impl FnOnce(&mut Attributes)) -> Self {
        self.step("lookup", |lookup| {
            lookup
                .text(NFTA_LOOKUP_SET, set)
                .number(NFTA_LOOKUP_SREG, register(0));
            fill(lookup);
        })
    }

    /// The field is this, as it is in the packet.
    pub(super) fn is(self, field: Field, value: &[u8]) -> Self {
        self.load(&[field]).compare(libc::NFT_CMP_EQ, value)
    }

    /// The field, big-endian, is one of these or between them.
    pub(super) fn between(self, field: Field, first: &[u8], last: &[u8]) -> Self {
        let loaded = self.load(&[field]);
        loaded
            .compare(libc::NFT_CMP_GTE, first)
            .compare(libc::NFT_CMP_LTE, last)
    }

    /// The field, in the host's byte order, has one of these bits.
    pub(super) fn has(self, field: Field, bits: u32) -> Self {
        let masked = self.load(&[field]).bitwise(&bits.to_ne_bytes(), &[0; 4]);
        masked.compare(libc::NFT_CMP_NEQ, &[0; 4])
    }

    /// The field, in the host's byte order, has all of these bits.
    pub(super) fn has_all(self, field: Field, bits: u32) -> Self {
        let masked = self.load(&[field]).bitwise(&bits.to_ne_bytes(), &[0; 4]);
        masked.compare(libc::NFT_CMP_EQ, &bits.to_ne_bytes())
    }

    pub(super) fn among(self, fields: &[Field], set: &str) -> Self {
        self.load(fields).lookup(set, |_| {})
    }

    pub(super) fn not_among(self, fields: &[Field], set: &str) -> Self {
        self.load(fields).lookup(set, |lookup| {
            lookup.constant(NFTA_LOOKUP_FLAGS, libc::NFT_LOOKUP_F_INV);
        })
    }

    /// What comes of the packet is in a map.
    pub(super) fn verdict_of(self, fields: &[Field], map: &str) -> Self {
        self.load(fields).lookup(map, |lookup| {
            lookup.constant(NFTA_LOOKUP_DREG, libc::NFT_REG_VERDICT);
        })
    }

    pub(super) fn ipv4(self) -> Self {
        self.is(NFPROTO, &byte(libc::NFPROTO_IPV4))
    }

    pub(super) fn ipv6(self) -> Self {
        self.is(NFPROTO, &byte(libc::NFPROTO_IPV6))
    }

    pub(super) fn protocol(self, number: libc::c_int) -> Self {
        self.is(L4PROTO, &byte(number))
    }

    /// What a frame carries, on a bridge.
    pub(super) fn carries(self, protocol: libc::c_int) -> Self {
        self.is(PROTOCOL, &ethertype(protocol))
    }

    /// The destination is in a subnet.
    pub(super) fn to(self, net: IpNet) -> Self {
        match net {
            IpNet::V4(_) => self.ipv4().within(IP_DADDR, net),
            IpNet::V6(_) => self.ipv6().within(IP6_DADDR, net),
        }
    }

    /// An address of a packet that is known to be of its family is in a subnet.
    pub(super) fn within(self, field: Field, net: IpNet) -> Self {
        let (address, mask) = (octets(net.network()), octets(net.netmask()));
        let loaded = self.load(&[field]);
        let masked = match net.prefix_len() == net.max_prefix_len() {
            true => loaded,
            false => loaded.bitwise(&mask, &vec![0; mask.len()]),
        };
        masked.compare(libc::NFT_CMP_EQ, &address)
    }

    /// Sends the packet to the address and port that a map has for it.
    pub(super) fn dnat(self, fields: &[Field], map: &str, family: libc::c_int) -> Self {
        let words = if family == libc::NFPROTO_IPV4 { 1 } else { 4 };
        let found = self.load(fields).lookup(map, |lookup| {
            lookup.number(NFTA_LOOKUP_DREG, register(0));
        });
        found.step("nat", |nat| {
            nat.constant(NFTA_NAT_TYPE, libc::NFT_NAT_DNAT)
                .constant(NFTA_NAT_FAMILY, family)
                .number(NFTA_NAT_REG_ADDR_MIN, register(0))
                .number(NFTA_NAT_REG_PROTO_MIN, register(words));
        })
    }

    pub(super) fn masquerade(self) -> Self {
        self.step("masq", |_| {})
    }

    /// Sets bits of the packet's mark.
    pub(super) fn mark(self, bits: u32) -> Self {
        let marked = self.load(&[MARK]);
        let marked = marked.bitwise(&(!bits).to_ne_bytes(), &bits.to_ne_bytes());
        marked.step("meta", |set| {
            set.constant(NFTA_META_KEY, libc::NFT_META_MARK)
                .number(NFTA_META_SREG, register(0));
        })
    }

    /// No more packets a second than this, and so many at once.
    pub(super) fn limit(self, rate: u64, burst: u32) -> Self {
        self.step("limit", |limit| {
            limit
                .bytes(NFTA_LIMIT_RATE, &rate.to_be_bytes())
                .bytes(NFTA_LIMIT_UNIT, &1u64.to_be_bytes())
                .number(NFTA_LIMIT_BURST, burst)
                .constant(NFTA_LIMIT_TYPE, libc::NFT_LIMIT_PKTS);
        })
    }

    pub(super) fn log(self, prefix: &str) -> Self {
        self.step("log", |log| {
            log.text(NFTA_LOG_PREFIX, prefix);
        })
    }

    pub(super) fn count(self, counter: &str) -> Self {
        self.step("objref", |object| {
            object
                .number(NFTA_OBJREF_IMM_TYPE, NFT_OBJECT_COUNTER)
                .text(NFTA_OBJREF_IMM_NAME, counter);
        })
    }

    pub(super) fn reset(self) -> Self {
        self.step("reject", |reject| {
            reject
                .constant(NFTA_REJECT_TYPE, libc::NFT_REJECT_TCP_RST)
                .bytes(NFTA_REJECT_ICMP_CODE, &[0]);
        })
    }

    /// Answers that the administrator does not want it.
    pub(super) fn prohibit(self) -> Self {
        let code = byte(libc::NFT_REJECT_ICMPX_ADMIN_PROHIBITED);
        self.step("reject", |reject| {
            reject
                .constant(NFTA_REJECT_TYPE, libc::NFT_REJECT_ICMPX_UNREACH)
                .bytes(NFTA_REJECT_ICMP_CODE, &code);
        })
    }

    pub(super) fn jump(self, chain: &str) -> Self {
        self.verdict(&Verdict::Jump(chain.to_owned()))
    }

    pub(super) fn accept(self) -> Self {
        self.verdict(&Verdict::Accept)
    }

    pub(super) fn drop(self) -> Self {
        self.verdict(&Verdict::Drop)
    }

    pub(super) fn verdict(self, verdict: &Verdict) -> Self {
        self.step("immediate", |immediate| {
            immediate
                .constant(NFTA_IMMEDIATE_DREG, libc::NFT_REG_VERDICT)
                .verdict(NFTA_IMMEDIATE_DATA, verdict);
        })
    }
}

/// The last byte of one of the kernel's constants.
fn byte(constant: libc::c_int) -> [u8; 1] {
    let [.., byte] = constant.to_be_bytes();
    [byte]
}

/// A protocol's number in a frame's header.
pub(super) fn ethertype(protocol: libc::c_int) -> [u8; 2] {
    let [.., high, low] = protocol.to_be_bytes();
    [high, low]
}

/// An address as it is in a packet.
pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}
