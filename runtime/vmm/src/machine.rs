//! What the VM process's main loop needs of an engine, whichever it is. An engine that has something to say about its guest's
//! end says it through [`crate::stop::Stop`]; the loop then ends the machine.

use std::os::fd::{BorrowedFd, OwnedFd};

use crate::control::{DeviceKind, State};
use crate::nic::Plugged;

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

    /// How many vCPUs the guest may use.
    fn vcpus(&self) -> u8;

    /// How many it can be given.
    fn max_vcpus(&self) -> u8;

    /// How much memory the guest has been given beyond what it was started with, MiB.
    fn hot_memory_mib(&self) -> u32;

    /// Stops the guest's vCPUs; returns when they have stopped. What is paused already stays so.
    ///
    /// # Errors
    /// Why it cannot be done, for people; as for those below.
    fn pause(&mut self) -> Result<(), String>;

    /// Lets a paused guest go on.
    fn resume(&mut self) -> Result<(), String>;

    /// Lets the guest use this many vCPUs. It is for the guest to start those that come, and to leave those that go before they
    /// do.
    fn resize_vcpus(&mut self, vcpus: u8) -> Result<(), String>;

    /// Lets the guest have this much memory beyond what it was started with, MiB. It takes it, and gives it back, in its own time;
    /// `done` is closed when it has just that, or is let have another amount.
    fn resize_hot_memory(&mut self, mib: u32, done: Option<OwnedFd>) -> Result<(), String>;

    /// Network devices that are in use.
    fn nics(&self) -> Vec<Plugged>;

    /// Gives the guest one more device, made from `file` if it needs one, and answers where; it is for the guest to look there.
    fn plug(&mut self, kind: DeviceKind, file: Option<OwnedFd>) -> Result<Plugged, String>;

    /// Takes a device away that was given to the guest by [`Machine::plug`].
    fn unplug(&mut self, slot: u32) -> Result<(), String>;

    /// Ends the guest, if it has not ended by itself, and returns when nothing of it runs any more.
    fn end(&mut self);
}
