//! Starts the helper process, asks it, and reads what it and the process it makes report. posix_spawn(3) only: the agent never
//! forks itself.

use std::ffi::CString;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::fcntl::OFlag;
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, posix_spawn};
use nix::unistd::pipe2;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;

use crate::error::{Doing, Error, Result};
use crate::helper;
use crate::reaper::{Exit, ExitWatch, Expectation, ended};
use crate::report::{Failure, FailureKind, MAX_LINE, Report, Request};
use crate::sys;

/// Most bytes of reports about one process that are read; what comes after is as good as the end.
const MAX_REPORTS: usize = 256 * 1024;

/// Most lines of libcontainer's log that are kept to explain a failure.
const MAX_TRACES: usize = 4;

/// A helper that has been started and waits for what it is to do.
pub struct Waiting {
    socket: UnixStream,
    exit: ExitWatch,
}

/// A running helper.
pub struct Helper {
    pub reports: Reports,
    pub exit: ExitWatch,
}

/// Descriptors that a helper gets with its request.
#[derive(Default)]
pub struct Handed<'a> {
    /// Those that its process is to have from number 3 on.
    pub preserved: Vec<BorrowedFd<'a>>,
    /// Its process's standard input, output and error, or none.
    pub standard: Vec<BorrowedFd<'a>>,
}

impl Waiting {
    /// Starts a helper.
    pub fn start(expectation: &Expectation) -> Result<Self> {
        let spawn = || -> io::Result<_> {
            let (ours, theirs) = UnixStream::pair()?;
            let mut actions = PosixSpawnFileActions::init()?;
            // Should it have that number already: POSIX says that this clears close-on-exec then, in the child alone.
            actions.add_dup2(theirs.as_raw_fd(), helper::SOCKET)?;
            let arguments = [
                c"cloison-agent".to_owned(),
                CString::new(helper::ARGUMENT).unwrap_or_default(),
            ];
            let environment: [CString; 0] = [];
            let attributes = PosixSpawnAttr::init()?;
            let program = c"/proc/self/exe";
            let pid = posix_spawn(program, &actions, &attributes, &arguments, &environment)?;
            Ok((ours, pid))
        };
        let (socket, pid) = spawn().doing(|| "starting the helper".into())?;
        Ok(Self {
            socket,
            exit: expectation.watch(pid),
        })
    }

    /// Blocks until it waits, so that nothing of its start is left for later.
    pub fn await_start(&mut self) -> Result<()> {
        let begun = self.socket.read(&mut [0]);
        begun.doing(|| "waiting for the helper's start".into())?;
        Ok(())
    }

    /// Whether it can still be asked.
    pub fn is_alive(&self) -> bool {
        self.exit.borrow().is_none()
    }

    /// Asks it to do this. One that dies of it says so in place of an answer.
    pub async fn ask(self, request: &Request, handed: &Handed<'_>) -> Result<Helper> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC)
            .map_err(io::Error::from)
            .doing(|| "making the helper's pipe".into())?;
        let descriptors = handed.preserved.iter().chain(&handed.standard);
        let descriptors: Vec<BorrowedFd<'_>> =
            descriptors.copied().chain([write.as_fd()]).collect();
        let sent = send(self.socket, request, &descriptors).await;
        if let Err(error) = sent
            && error.kind() != io::ErrorKind::BrokenPipe
        {
            return Err(error).doing(|| "writing the helper's request".into());
        }
        drop(write);
        let pipe = pipe::Receiver::from_owned_fd(read);
        let pipe = pipe.doing(|| "reading the helper's pipe".into())?;
        Ok(Helper {
            reports: Reports::new(pipe),
            exit: self.exit,
        })
    }
}

/// The request, to its end, and the descriptors with its first byte: a space, which JSON may begin with.
async fn send(
    socket: UnixStream,
    request: &Request,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let json = serde_json::to_vec(request)?;
    sys::send_descriptors(&socket, b" ", descriptors)?;
    socket.set_nonblocking(true)?;
    let mut socket = tokio::net::UnixStream::from_std(socket)?;
    socket.write_all(&json).await
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
