//! Buffers the guest has offered for frames, taken ahead of the frames: how long a frame is shows only once it has been read.

use std::collections::VecDeque;

use tracing::debug;
use virtio_queue::QueueOwnedT;

use super::{HEADER_LENGTH, NAME, RX};
use crate::iovecs::{Iovecs, MAX_IOVECS};
use crate::segments::{Direction, Segments};
use crate::{Broken, Context, chains};

/// Where a header says over how many buffers its frame is spread (virtio 1.3 §5.1.6).
const NUM_BUFFERS: usize = 10;
/// Most buffers of no use that are given back for one frame.
const MAX_USELESS: usize = 64;

/// Buffers, in the order in which they were offered.
pub(super) struct Buffers<'m> {
    buffers: VecDeque<Buffer<'m>>,
    /// Whether a frame may be spread over several.
    mergeable: bool,
    room: usize,
    pieces: usize,
}

struct Buffer<'m> {
    head: u16,
    room: Segments<'m>,
}

/// What came of taking more buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taken {
    /// There is as much room as was wanted, or as can be had in one system call.
    Enough,
    /// The guest has no more, and has been asked to say when it does.
    All,
    /// The guest offers what nobody could use, more of it than is looked at in one go.
    Nonsense,
}

impl<'m> Buffers<'m> {
    pub(super) fn new(mergeable: bool) -> Self {
        Self {
            buffers: VecDeque::new(),
            mergeable,
            room: 0,
            pieces: 0,
        }
    }

    /// Room for the next frame, its header included.
    pub(super) fn room(&self) -> usize {
        self.room
    }

    /// Takes more buffers until there is room for `wanted` bytes; gives back those of no use, and sets `used` if there are any.
    pub(super) fn take(
        &mut self,
        ctx: &mut Context<'m, '_>,
        wanted: usize,
        used: &mut bool,
    ) -> Result<Taken, Broken> {
        let mut useless = 0;
        while self.wants_more(wanted) {
            let Some(chain) = chains::next(NAME, ctx, RX)? else {
                return Ok(Taken::All);
            };
            let head = chain.head_index();
            match Segments::new(ctx.memory, chain, Direction::Writable) {
                Ok(room) if room.len() >= HEADER_LENGTH && room.pieces().len() <= MAX_IOVECS => {
                    self.push(Buffer { head, room });
                    if self.pieces > MAX_IOVECS {
                        self.put_back_last(ctx);
                        return Ok(Taken::Enough);
                    }
                }
                _ if !self.buffers.is_empty() => {
                    // Buffers go back into the queue in the order they came from it, without gaps.
                    ctx.queues[RX].go_to_previous_position();
                    return Ok(Taken::Enough);
                }
                unusable => {
                    debug!(reason = ?unusable.err(), "a buffer of the guest's is of no use");
                    chains::give_back(NAME, ctx, RX, head, 0)?;
                    *used = true;
                    useless += 1;
                    if useless == MAX_USELESS {
                        return Ok(Taken::Nonsense);
                    }
                }
            }
        }
        Ok(Taken::Enough)
    }

    /// The room for the next frame.
    pub(super) fn iovecs(&self) -> Iovecs<'m> {
        Iovecs::gather(self.buffers.iter().map(|buffer| &buffer.room))
    }

    /// Copies a whole frame, header included, into the room for it.
    pub(super) fn fill(&self, frame: &[u8]) {
        let mut done = 0;
        for buffer in &self.buffers {
            done += buffer.room.copy_from(&frame[done..]);
        }
    }

    /// Gives back to the guest the buffers that the first `length` bytes of room are in, with a frame in them.
    pub(super) fn give(&mut self, ctx: &mut Context<'m, '_>, length: usize) -> Result<(), Broken> {
        let mut given = Vec::new();
        let mut first = None;
        let mut left = length;
        while left > 0 {
            let Some(buffer) = self.buffers.pop_front() else {
                break;
            };
            self.room -= buffer.room.len();
            self.pieces -= buffer.room.pieces().len();
            let written = left.min(buffer.room.len());
            left -= written;
            // A frame is shorter than 4 GiB.
            given.push((buffer.head, written as u32));
            first.get_or_insert(buffer.room);
        }
        if let Some(mut first) = first {
            // At most MAX_IOVECS.
            let number = given.len() as u16;
            first.advance(NUM_BUFFERS);
            first.copy_from(&number.to_le_bytes());
        }
        chains::give_back_together(NAME, ctx, RX, &given)
    }

    /// Puts all buffers back into the queue, to be taken again.
    pub(super) fn put_back(mut self, ctx: &mut Context<'m, '_>) {
        while !self.buffers.is_empty() {
            self.put_back_last(ctx);
        }
    }

    fn wants_more(&self, wanted: usize) -> bool {
        if self.mergeable {
            self.room < wanted
        } else {
            self.buffers.is_empty()
        }
    }

    fn push(&mut self, buffer: Buffer<'m>) {
        self.room += buffer.room.len();
        self.pieces += buffer.room.pieces().len();
        self.buffers.push_back(buffer);
    }

    fn put_back_last(&mut self, ctx: &mut Context<'m, '_>) {
        if let Some(buffer) = self.buffers.pop_back() {
            self.room -= buffer.room.len();
            self.pieces -= buffer.room.pieces().len();
            ctx.queues[RX].go_to_previous_position();
        }
    }
}
