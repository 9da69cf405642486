//! The software engine: QEMU's microvm machine under TCG, as a child of the VM process that dies with it. QEMU gets descriptors
//! and paths, never a terminal or a network; our own devices are served to it over vhost-user. A guest comes from a template where there
//! is one: its kernel's boot, most of which is run once and costs a translation each time, has been done then.

mod command;
mod image;
mod monitor;
mod output;
mod qemu;
mod qmp;
mod spawn;
mod template;
mod transcript;
mod tsc;

pub(crate) use qemu::SoftwareError;
pub(crate) use template::start;
