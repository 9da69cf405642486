//! Messages of nf_tables, as the kernel takes them (Linux's include/uapi/linux/netfilter/nf_tables.h, whose names the constants have),
//! and batches of them, of which it makes all or none. Numbers are big-endian, except where they are the packet's or the host's own.

use rtnetlink::packet_core::{
    Emitable, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, NetlinkHeader,
};

use super::rule::Rule;

/// The name of cloison's tables.
pub(super) const TABLE: &str = "cloison";
/// Bytes of `struct nlmsghdr`.
pub(super) const HEADER: usize = 16;
/// Bytes of `struct nfgenmsg`, which begins every message's payload.
pub(super) const FAMILY_HEADER: usize = 4;
/// Most elements in a message: an attribute has at most 65,535 bytes, and the longest element less than a hundred.
const ELEMENTS: usize = 500;

const NFTA_LIST_ELEM: u16 = 1;
pub(super) const NFTA_TABLE_NAME: u16 = 1;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_SET_TABLE: u16 = 1;
const NFTA_SET_NAME: u16 = 2;
const NFTA_SET_FLAGS: u16 = 3;
const NFTA_SET_KEY_TYPE: u16 = 4;
const NFTA_SET_KEY_LEN: u16 = 5;
const NFTA_SET_DATA_TYPE: u16 = 6;
const NFTA_SET_DATA_LEN: u16 = 7;
const NFTA_SET_ID: u16 = 10;
const NFTA_SET_USERDATA: u16 = 13;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_DATA: u16 = 2;
const NFTA_SET_ELEM_FLAGS: u16 = 3;
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NFTA_VERDICT_CHAIN: u16 = 2;
pub(super) const NFTA_OBJ_TABLE: u16 = 1;
pub(super) const NFTA_OBJ_NAME: u16 = 2;
pub(super) const NFTA_OBJ_TYPE: u16 = 3;
pub(super) const NFTA_OBJ_DATA: u16 = 4;
pub(super) const NFT_OBJECT_COUNTER: u32 = 1;

/// For `nft list` alone, which does not know it of names and marks: the key is in the host's byte order (libnftnl's
/// NFTNL_UDATA_SET_KEYBYTEORDER, four bytes, nftables' BYTEORDER_HOST_ENDIAN).
const HOST_ORDER: [u8; 6] = {
    let [a, b, c, d] = 1u32.to_ne_bytes();
    [0, 4, a, b, c, d]
};

/// The flag of an attribute that has attributes in it (Linux's include/uapi/linux/netlink.h).
const NLA_F_NESTED: u16 = 1 << 15;

/// Attributes, one behind the other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Attributes(pub(super) Vec<u8>);

impl Attributes {
    pub(super) fn bytes(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        self.attribute(kind, |inside| inside.0.extend(value))
    }

    pub(super) fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        self.attribute(kind, |inside| {
            inside.0.extend(value.bytes());
            inside.0.push(0);
        })
    }

    pub(super) fn number(&mut self, kind: u16, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// One of the kernel's constants.
    pub(super) fn constant(&mut self, kind: u16, value: libc::c_int) -> &mut Self {
        self.number(kind, value.cast_unsigned())
    }

    pub(super) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        self.attribute(kind | NLA_F_NESTED, fill)
    }

    /// A `struct nft_data` that is a value.
    pub(super) fn value(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        self.nest(kind, |data| {
            data.bytes(NFTA_DATA_VALUE, value);
        })
    }

    /// A `struct nft_data` that is a verdict.
    pub(super) fn verdict(&mut self, kind: u16, verdict: &Verdict) -> &mut Self {
        self.nest(kind, |data| {
            data.nest(NFTA_DATA_VERDICT, |inside| {
                inside.constant(NFTA_VERDICT_CODE, verdict.code());
                if let Verdict::Jump(chain) = verdict {
                    inside.text(NFTA_VERDICT_CHAIN, chain);
                }
            });
        })
    }

    fn attribute(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let start = self.0.len();
        self.0.extend([0; 2]);
        self.0.extend(kind.to_ne_bytes());
        fill(self);
        // Nothing here grows beyond that; the kernel refuses a message whose lengths do not fit each other.
        let length = u16::try_from(self.0.len() - start).unwrap_or(u16::MAX);
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }
}

/// What becomes of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    Accept,
    Drop,
    Return,
    Jump(String),
}

impl Verdict {
    fn code(&self) -> libc::c_int {
        match self {
            Self::Drop => libc::NF_DROP,
            Self::Accept => libc::NF_ACCEPT,
            Self::Return => libc::NFT_RETURN,
            Self::Jump(_) => libc::NFT_JUMP,
        }
    }
}

/// Which of cloison's two tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Family {
    Inet,
    Bridge,
}

impl Family {
    fn number(self) -> u8 {
        let number = match self {
            Self::Inet => libc::NFPROTO_INET,
            Self::Bridge => libc::NFPROTO_BRIDGE,
        };
        u8::try_from(number).unwrap_or_default()
    }
}

/// A type of nft's language, under the number by which `nft list` knows it (nftables' include/datatype.h); the kernel knows lengths
/// alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Type {
    Ipv4 = 7,
    Ipv6 = 8,
    Ether = 9,
    Protocol = 12,
    Service = 13,
    Mark = 19,
    Icmpv6 = 29,
    Ifname = 41,
}

impl Type {
    fn length(self) -> u32 {
        match self {
            Self::Protocol | Self::Icmpv6 => 1,
            Self::Service => 2,
            Self::Ipv4 | Self::Mark => 4,
            Self::Ether => 6,
            Self::Ipv6 | Self::Ifname => 16,
        }
    }

    /// The number and the length of a concatenation.
    fn concatenated(types: &[Self]) -> (u32, u32) {
        match types {
            [one] => (*one as u32, one.length()),
            // nft's TYPE_BITS is 6.
            _ => types.iter().fold((0, 0), |(number, length), one| {
                let length = length + one.length().next_multiple_of(4);
                (number << 6 | *one as u32, length)
            }),
        }
    }
}

/// What a set's elements lead to.
#[derive(Debug, Clone, Copy)]
pub(super) enum Mapped {
    Nothing,
    To(&'static [Type]),
    Verdicts,
}

/// A set or a map.
#[derive(Debug, Clone, Copy)]
pub(super) struct Set {
    pub(super) family: Family,
    pub(super) name: &'static str,
    pub(super) key: &'static [Type],
    pub(super) mapped: Mapped,
    /// Whether its elements are ranges.
    pub(super) interval: bool,
}

/// What an element leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    Nothing,
    Data(Vec<u8>),
    Verdict(Verdict),
}

/// An element of a set or a map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Element {
    pub(super) family: Family,
    pub(super) set: &'static str,
    pub(super) key: Vec<u8>,
    pub(super) value: Value,
    /// Whether it is the first that a range does not have in it, instead of the range's first.
    pub(super) ends: bool,
}

impl Element {
    pub(super) fn new(family: Family, set: &'static str, key: &[&[u8]]) -> Self {
        Self {
            family,
            set,
            key: concatenation(key),
            value: Value::Nothing,
            ends: false,
        }
    }

    fn put(&self, list: &mut Attributes) {
        list.nest(NFTA_LIST_ELEM, |element| {
            element.value(NFTA_SET_ELEM_KEY, &self.key);
            match &self.value {
                Value::Nothing => {}
                Value::Data(value) => {
                    element.value(NFTA_SET_ELEM_DATA, value);
                }
                Value::Verdict(verdict) => {
                    element.verdict(NFTA_SET_ELEM_DATA, verdict);
                }
            }
            if self.ends {
                element.constant(NFTA_SET_ELEM_FLAGS, libc::NFT_SET_ELEM_INTERVAL_END);
            }
        });
    }
}

/// Fields as they are in a concatenation: each to the next multiple of four bytes. One alone is as it is.
pub(super) fn concatenation(fields: &[&[u8]]) -> Vec<u8> {
    let mut joined = Vec::new();
    for field in fields {
        joined.extend(*field);
        if fields.len() > 1 {
            joined.resize(joined.len().next_multiple_of(4), 0);
        }
    }
    joined
}

/// Where a chain is called, and for what.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hook {
    pub(super) kind: &'static str,
    pub(super) number: libc::c_int,
    pub(super) priority: i32,
}

/// Changes to the packet filter, of which the kernel makes all or none. Adding what is there is no error; removing what is not
/// there is one, ENOENT.
#[derive(Debug, Clone, Default)]
pub(crate) struct Batch {
    messages: Vec<Message>,
}

#[derive(Debug, Clone)]
struct Message {
    /// Verb phrase with its object.
    doing: String,
    bytes: Vec<u8>,
}

impl Batch {
    pub(super) fn add_table(&mut self, family: Family) {
        let doing = "add a table".to_owned();
        self.push(
            doing,
            libc::NFT_MSG_NEWTABLE,
            NLM_F_CREATE,
            family,
            |table| {
                table.text(NFTA_TABLE_NAME, TABLE);
            },
        );
    }

    pub(super) fn remove_table(&mut self, family: Family) {
        let doing = "remove a table".to_owned();
        self.push(doing, libc::NFT_MSG_DELTABLE, 0, family, |table| {
            table.text(NFTA_TABLE_NAME, TABLE);
        });
    }

    pub(super) fn add_set(&mut self, set: &Set) {
        let doing = format!("add the set {}", set.name);
        // Distinguishes it from others of the batch, if it were anonymous.
        let id = u32::try_from(self.messages.len()).unwrap_or_default();
        self.push(
            doing,
            libc::NFT_MSG_NEWSET,
            NLM_F_CREATE,
            set.family,
            |new| {
                let (key, length) = Type::concatenated(set.key);
                let mut flags = 0;
                if set.interval {
                    flags |= libc::NFT_SET_INTERVAL;
                }
                if !matches!(set.mapped, Mapped::Nothing) {
                    flags |= libc::NFT_SET_MAP;
                }
                new.text(NFTA_SET_TABLE, TABLE)
                    .text(NFTA_SET_NAME, set.name)
                    .constant(NFTA_SET_FLAGS, flags)
                    .number(NFTA_SET_KEY_TYPE, key)
                    .number(NFTA_SET_KEY_LEN, length)
                    .number(NFTA_SET_ID, id);
                if matches!(set.key, [Type::Ifname | Type::Mark]) {
                    new.bytes(NFTA_SET_USERDATA, &HOST_ORDER);
                }
                match set.mapped {
                    Mapped::Nothing => {}
                    Mapped::To(types) => {
                        let (data, length) = Type::concatenated(types);
                        new.number(NFTA_SET_DATA_TYPE, data)
                            .number(NFTA_SET_DATA_LEN, length);
                    }
                    Mapped::Verdicts => {
                        new.number(NFTA_SET_DATA_TYPE, libc::NFT_DATA_VERDICT);
                    }
                }
            },
        );
    }

    pub(super) fn add_chain(&mut self, family: Family, name: &str, hook: Option<Hook>) {
        let doing = format!("add the chain {name}");
        self.push(
            doing,
            libc::NFT_MSG_NEWCHAIN,
            NLM_F_CREATE,
            family,
            |chain| {
                chain
                    .text(NFTA_CHAIN_TABLE, TABLE)
                    .text(NFTA_CHAIN_NAME, name);
                if let Some(hook) = hook {
                    chain
                        .nest(NFTA_CHAIN_HOOK, |at| {
                            at.constant(NFTA_HOOK_HOOKNUM, hook.number)
                                .constant(NFTA_HOOK_PRIORITY, hook.priority);
                        })
                        .text(NFTA_CHAIN_TYPE, hook.kind);
                }
            },
        );
    }

    /// Removes a chain, in which there must be no rules and to which nothing must lead.
    pub(super) fn remove_chain(&mut self, family: Family, name: &str) {
        let doing = format!("remove the chain {name}");
        self.push(doing, libc::NFT_MSG_DELCHAIN, 0, family, |chain| {
            chain
                .text(NFTA_CHAIN_TABLE, TABLE)
                .text(NFTA_CHAIN_NAME, name);
        });
    }

    /// Removes a chain's rules.
    pub(super) fn flush_chain(&mut self, family: Family, name: &str) {
        let doing = format!("remove the rules of the chain {name}");
        self.push(doing, libc::NFT_MSG_DELRULE, 0, family, |rule| {
            rule.text(NFTA_RULE_TABLE, TABLE)
                .text(NFTA_RULE_CHAIN, name);
        });
    }

    /// Adds a rule at the end of a chain.
    pub(super) fn add_rule(&mut self, family: Family, chain: &str, rule: &Rule) {
        let doing = format!("add a rule to the chain {chain}");
        let flags = NLM_F_CREATE | NLM_F_APPEND;
        self.push(doing, libc::NFT_MSG_NEWRULE, flags, family, |new| {
            new.text(NFTA_RULE_TABLE, TABLE)
                .text(NFTA_RULE_CHAIN, chain)
                .nest(NFTA_RULE_EXPRESSIONS, |list| rule.put(list));
        });
    }

    pub(super) fn add_counter(&mut self, name: &str) {
        let doing = format!("add the counter {name}");
        self.push(
            doing,
            libc::NFT_MSG_NEWOBJ,
            NLM_F_CREATE,
            Family::Inet,
            |new| {
                counter(new, name).nest(NFTA_OBJ_DATA, |_| {});
            },
        );
    }

    /// Removes a counter that no rule counts by.
    pub(super) fn remove_counter(&mut self, name: &str) {
        let doing = format!("remove the counter {name}");
        self.push(doing, libc::NFT_MSG_DELOBJ, 0, Family::Inet, |counted| {
            counter(counted, name);
        });
    }

    pub(super) fn add_elements(&mut self, elements: &[Element]) {
        self.elements(elements, "add to", libc::NFT_MSG_NEWSETELEM, NLM_F_CREATE);
    }

    pub(super) fn remove_elements(&mut self, elements: &[Element]) {
        self.elements(elements, "remove from", libc::NFT_MSG_DELSETELEM, 0);
    }

    /// Removes all elements of a set.
    pub(super) fn flush_set(&mut self, set: &Set) {
        let doing = format!("empty the set {}", set.name);
        self.push(doing, libc::NFT_MSG_DELSETELEM, 0, set.family, |message| {
            message
                .text(NFTA_SET_ELEM_LIST_TABLE, TABLE)
                .text(NFTA_SET_ELEM_LIST_SET, set.name);
        });
    }

    fn elements(&mut self, elements: &[Element], verb: &str, kind: libc::c_int, flags: u16) {
        let mut elements: Vec<&Element> = elements.iter().collect();
        elements.sort_by_key(|element| (element.family, element.set));
        let of_one_set = elements.chunk_by(|a, b| (a.family, a.set) == (b.family, b.set));
        for some in of_one_set.flat_map(|elements| elements.chunks(ELEMENTS)) {
            let (family, set) = (some[0].family, some[0].set);
            let doing = format!("{verb} the set {set}");
            self.push(doing, kind, flags, family, |message| {
                message
                    .text(NFTA_SET_ELEM_LIST_TABLE, TABLE)
                    .text(NFTA_SET_ELEM_LIST_SET, set)
                    .nest(NFTA_SET_ELEM_LIST_ELEMENTS, |list| {
                        some.iter().for_each(|element| element.put(list));
                    });
            });
        }
    }

    /// Goes on with what is in `other`.
    pub(super) fn append(&mut self, other: &Self) {
        self.messages.extend_from_slice(&other.messages);
    }

    fn push(
        &mut self,
        doing: String,
        kind: libc::c_int,
        flags: u16,
        family: Family,
        fill: impl FnOnce(&mut Attributes),
    ) {
        let kind = libc::NFNL_SUBSYS_NFTABLES << 8 | kind;
        let family = [family.number(), 0, 0, 0];
        let bytes = message(kind, NLM_F_REQUEST | flags, family, fill);
        self.messages.push(Message { doing, bytes });
    }

    /// What a message of the batch does, by its sequence number.
    pub(super) fn doing(&self, sequence: u32) -> Option<&str> {
        let position = usize::try_from(sequence).ok()?.checked_sub(1)?;
        self.messages.get(position).map(|m| m.doing.as_str())
    }

    /// All messages, as they go to the kernel at once, with sequence numbers from 0. The last change asks for an answer: its number is
    /// returned too.
    pub(super) fn encode(&self) -> (Vec<u8>, u32) {
        // `struct nfgenmsg`: which subsystem the batch is for, big-endian.
        let subsystem = u16::try_from(libc::NFNL_SUBSYS_NFTABLES).unwrap_or_default();
        let [high, low] = subsystem.to_be_bytes();
        let border = |kind| message(kind, NLM_F_REQUEST, [0, 0, high, low], |_| {});
        let (begin, end) = (
            border(libc::NFNL_MSG_BATCH_BEGIN),
            border(libc::NFNL_MSG_BATCH_END),
        );
        let changes = self.messages.iter().map(|message| &message.bytes);
        let mut last = 0;
        let mut whole = Vec::new();
        let all = std::iter::once(&begin).chain(changes).chain([&end]);
        for (sequence, bytes) in (0u32..).zip(all) {
            let start = whole.len();
            whole.extend(bytes);
            // `nlmsg_flags` and `nlmsg_seq`.
            whole[start + 8..start + 12].copy_from_slice(&sequence.to_ne_bytes());
            if usize::try_from(sequence).is_ok_and(|number| number == self.messages.len()) {
                last = sequence;
                let flags = u16::from_ne_bytes([bytes[6], bytes[7]]) | NLM_F_ACK;
                whole[start + 6..start + 8].copy_from_slice(&flags.to_ne_bytes());
            }
        }
        (whole, last)
    }
}

/// Names an element of a set.
pub(super) fn element(attributes: &mut Attributes, element: &Element) {
    attributes
        .text(NFTA_SET_ELEM_LIST_TABLE, TABLE)
        .text(NFTA_SET_ELEM_LIST_SET, element.set)
        .nest(NFTA_SET_ELEM_LIST_ELEMENTS, |list| element.put(list));
}

/// Names a counter.
pub(super) fn counter<'a>(attributes: &'a mut Attributes, name: &str) -> &'a mut Attributes {
    attributes
        .text(NFTA_OBJ_TABLE, TABLE)
        .text(NFTA_OBJ_NAME, name)
        .number(NFTA_OBJ_TYPE, NFT_OBJECT_COUNTER)
}

/// One message, with the sequence number 0.
pub(super) fn message(
    kind: libc::c_int,
    flags: u16,
    family: [u8; FAMILY_HEADER],
    fill: impl FnOnce(&mut Attributes),
) -> Vec<u8> {
    let mut attributes = Attributes(vec![0; HEADER]);
    attributes.0.extend(family);
    fill(&mut attributes);
    let mut bytes = attributes.0;
    let mut header = NetlinkHeader::default();
    header.length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    header.message_type = u16::try_from(kind).unwrap_or_default();
    header.flags = flags;
    header.emit(&mut bytes[..HEADER]);
    bytes
}
