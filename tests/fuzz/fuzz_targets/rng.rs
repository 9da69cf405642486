#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cloison_fuzz::rng(data));
