//! Frames from the tap to the guest. A frame is read straight into the guest's buffers when there is room for any frame at all;
//! otherwise it is read here first, and waits for buffers as long as there is hope for them.

use nix::errno::Errno;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_queue::QueueT;

use super::buffers::{Buffers, Taken};
use super::{BATCH, HEADER_LENGTH, MAX_FRAME, Net, RX, count};
use crate::{Broken, Context, QueueMask};

/// Most bytes the tap hands out at once.
const MAX_READ: usize = HEADER_LENGTH + MAX_FRAME;

/// What to do after a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// The next one.
    Frame,
    /// Nothing, until the tap or the guest has more.
    Wait,
    /// Come back, after others had their turn.
    Again,
}

impl Net {
    /// Gives the guest the frames there are, as far as it has buffers for them.
    pub(super) fn receive(&mut self, ctx: &mut Context<'_, '_>) -> Result<QueueMask, Broken> {
        let mut used = false;
        if self.link_up()
            && self.tap.is_some()
            && ctx.queues.get(RX).is_some_and(|queue| queue.ready())
        {
            let mut buffers = Buffers::new(self.acked(VIRTIO_NET_F_MRG_RXBUF));
            let mut next = Next::Again;
            for _ in 0..BATCH {
                next = self.receive_frame(ctx, &mut buffers, &mut used)?;
                if next != Next::Frame {
                    break;
                }
            }
            buffers.put_back(ctx);
            if next != Next::Wait {
                self.shared.link.again().ask();
            }
        }
        let mut mask = QueueMask::NONE;
        if used {
            mask.insert(RX);
        }
        Ok(mask)
    }

    fn receive_frame<'m>(
        &mut self,
        ctx: &mut Context<'m, '_>,
        buffers: &mut Buffers<'m>,
        used: &mut bool,
    ) -> Result<Next, Broken> {
        let taken = buffers.take(ctx, MAX_READ, used)?;
        if taken == Taken::Nonsense {
            return Ok(Next::Again);
        }
        if buffers.room() == 0 {
            return Ok(Next::Wait);
        }
        let Some(tap) = &self.tap else {
            return Ok(Next::Wait);
        };
        let length = if !self.held.is_empty() {
            self.held.len()
        } else if buffers.room() >= MAX_READ {
            match tap.read(&buffers.iovecs()) {
                Ok(length) => {
                    buffers.give(ctx, length)?;
                    return Ok(self.given(used));
                }
                Err(errno) => return Ok(self.nothing_read(errno)),
            }
        } else {
            self.held.resize(MAX_READ, 0);
            let read = tap.read_own(&mut self.held);
            self.held.truncate(read.unwrap_or(0));
            match read {
                Ok(length) => length,
                Err(errno) => return Ok(self.nothing_read(errno)),
            }
        };
        if length <= buffers.room() {
            buffers.fill(&self.held);
            self.held.clear();
            buffers.give(ctx, length)?;
            return Ok(self.given(used));
        }
        if self.given && self.acked(VIRTIO_NET_F_MRG_RXBUF) && taken == Taken::All {
            return Ok(Next::Wait);
        }
        self.held.clear();
        count(&self.shared.counters.unfit);
        Ok(Next::Frame)
    }

    fn given(&mut self, used: &mut bool) -> Next {
        *used = true;
        self.given = true;
        count(&self.shared.counters.received);
        Next::Frame
    }

    fn nothing_read(&mut self, errno: Errno) -> Next {
        match errno {
            Errno::EINTR => return Next::Again,
            Errno::EAGAIN => {}
            errno => self.lose_tap(errno),
        }
        Next::Wait
    }
}
