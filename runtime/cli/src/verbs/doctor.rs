//! `cloison doctor`: what this host can do, one line each, and what to do about what it cannot.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use cloison_sandbox::Home;
use cloison_vmm::{EngineChoice, choose};

use crate::args::Global;
use crate::verbs::print;

/// The memory a default container's VM may come to use, KiB.
const COMFORTABLE_MEMORY_KIB: u64 = 1536 * 1024;

/// Prints the findings.
///
/// # Errors
/// When no container can run here.
pub fn doctor(global: &Global, home: &Home) -> Result<()> {
    let mut report = Report::default();
    let parts = global.parts();
    let kvm = choose(EngineChoice::Kvm)
        .map(|chosen| chosen.reason)
        .map_err(anyhow::Error::from);
    let software = qemu_version(&parts.qemu());
    let engines = kvm.is_ok() || software.is_ok();
    report.optional("engine kvm", kvm);
    report.optional("engine software", software);
    report.needed(
        "guest kernel",
        parts
            .kernel()
            .map_err(anyhow::Error::from)
            .and_then(|file| readable(&file)),
    );
    report.needed(
        "guest initramfs",
        parts
            .initramfs()
            .map_err(anyhow::Error::from)
            .and_then(|file| readable(&file)),
    );
    report.needed("privileges", privileges());
    report.needed("run directory", writable(home.run()));
    report.needed("data directory", writable(home.data()));
    report.needed("overlay", overlay());
    report.optional("memory", memory());
    if !engines {
        report.failed.push("engine");
    }
    match choose(EngineChoice::Auto) {
        Ok(chosen) if engines => print(format_args!(
            "\ncontainers run on the {} engine: {}",
            chosen.engine, chosen.reason
        )),
        _ => {}
    }
    if !report.failed.is_empty() {
        bail!(
            "no container can run on this host: see {} above",
            report.failed.join(", ")
        );
    }
    Ok(())
}

#[derive(Default)]
struct Report {
    failed: Vec<&'static str>,
}

impl Report {
    fn needed(&mut self, what: &'static str, found: Result<String>) {
        if found.is_err() {
            self.failed.push(what);
        }
        self.optional(what, found);
    }

    fn optional(&self, what: &str, found: Result<String>) {
        match found {
            Ok(text) => print(format_args!("{what:<16} yes  {text}")),
            Err(error) => print(format_args!("{what:<16} no   {error:#}")),
        }
    }
}

fn qemu_version(qemu: &Path) -> Result<String> {
    let install = "install it (apt-get install qemu-system-x86), or name it with --qemu";
    let output = Command::new(qemu).arg("--version").output();
    let output =
        output.with_context(|| format!("cannot run QEMU at {}: {install}", qemu.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().next() {
        Some(line) if output.status.success() => Ok(format!("{line} at {}", qemu.display())),
        _ => bail!("QEMU at {} does not answer: {install}", qemu.display()),
    }
}

fn readable(file: &Path) -> Result<String> {
    let metadata = File::open(file).and_then(|f| f.metadata());
    let metadata = metadata.with_context(|| format!("cannot read {}", file.display()))?;
    Ok(format!(
        "{} ({} KiB)",
        file.display(),
        metadata.len() / 1024
    ))
}

fn privileges() -> Result<String> {
    if !caps::has_cap(
        None,
        caps::CapSet::Effective,
        caps::Capability::CAP_SYS_ADMIN,
    )
    .unwrap_or(false)
    {
        bail!(
            "CAP_SYS_ADMIN is missing, which mounting a container's root file system needs: run cloison as root"
        );
    }
    Ok("this user may mount file systems".into())
}

fn writable(dir: &Path) -> Result<String> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let probe = dir.join(format!(".doctor-{}", std::process::id()));
    File::create_new(&probe).with_context(|| format!("cannot write to {}", dir.display()))?;
    fs::remove_file(&probe).with_context(|| format!("cannot remove {}", probe.display()))?;
    Ok(format!("{} can be written", dir.display()))
}

fn overlay() -> Result<String> {
    let filesystems =
        fs::read_to_string("/proc/filesystems").context("cannot read /proc/filesystems")?;
    if filesystems
        .lines()
        .any(|line| line.trim_end().ends_with("\toverlay"))
    {
        return Ok("the host's kernel has overlayfs".into());
    }
    bail!("the host's kernel has no overlayfs: load it (modprobe overlay)")
}

fn memory() -> Result<String> {
    let meminfo = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: u64 = line
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
        .context("/proc/meminfo does not say how much memory is available")?;
    if kib < COMFORTABLE_MEMORY_KIB {
        bail!(
            "{} MiB are available, a container without --memory may use more",
            kib / 1024
        );
    }
    Ok(format!("{} MiB are available", kib / 1024))
}
