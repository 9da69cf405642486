//! `cloison run --profile`.

use std::fs;

use serde_json::Value;

use crate::host::{Host, busybox, fail, succeed, text};

/// Each stage's name in the order they are passed.
const STAGES: [&str; 11] = [
    "front end: reading the image",
    "front end: making the container",
    "front end: starting the VM process",
    "VM process: making the VM",
    "guest: booting the kernel",
    "guest: setting up the agent",
    "guest: creating the container",
    "guest: starting it",
    "guest: running the command",
    "guest: shutting down",
    "VM process: ending",
];

#[test]
fn a_profile_says_where_the_time_went_and_leaves_the_output_alone() {
    let host = Host::new();
    let output = host.run(&["--profile", "--template", "off"], &["echo", "hello"]);
    let said = text(&output.stderr);
    assert_eq!(succeed(&output), "hello\n");
    let mut rest = said.as_str();
    for stage in STAGES {
        let at = rest.find(stage);
        let at = at.unwrap_or_else(|| panic!("{stage:?} is missing or out of order in:\n{said}"));
        rest = &rest[at..];
    }
    assert!(
        rest.contains("in all\n") && rest.contains("first byte of output\n"),
        "{said}"
    );
}

#[test]
fn a_profile_can_be_written_as_a_chrome_trace() {
    let host = Host::new();
    let file = host.path("trace.json");
    let option = format!("--profile={}", file.display());
    // A command that fails is profiled like any other.
    let output = host.run(
        &["--template", "off", &option],
        &["sh", "-c", "echo out; exit 3"],
    );
    assert_eq!(output.status.code(), Some(3));
    let trace: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let stages: Vec<_> = events.iter().filter(|event| event["ph"] == "X").collect();
    assert_eq!(stages.len(), STAGES.len() + 1);
    let mut end = 0.0;
    for stage in stages {
        let (start, length) = (
            stage["ts"].as_f64().unwrap(),
            stage["dur"].as_f64().unwrap(),
        );
        assert!((start - end).abs() < 1.0 && length >= 0.0, "{stage}");
        end = start + length;
    }
}

#[test]
fn a_profile_that_cannot_be_had_is_refused_before_anything_runs() {
    let host = Host::new();
    fail(
        &host.run(&["--profile=/nonexistent/trace.json"], &["true"]),
        125,
        &["/nonexistent/trace.json"],
    );
    let detached = host.cloison(["run", "-d", "--profile", &busybox(), "true"]);
    fail(&detached, 125, &["--profile", "--detach"]);
    host.assert_clean();
}
