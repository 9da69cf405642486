//! The VM process and how it is started: the engines that run a guest, the control socket, the process's life and its last
//! word. It knows nothing of containers or images; whoever launches a VM hands it a directory to share and streams to attach.

mod choose;
mod control;
mod devices;
mod end;
mod handoff;
mod kernel_log;
mod kvm;
mod launch;
mod lock_in;
mod machine;
mod nic;
mod packet;
pub mod probe;
mod process;
mod software;
mod spec;
mod stop;
mod sys;
mod template;
#[cfg(feature = "testing")]
pub mod testing;
mod timeline;
mod vhost_user;

pub use choose::{Chosen, EngineChoice, NoKvm, UnknownEngine, choose};
pub use cloison_devices::{Attachment, MacAddress};
pub use control::{ControlClient, ControlError, DeviceKind, State, Status};
pub use end::{END_FILE, End, EndFileError, EndReason, await_end, read_end};
pub use handoff::MAX_EARLY_ATTACHMENTS;
pub use launch::{
    CONTROL_SOCKET, Launch, LaunchError, VM_PROCESS_NAME, VSOCK_SOCKET, VmProcess, WaitError,
    launch,
};
pub use nic::{Nic, Plugged};
pub use process::vm_main;
pub use spec::{Engine, SpecError, Template, VmSpec};
pub use timeline::{Origin, Timeline, monotonic};
