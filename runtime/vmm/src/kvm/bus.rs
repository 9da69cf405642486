//! The devices of a VM: which slot each is in, which worker serves it, and the notifications by which KVM wakes that worker. A device
//! can be put into an empty slot, and taken out of its slot, at any time of the guest's life.

use std::io;
use std::sync::Arc;

use cloison_devices::Device;
use kvm_ioctls::{IoEventAddress, VmFd};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::error::{KvmError, kvm, system};
use super::layout::{SLOT_COUNT, slot_address, slot_irq};
use super::registers::QUEUE_NOTIFY;
use super::slot::Slots;
use super::worker::Worker;
use crate::stop::Stop;

/// Device types (virtio 1.3 §5.2, §5.11).
const TYPE_BLK: u32 = 2;
const TYPE_FS: u32 = 26;

/// All slots and those who serve them.
pub(super) struct Bus {
    vm: Arc<VmFd>,
    slots: Arc<Slots>,
    /// Serves file systems and disks: their requests wait for the host's disks, so they keep nobody else waiting.
    files: Worker,
    /// Serves all other devices.
    rest: Worker,
    /// The queues' notifications of the device in each slot; `None` where there is none.
    notifications: Vec<Option<Vec<EventFd>>>,
}

impl Bus {
    /// A bus of empty slots in `memory`'s address space. All interrupt lines are connected here, so that a device that is plugged
    /// later needs no more of KVM than its notifications.
    pub(super) fn new(vm: Arc<VmFd>, memory: GuestMemoryMmap) -> Result<Self, KvmError> {
        let line = |slot| {
            let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .map_err(system("make an interrupt line"))?;
            vm.register_irqfd(&line, slot_irq(slot))
                .map_err(kvm("connect an interrupt line"))?;
            Ok(line)
        };
        let lines = (0..SLOT_COUNT).map(line).collect::<Result<_, KvmError>>()?;
        let worker = |name| Worker::new(name).map_err(system("make a worker"));
        Ok(Self {
            slots: Arc::new(Slots::new(lines, memory)),
            files: worker("fs")?,
            rest: worker("devices")?,
            notifications: (0..SLOT_COUNT).map(|_| None).collect(),
            vm,
        })
    }

    /// The slots, for those who carry the guest's accesses to them.
    pub(super) fn slots(&self) -> &Arc<Slots> {
        &self.slots
    }

    /// Puts `device` into the first empty slot, and answers which that is. A guest that runs already must be told to look at it.
    ///
    /// # Errors
    /// [`KvmError::NoSlot`], or when KVM or the system has no room for it.
    pub(super) fn plug(
        &mut self,
        name: &'static str,
        device: Box<dyn Device>,
    ) -> Result<usize, KvmError> {
        let empty = self.notifications.iter().position(Option::is_none);
        let slot = empty.ok_or(KvmError::NoSlot)?;
        self.plug_into(slot, name, device)?;
        Ok(slot)
    }

    /// Puts `device` into a slot, which is empty.
    ///
    /// # Errors
    /// As for [`Bus::plug`].
    pub(super) fn plug_into(
        &mut self,
        slot: usize,
        name: &'static str,
        device: Box<dyn Device>,
    ) -> Result<(), KvmError> {
        let worker = match device.device_type() {
            TYPE_BLK | TYPE_FS => &self.files,
            _ => &self.rest,
        };
        let notifications = (0..device.queue_sizes().len())
            .map(|queue| worker.notification(slot, queue))
            .collect::<io::Result<Vec<_>>>()
            .map_err(system("make a queue's notification"))?;
        self.slots
            .plug(slot, name, device, worker.host_watch(slot))
            .map_err(system("plug a device"))?;
        let mut watched = Ok(());
        for (queue, notification) in (0_u32..).zip(&notifications) {
            watched = self
                .vm
                .register_ioevent(notification, &notify_address(slot), queue);
            if watched.is_err() {
                break;
            }
        }
        self.notifications[slot] = Some(notifications);
        if let Err(error) = watched {
            self.unplug(slot)?;
            return Err(kvm("watch a queue's notification")(error));
        }
        Ok(())
    }

    /// Takes the device out of `slot`. A guest that still uses it finds that it is gone.
    ///
    /// # Errors
    /// [`KvmError::EmptySlot`].
    pub(super) fn unplug(&mut self, slot: usize) -> Result<(), KvmError> {
        let notifications = self.notifications.get_mut(slot).and_then(Option::take);
        let notifications = notifications.ok_or(KvmError::EmptySlot(slot))?;
        for (queue, notification) in (0_u32..).zip(&notifications) {
            // One that could not be registered is not there to be taken back.
            let _ = self
                .vm
                .unregister_ioevent(notification, &notify_address(slot), queue);
        }
        self.slots.unplug(slot);
        Ok(())
    }

    /// Starts serving the devices.
    pub(super) fn start(&mut self, stop: &Stop) -> Result<(), KvmError> {
        for worker in [&mut self.files, &mut self.rest] {
            worker
                .start(&self.slots, stop)
                .map_err(system("start a worker"))?;
        }
        Ok(())
    }

    /// Stops serving the devices.
    pub(super) fn end(&mut self) {
        self.files.end();
        self.rest.end();
    }
}

fn notify_address(slot: usize) -> IoEventAddress {
    IoEventAddress::Mmio(slot_address(slot) + QUEUE_NOTIFY)
}
