//! A socket to the packet filter of a namespace.

use std::io;
use std::os::fd::AsFd;

use nix::sys::socket::{setsockopt, sockopt};
use rtnetlink::packet_core::{
    ErrorBuffer, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NlasIterator,
};
use rtnetlink::sys::{Socket, protocols::NETLINK_NETFILTER};

use super::message::{Attributes, Batch, FAMILY_HEADER, message};
use crate::direct::{self, each, nonsense, send};
use crate::{Error, Result};

/// What a socket has room for unless it is told otherwise (`net.core.wmem_default`), with some to spare.
const ORDINARY: usize = 100_000;
/// What is being done by whoever asks.
const READ: &str = "read the packet filter";
/// An object that the kernel has told of: its family, and its attributes by their numbers.
pub(super) type Object = (u8, Vec<(u16, Vec<u8>)>);

/// A socket to the packet filter of the namespace of the thread that opened it. Whoever closes it waits until all is destroyed that was
/// removed, by anybody, before anything else can be changed: the kernel looks then for tables that the socket owned.
#[derive(Debug)]
pub(crate) struct Filter(Socket);

impl Filter {
    pub(super) fn open(what: &str) -> Result<Self> {
        open(what).map(Self)
    }

    /// Has the kernel make a batch of changes.
    pub(super) fn change(&self, batch: &Batch) -> Result<()> {
        let (bytes, last) = batch.encode();
        if bytes.len() > ORDINARY {
            setsockopt(&self.0.as_fd(), sockopt::SndBufForce, &bytes.len())
                .map_err(Error::errno("make room for the rules of the packet filter"))?;
        }
        let mut answers = Answers::default();
        send(&self.0, &bytes, "change the packet filter", |datagram| {
            answers.read(datagram)
        })?;
        answers.judge(batch, last)
    }

    /// Asks for one object, or for all of a kind.
    pub(super) fn ask(
        &self,
        kind: libc::c_int,
        all: bool,
        family: libc::c_int,
        fill: impl FnOnce(&mut Attributes),
    ) -> Result<Vec<Object>> {
        let flags = if all { NLM_F_DUMP } else { NLM_F_ACK };
        let [.., family] = family.to_be_bytes();
        let kind = libc::NFNL_SUBSYS_NFTABLES << 8 | kind;
        let request = message(kind, NLM_F_REQUEST | flags, [family, 0, 0, 0], fill);
        let mut objects = Vec::new();
        send(&self.0, &request, READ, |datagram| {
            objects_in(datagram, &mut objects)
        })?;
        Ok(objects)
    }
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

/// [`Filter::ask`], of the calling thread's namespace.
pub(super) fn ask(
    kind: libc::c_int,
    all: bool,
    family: libc::c_int,
    fill: impl FnOnce(&mut Attributes),
) -> Result<Vec<Object>> {
    Filter::open(READ)?.ask(kind, all, family, fill)
}

/// Adds what a datagram tells of.
pub(super) fn objects_in(datagram: &[u8], objects: &mut Vec<Object>) -> Result<()> {
    each(datagram, |kind, _, payload| match kind {
        NLMSG_DONE => Ok(()),
        NLMSG_ERROR => {
            let error = ErrorBuffer::new_checked(payload).map_err(|_| nonsense())?;
            let refused = |code: i32| io::Error::from_raw_os_error(code.saturating_neg());
            error
                .code()
                .map_or(Ok(()), |code| Err(Error::system(READ)(refused(code.get()))))
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
    direct::open(NETLINK_NETFILTER).map_err(|source| {
        let what = match source.raw_os_error() {
            Some(libc::EPROTONOSUPPORT) => in_words("open a socket", &source),
            _ => what.to_owned(),
        };
        Error::system(what)(source)
    })
}
