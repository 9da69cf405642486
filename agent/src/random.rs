//! The guest's random number generator.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use crate::sys;

/// Has the kernel's generator start anew from `entropy` and what it had before: whatever it gives out from here on is not what another
/// guest gets that was the same until now.
pub fn reseed(entropy: &[u8]) -> io::Result<()> {
    sys::reseed_random(File::open("/dev/urandom")?.as_fd(), entropy)
}
