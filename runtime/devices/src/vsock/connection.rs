//! One stream between a host port and a guest port: the state machine of virtio 1.3 §5.10.6, with no queue and no table in
//! it. It is told what the guest sent and what the host's descriptors report, and asked for the next packet to the guest.
//! Whatever the guest does out of turn resets the stream and nothing else.

use std::os::fd::OwnedFd;

use tracing::{debug, trace};

use super::GUEST_CID;
use super::credit::{FromGuest, STREAM_BUFFER, ToGuest};
use super::packet::{HOST_CID, Header, MAX_PAYLOAD, Op, Shutdown, TYPE_STREAM};
use super::stream::{Read, Sink, Source};
use crate::segments::Segments;

/// What names a stream on this device: there is one guest and one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub host_port: u32,
    pub guest_port: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The host wants it; REQUEST is still to be sent.
    Requesting,
    /// REQUEST has been sent; the guest has not answered.
    Requested,
    /// The guest wants it; RESPONSE is still to be sent.
    Accepting,
    Open,
    /// RST is still to be sent. The guest has no further say.
    Resetting,
    /// The guest's half is over. What is left is a sink with a backlog, if anything.
    Gone,
}

/// The host's half of a stream.
#[derive(Debug)]
pub(super) struct Host {
    /// `None`: nothing (more) comes from the host.
    pub source: Option<Source>,
    /// `None`: nothing (more) of what the guest sends is wanted, or all of it is written.
    pub sink: Option<Sink>,
    /// Held until both are gone.
    pub done: Option<OwnedFd>,
}

/// A stream and its state.
#[derive(Debug)]
pub(super) struct Connection {
    key: Key,
    phase: Phase,
    host: Host,
    to_guest: ToGuest,
    from_guest: FromGuest,
    /// Directions the guest has said it is finished with.
    guest_shutdown: Shutdown,
    /// Directions we are finished with.
    our_shutdown: Shutdown,
    /// Those of them the guest has been told of.
    told_shutdown: Shutdown,
    /// The guest asked for our credit.
    owes_credit: bool,
    /// We asked for the guest's, and it has not answered.
    asked_credit: bool,
    /// See [`Connection::appetite`].
    appetite: usize,
}

impl Connection {
    /// A stream the guest asked for with `request`.
    pub(super) fn from_guest(key: Key, request: &Header, host: Host) -> Self {
        let mut connection = Self::new(key, Phase::Accepting, host);
        if !connection.update_credit(request) {
            connection.reset("the guest took bytes it was never sent");
        }
        connection.settle();
        connection
    }

    /// A stream a client on the host asked for. Its source and sink are the client's socket; the client is told of the
    /// outcome in a line of text before anything else.
    pub(super) fn from_host(key: Key, host: Host) -> Self {
        Self::new(key, Phase::Requesting, host)
    }

    fn new(key: Key, phase: Phase, host: Host) -> Self {
        Self {
            key,
            phase,
            host,
            to_guest: ToGuest::default(),
            from_guest: FromGuest::default(),
            guest_shutdown: Shutdown::NONE,
            our_shutdown: Shutdown::NONE,
            told_shutdown: Shutdown::NONE,
            owes_credit: false,
            asked_credit: false,
            appetite: 0,
        }
    }

    pub(super) fn key(&self) -> Key {
        self.key
    }

    /// Whether packets with this stream's ports still mean this stream.
    pub(super) fn is_known_to_guest(&self) -> bool {
        self.phase != Phase::Gone
    }

    /// Whether nothing is left to do, ever.
    pub(super) fn is_over(&self) -> bool {
        self.phase == Phase::Gone && self.host.sink.is_none()
    }

    /// Whether [`Connection::next_packet`] may have something.
    pub(super) fn has_packet(&self) -> bool {
        match self.phase {
            Phase::Requesting | Phase::Accepting | Phase::Resetting => true,
            Phase::Requested | Phase::Gone => false,
            Phase::Open => {
                self.untold_shutdown() != Shutdown::NONE
                    || self.owes_credit
                    || self.from_guest.wants_update()
                    || (self.source_ready()
                        && (self.to_guest.available() > 0 || !self.asked_credit))
            }
        }
    }

    /// How much room a packet's payload should have, in bytes. It doubles with each payload that filled its room, up to
    /// [`MAX_PAYLOAD`], so that much data needs few system calls and a line typed needs one buffer.
    pub(super) fn appetite(&self) -> usize {
        self.appetite
    }

    /// The next packet for the guest. Its payload is read into `room`; the header has the payload's length, which may be that
    /// of several packets' if the room is in several buffers.
    pub(super) fn next_packet(&mut self, room: &mut Segments<'_>) -> Option<Header> {
        match self.phase {
            Phase::Requesting => {
                self.phase = Phase::Requested;
                Some(self.header(Op::Request))
            }
            Phase::Accepting => {
                self.phase = Phase::Open;
                Some(self.header(Op::Response))
            }
            Phase::Resetting => {
                self.phase = Phase::Gone;
                Some(self.header(Op::Rst))
            }
            Phase::Requested | Phase::Gone => None,
            Phase::Open => self.next_open(room),
        }
    }

    fn next_open(&mut self, room: &mut Segments<'_>) -> Option<Header> {
        // Ends go first: data may never run out. That of our sending is only due once there is none left.
        if let Some(header) = self.shutdown_packet() {
            return Some(header);
        }
        let credit = self.to_guest.available();
        if self.source_ready() && credit == 0 && !self.asked_credit {
            self.asked_credit = true;
            return Some(self.header(Op::CreditRequest));
        }
        if self.source_ready() && credit > 0 && room.len() > 0 {
            if let Some(count) = self.read_source(room, credit) {
                self.to_guest.send(count);
                return Some(Header {
                    len: count,
                    ..self.header(Op::Rw)
                });
            }
            if let Some(header) = self.shutdown_packet() {
                return Some(header);
            }
        }
        if self.owes_credit || self.from_guest.wants_update() {
            return Some(self.header(Op::CreditUpdate));
        }
        None
    }

    fn shutdown_packet(&mut self) -> Option<Header> {
        let shutdown = self.untold_shutdown();
        if shutdown == Shutdown::NONE {
            return None;
        }
        self.told_shutdown.insert(shutdown);
        Some(Header {
            flags: shutdown.flags(),
            ..self.header(Op::Shutdown)
        })
    }

    /// Reads at most `credit` bytes into `room`; answers how many, at least one, if there were any.
    fn read_source(&mut self, room: &mut Segments<'_>, credit: usize) -> Option<u32> {
        room.truncate(credit.min(MAX_PAYLOAD));
        let filled = self.appetite.max(room.len());
        self.appetite = 0;
        match self.host.source.as_mut()?.read(room) {
            Read::Bytes(count) => {
                if count == room.len() {
                    self.appetite = (2 * filled).min(MAX_PAYLOAD);
                }
                u32::try_from(count).ok()
            }
            Read::Blocked => None,
            Read::End => {
                self.host.source = None;
                self.settle();
                None
            }
        }
    }

    /// A header of this stream, with our credit in it, so that the guest is owed none.
    fn header(&mut self, op: Op) -> Header {
        self.owes_credit = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: GUEST_CID,
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            socket_type: TYPE_STREAM,
            op: op as u16,
            buf_alloc: STREAM_BUFFER,
            fwd_cnt: self.from_guest.announce(),
            ..Header::default()
        }
    }

    /// A packet from the guest, with as many bytes of payload as `header.len` says.
    pub(super) fn on_packet(&mut self, op: Op, header: &Header, payload: Segments<'_>) {
        match (self.phase, op) {
            (Phase::Resetting | Phase::Gone, Op::Rst) => self.phase = Phase::Gone,
            (Phase::Resetting | Phase::Gone, _) => {}
            (_, Op::Rst) => self.on_reset(),
            _ if !self.update_credit(header) => {
                self.reset("the guest took bytes it was never sent")
            }
            (Phase::Requested, Op::Response) => self.on_response(),
            (Phase::Open, Op::Rw) => self.on_data(payload),
            (Phase::Open | Phase::Accepting, Op::Shutdown) => {
                self.on_shutdown(Shutdown::from_flags(header.flags));
            }
            (Phase::Open | Phase::Accepting, Op::CreditUpdate) => {}
            (Phase::Open | Phase::Accepting, Op::CreditRequest) => self.owes_credit = true,
            _ => self.reset("the guest sent a packet out of turn"),
        }
        self.settle();
    }

    fn update_credit(&mut self, header: &Header) -> bool {
        let honest = self
            .to_guest
            .update(header.buf_alloc, header.fwd_cnt)
            .is_ok();
        // An answer without credit is not asked for again: the guest speaks up by itself when it has some.
        self.asked_credit &= self.to_guest.available() == 0;
        honest
    }

    fn on_response(&mut self) {
        self.phase = Phase::Open;
        let line = format!("OK {}\n", self.key.host_port);
        let told = self.host.sink.as_mut().map(|sink| sink.say(&line));
        if told != Some(Ok(())) {
            self.drop_host(Phase::Resetting);
        }
    }

    fn on_data(&mut self, payload: Segments<'_>) {
        // The length is at most MAX_PAYLOAD, checked before the payload was cut to it.
        let count = payload.len() as u32;
        if self.guest_shutdown.contains(Shutdown::SEND) {
            return self.reset("the guest sent data after it said that it would not");
        }
        if self.from_guest.receive(count).is_err() {
            return self.reset("the guest sent data beyond its credit");
        }
        match self.host.sink.as_mut().map(|sink| sink.write(payload)) {
            Some(Ok(written)) => self.from_guest.forward(written as u32),
            Some(Err(_)) => self.sink_gone(),
            // Sent before the guest knew that nobody listens.
            None => self.from_guest.forward_all(),
        }
    }

    fn on_shutdown(&mut self, shutdown: Shutdown) {
        self.guest_shutdown.insert(shutdown);
        if self.guest_shutdown.contains(Shutdown::RECEIVE) {
            self.host.source = None;
        }
        if self.guest_shutdown.contains(Shutdown::SEND)
            && self
                .host
                .sink
                .as_ref()
                .is_some_and(|sink| !sink.has_backlog())
        {
            self.host.sink = None;
        }
        if self.guest_shutdown == Shutdown::BOTH {
            // The guest has closed its socket and waits for this answer (§5.10.6.5); a backlog is written without it.
            self.phase = Phase::Resetting;
        }
    }

    /// The guest has reset the stream.
    fn on_reset(&mut self) {
        if matches!(self.phase, Phase::Requesting | Phase::Requested) {
            self.tell_client("the guest refused the connection");
        }
        self.phase = Phase::Gone;
        self.host.source = None;
        // A Linux guest whose peer is slow to take the last bytes gives up waiting after some seconds and resets. Those
        // bytes were sent and finished properly, and are still owed to the host.
        if !self.guest_shutdown.contains(Shutdown::SEND) {
            self.host.sink = None;
        }
    }

    /// Drops the stream for `reason`, and the guest is to be told.
    pub(super) fn reset(&mut self, reason: &str) {
        trace!(?self.key, reason, "resetting a stream");
        if matches!(self.phase, Phase::Requesting | Phase::Requested) {
            self.tell_client(reason);
        }
        self.drop_host(Phase::Resetting);
    }

    fn drop_host(&mut self, phase: Phase) {
        self.phase = phase;
        self.host = Host {
            source: None,
            sink: None,
            done: None,
        };
    }

    /// The device has been reset, and the guest's half with it.
    pub(super) fn on_device_reset(&mut self) {
        if matches!(self.phase, Phase::Requesting | Phase::Requested) {
            self.tell_client("the guest has reset the device");
        }
    }

    fn tell_client(&mut self, reason: &str) {
        if let Some(sink) = &mut self.host.sink {
            // A client that is gone need not be told.
            let _ = sink.say(&format!("ERR {reason}\n"));
        }
    }

    /// Epoll has reported the source.
    pub(super) fn wake_source(&mut self) {
        if let Some(source) = &mut self.host.source {
            source.wake();
        }
    }

    /// Epoll has reported the sink; `hung_up`: its other end will never read again.
    pub(super) fn wake_sink(&mut self, hung_up: bool) {
        match self.phase {
            // The guest that has not heard of the stream need not hear of its end.
            Phase::Requesting if hung_up => return self.drop_host(Phase::Gone),
            Phase::Requested if hung_up => return self.drop_host(Phase::Resetting),
            _ => {}
        }
        match self.host.sink.as_mut().map(Sink::wake) {
            Some(Ok(written)) if !hung_up => self.from_guest.forward(written as u32),
            Some(_) => self.sink_gone(),
            None => {}
        }
        let finished = self.guest_shutdown.contains(Shutdown::SEND);
        if finished
            && self
                .host
                .sink
                .as_ref()
                .is_some_and(|sink| !sink.has_backlog())
        {
            self.host.sink = None;
        }
        self.settle();
    }

    /// Nothing written to the sink would be read.
    fn sink_gone(&mut self) {
        debug!(?self.key, "nobody reads what the guest sends");
        self.host.sink = None;
        self.from_guest.forward_all();
    }

    /// Draws the conclusions from a change of the host's half.
    fn settle(&mut self) {
        if self.host.source.is_none() && self.host.sink.is_none() {
            self.host.done = None;
        }
        if self.host.source.is_none() {
            self.our_shutdown.insert(Shutdown::SEND);
        }
        if self.host.sink.is_none() {
            self.our_shutdown.insert(Shutdown::RECEIVE);
        }
    }

    /// Directions the guest is still to be told are over. It need not be told of one that it ended itself.
    fn untold_shutdown(&self) -> Shutdown {
        let mut known = self.told_shutdown;
        if self.guest_shutdown.contains(Shutdown::RECEIVE) {
            known.insert(Shutdown::SEND);
        }
        if self.guest_shutdown.contains(Shutdown::SEND) {
            known.insert(Shutdown::RECEIVE);
        }
        self.our_shutdown.without(known)
    }

    fn source_ready(&self) -> bool {
        self.host.source.as_ref().is_some_and(Source::ready)
    }
}
