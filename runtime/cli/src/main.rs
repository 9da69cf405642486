//! The one executable behind cloison's front doors. It looks at the name it was called by, and hands over.

mod args;
mod attached;
mod container;
mod detached;
mod exit;
mod log;
mod monitor;
mod network;
mod profile;
mod spec;
mod terminal;
mod values;
mod verbs;

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let began = cloison_vmm::monotonic();
    let called = std::env::args_os().next().unwrap_or_default();
    let called = Path::new(&called).file_name().unwrap_or_default();
    match called.to_str() {
        Some(cloison_vmm::VM_PROCESS_NAME) => cloison_vmm::vm_main(),
        Some(cloison_sandbox::OOM_PROCESS_NAME) => cloison_sandbox::oom_main(),
        Some(cloison_oci::NAME) => cloison_oci::main(),
        Some(name @ "containerd-shim-cloison-v2") => {
            eprintln!(
                "{name}: this front door is not built yet; use \"cloison run\" (see docs/limitations.md)"
            );
            ExitCode::FAILURE
        }
        Some(name) if name.starts_with("cloison") => verbs::main(began),
        // Whoever gave it a name like runc's has put it in a runtime's place.
        _ => cloison_oci::main(),
    }
}
