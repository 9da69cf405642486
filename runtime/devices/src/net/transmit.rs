//! Frames from the guest to the tap. Each is looked at before it goes: its header must be one that the guest's driver could have
//! made, its source the guest. Both are copied out of guest memory first, and what was checked is what is sent.

use nix::errno::Errno;
use tracing::debug;

use super::header::check;
use super::{BATCH, ETHERNET, HEADER_LENGTH, MAX_FRAME, NAME, Net, TX, count};
use crate::chains;
use crate::iovecs::{Iovecs, MAX_IOVECS};
use crate::segments::{Direction, Segments};
use crate::{Broken, Context, QueueMask};

/// The part of a chain that is looked at: our header, and the frame's own.
const FRONT: usize = HEADER_LENGTH + ETHERNET;
/// Where a frame's source address is in it.
const SOURCE: std::ops::Range<usize> = HEADER_LENGTH + 6..HEADER_LENGTH + 12;
/// Bytes a frame may have beyond its MTU: its header, and a VLAN tag.
const OVERHEAD: usize = ETHERNET + 4;

impl Net {
    /// Takes the frames there are from the guest.
    pub(super) fn transmit(&mut self, ctx: &mut Context<'_, '_>) -> Result<QueueMask, Broken> {
        let this = &*self;
        let again = this.shared.link.again();
        let mut lost = None;
        let used = chains::serve(NAME, ctx, TX, BATCH, again, |memory, chain| {
            match Segments::new(memory, chain, Direction::Readable) {
                Ok(frame) => lost = this.send(frame).or(lost),
                Err(reason) => this.drop_malformed(&reason),
            }
            0
        });
        if let Some(errno) = lost {
            self.lose_tap(errno);
        }
        used
    }

    /// Sends or drops one frame. An error is that the tap is no more.
    fn send(&self, mut frame: Segments<'_>) -> Option<Errno> {
        let mut front = [0; FRONT];
        let rest = frame.split_off(FRONT);
        if frame.copy_to(&mut front) < FRONT {
            self.drop_malformed(&"it is shorter than its headers");
            return None;
        }
        let length = ETHERNET + rest.len();
        if length > MAX_FRAME || rest.pieces().len() >= MAX_IOVECS {
            self.drop_malformed(&"it is too long, or in too many pieces");
            return None;
        }
        let mut header = [0; HEADER_LENGTH];
        header.copy_from_slice(&front[..HEADER_LENGTH]);
        let checked = match check(header, length, self.acked_features) {
            Ok(checked) => checked,
            Err(reason) => {
                self.drop_malformed(&reason);
                return None;
            }
        };
        if !checked.segmented && length > usize::from(self.config.mtu) + OVERHEAD {
            self.drop_malformed(&"it is longer than the MTU allows");
            return None;
        }
        if !self.config.spoofing && front[SOURCE] != self.config.mac {
            self.drop_malformed(&"its source is not the guest");
            return None;
        }
        front[..HEADER_LENGTH].copy_from_slice(&checked.header);
        let Some(tap) = self.tap.as_ref().filter(|_| self.link_up()) else {
            count(&self.shared.counters.refused);
            return None;
        };
        match tap.write(&Iovecs::behind(&front, &rest)) {
            Ok(_) => {
                count(&self.shared.counters.transmitted);
                None
            }
            // The kernel has looked closer than we have.
            Err(Errno::EINVAL) => {
                self.drop_malformed(&"the tap finds it malformed");
                None
            }
            Err(errno) => {
                count(&self.shared.counters.refused);
                (errno == Errno::EBADFD).then_some(errno)
            }
        }
    }

    fn drop_malformed(&self, reason: &dyn std::fmt::Display) {
        debug!(%reason, "dropping a frame from the guest");
        count(&self.shared.counters.malformed);
    }
}
