//! Each target on inputs that are the same every time: enough to see that it works at all, and that nothing has broken it badly.

use std::path::Path;
use std::time::{Duration, Instant};

use super::TARGETS;

/// How long each target is run. A slow machine sees fewer inputs of the same sequence.
const TIME: Duration = Duration::from_secs(2);

/// Inputs of up to 300 bytes, in which small numbers are frequent (xorshift).
struct Inputs(u64);

impl Iterator for Inputs {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        let length = self.number() % 300;
        Some((0..length).map(|_| self.byte()).collect())
    }
}

impl Inputs {
    fn number(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn byte(&mut self) -> u8 {
        let number = self.number();
        match number % 4 {
            0 => (number >> 8) as u8,
            1 => (number >> 8) as u8 & 0xf,
            2 => 0xff,
            _ => 0,
        }
    }
}

fn run(name: &str) {
    let (_, target) = TARGETS.iter().find(|(found, _)| *found == name).unwrap();
    let begin = Instant::now();
    let mut count = 0;
    target(&[]);
    for input in Inputs(0x9e37_79b9_7f4a_7c15) {
        target(&input);
        count += 1;
        if begin.elapsed() > TIME {
            break;
        }
    }
    eprintln!("{name}: {count} inputs");
}

macro_rules! runs {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            run(stringify!($name));
        })*
    };
}

runs! {
    agent_reply balloon blk console control fs fuse mem net pmem rng vsock vsock_packet
}

#[test]
fn every_target_is_a_program_too() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz_targets");
    let mut files: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            entry
                .unwrap()
                .path()
                .file_stem()
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned()
        })
        .collect();
    files.sort();
    assert_eq!(files, TARGETS.map(|(name, _)| name));
}
