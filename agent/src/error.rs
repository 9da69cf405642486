//! What can go wrong in a call, in words for people, and the ttrpc status each error becomes.

use std::io;

use ttrpc::Code;

use crate::ids::{ContainerId, ExecId, IdError};
use crate::report::{Failure, FailureKind};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "the agent in the guest speaks protocol {ours}, the host speaks {theirs}: \
         use an initramfs and a host of the same release"
    )]
    Protocol { ours: u32, theirs: u32 },
    #[error("invalid {what} ID {id:?}")]
    Id {
        what: &'static str,
        id: String,
        source: IdError,
    },
    #[error("invalid {what}: {why}")]
    Invalid { what: &'static str, why: String },
    #[error("no such container: {0}")]
    NoContainer(ContainerId),
    #[error("no such exec: {exec} in container {container}")]
    NoExec {
        container: ContainerId,
        exec: ExecId,
    },
    #[error("no such process: it has ended")]
    Ended,
    #[error("container {0} exists already")]
    ContainerExists(ContainerId),
    #[error("exec {exec} runs already in container {container}")]
    ExecExists {
        container: ContainerId,
        exec: ExecId,
    },
    #[error("cannot {verb} container {container}: it is {state}")]
    State {
        verb: &'static str,
        container: ContainerId,
        state: &'static str,
    },
    #[error("too many {0}")]
    TooMany(&'static str),
    #[error("the process has no terminal")]
    NoTerminal,
    /// The container's process could not be made or started; the text is complete.
    #[error("{}", .0.message)]
    Workload(Failure),
    #[error("{doing}")]
    System { doing: String, source: io::Error },
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    fn code(&self) -> Code {
        match self {
            Self::Protocol { .. } | Self::State { .. } | Self::NoTerminal => {
                Code::FAILED_PRECONDITION
            }
            Self::Id { .. } | Self::Invalid { .. } => Code::INVALID_ARGUMENT,
            Self::NoContainer(_) | Self::NoExec { .. } | Self::Ended => Code::NOT_FOUND,
            Self::ContainerExists(_) | Self::ExecExists { .. } => Code::ALREADY_EXISTS,
            Self::TooMany(_) => Code::RESOURCE_EXHAUSTED,
            Self::Workload(failure) => match failure.kind {
                FailureKind::NotFound => Code::NOT_FOUND,
                FailureKind::NotExecutable => Code::PERMISSION_DENIED,
                FailureKind::Invalid => Code::INVALID_ARGUMENT,
                FailureKind::Internal => Code::INTERNAL,
            },
            Self::System { .. } => Code::INTERNAL,
        }
    }
}

/// An error and everything it was caused by, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), chain(&error)))
    }
}

/// Says what was being done when the system refused.
pub trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::System {
            doing: what(),
            source: source.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(error: Error) -> (Code, String) {
        match ttrpc::Error::from(error) {
            ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn a_missing_program_and_a_missing_container_differ_in_text() {
        let program = Error::Workload(Failure {
            kind: FailureKind::NotFound,
            message: "exec: \"foo\": executable file not found in $PATH".into(),
        });
        let container = Error::NoContainer(ContainerId::parse("c1").unwrap());
        let (code, text) = status(program);
        assert_eq!(code, Code::NOT_FOUND);
        assert!(text.contains("executable file not found"));
        let (code, text) = status(container);
        assert_eq!(code, Code::NOT_FOUND);
        assert_eq!(text, "no such container: c1");
    }

    #[test]
    fn the_text_of_a_status_carries_its_causes_once() {
        let error: Result<()> =
            Err(io::Error::from_raw_os_error(libc::EACCES)).doing(|| "opening /x".into());
        let (code, text) = status(error.unwrap_err());
        assert_eq!(code, Code::INTERNAL);
        assert_eq!(text, "opening /x: Permission denied (os error 13)");
    }

    #[test]
    fn a_protocol_mismatch_names_both_versions() {
        let (code, text) = status(Error::Protocol { ours: 1, theirs: 7 });
        assert_eq!(code, Code::FAILED_PRECONDITION);
        assert!(
            text.contains("protocol 1") && text.contains("speaks 7"),
            "{text}"
        );
    }
}
