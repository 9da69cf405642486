//! How a vCPU's thread is got out of the guest: a signal whose handler makes KVM_RUN return at once, whether the thread is inside it,
//! about to enter it, or anywhere else.

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// A signal that nothing else in a VM process uses; its default action would end the process, so that a mistake shows.
const SIGNAL: Signal = Signal::SIGUSR1;

thread_local! {
    /// `immediate_exit` of the vCPU this thread runs, if it runs one. No destructor, so that a signal may come at any time.
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(null_mut()) };
}

/// Installs the handler, for the whole process; to be called before any vCPU's thread is started.
pub(super) fn install() -> nix::Result<()> {
    let action = SigAction::new(
        SigHandler::Handler(on_signal),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    // SAFETY: the handler only loads a thread-local pointer and stores a byte through it.
    unsafe { sigaction(SIGNAL, &action) }.map(drop)
}

extern "C" fn on_signal(_: libc::c_int) {
    let immediate_exit = IMMEDIATE_EXIT.get();
    if !immediate_exit.is_null() {
        // SAFETY: set by `Entry` on this very thread, to a byte in the shared page of a vCPU that outlives the `Entry`.
        unsafe { &*immediate_exit }.store(1, Ordering::Relaxed);
    }
}

/// The right to run a vCPU on this thread; for as long as it lives, a kick reaches the vCPU.
pub(super) struct Entry<'a> {
    vcpu: &'a mut VcpuFd,
}

impl<'a> Entry<'a> {
    pub(super) fn new(vcpu: &'a mut VcpuFd) -> Self {
        let byte = &raw mut vcpu.get_kvm_run().immediate_exit;
        IMMEDIATE_EXIT.set(byte.cast::<AtomicU8>().cast_const());
        Self { vcpu }
    }

    pub(super) fn vcpu(&mut self) -> &mut VcpuFd {
        self.vcpu
    }
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(null_mut());
    }
}

/// Makes KVM_RUN return on `thread`, this time or the next.
pub(super) fn kick<T>(thread: &JoinHandle<T>) -> io::Result<()> {
    // SAFETY: the thread has not been joined, so its handle is valid; a signal to a thread that has ended is an error.
    let result = unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGNAL as libc::c_int) };
    match result {
        0 | libc::ESRCH => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}
