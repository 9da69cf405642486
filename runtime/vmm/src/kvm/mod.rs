//! The KVM engine: our own virtual machine monitor. It boots an uncompressed kernel directly, on processors, memory and interrupt
//! controllers that KVM provides, with virtio devices on the memory-mapped transport as the only others. It opens what it needs
//! before the guest's first instruction and nothing after.

mod backing;
mod boot;
mod bus;
mod cpio;
mod cpuid;
mod erofs;
mod error;
mod gate;
mod image;
mod kernel;
mod kick;
mod layout;
mod machine;
mod memory;
mod mptable;
mod ports;
mod registers;
mod root;
mod run;
mod slot;
mod start;
mod state;
mod template;
mod vcpu;
mod vcpu_state;
mod worker;

pub(crate) use error::KvmError;
pub(crate) use template::start;
