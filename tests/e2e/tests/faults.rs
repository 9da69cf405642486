//! Things that are killed, at any moment, and what is left of them: nothing, and never a success.

use std::io::Read;
use std::process::{Child, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::host::{Host, busybox, engine, fail, succeed, text};

/// A container in the foreground that runs.
fn running(host: &Host) -> Child {
    let image = busybox();
    let mut child = host.spawn([
        "run",
        "--name",
        "victim",
        &image,
        "sh",
        "-c",
        "echo ready; sleep 1000",
    ]);
    let mut line = [0; 6];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut line)
        .unwrap();
    child
}

fn kill_by_name(host: &Host, name: &str) {
    let victims: Vec<_> = host
        .processes()
        .into_iter()
        .filter(|(_, command)| command.contains(name))
        .collect();
    assert!(
        !victims.is_empty(),
        "no {name} among {:?}",
        host.processes()
    );
    for (pid, _) in victims {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

#[test]
fn a_vm_process_that_is_killed_is_a_failure_that_says_so() {
    let host = Host::new();
    let child = running(&host);
    kill_by_name(&host, "cloison-vm");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(
        text(&output.stderr).contains("killed"),
        "{}",
        text(&output.stderr)
    );
    let inspected = host.inspect("victim");
    assert_eq!(
        (
            &inspected["State"]["Status"],
            &inspected["State"]["ExitCode"]
        ),
        (&"exited".into(), &125.into())
    );
    succeed(&host.cloison(["rm", "victim"]));
}

#[test]
fn an_emulator_that_is_killed_is_a_failure_that_says_so() {
    if engine() != "software" {
        return;
    }
    let host = Host::new();
    let child = running(&host);
    kill_by_name(&host, "qemu");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(
        text(&output.stderr).contains("QEMU"),
        "{}",
        text(&output.stderr)
    );
    succeed(&host.cloison(["rm", "victim"]));
}

#[test]
fn a_front_end_that_is_killed_takes_its_vm_along_and_can_be_removed() {
    let host = Host::new();
    let mut child = running(&host);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(succeed(&host.cloison(["ps", "-a"])).contains("Dead"));
    assert_eq!(host.inspect("victim")["State"]["Dead"], true);
    fail(&host.cloison(["wait", "victim"]), 1, &["victim"]);
    fail(
        &host.cloison(["exec", "victim", "true"]),
        1,
        &["not running"],
    );
    succeed(&host.cloison(["rm", "victim"]));
}

#[test]
fn whatever_is_killed_while_a_container_is_made_can_be_pruned() {
    let host = Host::new();
    let image = busybox();
    // A little later each time: through the making, the launch, the boot and the run.
    for step in 0..12 {
        let mut child = host
            .command(["run", &image, "sleep", "1000"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_millis(step * 40);
        while std::time::Instant::now() < deadline {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        succeed(&host.cloison(["prune", "-f"]));
        host.assert_clean();
    }
}

#[test]
fn a_monitor_in_the_background_that_is_killed_leaves_a_dead_container() {
    let host = Host::new();
    let id = host.detached(&[], &["sleep", "1000"]);
    let monitor: i32 = std::fs::read_to_string(
        host.run_dir()
            .join("sandboxes")
            .join(&id)
            .join("monitor.lock"),
    )
    .unwrap()
    .parse()
    .unwrap();
    kill(Pid::from_raw(monitor), Signal::SIGKILL).unwrap();
    fail(&host.cloison(["wait", &id]), 1, &["died"]);
    succeed(&host.cloison(["rm", "-f", &id]));
}

#[test]
fn a_guest_kernel_that_panics_is_a_failure_with_its_last_words() {
    let host = Host::new();
    // An initial ramfs without an init is the surest way.
    let empty = host.file("initramfs", [0u8; 512]);
    let image = busybox();
    let output = host.cloison([
        "run",
        "--initramfs",
        empty.to_str().unwrap(),
        &image,
        "true",
    ]);
    fail(&output, 125, &["panic"]);
    host.assert_clean();
}

#[test]
fn a_kernel_that_is_none_is_an_error() {
    let host = Host::new();
    let image = busybox();
    for (name, content) in [
        ("empty", &b""[..]),
        (
            "text",
            &b"not a kernel, not at all, whatever its name says"[..],
        ),
    ] {
        let file = host.file(name, content);
        let output = host.cloison(["run", "--kernel", file.to_str().unwrap(), &image, "true"]);
        fail(&output, 125, &[]);
        host.assert_clean();
    }
}

#[test]
fn a_missing_emulator_is_one_error_that_says_what_to_install() {
    if engine() != "software" {
        return;
    }
    let host = Host::new();
    let image = busybox();
    fail(
        &host.cloison(["run", "--qemu", "/nonexistent/qemu", &image, "true"]),
        125,
        &["/nonexistent/qemu", "apt-get install"],
    );
    let fails = host.file(
        "qemu",
        "#!/bin/sh\necho this one always fails >&2\nexit 1\n",
    );
    std::fs::set_permissions(&fails, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    fail(
        &host.cloison(["run", "--qemu", fails.to_str().unwrap(), &image, "true"]),
        125,
        &["this one always fails"],
    );
    host.assert_clean();
}

#[test]
fn rm_force_ends_a_vm_process_that_does_not_answer() {
    let host = Host::new();
    let mut child = running(&host);
    let stuck: Vec<_> = host
        .processes()
        .into_iter()
        .filter(|(_, command)| command.contains("cloison-vm"))
        .collect();
    kill(Pid::from_raw(stuck[0].0), Signal::SIGSTOP).unwrap();
    succeed(&host.cloison(["rm", "-f", "victim"]));
    assert!(!child.wait().unwrap().success());
}
