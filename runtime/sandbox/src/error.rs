//! What can go wrong between a front door and its sandbox.

use std::io;
use std::path::PathBuf;

use crate::agent::AgentError;

/// An operation on a sandbox failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call on a path failed.
    #[error("cannot {what} {}", path.display())]
    Path {
        /// Verb phrase: "create the directory".
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A system call that names no path failed.
    #[error("cannot {what}")]
    System {
        /// Verb phrase.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A descriptor cannot be handed on to a process in a guest.
    #[error("descriptor {number} cannot be handed into a VM: it is {what}, and {why}")]
    Descriptor {
        /// Its number.
        number: i32,
        /// What it is.
        what: String,
        /// Why that cannot be.
        why: &'static str,
    },
    /// A descriptor that could be handed on could not be prepared for it.
    #[error("cannot hand descriptor {number} into the VM")]
    PreserveDescriptor {
        /// Its number.
        number: i32,
        /// What went wrong.
        source: Box<Error>,
    },
    /// The sandbox's directory exists.
    #[error("a sandbox with the ID {id} exists already")]
    Exists {
        /// The ID.
        id: String,
    },
    /// A file that a VM is made from is not where somebody said.
    #[error("the {what} {} does not exist", path.display())]
    NoPart {
        /// What it is for.
        what: &'static str,
        /// The path given.
        path: PathBuf,
    },
    /// A file that a VM is made from is nowhere.
    #[error(
        "cannot find the {what}: there is no file \"{name}\" in {places}; build it with \"make build\" or name it with {}",
        option_of(name)
    )]
    PartNotFound {
        /// What it is for.
        what: &'static str,
        /// Its name.
        name: &'static str,
        /// Where it was looked for.
        places: String,
    },
    /// A cgroup of the host could not be used.
    #[error("cannot {what} the cgroup {path}")]
    Cgroup {
        /// Verb.
        what: &'static str,
        /// Below the hierarchies' roots.
        path: String,
        /// What went wrong.
        source: Box<cgroups_rs::fs::error::Error>,
    },
    /// systemd did not make, change or stop the scope that is a sandbox's cgroup.
    #[error("cannot {what} the cgroup {path}")]
    Scope {
        /// Verb.
        what: &'static str,
        /// Below the hierarchies' roots.
        path: String,
        /// What went wrong.
        source: Box<crate::scope::ScopeError>,
    },
    /// Somebody has frozen the cgroup, or one above it: what is moved into it stops, and so would the VM.
    #[error(
        "container's cgroup unexpectedly frozen at {}: write {thaw} there, or give the container another cgroup", file.display()
    )]
    Frozen {
        /// What says so.
        file: PathBuf,
        /// What thaws it.
        thaw: &'static str,
    },
    /// A limit needs a controller that the host does not have.
    #[error("the host has no cgroup controller \"{name}\", which a limit needs")]
    NoController {
        /// Its name.
        name: &'static str,
    },
    /// The VM process could not be started.
    #[error("cannot start the VM process")]
    Launch(#[source] cloison_vmm::LaunchError),
    /// The VM process could not be waited for.
    #[error("cannot wait for the VM process")]
    Wait(#[source] cloison_vmm::WaitError),
    /// The VM process's last report cannot be read.
    #[error("cannot learn how the VM ended")]
    EndFile(#[source] cloison_vmm::EndFileError),
    /// The VM process refused or did not answer.
    #[error("cannot {what} through the VM process's control socket")]
    Control {
        /// Verb phrase.
        what: &'static str,
        /// What went wrong.
        source: cloison_vmm::ControlError,
    },
    /// A VM cannot be given as much as it is to have.
    #[error(
        "the VM cannot be given {} MiB of memory and {} CPUs while it runs: it can have {} MiB and {}",
        wanted.memory_mib, wanted.vcpus, most.memory_mib, most.vcpus
    )]
    NoRoom {
        /// What it is to have.
        wanted: crate::VmSize,
        /// What it can have.
        most: crate::VmSize,
    },
    /// A guest has not taken up the memory that it was given.
    #[error("the guest has taken up {got} MiB of memory, and not the {wanted} that it was given")]
    NotTaken {
        /// MiB.
        wanted: u32,
        /// MiB.
        got: u32,
    },
    /// The sandbox's network namespace, or an interface in it, cannot be used.
    #[error(transparent)]
    Network(#[from] cloison_net::Error),
    /// An interface of the namespace's cannot be the guest's, or not follow what happened to it.
    #[error("cannot keep the guest's network interface {name} like the host's")]
    Interface {
        /// Its name.
        name: String,
        /// Why.
        source: Box<Error>,
    },
    /// The VM ended.
    #[error("the VM has ended: {message}{}", tail(log))]
    Ended {
        /// Why.
        message: String,
        /// Last lines of the guest kernel's log; may be empty.
        log: String,
    },
    /// The agent refused, or the connection to it broke.
    #[error(transparent)]
    Agent(#[from] AgentError),
}

/// How a person names a part of a VM.
fn option_of(name: &str) -> &'static str {
    match name {
        "vmlinux" => "--kernel or CLOISON_KERNEL",
        _ => "--initramfs or CLOISON_INITRAMFS",
    }
}

fn tail(log: &str) -> String {
    if log.is_empty() {
        String::new()
    } else {
        format!("\nThe guest kernel's last lines:\n{}", log.trim_end())
    }
}

impl Error {
    /// The agent's error, if that is what it is.
    pub fn agent(&self) -> Option<&AgentError> {
        match self {
            Self::Agent(error) => Some(error),
            Self::Interface { source, .. } => source.agent(),
            _ => None,
        }
    }

    pub(crate) fn path(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Path { what, path, source }
    }

    pub(crate) fn system(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { what, source }
    }
}
