//! Waiting to become a template: a guest that is ready for calls and has done nothing yet is saved by the host while it waits here, and
//! goes on from here any number of times, each time as another guest. It has no device but its console meanwhile.

use std::io::{self, Read};

use cloison_agent_api::{TEMPLATE_NIC_SLOTS, TEMPLATE_READY, TEMPLATE_SLOTS};

use crate::slots;

/// Tells the host on the console that the guest is ready, waits for a line, and takes up the devices that have come meanwhile. Blocks: there
/// is nothing else to do.
///
/// # Errors
/// When there is no console, or a device has not come.
pub fn wait() -> io::Result<()> {
    eprintln!("{TEMPLATE_READY}");
    io::stdin().read_exact(&mut [0])?;
    TEMPLATE_SLOTS.into_iter().try_for_each(slots::take)?;
    // As many as there are.
    let _ = TEMPLATE_NIC_SLOTS.into_iter().try_for_each(slots::take);
    Ok(())
}
