//! Hardware addresses.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Error;

/// The hardware address of one interface (IEEE 802 MAC-48): neither a group address nor all zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac([u8; 6]);

impl Mac {
    /// Checks that `bytes` can be one interface's address.
    ///
    /// # Errors
    /// [`Error::Mac`].
    pub fn new(bytes: [u8; 6]) -> Result<Self, Error> {
        let mac = Self(bytes);
        if bytes[0] & 1 != 0 || bytes == [0; 6] {
            let why = "it is a group address or all zeroes".to_owned();
            return Err(Error::Mac {
                mac: mac.to_string(),
                why,
            });
        }
        Ok(mac)
    }

    /// A locally administered address that differs where the IPv4 addresses differ, so that leases never share one.
    pub(crate) fn of(address: Ipv4Addr) -> Self {
        let [a, b, c, d] = address.octets();
        Self([0x02, 0xc1, a, b, c, d])
    }

    /// The six bytes, in the order in which they are sent.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }

    /// The link-local address that Linux gives an interface with this hardware address (RFC 4291, appendix A).
    pub fn link_local(self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.0;
        let pair = |high: u8, low: u8| u16::from_be_bytes([high, low]);
        Ipv6Addr::new(
            0xfe80,
            0,
            0,
            0,
            pair(a ^ 2, b),
            pair(c, 0xff),
            pair(0xfe, d),
            pair(e, f),
        )
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            *byte = parts
                .next()
                .filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))
                .and_then(|part| u8::from_str_radix(part, 16).ok())
                .ok_or_else(|| malformed(text))?;
        }
        if parts.next().is_some() {
            return Err(malformed(text));
        }
        Self::new(bytes)
    }
}

fn malformed(text: &str) -> Error {
    Error::Syntax {
        what: "the hardware address",
        given: text.to_owned(),
        why: "give six pairs of hexadecimal digits with colons between them",
    }
}

impl TryFrom<String> for Mac {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hardware_address_is_six_bytes_of_one_interface() {
        let mac: Mac = "02:c1:0A:58:00:05".parse().unwrap();
        assert_eq!(mac.to_string(), "02:c1:0a:58:00:05");
        for bad in [
            "",
            "02:c1:0a:58:00",
            "02:c1:0a:58:00:05:06",
            "2:c1:0a:58:00:05",
            "02-c1-0a-58-00-05",
            "+2:c1:0a:58:00:05",
            "01:00:5e:00:00:01",
            "00:00:00:00:00:00",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn the_link_local_address_is_what_linux_makes_of_it() {
        let mac: Mac = "02:fc:00:ff:fe:01".parse().unwrap();
        assert_eq!(mac.link_local().to_string(), "fe80::fc:ff:feff:fe01");
    }
}
