//! Which engine a container gets when it does not ask for one. What this host can do, `cloison doctor` says.

use std::process::Output;

use crate::host::{Host, busybox, succeed, text};

/// Whether the KVM engine works here.
fn kvm_works(host: &Host) -> bool {
    let doctor = text(&host.cloison(["doctor"]).stdout);
    let line = doctor.lines().find(|line| line.starts_with("engine kvm"));
    line.is_some_and(|line| line.split_whitespace().nth(2) == Some("yes"))
}

/// `cloison run ARGS` with no engine asked for in any way.
fn run(host: &Host, args: &[&str]) -> Output {
    let mut command = host.command(["run"].iter().chain(args));
    command.env_remove("CLOISON_ENGINE").output().unwrap()
}

/// The engine of a container, and the reason for it.
fn engine_of(host: &Host, container: &str) -> (String, String) {
    let engine = &host.inspect(container)["Engine"];
    let field = |name: &str| engine[name].as_str().unwrap().to_owned();
    (field("Name"), field("Reason"))
}

#[test]
fn where_kvm_works_it_is_taken_without_a_word() {
    let host = Host::new();
    if !kvm_works(&host) {
        return;
    }
    let image = busybox();
    let output = run(&host, &["--name", "auto", &image, "true"]);
    succeed(&output);
    assert_eq!(text(&output.stderr), "");
    let (name, reason) = engine_of(&host, "auto");
    assert_eq!(name, "kvm");
    assert!(reason.contains("KVM works"), "{reason}");
    succeed(&host.cloison(["rm", "auto"]));
}

#[test]
fn where_kvm_does_not_work_the_software_engine_is_taken_and_one_line_says_why() {
    let host = Host::new();
    if kvm_works(&host) {
        return;
    }
    let image = busybox();
    let output = run(&host, &["--name", "auto", &image, "true"]);
    succeed(&output);
    let said = text(&output.stderr);
    assert_eq!(said.lines().count(), 1, "{said}");
    let (name, reason) = engine_of(&host, "auto");
    assert_eq!(name, "software");
    assert_eq!(said.trim_end(), format!("cloison: {reason}"));
    assert!(
        reason.contains("KVM") || reason.contains("/dev/kvm"),
        "{reason}"
    );
    succeed(&host.cloison(["rm", "auto"]));
}

#[test]
fn a_guests_clock_is_finer_than_its_tick() {
    let host = Host::new();
    let source = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let source = host.shell(&[], &format!("cat {source}"));
    assert!(["tsc\n", "kvm-clock\n"].contains(&&*source), "{source}");
}
