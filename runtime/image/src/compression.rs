//! Compression of layers and archives: what the first bytes say it is, and a reader that undoes it.

use std::io::{BufReader, Read};

use flate2::bufread::MultiGzDecoder;

/// How a stream is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
    /// Seen in the wild, supported by no image specification.
    Other(&'static str),
}

/// Bytes needed to recognize a compression.
pub(crate) const MAGIC_LEN: usize = 6;

const MAGIC: [(&[u8], Compression); 5] = [
    (&[0x1f, 0x8b], Compression::Gzip),
    (&[0x28, 0xb5, 0x2f, 0xfd], Compression::Zstd),
    (&[0xfd, b'7', b'z', b'X', b'Z', 0], Compression::Other("xz")),
    (b"BZh", Compression::Other("bzip2")),
    (&[0x04, 0x22, 0x4d, 0x18], Compression::Other("lz4")),
];

impl Compression {
    /// By a stream's first [`MAGIC_LEN`] bytes, or all of them if there are fewer.
    pub(crate) fn of(start: &[u8]) -> Compression {
        // A zstd stream may begin with a skippable frame: sixteen magic numbers (RFC 8878 §3.1.2).
        if matches!(start, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..]) {
            return Compression::Zstd;
        }
        MAGIC
            .into_iter()
            .find(|(magic, _)| start.starts_with(magic))
            .map_or(Compression::None, |(_, found)| found)
    }

    /// For a person.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Compression::None => "an uncompressed tar archive",
            Compression::Gzip => "gzip",
            Compression::Zstd => "zstd",
            Compression::Other(name) => name,
        }
    }

    /// The content of a compressed stream; `None` if it cannot be undone. Several members or frames in a row are one stream.
    pub(crate) fn decoder<'a>(
        self,
        input: impl Read + 'a,
    ) -> Option<std::io::Result<Box<dyn Read + 'a>>> {
        let input = BufReader::with_capacity(1 << 17, input);
        match self {
            Compression::None => Some(Ok(Box::new(input))),
            Compression::Gzip => Some(Ok(Box::new(MultiGzDecoder::new(input)))),
            // The decoder takes at most 128 MiB of window, the library's own limit.
            Compression::Zstd => {
                Some(zstd::Decoder::with_buffer(input).map(|d| Box::new(d) as Box<dyn Read + 'a>))
            }
            Compression::Other(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    fn undo(stream: &[u8]) -> std::io::Result<Vec<u8>> {
        let mut content = Vec::new();
        Compression::of(stream)
            .decoder(stream)
            .unwrap()?
            .read_to_end(&mut content)?;
        Ok(content)
    }

    #[test]
    fn what_compressors_write_is_recognized_and_undone() {
        let zstd = |content: &[u8]| zstd::encode_all(content, 1).unwrap();
        assert_eq!(undo(b"plain").unwrap(), b"plain");
        assert_eq!(undo(b"").unwrap(), b"");
        assert_eq!(
            undo(&[gzip(b"one"), gzip(b"two")].concat()).unwrap(),
            b"onetwo"
        );
        assert_eq!(
            undo(&[zstd(b"one"), zstd(b"two")].concat()).unwrap(),
            b"onetwo"
        );
        let skippable = [
            &[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 9, 9, 9][..],
            &zstd(b"one"),
        ]
        .concat();
        assert_eq!(undo(&skippable).unwrap(), b"one");
    }

    #[test]
    fn a_truncated_stream_is_an_error() {
        for stream in [
            gzip(&[5; 5000]),
            zstd::encode_all(&[5; 5000][..], 1).unwrap(),
        ] {
            assert!(undo(&stream[..stream.len() - 3]).is_err());
        }
    }
}
