//! What QEMU itself says on its standard error, as far back as a few kilobytes: the substance of an error message when it fails.

use std::collections::VecDeque;

/// Bytes kept; QEMU's complaints are a line or two.
const TRANSCRIPT_SIZE: usize = 4 << 10;

/// Lines shown.
const LINES: usize = 8;

/// The last part of what was said.
#[derive(Debug, Default)]
pub(super) struct Transcript {
    bytes: VecDeque<u8>,
}

impl Transcript {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(TRANSCRIPT_SIZE)..];
        let surplus = (self.bytes.len() + bytes.len()).saturating_sub(TRANSCRIPT_SIZE);
        self.bytes.drain(..surplus);
        self.bytes.extend(bytes);
    }

    /// The last lines, without what could drive a terminal; empty when nothing was said.
    pub(super) fn tail(&self) -> String {
        let bytes: Vec<u8> = self.bytes.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines = text
            .lines()
            .map(str::trim_end)
            .filter(|line| !line.is_empty());
        let mut lines: Vec<String> = lines
            .map(|line| line.chars().filter(|c| !c.is_control()).collect())
            .collect();
        lines.drain(..lines.len().saturating_sub(LINES));
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_leaves_the_last_lines() {
        let mut transcript = Transcript::default();
        for number in 0..10_000 {
            transcript.push(format!("line {number}\n\u{1b}[31m\n").as_bytes());
        }
        let tail = transcript.tail();
        assert!(tail.ends_with("line 9999\n[31m"), "{tail}");
        assert_eq!(tail.lines().count(), LINES);
    }

    #[test]
    fn silence_is_empty() {
        assert_eq!(Transcript::default().tail(), "");
    }
}
