//! A resolver at a loopback address of the sandbox's network namespace, as docker has one for the names on its networks, for the guest.
//! The guest's own loopback is another one: its agent passes on what is asked there (`cloison_agent_api::resolver`), and here it is asked again,
//! from within the namespace, at that address and nowhere else.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use cloison_agent_api::resolver::{HEADER, Header, MAX_QUESTIONS, Protocol};
use cloison_vmm::ControlClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpStream, UdpSocket, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;

use crate::{Agent, Error};

/// Where names are resolved.
const PORT: u16 = 53;
/// How long the resolver may take. Programs have given up by then.
const PATIENCE: Duration = Duration::from_secs(10);
/// More than a datagram holds.
const DATAGRAM: usize = 1 << 16;

/// The first loopback address that `resolv.conf`'s text names as a resolver.
pub fn loopback_resolver(text: &str) -> Option<Ipv4Addr> {
    let addresses = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let address = words.next().filter(|word| *word == "nameserver");
        address.and_then(|_| words.next()?.parse::<Ipv4Addr>().ok())
    });
    addresses.into_iter().find(Ipv4Addr::is_loopback)
}

/// A resolver that a guest has. It loses it when this is dropped.
#[derive(Debug)]
pub struct Resolver {
    address: Ipv4Addr,
    relay: JoinHandle<()>,
}

impl Resolver {
    /// Gives the guest the resolver at `address` of the network namespace that this process is in. To be called in a tokio runtime whose
    /// threads are in it.
    ///
    /// # Errors
    /// When the guest cannot have it.
    pub async fn open(
        agent: &Agent,
        control: &ControlClient,
        address: Ipv4Addr,
    ) -> Result<Self, Error> {
        let failed = || Error::system("create a socket pair");
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(failed())?;
        for end in [&ours, &theirs] {
            end.set_nonblocking(true).map_err(failed())?;
        }
        let both = Some(theirs.as_fd());
        let port = control
            .attach(both, both, None)
            .map_err(|source| Error::Control {
                what: "attach a resolver",
                source,
            })?;
        drop(theirs);
        let stream = UnixStream::from_std(ours).map_err(failed())?;
        let server = SocketAddr::from((address, PORT));
        let relay = tokio::spawn(async move {
            if let Err(error) = relay(stream, server).await {
                tracing::warn!("the guest cannot resolve names at {server} any more: {error}");
            }
        });
        let resolver = Self { address, relay };
        agent.serve_resolver(address, port).await?;
        Ok(resolver)
    }

    /// Where it is.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.relay.abort();
    }
}

/// Asks what comes, as many questions at a time as the protocol has, until the guest is gone.
async fn relay(stream: UnixStream, server: SocketAddr) -> io::Result<()> {
    let (questions, answers) = stream.into_split();
    let (answered, to_send) = mpsc::channel(MAX_QUESTIONS);
    tokio::select! {
        ended = ask_all(questions, server, answered) => ended,
        ended = send_all(answers, to_send) => ended,
    }
}

async fn ask_all(
    mut questions: OwnedReadHalf,
    server: SocketAddr,
    answered: mpsc::Sender<Vec<u8>>,
) -> io::Result<()> {
    let room = Arc::new(Semaphore::new(MAX_QUESTIONS));
    loop {
        let place = Arc::clone(&room).acquire_owned().await;
        let place = place.map_err(io::Error::other)?;
        let mut header = [0; HEADER];
        if questions.read_exact(&mut header).await.is_err() {
            return Ok(());
        }
        let header = Header::read(header).ok_or(io::ErrorKind::InvalidData)?;
        let mut question = vec![0; header.length.into()];
        questions.read_exact(&mut question).await?;
        let answered = answered.clone();
        tokio::spawn(async move {
            let answer = tokio::time::timeout(PATIENCE, ask(header.protocol, server, &question));
            // The program that asked is told of none by silence, as by a resolver that is not there.
            let answer = answer.await.ok().and_then(Result::ok).unwrap_or_default();
            if let Some(frame) = Header::frame(header.protocol, header.number, &answer) {
                // Nobody is there to be told when the guest has gone.
                let _ = answered.send(frame).await;
            }
            drop(place);
        });
    }
}

async fn send_all(
    mut answers: OwnedWriteHalf,
    mut to_send: mpsc::Receiver<Vec<u8>>,
) -> io::Result<()> {
    while let Some(frame) = to_send.recv().await {
        answers.write_all(&frame).await?;
    }
    Ok(())
}

async fn ask(protocol: Protocol, server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    match protocol {
        Protocol::Udp => {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
            socket.connect(server).await?;
            socket.send(question).await?;
            let mut answer = vec![0; DATAGRAM];
            let length = socket.recv(&mut answer).await?;
            answer.truncate(length);
            Ok(answer)
        }
        Protocol::Tcp => {
            let mut stream = TcpStream::connect(server).await?;
            // RFC 1035 §4.2.2: a message is preceded by its length.
            let length = u16::try_from(question.len()).map_err(io::Error::other)?;
            stream.write_all(&length.to_be_bytes()).await?;
            stream.write_all(question).await?;
            let length = stream.read_u16().await?;
            let mut answer = vec![0; length.into()];
            stream.read_exact(&mut answer).await?;
            Ok(answer)
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn a_resolver_on_the_loopback_is_found_and_others_are_not() {
        let address = Some(Ipv4Addr::new(127, 0, 0, 11));
        let text = "# nameserver 127.0.0.1\nsearch x\nnameserver 10.0.0.1\nnameserver\t127.0.0.11 \noptions ndots:0\n";
        assert_eq!(loopback_resolver(text), address);
        for text in [
            "",
            "nameserver",
            "nameserver ::1",
            "nameserver 1.1.1.1",
            "server 127.0.0.1",
        ] {
            assert_eq!(loopback_resolver(text), None, "{text}");
        }
    }

    /// Sends frames, and gives what comes back until the relay ends or `expected` bytes are there.
    async fn exchange(frames: &[u8], server: SocketAddr, expected: usize) -> Vec<u8> {
        let (mut guest, host) = UnixStream::pair().unwrap();
        let relay = tokio::spawn(relay(host, server));
        guest.write_all(frames).await.unwrap();
        let mut answer = vec![0; expected];
        guest.read_exact(&mut answer).await.unwrap();
        drop(guest);
        relay.await.unwrap().unwrap();
        answer
    }

    #[tokio::test]
    async fn a_datagram_is_asked_as_one_and_a_streams_question_on_a_stream() {
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let server = udp.local_addr().unwrap();
        let tcp = TcpListener::bind(server).await.unwrap();
        tokio::spawn(async move {
            let mut question = [0; 16];
            let (length, from) = udp.recv_from(&mut question).await.unwrap();
            assert_eq!(&question[..length], b"udp?");
            udp.send_to(b"udp!", from).await.unwrap();
        });
        tokio::spawn(async move {
            let (mut client, _) = tcp.accept().await.unwrap();
            let mut question = [0; 6];
            client.read_exact(&mut question).await.unwrap();
            assert_eq!(&question, b"\0\x04tcp?");
            client.write_all(b"\0\x04tcp!").await.unwrap();
        });
        let frame = |protocol, number| Header::frame(protocol, number, b"x").unwrap();
        let udp = Header::frame(Protocol::Udp, 7, b"udp?").unwrap();
        let answer = exchange(&udp, server, frame(Protocol::Udp, 7).len() + 3).await;
        assert_eq!(answer, Header::frame(Protocol::Udp, 7, b"udp!").unwrap());
        let tcp = Header::frame(Protocol::Tcp, 9, b"tcp?").unwrap();
        let answer = exchange(&tcp, server, frame(Protocol::Tcp, 9).len() + 3).await;
        assert_eq!(answer, Header::frame(Protocol::Tcp, 9, b"tcp!").unwrap());
    }

    #[tokio::test]
    async fn a_resolver_that_is_not_there_gives_an_empty_answer() {
        let gone = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = gone.local_addr().unwrap();
        drop(gone);
        let question = Header::frame(Protocol::Tcp, 1, b"?").unwrap();
        let empty = Header::frame(Protocol::Tcp, 1, b"").unwrap();
        assert_eq!(exchange(&question, server, HEADER).await, empty);
    }

    #[tokio::test]
    async fn nonsense_ends_the_relay() {
        let (mut guest, host) = UnixStream::pair().unwrap();
        guest.write_all(&[9; HEADER]).await.unwrap();
        let server = SocketAddr::from(([127, 0, 0, 1], 1));
        relay(host, server).await.unwrap_err();
    }
}
