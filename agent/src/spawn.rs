//! Starts the helper process and reads what it and the process it makes report. posix_spawn(3) only: the agent never
//! forks itself.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, posix_spawn};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::pipe2;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use crate::error::{Doing, Error, Result};
use crate::helper;
use crate::preserved;
use crate::reaper::{Exit, ExitWatch, Expectation, ended};
use crate::report::{Failure, FailureKind, MAX_LINE, Report, Request};

/// Most bytes of reports about one process that are read; what comes after is as good as the end.
const MAX_REPORTS: usize = 256 * 1024;

/// Most lines of libcontainer's log that are kept to explain a failure.
const MAX_TRACES: usize = 4;

/// A running helper.
pub struct Helper {
    pub reports: Reports,
    pub exit: ExitWatch,
}

/// Descriptors that a helper inherits. None of them has, here, one of the numbers that the preserved ones get there.
#[derive(Default)]
pub struct Inherited<'a> {
    /// From number 3 on, in this order.
    pub preserved: Vec<BorrowedFd<'a>>,
    /// Under the numbers they have here.
    pub others: Vec<BorrowedFd<'a>>,
}

/// Starts a helper.
pub fn helper(
    expectation: &Expectation,
    request: &Request,
    inherited: &Inherited<'_>,
) -> Result<Helper> {
    let numbers = (preserved::FIRST..).take(inherited.preserved.len());
    let lowest = numbers.clone().last().map_or(0, |last| last + 1);
    let own = || -> io::Result<_> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
        Ok((read, preserved::above(write, lowest)?))
    };
    let (read, write) = own().doing(|| "making the helper's pipe".into())?;
    let request = document(request).and_then(|file| preserved::above(file, lowest));
    let request = request.doing(|| "writing the helper's request".into())?;
    let spawn = || -> nix::Result<nix::unistd::Pid> {
        let mut actions = PosixSpawnFileActions::init()?;
        for (descriptor, number) in inherited.preserved.iter().zip(numbers) {
            actions.add_dup2(descriptor.as_raw_fd(), number)?;
        }
        let own = [request.as_fd(), write.as_fd()];
        for descriptor in inherited.others.iter().chain(&own) {
            // Onto itself: POSIX says this only clears close-on-exec, in the child alone.
            actions.add_dup2(descriptor.as_raw_fd(), descriptor.as_raw_fd())?;
        }
        let number = |fd: &OwnedFd| CString::new(fd.as_raw_fd().to_string()).unwrap_or_default();
        let arguments = [
            c"cloison-agent".to_owned(),
            CString::new(helper::ARGUMENT).unwrap_or_default(),
            number(&request),
            number(&write),
        ];
        let environment: [CString; 0] = [];
        let attributes = PosixSpawnAttr::init()?;
        posix_spawn(
            c"/proc/self/exe",
            &actions,
            &attributes,
            &arguments,
            &environment,
        )
    };
    let pid = spawn().doing(|| "starting the helper".into())?;
    drop(write);
    let pipe = pipe::Receiver::from_owned_fd(read).doing(|| "reading the helper's pipe".into())?;
    Ok(Helper {
        reports: Reports::new(pipe),
        exit: expectation.watch(pid),
    })
}

fn document(request: &Request) -> io::Result<OwnedFd> {
    let file = memfd_create("request", MFdFlags::MFD_CLOEXEC)?;
    let json = serde_json::to_vec(request)?;
    let mut file = std::fs::File::from(file);
    io::Write::write_all(&mut file, &json)?;
    io::Seek::rewind(&mut file)?;
    Ok(file.into())
}

impl Helper {
    /// Waits until the helper has done what was asked and says the PID of the process it made, if it made one. The
    /// reports go on: the process's own come next.
    pub async fn answer(mut self) -> Result<(Option<i32>, Reports)> {
        loop {
            match self.reports.next().await? {
                Some(Report::Ready { pid }) => return Ok((Some(pid), self.reports)),
                Some(Report::Done) => return Ok((None, self.reports)),
                Some(Report::Failed(failure)) => return Err(self.reports.explain(failure)),
                Some(Report::Trace(_)) => {}
                None => {
                    let exit = ended(&mut self.exit).await;
                    return Err(self.reports.explain(died(exit)));
                }
            }
        }
    }
}

fn died(exit: Option<Exit>) -> Failure {
    let how = match exit {
        Some(Exit {
            signal: 0, code, ..
        }) => format!("exited with {code}"),
        Some(Exit { signal, .. }) => format!("was killed by signal {signal}"),
        None => "vanished".into(),
    };
    Failure {
        kind: FailureKind::Internal,
        message: format!("the helper that makes the process {how} without an answer"),
    }
}

/// The lines of a report's pipe.
pub struct Reports {
    pipe: pipe::Receiver,
    buffer: Vec<u8>,
    read: usize,
    traces: Vec<String>,
}

impl Reports {
    fn new(pipe: pipe::Receiver) -> Self {
        Self {
            pipe,
            buffer: Vec::new(),
            read: 0,
            traces: Vec::new(),
        }
    }

    /// Waits until the process executes its program, or says why it does not.
    pub async fn executed(mut self) -> Result<()> {
        loop {
            match self.next().await? {
                Some(Report::Failed(failure)) => return Err(self.explain(failure)),
                Some(_) => {}
                None => return Ok(()),
            }
        }
    }

    async fn next(&mut self) -> Result<Option<Report>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                // A line that is no report was cut by a writer that died.
                let Ok(report) = serde_json::from_slice(&line) else {
                    continue;
                };
                if let Report::Trace(text) = &report
                    && self.traces.len() < MAX_TRACES
                {
                    self.traces.push(text.clone());
                }
                return Ok(Some(report));
            }
            if self.buffer.len() > MAX_LINE || self.read > MAX_REPORTS {
                return Ok(None);
            }
            let read = self.pipe.read_buf(&mut self.buffer).await;
            match read.doing(|| "reading the helper's report".into())? {
                0 => return Ok(None),
                count => self.read += count,
            }
        }
    }

    /// The first trace is the closest to the cause. A failure of the workload itself needs none.
    fn explain(&self, mut failure: Failure) -> Error {
        if failure.kind == FailureKind::Internal
            && let Some(trace) = self.traces.first()
            && !failure.message.contains(trace.as_str())
        {
            failure.message = format!("{}: {trace}", failure.message);
        }
        Error::Workload(failure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reports(lines: &[u8]) -> Reports {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        nix::unistd::write(&write, lines).unwrap();
        Reports::new(pipe::Receiver::from_owned_fd(read).unwrap())
    }

    fn failure(kind: FailureKind) -> Report {
        Report::Failed(Failure {
            kind,
            message: "outer".into(),
        })
    }

    #[tokio::test]
    async fn the_end_of_the_reports_means_the_program_runs() {
        assert!(reports(b"").executed().await.is_ok());
    }

    #[tokio::test]
    async fn a_failure_is_explained_by_the_first_trace() {
        let mut lines = Report::Trace("inner".into()).line();
        lines.extend(Report::Trace("later".into()).line());
        lines.extend(failure(FailureKind::Internal).line());
        let error = reports(&lines).executed().await.unwrap_err();
        assert_eq!(error.to_string(), "outer: inner");
    }

    #[tokio::test]
    async fn a_missing_program_is_not_blamed_on_libcontainers_log() {
        let mut lines = Report::Trace("inner".into()).line();
        lines.extend(failure(FailureKind::NotFound).line());
        let error = reports(&lines).executed().await.unwrap_err();
        assert_eq!(error.to_string(), "outer");
    }

    #[tokio::test]
    async fn lines_that_are_no_reports_are_passed_over() {
        let mut lines = b"\n{}\nnonsense\n\xff\xfe\n".to_vec();
        lines.extend(failure(FailureKind::Invalid).line());
        assert!(reports(&lines).executed().await.is_err());
    }

    #[tokio::test]
    async fn a_line_without_end_is_not_collected_for_ever() {
        let mut reports = reports(&[b'x'; 3 * MAX_LINE]);
        assert!(reports.next().await.unwrap().is_none());
        assert!(reports.buffer.len() <= 4 * MAX_LINE);
    }
}
