//! rtnetlink(7), as little of it as interfaces need: a request is built byte by byte and the kernel's answer waited for, which it gives
//! at once. A general library would be the larger part of the agent.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send,
    socket,
};

/// Length of `struct nlmsghdr`, and of `struct nlattr`.
const HEADER: usize = 16;
const ATTRIBUTE_HEADER: usize = 4;
/// More than the kernel puts into one message of a dump, or answers to [`BATCH`] requests; each page that is touched costs a guest more
/// than a system call.
const BUFFER: usize = 16 << 10;
/// Most requests that are sent at once: there is room for the answers to them (`net.core.rmem_default`).
const BATCH: usize = 64;

/// A request under construction: a header, a fixed part, and attributes.
#[derive(Debug, Clone)]
pub struct Request(Vec<u8>);

impl Request {
    /// A request of type `kind` (RTM_…) with the flags beyond NLM_F_REQUEST; `fixed` is the structure that it begins with.
    pub fn new(kind: u16, flags: libc::c_int, fixed: &[u8]) -> Self {
        // Flags of netlink have sixteen bits.
        let flags = (flags | libc::NLM_F_REQUEST) as u16;
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        // Sequence number and port, which tell requests of several askers apart: there is one, and what it sends at once it numbers.
        bytes.extend([0; 8]);
        bytes.extend(fixed);
        Self(bytes)
    }

    /// Adds an attribute.
    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        // Values are addresses, numbers and names.
        let length = (ATTRIBUTE_HEADER + value.len()) as u16;
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// Adds an attribute if there is a value for it.
    pub fn maybe(self, kind: u16, value: Option<&[u8]>) -> Self {
        match value {
            Some(value) => self.attribute(kind, value),
            None => self,
        }
    }

    fn finish(mut self) -> Vec<u8> {
        let length = self.0.len() as u32;
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }
}

/// A request that changes something, and the one refusal that says that nothing has to be changed.
#[derive(Debug, Clone)]
pub struct Change {
    request: Request,
    unless: Option<i32>,
}

impl Change {
    pub fn new(request: Request) -> Self {
        Self {
            request,
            unless: None,
        }
    }

    /// That this is refused with this error is no error.
    pub fn unless(self, number: i32) -> Self {
        Self {
            unless: Some(number),
            ..self
        }
    }
}

/// A socket to the kernel, for the network namespace it was opened in.
#[derive(Debug)]
pub struct Netlink(OwnedFd);

impl Netlink {
    pub fn open() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        connect(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self(socket))
    }

    /// The socket, for what only ioctl(2) does.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Has the kernel make all of `changes`, in this order, with as few messages as will do. The error is that of the first that it refuses;
    /// those behind it have been tried.
    pub fn make(&self, changes: &[Change]) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        let mut failed = None;
        for some in changes.chunks(BATCH) {
            let mut bytes = Vec::new();
            for (sequence, change) in (0u32..).zip(some) {
                let mut request = change.request.clone();
                request.0[6] |= libc::NLM_F_ACK as u8;
                request.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
                bytes.extend(request.finish());
            }
            send(self.0.as_raw_fd(), &bytes, MsgFlags::empty())?;
            let mut answered = 0;
            while answered < some.len() {
                let length = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
                for (kind, sequence, body) in numbered(&buffer[..length]) {
                    if i32::from(kind) != libc::NLMSG_ERROR {
                        continue;
                    }
                    answered += 1;
                    let unless = some.get(sequence as usize).and_then(|change| change.unless);
                    if let Err(error) = answer(body)
                        && (error.raw_os_error() != unless || unless.is_none())
                    {
                        failed.get_or_insert(error);
                    }
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Has the kernel list something: `each` gets the type of each message and what follows its header.
    pub fn list(&self, request: Request, mut each: impl FnMut(u16, &[u8])) -> io::Result<()> {
        send(self.0.as_raw_fd(), &request.finish(), MsgFlags::empty())?;
        let mut buffer = vec![0; BUFFER];
        loop {
            let length = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            for (kind, body) in messages(&buffer[..length]) {
                match i32::from(kind) {
                    libc::NLMSG_DONE => return Ok(()),
                    libc::NLMSG_ERROR => return answer(body),
                    _ => each(kind, body),
                }
            }
        }
    }
}

/// What an NLMSG_ERROR says: a negative error number, or zero.
fn answer(body: &[u8]) -> io::Result<()> {
    let number = body.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes));
    match number {
        Some(0) => Ok(()),
        Some(number) => Err(Errno::from_raw(number.wrapping_neg()).into()),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// The messages in `bytes`: their types, and what follows their headers.
fn messages(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    numbered(bytes).map(|(kind, _, body)| (kind, body))
}

/// The same with their sequence numbers.
fn numbered(bytes: &[u8]) -> impl Iterator<Item = (u16, u32, &[u8])> {
    let whole = pieces(bytes, HEADER, |header| {
        let length = u32::from_ne_bytes(*header.first_chunk()?);
        let kind = u16::from_ne_bytes(*header.get(4..)?.first_chunk()?);
        let sequence = u32::from_ne_bytes(*header.get(8..)?.first_chunk()?);
        Some((length as usize, (kind, sequence)))
    });
    whole.map(|((kind, sequence), body)| (kind, sequence, body))
}

/// The attributes in `bytes`: their types and values.
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    pieces(bytes, ATTRIBUTE_HEADER, |header| {
        let length = u16::from_ne_bytes(*header.first_chunk()?);
        let kind = u16::from_ne_bytes(*header.get(2..)?.first_chunk()?);
        Some((length.into(), kind))
    })
}

/// Cuts `bytes` into pieces that begin with a header which tells the whole piece's length, and are aligned to four bytes. What is cut
/// short ends the sequence.
fn pieces<T>(
    mut bytes: &[u8],
    header: usize,
    read: impl Fn(&[u8]) -> Option<(usize, T)>,
) -> impl Iterator<Item = (T, &[u8])> {
    std::iter::from_fn(move || {
        let (length, kind) = read(bytes)?;
        let body = bytes.get(header..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_what_the_kernel_reads() {
        let request = Request::new(16, libc::NLM_F_ACK, &[1, 2, 3, 4])
            .attribute(3, b"eth0\0")
            .maybe(4, None)
            .maybe(5, Some(&[9]));
        let bytes = request.finish();
        let mut wanted = vec![40, 0, 0, 0, 16, 0, 5, 0];
        wanted.extend([0; 8]);
        wanted.extend([1, 2, 3, 4]);
        wanted.extend([9, 0, 3, 0, b'e', b't', b'h', b'0', 0, 0, 0, 0]);
        wanted.extend([5, 0, 5, 0, 9, 0, 0, 0]);
        assert_eq!(bytes, wanted);
        let read: Vec<_> = attributes(&bytes[20..]).collect();
        assert_eq!(read, [(3, &b"eth0\0"[..]), (5, &[9][..])]);
    }

    #[test]
    fn what_is_cut_short_or_lies_about_its_length_ends_the_reading() {
        for bytes in [
            &[][..],
            &[8],
            &[8, 0, 1, 0],
            &[3, 0, 1, 0, 0, 0, 0, 0],
            &[0, 0, 1, 0],
            &[0xff, 0xff, 1, 0, 1],
        ] {
            assert_eq!(attributes(bytes).count(), 0, "{bytes:?}");
            assert_eq!(messages(bytes).count(), 0, "{bytes:?}");
        }
        let mut first_good = vec![5, 0, 1, 0, 7, 0, 0, 0];
        first_good.extend([9, 0, 2, 0, 1]);
        assert_eq!(attributes(&first_good).collect::<Vec<_>>(), [(1, &[7][..])]);
    }

    #[test]
    fn the_kernel_answers_and_refuses() {
        let netlink = Netlink::open().unwrap();
        let mut names = Vec::new();
        let all = Request::new(libc::RTM_GETLINK, libc::NLM_F_DUMP, &[0; 16]);
        netlink
            .list(all, |_, body| {
                let name = attributes(&body[16..]).find(|(kind, _)| *kind == libc::IFLA_IFNAME);
                names.extend(name.map(|(_, name)| name.to_vec()));
            })
            .unwrap();
        assert!(names.contains(&b"lo\0".to_vec()));
        let nonsense = || Change::new(Request::new(libc::RTM_DELLINK, 0, &[0; 16]));
        let refused = netlink.make(&[nonsense(), nonsense()]).unwrap_err();
        let number = refused.raw_os_error().unwrap();
        let many: Vec<_> = (0..3 * BATCH).map(|_| nonsense().unless(number)).collect();
        netlink.make(&many).unwrap();
        netlink
            .make(&[nonsense().unless(number), nonsense().unless(number + 1)])
            .unwrap_err();
        netlink.make(&[]).unwrap();
    }
}
