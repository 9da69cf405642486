//! Guests that come from a template: the first of a kind boots, and is saved when its agent is ready; the others have its memory mapped
//! copy-on-write and go on where it was, with devices of their own behind the same queues. Network devices come later.

use std::fs::File;
use std::io;
use std::path::Path;

use cloison_devices::{Fs, FsLimits, Vsock, VsockConfig};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::error::KvmError;
use super::image::Image;
use super::layout::TEMPLATE_NICS;
use super::machine::KvmMachine;
use super::start::Start;
use crate::devices::{Devices, DevicesError, SHARED_TAG};
use crate::end::EndReason;
use crate::kernel_log::KernelLog;
use crate::spec::{Template, VmSpec};
use crate::stop::Stop;
use crate::template::{Begun, Failed, Kind, MAX_MEMORY_MIB, Source, begin};

/// Lines of a console among which the last one whole is.
const LAST_LINES: usize = 3;

/// Why there is no template.
#[derive(Debug, thiserror::Error)]
enum TemplateError {
    #[error("the guest's root file system cannot be mapped")]
    Root,
    #[error("the guest did not become ready: {0}")]
    NotReady(String),
    #[error("cannot wait for the guest")]
    Wait(#[source] Errno),
    #[error("cannot read the template")]
    Read(#[source] io::Error),
}

/// Puts together the spec's guest, which is to have so many network devices; it waits for its devices then.
pub(crate) fn start(
    spec: &VmSpec,
    nics: usize,
    log: &KernelLog,
    stop: &Stop,
) -> Result<Begun<KvmMachine>, KvmError> {
    let guests = Guests {
        spec,
        nics,
        log,
        stop,
    };
    begin(spec, &guests)
}

/// Guests of one kind.
struct Guests<'a> {
    spec: &'a VmSpec,
    nics: usize,
    log: &'a KernelLog,
    stop: &'a Stop,
}

impl Guests<'_> {
    fn machine(&self, start: Start<'_>) -> Result<KvmMachine, KvmError> {
        let (log, stop) = (self.log.clone(), self.stop.clone());
        let sink = {
            let log = log.clone();
            Box::new(move |bytes: &[u8]| log.push(bytes))
        };
        KvmMachine::new(self.spec, start, sink, log, stop)
    }
}

impl Source for Guests<'_> {
    type Guest = KvmMachine;
    type Error = KvmError;

    fn kind(&self) -> Option<Kind<'_>> {
        let VmSpec {
            memory_mib,
            max_memory_mib,
            max_vcpus,
            kernel,
            initramfs,
            cmdline,
            awaits_nic,
            ..
        } = self.spec;
        let nics = self.nics + usize::from(*awaits_nic);
        let fits = nics <= TEMPLATE_NICS && *memory_mib <= MAX_MEMORY_MIB;
        fits.then(|| Kind {
            files: vec![kernel, initramfs],
            words: vec![
                format!("kvm, {memory_mib} to {max_memory_mib} MiB, {max_vcpus} vCPUs").into(),
                cmdline.into(),
                if *awaits_nic { "a network" } else { "" }.into(),
            ],
        })
    }

    fn make(&self, template: &Template, to: &File) -> Result<(), Failed> {
        // A guest of its own, with an end of its own.
        let (log, stop) = (KernelLog::default(), Stop::new()?);
        let sink = {
            let (log, stop, ready) = (log.clone(), stop.clone(), template.ready.clone());
            Box::new(move |bytes: &[u8]| {
                log.push(bytes);
                if log.last_lines(LAST_LINES).lines().any(|line| line == ready) {
                    stop.stop(EndReason::Killed, "it is ready");
                }
            })
        };
        let spec = VmSpec {
            vcpus: 1,
            ..self.spec.clone()
        };
        let words = format!("{} {}", spec.cmdline, template.word);
        let mut machine = KvmMachine::new(&spec, Start::Boot(&words), sink, log, stop.clone())?;
        if !machine.can_be_saved() {
            return Err(TemplateError::Root.into());
        }
        if spec.awaits_nic {
            machine.await_nic()?;
        }
        machine.serve(unused(&template.dir)?)?;
        await_ready(&stop)?;
        Ok(machine.save(to, spec.memory_mib)?)
    }

    fn load(&self, from: File) -> Result<KvmMachine, Failed> {
        let image = Image::read(from, self.spec.memory_mib).map_err(TemplateError::Read)?;
        let mut machine = self.machine(Start::Load(Box::new(image)))?;
        if self.spec.awaits_nic {
            machine.await_nic()?;
        }
        Ok(machine)
    }

    fn boot(&self) -> Result<KvmMachine, KvmError> {
        self.machine(Start::Boot(&self.spec.cmdline))
    }
}

/// Devices of the kinds that every guest has, so that its kernel knows them when it is saved. What they are for nobody asks before that.
fn unused(dir: &Path) -> Result<Devices, DevicesError> {
    let vsock = Vsock::new(VsockConfig {
        listener: None,
        listen_prefix: None,
        attachments: Vec::new(),
    });
    Ok(Devices {
        fs: Box::new(Fs::new(SHARED_TAG, dir, FsLimits::for_this_process())?),
        vsock: Box::new(vsock?),
        nics: Vec::new(),
    })
}

/// Waits until the guest is stopped, for being ready or for worse.
fn await_ready(stop: &Stop) -> Result<(), TemplateError> {
    loop {
        let mut bell = [PollFd::new(stop.bell(), PollFlags::POLLIN)];
        match poll(&mut bell, PollTimeout::NONE) {
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(TemplateError::Wait(errno)),
            Ok(_) => match stop.verdict() {
                Some(verdict) if verdict.reason == EndReason::Killed => return Ok(()),
                Some(verdict) => return Err(TemplateError::NotReady(verdict.message.clone())),
                None => {}
            },
        }
    }
}
