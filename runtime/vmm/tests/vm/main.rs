//! VM processes for real. This program has its own `main`, because a VM process is the launching program run again under
//! another name. Tests that boot a guest do so on the engine that CLOISON_ENGINE names, or the software engine; they need
//! `dist/vmlinux`, busybox-static and, on the software engine, QEMU. Without them they are skipped with a word, or fail if
//! CLOISON_REQUIRE_GUEST is set.

#![allow(clippy::unwrap_used, reason = "a failure here fails the test")]

mod agent;
mod control;
mod engine;
mod guest;
mod kvm;
mod support;

use std::panic::catch_unwind;
use std::process::ExitCode;

/// A test and its name.
type Test = (&'static str, fn());

fn main() -> ExitCode {
    let mut args = std::env::args();
    if args.next().as_deref() == Some(cloison_vmm::VM_PROCESS_NAME) {
        return cloison_vmm::vm_main();
    }
    let filters: Vec<String> = args.filter(|word| !word.starts_with('-')).collect();
    let tests = [
        control::TESTS,
        engine::TESTS,
        guest::TESTS,
        agent::TESTS,
        kvm::TESTS,
    ]
    .concat();
    let chosen = tests.iter().filter(|(name, _)| {
        filters.is_empty() || filters.iter().any(|filter| name.contains(filter))
    });
    let mut failed = Vec::new();
    for (name, test) in chosen {
        let begun = std::time::Instant::now();
        let passed = catch_unwind(test).is_ok();
        let word = if passed { "ok" } else { "FAILED" };
        println!(
            "test {name} ... {word} ({} ms)",
            begun.elapsed().as_millis()
        );
        if !passed {
            failed.push(*name);
        }
    }
    println!("{} failed: {}", failed.len(), failed.join(", "));
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Names tests after their functions.
#[macro_export]
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        pub const TESTS: &[$crate::Test] = &[$((stringify!($name), $name as fn())),*];
    };
}
