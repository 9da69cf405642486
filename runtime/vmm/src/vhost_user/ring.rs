//! One virtqueue as vhost-user sees it: set up piece by piece, started by its kick descriptor, enabled and disabled, stopped.
//! It is offered to the device as ready only while it is started, enabled and lies wholly in guest memory.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::{ServeError, system};

/// A queue, and how the guest and the device tell each other about it.
pub(super) struct Ring {
    pub(super) queue: Queue,
    index: usize,
    epoll: Arc<Epoll>,
    /// The guest has put something into the available ring.
    kick: Option<File>,
    /// The device has put something into the used ring.
    call: Option<File>,
    /// The guest seemed not to want to know when the used ring grew last.
    withheld: bool,
    enabled: bool,
    /// What the guest has configured makes no sense; the ring stays silent until it is set up again.
    unusable: bool,
}

impl Ring {
    pub(super) fn new(
        index: usize,
        max_size: u16,
        epoll: Arc<Epoll>,
    ) -> Result<Self, virtio_queue::Error> {
        Ok(Self {
            queue: Queue::new(max_size)?,
            index,
            epoll,
            kick: None,
            call: None,
            withheld: false,
            enabled: false,
            unusable: false,
        })
    }

    pub(super) fn set_size(&mut self, size: u32) {
        let size = u16::try_from(size).unwrap_or(0);
        self.unusable = self.queue.try_set_size(size).is_err();
    }

    /// Guest-physical addresses of the three parts.
    pub(super) fn set_addresses(
        &mut self,
        memory: &GuestMemoryMmap,
        descriptors: u64,
        available: u64,
        used: u64,
    ) {
        let set = self
            .queue
            .try_set_desc_table_address(GuestAddress(descriptors))
            .and_then(|()| {
                self.queue
                    .try_set_avail_ring_address(GuestAddress(available))
            })
            .and_then(|()| self.queue.try_set_used_ring_address(GuestAddress(used)))
            // Only where the device left off in the available ring is told; in the used ring it shows.
            .and_then(|()| {
                self.queue
                    .used_idx(memory, std::sync::atomic::Ordering::Acquire)
            });
        match set {
            Ok(used) => self.queue.set_next_used(used.0),
            Err(_) => self.unusable = true,
        }
    }

    pub(super) fn set_call(&mut self, call: Option<File>) {
        self.call = call;
    }

    pub(super) fn set_kick(
        &mut self,
        kick: Option<File>,
        memory: &GuestMemoryMmap,
    ) -> Result<(), ServeError> {
        self.pause()?;
        self.kick = kick;
        self.resume(memory)
    }

    pub(super) fn set_enabled(
        &mut self,
        enabled: bool,
        memory: &GuestMemoryMmap,
    ) -> Result<(), ServeError> {
        self.pause()?;
        self.enabled = enabled;
        self.resume(memory)
    }

    /// Stops the ring; returns where the device left off in the available ring.
    pub(super) fn stop(&mut self) -> Result<u16, ServeError> {
        self.pause()?;
        self.kick = None;
        self.call = None;
        Ok(self.queue.next_avail())
    }

    /// Whether the ring has been started and not stopped since.
    pub(super) fn is_started(&self) -> bool {
        self.kick.is_some()
    }

    /// Takes the kick; whether the device may look at the queue.
    pub(super) fn take_kick(&mut self) -> bool {
        let Some(mut kick) = self.kick.as_ref().filter(|_| self.queue.ready()) else {
            return false;
        };
        // How many kicks there were does not matter, and when there were none the ring is merely looked at in vain.
        let _ = kick.read(&mut [0; 8]);
        true
    }

    /// Tells the guest that the used ring has grown, if it wants to know.
    pub(super) fn notify(&mut self, memory: &GuestMemoryMmap) {
        self.withheld = !self.queue.needs_notification(memory).unwrap_or(true);
        if !self.withheld {
            self.call();
        }
    }

    /// Tells the guest what it was not told; at worst it looks in vain.
    pub(super) fn notify_again(&mut self) {
        if std::mem::take(&mut self.withheld) {
            self.call();
        }
    }

    fn call(&self) {
        if let Some(mut call) = self.call.as_ref() {
            // The counter can only be full of notifications that the guest has yet to see.
            let _ = call.write(&1u64.to_ne_bytes());
        }
    }

    /// Back to as new, but for the descriptors; must be enabled again.
    pub(super) fn reset(&mut self) -> Result<(), ServeError> {
        self.pause()?;
        self.queue.reset();
        self.withheld = false;
        self.enabled = false;
        self.unusable = false;
        Ok(())
    }

    fn pause(&mut self) -> Result<(), ServeError> {
        if let Some(kick) = self.kick.as_ref().filter(|_| self.queue.ready()) {
            self.queue.set_ready(false);
            self.epoll
                .delete(kick.as_fd())
                .map_err(system("stop watching a queue"))?;
        }
        Ok(())
    }

    fn resume(&mut self, memory: &GuestMemoryMmap) -> Result<(), ServeError> {
        let Some(kick) = self.kick.as_ref().filter(|_| self.enabled) else {
            return Ok(());
        };
        self.queue.set_ready(true);
        if self.unusable || !self.queue.is_valid(memory) {
            self.queue.set_ready(false);
            tracing::warn!(
                "the guest has configured queue {} in a way that makes no sense",
                self.index
            );
            return Ok(());
        }
        // Kicks that came while nobody watched are still in the counter, and count as one that comes at once.
        let event = EpollEvent::new(EpollFlags::EPOLLIN, self.index as u64);
        self.epoll
            .add(kick.as_fd(), event)
            .map_err(system("watch a queue"))
    }
}
