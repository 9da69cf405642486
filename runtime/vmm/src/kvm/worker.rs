//! A worker: one thread that serves some of the devices, one event at a time. It sleeps until the guest notifies a queue or a device
//! has something from the host; a device of one worker never waits for a device of another.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use vmm_sys_util::eventfd::EventFd;

use super::slot::{Event, HostWatch, Slots};

/// Most events taken from one wait.
const EVENTS: usize = 16;

/// Keys of what is waited for: the slot's index above [`SLOT_SHIFT`], the queue or [`HOST`] below; or [`STOP`].
const SLOT_SHIFT: u32 = 8;
const HOST: u64 = 0xff;
const STOP: u64 = u64::MAX;

/// What a worker waits for, before and after it has its thread.
pub(super) struct Worker {
    epoll: Arc<Epoll>,
    stop: EventFd,
    /// The guest's notifications, kept open for as long as KVM may signal them.
    notifications: Vec<EventFd>,
}

impl Worker {
    pub(super) fn new() -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        let stop = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        epoll.add(borrow(&stop), EpollEvent::new(EpollFlags::EPOLLIN, STOP))?;
        Ok(Self {
            epoll,
            stop,
            notifications: Vec::new(),
        })
    }

    /// What the device in `slot` needs to have its host events served here.
    pub(super) fn host_watch(&self, slot: usize) -> HostWatch {
        HostWatch {
            epoll: Arc::clone(&self.epoll),
            key: key(slot, HOST),
        }
    }

    /// A notification for queue `queue` of `slot`; whoever signals it wakes this worker.
    pub(super) fn notification(&mut self, slot: usize, queue: usize) -> io::Result<&EventFd> {
        let fd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        // Edge-triggered, a notification need never be read: every signal is an edge of its own.
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        self.epoll
            .add(borrow(&fd), EpollEvent::new(flags, key(slot, queue as u64)))?;
        self.notifications.push(fd);
        self.notifications
            .last()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// A way to end [`Worker::run`].
    pub(super) fn stopper(&self) -> io::Result<EventFd> {
        self.stop.try_clone()
    }

    /// Serves `slots` until stopped.
    pub(super) fn run(self, slots: &Slots) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS];
        loop {
            let ready = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(ready) => ready,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            for event in events.iter().take(ready) {
                let (slot, what) = match event.data() {
                    STOP => return Ok(()),
                    key => ((key >> SLOT_SHIFT) as usize, key & HOST),
                };
                slots.handle(
                    slot,
                    if what == HOST {
                        Event::Host
                    } else {
                        Event::Queue(what as usize)
                    },
                );
            }
        }
    }
}

fn key(slot: usize, what: u64) -> u64 {
    (slot as u64) << SLOT_SHIFT | what
}

fn borrow(fd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as the `EventFd` it is borrowed from.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}
