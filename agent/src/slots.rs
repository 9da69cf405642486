//! The VM's slots: places on the memory-mapped bus, each a platform device of the kernel's, in which the host may put a virtio device
//! while the guest runs. The kernel looks into a slot when the slot is bound to the driver, and leaves it when it is unbound.

use std::fs;
use std::io;
use std::path::Path;

const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";

/// Has the kernel find what is in slot `number`. A device that it has found by itself, at its start, is found.
///
/// # Errors
/// When there is nothing, or no such slot.
pub fn take(number: u32) -> io::Result<()> {
    match write("bind", number) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(()),
        taken => taken,
    }
}

/// Has the kernel let go of the device in slot `number`.
///
/// # Errors
/// When the kernel has none there.
pub fn release(number: u32) -> io::Result<()> {
    write("unbind", number)
}

fn write(file: &str, number: u32) -> io::Result<()> {
    fs::write(
        Path::new(DRIVER).join(file),
        format!("virtio-mmio.{number}"),
    )
}
