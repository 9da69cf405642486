//! Taking chains from a queue and giving them back. Every chain taken is given back or put back before the device returns to
//! its driver; a ring that cannot be used makes the device [`Broken`], a chain that cannot be used is the guest's loss.

use tracing::{debug, trace};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::packet::{HEADER_LEN, Header};
use crate::segments::{Direction, Segments};
use crate::{Broken, Context};

/// A chain in the memory of the guest that a context is for.
type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// The next chain the guest has made available in queue `index`. When there is none, the guest is asked to say when there is.
pub(super) fn next_chain<'m>(
    ctx: &mut Context<'m, '_>,
    index: usize,
) -> Result<Option<Chain<'m>>, Broken> {
    if let Some(chain) = pop(ctx, index)? {
        return Ok(Some(chain));
    }
    if !ctx.queues[index]
        .enable_notification(ctx.memory)
        .map_err(broken)?
    {
        return Ok(None);
    }
    match pop(ctx, index)? {
        Some(chain) => Ok(Some(chain)),
        // There is a chain by the ring's index and none in the ring: the ring itself cannot be read.
        None => Err(broken(virtio_queue::Error::InvalidAvailRingIndex)),
    }
}

fn pop<'m>(ctx: &mut Context<'m, '_>, index: usize) -> Result<Option<Chain<'m>>, Broken> {
    Ok(ctx.queues[index].iter(ctx.memory).map_err(broken)?.next())
}

/// Gives chain `head` back to the guest with `len` bytes written.
pub(super) fn give_back(
    ctx: &mut Context<'_, '_>,
    index: usize,
    head: u16,
    len: u32,
) -> Result<(), Broken> {
    ctx.queues[index]
        .add_used(ctx.memory, head, len)
        .map_err(broken)
}

/// A ring that cannot be used: its index runs ahead of its size, it is not in memory, it names no descriptor.
fn broken(error: virtio_queue::Error) -> Broken {
    Broken {
        device: "vsock",
        what: error.to_string(),
    }
}

/// One chain that a packet can be written to.
struct Buffer<'m> {
    head: u16,
    /// Empty, if the chain is of no use for anything.
    header: Segments<'m>,
    /// Bytes of room for a payload.
    room: usize,
}

impl<'m> Buffer<'m> {
    /// The buffer that `chain` is, and its room.
    fn new(memory: &'m GuestMemoryMmap, chain: Chain<'m>) -> (Self, Segments<'m>) {
        let head = chain.head_index();
        let mut header =
            Segments::new(memory, chain, Direction::Writable).unwrap_or_else(|reason| {
                debug!(%reason, "a buffer of the guest's is of no use");
                Segments::default()
            });
        let mut room = header.split_off(HEADER_LEN);
        if header.len() < HEADER_LEN {
            header = Segments::default();
            room = Segments::default();
        }
        (
            Self {
                head,
                header,
                room: room.len(),
            },
            room,
        )
    }

    fn usable(&self) -> bool {
        self.header.len() == HEADER_LEN
    }
}

/// Buffers of the guest's, at least one, whose room is used as if it were one buffer's: many times the host has more data
/// than a buffer of a Linux guest's holds, and one system call can fill several.
pub(super) struct Buffers<'m> {
    queue: usize,
    buffers: Vec<Buffer<'m>>,
    /// Room for payload in all buffers together.
    pub room: Segments<'m>,
}

impl<'m> Buffers<'m> {
    /// Takes one buffer from queue `index`, and others while they do not have `wanted` bytes of room together. Nothing, when
    /// the guest has offered none. A first buffer that is of no use has no room at all.
    pub(super) fn take(
        ctx: &mut Context<'m, '_>,
        index: usize,
        wanted: usize,
    ) -> Result<Option<Self>, Broken> {
        let Some(chain) = next_chain(ctx, index)? else {
            return Ok(None);
        };
        let (first, room) = Buffer::new(ctx.memory, chain);
        let usable = first.usable();
        let mut taken = Self {
            queue: index,
            buffers: vec![first],
            room,
        };
        while usable && taken.room.len() < wanted {
            let Some(chain) = pop(ctx, index)? else { break };
            let (buffer, room) = Buffer::new(ctx.memory, chain);
            if buffer.room == 0 {
                ctx.queues[index].go_to_previous_position();
                break;
            }
            taken.buffers.push(buffer);
            taken.room.append(room);
        }
        Ok(Some(taken))
    }

    /// Whether a packet can be written.
    pub(super) fn usable(&self) -> bool {
        self.buffers.iter().all(Buffer::usable)
    }

    /// Sends the packet, or run of packets, that `header` and the first `header.len` bytes of room are; puts back buffers
    /// that it does not need. Answers how many it used.
    pub(super) fn send(self, ctx: &mut Context<'m, '_>, header: Header) -> Result<usize, Broken> {
        let mut left = header.len;
        let mut used = 0;
        for buffer in &self.buffers {
            let len = u32::try_from(buffer.room).map_or(left, |room| room.min(left));
            let header = Header { len, ..header };
            trace!(?header, "to the guest");
            buffer.header.copy_from(&header.to_bytes());
            give_back(ctx, self.queue, buffer.head, HEADER_LEN as u32 + len)?;
            used += 1;
            left -= len;
            if left == 0 {
                break;
            }
        }
        self.put_back_after(ctx, used);
        Ok(used)
    }

    /// Gives the first buffer back with nothing in it, since it is too small; puts back the others. Answers how many it used.
    pub(super) fn give_back_first(self, ctx: &mut Context<'m, '_>) -> Result<usize, Broken> {
        give_back(ctx, self.queue, self.buffers[0].head, 0)?;
        self.put_back_after(ctx, 1);
        Ok(1)
    }

    /// Puts all buffers back, to be taken again. Answers how many it used: none.
    pub(super) fn put_back(self, ctx: &mut Context<'m, '_>) -> usize {
        self.put_back_after(ctx, 0);
        0
    }

    fn put_back_after(&self, ctx: &mut Context<'m, '_>, used: usize) {
        for _ in &self.buffers[used..] {
            ctx.queues[self.queue].go_to_previous_position();
        }
    }
}
