//! Starting a guest from a template, which is made first if there is none: a guest without our devices boots, is saved when it is ready,
//! and ends. Whatever is wrong with a template or with its making, a guest starts: it boots.

use std::fs::File;
use std::io::{self, BufReader, BufWriter};

use cloison_devices::MacAddress;

use super::command::{MAX_TEMPLATE_NICS, Start};
use super::image;
use super::qemu::{Qemu, SoftwareError};
use super::qmp::QmpError;
use super::spawn::Sockets;
use super::store::Store;
use crate::kernel_log::KernelLog;
use crate::spec::{Template, VmSpec};
use crate::stop::{Stop, chain};
use crate::timeline::{Origin, monotonic};

/// Bytes of a template's file that are read or written at a time.
const BUFFER: usize = 256 << 10;

/// The most memory of a guest with a template, MiB: the kernel's description of it, a sixty-fourth, would have to be copied at each start.
const MAX_MEMORY_MIB: u32 = 4096;

/// A QEMU that has been started.
pub(crate) struct Started {
    pub(crate) qemu: Qemu,
    pub(crate) sockets: Sockets,
    /// Where its guest comes from.
    pub(crate) origin: Origin,
    /// When a template had been made for it.
    pub(crate) made: Option<u64>,
}

/// Why there is no template.
#[derive(Debug, thiserror::Error)]
enum TemplateError {
    #[error(transparent)]
    Software(#[from] SoftwareError),
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("the guest did not say that it is ready")]
    NotReady(#[source] io::Error),
    #[error("cannot use the directory of templates")]
    Store(#[source] io::Error),
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
) -> Result<Started, SoftwareError> {
    let mut made = None;
    let template = spec.template.as_ref();
    let fits = spec.memory_mib <= MAX_MEMORY_MIB && nics.len() <= MAX_TEMPLATE_NICS;
    if let Some(template) = template.filter(|_| fits) {
        match from_template(spec, template, nics, log, stop, &mut made) {
            Ok((qemu, sockets)) => {
                return Ok(Started {
                    qemu,
                    sockets,
                    origin: Origin::Template,
                    made,
                });
            }
            Err(error) => tracing::debug!("the guest boots: {}", chain(&error)),
        }
    }
    let (qemu, sockets) = Qemu::start(spec, Start::Boot, nics, log.clone(), stop.clone())?;
    Ok(Started {
        qemu,
        sockets,
        origin: Origin::Boot,
        made,
    })
}

fn from_template(
    spec: &VmSpec,
    template: &Template,
    nics: &[MacAddress],
    log: &KernelLog,
    stop: &Stop,
    made: &mut Option<u64>,
) -> Result<(Qemu, Sockets), TemplateError> {
    let store = Store::new(&template.dir, spec).map_err(TemplateError::Store)?;
    if let Some(file) = store.find().map_err(TemplateError::Store)? {
        match load(spec, file, nics, log, stop) {
            Ok(started) => return Ok(started),
            Err(error) => tracing::debug!("the template is of no use: {}", chain(&error)),
        }
        store.discard().map_err(TemplateError::Store)?;
    }
    make(spec, template, &store, stop)?;
    *made = Some(monotonic());
    let missing = || TemplateError::Store(io::ErrorKind::NotFound.into());
    let file = store.find().map_err(TemplateError::Store)?;
    load(spec, file.ok_or_else(missing)?, nics, log, stop)
}

fn load(
    spec: &VmSpec,
    file: File,
    nics: &[MacAddress],
    log: &KernelLog,
    stop: &Stop,
) -> Result<(Qemu, Sockets), TemplateError> {
    let (mut qemu, sockets) = Qemu::start(spec, Start::Load, nics, log.clone(), stop.clone())?;
    // QEMU is starting meanwhile.
    let file = BufReader::with_capacity(BUFFER, file);
    let state = image::read(file, &qemu.memory).map_err(TemplateError::Read)?;
    qemu.monitor().map_err(TemplateError::Read)?.load(&state)?;
    Ok((qemu, sockets))
}

fn make(
    spec: &VmSpec,
    template: &Template,
    store: &Store,
    stop: &Stop,
) -> Result<(), TemplateError> {
    let staged = store.stage().map_err(TemplateError::Store)?;
    // What this guest says is of no interest once it is ready.
    let (mut qemu, _) = Qemu::start(spec, Start::Save, &[], KernelLog::default(), stop.clone())?;
    qemu.await_line(&template.ready)
        .map_err(TemplateError::NotReady)?;
    let state = qemu.monitor().map_err(TemplateError::Write)?.save()?;
    let to = BufWriter::with_capacity(BUFFER, &staged.file);
    image::write(&qemu.memory, &state, to)
        .and_then(|()| staged.keep())
        .map_err(TemplateError::Write)
}
