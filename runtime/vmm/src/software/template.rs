//! Guests of QEMU's that come from a template: QEMU's own migration saves and loads the state of its devices, and the guest's memory, which is
//! a file, is written beside it.

use std::fs::File;
use std::io::{self, BufReader, BufWriter};

use cloison_devices::MacAddress;

use super::command::{Inherited, MAX_TEMPLATE_NICS, Start, arguments};
use super::image;
use super::qemu::{Qemu, SoftwareError};
use super::spawn::Sockets;
use crate::kernel_log::KernelLog;
use crate::spec::{Template, VmSpec};
use crate::stop::Stop;
use crate::template::{Begun, Failed, Kind, MAX_MEMORY_MIB, Source, begin};

/// Bytes of a template's file that are read or written at a time.
const BUFFER: usize = 256 << 10;

/// Why there is no template.
#[derive(Debug, thiserror::Error)]
enum TemplateError {
    #[error("the guest did not say that it is ready")]
    NotReady(#[source] io::Error),
    #[error("cannot read the template")]
    Read(#[source] io::Error),
    #[error("cannot write the template")]
    Write(#[source] io::Error),
}

/// Starts QEMU for the spec's guest; it waits for its devices then. Must be called on the VM process's main thread, for QEMU dies with the
/// thread that started it.
pub(crate) fn start(
    spec: &VmSpec,
    nics: &[MacAddress],
    log: &KernelLog,
    stop: &Stop,
) -> Result<Begun<(Qemu, Sockets)>, SoftwareError> {
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
    nics: &'a [MacAddress],
    log: &'a KernelLog,
    stop: &'a Stop,
}

impl Guests<'_> {
    fn start(&self, start: Start) -> Result<(Qemu, Sockets), SoftwareError> {
        let (log, stop) = (self.log.clone(), self.stop.clone());
        Qemu::start(self.spec, start, self.nics, log, stop)
    }
}

impl Source for Guests<'_> {
    type Guest = (Qemu, Sockets);
    type Error = SoftwareError;

    fn kind(&self) -> Option<Kind<'_>> {
        let VmSpec {
            qemu,
            kernel,
            initramfs,
            ..
        } = self.spec;
        let anyone = VmSpec {
            id: String::new(),
            ..self.spec.clone()
        };
        let fits =
            self.nics.len() <= MAX_TEMPLATE_NICS && self.spec.max_memory_mib <= MAX_MEMORY_MIB;
        fits.then(|| Kind {
            files: vec![qemu, kernel, initramfs],
            words: arguments(&anyone, &Inherited::default(), Start::Save, None),
        })
    }

    fn make(&self, template: &Template, to: &File) -> Result<(), Failed> {
        // What this guest says is of no interest once it is ready.
        let (log, stop) = (KernelLog::default(), self.stop.clone());
        let (mut qemu, _) = Qemu::start(self.spec, Start::Save, &[], log, stop)?;
        qemu.await_line(&template.ready)
            .map_err(TemplateError::NotReady)?;
        let state = qemu.monitor().map_err(TemplateError::Write)?.save()?;
        let to = BufWriter::with_capacity(BUFFER, to);
        Ok(image::write(&qemu.memory, &state, to).map_err(TemplateError::Write)?)
    }

    fn load(&self, from: File) -> Result<Self::Guest, Failed> {
        let (mut qemu, sockets) = self.start(Start::Load)?;
        // QEMU is starting meanwhile.
        let from = BufReader::with_capacity(BUFFER, from);
        let state = image::read(from, &qemu.memory).map_err(TemplateError::Read)?;
        qemu.monitor().map_err(TemplateError::Read)?.load(&state)?;
        Ok((qemu, sockets))
    }

    fn boot(&self) -> Result<Self::Guest, SoftwareError> {
        self.start(Start::Boot)
    }
}
