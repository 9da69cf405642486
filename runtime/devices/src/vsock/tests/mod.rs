//! The device as a guest and a host see it. [`Rig`] is both: a driver on the rings of a test guest, well-behaved or not, and
//! real pipes and sockets on the host's side. Nothing waits for a time to pass: pipes and Unix sockets act at once, so that
//! an event that is not there after a call will not come.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod clients;
mod hostile;
mod limits;
mod paths;
mod random;
mod rings;
mod states;
mod streams;
mod transfer;

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use nix::fcntl::OFlag;

use super::packet::{HEADER_LEN, Header, Op, Shutdown, TYPE_STREAM};
use super::{Attachment, Vsock, VsockConfig};
use crate::testing::{Guest, host_ready, readable, writable};
use crate::{Broken, Device};

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;

/// Credit the guest of these tests gives in every packet.
const GUEST_BUFFER: u32 = 256 << 10;

/// A guest port that is as good as any.
const GUEST_PORT: u32 = 5000;
/// A host port that is as good as any.
const HOST_PORT: u32 = 1024;

struct Rig {
    device: Vsock,
    guest: Guest,
    /// Buffers in the receive queue, by the head of their chain.
    offered: HashMap<u16, (u64, u32)>,
    /// Memory for packets to the device.
    outgoing: u64,
    /// Whether a buffer goes back into the queue once its packet has been read.
    recycle: bool,
}

impl Rig {
    /// A device with `attachments`, and a guest that has offered 64 buffers of a page each.
    fn new(attachments: Vec<Attachment>) -> Self {
        Self::with(VsockConfig {
            attachments,
            ..VsockConfig::default()
        })
    }

    fn with(config: VsockConfig) -> Self {
        let mut rig = Self::starved(config);
        rig.recycle = true;
        rig.offer(64, 4096);
        rig
    }

    /// A guest that has offered no buffers.
    fn starved(config: VsockConfig) -> Self {
        Self::around(Vsock::new(config).unwrap())
    }

    fn around(mut device: Vsock) -> Self {
        device.set_acked_features(device.features());
        let mut guest = Guest::new(&device, true);
        let outgoing = guest.alloc(128 << 10);
        Self {
            device,
            guest,
            offered: HashMap::new(),
            outgoing,
            recycle: false,
        }
    }

    /// Offers `count` buffers of `size` bytes each and notifies the device.
    fn offer(&mut self, count: usize, size: u32) {
        for _ in 0..count {
            let addr = self.guest.alloc(u64::from(size));
            self.offer_at(addr, size);
        }
        self.kick(RX).unwrap();
    }

    fn offer_at(&mut self, addr: u64, size: u32) {
        let head = self.guest.place(RX, &[writable(addr, size)]);
        self.offered.insert(head, (addr, size));
    }

    fn kick(&mut self, queue: usize) -> Result<crate::QueueMask, Broken> {
        self.guest.kick(&mut self.device, queue)
    }

    /// Sends a packet in a chain of two buffers, header and payload.
    fn send(&mut self, header: Header, payload: &[u8]) {
        let header = Header {
            len: payload.len() as u32,
            ..header
        };
        self.send_raw(header, payload);
    }

    /// As [`Rig::send`], with the header's length as it is.
    fn send_raw(&mut self, header: Header, payload: &[u8]) {
        self.guest.write(self.outgoing, &header.to_bytes());
        self.guest.write(self.outgoing + HEADER_LEN as u64, payload);
        let mut chain = vec![readable(self.outgoing, HEADER_LEN as u32)];
        if !payload.is_empty() {
            chain.push(readable(
                self.outgoing + HEADER_LEN as u64,
                payload.len() as u32,
            ));
        }
        self.guest.place(TX, &chain);
        self.kick(TX).unwrap();
        while self.guest.used(TX).is_some() {}
    }

    /// Sends a packet without payload on the usual stream.
    fn say(&mut self, op: Op) {
        self.send(packet(op), &[]);
    }

    fn say_shutdown(&mut self, shutdown: Shutdown) {
        self.send(
            Header {
                flags: shutdown.flags(),
                ..packet(Op::Shutdown)
            },
            &[],
        );
    }

    /// Sends data on the usual stream.
    fn say_data(&mut self, data: &[u8]) {
        self.send(packet(Op::Rw), data);
    }

    /// Lets the device do all that it has to do for the host.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            if !self.guest.host(&mut self.device, 0).unwrap() {
                return;
            }
        }
        panic!("the device is never done");
    }

    /// The next packet to the guest that is in its buffers already.
    fn receive_now(&mut self) -> Option<(Header, Vec<u8>)> {
        loop {
            let used = self.guest.used(RX)?;
            let (addr, size) = self.offered.remove(&used.head).unwrap();
            assert!(used.len <= size);
            let bytes = self.guest.read(addr, used.len as usize);
            if self.recycle {
                self.offer_at(addr, size);
                self.kick(RX).unwrap();
            }
            if used.len == 0 {
                continue;
            }
            let header = Header::from_bytes(bytes[..HEADER_LEN].try_into().unwrap());
            assert_eq!(header.len as usize, bytes.len() - HEADER_LEN);
            assert_eq!((header.src_cid, header.dst_cid), (2, 3));
            return Some((header, bytes[HEADER_LEN..].to_vec()));
        }
    }

    /// All packets to the guest, once the device has nothing more to do.
    fn packets(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut packets = Vec::new();
        loop {
            self.settle();
            match self.receive_now() {
                Some(packet) => packets.push(packet),
                None => return packets,
            }
        }
    }

    /// What packets there are for the guest, by operation, flags and payload.
    fn heard(&mut self) -> Vec<Heard> {
        self.packets()
            .into_iter()
            .map(
                |(header, payload)| match Op::from_number(header.op).unwrap() {
                    Op::Shutdown => Heard::Shutdown(Shutdown::from_flags(header.flags)),
                    Op::Rw => Heard::Data(payload),
                    op => Heard::Op(op),
                },
            )
            .collect()
    }

    /// The guest connects to the usual host port and is accepted.
    fn connect(&mut self) {
        self.say(Op::Request);
        assert_eq!(self.receive_op(), Op::Response);
    }

    fn receive_op(&mut self) -> Op {
        self.settle();
        let (header, _) = self.receive_now().expect("a packet for the guest");
        Op::from_number(header.op).unwrap()
    }

    /// Whether the device has spare descriptors of the host's to look at.
    fn host_ready(&self) -> bool {
        host_ready(&self.device, 0)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Heard {
    Op(Op),
    Shutdown(Shutdown),
    Data(Vec<u8>),
}

/// A header from the guest on the usual stream.
fn packet(op: Op) -> Header {
    Header {
        src_cid: 3,
        dst_cid: 2,
        src_port: GUEST_PORT,
        dst_port: HOST_PORT,
        socket_type: TYPE_STREAM,
        op: op as u16,
        buf_alloc: GUEST_BUFFER,
        ..Header::default()
    }
}

/// An attachment at the usual port.
fn attachment(read: Option<impl Into<OwnedFd>>, write: Option<impl Into<OwnedFd>>) -> Attachment {
    Attachment {
        port: HOST_PORT,
        read: read.map(Into::into),
        write: write.map(Into::into),
        done: None,
    }
}

/// No descriptor.
const NONE: Option<OwnedFd> = None;

/// A non-blocking pipe: reading end, writing end.
fn pipe() -> (File, File) {
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
    (reader.into(), writer.into())
}

/// The ends of a pipe that closes when `done` does: what to attach, and what to look at.
fn done_pipe() -> (OwnedFd, File) {
    let (reader, writer) = pipe();
    (writer.into(), reader)
}

/// Whether the last writing end of `reader`'s pipe is closed and nothing is left in it.
fn at_end(mut reader: impl Read) -> bool {
    match reader.read(&mut [0]) {
        Ok(count) => count == 0,
        Err(error) => {
            assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
            false
        }
    }
}

/// All bytes that are in `reader` at present.
fn drain(mut reader: impl Read) -> Vec<u8> {
    let mut all = Vec::new();
    match reader.read_to_end(&mut all) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
    }
    all
}

/// Puts as many zeroes as fit into `writer`; answers how many.
fn stuff(mut writer: impl Write) -> usize {
    let mut count = 0;
    while let Ok(written) = writer.write(&[0; 4096]) {
        count += written;
    }
    count
}
