//! What a detached container writes, kept as docker's json-file driver keeps it: one JSON object a line, with the stream and the
//! time.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, Write};
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;

use crate::container::now;

/// A line of a container that is longer is kept as several entries, bytes.
const MAX_LINE: usize = 16 * 1024;

/// Which stream something was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    Stdout,
    Stderr,
}

/// One line of a log.
#[derive(Debug, Serialize, Deserialize)]
pub struct Entry {
    /// The text, with its line feed when it had one. What is not UTF-8 is replaced.
    pub log: String,
    /// Where it was written to.
    pub stream: Stream,
    /// When it arrived.
    #[serde(with = "time::serde::rfc3339")]
    pub time: OffsetDateTime,
}

/// Cuts a stream of bytes into lines.
#[derive(Default)]
struct Lines {
    partial: Vec<u8>,
}

impl Lines {
    fn push(
        &mut self,
        mut bytes: &[u8],
        mut line: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        while !bytes.is_empty() {
            let room = MAX_LINE - self.partial.len();
            let end = bytes
                .iter()
                .take(room)
                .position(|b| *b == b'\n')
                .map(|n| n + 1);
            let taken = end.unwrap_or_else(|| room.min(bytes.len()));
            self.partial.extend_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            if end.is_some() || self.partial.len() == MAX_LINE {
                line(&self.partial)?;
                self.partial.clear();
            }
        }
        Ok(())
    }
}

/// Writes what arrives at `from` to `log` until its writers are gone.
///
/// # Errors
/// When the log cannot be written; what arrives afterwards is lost, and the container goes on.
pub async fn record(mut from: Receiver, stream: Stream, log: &File) -> Result<()> {
    let mut lines = Lines::default();
    let mut buffer = vec![0; MAX_LINE];
    let mut write = |text: &[u8]| -> io::Result<()> {
        let entry = Entry {
            log: String::from_utf8_lossy(text).into_owned(),
            stream,
            time: now(),
        };
        let mut line = serde_json::to_vec(&entry)?;
        line.push(b'\n');
        // The log was opened for appending: one write is one line, whichever stream it comes from.
        let mut log = log;
        log.write_all(&line)
    };
    let mut failed = None;
    loop {
        let count = from
            .read(&mut buffer)
            .await
            .context("cannot read the container's output")?;
        if failed.is_none() {
            let written = match count {
                0 if lines.partial.is_empty() => Ok(()),
                0 => write(&lines.partial),
                count => lines.push(&buffer[..count], &mut write),
            };
            // A full disk must not stop the container: the rest is read and dropped.
            failed = written.err();
        }
        if count == 0 {
            return failed.map_or(Ok(()), |e| {
                Err(e).context("cannot write the container's log")
            });
        }
    }
}

/// A log being read.
pub struct Reader {
    file: BufReader<File>,
    partial: Vec<u8>,
}

impl Reader {
    /// Opens a log; `tail` skips all but its last lines.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn open(path: &Path, tail: Option<usize>) -> Result<Self> {
        let failed = || format!("cannot read the log {}", path.display());
        let mut file = File::open(path).with_context(failed)?;
        if let Some(lines) = tail {
            let start = start_of_tail(&mut file, lines).with_context(failed)?;
            file.seek(io::SeekFrom::Start(start)).with_context(failed)?;
        }
        Ok(Self {
            file: BufReader::new(file),
            partial: Vec::new(),
        })
    }

    /// The next entry that is there whole; `None` at the end, as far as the log goes at this moment.
    ///
    /// # Errors
    /// When it cannot be read, or is no log.
    pub fn next(&mut self) -> Result<Option<Entry>> {
        self.file
            .read_until(b'\n', &mut self.partial)
            .context("cannot read the log")?;
        if self.partial.last() != Some(&b'\n') {
            return Ok(None);
        }
        let entry = serde_json::from_slice(&self.partial).context("the log is damaged");
        self.partial.clear();
        entry.map(Some)
    }
}

/// Where the last `lines` lines of a file begin.
fn start_of_tail(file: &mut File, lines: usize) -> io::Result<u64> {
    const BLOCK: u64 = 64 * 1024;
    let mut end = file.seek(io::SeekFrom::End(0))?;
    let mut found = 0;
    let mut block = Vec::new();
    while end > 0 {
        let start = end.saturating_sub(BLOCK);
        file.seek(io::SeekFrom::Start(start))?;
        block.clear();
        Read::by_ref(file)
            .take(end - start)
            .read_to_end(&mut block)?;
        for (offset, _) in block.iter().enumerate().rev().filter(|(_, b)| **b == b'\n') {
            // The line feed that ends the line before the tail is one more than the tail has.
            if found == lines {
                return Ok(start + offset as u64 + 1);
            }
            found += 1;
        }
        end = start;
    }
    Ok(0)
}

impl Entry {
    /// Writes the entry as a person reads it.
    ///
    /// # Errors
    /// When the output cannot be written.
    pub fn print(&self, out: &mut dyn Write, timestamp: bool) -> io::Result<()> {
        if timestamp {
            let time = self.time.format(&Rfc3339).map_err(io::Error::other)?;
            write!(out, "{time} ")?;
        }
        out.write_all(self.log.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_and_bounded_however_the_bytes_arrive() {
        let mut lines = Lines::default();
        let mut seen = Vec::new();
        let long = vec![b'x'; MAX_LINE + 10];
        for bytes in [&b"a\nb"[..], b"c\n\n", &long, b"\nrest"] {
            lines
                .push(bytes, |line| {
                    seen.push(line.to_vec());
                    Ok(())
                })
                .unwrap();
        }
        let expected = [
            b"a\n".to_vec(),
            b"bc\n".to_vec(),
            b"\n".to_vec(),
            vec![b'x'; MAX_LINE],
            b"xxxxxxxxxx\n".to_vec(),
        ];
        assert_eq!(seen, expected);
        assert_eq!(lines.partial, b"rest");
    }

    fn recorded(chunks: &[&[u8]]) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.json");
        let log = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .unwrap();
        let (reader, writer) =
            nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC | nix::fcntl::OFlag::O_NONBLOCK)
                .unwrap();
        let mut writer = File::from(writer);
        chunks
            .iter()
            .for_each(|chunk| writer.write_all(chunk).unwrap());
        drop(writer);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let reader = Receiver::from_owned_fd(reader).unwrap();
            record(reader, Stream::Stderr, &log).await.unwrap();
        });
        (dir, path)
    }

    #[test]
    fn what_was_written_is_read_back_and_the_tail_is_the_last_lines() {
        let (_dir, path) = recorded(&[b"one\ntwo\nthr", b"ee\n", b"no line feed \xff"]);
        let texts = |tail| {
            let mut reader = Reader::open(&path, tail).unwrap();
            let mut texts = Vec::new();
            while let Some(entry) = reader.next().unwrap() {
                assert_eq!(entry.stream, Stream::Stderr);
                texts.push(entry.log);
            }
            texts
        };
        assert_eq!(
            texts(None),
            ["one\n", "two\n", "three\n", "no line feed \u{fffd}"]
        );
        assert_eq!(texts(Some(2)), ["three\n", "no line feed \u{fffd}"]);
        assert_eq!(texts(Some(4)).len(), 4);
        assert_eq!(texts(Some(99)).len(), 4);
        assert!(texts(Some(0)).is_empty());
    }

    #[test]
    fn a_half_written_entry_waits_and_a_damaged_one_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.json");
        std::fs::write(&path, "{\"log\":\"a").unwrap();
        let mut reader = Reader::open(&path, None).unwrap();
        assert!(reader.next().unwrap().is_none());
        let mut file = File::options().append(true).open(&path).unwrap();
        file.write_all(b"b\",\"stream\":\"stdout\",\"time\":\"2024-01-01T00:00:00Z\"}\nnonsense\n")
            .unwrap();
        assert_eq!(reader.next().unwrap().unwrap().log, "ab");
        assert!(reader.next().is_err());
    }
}
