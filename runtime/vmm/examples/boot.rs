//! Boots a VM and shows what its kernel says: `boot kvm|software KERNEL INITRAMFS [MIB [MAX-VCPUS [WORDS…]]]`. For looking at an engine,
//! a kernel or an initramfs by itself. Its exit status is 0 if the guest shut down in an orderly way.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, bail};
use cloison_vmm::{EndReason, Engine, Launch, VM_PROCESS_NAME, VmSpec, launch, vm_main};

fn main() -> anyhow::Result<ExitCode> {
    let words: Vec<String> = std::env::args().collect();
    if words.first().is_some_and(|word| word == VM_PROCESS_NAME) {
        return Ok(vm_main());
    }
    let [_, engine, kernel, initramfs, rest @ ..] = words.as_slice() else {
        bail!("usage: boot kvm|software KERNEL INITRAMFS [MIB [MAX-VCPUS [WORDS…]]]");
    };
    let number = |at: usize, default: u32| rest.get(at).map_or(Ok(default), |word| word.parse());
    let level = std::env::var("LOG")
        .ok()
        .and_then(|level| level.parse().ok())
        .unwrap_or(tracing::Level::INFO);
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .init();
    let spec = VmSpec {
        id: "boot".into(),
        engine: if engine == "kvm" {
            Engine::Kvm
        } else {
            Engine::Software
        },
        memory_mib: number(0, 256)?,
        max_memory_mib: number(0, 256)?,
        vcpus: 1,
        max_vcpus: u8::try_from(number(1, 1)?)?,
        spare_nics: 0,
        awaits_nic: false,
        kernel: kernel.into(),
        initramfs: initramfs.into(),
        cmdline: rest.get(2..).unwrap_or_default().join(" "),
        qemu: "/usr/bin/qemu-system-x86_64".into(),
        template: None,
    };
    let dir = tempfile::tempdir()?;
    let log = std::os::fd::AsFd::as_fd(&std::io::stderr()).try_clone_to_owned()?;
    let started = Instant::now();
    let mut vm = launch(Launch {
        spec,
        dir: dir.path(),
        shared: Path::new("/mnt"),
        attachments: Vec::new(),
        nics: Vec::new(),
        owner: None,
        log: Some(log),
    })
    .context("launch")?;
    let end = vm.wait()?;
    println!("{}", end.kernel_log_tail);
    println!(
        "{:?}: {} after {:.3} ms",
        end.reason,
        end.message,
        started.elapsed().as_secs_f64() * 1e3
    );
    Ok(ExitCode::from(u8::from(end.reason != EndReason::Shutdown)))
}
