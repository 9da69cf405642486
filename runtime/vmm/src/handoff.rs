//! What a VM process is given at its birth, and how: one message on a socket that is its standard input, holding a manifest
//! in JSON and every descriptor it will ever need from its maker. Standard error is its log. No other descriptor is inherited.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;

use cloison_devices::{Attachment, MacAddress};
use nix::sys::socket::MsgFlags;
use serde::{Deserialize, Serialize};

use crate::nic::Nic;
use crate::packet::{self, MAX_PACKET, Packet, Received};
use crate::spec::VmSpec;

/// The most streams that can be attached before the guest starts; more can follow over the control socket. One has three descriptors at most, and
/// one message has room for all.
pub const MAX_EARLY_ATTACHMENTS: usize = 72;

/// All that the VM process gets.
#[derive(Debug)]
pub(crate) struct Handoff {
    pub(crate) spec: VmSpec,
    /// Directory to be shared with the guest; absolute.
    pub(crate) shared: PathBuf,
    /// Most verbose level worth logging, in `tracing`'s words.
    pub(crate) log_level: String,
    /// `end.json`, empty and locked.
    pub(crate) end: OwnedFd,
    /// Listening, SOCK_SEQPACKET.
    pub(crate) control: OwnedFd,
    /// Listening, SOCK_STREAM.
    pub(crate) vsock: OwnedFd,
    /// Read end of the pipe whose EOF means that the owner is gone.
    pub(crate) owner: Option<OwnedFd>,
    pub(crate) attachments: Vec<Attachment>,
    pub(crate) nics: Vec<Nic>,
}

/// The part of a [`Handoff`] that is text: which descriptors follow, in the order of its fields.
#[derive(Serialize, Deserialize)]
struct Manifest {
    spec: VmSpec,
    shared: PathBuf,
    log_level: String,
    owner: bool,
    attachments: Vec<Ends>,
    nics: Vec<MacAddress>,
}

#[derive(Serialize, Deserialize)]
struct Ends {
    port: u32,
    read: bool,
    write: bool,
    done: bool,
}

/// Sends everything to the VM process at the other end of `socket`; the caller's descriptors are closed.
pub(crate) fn send(socket: BorrowedFd<'_>, handoff: Handoff) -> io::Result<()> {
    let mut fds: Vec<RawFd> = [&handoff.end, &handoff.control, &handoff.vsock]
        .into_iter()
        .chain(&handoff.owner)
        .map(AsRawFd::as_raw_fd)
        .collect();
    let ends = handoff.attachments.iter().map(|attachment| {
        let streams = [&attachment.read, &attachment.write, &attachment.done];
        fds.extend(streams.into_iter().flatten().map(AsRawFd::as_raw_fd));
        Ends {
            port: attachment.port,
            read: attachment.read.is_some(),
            write: attachment.write.is_some(),
            done: attachment.done.is_some(),
        }
    });
    let attachments = ends.collect();
    fds.extend(handoff.nics.iter().map(|nic| nic.tap.as_raw_fd()));
    let manifest = Manifest {
        spec: handoff.spec,
        shared: handoff.shared,
        log_level: handoff.log_level,
        owner: handoff.owner.is_some(),
        attachments,
        nics: handoff.nics.iter().map(|nic| nic.mac).collect(),
    };
    let text = serde_json::to_vec(&manifest)?;
    packet::send(socket, &text, &fds, MsgFlags::empty())
}

/// Receives what [`send`] sent, on `socket`.
pub(crate) fn receive(socket: impl AsFd) -> io::Result<Handoff> {
    let mut buffer = vec![0; MAX_PACKET];
    let Packet { bytes, fds } =
        match packet::receive(socket.as_fd(), &mut buffer, MsgFlags::empty())? {
            Received::Packet(packet) => packet,
            Received::Closed => return Err(io::ErrorKind::UnexpectedEof.into()),
            Received::TooLong => return Err(invalid("the manifest is too long")),
        };
    let manifest: Manifest = serde_json::from_slice(&bytes)?;
    let mut fds = fds.into_iter();
    let mut next = || fds.next().ok_or_else(|| invalid("a descriptor is missing"));
    let (end, control, vsock) = (next()?, next()?, next()?);
    let owner = manifest.owner.then(&mut next).transpose()?;
    let mut attachments = Vec::with_capacity(manifest.attachments.len());
    for ends in manifest.attachments {
        attachments.push(Attachment {
            port: ends.port,
            read: ends.read.then(&mut next).transpose()?,
            write: ends.write.then(&mut next).transpose()?,
            done: ends.done.then(&mut next).transpose()?,
        });
    }
    let mut nics = Vec::with_capacity(manifest.nics.len());
    for mac in manifest.nics {
        nics.push(Nic { tap: next()?, mac });
    }
    if fds.next().is_some() {
        return Err(invalid("a descriptor belongs to nothing"));
    }
    Ok(Handoff {
        spec: manifest.spec,
        shared: manifest.shared,
        log_level: manifest.log_level,
        end,
        control,
        vsock,
        owner,
        attachments,
        nics,
    })
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
