//! The guest's half of a virtio device, for tests: memory, rings, and a driver that can behave or misbehave at will.
//! It hands a device exactly what a transport would hand it ([`Context`], queue notifications, readiness of the host
//! descriptor), and lets a test place well-formed chains, forged descriptors, and ring indices that no driver may write.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "only tests use this; a failure here fails the test"
)]

mod tap;

use std::collections::HashMap;
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::{Broken, Context, Device, QueueMask};

pub use tap::{HostEnd, tap};

/// Descriptor flag: the chain goes on at `next` (virtio 1.3 §2.7.5).
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes the buffer (virtio 1.3 §2.7.5).
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors (virtio 1.3 §2.7.5).
pub const INDIRECT: u16 = 4;

/// Size of each of the two adjacent regions that guest memory begins with, in bytes. A buffer laid over their border
/// ([`Guest::BORDER`]) is contiguous to the guest and in two mappings to the host.
const REGION: u64 = 16 << 20;
/// Address of a third, small region that has a hole on either side.
const ISLAND: u64 = 64 << 20;
/// Size of the region at [`ISLAND`], in bytes.
const ISLAND_SIZE: u64 = 1 << 20;

/// One buffer of a descriptor chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// Whether the device writes it; otherwise the device reads it.
    pub writable: bool,
}

/// A buffer the device reads.
pub fn readable(addr: u64, len: u32) -> Buffer {
    Buffer {
        addr,
        len,
        writable: false,
    }
}

/// A buffer the device writes.
pub fn writable(addr: u64, len: u32) -> Buffer {
    Buffer {
        addr,
        len,
        writable: true,
    }
}

/// A descriptor as it lies in the table (virtio 1.3 §2.7.5), for chains no driver would make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Descriptor {
    /// Guest physical address of the buffer, or of the indirect table.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Index of the next descriptor.
    pub next: u16,
}

impl Descriptor {
    fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[0..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..16].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// An entry of a used ring: the chain the device has given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// Index of the chain's first descriptor.
    pub head: u16,
    /// How many bytes the device says it wrote.
    pub len: u32,
}

/// The driver's view of one queue.
struct Ring {
    size: u16,
    table: u64,
    avail: u64,
    used: u64,
    avail_idx: u16,
    /// What `avail_idx` was when the device was last notified.
    kicked_idx: u16,
    used_idx: u16,
    free: Vec<u16>,
    in_flight: HashMap<u16, Vec<u16>>,
}

/// A guest with memory and one ring per queue of a device.
pub struct Guest {
    memory: GuestMemoryMmap,
    rings: Vec<Ring>,
    queues: Vec<Queue>,
    heap: u64,
}

impl Guest {
    /// The guest physical address at which one host mapping ends and the next begins.
    pub const BORDER: u64 = REGION;
    /// An address in no region, with memory on either side of the hole it is in.
    pub const HOLE: u64 = 2 * REGION + 0x1000;
    /// The last address of guest memory, plus one.
    pub const END: u64 = ISLAND + ISLAND_SIZE;

    /// A guest whose driver has set up all queues of `device` at their largest size, with EVENT_IDX as given.
    pub fn new(device: &dyn Device, event_idx: bool) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), REGION as usize),
            (GuestAddress(REGION), REGION as usize),
            (GuestAddress(ISLAND), ISLAND_SIZE as usize),
        ])
        .expect("guest memory for a test");
        let mut guest = Self {
            memory,
            rings: Vec::new(),
            queues: Vec::new(),
            heap: 0x1000,
        };
        for &size in device.queue_sizes() {
            let table = guest.alloc(16 * u64::from(size));
            let avail = guest.alloc(6 + 2 * u64::from(size));
            let used = guest.alloc(6 + 8 * u64::from(size));
            guest.rings.push(Ring {
                size,
                table,
                avail,
                used,
                avail_idx: 0,
                kicked_idx: 0,
                used_idx: 0,
                free: (0..size).rev().collect(),
                in_flight: HashMap::new(),
            });
            let mut queue = Queue::new(size).expect("a queue size that is a power of two");
            queue.set_size(size);
            queue.set_desc_table_address(Some(table as u32), Some((table >> 32) as u32));
            queue.set_avail_ring_address(Some(avail as u32), Some((avail >> 32) as u32));
            queue.set_used_ring_address(Some(used as u32), Some((used >> 32) as u32));
            queue.set_event_idx(event_idx);
            queue.set_ready(true);
            guest.queues.push(queue);
        }
        guest
    }

    /// All of the guest's memory.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The device's side of queue `index`.
    pub fn queue(&mut self, index: usize) -> &mut Queue {
        &mut self.queues[index]
    }

    /// The device's side of all queues back to where it was, as after a reset of the device, with what is in memory as it is.
    pub fn restart_queues(&mut self) {
        for index in 0..self.queues.len() {
            let size = self.rings[index].size;
            let [table, avail, used] = self.ring_addresses(index);
            let queue = &mut self.queues[index];
            let event_idx = queue.event_idx_enabled();
            queue.reset();
            queue.set_size(size);
            queue.set_desc_table_address(Some(table as u32), Some((table >> 32) as u32));
            queue.set_avail_ring_address(Some(avail as u32), Some((avail >> 32) as u32));
            queue.set_used_ring_address(Some(used as u32), Some((used >> 32) as u32));
            queue.set_event_idx(event_idx);
            queue.set_ready(true);
            self.set_avail_idx(index, 0);
        }
    }

    /// Guest physical addresses of queue `index`: its descriptor table, available ring and used ring.
    pub fn ring_addresses(&self, index: usize) -> [u64; 3] {
        let ring = &self.rings[index];
        [ring.table, ring.avail, ring.used]
    }

    /// Takes `len` bytes of guest memory for good, 4096-aligned, all in one host mapping.
    pub fn alloc(&mut self, len: u64) -> u64 {
        let addr = self.heap;
        self.heap = (addr + len).next_multiple_of(0x1000);
        assert!(
            self.heap <= REGION - 0x10_0000,
            "the test guest is out of memory"
        );
        addr
    }

    /// Puts `bytes` into newly taken memory.
    pub fn alloc_bytes(&mut self, bytes: &[u8]) -> u64 {
        let addr = self.alloc(bytes.len() as u64);
        self.write(addr, bytes);
        addr
    }

    /// Writes guest memory.
    pub fn write(&self, addr: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(addr))
            .expect("a write inside guest memory");
    }

    /// Reads guest memory.
    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(addr))
            .expect("a read inside guest memory");
        bytes
    }

    /// How many more descriptors the driver has for queue `index`.
    pub fn free_descriptors(&self, index: usize) -> usize {
        self.rings[index].free.len()
    }

    /// Makes a well-formed chain of `buffers` available in queue `index`; answers the chain's head. The descriptors are
    /// free again once [`Guest::used`] has returned it.
    pub fn place(&mut self, index: usize, buffers: &[Buffer]) -> u16 {
        assert!(!buffers.is_empty(), "a chain has at least one buffer");
        let ring = &mut self.rings[index];
        assert!(
            ring.free.len() >= buffers.len(),
            "the test driver is out of descriptors"
        );
        let at = ring.free.len() - buffers.len();
        let mut ids = ring.free.split_off(at);
        ids.reverse();
        for (i, buffer) in buffers.iter().enumerate() {
            let last = i + 1 == buffers.len();
            self.write_descriptor(
                index,
                ids[i],
                Descriptor {
                    addr: buffer.addr,
                    len: buffer.len,
                    flags: u16::from(buffer.writable) * WRITE + u16::from(!last) * NEXT,
                    next: if last { 0 } else { ids[i + 1] },
                },
            );
        }
        let head = ids[0];
        self.rings[index].in_flight.insert(head, ids);
        self.offer(index, head);
        head
    }

    /// As [`Guest::place`], with the chain in an indirect table in newly taken memory.
    pub fn place_indirect(&mut self, index: usize, buffers: &[Buffer]) -> u16 {
        let table: Vec<Descriptor> = buffers
            .iter()
            .enumerate()
            .map(|(i, buffer)| {
                let last = i + 1 == buffers.len();
                Descriptor {
                    addr: buffer.addr,
                    len: buffer.len,
                    flags: u16::from(buffer.writable) * WRITE + u16::from(!last) * NEXT,
                    next: if last { 0 } else { i as u16 + 1 },
                }
            })
            .collect();
        self.place_table(index, &table)
    }

    /// Makes an indirect table of descriptors exactly as given available in queue `index`.
    pub fn place_table(&mut self, index: usize, table: &[Descriptor]) -> u16 {
        let bytes: Vec<u8> = table
            .iter()
            .flat_map(|descriptor| descriptor.bytes())
            .collect();
        let addr = self.alloc_bytes(&bytes);
        let len = bytes.len() as u32;
        self.place_raw(
            index,
            &[Descriptor {
                addr,
                len,
                flags: INDIRECT,
                next: 0,
            }],
        )
    }

    /// Makes descriptors exactly as given available in queue `index`, except that `next` counts within `descriptors`
    /// where it can (so that `next: 0` with [`NEXT`] is a loop); a larger `next` is written as it is.
    pub fn place_raw(&mut self, index: usize, descriptors: &[Descriptor]) -> u16 {
        let ring = &mut self.rings[index];
        assert!(
            ring.free.len() >= descriptors.len(),
            "the test driver is out of descriptors"
        );
        let at = ring.free.len() - descriptors.len();
        let mut ids = ring.free.split_off(at);
        ids.reverse();
        for (i, descriptor) in descriptors.iter().enumerate() {
            let next = ids
                .get(usize::from(descriptor.next))
                .copied()
                .unwrap_or(descriptor.next);
            self.write_descriptor(
                index,
                ids[i],
                Descriptor {
                    next,
                    ..*descriptor
                },
            );
        }
        let head = ids[0];
        self.rings[index].in_flight.insert(head, ids);
        self.offer(index, head);
        head
    }

    /// Writes entry `id` of the descriptor table of queue `index`.
    pub fn write_descriptor(&self, index: usize, id: u16, descriptor: Descriptor) {
        self.write(
            self.rings[index].table + 16 * u64::from(id),
            &descriptor.bytes(),
        );
    }

    /// Puts `head`, whatever it is, into the available ring of queue `index`.
    pub fn offer(&mut self, index: usize, head: u16) {
        let ring = &mut self.rings[index];
        let entry = ring.avail + 4 + 2 * u64::from(ring.avail_idx % ring.size);
        ring.avail_idx = ring.avail_idx.wrapping_add(1);
        let idx = ring.avail_idx;
        self.write(entry, &head.to_le_bytes());
        self.set_avail_idx(index, idx);
    }

    /// Writes the index of the available ring of queue `index` as if that many chains had been made available.
    pub fn set_avail_idx(&mut self, index: usize, idx: u16) {
        self.rings[index].avail_idx = idx;
        self.write(self.rings[index].avail + 2, &idx.to_le_bytes());
    }

    /// Takes the next chain the device has given back on queue `index`.
    pub fn used(&mut self, index: usize) -> Option<Used> {
        let ring = &self.rings[index];
        let idx = u16::from_le_bytes(self.read(ring.used + 2, 2).try_into().expect("two bytes"));
        if idx == ring.used_idx {
            return None;
        }
        let entry = ring.used + 4 + 8 * u64::from(ring.used_idx % ring.size);
        let bytes = self.read(entry, 8);
        let head = u32::from_le_bytes(bytes[0..4].try_into().expect("four bytes"));
        let len = u32::from_le_bytes(bytes[4..8].try_into().expect("four bytes"));
        let head = u16::try_from(head).expect("a used entry names a descriptor of the ring");
        let ring = &mut self.rings[index];
        ring.used_idx = ring.used_idx.wrapping_add(1);
        let ids = ring
            .in_flight
            .remove(&head)
            .expect("the device gives back only chains it was given, and once");
        ring.free.extend(ids.into_iter().rev());
        Some(Used { head, len })
    }

    /// Runs `f` with what a transport would hand the device.
    pub fn with_context<T>(&mut self, f: impl FnOnce(&mut Context<'_, '_>) -> T) -> T {
        let mut queues: Vec<&mut Queue> = self.queues.iter_mut().collect();
        f(&mut Context {
            memory: &self.memory,
            queues: &mut queues,
        })
    }

    /// Notifies the device of queue `index`.
    ///
    /// # Errors
    /// The device's own.
    pub fn kick(&mut self, device: &mut dyn Device, index: usize) -> Result<QueueMask, Broken> {
        if let Some(ring) = self.rings.get_mut(index) {
            ring.kicked_idx = ring.avail_idx;
        }
        self.with_context(|ctx| device.queue_event(ctx, index))
    }

    /// Whether the driver must notify the device of what it has made available in queue `index` since it last did: by
    /// `avail_event` when EVENT_IDX is on (virtio 1.3 §2.7.10), else by the used ring's flags.
    pub fn must_kick(&self, index: usize) -> bool {
        let ring = &self.rings[index];
        let word = |addr| u16::from_le_bytes(self.read(addr, 2).try_into().expect("two bytes"));
        if self.queues[index].event_idx_enabled() {
            let event = word(ring.used + 4 + 8 * u64::from(ring.size));
            let behind = ring.avail_idx.wrapping_sub(event).wrapping_sub(1);
            behind < ring.avail_idx.wrapping_sub(ring.kicked_idx)
        } else {
            ring.avail_idx != ring.kicked_idx && word(ring.used) & 1 == 0
        }
    }

    /// Waits until the device's host descriptor is readable, at most `millis` milliseconds, and if it is, lets the device
    /// handle it. Answers whether it was.
    ///
    /// # Errors
    /// The device's own.
    pub fn host(&mut self, device: &mut dyn Device, millis: u16) -> Result<bool, Broken> {
        let ready = host_ready(device, millis);
        if ready {
            self.with_context(|ctx| device.host_event(ctx))?;
        }
        Ok(ready)
    }
}

/// Whether the device's host descriptor is readable within `millis` milliseconds; false when it has none.
pub fn host_ready(device: &dyn Device, millis: u16) -> bool {
    let Some(fd) = device.host_fd() else {
        return false;
    };
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::from(millis)).expect("poll on the device's host descriptor") > 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_queue::QueueOwnedT;

    /// Reads every chain of its one queue and gives it back, with the number of its buffers as the length.
    struct Counter;

    impl Device for Counter {
        fn device_type(&self) -> u32 {
            0
        }
        fn queue_sizes(&self) -> &[u16] {
            &[8]
        }
        fn features(&self) -> u64 {
            0
        }
        fn set_acked_features(&mut self, _features: u64) {}
        fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
        fn queue_event(
            &mut self,
            ctx: &mut Context<'_, '_>,
            index: usize,
        ) -> Result<QueueMask, Broken> {
            let broken = |e: virtio_queue::Error| Broken {
                device: "counter",
                what: e.to_string(),
            };
            while let Some(chain) = ctx.queues[index].iter(ctx.memory).map_err(broken)?.next() {
                let head = chain.head_index();
                let len = chain.count() as u32;
                ctx.queues[index]
                    .add_used(ctx.memory, head, len)
                    .map_err(broken)?;
            }
            ctx.queues[index]
                .enable_notification(ctx.memory)
                .map_err(broken)?;
            let mut mask = QueueMask::NONE;
            mask.insert(index);
            Ok(mask)
        }
        fn reset(&mut self) {}
    }

    #[test]
    fn chains_come_back_with_what_the_device_wrote_and_their_descriptors_are_reused() {
        let mut guest = Guest::new(&Counter, true);
        for _ in 0..100 {
            let a = guest.place(0, &[readable(0x10_0000, 4), writable(0x10_1000, 4)]);
            let b = guest.place(0, &[writable(0x10_1000, 4)]);
            assert!(guest.must_kick(0));
            guest.kick(&mut Counter, 0).unwrap();
            assert!(!guest.must_kick(0));
            assert_eq!(guest.used(0), Some(Used { head: a, len: 2 }));
            assert_eq!(guest.used(0), Some(Used { head: b, len: 1 }));
            assert_eq!(guest.used(0), None);
            assert_eq!(guest.free_descriptors(0), 8);
        }
    }

    #[test]
    fn an_indirect_table_is_followed() {
        let mut guest = Guest::new(&Counter, false);
        let head = guest.place_indirect(0, &[readable(0x10_0000, 4); 5]);
        guest.kick(&mut Counter, 0).unwrap();
        assert_eq!(guest.used(0), Some(Used { head, len: 5 }));
    }

    #[test]
    fn a_loop_and_a_forged_index_can_be_made() {
        let mut guest = Guest::new(&Counter, false);
        let looped = Descriptor {
            addr: 0x10_0000,
            len: 1,
            flags: NEXT,
            next: 0,
        };
        let head = guest.place_raw(0, &[looped]);
        guest.kick(&mut Counter, 0).unwrap();
        assert_eq!(
            guest.used(0),
            Some(Used { head, len: 8 }),
            "the chain is cut at the queue's size"
        );
        guest.set_avail_idx(0, 1000);
        assert!(guest.kick(&mut Counter, 0).is_err());
    }
}
