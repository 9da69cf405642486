//! PAX extended headers: records of `LENGTH KEY=VALUE\n` that replace or add to the fields of the next header (POSIX.1-2024
//! pax, "pax Extended Header"). Values may contain anything, newlines included, so records are told apart by length alone.

use super::header::owner;
use super::sparse::Sparse;
use super::{Time, broken};
use crate::error::LayerError;

const XATTR: &[u8] = b"SCHILY.xattr.";

/// What an extended header says about the next entry.
#[derive(Default)]
pub(super) struct Extensions {
    present: bool,
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) modified: Option<Time>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: Sparse,
}

impl Extensions {
    /// Whether an extended header has been read.
    pub(super) fn is_set(&self) -> bool {
        self.present
    }

    /// Reads the content of an extended header. An entry can have only one.
    pub(super) fn parse(&mut self, mut text: &[u8]) -> Result<(), LayerError> {
        if std::mem::replace(&mut self.present, true) {
            return Err(broken("two extended headers describe one entry"));
        }
        while !text.is_empty() {
            let (key, value, rest) =
                record(text).ok_or_else(|| broken("an extended header has a malformed record"))?;
            self.set(key, value)?;
            text = rest;
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), LayerError> {
        if let Some(name) = key.strip_prefix(XATTR) {
            self.xattrs.push((name.to_vec(), value.to_vec()));
            return Ok(());
        }
        // An empty value takes back what an earlier record set.
        let given = (!value.is_empty()).then_some(value);
        match key {
            b"path" => self.path = given.map(<[u8]>::to_vec),
            b"linkpath" => self.link = given.map(<[u8]>::to_vec),
            b"size" => self.size = given.map(|v| decimal(v, key)).transpose()?,
            b"uid" => self.uid = given.map(|v| owner(decimal(v, key)?)).transpose()?,
            b"gid" => self.gid = given.map(|v| owner(decimal(v, key)?)).transpose()?,
            b"mtime" => {
                self.modified = given
                    .map(|v| time(v).ok_or_else(|| broken("an entry's time is no number")))
                    .transpose()?;
            }
            _ => self.sparse.set(key, value)?,
        }
        Ok(())
    }
}

/// Key, value and what follows the first record.
fn record(text: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = text.iter().take(20).position(|b| *b == b' ')?;
    let length = usize::try_from(parse(&text[..space])?).ok()?;
    let (record, rest) = text.split_at_checked(length)?;
    let (newline, record) = record.get(space + 1..)?.split_last()?;
    let equals = record.iter().position(|b| *b == b'=')?;
    let (key, value) = (&record[..equals], &record[equals + 1..]);
    (*newline == b'\n' && !key.is_empty()).then_some((key, value, rest))
}

/// A decimal value of a record.
pub(super) fn decimal(text: &[u8], key: &[u8]) -> Result<u64, LayerError> {
    parse(text).ok_or_else(|| {
        broken(format!(
            "the extended header's {} is no number",
            String::from_utf8_lossy(key)
        ))
    })
}

fn parse(text: &[u8]) -> Option<u64> {
    if text.is_empty() || text.len() > 20 {
        return None;
    }
    text.iter().try_fold(0_u64, |n, b| {
        let digit = u64::from(b.checked_sub(b'0').filter(|d| *d < 10)?);
        n.checked_mul(10)?.checked_add(digit)
    })
}

/// `[-]SECONDS[.FRACTION]`; digits beyond the nanosecond are cut off.
fn time(text: &[u8]) -> Option<Time> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |b| *b == b'.');
    let seconds = i64::try_from(parse(parts.next()?)?).ok()?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digits = fraction
        .iter()
        .copied()
        .chain(std::iter::repeat(b'0'))
        .take(9);
    let nanoseconds = digits.fold(0, |n, b| n * 10 + u32::from(b - b'0'));
    Some(match (negative, nanoseconds) {
        (false, _) => Time {
            seconds,
            nanoseconds,
        },
        (true, 0) => Time {
            seconds: -seconds,
            nanoseconds,
        },
        (true, _) => Time {
            seconds: -seconds - 1,
            nanoseconds: 1_000_000_000 - nanoseconds,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &[u8]) -> Result<Extensions, LayerError> {
        let mut extensions = Extensions::default();
        extensions.parse(text).map(|()| extensions)
    }

    #[test]
    fn a_value_may_contain_newlines_and_equal_signs() {
        let record = b"33 SCHILY.xattr.user.x=a\nb=c\0d\xff\n\n";
        assert_eq!(record.len(), 33 + 1 - 1);
        let extensions = parsed(record).unwrap();
        assert_eq!(
            extensions.xattrs,
            [(b"user.x".to_vec(), b"a\nb=c\0d\xff\n".to_vec())]
        );
    }

    #[test]
    fn times_keep_their_fraction_and_sign() {
        let at = |text: &[u8]| time(text).map(|t| (t.seconds, t.nanoseconds));
        assert_eq!(at(b"12.5"), Some((12, 500_000_000)));
        assert_eq!(at(b"12.0000000019"), Some((12, 1)));
        assert_eq!(at(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(at(b"-3"), Some((-3, 0)));
        assert_eq!(at(b"12."), Some((12, 0)));
        for text in [
            &b""[..],
            b"-",
            b"1.x",
            b"x",
            b"99999999999999999999",
            b"1e5",
            b".5",
        ] {
            assert_eq!(at(text), None, "{text:?}");
        }
    }

    #[test]
    fn an_empty_value_takes_back_an_earlier_one() {
        assert_eq!(parsed(b"9 path=x\n8 path=\n").unwrap().path, None);
    }

    #[test]
    fn malformed_records_are_refused() {
        let bad: [&[u8]; 12] = [
            b"x",
            b"9 path=x",
            b"11 path=x\n",
            b"8 path=x\n",
            b"0 \n",
            b" path=x\n",
            b"9 pathxx\n",
            b"6 =xx\n",
            b"-9 path=x\n",
            b"99999999999999999999999 path=x\n",
            b"18446744073709551615 path=x\n",
            b"9 path=x\n\n",
        ];
        for text in bad {
            assert!(parsed(text).is_err(), "{text:?}");
        }
        for text in [
            &b"9 size=x\n"[..],
            b"11 uid=-12\n",
            b"18 uid=4294967295\n",
            b"11 mtime=x\n",
        ] {
            assert!(parsed(text).is_err(), "{text:?}");
        }
    }
}
