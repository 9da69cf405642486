//! A sandbox directory with a VM in it, fake QEMUs, and guests made on the spot.

use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use cloison_vmm::{
    Attachment, CONTROL_SOCKET, ControlClient, End, Engine, Launch, LaunchError, VmProcess, VmSpec,
    launch,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tempfile::TempDir;

/// How long anything here may take before it counts as hung.
pub const PATIENCE: u16 = 30_000;

/// A directory for one VM, which is ended with it.
pub struct Bench {
    pub dir: TempDir,
    pub spec: VmSpec,
    pub attachments: Vec<Attachment>,
    pub owner: Option<OwnedFd>,
    pub log: Option<OwnedFd>,
}

impl Bench {
    /// With a QEMU that is a shell script, and files that are no kernel.
    pub fn with_fake_qemu(script: &str) -> Self {
        let mut bench = Self::new("/dev/null".into(), "/dev/null".into());
        let qemu = bench.dir.path().join("qemu");
        fs::write(&qemu, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755)).unwrap();
        bench.spec.qemu = qemu;
        bench
    }

    /// With a real engine, the real kernel, and an init that is a busybox shell script; `None` where one is missing.
    pub fn with_init(script: &str) -> Option<Self> {
        let kernel = needed(dist().join("vmlinux"))?;
        let busybox =
            needed("/bin/busybox".into()).or_else(|| needed("/usr/bin/busybox".into()))?;
        let mut bench = Self::new(kernel, "/dev/null".into());
        let initramfs = bench.dir.path().join("initramfs");
        fs::write(&initramfs, initramfs_of(script, &busybox)).unwrap();
        bench.spec.initramfs = initramfs;
        bench.on_the_engine_under_test()
    }

    /// With a real engine, the real kernel and the real agent; `None` where one is missing.
    pub fn with_agent() -> Option<Self> {
        let kernel = needed(dist().join("vmlinux"))?;
        let initramfs = needed(dist().join("initramfs"))?;
        Self::new(kernel, initramfs).on_the_engine_under_test()
    }

    fn on_the_engine_under_test(mut self) -> Option<Self> {
        self.spec.engine = engine();
        if self.spec.engine == Engine::Software {
            self.spec.qemu = needed("/usr/bin/qemu-system-x86_64".into())?;
        }
        Some(self)
    }

    fn new(kernel: PathBuf, initramfs: PathBuf) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("shared")).unwrap();
        let spec = VmSpec {
            id: "test".into(),
            engine: Engine::Software,
            memory_mib: 128,
            max_memory_mib: 128,
            vcpus: 1,
            max_vcpus: 1,
            spare_nics: 0,
            awaits_nic: false,
            kernel,
            initramfs,
            cmdline: String::new(),
            qemu: "/nonexistent/qemu".into(),
            template: None,
        };
        // What the VM processes log goes to the test's own standard error.
        let log = std::os::fd::AsFd::as_fd(&std::io::stderr())
            .try_clone_to_owned()
            .ok();
        Self {
            dir,
            spec,
            attachments: Vec::new(),
            owner: None,
            log,
        }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn launch(&mut self) -> Result<VmProcess, LaunchError> {
        launch(Launch {
            spec: self.spec.clone(),
            dir: self.dir.path(),
            shared: &self.dir.path().join("shared"),
            attachments: std::mem::take(&mut self.attachments),
            nics: Vec::new(),
            owner: self.owner.take(),
            log: self.log.take(),
        })
    }

    pub fn control(&self) -> ControlClient {
        ControlClient::connect(&self.dir.path().join(CONTROL_SOCKET)).unwrap()
    }

    /// Launches, and waits for an end that comes by itself.
    pub fn run(&mut self) -> End {
        let mut process = self.launch().unwrap();
        wait(&mut process)
    }
}

/// The engine on which guests are booted.
pub fn engine() -> Engine {
    match std::env::var("CLOISON_ENGINE").as_deref() {
        Ok("kvm") => Engine::Kvm,
        _ => Engine::Software,
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // A test that fails half-way leaves its VM to this.
        if let Ok(control) = ControlClient::connect(&self.dir.path().join(CONTROL_SOCKET)) {
            let _ = control.kill();
        }
    }
}

/// Waits for the VM process's end, but not for ever.
pub fn wait(process: &mut VmProcess) -> End {
    let ended = readable(process.pidfd());
    if !ended {
        kill(process.pid().as_raw());
    }
    let end = process.wait().unwrap();
    assert!(ended, "the VM process did not end; killed, it left {end:?}");
    end
}

/// Whether the descriptor becomes readable, or hangs up.
pub fn readable(fd: impl std::os::fd::AsFd) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::from(PATIENCE)).unwrap() > 0
}

pub fn kill(pid: i32) {
    let pid = nix::unistd::Pid::from_raw(pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

/// A descriptor of any process.
pub fn pidfd(pid: u32) -> OwnedFd {
    use std::os::fd::FromRawFd;
    // SAFETY: takes two integers, and the descriptor it returns is nobody else's.
    unsafe {
        let fd = nix::libc::syscall(nix::libc::SYS_pidfd_open, pid, 0);
        assert!(fd >= 0, "process {pid} is gone");
        OwnedFd::from_raw_fd(fd as i32)
    }
}

/// Where the guest's kernel and initramfs are: CLOISON_DIST, or else this tree's own.
fn dist() -> PathBuf {
    if let Some(dist) = std::env::var_os("CLOISON_DIST") {
        return dist.into();
    }
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../dist")
}

fn needed(path: PathBuf) -> Option<PathBuf> {
    if path.exists() {
        return Some(path);
    }
    assert!(
        std::env::var_os("CLOISON_REQUIRE_GUEST").is_none(),
        "{} is missing",
        path.display()
    );
    println!("skipped: {} is missing", path.display());
    None
}

/// An initial ramfs ("newc" format, kernel's Documentation/driver-api/early-userspace/buffer-format.rst) whose init is `script`.
fn initramfs_of(script: &str, busybox: &Path) -> Vec<u8> {
    let mut archive = Vec::new();
    let mut entry = |name: &str, mode: u32, rdev: (u32, u32), data: &[u8]| {
        let numbers = [
            0,
            mode,
            0,
            0,
            1,
            0,
            data.len() as u32,
            0,
            0,
            rdev.0,
            rdev.1,
            name.len() as u32 + 1,
            0,
        ];
        write!(archive, "070701").unwrap();
        for number in numbers {
            write!(archive, "{number:08x}").unwrap();
        }
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    };
    let init = format!("#!/busybox sh\n/busybox mount -t devtmpfs dev /dev\n{script}\n");
    entry("busybox", 0o100_755, (0, 0), &fs::read(busybox).unwrap());
    entry("init", 0o100_755, (0, 0), init.as_bytes());
    entry("dev", 0o040_755, (0, 0), &[]);
    entry("dev/console", 0o020_600, (5, 1), &[]);
    entry("TRAILER!!!", 0, (0, 0), &[]);
    archive
}
