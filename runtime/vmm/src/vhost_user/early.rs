//! One request that comes before its time. QEMU enables the rings of a net device when it makes the device, and again when the guest starts
//! it (10.0, hw/net/virtio-net.c and vhost_net.c), both times before the features are agreed on that allow it, and waits for an answer; the
//! library that reads our requests refuses it without one.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nix::sys::socket::{MsgFlags, recv};

/// VHOST_USER_SET_VRING_ENABLE.
const SET_VRING_ENABLE: u32 = 18;
/// Flags of a message: the protocol's version, that it is an answer, that it wants one.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// Length of the request: request, flags and size of what follows, 32 bits each; an index and a number.
const LENGTH: usize = 20;

/// A ring is to be enabled, or not.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Enable {
    pub(super) ring: usize,
    pub(super) enable: bool,
}

/// Takes and answers the next request on `socket` if it is that one.
pub(super) fn take(socket: &UnixStream) -> io::Result<Option<Enable>> {
    let mut request = [0; LENGTH];
    let length = recv(socket.as_raw_fd(), &mut request, MsgFlags::MSG_PEEK)?;
    let word = |at: usize| {
        let bytes = request.get(at..).and_then(<[u8]>::first_chunk);
        bytes.map_or(0, |bytes| u32::from_ne_bytes(*bytes))
    };
    // QEMU sends a request as a whole.
    if length < LENGTH || word(0) != SET_VRING_ENABLE {
        return Ok(None);
    }
    let wants_answer = word(4) & NEED_REPLY != 0;
    let enable = Enable {
        ring: word(12) as usize,
        enable: word(16) != 0,
    };
    let mut socket = socket;
    socket.read_exact(&mut request)?;
    if wants_answer {
        let mut answer = Vec::new();
        for word in [SET_VRING_ENABLE, VERSION | REPLY, 8, 0, 0] {
            answer.extend(word.to_ne_bytes());
        }
        socket.write_all(&answer)?;
    }
    Ok(Some(enable))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(code: u32, flags: u32) -> Vec<u8> {
        let words = [code, flags, 8, 0, 1];
        words.into_iter().flat_map(u32::to_ne_bytes).collect()
    }

    #[test]
    fn the_request_is_taken_and_answered_as_it_wants_to_be() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        for (flags, answer) in [(VERSION, 0), (VERSION | NEED_REPLY, LENGTH)] {
            theirs.write_all(&request(SET_VRING_ENABLE, flags)).unwrap();
            let enable = Enable {
                ring: 0,
                enable: true,
            };
            assert_eq!(take(&ours).unwrap(), Some(enable));
            theirs.set_nonblocking(true).unwrap();
            let mut got = [0; 64];
            assert_eq!(theirs.read(&mut got).unwrap_or(0), answer);
        }
    }

    #[test]
    fn every_other_request_is_left_where_it_is() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let other = request(2, VERSION);
        theirs.write_all(&other).unwrap();
        assert_eq!(take(&ours).unwrap(), None);
        let mut got = [0; LENGTH];
        (&ours).read_exact(&mut got).unwrap();
        assert_eq!(got[..], other);
        theirs.write_all(&other[..12]).unwrap();
        assert_eq!(take(&ours).unwrap(), None);
        (&ours).read_exact(&mut got[..12]).unwrap();
        drop(theirs);
        assert_eq!(take(&ours).unwrap(), None, "the end is no request");
    }
}
