//! Whether this host's KVM can run an ordinary guest, found out by running one: a few dozen instructions of 64-bit code that do
//! what every kernel does and what some KVMs that emulate in software fail at. Nothing here believes that a device
//! that opens, or a capability that is announced, works.

mod guest;

use std::io;

use kvm_ioctls::{Cap, Kvm};

/// The KVM API that has been the only one since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// What the KVM engine is built on.
const NEEDED: [(Cap, &str); 9] = [
    (Cap::UserMemory, "guest memory (KVM_CAP_USER_MEMORY)"),
    (
        Cap::Irqchip,
        "an interrupt controller in the kernel (KVM_CAP_IRQCHIP)",
    ),
    (Cap::Irqfd, "interrupts by descriptor (KVM_CAP_IRQFD)"),
    (
        Cap::Ioeventfd,
        "notifications by descriptor (KVM_CAP_IOEVENTFD)",
    ),
    (
        Cap::ImmediateExit,
        "stopping a vCPU (KVM_CAP_IMMEDIATE_EXIT)",
    ),
    (
        Cap::TscDeadlineTimer,
        "the TSC deadline timer (KVM_CAP_TSC_DEADLINE_TIMER)",
    ),
    (
        Cap::AdjustClock,
        "the paravirtual clock (KVM_CAP_ADJUST_CLOCK)",
    ),
    (Cap::MpState, "vCPUs that wait (KVM_CAP_MP_STATE)"),
    (Cap::Xcrs, "extended processor state (KVM_CAP_XCRS)"),
];

/// Why the KVM engine cannot work on this host, in words for people.
#[derive(Debug, thiserror::Error)]
pub enum ProbeFailure {
    /// There is no such device.
    #[error(
        "this host has no /dev/kvm: its processor or firmware does not offer virtualization, or the kvm modules are not loaded \
         (`modprobe kvm_intel` or `modprobe kvm_amd`)"
    )]
    Absent,
    /// The device is there for others.
    #[error(
        "this user may not open /dev/kvm: be root or join the group that owns it (usually `usermod -aG kvm USER`)"
    )]
    Permission,
    /// The device does not open for another reason.
    #[error("cannot open /dev/kvm: {0}")]
    Open(io::Error),
    /// The device is not the KVM anyone knows.
    #[error("this host's KVM speaks API version {0}, not {API_VERSION}")]
    Version(i32),
    /// Something the engine is built on is missing.
    #[error("this host's KVM lacks {0}")]
    Lacks(&'static str),
    /// KVM would not make or run a VM.
    #[error("this host's KVM cannot {what}: {error}")]
    Refused {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        error: io::Error,
    },
    /// The tiny guest did not survive.
    #[error("this host's KVM cannot run an ordinary guest: a tiny one failed at {step} ({how})")]
    Guest {
        /// What the guest was doing.
        step: &'static str,
        /// How KVM reported it.
        how: String,
    },
}

/// A tiny guest that has done its work. To end it takes KVM some milliseconds, most of them waiting, so it is best dropped when there
/// is nothing else to do.
#[derive(Debug)]
pub struct Probed {
    _guest: guest::Guest,
}

/// Runs the tiny guest. Takes about a millisecond, most of it KVM making a VM, and leaves nothing behind but what it returns.
///
/// # Errors
/// The first thing that does not work.
pub fn kvm() -> Result<Probed, ProbeFailure> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => ProbeFailure::Absent,
        libc::EACCES | libc::EPERM => ProbeFailure::Permission,
        _ => ProbeFailure::Open(error.into()),
    })?;
    match kvm.get_api_version() {
        API_VERSION => {}
        other => return Err(ProbeFailure::Version(other)),
    }
    for (cap, name) in NEEDED {
        if !kvm.check_extension(cap) {
            return Err(ProbeFailure::Lacks(name));
        }
    }
    let guest = guest::run(&kvm)?;
    Ok(Probed { _guest: guest })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verdict_on_this_host_is_the_same_every_time_and_says_why() {
        let verdicts: Vec<String> = (0..3)
            .map(|_| kvm().map_or_else(|failure| failure.to_string(), |_| "works".into()))
            .collect();
        println!("{}", verdicts[0]);
        assert_eq!(verdicts[0], verdicts[1]);
        assert_eq!(verdicts[1], verdicts[2]);
    }

    #[test]
    fn a_host_whose_kvm_runs_ordinary_guests_passes() {
        // Set where the answer is known by other means: in the KVM lab, whose outer machine is an ordinary one.
        if std::env::var_os("CLOISON_KVM_WORKS").is_some() {
            kvm().unwrap();
        }
    }

    #[test]
    fn a_host_without_a_processor_that_virtualizes_does_not_pass_unless_it_can_do_the_work() {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let virtualizes = info
            .lines()
            .filter(|line| line.starts_with("flags"))
            .any(|line| {
                line.split_whitespace()
                    .any(|flag| flag == "vmx" || flag == "svm")
            });
        match kvm() {
            Ok(_) => assert!(virtualizes || std::env::var_os("CLOISON_KVM_WORKS").is_some()),
            Err(failure) => assert!(!failure.to_string().is_empty()),
        }
    }
}
