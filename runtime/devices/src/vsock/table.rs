//! The streams of a device, found by ports or by id, and the turn each takes to send. Ids are never used twice, so that an
//! event meant for a stream that is over finds nothing.

use std::collections::{HashMap, VecDeque};

use super::connection::{Connection, Key};

/// Most streams at one time, those included whose guest half is over and whose last bytes are still being written. With
/// two descriptors and a backlog of at most [`STREAM_BUFFER`](super::credit::STREAM_BUFFER) each, this bounds what a guest
/// can make the device hold.
pub(super) const MAX_CONNECTIONS: usize = 1024;

/// First host port for streams that the host asks for.
const FIRST_CLIENT_PORT: u32 = 0x8000_0000;

#[derive(Debug)]
struct Entry {
    connection: Connection,
    /// Whether its id is in `turns`.
    queued: bool,
}

/// All streams.
#[derive(Debug)]
pub(super) struct Table {
    entries: HashMap<u64, Entry>,
    by_key: HashMap<Key, u64>,
    /// Streams that may have a packet for the guest, each at most once and none that is over. The first is next.
    turns: VecDeque<u64>,
    next_port: u32,
}

impl Table {
    pub(super) fn new() -> Self {
        Self {
            entries: HashMap::new(),
            by_key: HashMap::new(),
            turns: VecDeque::new(),
            next_port: FIRST_CLIENT_PORT,
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.entries.len() >= MAX_CONNECTIONS
    }

    /// The stream with these ports, if the guest's half of it is not over.
    pub(super) fn find(&self, key: Key) -> Option<u64> {
        self.by_key.get(&key).copied()
    }

    /// A host port that no stream to `guest_port` has.
    pub(super) fn free_host_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let host_port = self.next_port;
            // Round within the range; with at most MAX_CONNECTIONS ports taken a free one is never far.
            self.next_port = FIRST_CLIENT_PORT | host_port.wrapping_add(1);
            if self
                .find(Key {
                    host_port,
                    guest_port,
                })
                .is_none()
            {
                return host_port;
            }
        }
    }

    /// Takes in a stream under an id that was never used; its ports are free and the table is not full.
    pub(super) fn insert(&mut self, id: u64, connection: Connection) {
        self.by_key.insert(connection.key(), id);
        self.entries.insert(
            id,
            Entry {
                connection,
                queued: false,
            },
        );
        self.update(id, |_| {});
    }

    /// Lets `change` change a stream, if there is one with this id, and then gives it a turn or forgets it, as it has become.
    pub(super) fn update<T>(
        &mut self,
        id: u64,
        change: impl FnOnce(&mut Connection) -> T,
    ) -> Option<T> {
        let entry = self.entries.get_mut(&id)?;
        let result = change(&mut entry.connection);
        let key = entry.connection.key();
        if !entry.connection.is_known_to_guest() && self.by_key.get(&key) == Some(&id) {
            self.by_key.remove(&key);
        }
        if entry.connection.is_over() {
            if entry.queued {
                self.turns.retain(|&turn| turn != id);
            }
            self.entries.remove(&id);
        } else if entry.connection.has_packet() && !entry.queued {
            entry.queued = true;
            self.turns.push_back(id);
        }
        Some(result)
    }

    /// How much room for data the stream whose turn is next would like, in bytes; nothing when none waits for its turn.
    pub(super) fn appetite(&self) -> Option<usize> {
        let id = self.turns.front()?;
        Some(self.entries.get(id)?.connection.appetite())
    }

    /// The stream whose turn it is; it loses the turn, and [`Table::update`] gives it another.
    pub(super) fn next_turn(&mut self) -> Option<u64> {
        let id = self.turns.pop_front()?;
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.queued = false;
        }
        Some(id)
    }

    /// Ends all streams, for a guest that has reset the device.
    pub(super) fn clear(&mut self) {
        for entry in self.entries.values_mut() {
            entry.connection.on_device_reset();
        }
        self.entries.clear();
        self.by_key.clear();
        self.turns.clear();
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
}
