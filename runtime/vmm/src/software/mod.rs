//! The software engine: QEMU's microvm machine under TCG, as a child of the VM process that dies with it. QEMU gets descriptors
//! and paths, never a terminal or a network; our own devices are served to it over vhost-user.

mod command;
mod qemu;
mod transcript;

pub(crate) use qemu::{Qemu, SoftwareError};
