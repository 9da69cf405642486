//! Taking descriptor chains from a queue and giving them back, with a ring that cannot be used turned into [`Broken`]. What is
//! in a chain is for its device to check.

use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use crate::{Broken, Context};

/// The next chain the guest has made available in queue `index` of `device`. When there is none, the guest is asked to say
/// when there is; a queue that is not ready has none.
pub(crate) fn next<'m>(
    device: &'static str,
    ctx: &mut Context<'m, '_>,
    index: usize,
) -> Result<Option<DescriptorChain<&'m GuestMemoryMmap>>, Broken> {
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

fn broken(device: &'static str, error: &virtio_queue::Error) -> Broken {
    Broken {
        device,
        what: error.to_string(),
    }
}
