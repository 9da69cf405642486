//! The life of a vCPU's thread: into the guest, out of it for what the guest wants of the machine, and so on until the guest ends
//! or the thread is kicked.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::gate::Gate;
use super::kick::Entry;
use super::ports::{Ports, Request};
use super::slot::Slots;
use crate::end::EndReason;
use crate::kernel_log::KernelLog;
use crate::stop::Stop;

/// What all vCPUs of a VM share.
pub(super) struct Machine {
    pub(super) slots: Arc<Slots>,
    pub(super) ports: Mutex<Ports>,
    pub(super) log: KernelLog,
    pub(super) stop: Stop,
    pub(super) gate: Gate,
}

/// How often a vCPU left the guest, by what for.
#[derive(Debug, Default)]
struct Exits {
    port: u64,
    memory_read: u64,
    memory_write: u64,
    kick: u64,
    other: u64,
}

/// Why a vCPU's thread could not go on.
#[derive(Debug, thiserror::Error)]
#[error("KVM cannot run a vCPU")]
pub(super) struct RunError(#[source] io::Error);

/// Runs vCPU `id` until the guest ends or the VM does; gives it back then, out of the guest.
pub(super) fn run(id: u8, mut vcpu: VcpuFd, machine: &Machine) -> Result<VcpuFd, RunError> {
    let mut entry = Entry::new(&mut vcpu);
    let mut exits = Exits::default();
    let pass = machine.gate.pass_of(id);
    let mut may_run = pass.pass();
    let mut verdict = None;
    while may_run {
        match step(entry.vcpu(), machine, &mut exits).map_err(RunError)? {
            Step::Inside => {}
            Step::Kicked => may_run = pass.pass(),
            Step::End(reason, message) => {
                verdict = Some((reason, message));
                break;
            }
        }
    }
    tracing::debug!(id, ?exits, "vCPU stops");
    if let Some((reason, message)) = verdict {
        machine.stop.stop(reason, message);
    }
    drop(entry);
    Ok(vcpu)
}

/// What came of one stay in the guest.
enum Step {
    /// The guest was served and goes on.
    Inside,
    /// Somebody wants the vCPU out of the guest.
    Kicked,
    /// The guest cannot go on.
    End(EndReason, String),
}

fn step(vcpu: &mut VcpuFd, machine: &Machine, exits: &mut Exits) -> io::Result<Step> {
    match vcpu.run() {
        Ok(VcpuExit::MmioRead(address, data)) => {
            exits.memory_read += 1;
            machine.slots.read(address, data);
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            exits.memory_write += 1;
            machine.slots.write(address, data);
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            exits.port += 1;
            machine.ports().read(port, data);
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            exits.port += 1;
            if machine.ports().write(port, data) == Request::Reset {
                return Ok(machine.reset());
            }
        }
        Ok(VcpuExit::Shutdown) => return Ok(machine.crash()),
        Ok(VcpuExit::InternalError) => return Ok(internal_error(vcpu)),
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            let message = format!(
                "the processor refused to enter the guest: reason {reason:#x} on CPU {cpu}"
            );
            return Ok(Step::End(EndReason::EngineFailed, message));
        }
        Ok(exit) => {
            exits.other += 1;
            let message =
                format!("KVM left the guest for a reason the engine does not know: {exit:?}");
            return Ok(Step::End(EndReason::EngineFailed, message));
        }
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
            exits.kick += 1;
            vcpu.set_kvm_immediate_exit(0);
            return Ok(Step::Kicked);
        }
        Err(error) => return Err(error.into()),
    }
    Ok(Step::Inside)
}

impl Machine {
    fn ports(&self) -> std::sync::MutexGuard<'_, Ports> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest has pulled the reset line: its kernel has said why, or it was not its kernel.
    fn reset(&self) -> Step {
        if self.log.stopped_orderly() && self.log.panic().is_none() {
            return Step::End(EndReason::Shutdown, "the guest shut down".into());
        }
        self.panicked().unwrap_or_else(|| {
            let message = "the guest was reset without a word".into();
            Step::End(EndReason::GuestReset, message)
        })
    }

    /// The guest's processor could not go on: a fault, while it handled a fault, while it handled a fault.
    fn crash(&self) -> Step {
        self.panicked().unwrap_or_else(|| {
            let message = "the guest's processor gave up: triple fault".into();
            Step::End(EndReason::TripleFault, message)
        })
    }

    fn panicked(&self) -> Option<Step> {
        let why = self.log.panic()?;
        let message = format!("the guest's kernel panicked: {why}");
        Some(Step::End(EndReason::GuestPanic, message))
    }
}

fn internal_error(vcpu: &mut VcpuFd) -> Step {
    let regs = vcpu.get_regs();
    let run = vcpu.get_kvm_run();
    // SAFETY: KVM has just reported an internal error, so `internal` is the member of the union that it filled; it is plain
    // numbers, of which any are valid.
    let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
    let what = match suberror {
        KVM_INTERNAL_ERROR_EMULATION => "it could not emulate an instruction",
        KVM_INTERNAL_ERROR_SIMUL_EX => "two exceptions came at once",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "an event could not be delivered",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
            "the processor left the guest for an unknown reason"
        }
        _ => "it does not say what",
    };
    let place = regs.map_or_else(
        |_| "an unknown address".into(),
        |regs| format!("{:#x}", regs.rip),
    );
    let message =
        format!("KVM failed inside (internal error {suberror}): {what}, at {place} of the guest");
    Step::End(EndReason::KvmInternalError, message)
}
