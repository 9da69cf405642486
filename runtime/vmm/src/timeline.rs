//! When a VM came how far. Moments are of CLOCK_MONOTONIC, which every process of the host reads alike, in nanoseconds.

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// What a VM process has seen happen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// The VM process began.
    pub process: u64,
    /// All was there, and the guest was let go.
    pub guest: u64,
    /// The first byte left the guest for a stream that only carries output, or for a terminal.
    pub output: Option<u64>,
    /// How the guest came to where its agent takes calls.
    pub origin: Origin,
    /// A template had been made for it.
    pub template: Option<u64>,
}

/// What a guest began as.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// It booted.
    #[default]
    Boot,
    /// It was made from a template.
    Template,
}

/// The present moment; 0 on a system without the clock, which Linux is not.
pub fn monotonic() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(std::time::Duration::from);
    now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX))
}
