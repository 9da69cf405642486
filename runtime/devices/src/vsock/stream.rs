//! The host's two ends of a stream: a [`Source`] that bytes for the guest come from and a [`Sink`] that the guest's bytes go
//! to. Both know whether trying is worth a system call (readiness is edge-triggered: true until the system says it would
//! block), and neither ever waits.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

use nix::sys::epoll::EpollFlags;
use nix::sys::socket::Shutdown;
use tracing::{debug, warn};

use super::attachment::FirstOutput;
use super::descriptor::Watched;
use super::io::{read_into, write_from, write_slices};
use crate::segments::Segments;

/// Room a sink's backlog keeps when it is empty, in bytes; what it grew beyond is given back.
const KEPT_BACKLOG: usize = 16 << 10;

/// What came of reading a source.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// That many bytes, at least one.
    Bytes(usize),
    /// There will be no more.
    End,
    /// None for the time being.
    Blocked,
}

/// Where bytes for the guest come from. Dropping it ends the reading.
#[derive(Debug)]
pub(super) struct Source {
    fd: Watched,
    ready: bool,
    one_socket: bool,
}

impl Source {
    /// `one_socket`: a sink of the same connection has the same socket.
    pub(super) fn new(fd: Watched, one_socket: bool) -> Self {
        Self {
            fd,
            ready: true,
            one_socket,
        }
    }

    /// Whether a read may bring something.
    pub(super) fn ready(&self) -> bool {
        self.ready
    }

    /// Epoll has reported something.
    pub(super) fn wake(&mut self) {
        self.ready = true;
    }

    /// Reads once, straight into guest memory. An error is an end: what the guest should have had is not to be had.
    pub(super) fn read(&mut self, to: &Segments<'_>) -> Read {
        match read_into(self.fd.as_fd(), self.fd.way(), to) {
            Ok(0) => Read::End,
            Ok(count) => Read::Bytes(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.ready = false;
                Read::Blocked
            }
            Err(error) => {
                debug!(%error, "reading for the guest failed; it sees the end of the stream");
                Read::End
            }
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        if self.one_socket {
            self.fd.shutdown(Shutdown::Read);
        }
    }
}

/// The other end of a sink is gone: nothing written will be read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gone;

/// Where the guest's bytes go. What the descriptor does not take at once waits in a backlog, which the guest's credit
/// bounds. Room is watched for only while there is a backlog: a socket's reader would wake us with every read otherwise.
/// Dropping a sink ends the writing, backlog or not.
#[derive(Debug)]
pub(super) struct Sink {
    fd: Watched,
    ready: bool,
    one_socket: bool,
    backlog: VecDeque<u8>,
    first_output: Option<FirstOutput>,
}

impl Sink {
    /// `one_socket`: the source of the same connection has the same socket.
    pub(super) fn new(fd: Watched, one_socket: bool, first_output: Option<FirstOutput>) -> Self {
        Self {
            fd,
            ready: true,
            one_socket,
            backlog: VecDeque::new(),
            first_output,
        }
    }

    /// Whether bytes wait to be written.
    pub(super) fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Takes all of `data`: writes what the descriptor takes, straight from guest memory, and keeps the rest. Answers how
    /// many bytes have left for the host.
    pub(super) fn write(&mut self, mut data: Segments<'_>) -> Result<usize, Gone> {
        let mut written = 0;
        while self.ready && self.backlog.is_empty() && data.len() > 0 {
            let result = write_from(self.fd.as_fd(), self.fd.way(), &data);
            let count = self.settle(result)?;
            data.advance(count);
            written += count;
        }
        let kept = self.backlog.len();
        self.backlog.resize(kept + data.len(), 0);
        let (front, back) = self.backlog.as_mut_slices();
        let (in_front, in_back) = if kept < front.len() {
            (&mut front[kept..], back)
        } else {
            (&mut [][..], &mut back[kept - front.len()..])
        };
        let copied = data.copy_to(in_front);
        data.advance(copied);
        data.copy_to(in_back);
        if kept == 0 && self.has_backlog() {
            self.watch_for(EpollFlags::EPOLLOUT)?;
        }
        Ok(written)
    }

    /// Epoll has reported something: writes of the backlog what the descriptor takes. Answers how many bytes have left for
    /// the host.
    pub(super) fn wake(&mut self) -> Result<usize, Gone> {
        if !self.has_backlog() {
            return Ok(0);
        }
        self.ready = true;
        let mut written = 0;
        while self.ready && self.has_backlog() {
            let (front, back) = self.backlog.as_slices();
            let result = write_slices(self.fd.as_fd(), self.fd.way(), front, back);
            let count = self.settle(result)?;
            self.backlog.drain(..count);
            written += count;
        }
        if !self.has_backlog() {
            self.backlog.shrink_to(KEPT_BACKLOG);
            self.watch_for(EpollFlags::empty())?;
        }
        Ok(written)
    }

    fn watch_for(&self, events: EpollFlags) -> Result<(), Gone> {
        self.fd.watch_for(events).map_err(|error| {
            // The kernel had no memory. A sink that may never be woken is better ended than left waiting.
            warn!(%error, "a descriptor the guest writes to can no longer be watched");
            Gone
        })
    }

    /// Writes a short line that is not the guest's, as a whole. It is written to a socket with nothing else in it yet.
    pub(super) fn say(&mut self, line: &str) -> Result<(), Gone> {
        let result = write_slices(self.fd.as_fd(), self.fd.way(), line.as_bytes(), &[]);
        if self.settle(result)? == line.len() {
            Ok(())
        } else {
            Err(Gone)
        }
    }

    /// What a write's result means.
    fn settle(&mut self, result: io::Result<usize>) -> Result<usize, Gone> {
        match result {
            // No descriptor answers so to a write of something; one that did would be tried for ever.
            Ok(0) => Err(Gone),
            Ok(count) => {
                if let Some(first) = self.first_output.take() {
                    first.get_or_init(Instant::now);
                }
                Ok(count)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.ready = false;
                Ok(0)
            }
            Err(error) => {
                debug!(%error, "writing for the guest failed; it can send no more");
                Err(Gone)
            }
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        if self.one_socket {
            self.fd.shutdown(Shutdown::Write);
        }
    }
}
