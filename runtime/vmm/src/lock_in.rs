//! The one place where a VM process gives up what it will not need again. It is called when every descriptor is open and
//! before the guest's first instruction; whatever the VM process does later it does with what it holds by then.

use std::io;

use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};

/// Gives up: ever gaining privileges by an exec, being traced or looked into by others of the same user, and leaving a core
/// file, which would hold the guest's memory.
pub(crate) fn lock_in() -> io::Result<()> {
    prctl::set_no_new_privs()?;
    prctl::set_dumpable(false)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    Ok(())
}
