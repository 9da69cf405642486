//! Running in the background: a child in a session of its own becomes the container's monitor and keeps its log, and the front
//! end waits only until the container runs or cannot.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use anyhow::{Context, Result, anyhow};
use cloison_sandbox::{HostStream, Streams, split as split_process};
use nix::fcntl::OFlag;
use nix::unistd::{pipe2, setsid};
use serde::{Deserialize, Serialize};
use tokio::net::unix::pipe::Receiver;

use crate::args::ProcessOptions;
use crate::exit::{self, Failed};
use crate::log::{self, Stream};
use crate::monitor::Monitor;
use crate::verbs::{print, runtime};

/// Which side of the split this process is.
pub enum Side {
    Parent(Report),
    Child(Reporter),
}

/// What the child tells its parent once.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Word {
    Started { id: String },
    Failed { status: u8, error: String },
}

/// Where the parent hears from the child.
pub struct Report(File);

/// Where the child tells its parent.
pub struct Reporter(File);

/// Where a detached container's output arrives.
pub struct Outputs {
    stdout: OwnedFd,
    stderr: Option<OwnedFd>,
    /// Held, never written to: a detached container's standard input stays open.
    _stdin: Option<OwnedFd>,
}

/// Goes on in two processes.
///
/// # Errors
/// When the system has no room for another.
pub fn split() -> Result<Side> {
    let failed = "cannot go to the background";
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).context(failed)?;
    match split_process().context(failed)? {
        Some(_child) => Ok(Side::Parent(Report(reader.into()))),
        None => {
            setsid().context(failed)?;
            Ok(Side::Child(Reporter(writer.into())))
        }
    }
}

/// The streams of a detached container, and where its output arrives.
///
/// # Errors
/// When the system has no room for a pipe.
pub fn streams(options: &ProcessOptions) -> Result<(Streams, Outputs)> {
    let pipe = || pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).context("cannot create a pipe");
    let (stdout, to_stdout) = pipe()?;
    let (stderr, to_stderr) = if options.tty {
        (None, None)
    } else {
        Some(pipe()?).unzip()
    };
    let (stdin, keep_open) = if options.interactive {
        Some(pipe()?).unzip()
    } else {
        (None, None)
    };
    let streams = Streams {
        stdin: stdin.map(HostStream::ready),
        stdout: Some(HostStream::ready(to_stdout)),
        stderr: to_stderr.map(HostStream::ready),
        terminal: options.tty,
        ..Streams::default()
    };
    let outputs = Outputs {
        stdout,
        stderr,
        _stdin: keep_open,
    };
    Ok((streams, outputs))
}

impl Report {
    /// Prints the container's ID when it runs, or fails as its monitor did.
    pub fn relay(mut self) -> Result<u8, Failed> {
        let mut text = Vec::new();
        let read = self
            .0
            .read_to_end(&mut text)
            .context("cannot hear from the container's monitor");
        read?;
        match serde_json::from_slice(&text) {
            Ok(Word::Started { id }) => {
                print(id);
                Ok(0)
            }
            Ok(Word::Failed { status, error }) => Err(Failed {
                status,
                error: anyhow!(error),
            }),
            Err(_) => {
                Err(anyhow!("the container's monitor was killed before the container ran").into())
            }
        }
    }
}

impl Reporter {
    fn tell(&mut self, word: &Word) -> Result<()> {
        let text = serde_json::to_vec(word)?;
        // A parent that is gone misses nothing it could use.
        let _ = self.0.write_all(&text);
        Ok(())
    }

    /// Runs the container to its end, telling the parent when it runs or why it does not.
    pub fn supervise(mut self, monitor: Result<Monitor>, outputs: Outputs) -> Result<u8, Failed> {
        let mut told = false;
        let result = monitor.map_err(Failed::from).and_then(|mut monitor| {
            let log = File::options()
                .create(true)
                .append(true)
                .open(monitor.container.log_file())
                .context("cannot create the container's log")?;
            runtime()?.block_on(async {
                let lived = monitor.run(|container| {
                    told = true;
                    leave()?;
                    self.tell(&Word::Started {
                        id: container.id().to_string(),
                    })?;
                    // The parent waits for the end of the pipe.
                    self.0 = File::open("/dev/null")?;
                    Ok(())
                });
                let (lived, ()) = tokio::join!(lived, keep_log(outputs, &log));
                lived
            })
        });
        if let Err(failed) = &result
            && !told
        {
            self.tell(&Word::Failed {
                status: failed.status,
                error: format!("{:#}", failed.error),
            })?;
            // Told once is enough.
            return Ok(failed.status);
        }
        Ok(result.unwrap_or(exit::OURS))
    }
}

async fn keep_log(outputs: Outputs, log: &File) {
    let keep = async |fd: Option<OwnedFd>, stream| {
        let Some(fd) = fd else { return Ok(()) };
        let from = Receiver::from_owned_fd(fd).context("cannot watch the container's output")?;
        log::record(from, stream, log).await
    };
    let (stdout, stderr) = tokio::join!(
        keep(Some(outputs.stdout), Stream::Stdout),
        keep(outputs.stderr, Stream::Stderr)
    );
    for error in [stdout, stderr].into_iter().filter_map(Result::err) {
        tracing::warn!("{error:#}");
    }
}

/// Lets go of what belongs to the front end's caller: its terminal or pipes, and its directory.
fn leave() -> Result<()> {
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .context("cannot open /dev/null")?;
    let failed = "cannot let go of the terminal";
    nix::unistd::dup2_stdin(&null).context(failed)?;
    nix::unistd::dup2_stdout(&null).context(failed)?;
    nix::unistd::dup2_stderr(&null).context(failed)?;
    io::stdout().flush().context(failed)?;
    std::env::set_current_dir("/").context("cannot leave the current directory")
}
