//! What becomes of a VM when its engine, its process or its owner fails.

use std::io;
use std::os::fd::OwnedFd;

use cloison_vmm::{EndReason, LaunchError, VmSpec, await_end, read_end};

use crate::support::{Bench, kill, pidfd, readable, wait};

crate::tests![
    a_missing_qemu_is_said_with_what_to_install_and_starts_nothing,
    a_missing_kernel_is_said_with_its_path,
    a_spec_out_of_range_starts_nothing,
    a_qemu_that_fails_at_start_is_quoted_with_what_to_install,
    a_qemu_that_floods_its_standard_error_is_quoted_in_a_few_lines,
    a_qemu_that_is_no_program_is_an_engine_failure,
    an_owner_that_dies_takes_the_vm_with_it,
    a_killed_vm_process_takes_qemu_with_it_and_leaves_no_word,
    a_killed_qemu_ends_the_vm,
    a_directory_holds_one_vm_at_a_time,
    a_directory_with_a_very_long_path_will_do,
    nothing_but_what_it_was_given_is_open_in_a_vm_process,
];

/// A QEMU that takes no notice of anything.
const IDLE: &str = "exec sleep 1000";

fn a_missing_qemu_is_said_with_what_to_install_and_starts_nothing() {
    let mut bench = Bench::with_fake_qemu(IDLE);
    bench.spec.qemu = "/nonexistent/qemu".into();
    let error = bench.launch().unwrap_err();
    assert!(matches!(error, LaunchError::NoQemu { .. }));
    let text = error.to_string();
    assert!(
        text.contains("apt-get install qemu-system-x86") && text.contains("/nonexistent"),
        "{text}"
    );
    assert_eq!(read_end(bench.path()).unwrap(), None);
}

fn a_missing_kernel_is_said_with_its_path() {
    let mut bench = Bench::with_fake_qemu(IDLE);
    bench.spec.kernel = "/nonexistent/vmlinux".into();
    let text = bench.launch().unwrap_err().to_string();
    assert!(text.contains("/nonexistent/vmlinux"), "{text}");
}

fn a_spec_out_of_range_starts_nothing() {
    let mut bench = Bench::with_fake_qemu(IDLE);
    bench.spec = VmSpec {
        memory_mib: 1,
        ..bench.spec.clone()
    };
    assert!(matches!(bench.launch(), Err(LaunchError::Spec(_))));
    assert!(!bench.path().join("control.sock").exists());
}

fn a_qemu_that_fails_at_start_is_quoted_with_what_to_install() {
    let end = Bench::with_fake_qemu("echo 'qemu: no such machine: microvm' >&2; exit 1").run();
    assert_eq!(end.reason, EndReason::EngineFailed);
    for part in [
        "no such machine: microvm",
        "status 1",
        "apt-get install qemu-system-x86",
    ] {
        assert!(end.message.contains(part), "{}", end.message);
    }
}

fn a_qemu_that_floods_its_standard_error_is_quoted_in_a_few_lines() {
    let end =
        Bench::with_fake_qemu("yes nonsense | head -c 9000000 >&2; echo end >&2; exit 3").run();
    assert_eq!(end.reason, EndReason::EngineFailed);
    assert!(end.message.ends_with("nonsense\nend"), "{}", end.message);
    assert!(end.message.len() < 1000);
}

fn a_qemu_that_is_no_program_is_an_engine_failure() {
    let mut bench = Bench::with_fake_qemu("");
    std::fs::write(&bench.spec.qemu, "#!/nonexistent/interpreter\n").unwrap();
    let end = bench.run();
    assert_eq!(end.reason, EndReason::EngineFailed);
    assert!(end.message.contains("cannot run QEMU"), "{}", end.message);
}

fn an_owner_that_dies_takes_the_vm_with_it() {
    let mut bench = Bench::with_fake_qemu(IDLE);
    let (watched, owner) = io::pipe().unwrap();
    bench.owner = Some(OwnedFd::from(watched));
    let mut process = bench.launch().unwrap();
    let qemu = pidfd(bench.control().status().unwrap().engine_pids[0]);
    drop(owner);
    assert_eq!(wait(&mut process).reason, EndReason::OwnerGone);
    assert!(readable(&qemu));
}

fn a_killed_vm_process_takes_qemu_with_it_and_leaves_no_word() {
    let mut bench = Bench::with_fake_qemu(IDLE);
    let mut process = bench.launch().unwrap();
    let qemu = pidfd(bench.control().status().unwrap().engine_pids[0]);
    assert_eq!(read_end(bench.path()).unwrap(), None);
    kill(process.pid().as_raw());
    let end = await_end(bench.path()).unwrap().unwrap();
    assert_eq!(end.reason, EndReason::ProcessKilled);
    assert!(readable(&qemu), "QEMU outlived its VM process");
    assert_eq!(process.wait().unwrap(), end);
}

fn a_killed_qemu_ends_the_vm() {
    let mut bench = Bench::with_fake_qemu(IDLE);
    let mut process = bench.launch().unwrap();
    let qemu = bench.control().status().unwrap().engine_pids[0];
    kill(qemu as i32);
    let end = wait(&mut process);
    assert_eq!(end.reason, EndReason::EngineFailed);
    assert!(end.message.contains("SIGKILL"), "{}", end.message);
}

fn a_directory_holds_one_vm_at_a_time() {
    let mut bench = Bench::with_fake_qemu(IDLE);
    let mut process = bench.launch().unwrap();
    let error = bench.launch().unwrap_err();
    assert!(matches!(error, LaunchError::EndFile(_)), "{error}");
    let control = bench.control();
    control.kill().unwrap();
    assert_eq!(wait(&mut process).reason, EndReason::Killed);
    let mut process = bench.launch().unwrap();
    bench.control().kill().unwrap();
    assert_eq!(wait(&mut process).reason, EndReason::Killed);
}

fn a_directory_with_a_very_long_path_will_do() {
    let mut bench = Bench::with_fake_qemu(IDLE);
    let long = bench.path().join("x".repeat(200));
    std::fs::create_dir_all(long.join("shared")).unwrap();
    let mut process = cloison_vmm::launch(cloison_vmm::Launch {
        spec: bench.spec.clone(),
        dir: &long,
        shared: &long.join("shared"),
        attachments: Vec::new(),
        nics: Vec::new(),
        owner: None,
        log: bench.log.take(),
    })
    .unwrap();
    let control = cloison_vmm::ControlClient::connect(&long.join("control.sock")).unwrap();
    control.kill().unwrap();
    assert_eq!(wait(&mut process).reason, EndReason::Killed);
}

fn nothing_but_what_it_was_given_is_open_in_a_vm_process() {
    use std::os::fd::{AsRawFd, FromRawFd};
    let mut bench = Bench::with_fake_qemu("exec sleep 1000");
    let secret = bench.path().join("secret");
    let file = std::fs::File::create(&secret).unwrap();
    // SAFETY: dup makes a descriptor, without close-on-exec, that nobody else knows of.
    let leaked = unsafe { OwnedFd::from_raw_fd(nix::libc::dup(file.as_raw_fd())) };
    let mut process = bench.launch().unwrap();
    let status = bench.control().status().unwrap();
    for pid in [status.pid, status.engine_pids[0]] {
        let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let open: Vec<_> = open
            // What is closed meanwhile is not open.
            .filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok())
            .collect();
        assert!(!open.contains(&secret), "process {pid} has {open:?}");
    }
    drop(leaked);
    bench.control().kill().unwrap();
    wait(&mut process);
}
