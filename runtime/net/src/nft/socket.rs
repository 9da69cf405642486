//! A socket to the packet filter of a namespace. The kernel handles what is sent before the sending returns, so that every answer is
//! there by then, and nothing is waited for.

use std::io;
use std::os::fd::AsFd;

use nix::sys::socket::{setsockopt, sockopt};
use rtnetlink::packet_core::{
    ErrorBuffer, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer,
    NlasIterator,
};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use super::message::{Attributes, Batch, FAMILY_HEADER, NFTA_TABLE_NAME, TABLE, message};
use crate::{Error, Result};

/// What a socket has room for unless it is told otherwise (`net.core.wmem_default`), with some to spare.
const ORDINARY: usize = 100_000;
/// Most bytes of answers in a datagram: what the kernel puts into one of a dump (NLMSG_GOODSIZE, or 32 KiB).
const DATAGRAM: usize = 1 << 16;

/// An object that the kernel has told of: its family, and its attributes by their numbers.
pub(super) type Object = (u8, Vec<(u16, Vec<u8>)>);

/// Has the kernel make a batch of changes in the calling thread's namespace.
pub(super) fn change(batch: &Batch) -> Result<()> {
    let (bytes, last) = batch.encode();
    let socket = open("change the packet filter")?;
    if bytes.len() > ORDINARY {
        setsockopt(&socket.as_fd(), sockopt::SndBufForce, &bytes.len())
            .map_err(Error::errno("make room for the rules of the packet filter"))?;
    }
    let mut answers = Answers::default();
    send(&socket, &bytes, "change the packet filter", |datagram| {
        answers.read(datagram)
    })?;
    answers.judge(batch, last)
}

/// Whether both of cloison's tables are there, in the calling thread's namespace.
pub(super) fn has_tables() -> Result<bool> {
    let everyones = libc::NFPROTO_UNSPEC;
    let tables = ask(libc::NFT_MSG_GETTABLE, true, everyones, |_| {})?;
    let ours = tables.iter().filter(|(family, attributes)| {
        let families = [libc::NFPROTO_INET, libc::NFPROTO_BRIDGE];
        let named = |(kind, name): &(u16, Vec<u8>)| {
            *kind == NFTA_TABLE_NAME && name.strip_suffix(&[0]) == Some(TABLE.as_bytes())
        };
        families.contains(&(*family).into()) && attributes.iter().any(named)
    });
    Ok(ours.count() == 2)
}

/// What the kernel has answered to a batch.
#[derive(Debug, Default)]
pub(super) struct Answers {
    /// The first message that it refused, and why.
    refused: Option<(u32, i32)>,
    /// The last message that it took.
    taken: Option<u32>,
}

impl Answers {
    pub(super) fn read(&mut self, datagram: &[u8]) -> Result<()> {
        each(datagram, |kind, sequence, payload| {
            if kind != NLMSG_ERROR {
                return Err(nonsense());
            }
            let error = ErrorBuffer::new_checked(payload).map_err(|_| nonsense())?;
            match error.code() {
                None => self.taken = Some(sequence),
                Some(code) => {
                    self.refused.get_or_insert((sequence, code.get()));
                }
            }
            Ok(())
        })
    }

    /// Whether the batch, whose last message has the number `last`, was taken.
    pub(super) fn judge(self, batch: &Batch, last: u32) -> Result<()> {
        if let Some((sequence, code)) = self.refused {
            let doing = batch.doing(sequence).unwrap_or("change it");
            let source = io::Error::from_raw_os_error(code.saturating_neg());
            return Err(Error::system(in_words(doing, &source))(source));
        }
        match self.taken {
            Some(sequence) if sequence == last => Ok(()),
            _ => Err(nonsense()),
        }
    }
}

fn in_words(doing: &str, source: &io::Error) -> String {
    let hint = match source.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::EPROTONOSUPPORT) => {
            " (does this host's kernel have nf_tables?)"
        }
        _ => "",
    };
    format!("change the packet filter: {doing}{hint}")
}

/// Asks for one object, or for all of a kind.
pub(super) fn ask(
    kind: libc::c_int,
    all: bool,
    family: libc::c_int,
    fill: impl FnOnce(&mut Attributes),
) -> Result<Vec<Object>> {
    let what = "read the packet filter";
    let flags = if all { NLM_F_DUMP } else { NLM_F_ACK };
    let [.., family] = family.to_be_bytes();
    let kind = libc::NFNL_SUBSYS_NFTABLES << 8 | kind;
    let request = message(kind, NLM_F_REQUEST | flags, [family, 0, 0, 0], fill);
    let mut objects = Vec::new();
    let socket = open(what)?;
    send(&socket, &request, what, |datagram| {
        objects_in(datagram, &mut objects)
    })?;
    Ok(objects)
}

/// Adds what a datagram tells of.
pub(super) fn objects_in(datagram: &[u8], objects: &mut Vec<Object>) -> Result<()> {
    each(datagram, |kind, _, payload| match kind {
        NLMSG_DONE => Ok(()),
        NLMSG_ERROR => {
            let error = ErrorBuffer::new_checked(payload).map_err(|_| nonsense())?;
            let refused = |code: i32| io::Error::from_raw_os_error(code.saturating_neg());
            error.code().map_or(Ok(()), |code| {
                Err(Error::system("read the packet filter")(refused(code.get())))
            })
        }
        _ => {
            let (header, attributes) = payload
                .split_first_chunk::<FAMILY_HEADER>()
                .ok_or_else(nonsense)?;
            objects.push((header[0], attributes_in(attributes)?));
            Ok(())
        }
    })
}

/// Attributes by their numbers.
pub(super) fn attributes_in(bytes: &[u8]) -> Result<Vec<(u16, Vec<u8>)>> {
    NlasIterator::new(bytes)
        .map(|attribute| {
            let attribute = attribute.map_err(|_| nonsense())?;
            Ok((attribute.kind(), attribute.value().to_vec()))
        })
        .collect()
}

fn open(what: &str) -> Result<Socket> {
    let opened = Socket::new(NETLINK_NETFILTER).and_then(|mut socket| {
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Whoever answers a batch does not send it back.
        socket.set_cap_ack(true)?;
        // Of more answers than there is room for, the first are what matters.
        socket.set_no_enobufs(true)?;
        Ok(socket)
    });
    opened.map_err(|source| {
        let what = match source.raw_os_error() {
            Some(libc::EPROTONOSUPPORT) => in_words("open a socket", &source),
            _ => what.to_owned(),
        };
        Error::system(what)(source)
    })
}

/// Sends a datagram, and passes on those that come back.
fn send(
    socket: &Socket,
    bytes: &[u8],
    what: &str,
    mut read: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    socket.send(bytes, 0).map_err(Error::system(what))?;
    let mut buffer = Vec::with_capacity(DATAGRAM);
    loop {
        buffer.clear();
        match socket.recv(&mut buffer, libc::MSG_DONTWAIT) {
            Ok(_) => read(&buffer)?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(Error::system(what)(error)),
        }
    }
}

/// Calls `read` with the type, the sequence number and the payload of each message.
fn each(mut bytes: &[u8], mut read: impl FnMut(u16, u32, &[u8]) -> Result<()>) -> Result<()> {
    while !bytes.is_empty() {
        let message = NetlinkBuffer::new_checked(bytes).map_err(|_| nonsense())?;
        read(
            message.message_type(),
            message.sequence_number(),
            message.payload(),
        )?;
        let length = usize::try_from(message.length()).unwrap_or(usize::MAX);
        let next = length.next_multiple_of(4).min(bytes.len());
        bytes = &bytes[next..];
    }
    Ok(())
}

fn nonsense() -> Error {
    let source = io::Error::from(io::ErrorKind::InvalidData);
    Error::system("understand what the kernel answers about the packet filter")(source)
}
