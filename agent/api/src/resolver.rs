//! Questions to a resolver of the host's, and their answers, on one stream between agent and host. Neither side looks into them:
//! what a program in the guest asked by UDP or TCP is asked in the same way on the host. Every question has one answer.
//!
//! A frame is a header and that many bytes: protocol (1 byte), number of the question (2, big-endian), length (2, big-endian).

/// Length of a frame's header, bytes.
pub const HEADER: usize = 5;

/// The most questions that are under way at a time. The guest asks no more; the host lets more wait.
pub const MAX_QUESTIONS: usize = 64;

/// How a question was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// In a datagram.
    Udp,
    /// On a stream.
    Tcp,
}

/// What a frame begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// How the question was asked.
    pub protocol: Protocol,
    /// Tells the questions that are under way apart.
    pub number: u16,
    /// Length of what follows, bytes. An answer of no bytes says that there was none.
    pub length: u16,
}

impl Header {
    /// As it is sent.
    pub fn bytes(self) -> [u8; HEADER] {
        let protocol = match self.protocol {
            Protocol::Udp => 0,
            Protocol::Tcp => 1,
        };
        let ([a, b], [c, d]) = (self.number.to_be_bytes(), self.length.to_be_bytes());
        [protocol, a, b, c, d]
    }

    /// Reads one; `None` when it is none.
    pub fn read(bytes: [u8; HEADER]) -> Option<Self> {
        let [protocol, a, b, c, d] = bytes;
        let protocol = match protocol {
            0 => Protocol::Udp,
            1 => Protocol::Tcp,
            _ => return None,
        };
        Some(Self {
            protocol,
            number: u16::from_be_bytes([a, b]),
            length: u16::from_be_bytes([c, d]),
        })
    }

    /// A whole frame; `None` for content that is too long for one.
    pub fn frame(protocol: Protocol, number: u16, content: &[u8]) -> Option<Vec<u8>> {
        let length = u16::try_from(content.len()).ok()?;
        let header = Self {
            protocol,
            number,
            length,
        };
        Some([&header.bytes(), content].concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_as_it_was_written() {
        for protocol in [Protocol::Udp, Protocol::Tcp] {
            let header = Header {
                protocol,
                number: 0x1234,
                length: 0xfffe,
            };
            assert_eq!(Header::read(header.bytes()), Some(header));
        }
        let frame = Header::frame(Protocol::Tcp, 0x0102, b"xyz");
        assert_eq!(frame.unwrap(), b"\x01\x01\x02\x00\x03xyz");
    }

    #[test]
    fn what_is_no_header_and_what_does_not_fit_is_refused() {
        assert_eq!(Header::read([2, 0, 0, 0, 0]), None);
        assert_eq!(Header::frame(Protocol::Udp, 0, &[0; 1 << 16]), None);
    }
}
