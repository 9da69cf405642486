//! A worker: one thread that serves some of the devices, one event at a time. It sleeps until the guest notifies a queue or a device
//! has something from the host; a device of one worker never waits for a device of another.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use vmm_sys_util::eventfd::EventFd;

use super::slot::{Event, HostWatch, Slots};
use crate::stop::Stop;

/// Most events taken from one wait.
const EVENTS: usize = 16;

/// Keys of what is waited for: the slot's index above [`SLOT_SHIFT`], the queue or [`HOST`] below; or [`STOP`].
const SLOT_SHIFT: u32 = 8;
const HOST: u64 = 0xff;
const STOP: u64 = u64::MAX;

/// A worker, before and after it has its thread.
pub(super) struct Worker {
    name: &'static str,
    epoll: Arc<Epoll>,
    stop: EventFd,
    thread: Option<JoinHandle<Option<()>>>,
}

impl Worker {
    /// A worker whose thread will be called `name`.
    pub(super) fn new(name: &'static str) -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        let stop = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        epoll.add(borrow(&stop), EpollEvent::new(EpollFlags::EPOLLIN, STOP))?;
        Ok(Self {
            name,
            epoll,
            stop,
            thread: None,
        })
    }

    /// What the device in `slot` needs to have its host events served here.
    pub(super) fn host_watch(&self, slot: usize) -> HostWatch {
        HostWatch {
            epoll: Arc::clone(&self.epoll),
            key: key(slot, HOST),
        }
    }

    /// A notification for queue `queue` of `slot`; whoever signals it wakes this worker, until it is dropped.
    pub(super) fn notification(&self, slot: usize, queue: usize) -> io::Result<EventFd> {
        let fd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        // Edge-triggered, a notification need never be read: every signal is an edge of its own.
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        self.epoll
            .add(borrow(&fd), EpollEvent::new(flags, key(slot, queue as u64)))?;
        Ok(fd)
    }

    /// Starts serving `slots`.
    pub(super) fn start(&mut self, slots: &Arc<Slots>, stop: &Stop) -> io::Result<()> {
        let (epoll, slots) = (Arc::clone(&self.epoll), Arc::clone(slots));
        self.thread = Some(stop.spawn(self.name, move || serve(&epoll, &slots))?);
        Ok(())
    }

    /// Stops serving; returns when the thread has ended.
    pub(super) fn end(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        match self.stop.write(1) {
            // A thread that panicked has said so before it ended.
            Ok(()) => drop(thread.join()),
            Err(error) => tracing::error!("cannot stop the {} worker: {error}", self.name),
        }
    }
}

/// Serves `slots` until stopped.
fn serve(epoll: &Epoll, slots: &Slots) -> io::Result<()> {
    let mut events = [EpollEvent::empty(); EVENTS];
    loop {
        let ready = match epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(ready) => ready,
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        for event in events.iter().take(ready) {
            let (slot, what) = match event.data() {
                STOP => return Ok(()),
                key => ((key >> SLOT_SHIFT) as usize, key & HOST),
            };
            let event = match what {
                HOST => Event::Host,
                queue => Event::Queue(queue as usize),
            };
            slots.handle(slot, event);
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
