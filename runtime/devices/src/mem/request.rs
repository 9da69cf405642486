//! The guest's requests (virtio 1.3 §5.15.6): 24 bytes in, 10 bytes out.

use tracing::debug;
use vm_memory::GuestMemoryMmap;

use super::blocks::Run;
use super::{BLOCK, Mem};
use crate::chains::Chain;
use crate::segments::Segments;

/// Length of a request: its type, an address, a number of blocks, padding.
const REQUEST_LENGTH: usize = 24;
/// Length of an answer: its type, a state, padding.
const ANSWER_LENGTH: usize = 10;

/// Types of requests.
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// An answer's type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
enum Answer {
    /// Done.
    Ack = 0,
    /// Not now: the guest would have more than it should.
    Nack = 1,
    /// The host cannot at present.
    Busy = 2,
    /// The request makes no sense.
    Error = 3,
}

/// How some blocks are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
enum State {
    Plugged = 0,
    Unplugged = 1,
    Mixed = 2,
}

impl Mem {
    /// Does what `chain` asks for; answers how many bytes it has written.
    pub(super) fn answer<'m>(&mut self, memory: &'m GuestMemoryMmap, chain: Chain<'m>) -> u32 {
        let (request, room) = match Segments::of_request(memory, chain) {
            Ok(both) => both,
            Err(reason) => {
                debug!(%reason, "dropping a request for memory");
                return 0;
            }
        };
        if room.len() < ANSWER_LENGTH {
            // What the guest could not be told of is not done.
            debug!("dropping a request for memory that has no room for an answer");
            return 0;
        }
        let mut bytes = [0; REQUEST_LENGTH];
        let (answer, state) = if request.copy_to(&mut bytes) < REQUEST_LENGTH {
            (Answer::Error, None)
        } else {
            self.carry_out(&bytes)
        };
        let mut bytes = [0; ANSWER_LENGTH];
        bytes[0..2].copy_from_slice(&(answer as u16).to_le_bytes());
        if let Some(state) = state {
            bytes[8..10].copy_from_slice(&(state as u16).to_le_bytes());
        }
        // Ten.
        room.copy_from(&bytes) as u32
    }

    fn carry_out(&mut self, request: &[u8; REQUEST_LENGTH]) -> (Answer, Option<State>) {
        let kind = u16::from_le_bytes([request[0], request[1]]);
        if kind == UNPLUG_ALL {
            return (self.unplug_all(), None);
        }
        let Some(run) = self.run(request) else {
            return (Answer::Error, None);
        };
        match kind {
            PLUG => (self.plug(run), None),
            UNPLUG => (self.unplug(run), None),
            STATE => (Answer::Ack, Some(self.state_of(run))),
            _ => (Answer::Error, None),
        }
    }

    /// The blocks that a request is about, if they are blocks of the region.
    fn run(&self, request: &[u8; REQUEST_LENGTH]) -> Option<Run> {
        let mut address = [0; 8];
        address.copy_from_slice(&request[8..16]);
        let offset = u64::from_le_bytes(address).checked_sub(self.start.0)?;
        if !offset.is_multiple_of(BLOCK) {
            return None;
        }
        let run = Run {
            first: u32::try_from(offset / BLOCK).ok()?,
            count: u16::from_le_bytes([request[16], request[17]]).into(),
        };
        self.blocks.contains(run).then_some(run)
    }

    fn plug(&mut self, run: Run) -> Answer {
        if self.blocks.any_plugged(run) {
            return Answer::Error;
        }
        let (start, length) = self.range(run);
        if self.plugged() + length > self.shared.requested.get() {
            return Answer::Nack;
        }
        match self.memory.plug(start, length) {
            Ok(()) => {
                self.blocks.plug(run);
                Answer::Ack
            }
            Err(error) => busy("plug", &error),
        }
    }

    fn unplug(&mut self, run: Run) -> Answer {
        if !self.blocks.all_plugged(run) {
            return Answer::Error;
        }
        let (start, length) = self.range(run);
        match self.memory.unplug(start, length) {
            Ok(()) => {
                self.blocks.unplug(run);
                Answer::Ack
            }
            Err(error) => busy("unplug", &error),
        }
    }

    fn unplug_all(&mut self) -> Answer {
        let runs: Vec<Run> = self.blocks.plugged_runs().collect();
        for run in runs {
            let answer = self.unplug(run);
            if answer != Answer::Ack {
                return answer;
            }
        }
        Answer::Ack
    }

    fn state_of(&self, run: Run) -> State {
        if self.blocks.all_plugged(run) {
            State::Plugged
        } else if self.blocks.any_plugged(run) {
            State::Mixed
        } else {
            State::Unplugged
        }
    }
}

fn busy(what: &str, error: &std::io::Error) -> Answer {
    debug!("cannot {what} memory of the guest's: {error}");
    Answer::Busy
}
