//! The pumps between real pipes, sockets and terminals; "the host" is the other end of a socket pair.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;

use super::*;

/// Gives out one half of a socket pair for each port and keeps the other.
#[derive(Default)]
struct Pairs(Mutex<Vec<(u32, UnixStream)>>);

#[async_trait]
impl Connect for Pairs {
    async fn connect(&self, port: u32) -> io::Result<OwnedFd> {
        if port == 999 {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        self.0.lock().unwrap().push((port, theirs));
        Ok(ours.into())
    }
}

impl Pairs {
    fn host(&self, port: u32) -> UnixStream {
        let mut pairs = self.0.lock().unwrap();
        let at = pairs.iter().position(|(p, _)| *p == port).unwrap();
        pairs.remove(at).1
    }
}

const ALL: Ports = Ports {
    stdin: 10,
    stdout: 11,
    stderr: 12,
    preserved: Vec::new(),
};

/// What the process holds of a descriptor.
fn held(end: &End) -> fs::File {
    end.far.try_clone().unwrap().into()
}

/// What a process with these streams would hold, the pumps, and the host's ends.
async fn process(ports: Ports) -> ([fs::File; 3], Streams, Pairs) {
    let pairs = Pairs::default();
    let stdio = Stdio::open(&pairs, ports, false, None).await.unwrap();
    let Standard::Separate(ends) = &stdio.standard else {
        panic!("no terminal was asked for")
    };
    let held = ends.each_ref().map(held);
    (held, stdio.start().unwrap(), pairs)
}

/// Runs blocking code beside the pumps.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let work = tokio::task::spawn_blocking(work);
    tokio::time::timeout(Duration::from_secs(60), work)
        .await
        .unwrap()
        .unwrap()
}

#[tokio::test]
async fn output_arrives_whole_and_ends_with_the_process() {
    let ([_, mut stdout, stderr], streams, pairs) = process(ALL).await;
    let (mut host, mut host_err) = (pairs.host(11), pairs.host(12));
    let sent: Vec<u8> = (0..8_000_000_u32).map(|n| (n % 251) as u8).collect();
    let copy = sent.clone();
    let writer = tokio::task::spawn_blocking(move || stdout.write_all(&copy));
    let received = blocking(move || {
        let mut all = Vec::new();
        host.read_to_end(&mut all).map(|_| all).unwrap()
    });
    assert!(received.await == sent);
    writer.await.unwrap().unwrap();
    drop(stderr);
    let rest = blocking(move || host_err.read(&mut [0; 1]).unwrap()).await;
    assert_eq!(rest, 0);
    streams.process_ended();
    streams.drained().await;
}

#[tokio::test]
async fn input_arrives_whole_and_its_end_is_passed_on() {
    let ([mut stdin, ..], _streams, pairs) = process(ALL).await;
    let mut host = pairs.host(10);
    let sent = vec![9; 5_000_000];
    let copy = sent.clone();
    let writer = tokio::task::spawn_blocking(move || {
        host.write_all(&copy).unwrap();
        host.shutdown(std::net::Shutdown::Write).unwrap();
        host
    });
    let received = blocking(move || {
        let mut all = Vec::new();
        stdin.read_to_end(&mut all).map(|_| all).unwrap()
    });
    assert!(received.await == sent);
    writer.await.unwrap();
}

#[tokio::test]
async fn a_process_that_closes_its_input_closes_the_hosts_stream() {
    let ([stdin, ..], _streams, pairs) = process(ALL).await;
    let mut host = pairs.host(10);
    drop(stdin);
    assert_eq!(blocking(move || host.read(&mut [0; 1]).unwrap()).await, 0);
}

#[tokio::test]
async fn a_host_that_reads_no_more_breaks_the_writers_pipe() {
    let ([_, mut stdout, _], _streams, pairs) = process(ALL).await;
    drop(pairs.host(11));
    let error = blocking(move || {
        loop {
            if let Err(error) = stdout.write_all(&[0; 65536]) {
                return error;
            }
        }
    });
    assert_eq!(error.await.kind(), io::ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn a_host_that_sends_nothing_on_an_output_stream_may_close_that_half() {
    let ([_, mut stdout, _], _streams, pairs) = process(ALL).await;
    let mut host = pairs.host(11);
    host.shutdown(std::net::Shutdown::Write).unwrap();
    // More than socket and pipe hold together, so the pump waits for both in turn.
    let writer = tokio::task::spawn_blocking(move || stdout.write_all(&[5; 4_000_000]));
    let received = blocking(move || {
        let mut all = Vec::new();
        host.read_to_end(&mut all).unwrap()
    });
    assert_eq!(received.await, 4_000_000);
    writer.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_host_that_closes_an_idle_stream_closes_the_pipe_at_once() {
    let ([_, stdout, _], _streams, pairs) = process(ALL).await;
    let host = pairs.host(11);
    host.shutdown(std::net::Shutdown::Write).unwrap();
    tokio::task::yield_now().await;
    drop(host);
    let broken = blocking(move || {
        let mut set = [nix::poll::PollFd::new(
            stdout.as_fd(),
            nix::poll::PollFlags::empty(),
        )];
        nix::poll::poll(&mut set, 60_000_u16).unwrap();
        set[0]
            .revents()
            .unwrap()
            .contains(nix::poll::PollFlags::POLLERR)
    });
    assert!(broken.await);
}

#[tokio::test]
async fn a_terminal_that_was_closed_and_opened_again_goes_on() {
    let (master, slave) = raw_terminal();
    let path = nix::unistd::ttyname(&slave).unwrap();
    let (ours, mut host) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let mut streams = Streams::new();
    // Closed and opened before the pump looks: it sees a terminal that was hung up and is not.
    let master = Arc::new(master);
    drop(slave);
    master.readable().await.unwrap().retain_ready();
    let mut slave = fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let ending = streams.ending();
    streams.spawn(pump::terminal(master, ours.into(), ending));
    tokio::task::yield_now().await;
    let text = blocking(move || {
        slave.write_all(b"again").unwrap();
        let mut bytes = [0; 5];
        host.read_exact(&mut bytes).unwrap();
        bytes
    });
    assert_eq!(&text.await, b"again");
}

#[tokio::test]
async fn a_background_writer_does_not_keep_a_wait_from_answering() {
    let ([_, mut stdout, _stderr], streams, pairs) = process(ALL).await;
    let mut host = pairs.host(11);
    stdout.write_all(b"last words").unwrap();
    streams.process_ended();
    tokio::time::timeout(Duration::from_secs(60), streams.drained())
        .await
        .unwrap();
    let mut text = [0; 10];
    host.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"last words");
    // The stream goes on for whoever still holds the pipe.
    stdout.write_all(b"more").unwrap();
    let mut text = [0; 4];
    let text = blocking(move || host.read_exact(&mut text).map(|()| text).unwrap());
    assert_eq!(&text.await, b"more");
}

#[tokio::test]
async fn output_the_host_does_not_read_is_waited_for() {
    let ([_, mut stdout, _], streams, pairs) = process(ALL).await;
    let mut host = pairs.host(11);
    // More than the socket takes, no more than the pipe does beside it.
    let total = blocking(move || {
        stdout.write_all(&[1; 900_000]).unwrap();
        900_000
    });
    let total = total.await;
    streams.process_ended();
    let early = tokio::time::timeout(Duration::from_millis(200), streams.drained()).await;
    assert!(early.is_err());
    let read = blocking(move || {
        let mut all = Vec::new();
        host.read_to_end(&mut all).unwrap()
    });
    let (read, ()) = tokio::join!(read, streams.drained());
    assert_eq!(read, total);
}

#[tokio::test]
async fn a_stream_that_is_not_asked_for_is_dev_null() {
    let ([mut stdin, mut stdout, _], streams, _pairs) = process(Ports::default()).await;
    assert_eq!(stdin.read(&mut [0; 1]).unwrap(), 0);
    stdout.write_all(b"nothing").unwrap();
    streams.process_ended();
    streams.drained().await;
}

#[tokio::test]
async fn a_stream_the_host_refuses_is_an_error_that_names_it() {
    let ports = Ports { stdout: 999, ..ALL };
    let error = Stdio::open(&Pairs::default(), ports, false, None)
        .await
        .err()
        .unwrap();
    assert!(error.to_string().contains("port 999"), "{error}");
}

/// What a process holds of one preserved descriptor, the pumps, and the host's end.
async fn preserved(wanted: fn(u32) -> Descriptor) -> (fs::File, Streams, UnixStream) {
    let pairs = Pairs::default();
    let ports = Ports {
        preserved: vec![wanted(20)],
        ..Ports::default()
    };
    let stdio = Stdio::open(&pairs, ports, false, None).await.unwrap();
    let held = held(&stdio.preserved[0]);
    (held, stdio.start().unwrap(), pairs.host(20))
}

#[tokio::test]
async fn preserved_pipes_are_carried_like_stdio() {
    let (mut process, streams, mut host) = preserved(Descriptor::Output).await;
    process.write_all(b"last words").unwrap();
    streams.process_ended();
    streams.drained().await;
    let mut text = [0; 10];
    host.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"last words");

    let (mut process, _streams, mut host) = preserved(Descriptor::Input).await;
    host.write_all(b"first words").unwrap();
    drop(host);
    let text = blocking(move || {
        let mut text = String::new();
        process.read_to_string(&mut text).map(|_| text).unwrap()
    });
    assert_eq!(text.await, "first words");
}

#[tokio::test]
async fn a_socket_carries_megabytes_both_ways_and_each_end_is_passed_on() {
    let (process, _streams, host) = preserved(Descriptor::Socket).await;
    let process = UnixStream::from(OwnedFd::from(process));
    let sent: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    let talk = |socket: UnixStream, sent: Vec<u8>| {
        move || {
            let mut received = Vec::new();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    (&socket).write_all(&sent).unwrap();
                    socket.shutdown(std::net::Shutdown::Write).unwrap();
                });
                (&socket).read_to_end(&mut received).unwrap();
            });
            received
        }
    };
    let (ours, theirs) = tokio::join!(
        blocking(talk(process, sent.clone())),
        blocking(talk(host, sent.clone()))
    );
    assert!(ours == sent && theirs == sent);
}

#[tokio::test]
async fn one_half_of_a_socket_goes_on_after_the_other_has_ended() {
    let (process, _streams, mut host) = preserved(Descriptor::Socket).await;
    let mut process = UnixStream::from(OwnedFd::from(process));
    host.shutdown(std::net::Shutdown::Write).unwrap();
    let process = blocking(move || {
        assert_eq!(process.read(&mut [0; 1]).unwrap(), 0);
        process.write_all(b"after the end").unwrap();
        process
    });
    let process = process.await;
    let text = blocking(move || {
        let mut text = [0; 13];
        host.read_exact(&mut text).map(|()| text).unwrap()
    });
    assert_eq!(&text.await, b"after the end");
    drop(process);
}

#[tokio::test]
async fn a_socket_that_its_process_closes_is_closed_whoever_else_keeps_it_open() {
    let (mut process, streams, mut host) = preserved(Descriptor::Socket).await;
    process.write_all(b"last words").unwrap();
    drop(process);
    streams.process_ended();
    streams.drained().await;
    let text = blocking(move || {
        let mut text = String::new();
        host.read_to_string(&mut text).unwrap();
        // The other half has ended as well.
        assert!(host.write_all(&[0; 1 << 20]).is_err());
        text
    });
    assert_eq!(text.await, "last words");
}

#[tokio::test]
async fn a_host_that_closes_a_socket_breaks_the_process_s() {
    let (process, _streams, host) = preserved(Descriptor::Socket).await;
    let mut process = UnixStream::from(OwnedFd::from(process));
    drop(host);
    let broken = blocking(move || {
        assert_eq!(process.read(&mut [0; 1]).unwrap(), 0);
        loop {
            if let Err(error) = process.write_all(&[0; 1 << 16]) {
                return error.kind();
            }
        }
    });
    assert_eq!(broken.await, io::ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn a_socket_with_output_the_host_does_not_read_is_waited_for() {
    let (mut process, streams, mut host) = preserved(Descriptor::Socket).await;
    // More than one socket takes, no more than the other does beside it.
    let written = blocking(move || process.write_all(&[1; 300_000]));
    written.await.unwrap();
    streams.process_ended();
    let early = tokio::time::timeout(Duration::from_millis(200), streams.drained()).await;
    assert!(early.is_err());
    let read = blocking(move || {
        let mut all = Vec::new();
        host.read_to_end(&mut all).unwrap()
    });
    let (read, ()) = tokio::join!(read, streams.drained());
    assert_eq!(read, 300_000);
}

#[tokio::test]
async fn a_helper_is_handed_all_that_its_process_gets() {
    let pairs = Pairs::default();
    let ports = Ports {
        preserved: (20..80).map(Descriptor::Output).collect(),
        ..ALL
    };
    let stdio = Stdio::open(&pairs, ports, false, None).await.unwrap();
    let handed = stdio.handed();
    assert_eq!((handed.preserved.len(), handed.standard.len()), (60, 3));
}

fn raw_terminal() -> (AsyncFd<OwnedFd>, fs::File) {
    let pair = nix::pty::openpty(None, None).unwrap();
    let mut settings = nix::sys::termios::tcgetattr(&pair.slave).unwrap();
    nix::sys::termios::cfmakeraw(&mut settings);
    let when = nix::sys::termios::SetArg::TCSANOW;
    nix::sys::termios::tcsetattr(&pair.slave, when, &settings).unwrap();
    fcntl(
        &pair.master,
        FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK),
    )
    .unwrap();
    (
        sys::register(pair.master, Interest::READABLE | Interest::WRITABLE).unwrap(),
        pair.slave.into(),
    )
}

#[tokio::test]
async fn a_terminal_carries_both_directions_and_ends_with_its_last_process() {
    let (master, mut slave) = raw_terminal();
    let (ours, mut host) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let mut streams = Streams::new();
    let ending = streams.ending();
    streams.spawn(pump::terminal(Arc::new(master), ours.into(), ending));
    let text = blocking(move || {
        let mut bytes = [0; 5];
        host.write_all(b"input").unwrap();
        slave.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"input");
        slave.write_all(b"output").unwrap();
        drop(slave);
        let mut text = String::new();
        host.read_to_string(&mut text).unwrap();
        text
    });
    assert_eq!(text.await, "output");
    streams.process_ended();
    streams.drained().await;
}

#[tokio::test]
async fn the_end_of_the_hosts_input_leaves_a_terminal_open() {
    let (master, mut slave) = raw_terminal();
    let (ours, mut host) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let mut streams = Streams::new();
    let ending = streams.ending();
    streams.spawn(pump::terminal(Arc::new(master), ours.into(), ending));
    let text = blocking(move || {
        host.shutdown(std::net::Shutdown::Write).unwrap();
        slave.write_all(b"still here").unwrap();
        let mut bytes = [0; 10];
        host.read_exact(&mut bytes).unwrap();
        bytes
    });
    assert_eq!(&text.await, b"still here");
}
