//! A process's stdio, and the streams that its caller hands on beside it, as descriptors that the VM process can move bytes through without
//! ever blocking. The caller's own open file descriptions are shared with its shell and stay as they are: pipes and terminals are opened once
//! more, non-blocking; regular files and sockets are used as they are; what can be neither is copied through a pipe by a thread of ours.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;

use cloison_agent_api::agent::{self as api, Stdio, descriptor::What};
use cloison_vmm::{Attachment, ControlClient};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::pipe2;
use tokio::net::unix::pipe::Receiver;

use crate::Error;
use crate::preserved::Descriptor;

/// Host vsock port of an init's standard input; those of its other streams follow by their numbers. Ports given out later, to exec'd
/// processes, are far above.
const FIRST_INIT_PORT: u32 = 2000;

/// One end of a process's stdio on the host.
#[derive(Debug)]
pub struct HostStream {
    fd: OwnedFd,
    /// The thread that copies between `fd` and the caller's descriptor, when there must be one; it ends at EOF. For output it must
    /// be waited for, or the last bytes are lost.
    relay: Option<std::thread::JoinHandle<()>>,
}

#[derive(Clone, Copy)]
enum Direction {
    Read,
    Write,
}

impl HostStream {
    /// The process reads what is read from `fd`.
    ///
    /// # Errors
    /// When the descriptor can be neither used, reopened nor copied.
    pub fn input(fd: BorrowedFd<'_>) -> Result<Self, Error> {
        Self::prepare(fd, Direction::Read)
    }

    /// What the process writes is written to `fd`.
    ///
    /// # Errors
    /// As for [`HostStream::input`].
    pub fn output(fd: BorrowedFd<'_>) -> Result<Self, Error> {
        Self::prepare(fd, Direction::Write)
    }

    /// The process reads what is read from `fd`, a terminal, and what it writes is written there.
    ///
    /// # Errors
    /// When the descriptor cannot be reopened.
    pub fn both(fd: BorrowedFd<'_>) -> Result<Self, Error> {
        let reopened = reopen(fd, OFlag::O_RDWR);
        let failed = Error::system("open a terminal once more");
        Ok(Self::ready(reopened.map_err(|errno| failed(errno.into()))?))
    }

    /// A descriptor of our own that is a socket or non-blocking already.
    pub fn ready(fd: OwnedFd) -> Self {
        Self { fd, relay: None }
    }

    fn prepare(fd: BorrowedFd<'_>, direction: Direction) -> Result<Self, Error> {
        let failed = || Error::system("prepare standard input or output");
        let own = File::from(fd.try_clone_to_owned().map_err(failed())?);
        let kind = own.metadata().map_err(failed())?.file_type();
        if kind.is_file() || kind.is_socket() {
            return Ok(Self::ready(own.into()));
        }
        let access = match direction {
            Direction::Read => OFlag::O_RDONLY,
            Direction::Write => OFlag::O_WRONLY,
        };
        match reopen(own.as_fd(), access) {
            Ok(reopened) => Ok(Self::ready(reopened)),
            Err(_) => Self::relayed(own, direction).map_err(failed()),
        }
    }

    /// For what cannot be reopened: another user's terminal, a descriptor from another namespace.
    fn relayed(theirs: File, direction: Direction) -> io::Result<Self> {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
        let (ours, mut from, mut to) = match direction {
            Direction::Read => (reader, theirs, File::from(writer)),
            Direction::Write => (writer, File::from(reader), theirs),
        };
        nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let relay = std::thread::Builder::new()
            .name("stdio-relay".into())
            .spawn(move || {
                // An error here is the end of the stream, which the other side sees as such.
                let _ = io::copy(&mut from, &mut to);
            })?;
        let relay = match direction {
            Direction::Read => None,
            Direction::Write => Some(relay),
        };
        Ok(Self { fd: ours, relay })
    }
}

/// What a descriptor is of, opened once more and non-blocking.
fn reopen(fd: BorrowedFd<'_>, access: OFlag) -> nix::Result<OwnedFd> {
    let flags = access | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    open(path.as_str(), flags, Mode::empty())
}

/// A process's stdio, and what it has beside it. A missing stream is the guest's `/dev/null`.
#[derive(Debug, Default)]
pub struct Streams {
    /// What the process reads.
    pub stdin: Option<HostStream>,
    /// What it writes; with a terminal all it writes.
    pub stdout: Option<HostStream>,
    /// What it writes to standard error; unused with a terminal.
    pub stderr: Option<HostStream>,
    /// One stream for both directions, with a terminal in the guest.
    pub terminal: bool,
    /// From number 3 on.
    pub preserved: Vec<Descriptor>,
}

/// Streams that have been given to a VM.
#[derive(Debug)]
pub struct Wiring {
    /// What the agent is told.
    pub stdio: Stdio,
    /// Each is readable when its streams are over: standard error by itself, and all others.
    done: OwnedFd,
    stderr_done: OwnedFd,
    relays: Vec<std::thread::JoinHandle<()>>,
    /// Streams that the guest has not taken up yet stay for as long as this does.
    control: Option<ControlClient>,
}

/// A stream on its way to the VM process: the number that the process has it under, and its two directions.
struct Lane {
    number: u32,
    read: Option<OwnedFd>,
    write: Option<OwnedFd>,
}

impl Streams {
    /// Wires an init's streams, to be there before the guest starts.
    pub(crate) fn into_attachments(self) -> Result<(Wiring, Vec<Attachment>), Error> {
        let mut attachments = Vec::new();
        let wiring = self.wire(|lane, done| {
            let port = FIRST_INIT_PORT + lane.number;
            attachments.push(Attachment {
                port,
                read: lane.read,
                write: lane.write,
                done: Some(done),
            });
            Ok(port)
        })?;
        Ok((wiring, attachments))
    }

    /// Wires the streams of a process in a VM that runs.
    ///
    /// # Errors
    /// When the VM process refuses or has ended.
    pub fn attach(self, control: ControlClient) -> Result<Wiring, Error> {
        let mut wiring = self.wire(|lane, done| {
            let read = lane.read.as_ref().map(AsFd::as_fd);
            let write = lane.write.as_ref().map(AsFd::as_fd);
            control
                .attach(read, write, Some(done.as_fd()))
                .map_err(|source| Error::Control {
                    what: "attach a stream",
                    source,
                })
        })?;
        wiring.control = Some(control);
        Ok(wiring)
    }

    fn wire(
        self,
        mut attach: impl FnMut(Lane, OwnedFd) -> Result<u32, Error>,
    ) -> Result<Wiring, Error> {
        let pipe = || {
            pipe2(OFlag::O_CLOEXEC)
                .map_err(io::Error::from)
                .map_err(Error::system("create a pipe"))
        };
        let ((done, held), (stderr_done, stderr_held)) = (pipe()?, pipe()?);
        let mut relays = Vec::new();
        let mut open = |stream: HostStream| {
            relays.extend(stream.relay);
            stream.fd
        };
        let mut carry = |number, read, write| -> Result<u32, Error> {
            let lane = Lane {
                number,
                read,
                write,
            };
            let held = if number == 2 { &stderr_held } else { &held };
            attach(lane, duplicate(held)?)
        };
        let (stdin, stdout) = (self.stdin.map(&mut open), self.stdout.map(&mut open));
        let stderr = self.stderr.map(&mut open);
        let mut stdio = Stdio::default();
        if self.terminal {
            // Its stream is needed even when nobody listens: it is how the guest's terminal ends.
            stdio.stdin = carry(0, stdin, stdout)?;
        } else {
            if stdin.is_some() {
                stdio.stdin = carry(0, stdin, None)?;
            }
            if stdout.is_some() {
                stdio.stdout = carry(1, None, stdout)?;
            }
            if stderr.is_some() {
                stdio.stderr = carry(2, None, stderr)?;
            }
        }
        for (number, descriptor) in (3..).zip(self.preserved) {
            let what = match descriptor {
                Descriptor::Input(stream) => What::Input(carry(number, Some(open(stream)), None)?),
                Descriptor::Output(stream) => {
                    What::Output(carry(number, None, Some(open(stream)))?)
                }
                Descriptor::Both(stream) => {
                    let fd = open(stream);
                    What::Socket(carry(number, Some(duplicate(&fd)?), Some(fd))?)
                }
                Descriptor::File(file) => What::File(file),
            };
            stdio.preserved.push(api::Descriptor {
                what: Some(what),
                ..Default::default()
            });
        }
        Ok(Wiring {
            stdio,
            done,
            stderr_done,
            relays,
            control: None,
        })
    }
}

fn duplicate(fd: &OwnedFd) -> Result<OwnedFd, Error> {
    fd.try_clone()
        .map_err(Error::system("duplicate a descriptor"))
}

/// A stream to the guest that carries nothing: a process tied to it is killed when this is dropped, or gone with its holder.
#[derive(Debug)]
pub struct Lifeline {
    port: u32,
    _held: OwnedFd,
    /// The guest may not have taken it up yet.
    _control: ControlClient,
}

impl Lifeline {
    /// Makes one in a VM that runs.
    ///
    /// # Errors
    /// When the VM process refuses or has ended.
    pub fn attach(control: ControlClient) -> Result<Self, Error> {
        let (watched, held) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
            .map_err(io::Error::from)
            .map_err(Error::system("create a pipe"))?;
        let port = control
            .attach(Some(watched.as_fd()), None, None)
            .map_err(|source| Error::Control {
                what: "attach a lifeline",
                source,
            })?;
        Ok(Self {
            port,
            _held: held,
            _control: control,
        })
    }

    /// Where the guest finds it.
    pub(crate) fn port(&self) -> u32 {
        self.port
    }
}

impl Wiring {
    /// Waits until every stream has ended and every byte has reached its descriptor.
    ///
    /// # Errors
    /// When the wait itself fails.
    pub async fn finished(self) -> Result<(), Error> {
        over(self.done).await?;
        over(self.stderr_done).await?;
        for relay in self.relays {
            // A relay that panicked has printed why, and there is nothing to be saved.
            let _ = tokio::task::spawn_blocking(move || relay.join()).await;
        }
        Ok(())
    }

    /// Waits until no process in the guest has standard error open any more.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn stderr_closed(&self) -> Result<impl Future<Output = Result<(), Error>> + use<>, Error> {
        Ok(over(duplicate(&self.stderr_done)?))
    }
}

/// Waits until a pipe has no writers. Nobody writes into it: it becomes readable when the last one has closed it.
async fn over(pipe: OwnedFd) -> Result<(), Error> {
    let failed = || Error::system("wait for the end of the output");
    let pipe = Receiver::from_owned_fd(pipe).map_err(failed())?;
    pipe.readable().await.map_err(failed())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    use nix::fcntl::{FcntlArg, fcntl};

    use super::*;

    fn is_nonblocking(fd: impl AsFd) -> bool {
        OFlag::from_bits_truncate(fcntl(fd.as_fd(), FcntlArg::F_GETFL).unwrap())
            .contains(OFlag::O_NONBLOCK)
    }

    #[test]
    fn a_callers_pipe_stays_blocking_while_ours_does_not() {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let input = HostStream::input(reader.as_fd()).unwrap();
        let output = HostStream::output(writer.as_fd()).unwrap();
        assert!(is_nonblocking(&input.fd) && is_nonblocking(&output.fd));
        assert!(!is_nonblocking(&reader) && !is_nonblocking(&writer));
    }

    #[test]
    fn a_regular_file_keeps_its_offset_shared_with_the_caller() {
        let mut file = tempfile::tempfile().unwrap();
        let output = HostStream::output(file.as_fd()).unwrap();
        File::from(output.fd).write_all(b"guest ").unwrap();
        file.write_all(b"shell").unwrap();
        let mut text = String::new();
        io::Seek::rewind(&mut file).unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "guest shell");
    }

    #[test]
    fn what_cannot_be_reopened_is_relayed_to_the_last_byte() {
        let (theirs_out, theirs) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let output = HostStream::relayed(File::from(theirs), Direction::Write).unwrap();
        assert!(is_nonblocking(&output.fd));
        File::from(output.fd).write_all(b"last words").unwrap();
        output.relay.unwrap().join().unwrap();
        let mut text = String::new();
        File::from(theirs_out).read_to_string(&mut text).unwrap();
        assert_eq!(text, "last words");
    }

    #[test]
    fn streams_are_over_when_every_lane_has_been_dropped() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let null = || {
            HostStream::ready(
                File::options()
                    .read(true)
                    .write(true)
                    .open("/dev/null")
                    .unwrap()
                    .into(),
            )
        };
        let streams = Streams {
            stdin: Some(null()),
            stdout: Some(null()),
            ..Default::default()
        };
        let (wiring, attachments) = streams.into_attachments().unwrap();
        assert_eq!(
            (wiring.stdio.stdin, wiring.stdio.stdout, wiring.stdio.stderr),
            (2000, 2001, 0)
        );
        runtime.block_on(async {
            let mut finished = Box::pin(wiring.finished());
            assert!(
                futures_poll(&mut finished).await.is_none(),
                "over while a lane is open"
            );
            drop(attachments);
            finished.await.unwrap();
        });
    }

    /// Polls once.
    async fn futures_poll<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
        tokio::select! {
            biased;
            output = future => Some(output),
            () = std::future::ready(()) => None,
        }
    }
}
