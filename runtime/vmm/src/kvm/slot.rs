//! The virtio slots: places on the memory-mapped bus, each empty or with a device in it. A vCPU's thread comes here with the guest's
//! register accesses, a worker's thread with notifications and host events; a device is locked only against those two, and its
//! interrupt status, which the guest reads in every interrupt, is not locked at all.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cloison_devices::{Broken, Context, Device, QueueMask};
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::layout::{PAGE, SLOT_COUNT, SLOTS};
use super::registers::{
    CONFIG, CONFIG_GENERATION, Effect, INTERRUPT_ACK, INTERRUPT_STATUS, Identity, QueueRegisters,
    Registers,
};

/// Interrupt status bits (virtio 1.3 §4.2.2): a used ring has grown; the device needs the driver's attention.
const USED_RING: u32 = 1;
const CONFIGURATION: u32 = 2;

/// All slots of a VM.
pub(super) struct Slots {
    slots: Vec<Slot>,
    memory: GuestMemoryMmap,
    /// Whether the guest has brought any device to life.
    taken: AtomicBool,
}

/// One slot.
struct Slot {
    interrupt_status: AtomicU32,
    /// Raises the slot's interrupt line; KVM holds its other end.
    line: EventFd,
    plugged: Mutex<Option<Plugged>>,
}

/// A device in a slot.
struct Plugged {
    name: &'static str,
    device: Box<dyn Device>,
    identity: Identity,
    registers: Registers,
    /// The queues as they were when the guest started the device; none before that, after a reset, and once it is broken.
    queues: Option<Vec<Queue>>,
    host: HostWatch,
    /// The configuration's generation of which the guest has been told.
    told: u32,
}

/// Where the worker that serves a device waits for its host events, and under which key.
pub(super) struct HostWatch {
    pub(super) epoll: Arc<Epoll>,
    pub(super) key: u64,
}

/// What a notification or host event is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// The guest has notified this queue.
    Queue(usize),
    /// The device's host descriptor is readable.
    Host,
}

impl Slots {
    /// Empty slots; `lines` are their interrupt lines.
    pub(super) fn new(lines: Vec<EventFd>, memory: GuestMemoryMmap) -> Self {
        let slot = |line| Slot {
            interrupt_status: AtomicU32::new(0),
            line,
            plugged: Mutex::new(None),
        };
        Self {
            slots: lines.into_iter().map(slot).collect(),
            memory,
            taken: AtomicBool::new(false),
        }
    }

    /// Puts `device` into the empty slot `index`.
    ///
    /// # Errors
    /// When the slot is taken or does not exist.
    pub(super) fn plug(
        &self,
        index: usize,
        name: &'static str,
        device: Box<dyn Device>,
        host: HostWatch,
    ) -> io::Result<()> {
        let slot = self.slots.get(index).ok_or(io::ErrorKind::NotFound)?;
        let mut plugged = slot.lock();
        if plugged.is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let identity = Identity {
            device_type: device.device_type(),
            features: device.features(),
        };
        let registers = Registers::new(device.queue_sizes());
        let told = device.config_generation();
        *plugged = Some(Plugged {
            name,
            device,
            identity,
            registers,
            queues: None,
            host,
            told,
        });
        Ok(())
    }

    /// Empties slot `index`: no event reaches the device any more, and the guest finds nothing there.
    pub(super) fn unplug(&self, index: usize) {
        let Some(slot) = self.slots.get(index) else {
            return;
        };
        let mut guard = slot.lock();
        if let Some(mut plugged) = guard.take() {
            plugged.stop();
            slot.interrupt_status.store(0, Ordering::Release);
        }
    }

    /// Whether the guest has brought any device to life yet.
    pub(super) fn taken(&self) -> bool {
        self.taken.load(Ordering::Relaxed)
    }

    /// The guest reads `data.len()` bytes at `address`. What is no slot reads as all ones, as on a bus where nobody answers.
    pub(super) fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        let Some((slot, at)) = self.find(address) else {
            return;
        };
        data.fill(0);
        if at >= CONFIG {
            if let Some(plugged) = slot.lock().as_ref() {
                plugged.device.read_config(at - CONFIG, data);
            }
            return;
        }
        // All registers are 32 bits wide and must be accessed so (§4.2.2.2).
        let Ok(word) = <&mut [u8; 4]>::try_from(data) else {
            return;
        };
        let value = match at {
            INTERRUPT_STATUS => slot.interrupt_status.load(Ordering::Acquire),
            CONFIG_GENERATION => slot
                .lock()
                .as_ref()
                .map_or(0, |plugged| plugged.device.config_generation()),
            _ => match slot.lock().as_ref() {
                Some(plugged) => plugged.registers.read(at, plugged.identity),
                None => empty(at),
            },
        };
        *word = value.to_le_bytes();
    }

    /// The guest writes `data` at `address`; what is no slot swallows it.
    pub(super) fn write(&self, address: u64, data: &[u8]) {
        let Some((slot, at)) = self.find(address) else {
            return;
        };
        if at >= CONFIG {
            if let Some(plugged) = slot.lock().as_mut() {
                plugged.device.write_config(at - CONFIG, data);
            }
            return;
        }
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else {
            return;
        };
        if at == INTERRUPT_ACK {
            slot.interrupt_status.fetch_and(!value, Ordering::AcqRel);
            return;
        }
        let mut guard = slot.lock();
        let Some(plugged) = guard.as_mut() else {
            return;
        };
        match plugged.registers.write(at, value, plugged.identity) {
            Effect::Nothing => {}
            Effect::Start => match plugged.start(&self.memory) {
                Ok(()) => self.taken.store(true, Ordering::Relaxed),
                Err(broken) => slot.give_up(plugged, &broken),
            },
            Effect::Reset => {
                plugged.stop();
                plugged.device.reset();
                slot.interrupt_status.store(0, Ordering::Release);
            }
        }
    }

    /// Lets the device in slot `index` handle `event`. One that is not alive gets none.
    pub(super) fn handle(&self, index: usize, event: Event) {
        let Some(slot) = self.slots.get(index) else {
            return;
        };
        let mut guard = slot.lock();
        let Some(plugged) = guard.as_mut() else {
            return;
        };
        match plugged.handle(&self.memory, event) {
            Ok(false) => {}
            Ok(true) => slot.interrupt(USED_RING),
            Err(broken) => return slot.give_up(plugged, &broken),
        }
        let generation = plugged.device.config_generation();
        if plugged.queues.is_some() && plugged.told != generation {
            plugged.told = generation;
            slot.interrupt(CONFIGURATION);
        }
    }

    fn find(&self, address: u64) -> Option<(&Slot, u64)> {
        let offset = address
            .checked_sub(SLOTS)
            .filter(|offset| *offset < SLOT_COUNT as u64 * PAGE)?;
        let slot = self.slots.get((offset / PAGE) as usize)?;
        Some((slot, offset % PAGE))
    }
}

/// What an empty slot's registers hold: a device of ID 0, which a driver passes over (§4.2.2.2).
fn empty(at: u64) -> u32 {
    const NOBODY: Identity = Identity {
        device_type: 0,
        features: 0,
    };
    Registers::new(&[]).read(at, NOBODY)
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Option<Plugged>> {
        // A thread that panics with a device locked ends the VM; whoever comes after it finds the device as it is.
        self.plugged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn interrupt(&self, why: u32) {
        self.interrupt_status.fetch_or(why, Ordering::AcqRel);
        // Fails only when the counter is full, and then the interrupt is pending already.
        let _ = self.line.write(1);
    }

    /// The guest broke the device: it is left alone until the guest resets it, and the guest is told.
    fn give_up(&self, plugged: &mut Plugged, broken: &Broken) {
        tracing::warn!("{broken}; it waits for a reset");
        plugged.stop();
        plugged.registers.set_needs_reset();
        self.interrupt(CONFIGURATION);
    }
}

impl Plugged {
    /// Brings the device to life with the queues as the guest has set them up.
    fn start(&mut self, memory: &GuestMemoryMmap) -> Result<(), Broken> {
        let features = self.registers.features();
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let queues = self
            .registers
            .queues()
            .iter()
            .map(|registers| queue(registers, event_idx, memory));
        let queues = queues
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| self.broken("a queue is not in memory"))?;
        self.device.set_acked_features(features);
        if let Some(fd) = self.device.host_fd() {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, self.host.key);
            let watched = self.host.epoll.add(fd, event);
            watched.map_err(|errno| {
                self.broken(&format!("its host descriptor cannot be watched: {errno}"))
            })?;
        }
        self.queues = Some(queues);
        Ok(())
    }

    /// No further event reaches the device.
    fn stop(&mut self) {
        if self.queues.take().is_some()
            && let Some(fd) = self.device.host_fd()
            && let Err(errno) = self.host.epoll.delete(fd)
        {
            tracing::error!(
                "cannot stop watching the {} device's descriptor: {errno}",
                self.name
            );
        }
    }

    fn broken(&self, what: &str) -> Broken {
        Broken {
            device: self.name,
            what: what.to_owned(),
        }
    }

    /// Answers whether the guest wants to be interrupted.
    fn handle(&mut self, memory: &GuestMemoryMmap, event: Event) -> Result<bool, Broken> {
        let Some(queues) = &mut self.queues else {
            return Ok(false);
        };
        let grown = {
            let mut queues: Vec<&mut Queue> = queues.iter_mut().collect();
            let mut context = Context {
                memory,
                queues: &mut queues,
            };
            match event {
                Event::Queue(index) => self.device.queue_event(&mut context, index)?,
                Event::Host => self.device.host_event(&mut context)?,
            }
        };
        wants_interrupt(queues, grown, memory).map_err(|error| self.broken(&error.to_string()))
    }
}

fn wants_interrupt(
    queues: &mut [Queue],
    grown: QueueMask,
    memory: &GuestMemoryMmap,
) -> Result<bool, virtio_queue::Error> {
    let mut wanted = false;
    for (index, queue) in queues.iter_mut().enumerate() {
        if grown.contains(index) {
            wanted |= queue.needs_notification(memory)?;
        }
    }
    Ok(wanted)
}

/// The queue that the guest has described, or `None` if it is not in memory as a whole. One that it has not made ready is
/// made too, and is not ready.
fn queue(registers: &QueueRegisters, event_idx: bool, memory: &GuestMemoryMmap) -> Option<Queue> {
    let mut queue = Queue::new(registers.max).ok()?;
    if !registers.ready {
        return Some(queue);
    }
    queue.try_set_size(registers.size).ok()?;
    queue
        .try_set_desc_table_address(GuestAddress(registers.descriptors))
        .ok()?;
    queue
        .try_set_avail_ring_address(GuestAddress(registers.driver))
        .ok()?;
    queue
        .try_set_used_ring_address(GuestAddress(registers.device))
        .ok()?;
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    queue.is_valid(memory).then_some(queue)
}

mod state;
#[cfg(test)]
mod tests;

pub(super) use state::SlotState;
