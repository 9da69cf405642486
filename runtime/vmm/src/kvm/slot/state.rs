//! A slot's state as plain data: what its registers hold and how far its queues have come. With the state of the device itself, which
//! is the device's to give, it makes a fresh slot go on where this one was.

use std::io;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;

use super::{Registers, Slots};

/// Version of [`SlotState`].
const STATE_VERSION: u32 = 1;

/// A slot with a device in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::kvm) struct SlotState {
    version: u32,
    device_type: u32,
    interrupt_status: u32,
    registers: Registers,
    /// None when the device does not live.
    queues: Option<Vec<Progress>>,
}

/// How far a queue has come; where it is, its registers say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Progress {
    next_avail: u16,
    next_used: u16,
}

impl SlotState {
    /// How many queues the device has.
    pub(in crate::kvm) fn queues(&self) -> usize {
        self.queues.as_ref().map_or(0, Vec::len)
    }
}

impl Slots {
    /// The state of slot `index`; `None` when it is empty. The guest must be paused.
    pub(in crate::kvm) fn save(&self, index: usize) -> Option<SlotState> {
        let slot = self.slots.get(index)?;
        let guard = slot.lock();
        let plugged = guard.as_ref()?;
        let progress = |queue: &virtio_queue::Queue| Progress {
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
        };
        let queues = plugged.queues.as_ref();
        Some(SlotState {
            version: STATE_VERSION,
            device_type: plugged.identity.device_type,
            interrupt_status: slot.interrupt_status.load(Ordering::Acquire),
            registers: plugged.registers.clone(),
            queues: queues.map(|queues| queues.iter().map(progress).collect()),
        })
    }

    /// Gives `state` to slot `index`, in which there is a device of the same type that no guest has used. Notifications are not part of a
    /// state: every queue must be handled afterwards as if the guest had notified it.
    ///
    /// # Errors
    /// When the state is not one of this device, or of another version.
    pub(in crate::kvm) fn restore(&self, index: usize, state: &SlotState) -> io::Result<()> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        if state.version != STATE_VERSION {
            return Err(invalid("the saved state of a slot is of another version"));
        }
        let slot = self.slots.get(index).ok_or(io::ErrorKind::NotFound)?;
        let mut guard = slot.lock();
        let plugged = guard.as_mut().ok_or(io::ErrorKind::NotFound)?;
        if plugged.identity.device_type != state.device_type
            || !state.registers.fit(&plugged.registers, plugged.identity)
        {
            return Err(invalid("the saved state of a slot is of another device"));
        }
        plugged.registers = state.registers.clone();
        slot.interrupt_status
            .store(state.interrupt_status, Ordering::Release);
        let Some(progress) = &state.queues else {
            return Ok(());
        };
        plugged
            .start(&self.memory)
            .map_err(|broken| invalid(&broken.to_string()))?;
        for (queue, progress) in plugged.queues.iter_mut().flatten().zip(progress) {
            queue.set_next_avail(progress.next_avail);
            queue.set_next_used(progress.next_used);
        }
        if state.interrupt_status != 0 {
            slot.interrupt(state.interrupt_status);
        }
        Ok(())
    }
}
