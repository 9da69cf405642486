//! Who of the vCPUs may be in the guest: one place where pausing, limiting their number and ending the VM meet. A vCPU's thread passes
//! the gate before it enters the guest, and again whenever it has been kicked out of it.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// The gate of one VM.
#[derive(Debug)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// vCPUs with an ID below this may run.
    allowed: u8,
    paused: bool,
    ending: bool,
    /// The vCPUs that are in the guest or on their way, by the bits of their IDs.
    inside: u64,
}

impl State {
    fn open_to(&self, id: u8) -> bool {
        !self.paused && id < self.allowed
    }
}

impl Gate {
    /// A gate that is open to the first `allowed` vCPUs, of at most 64.
    pub(super) fn new(allowed: u8) -> Self {
        let state = State {
            allowed,
            paused: false,
            ending: false,
            inside: 0,
        };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that holds the lock can panic half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pass of vCPU `id`, which has not passed yet.
    pub(super) fn pass_of(&self, id: u8) -> Pass<'_> {
        Pass { gate: self, id }
    }

    fn pass(&self, id: u8) -> bool {
        let mut state = self.lock();
        state.inside &= !(1 << id);
        self.changed.notify_all();
        while !state.ending && !state.open_to(id) {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.ending {
            return false;
        }
        state.inside |= 1 << id;
        true
    }

    /// Closes the gate to all vCPUs. They are to be kicked, and waited for with [`Gate::await_outside`].
    pub(super) fn pause(&self) {
        self.lock().paused = true;
    }

    /// Waits until no vCPU is in the guest that may not be there.
    pub(super) fn await_outside(&self) {
        let mut state = self.lock();
        loop {
            let open = if state.paused {
                0
            } else {
                below(state.allowed)
            };
            if state.ending || state.inside & !open == 0 {
                return;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Opens the gate again.
    pub(super) fn resume(&self) {
        self.lock().paused = false;
        self.changed.notify_all();
    }

    /// Opens the gate to the first `allowed` vCPUs and to no others. The others are to be kicked and waited for.
    pub(super) fn allow(&self, allowed: u8) {
        self.lock().allowed = allowed;
        self.changed.notify_all();
    }

    /// Lets nobody pass any more, and nobody wait.
    pub(super) fn end(&self) {
        self.lock().ending = true;
        self.changed.notify_all();
    }

    pub(super) fn is_paused(&self) -> bool {
        self.lock().paused
    }

    /// How many vCPUs may run.
    pub(super) fn allowed(&self) -> u8 {
        self.lock().allowed
    }
}

/// What a vCPU's thread passes the gate with. Whoever drops it, or panics with it, is outside.
#[derive(Debug)]
pub(super) struct Pass<'a> {
    gate: &'a Gate,
    id: u8,
}

impl Pass<'_> {
    /// Leaves the guest and waits until the vCPU may be in it. `false` when the VM ends.
    pub(super) fn pass(&self) -> bool {
        self.gate.pass(self.id)
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.gate.lock().inside &= !(1 << self.id);
        self.gate.changed.notify_all();
    }
}

/// The bits of all IDs below `count`.
fn below(count: u8) -> u64 {
    1_u64
        .checked_shl(count.into())
        .map_or(u64::MAX, |bit| bit - 1)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, channel};
    use std::thread;
    use std::time::Duration;

    use super::*;

    /// A thread that passes the gate once and says whether it could.
    fn passer(gate: &Arc<Gate>, id: u8) -> Receiver<bool> {
        let (said, says) = channel();
        let gate = Arc::clone(gate);
        thread::spawn(move || said.send(gate.pass(id)));
        says
    }

    fn waits(says: &Receiver<bool>) -> bool {
        says.recv_timeout(Duration::from_millis(20)).is_err()
    }

    #[test]
    fn those_that_are_allowed_pass_and_the_others_wait_until_they_are() {
        let gate = Arc::new(Gate::new(1));
        assert!(gate.pass(0));
        let second = passer(&gate, 1);
        assert!(waits(&second));
        gate.allow(2);
        assert_eq!(second.recv(), Ok(true));
    }

    #[test]
    fn the_last_of_64_can_be_allowed() {
        let gate = Gate::new(64);
        assert!(gate.pass(63));
        gate.await_outside();
        gate.allow(63);
        assert_eq!(gate.lock().inside & !below(63), 1 << 63);
        drop(gate.pass_of(63));
        gate.await_outside();
    }

    #[test]
    fn a_paused_gate_is_left_by_all_before_it_counts_as_paused() {
        let gate = Arc::new(Gate::new(2));
        assert!(gate.pass(0));
        gate.pause();
        let (said, says) = channel();
        let waiting = Arc::clone(&gate);
        thread::spawn(move || {
            waiting.await_outside();
            said.send(())
        });
        assert!(says.recv_timeout(Duration::from_millis(20)).is_err());
        let kicked = passer(&gate, 0);
        says.recv().unwrap();
        assert!(waits(&kicked) && gate.is_paused());
        gate.resume();
        assert_eq!(kicked.recv(), Ok(true));
    }

    #[test]
    fn nobody_passes_or_waits_when_the_vm_ends() {
        let gate = Arc::new(Gate::new(1));
        gate.pause();
        let (first, second) = (passer(&gate, 0), passer(&gate, 1));
        assert!(waits(&first) && waits(&second));
        gate.end();
        assert_eq!((first.recv(), second.recv()), (Ok(false), Ok(false)));
        assert!(!gate.pass(0));
        gate.await_outside();
    }
}
