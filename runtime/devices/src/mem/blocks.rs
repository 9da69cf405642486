//! Which blocks of a region are plugged: one bit each.

use serde::{Deserialize, Serialize};

/// Consecutive blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Run {
    pub first: u32,
    pub count: u32,
}

/// All blocks of a region. Runs given to its methods are inside it: see [`Blocks::contains`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Blocks {
    words: Vec<u64>,
    len: u32,
    plugged: u32,
}

impl Blocks {
    /// `len` blocks, none of them plugged.
    pub(super) fn new(len: u32) -> Self {
        Self {
            words: vec![0; len.div_ceil(u64::BITS) as usize],
            len,
            plugged: 0,
        }
    }

    /// How many blocks there are.
    pub(super) fn len(&self) -> u32 {
        self.len
    }

    /// How many of them are plugged.
    pub(super) fn plugged(&self) -> u32 {
        self.plugged
    }

    /// Whether `run` is a run of these blocks, and not an empty one.
    pub(super) fn contains(&self, run: Run) -> bool {
        let end = run.first.checked_add(run.count);
        run.count > 0 && end.is_some_and(|end| end <= self.len)
    }

    pub(super) fn any_plugged(&self, run: Run) -> bool {
        (run.first..run.first + run.count).any(|block| self.is_plugged(block))
    }

    pub(super) fn all_plugged(&self, run: Run) -> bool {
        (run.first..run.first + run.count).all(|block| self.is_plugged(block))
    }

    /// Marks a run of unplugged blocks.
    pub(super) fn plug(&mut self, run: Run) {
        for block in run.first..run.first + run.count {
            self.words[word(block)] |= bit(block);
        }
        self.plugged += run.count;
    }

    /// Unmarks a run of plugged blocks.
    pub(super) fn unplug(&mut self, run: Run) {
        for block in run.first..run.first + run.count {
            self.words[word(block)] &= !bit(block);
        }
        self.plugged -= run.count;
    }

    /// The longest runs of plugged blocks, in order.
    pub(super) fn plugged_runs(&self) -> impl Iterator<Item = Run> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = (at..self.len).find(|&block| self.is_plugged(block))?;
            let end = (first..self.len)
                .find(|&block| !self.is_plugged(block))
                .unwrap_or(self.len);
            at = end;
            let count = end - first;
            Some(Run { first, count })
        })
    }

    fn is_plugged(&self, block: u32) -> bool {
        self.words[word(block)] & bit(block) != 0
    }
}

fn word(block: u32) -> usize {
    (block / u64::BITS) as usize
}

fn bit(block: u32) -> u64 {
    1 << (block % u64::BITS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn blocks_are_what_a_list_of_flags_would_be(
            len in 1u32..200,
            runs in prop::collection::vec((0u32..210, 0u32..80), 0..40),
        ) {
            let mut blocks = Blocks::new(len);
            let mut flags = vec![false; len as usize];
            for (first, count) in runs {
                let run = Run { first, count };
                let range = first as usize..(first + count) as usize;
                prop_assert_eq!(blocks.contains(run), count > 0 && first + count <= len);
                if !blocks.contains(run) {
                    continue;
                }
                prop_assert_eq!(blocks.any_plugged(run), flags[range.clone()].contains(&true));
                prop_assert_eq!(blocks.all_plugged(run), !flags[range.clone()].contains(&false));
                if !blocks.any_plugged(run) {
                    blocks.plug(run);
                    flags[range].fill(true);
                } else if blocks.all_plugged(run) {
                    blocks.unplug(run);
                    flags[range].fill(false);
                }
            }
            prop_assert_eq!(blocks.plugged() as usize, flags.iter().filter(|x| **x).count());
            let mut again = Blocks::new(len);
            blocks.plugged_runs().for_each(|run| again.plug(run));
            prop_assert_eq!(again, blocks);
        }
    }

    #[test]
    fn a_run_beyond_the_last_number_is_not_contained() {
        let blocks = Blocks::new(10);
        for (first, count) in [(u32::MAX, 1), (1, u32::MAX), (u32::MAX, u32::MAX), (10, 1)] {
            assert!(!blocks.contains(Run { first, count }));
        }
    }
}
