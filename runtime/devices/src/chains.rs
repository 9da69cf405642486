//! Taking descriptor chains from a queue and giving them back, with a ring that cannot be used turned into [`Broken`]. What is
//! in a chain is for its device to check.

use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::again::Again;
use crate::{Broken, Context, QueueMask};

/// Length of what precedes the elements of a used ring: flags and index (virtio 1.3 §2.7.8).
const USED_RING_HEADER: u64 = 4;
/// Length of an element: a chain's first descriptor, and the bytes written.
const USED_ELEMENT: u64 = 8;

/// A chain in the memory of the guest that a context is for.
pub(crate) type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// Has `handle` do what each of the next chains of queue `index` asks for, `batch` of them at most, and gives them back with as many
/// bytes written as it says. Where there may be more, `again` is asked for another call.
pub(crate) fn serve<'m>(
    device: &'static str,
    ctx: &mut Context<'m, '_>,
    index: usize,
    batch: usize,
    again: &Again,
    mut handle: impl FnMut(&'m GuestMemoryMmap, Chain<'m>) -> u32,
) -> Result<QueueMask, Broken> {
    let mut used = QueueMask::NONE;
    for _ in 0..batch {
        let Some(chain) = next(device, ctx, index)? else {
            return Ok(used);
        };
        let head = chain.head_index();
        let written = handle(ctx.memory, chain);
        give_back(device, ctx, index, head, written)?;
        used.insert(index);
    }
    again.ask();
    Ok(used)
}

/// The next chain the guest has made available in queue `index` of `device`. When there is none, the guest is asked to say
/// when there is; a queue that is not ready has none.
pub(crate) fn next<'m>(
    device: &'static str,
    ctx: &mut Context<'m, '_>,
    index: usize,
) -> Result<Option<Chain<'m>>, Broken> {
    let memory = ctx.memory;
    let Some(queue) = ctx.queues.get_mut(index).filter(|queue| queue.ready()) else {
        return Ok(None);
    };
    let broken = |error: virtio_queue::Error| broken(device, &error);
    if let Some(chain) = queue.iter(memory).map_err(broken)?.next() {
        return Ok(Some(chain));
    }
    if !queue.enable_notification(memory).map_err(broken)? {
        return Ok(None);
    }
    match queue.iter(memory).map_err(broken)?.next() {
        Some(chain) => Ok(Some(chain)),
        // The ring's index says that there is a chain, and the ring has none that can be read.
        None => Err(broken(virtio_queue::Error::InvalidAvailRingIndex)),
    }
}

/// Gives the chain that begins at descriptor `head` back to queue `index` of `device`, with `len` bytes written.
pub(crate) fn give_back(
    device: &'static str,
    ctx: &mut Context<'_, '_>,
    index: usize,
    head: u16,
    len: u32,
) -> Result<(), Broken> {
    let Some(queue) = ctx.queues.get_mut(index) else {
        return Ok(());
    };
    queue
        .add_used(ctx.memory, head, len)
        .map_err(|error| broken(device, &error))
}

/// Gives several chains, each with its number of bytes written, back to queue `index` of `device` in one step: the guest sees all of
/// them or none, as for the buffers of one frame it must (virtio 1.3 §5.1.6.3.2).
pub(crate) fn give_back_together(
    device: &'static str,
    ctx: &mut Context<'_, '_>,
    index: usize,
    chains: &[(u16, u32)],
) -> Result<(), Broken> {
    let Some(queue) = ctx.queues.get_mut(index) else {
        return Ok(());
    };
    let broken = |error: virtio_queue::Error| broken(device, &error);
    let Some((&(head, len), others)) = chains.split_last() else {
        return Ok(());
    };
    let first = queue.next_used();
    for (at, &(head, len)) in (0u16..).zip(others) {
        let slot = u64::from(first.wrapping_add(at) % queue.size());
        let address = USED_RING_HEADER + slot * USED_ELEMENT;
        let address = queue
            .used_ring()
            .checked_add(address)
            .ok_or_else(|| broken(virtio_queue::Error::AddressOverflow))?;
        let element = [u32::from(head).to_le(), len.to_le()];
        ctx.memory
            .write_obj(element, GuestAddress(address))
            .map_err(|error| broken(virtio_queue::Error::GuestMemory(error)))?;
    }
    // The queue publishes one chain at a time. It gets the last, which publishes the others with it; and it gets that as often as there
    // are chains, each time at the same place, because it counts them to know when the guest wants to be notified.
    let last = first.wrapping_add(others.len() as u16);
    for _ in chains {
        queue.set_next_used(last);
        queue.add_used(ctx.memory, head, len).map_err(broken)?;
    }
    Ok(())
}

fn broken(device: &'static str, error: &virtio_queue::Error) -> Broken {
    Broken {
        device,
        what: error.to_string(),
    }
}
