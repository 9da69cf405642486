//! What the VM process's main loop needs of an engine, whichever it is. An engine that has something to say about its guest's
//! end says it through [`crate::stop::Stop`]; the loop then ends the machine.

use std::os::fd::BorrowedFd;

use crate::control::State;

/// Whether a descriptor is still worth watching.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Watch {
    Keep,
    /// It has said its last and would be readable for ever.
    Drop,
}

/// A guest that runs.
pub(crate) trait Machine {
    /// Descriptors the main loop watches for being readable; always the same ones, in the same order.
    fn watched(&self) -> Vec<BorrowedFd<'_>>;

    /// The descriptor at `index` of [`Machine::watched`] is readable.
    fn ready(&mut self, index: usize) -> Watch;

    /// How far the guest has come.
    fn state(&self) -> State;

    /// IDs of the processes that run beside the VM process.
    fn pids(&self) -> Vec<u32>;

    /// Ends the guest, if it has not ended by itself, and returns when nothing of it runs any more.
    fn end(&mut self);
}
