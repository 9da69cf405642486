//! One header block of a tar archive (POSIX.1-2024 pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format").

use tar::Header;

use super::{Time, broken};
use crate::error::LayerError;

/// The unit of a tar archive, bytes.
pub(super) const BLOCK: usize = 512;

/// The fields of a header block.
pub(super) struct Fields {
    pub(super) type_flag: u8,
    pub(super) path: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) size: u64,
    pub(super) mode: u32,
    /// Left as a result, since a PAX header replaces what does not fit here.
    pub(super) uid: Result<u32, LayerError>,
    pub(super) gid: Result<u32, LayerError>,
    pub(super) modified: Time,
    pub(super) major: u32,
    pub(super) minor: u32,
}

/// Checks the block's checksum and reads its fields.
pub(super) fn parse(block: &[u8; BLOCK]) -> Result<Fields, LayerError> {
    let header = Header::from_byte_slice(block);
    let old = header.as_old();
    let stored = number(&old.cksum);
    let others = block[..148].iter().chain(&block[156..]);
    // Some old archivers summed signed bytes.
    let unsigned = others.clone().map(|b| i64::from(*b)).sum::<i64>() + 8 * i64::from(b' ');
    let signed = others.map(|b| i64::from(*b as i8)).sum::<i64>() + 8 * i64::from(b' ');
    if stored != Some(unsigned) && stored != Some(signed) {
        return Err(broken("a header's checksum is wrong"));
    }
    let type_flag = old.linkflag[0];
    let (major, minor) = match (header.as_ustar(), header.as_gnu()) {
        (Some(h), _) => (&h.dev_major, &h.dev_minor),
        (_, Some(h)) => (&h.dev_major, &h.dev_minor),
        _ => (&[0; 8], &[0; 8]),
    };
    let is_device = matches!(type_flag, b'3' | b'4');
    let device = |field| {
        if is_device {
            natural(field, "device number")
        } else {
            Ok(0)
        }
    };
    Ok(Fields {
        type_flag,
        path: header.path_bytes().into_owned(),
        link: header.link_name_bytes().unwrap_or_default().into_owned(),
        size: number(&old.size)
            .and_then(|n| u64::try_from(n).ok())
            .ok_or_else(|| broken("an entry's size is no number"))?,
        mode: natural(&old.mode, "mode")?,
        uid: natural(&old.uid, "owner").and_then(|id| owner(id.into())),
        gid: natural(&old.gid, "group").and_then(|id| owner(id.into())),
        modified: Time {
            seconds: number(&old.mtime).ok_or_else(|| broken("an entry's time is no number"))?,
            nanoseconds: 0,
        },
        major: device(major)?,
        minor: device(minor)?,
    })
}

/// A user or group: 2³²−1 means "leave it as it is" to the kernel and is nobody's.
pub(super) fn owner(id: u64) -> Result<u32, LayerError> {
    u32::try_from(id)
        .ok()
        .filter(|id| *id != u32::MAX)
        .ok_or_else(|| broken(format!("{id} is no user or group")))
}

fn natural(field: &[u8], what: &str) -> Result<u32, LayerError> {
    number(field)
        .and_then(|n| u32::try_from(n).ok())
        .ok_or_else(|| broken(format!("an entry's {what} is no number")))
}

/// A numeric field: octal text ended and padded by spaces or NULs, nothing counting as 0; or, if the highest bit is set,
/// GNU's base 256, a big-endian two's complement number in the other bits.
pub(super) fn number(field: &[u8]) -> Option<i64> {
    let (first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        let negative = first & 0x40 != 0;
        let start = i64::from(first & 0x3f) - if negative { 0x40 } else { 0 };
        return rest
            .iter()
            .try_fold(start, |n, b| n.checked_mul(256)?.checked_add(i64::from(*b)));
    }
    let digits = field.trim_ascii_start();
    let end = digits
        .iter()
        .position(|b| matches!(b, b' ' | 0))
        .unwrap_or(digits.len());
    let (digits, padding) = digits.split_at(end);
    if padding.iter().any(|b| !matches!(b, b' ' | 0)) {
        return None;
    }
    digits.iter().try_fold(0_i64, |n, b| {
        let digit = i64::from(b.checked_sub(b'0').filter(|d| *d < 8)?);
        n.checked_mul(8)?.checked_add(digit)
    })
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn octal_numbers_may_be_padded() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   644 \0"), Some(0o644));
        assert_eq!(number(b"77777777777\0"), Some(0o77777777777));
        assert_eq!(number(b"777777777777"), Some(0o777777777777));
        assert_eq!(number(b"\0\0\0\0\0\0\0\0"), Some(0));
        assert_eq!(number(b"        "), Some(0));
    }

    #[test]
    fn what_is_no_number_is_none() {
        for field in [
            &b"0000648\0"[..],
            b"-000001\0",
            b"644x    ",
            b"12\x0034\0\0\0",
            b"abc",
            b"",
        ] {
            assert_eq!(number(field), None, "{field:?}");
        }
    }

    #[test]
    fn base_256_is_signed_and_cannot_overflow() {
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 1, 0]), Some(256));
        assert_eq!(
            number(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
            Some(-1)
        );
        assert_eq!(
            number(&[
                0x80, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff
            ]),
            Some(i64::MAX)
        );
        assert_eq!(number(&[0x80, 0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(number(&[0x80, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(number(&[0xbf; 12]), None);
        assert_eq!(
            number(&[0xff, 0xff, 0xff, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0]),
            Some(i64::MIN)
        );
    }
}
