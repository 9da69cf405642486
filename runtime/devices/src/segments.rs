//! A descriptor chain, checked once and turned into pieces of guest memory that a device may use without another look at the
//! ring. A [`Segments`] that exists lies in guest memory as a whole, has the direction it was asked for, and came from a bounded
//! number of descriptors. The bytes in it are the guest's and can change at any time: they are copied out, never referred to.

use std::ops::Deref;

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory, GuestMemoryMmap, VolatileSlice};

/// Most descriptors of one chain, in an indirect table or not. A driver may use as many as its queue is long (virtio 1.3
/// §2.7.5.3.1), and a transport may offer longer queues than the device asks for; but Linux uses at most 18 for a packet, the
/// header and a page each, and for a block request two more than the device allows it. A descriptor makes as many pieces
/// as guest memory has host mappings under it, nearly always one.
pub(crate) const MAX_DESCRIPTORS: usize = 128;

/// Who writes the buffers of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// The guest has filled them for the device.
    Readable,
    /// The device fills them for the guest.
    Writable,
}

/// Why a chain is of no use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("a buffer has the wrong direction")]
    Direction,
    #[error("a buffer is not in guest memory")]
    Address,
    #[error("the chain has more than {MAX_DESCRIPTORS} descriptors")]
    TooLong,
    #[error("the chain has no proper end")]
    Unfinished,
}

/// Pieces of guest memory, in order.
#[derive(Debug, Default)]
pub(crate) struct Segments<'m> {
    pieces: Vec<VolatileSlice<'m>>,
    len: usize,
}

impl<'m> Segments<'m> {
    /// Checks all of `chain`, whose buffers all have the same direction.
    ///
    /// # Errors
    /// [`Malformed`], whatever the guest has put into the descriptor table.
    pub(crate) fn new<M>(
        memory: &'m GuestMemoryMmap,
        chain: DescriptorChain<M>,
        direction: Direction,
    ) -> Result<Self, Malformed>
    where
        M: Deref<Target = GuestMemoryMmap>,
    {
        match (direction, sort(memory, chain)?) {
            (Direction::Readable, [Some(segments), None])
            | (Direction::Writable, [None, Some(segments)]) => Ok(segments),
            _ => Err(Malformed::Direction),
        }
    }

    /// Checks all of `chain`, a request: what the guest has filled for the device, and then what the device fills for the guest
    /// (virtio 1.3 §2.7.4.2). Either may be empty.
    ///
    /// # Errors
    /// As for [`Segments::new`].
    pub(crate) fn of_request<M>(
        memory: &'m GuestMemoryMmap,
        chain: DescriptorChain<M>,
    ) -> Result<(Self, Self), Malformed>
    where
        M: Deref<Target = GuestMemoryMmap>,
    {
        let [readable, writable] = sort(memory, chain)?;
        Ok((readable.unwrap_or_default(), writable.unwrap_or_default()))
    }

    /// Bytes in all pieces.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The pieces, in order.
    pub(crate) fn pieces(&self) -> &[VolatileSlice<'m>] {
        &self.pieces
    }

    /// Puts `more` behind what is here.
    pub(crate) fn append(&mut self, mut more: Self) {
        self.pieces.append(&mut more.pieces);
        self.len += more.len;
    }

    /// Leaves at most the first `len` bytes.
    pub(crate) fn truncate(&mut self, len: usize) {
        if len < self.len {
            let _rest = self.split_off(len);
        }
    }

    /// Drops the first `count` bytes, or all if there are fewer.
    pub(crate) fn advance(&mut self, count: usize) {
        let rest = self.split_off(count.min(self.len));
        *self = rest;
    }

    /// Leaves the first `at` bytes, or all if there are fewer, and answers the rest.
    pub(crate) fn split_off(&mut self, at: usize) -> Self {
        let mut before = 0;
        for i in 0..self.pieces.len() {
            let piece = self.pieces[i];
            if before + piece.len() > at {
                let mut pieces = self.pieces.split_off(i);
                // `at - before` is below the piece's length, so the split cannot fail.
                if let Ok((front, back)) = piece.split_at(at - before) {
                    pieces[0] = back;
                    if !front.is_empty() {
                        self.pieces.push(front);
                    }
                }
                let rest = Self {
                    pieces,
                    len: self.len - at,
                };
                self.len = at;
                return rest;
            }
            before += piece.len();
        }
        Self {
            pieces: Vec::new(),
            len: 0,
        }
    }

    /// Copies as many bytes as fit into `out` from the front; answers how many.
    pub(crate) fn copy_to(&self, out: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in &self.pieces {
            done += piece.copy_to(&mut out[done..]);
        }
        done
    }

    /// Copies as many of `bytes` as fit to the front; answers how many.
    pub(crate) fn copy_from(&self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for piece in &self.pieces {
            let count = piece.len().min(bytes.len() - done);
            piece.copy_from(&bytes[done..done + count]);
            done += count;
        }
        done
    }
}

/// The buffers of `chain` by direction, readable ones first; nothing for a direction that no buffer has.
fn sort<'m, M>(
    memory: &'m GuestMemoryMmap,
    chain: DescriptorChain<M>,
) -> Result<[Option<Segments<'m>>; 2], Malformed>
where
    M: Deref<Target = GuestMemoryMmap>,
{
    let [mut readable, mut writable] = [None, None];
    let mut looked_at = 0;
    let mut ended = false;
    for descriptor in chain {
        looked_at += 1;
        if looked_at > MAX_DESCRIPTORS {
            return Err(Malformed::TooLong);
        }
        let sorted = match (descriptor.is_write_only(), &writable) {
            (true, _) => &mut writable,
            (false, None) => &mut readable,
            (false, Some(_)) => return Err(Malformed::Direction),
        };
        let segments = sorted.get_or_insert_with(Segments::default);
        for piece in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
            let piece = piece.map_err(|_| Malformed::Address)?;
            segments.len += piece.len();
            segments.pieces.push(piece);
        }
        ended = !descriptor.has_next();
    }
    // The iterator stops without a word where a chain is broken: a loop, an index beyond the table, a table beyond memory.
    if ended {
        Ok([readable, writable])
    } else {
        Err(Malformed::Unfinished)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    /// Pieces of the given sizes, one after the other in memory that counts up from zero.
    fn counting<'m>(memory: &'m GuestMemoryMmap, sizes: &[usize]) -> Segments<'m> {
        let mut segments = Segments::default();
        for &size in sizes {
            let addr = GuestAddress(segments.len as u64);
            let piece = memory.get_slice(addr, size).unwrap();
            segments.append(Segments {
                pieces: vec![piece],
                len: size,
            });
        }
        let bytes: Vec<u8> = (0..segments.len()).map(|i| i as u8).collect();
        assert_eq!(segments.copy_from(&bytes), bytes.len());
        segments
    }

    fn bytes(segments: &Segments<'_>) -> Vec<u8> {
        let mut bytes = vec![0; segments.len() + 10];
        let count = segments.copy_to(&mut bytes);
        assert_eq!(count, segments.len());
        bytes.truncate(count);
        bytes
    }

    proptest! {
        #[test]
        fn cutting_loses_no_byte_and_makes_none(
            sizes in prop::collection::vec(0..20usize, 0..6),
            at in 0..130usize,
        ) {
            let ranges = [(GuestAddress(0), 4096)];
            let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
            let whole = bytes(&counting(&memory, &sizes));
            let cut = at.min(whole.len());

            let mut front = counting(&memory, &sizes);
            let back = front.split_off(at);
            prop_assert_eq!(bytes(&front), &whole[..cut]);
            prop_assert_eq!(bytes(&back), &whole[cut..]);
            front.append(back);
            prop_assert_eq!(bytes(&front), &whole[..]);

            front.truncate(at);
            prop_assert_eq!(bytes(&front), &whole[..cut]);
            let mut rest = counting(&memory, &sizes);
            rest.advance(at);
            prop_assert_eq!(bytes(&rest), &whole[cut..]);
        }

        #[test]
        fn copies_stop_at_the_shorter_side(size in 0..20usize, other in 0..20usize) {
            let ranges = [(GuestAddress(0), 4096)];
            let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
            let segments = counting(&memory, &[size]);
            prop_assert_eq!(segments.copy_to(&mut vec![0; other]), size.min(other));
            prop_assert_eq!(segments.copy_from(&vec![0; other]), size.min(other));
        }
    }
}
