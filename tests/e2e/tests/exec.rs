//! `cloison exec`.

use std::io::Write;

use crate::host::{Host, fail, succeed, text};

#[test]
fn a_process_joins_a_container_that_runs() {
    let host = Host::new();
    let id = host.detached(
        &["--name", "box", "-e", "FROM=run", "-w", "/tmp"],
        &["sleep", "1000"],
    );
    let exec = |args: &[&str]| host.cloison(["exec"].iter().chain(args));

    let output = succeed(&exec(&[
        "-e",
        "MORE=exec",
        "box",
        "sh",
        "-c",
        "echo $FROM $MORE; pwd; ps | grep -c '[s]leep 1000'",
    ]));
    assert_eq!(output, "run exec\n/tmp\n1\n");
    let output = exec(&[&id[..8], "sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(
        (
            text(&output.stdout),
            text(&output.stderr),
            output.status.code()
        ),
        ("out\n".into(), "err\n".into(), Some(7))
    );
    let output = exec(&[
        "-u",
        "user",
        "-w",
        "/home",
        "box",
        "sh",
        "-c",
        "id -u; id -G; pwd; echo $HOME; grep CapEff /proc/self/status",
    ]);
    assert_eq!(
        succeed(&output),
        "1000\n1000 2000\n/home\n/home/user\nCapEff:\t0000000000000000\n"
    );
    fail(&exec(&["box", "nonesuch"]), 127, &["nonesuch"]);
    fail(&exec(&["box", "/etc/passwd"]), 126, &["/etc/passwd"]);
    let output = exec(&["--init", "box", "true"]);
    assert_eq!(output.status.code(), Some(125), "an unknown option");

    let mut child = host.spawn(["exec", "-i", "box", "cat"]);
    child.stdin.take().unwrap().write_all(b"through").unwrap();
    assert_eq!(succeed(&child.wait_with_output().unwrap()), "through");

    succeed(&exec(&[
        "-d",
        "box",
        "sh",
        "-c",
        "echo done > /tmp/mark; sleep 1000",
    ]));
    assert_eq!(
        succeed(&exec(&[
            "box",
            "sh",
            "-c",
            "while ! test -s /tmp/mark; do :; done; cat /tmp/mark"
        ])),
        "done\n"
    );

    succeed(&host.cloison(["stop", "-t", "0", "box"]));
    fail(&exec(&["box", "true"]), 1, &["box", "not running"]);
    succeed(&host.cloison(["rm", "box"]));
    fail(&exec(&["box", "true"]), 1, &["no such container", "box"]);
}

#[test]
fn many_processes_at_once_each_get_their_own_output() {
    let host = Host::new();
    let id = host.detached(&[], &["sleep", "1000"]);
    let children: Vec<_> = (0..12)
        .map(|n| host.spawn(["exec", &id, "sh", "-c", &format!("echo {n}; exit {n}")]))
        .collect();
    for (n, child) in children.into_iter().enumerate() {
        let output = child.wait_with_output().unwrap();
        assert_eq!(
            text(&output.stdout),
            format!("{n}\n"),
            "{}",
            text(&output.stderr)
        );
        assert_eq!(output.status.code(), i32::try_from(n).ok());
    }
    succeed(&host.cloison(["rm", "-f", &id]));
}
