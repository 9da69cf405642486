//! A resolver of the host's on the guest's loopback. Callers such as docker answer the names of their networks at a loopback
//! address of the container's network namespace, which on the host is another loopback than here. What is asked at that address in
//! the guest is passed to the host (`cloison_agent_api::resolver`), which asks there.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use cloison_agent_api::resolver::{HEADER, Header, MAX_QUESTIONS, Protocol};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::connect::Stream;

/// Where names are resolved.
const PORT: u16 = 53;
/// More than a datagram holds.
const DATAGRAM: usize = 1 << 16;
/// Most clients that ask by TCP at a time; more wait to be accepted.
const MAX_CLIENTS: usize = 32;

/// Who waits for an answer.
enum Asker {
    Udp(SocketAddr),
    Tcp(oneshot::Sender<Vec<u8>>),
}

/// A question by TCP, and where its answer goes.
type Question = (Vec<u8>, oneshot::Sender<Vec<u8>>);

/// The sockets that programs of the guest ask at.
pub struct Resolver {
    udp: UdpSocket,
    tcp: TcpListener,
}

impl Resolver {
    /// Listens at `address`.
    pub async fn bind(address: Ipv4Addr) -> io::Result<Self> {
        Ok(Self {
            udp: UdpSocket::bind((address, PORT)).await?,
            tcp: TcpListener::bind((address, PORT)).await?,
        })
    }

    /// Passes questions to the host and answers back, until the host ends the stream.
    pub async fn serve(self, host: OwnedFd) -> io::Result<()> {
        let (from_host, to_host) = tokio::io::split(Stream::new(host)?);
        let (answered, answers) = mpsc::channel(MAX_QUESTIONS);
        let (asked, questions) = mpsc::channel(MAX_QUESTIONS);
        let Self { udp, tcp } = self;
        tokio::select! {
            ended = read_answers(from_host, answered) => ended,
            ended = pass(udp, to_host, answers, questions) => ended,
            ended = accept(tcp, asked) => ended,
        }
    }
}

/// What is under way, by number.
#[derive(Default)]
struct Pending {
    askers: HashMap<u16, Asker>,
    last: u16,
}

impl Pending {
    /// A number for one more; `None` when there are too many. Programs ask again.
    fn add(&mut self, asker: Asker) -> Option<u16> {
        if self.askers.len() >= MAX_QUESTIONS {
            return None;
        }
        while self.askers.contains_key(&self.last) {
            self.last = self.last.wrapping_add(1);
        }
        let number = self.last;
        self.last = self.last.wrapping_add(1);
        self.askers.insert(number, asker);
        Some(number)
    }
}

async fn pass(
    udp: UdpSocket,
    mut to_host: WriteHalf<Stream>,
    mut answers: mpsc::Receiver<(Header, Vec<u8>)>,
    mut questions: mpsc::Receiver<Question>,
) -> io::Result<()> {
    let mut pending = Pending::default();
    let mut datagram = vec![0; DATAGRAM];
    loop {
        let (protocol, asker, question) = tokio::select! {
            received = udp.recv_from(&mut datagram) => match received {
                Ok((length, from)) => (Protocol::Udp, Asker::Udp(from), datagram[..length].to_vec()),
                // An answer that could not be delivered is reported here.
                Err(_) => continue,
            },
            Some((question, asker)) = questions.recv() => (Protocol::Tcp, Asker::Tcp(asker), question),
            Some((header, content)) = answers.recv() => {
                match pending.askers.remove(&header.number) {
                    // A program that does not wait any more needs no answer.
                    Some(Asker::Udp(to)) if !content.is_empty() => {
                        let _ = udp.send_to(&content, to).await;
                    }
                    Some(Asker::Tcp(to)) => {
                        let _ = to.send(content);
                    }
                    _ => {}
                }
                continue;
            }
        };
        let Some(number) = pending.add(asker) else {
            continue;
        };
        if let Some(frame) = Header::frame(protocol, number, &question) {
            to_host.write_all(&frame).await?;
        }
    }
}

async fn read_answers(
    mut from_host: ReadHalf<Stream>,
    answered: mpsc::Sender<(Header, Vec<u8>)>,
) -> io::Result<()> {
    loop {
        let mut header = [0; HEADER];
        if from_host.read_exact(&mut header).await.is_err() {
            return Ok(());
        }
        let header = Header::read(header).ok_or(io::ErrorKind::InvalidData)?;
        let mut content = vec![0; header.length.into()];
        from_host.read_exact(&mut content).await?;
        if answered.send((header, content)).await.is_err() {
            return Ok(());
        }
    }
}

async fn accept(tcp: TcpListener, asked: mpsc::Sender<Question>) -> io::Result<()> {
    let room = Arc::new(Semaphore::new(MAX_CLIENTS));
    loop {
        let place = Arc::clone(&room).acquire_owned().await;
        let place = place.map_err(io::Error::other)?;
        let Ok((client, _)) = tcp.accept().await else {
            continue;
        };
        let asked = asked.clone();
        tokio::spawn(async move {
            let _place = place;
            // However it ends, the client sees its connection end.
            let _ = converse(client, asked).await;
        });
    }
}

/// Questions of one client, one after the other (RFC 1035 §4.2.2: each is preceded by its length).
async fn converse(mut client: TcpStream, asked: mpsc::Sender<Question>) -> io::Result<()> {
    while let Some(question) = message(&mut client).await? {
        let (answer, answered) = oneshot::channel();
        if asked.send((question, answer)).await.is_err() {
            return Ok(());
        }
        let content = answered.await.unwrap_or_default();
        let Ok(length @ 1..) = u16::try_from(content.len()) else {
            return Ok(());
        };
        client.write_all(&length.to_be_bytes()).await?;
        client.write_all(&content).await?;
    }
    Ok(())
}

async fn message(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 2];
    match from.read_exact(&mut length).await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    };
    let mut message = vec![0; u16::from_be_bytes(length).into()];
    from.read_exact(&mut message).await?;
    Ok(Some(message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_under_way_have_numbers_of_their_own_and_are_bounded() {
        let mut pending = Pending::default();
        let from = SocketAddr::from(([127, 0, 0, 1], 9));
        pending.last = u16::MAX;
        let numbers: Vec<_> = (0..MAX_QUESTIONS)
            .map(|_| pending.add(Asker::Udp(from)).unwrap())
            .collect();
        assert_eq!(numbers[..3], [u16::MAX, 0, 1]);
        assert_eq!(pending.add(Asker::Udp(from)), None);
        pending.askers.remove(&0);
        assert!(pending.add(Asker::Udp(from)).is_some());
    }

    #[tokio::test]
    async fn a_message_that_is_cut_short_is_an_error_and_no_message_the_end() {
        assert_eq!(message(&mut &b""[..]).await.unwrap(), None);
        assert_eq!(
            message(&mut &b"\0\x02ab"[..]).await.unwrap().unwrap(),
            b"ab"
        );
        message(&mut &b"\0\x05ab"[..]).await.unwrap_err();
    }
}
