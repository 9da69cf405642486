//! What a host client says before its stream to the guest exists: one line, `CONNECT <port>\n`. Not a byte beyond the line is
//! taken from the socket; what follows is the stream's.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

use super::descriptor::Watched;

/// Most clients that may be in the middle of their line at one time. One more makes the one that has taken longest give way.
pub(super) const MAX_HANDSHAKES: usize = 64;

/// Longest line in bytes, its end included: `CONNECT 4294967295` and a newline are 19.
const MAX_LINE: usize = 32;

/// A client in the middle of its line.
#[derive(Debug)]
pub(super) struct Handshake {
    client: Watched,
    line: [u8; MAX_LINE],
    len: usize,
}

/// How far a client has come.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// The line is not whole.
    Waiting,
    /// It wants that guest port.
    Connect(u32),
    /// It said something else; this is what to tell it.
    Refused(&'static str),
    /// It has hung up.
    Gone,
}

impl Handshake {
    pub(super) fn new(client: Watched) -> Self {
        Self {
            client,
            line: [0; MAX_LINE],
            len: 0,
        }
    }

    /// Reads what has come of the line.
    pub(super) fn advance(&mut self) -> Progress {
        loop {
            let room = &mut self.line[self.len..];
            if room.is_empty() {
                return Progress::Refused("the line is too long; expected: CONNECT <port>");
            }
            let seen = match receive(&self.client, room, MsgFlags::MSG_PEEK) {
                Ok(0) => return Progress::Gone,
                Ok(seen) => seen,
                Err(Errno::EAGAIN) => return Progress::Waiting,
                Err(_) => return Progress::Gone,
            };
            let end = room[..seen].iter().position(|&byte| byte == b'\n');
            let wanted = end.map_or(seen, |at| at + 1);
            // The same bytes again, this time for good. Another reader of the socket could only have made them fewer.
            if receive(&self.client, &mut room[..wanted], MsgFlags::empty()) != Ok(wanted) {
                return Progress::Gone;
            }
            self.len += wanted;
            if end.is_some() {
                return match parse(&self.line[..self.len]) {
                    Some(port) => Progress::Connect(port),
                    None => Progress::Refused("expected: CONNECT <port>"),
                };
            }
        }
    }

    /// Tells the client why it gets no stream.
    pub(super) fn refuse(self, reason: &str) {
        let line = format!("ERR {reason}\n");
        // A client that is gone, or has filled its socket before it said a word, goes without.
        let _ =
            super::io::write_slices(self.client.as_fd(), self.client.way(), line.as_bytes(), &[]);
    }
}

impl AsFd for Handshake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.client.as_fd()
    }
}

fn receive(client: &Watched, into: &mut [u8], flags: MsgFlags) -> Result<usize, Errno> {
    loop {
        match recv(
            client.as_fd().as_raw_fd(),
            into,
            flags | MsgFlags::MSG_DONTWAIT,
        ) {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}

/// The port of `CONNECT <port>\n`, decimal and nothing else.
fn parse(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?.strip_suffix(b"\n")?;
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn the_line_is_connect_and_a_port() {
        assert_eq!(parse(b"CONNECT 0\n"), Some(0));
        assert_eq!(parse(b"CONNECT 1024\n"), Some(1024));
        assert_eq!(parse(b"CONNECT 4294967295\n"), Some(u32::MAX));
    }

    #[test]
    fn anything_else_is_not() {
        for line in [
            &b""[..],
            b"\n",
            b"CONNECT\n",
            b"CONNECT \n",
            b"CONNECT  1\n",
            b"CONNECT 1 \n",
            b"CONNECT 1\r\n",
            b"CONNECT 1",
            b"CONNECT +1\n",
            b"CONNECT -1\n",
            b"CONNECT 0x10\n",
            b"CONNECT 4294967296\n",
            b"CONNECT \xff\n",
            b"connect 1\n",
            b" CONNECT 1\n",
            b"GET / HTTP/1.1\n",
        ] {
            assert_eq!(parse(line), None, "{line:?}");
        }
    }
}
