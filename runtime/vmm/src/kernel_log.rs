//! What the guest's kernel has written to its console, as far back as a bounded ring reaches. The guest decides what is in
//! it: it is shown to people and searched for a panic, and nothing else depends on it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of console output that are kept; a kernel panic with its stack trace has a tenth of that.
pub(crate) const KERNEL_LOG_SIZE: usize = 64 << 10;

/// What a kernel says when it panics (kernel/panic.c).
const PANIC: &str = "Kernel panic - not syncing: ";

/// What a guest says when it stops because it was told to: the kernel (kernel/reboot.c), unless it has let go of its console by
/// then, and before it the agent.
const ORDERLY: [&str; 2] = ["reboot: Restarting system", "cloison-agent: shutting down"];

/// A handle on one VM's kernel log; cloned to whoever writes or reads it.
#[derive(Debug, Clone, Default)]
pub(crate) struct KernelLog {
    ring: Arc<Mutex<VecDeque<u8>>>,
}

impl KernelLog {
    /// Appends, and forgets as much of the oldest.
    pub(crate) fn push(&self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(KERNEL_LOG_SIZE)..];
        // Nothing that holds the lock can panic half-way through a change.
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let surplus = (ring.len() + bytes.len()).saturating_sub(KERNEL_LOG_SIZE);
        ring.drain(..surplus);
        ring.extend(bytes);
    }

    /// At most the last `limit` bytes as text: control characters other than newline and tab, and what is not UTF-8, taken
    /// out, so that it can neither drive a terminal nor grow when it is quoted.
    pub(crate) fn tail(&self, limit: usize) -> String {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = ring.iter().copied().collect();
        drop(ring);
        let mut text = String::with_capacity(bytes.len());
        for chunk in bytes.utf8_chunks() {
            text.extend(
                chunk
                    .valid()
                    .chars()
                    .filter(|&c| c == '\n' || c == '\t' || !c.is_control()),
            );
        }
        let start = text.len().saturating_sub(limit);
        let start = (start..=text.len()).find(|&at| text.is_char_boundary(at));
        text.split_off(start.unwrap_or_default())
    }

    /// The last `lines` lines, as for [`KernelLog::tail`].
    pub(crate) fn last_lines(&self, lines: usize) -> String {
        let text = self.tail(KERNEL_LOG_SIZE);
        let mut kept: Vec<&str> = text.lines().rev().take(lines).collect();
        kept.reverse();
        kept.join("\n")
    }

    /// What the kernel gave as the reason of its panic, if it panicked.
    pub(crate) fn panic(&self) -> Option<String> {
        let text = self.tail(KERNEL_LOG_SIZE);
        let (_, reason) = text.rsplit_once(PANIC)?;
        Some(reason.lines().next().unwrap_or_default().trim().to_owned())
    }

    /// Whether the last thing said was that the guest stops because it was told to.
    pub(crate) fn stopped_orderly(&self) -> bool {
        let text = self.last_lines(4);
        ORDERLY.iter().any(|word| text.contains(word))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(bytes: &[u8]) -> KernelLog {
        let log = KernelLog::default();
        log.push(bytes);
        log
    }

    #[test]
    fn a_flood_leaves_the_last_part_and_no_more() {
        let log = KernelLog::default();
        for number in 0..100_000u32 {
            log.push(format!("{number}\n").as_bytes());
        }
        log.push(&vec![b'x'; 3 * KERNEL_LOG_SIZE]);
        log.push(b"\nend\n");
        let text = log.tail(usize::MAX);
        assert_eq!(text.len(), KERNEL_LOG_SIZE);
        assert!(text.ends_with("xx\nend\n"));
    }

    #[test]
    fn the_tail_cannot_drive_a_terminal_nor_be_cut_inside_a_character() {
        let log = log("\u{1b}[2Jréd\0\u{7}\r\n\tok\u{85}".as_bytes());
        log.push(&[0xff, 0xc3]);
        assert_eq!(log.tail(usize::MAX), "[2Jréd\n\tok");
        assert_eq!(log.tail(6), "d\n\tok");
        assert_eq!(log.tail(7), "éd\n\tok");
        assert_eq!(log.tail(0), "");
    }

    #[test]
    fn the_last_panic_is_found_with_its_reason() {
        let log = log(b"[    0.1] Kernel panic - not syncing: first\r\n");
        log.push(
            b"[    0.2] Kernel panic - not syncing: No working init found.  Try\r\n[ 0.3] more",
        );
        assert_eq!(log.panic().as_deref(), Some("No working init found.  Try"));
    }

    #[test]
    fn a_log_without_a_panic_has_none() {
        assert_eq!(log(b"").panic(), None);
        assert_eq!(log(b"panic - not syncing").panic(), None);
        assert!(!log(b"hello\n").stopped_orderly());
    }

    #[test]
    fn an_orderly_stop_is_told_from_a_silent_one() {
        assert!(log(b"[ 1.0] reboot: Restarting system\r\n").stopped_orderly());
        assert!(!log(b"reboot: Restarting system\n1\n2\n3\n4\n").stopped_orderly());
    }

    #[test]
    fn the_last_lines_are_the_last_ones_in_order() {
        assert_eq!(log(b"a\nb\nc\nd").last_lines(2), "c\nd");
        assert_eq!(log(b"a\n").last_lines(5), "a");
    }
}
