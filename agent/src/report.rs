//! What the agent asks of its helper process and what the helper answers: one JSON document over a socket one way, lines of
//! JSON in a pipe the other. The pipe's write end outlives the helper in the container's init, which closes it by
//! starting its program: so its end means "the program runs", and a last line says why it does not.

use std::path::PathBuf;

use libcontainer::oci_spec::runtime::LinuxResources;
use serde::{Deserialize, Serialize};

use crate::workload::Workload;

/// Longest line of a report, bytes; longer texts are cut. Below PIPE_BUF, so that lines of several writers never mix.
pub const MAX_LINE: usize = 4096;

/// One thing for the helper to do.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    Create(Create),
    Exec(Exec),
    Update(Update),
}

impl Request {
    /// How many descriptors beside stdio come with it.
    pub fn preserved(&self) -> usize {
        match self {
            Self::Create(Create { preserved, .. }) | Self::Exec(Exec { preserved, .. }) => {
                *preserved
            }
            Self::Update(_) => 0,
        }
    }
}

/// Create a container, up to the point where its init waits to be started.
#[derive(Debug, Serialize, Deserialize)]
pub struct Create {
    pub container_id: String,
    pub bundle: PathBuf,
    /// How many CPUs of the guest's it is to have.
    pub cpus: u32,
    pub stdio: ChildStdio,
    /// How many descriptors the process has beside stdio.
    pub preserved: usize,
    pub workload: Workload,
}

/// Run one more process in a container.
#[derive(Debug, Serialize, Deserialize)]
pub struct Exec {
    pub container_id: String,
    /// File with the OCI Process as libcontainer gets it.
    pub process: PathBuf,
    pub stdio: ChildStdio,
    /// How many descriptors the process has beside stdio.
    pub preserved: usize,
    pub workload: Workload,
}

/// Apply resources to a container's cgroup.
#[derive(Debug, Serialize, Deserialize)]
pub struct Update {
    /// Path within the hierarchy.
    pub cgroup: PathBuf,
    /// How many CPUs of the guest's the container is to have, if that changes.
    pub cpus: Option<u32>,
    pub resources: LinuxResources,
}

/// What the process gets as its standard streams.
#[derive(Debug, Serialize, Deserialize)]
pub enum ChildStdio {
    /// What is handed over with the request.
    Handed,
    /// A new terminal, whose other side is sent to the socket at this path.
    Terminal(PathBuf),
}

/// One line from the helper or the process it made.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub enum Report {
    /// The process exists, with this PID in the guest's initial PID namespace.
    Ready {
        pid: i32,
    },
    /// What was asked is done, and there is no process to speak of.
    Done,
    Failed(Failure),
    /// What libcontainer logged about an error, closer to the cause than the error it returns.
    Trace(String),
}

/// Why the process could not be made or started.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    pub kind: FailureKind,
    pub message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// The program does not exist.
    NotFound,
    /// It exists and cannot be executed.
    NotExecutable,
    /// The spec asks for something that cannot be.
    Invalid,
    Internal,
}

impl Report {
    /// The line for this report, newline included, at most `MAX_LINE` bytes.
    pub fn line(&self) -> Vec<u8> {
        let mut line = self.encode(usize::MAX);
        if line.len() > MAX_LINE {
            // JSON may need six bytes for one of the text's.
            line = self.encode(MAX_LINE / 8);
        }
        line
    }

    fn encode(&self, limit: usize) -> Vec<u8> {
        let cut = |text: &str| {
            let mut end = limit.min(text.len());
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            text[..end].to_owned()
        };
        let report = match self {
            Self::Ready { pid } => Self::Ready { pid: *pid },
            Self::Done => Self::Done,
            Self::Failed(failure) => Self::Failed(Failure {
                kind: failure.kind,
                message: cut(&failure.message),
            }),
            Self::Trace(text) => Self::Trace(cut(text)),
        };
        // Strings and integers have no value that JSON lacks, so this cannot fail; an empty line is no report.
        let mut line = serde_json::to_vec(&report).unwrap_or_default();
        line.push(b'\n');
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_fits_one_atomic_write_whatever_the_text() {
        for text in [
            "x".repeat(100_000),
            "\u{1}".repeat(100_000),
            "é".repeat(50_000),
        ] {
            let line = Report::Trace(text).line();
            assert!(line.len() <= MAX_LINE, "{}", line.len());
            assert!(serde_json::from_slice::<Report>(&line).is_ok());
            assert_eq!(line.iter().filter(|b| **b == b'\n').count(), 1);
        }
    }

    #[test]
    fn a_short_report_comes_back_as_it_was() {
        let report = Report::Failed(Failure {
            kind: FailureKind::NotExecutable,
            message: "exec: \"/etc\": is a directory\nreally".into(),
        });
        assert_eq!(
            serde_json::from_slice::<Report>(&report.line()).unwrap(),
            report
        );
    }
}
