//! The device itself: its three queues, and whose packet goes into them next. All that the guest can make it do in one call
//! is bounded by [`PACKETS_PER_CALL`]; what is left it gets to through its own host descriptor, after others had their turn.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};
use tracing::debug;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;

use super::attachment::VsockHandle;
use super::connection::{Connection, Key};
use super::host::{Client, HostSide, Token};
use super::packet::{HEADER_LEN, HOST_CID, Header, MAX_PAYLOAD, Op, TYPE_STREAM};
use super::rings::{Buffers, give_back, next_chain};
use super::table::Table;
use super::{GUEST_CID, QUEUE_SIZE, VsockConfig, VsockError};
use crate::segments::{Direction, Segments};
use crate::{Broken, Context, Device, QueueMask, config};

/// Queue of packets to the guest (virtio 1.3 §5.10.2).
const RX: usize = 0;
/// Queue of packets from the guest.
const TX: usize = 1;
/// Queue of events to the guest.
const EVENT: usize = 2;

/// Linux offers eight buffers for events.
const QUEUE_SIZES: [u16; 3] = [QUEUE_SIZE, QUEUE_SIZE, 8];

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`: all streams are gone, and the guest's context ID may have changed (§5.10.6.7).
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// Most chains taken from either packet queue in one call.
const PACKETS_PER_CALL: usize = 64;

/// Most refusals of packets that belong to no stream which wait for the guest to offer buffers. While that many wait, no
/// packet of the guest's is looked at.
const MAX_REFUSALS: usize = 64;

/// Version of [`VsockState`].
const STATE_VERSION: u32 = 1;

/// What a vsock device must remember to go on in another process. Streams are not in it: their ends on the host are
/// descriptors, which no file can hold. A restored device tells its guest that they are gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    version: u32,
    acked_features: u64,
}

/// What there is for the guest.
enum Next {
    Packet(Header),
    /// Data, for which the buffers at hand have no room.
    TooSmall,
    Nothing,
}

/// A virtio-vsock device.
#[derive(Debug)]
pub struct Vsock {
    host: HostSide,
    attachments: VsockHandle,
    streams: Table,
    /// Answers to packets that belong to no stream.
    refusals: VecDeque<Header>,
    acked_features: u64,
    /// The guest's packets were not all looked at.
    tx_left: bool,
    /// The guest is to be told that all streams are gone.
    owes_transport_reset: bool,
}

impl Vsock {
    /// A device that no guest has used.
    ///
    /// # Errors
    /// [`VsockError`], for one when an attachment cannot carry a stream.
    pub fn new(config: VsockConfig) -> Result<Self, VsockError> {
        let VsockConfig {
            listener,
            listen_prefix,
            attachments,
        } = config;
        let device = Self {
            host: HostSide::new(listener, listen_prefix)?,
            attachments: VsockHandle::new(),
            streams: Table::new(),
            refusals: VecDeque::new(),
            acked_features: 0,
            tx_left: false,
            owes_transport_reset: false,
        };
        for attachment in attachments {
            let port = attachment.port;
            device
                .attachments
                .attach(attachment)
                .map_err(|source| VsockError::Attach { port, source })?;
        }
        Ok(device)
    }

    /// A device that goes on where the one that `state` was taken from stopped, with other ends on the host. The guest is told
    /// that its streams are gone (VIRTIO_VSOCK_EVENT_TRANSPORT_RESET) as soon as its queues are driven again.
    ///
    /// # Errors
    /// As for [`Vsock::new`], and [`VsockError::StateVersion`].
    pub fn restore(config: VsockConfig, state: &VsockState) -> Result<Self, VsockError> {
        if state.version != STATE_VERSION {
            let (found, known) = (state.version, STATE_VERSION);
            return Err(VsockError::StateVersion { found, known });
        }
        let mut device = Self::new(config)?;
        device.set_acked_features(state.acked_features);
        device.owes_transport_reset = true;
        device.host.kick();
        Ok(device)
    }

    /// What [`Vsock::restore`] needs. The queues are the transport's to save.
    pub fn state(&self) -> VsockState {
        VsockState {
            version: STATE_VERSION,
            acked_features: self.acked_features,
        }
    }

    /// A way to attach descriptors from other threads.
    pub fn handle(&self) -> VsockHandle {
        self.attachments.clone()
    }

    /// Moves packets both ways, as many as are due at once.
    fn pump(&mut self, ctx: &mut Context<'_, '_>) -> Result<QueueMask, Broken> {
        let mut used = QueueMask::NONE;
        if self.tx_left && self.drain_tx(ctx)? {
            used.insert(TX);
        }
        let (rx_used, rx_left) = self.fill_rx(ctx)?;
        if rx_used {
            used.insert(RX);
        }
        if self.owes_transport_reset && self.send_transport_reset(ctx)? {
            used.insert(EVENT);
        }
        if rx_left || (self.tx_left && self.refusals.len() < MAX_REFUSALS) {
            self.host.kick();
        }
        Ok(used)
    }

    /// Takes in packets from the guest; answers whether any was.
    fn drain_tx(&mut self, ctx: &mut Context<'_, '_>) -> Result<bool, Broken> {
        self.tx_left = false;
        if !ctx.queues[TX].ready() {
            return Ok(false);
        }
        let mut any = false;
        for _ in 0..PACKETS_PER_CALL {
            if self.refusals.len() >= MAX_REFUSALS {
                break;
            }
            let Some(chain) = next_chain(ctx, TX)? else {
                return Ok(any);
            };
            let head = chain.head_index();
            match Segments::new(ctx.memory, chain, Direction::Readable) {
                Ok(packet) => self.on_packet(packet),
                Err(reason) => debug!(%reason, "dropping a packet from the guest"),
            }
            give_back(ctx, TX, head, 0)?;
            any = true;
        }
        self.tx_left = true;
        Ok(any)
    }

    /// One packet from the guest.
    fn on_packet(&mut self, mut packet: Segments<'_>) {
        let mut payload = packet.split_off(HEADER_LEN);
        let mut bytes = [0; HEADER_LEN];
        if packet.copy_to(&mut bytes) < HEADER_LEN {
            debug!("dropping a packet from the guest that is shorter than its header");
            return;
        }
        let header = Header::from_bytes(&bytes);
        if header.src_cid != GUEST_CID || header.dst_cid != HOST_CID {
            debug!(
                header.src_cid,
                header.dst_cid, "dropping a packet that is not for the host"
            );
            return;
        }
        let key = Key {
            host_port: header.dst_port,
            guest_port: header.src_port,
        };
        let op = Op::from_number(header.op);
        if header.socket_type != TYPE_STREAM {
            if op != Some(Op::Rst) {
                self.refusals.push_back(header.refusal());
            }
            return;
        }
        match (self.streams.find(key), op) {
            (Some(id), op) => {
                let len = header.len as usize;
                let fits =
                    len <= payload.len().min(MAX_PAYLOAD) && (len == 0 || op == Some(Op::Rw));
                payload.truncate(len);
                self.streams.update(id, |stream| match op {
                    Some(op) if fits => stream.on_packet(op, &header, payload),
                    Some(Op::Rst) => stream.on_packet(Op::Rst, &header, payload),
                    Some(_) => stream.reset("the guest sent a packet of a wrong length"),
                    None => stream.reset("the guest sent a packet of an unknown kind"),
                });
            }
            (None, Some(Op::Request)) if header.len == 0 => self.on_request(key, &header),
            (None, Some(Op::Rst)) => {}
            (None, _) => self.refusals.push_back(header.refusal()),
        }
    }

    /// The guest wants a stream to a host port.
    fn on_request(&mut self, key: Key, request: &Header) {
        if self.streams.is_full() {
            debug!(?key, "refusing a stream: there are too many");
            return self.refusals.push_back(request.refusal());
        }
        let id = self.host.next_id();
        let host = match self.attachments.take(key.host_port) {
            Some(waiting) => self.host.join_attached(id, waiting),
            None => self.host.join_path(id, key.host_port),
        };
        match host {
            Ok(host) => self
                .streams
                .insert(id, Connection::from_guest(key, request, host)),
            Err(error) => {
                debug!(?key, %error, "refusing a stream");
                self.refusals.push_back(request.refusal());
            }
        }
    }

    /// A client on the host wants a stream to a guest port.
    fn on_client(&mut self, client: Client) {
        if self.streams.is_full() {
            return client.refuse("there are too many connections");
        }
        let id = self.host.next_id();
        match self.host.join_client(id, &client) {
            Ok(host) => {
                let host_port = self.streams.free_host_port(client.port);
                let key = Key {
                    host_port,
                    guest_port: client.port,
                };
                self.streams.insert(id, Connection::from_host(key, host));
            }
            Err(error) => client.refuse(&format!("the host failed: {error}")),
        }
    }

    /// Puts packets for the guest into its buffers; answers whether any buffer was used, and whether there was more to do.
    fn fill_rx(&mut self, ctx: &mut Context<'_, '_>) -> Result<(bool, bool), Broken> {
        if !ctx.queues[RX].ready() {
            return Ok((false, false));
        }
        let mut used = 0;
        while used < PACKETS_PER_CALL {
            let wanted = match (self.refusals.is_empty(), self.streams.appetite()) {
                (false, _) => 0,
                (true, Some(appetite)) => appetite,
                (true, None) => return Ok((used > 0, false)),
            };
            let Some(mut buffers) = Buffers::take(ctx, RX, wanted)? else {
                return Ok((used > 0, false));
            };
            let next = if buffers.usable() {
                self.next_packet(&mut buffers.room)
            } else {
                Next::TooSmall
            };
            used += match next {
                Next::Packet(header) => buffers.send(ctx, header)?,
                Next::TooSmall => buffers.give_back_first(ctx)?,
                Next::Nothing => buffers.put_back(ctx),
            };
        }
        Ok((true, true))
    }

    /// The next packet for the guest, its payload in `room`.
    fn next_packet(&mut self, room: &mut Segments<'_>) -> Next {
        if let Some(refusal) = self.refusals.pop_front() {
            return Next::Packet(refusal);
        }
        let no_room = room.len() == 0;
        while let Some(id) = self.streams.next_turn() {
            let found = self
                .streams
                .update(id, |stream| match stream.next_packet(room) {
                    Some(header) => Next::Packet(header),
                    None if no_room && stream.has_packet() => Next::TooSmall,
                    None => Next::Nothing,
                });
            if let Some(next @ (Next::Packet(_) | Next::TooSmall)) = found {
                return next;
            }
        }
        Next::Nothing
    }

    /// Tells the guest that all streams are gone; answers whether it could be told.
    fn send_transport_reset(&mut self, ctx: &mut Context<'_, '_>) -> Result<bool, Broken> {
        if !ctx.queues[EVENT].ready() {
            return Ok(false);
        }
        for _ in 0..QUEUE_SIZES[EVENT] {
            let Some(chain) = next_chain(ctx, EVENT)? else {
                return Ok(false);
            };
            let head = chain.head_index();
            let written = match Segments::new(ctx.memory, chain, Direction::Writable) {
                Ok(buffer) if buffer.len() >= TRANSPORT_RESET.len() => {
                    buffer.copy_from(&TRANSPORT_RESET) as u32
                }
                _ => 0,
            };
            give_back(ctx, EVENT, head, written)?;
            if written > 0 {
                self.owes_transport_reset = false;
                return Ok(true);
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
impl Vsock {
    pub(super) fn stream_count(&self) -> usize {
        self.streams.len()
    }

    pub(super) fn owes_packets(&self) -> bool {
        self.streams.appetite().is_some() || !self.refusals.is_empty()
    }
}

impl Device for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn set_acked_features(&mut self, features: u64) {
        self.acked_features = features & self.features();
    }

    /// Configuration space is `guest_cid`, a little-endian u64 (virtio 1.3 §5.10.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config::read(&GUEST_CID.to_le_bytes(), offset, data);
    }

    fn queue_event(
        &mut self,
        ctx: &mut Context<'_, '_>,
        index: usize,
    ) -> Result<QueueMask, Broken> {
        self.tx_left |= index == TX;
        self.pump(ctx)
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.host.fd())
    }

    fn host_event(&mut self, ctx: &mut Context<'_, '_>) -> Result<QueueMask, Broken> {
        for event in self.host.events() {
            match event.token {
                Token::Kick => {}
                Token::Listener => self.host.accept(),
                Token::Client(id) => {
                    if let Some(client) = self.host.hear(id) {
                        self.on_client(client);
                    }
                }
                Token::Source(id) => {
                    self.streams.update(id, Connection::wake_source);
                }
                Token::Sink(id) => {
                    self.streams
                        .update(id, |stream| stream.wake_sink(event.hung_up));
                }
            }
        }
        self.pump(ctx)
    }

    fn reset(&mut self) {
        self.streams.clear();
        self.refusals.clear();
        self.acked_features = 0;
        self.tx_left = false;
        self.owes_transport_reset = false;
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.attachments.end();
    }
}
