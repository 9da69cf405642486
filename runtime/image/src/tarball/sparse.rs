//! Sparse files: where the pieces of content that an archive holds belong in the file (GNU tar manual, "Storing Sparse
//! Files": the old GNU format and PAX formats 0.0, 0.1 and 1.0).

use tar::{GnuExtSparseHeader, GnuSparseHeader, Header};

use super::header::{BLOCK, number};
use super::pax::decimal;
use super::{Archive, Input, broken};
use crate::error::LayerError;

/// Most pieces of one sparse file.
const MAX_CHUNKS: usize = 1 << 18;

/// A piece of a file's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// Where it belongs in the file, bytes.
    pub(crate) offset: u64,
    /// Its length, bytes.
    pub(crate) length: u64,
}

/// A sparse file's size and content.
pub(super) struct Map {
    pub(super) size: u64,
    pub(super) chunks: Vec<Chunk>,
}

impl Map {
    /// Checks that the chunks are in order and apart, within the file, and as long together as the content in the archive.
    fn checked(size: u64, chunks: Vec<Chunk>, content: u64) -> Result<Map, LayerError> {
        let mut end = 0_u64;
        let mut total = 0_u64;
        for chunk in &chunks {
            if chunk.offset < end {
                return Err(broken("the pieces of a sparse file overlap"));
            }
            end = chunk
                .offset
                .checked_add(chunk.length)
                .ok_or_else(|| broken("a sparse file is too large"))?;
            total += chunk.length;
        }
        if size > i64::MAX as u64 || end > size {
            return Err(broken("a sparse file's pieces do not fit into it"));
        }
        if total != content {
            return Err(broken(
                "a sparse file's pieces are not as long as its content",
            ));
        }
        Ok(Map { size, chunks })
    }
}

/// What PAX records say about a sparse file.
#[derive(Default)]
pub(super) struct Sparse {
    /// The file's name; the header has another one for readers that do not know sparse files.
    pub(super) name: Option<Vec<u8>>,
    size: Option<u64>,
    major: Option<u64>,
    /// Offsets and lengths in turn.
    numbers: Vec<u64>,
}

impl Sparse {
    /// Whether any record made the entry a sparse file.
    pub(super) fn is_sparse(&self) -> bool {
        self.size.is_some() || self.major.is_some() || !self.numbers.is_empty()
    }

    /// Takes a record; keys of other things are ignored.
    pub(super) fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), LayerError> {
        match key {
            b"GNU.sparse.name" => self.name = Some(value.to_vec()),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.size = Some(decimal(value, key)?),
            b"GNU.sparse.major" => self.major = Some(decimal(value, key)?),
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                let is_offset = key == b"GNU.sparse.offset";
                if is_offset != self.numbers.len().is_multiple_of(2) {
                    return Err(broken("a sparse file's map is out of order"));
                }
                self.push(decimal(value, key)?)?;
            }
            b"GNU.sparse.map" => {
                for text in value.split(|b| *b == b',').filter(|_| !value.is_empty()) {
                    self.push(decimal(text, key)?)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The map of the entry whose content `archive` is about to read; format 1.0 has it at the content's beginning.
    pub(super) fn map(mut self, archive: &mut Archive<impl Input>) -> Result<Map, LayerError> {
        match self.major {
            None | Some(0) => {}
            Some(1) => {
                let mut text = MapText {
                    archive: &mut *archive,
                    block: [0; BLOCK],
                    next: BLOCK,
                };
                let count = text.number()?;
                for _ in 0..count.saturating_mul(2) {
                    let number = text.number()?;
                    self.push(number)?;
                }
            }
            Some(_) => return Err(broken("a sparse file is of an unknown version")),
        }
        let size = self
            .size
            .ok_or_else(|| broken("a sparse file has no size"))?;
        if !self.numbers.len().is_multiple_of(2) {
            return Err(broken("a sparse file's map is incomplete"));
        }
        let chunks = self
            .numbers
            .chunks_exact(2)
            .map(|n| Chunk {
                offset: n[0],
                length: n[1],
            })
            .collect();
        Map::checked(size, chunks, archive.content())
    }

    fn push(&mut self, number: u64) -> Result<(), LayerError> {
        if self.numbers.len() >= 2 * MAX_CHUNKS {
            return Err(too_many());
        }
        self.numbers.push(number);
        Ok(())
    }
}

/// The numbers at the beginning of a sparse file's content in format 1.0: decimal, a newline after each, padded to a block.
struct MapText<'a, I> {
    archive: &'a mut Archive<I>,
    block: [u8; BLOCK],
    next: usize,
}

impl<I: Input> MapText<'_, I> {
    fn number(&mut self) -> Result<u64, LayerError> {
        let mut digits = Vec::new();
        loop {
            match self.byte()? {
                b'\n' => return decimal(&digits, b"GNU.sparse.map"),
                digit if digits.len() < 20 => digits.push(digit),
                _ => return Err(broken("a sparse file's map is malformed")),
            }
        }
    }

    fn byte(&mut self) -> Result<u8, LayerError> {
        if self.next == BLOCK {
            let mut filled = 0;
            while filled < BLOCK {
                match self
                    .archive
                    .read_content(&mut self.block[filled..])
                    .map_err(LayerError::Read)?
                {
                    0 => return Err(broken("a sparse file's map is incomplete")),
                    n => filled += n,
                }
            }
            self.next = 0;
        }
        self.next += 1;
        Ok(self.block[self.next - 1])
    }
}

/// The map of an entry of the old GNU type: four pieces in the header, further ones in blocks after it, then `content` bytes.
pub(super) fn gnu_map(
    block: &[u8; BLOCK],
    content: u64,
    archive: &mut Archive<impl Input>,
) -> Result<Map, LayerError> {
    let header = Header::from_byte_slice(block)
        .as_gnu()
        .ok_or_else(|| broken("a sparse file has no GNU header"))?;
    let size = field(&header.realsize)?;
    let mut chunks = Vec::new();
    add(&mut chunks, &header.sparse)?;
    let mut extended = header.is_extended();
    while extended {
        let block = archive
            .block()?
            .ok_or_else(|| broken("it ends within a sparse file's map"))?;
        let mut more = GnuExtSparseHeader::new();
        more.as_mut_bytes().copy_from_slice(&block);
        let before = chunks.len();
        add(&mut chunks, more.sparse())?;
        extended = more.is_extended();
        if extended && chunks.len() == before {
            return Err(broken("a sparse file's map has an empty block"));
        }
    }
    Map::checked(size, chunks, content)
}

fn add(chunks: &mut Vec<Chunk>, pieces: &[GnuSparseHeader]) -> Result<(), LayerError> {
    for piece in pieces {
        // An unused slot; a used one may well be empty, to say where the file ends.
        if piece.offset[0] == 0 || piece.numbytes[0] == 0 {
            return Ok(());
        }
        if chunks.len() == MAX_CHUNKS {
            return Err(too_many());
        }
        chunks.push(Chunk {
            offset: field(&piece.offset)?,
            length: field(&piece.numbytes)?,
        });
    }
    Ok(())
}

fn field(text: &[u8]) -> Result<u64, LayerError> {
    number(text)
        .and_then(|n| u64::try_from(n).ok())
        .ok_or_else(|| broken("a sparse file's map is malformed"))
}

fn too_many() -> LayerError {
    LayerError::TooMany {
        what: "pieces in a sparse file",
        limit: MAX_CHUNKS as u64,
    }
}
