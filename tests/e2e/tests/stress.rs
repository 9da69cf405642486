//! Many containers.

use crate::host::{Host, busybox, emulated, engine, succeed, text};

/// How many runs, and how many at a time.
const RUNS: usize = 200;
/// The same where each takes seconds, because the processor that runs them is emulated.
const FEW_RUNS: usize = 100;
const AT_A_TIME: usize = 4;
/// How many containers at once on the KVM engine; 20 of them have room in 4 GiB.
const CROWD: usize = 20;

#[test]
fn hundreds_of_runs_all_succeed_and_leave_nothing() {
    let host = Host::new();
    let image = busybox();
    let runs = if emulated() { FEW_RUNS } else { RUNS };
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(|| {
                loop {
                    let run = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if run >= runs {
                        break;
                    }
                    let output = host.cloison(["run", "--rm", &image, "echo", &run.to_string()]);
                    assert_eq!(
                        text(&output.stdout),
                        format!("{run}\n"),
                        "run {run}: {}",
                        text(&output.stderr)
                    );
                    assert!(output.status.success());
                }
            });
        }
    });
}

#[test]
fn several_containers_run_at_once() {
    let host = Host::new();
    let count = if engine() == "kvm" { CROWD } else { 6 };
    let ids: Vec<String> = (0..count)
        .map(|n| host.detached(&[], &["sh", "-c", &format!("echo {n}; sleep 1000")]))
        .collect();
    let listed = text(&host.cloison(["ps", "-q", "--no-trunc"]).stdout);
    assert!(ids.iter().all(|id| listed.contains(id)));
    for (n, id) in ids.iter().enumerate() {
        assert_eq!(
            succeed(&host.cloison(["exec", id, "echo", &n.to_string()])),
            format!("{n}\n")
        );
    }
    let mut args = vec!["rm", "-f"];
    args.extend(ids.iter().map(String::as_str));
    assert!(host.cloison(args).status.success());
}
