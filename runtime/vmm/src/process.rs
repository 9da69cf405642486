//! The life of a VM process, from taking what it was given to its last word.

use std::process::ExitCode;

/// The body of a VM process: what the executable runs when `argv[0]` is [`crate::VM_PROCESS_NAME`].
pub fn vm_main() -> ExitCode {
    eprintln!("cloison: this build has no engine");
    ExitCode::FAILURE
}
