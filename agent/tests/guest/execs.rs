//! Further processes in a container.

use serde_json::json;
use tokio::io::AsyncReadExt;
use ttrpc::Code;

use crate::agent::{Guest, process, refused, script};

pub async fn an_exec_has_its_own_user_directory_and_environment(guest: Guest) {
    let container = guest.run(&script("sleep 1000")).await;
    let mut other = process();
    other["user"] = json!({"uid": 33, "gid": 44, "additionalGids": [55, 66], "umask": 0o27});
    other["cwd"] = json!("/tmp");
    other["env"] = json!(["PATH=/bin", "COLOUR=red=green"]);
    let script = "id -u; id -g; id -G; pwd; echo $COLOUR $HOME; umask; echo $$ | grep -q '^1$' || echo not init";
    let (code, output) = container.exec_shell(other, script).await;
    assert_eq!(code, 0);
    assert_eq!(
        output,
        "33\n44\n44 55 66\n/tmp\nred=green /tmp\n0027\nnot init\n"
    );
    // The same PID namespace, root and cgroup as the init.
    let (_, output) = container
        .exec_shell(
            process(),
            "cat /proc/1/cmdline | tr '\\0' ' '; cat /proc/self/cgroup",
        )
        .await;
    assert_eq!(output, "sleep 1000 0::/\n");
    container.delete(true).await.unwrap();
}

pub async fn an_exec_may_come_before_the_start(guest: Guest) {
    let container = guest.create(&script("sleep 1000")).await.unwrap();
    let (code, output) = container
        .exec_shell(process(), "hostname; ls /bin/sh")
        .await;
    assert_eq!((code, output.ends_with("/bin/sh\n")), (0, true), "{output}");
    container.start().await.unwrap();
    assert_eq!(container.exec_shell(process(), "exit 9").await.0, 9);
    container.delete(true).await.unwrap();
}

pub async fn an_exec_says_how_it_ended(guest: Guest) {
    let container = guest.run(&script("sleep 1000")).await;
    assert_eq!(container.exec_shell(process(), "exit 9").await.0, 9);
    let mut sleeper = process();
    sleeper["args"] = json!(["sleep", "1000"]);
    let exec = container.exec(sleeper).await.unwrap();
    exec.signal(15, false).await.unwrap();
    let wait = exec.wait().await;
    assert_eq!((wait.exit_code, wait.signal), (143, 15));
    refused(
        exec.signal(15, false).await,
        Code::NOT_FOUND,
        "no such process",
    );
    // An exec that ends at once is not lost.
    for _ in 0..10 {
        let mut quick = process();
        quick["args"] = json!(["false"]);
        assert_eq!(
            container.exec(quick).await.unwrap().wait().await.exit_code,
            1
        );
    }
    container.delete(true).await.unwrap();
}

pub async fn an_exec_of_a_missing_program_is_told_apart(guest: Guest) {
    let container = guest.run(&script("sleep 1000")).await;
    for (program, code, text) in [
        (
            "nope",
            Code::NOT_FOUND,
            "exec: \"nope\": executable file not found in $PATH",
        ),
        ("/etc/data", Code::PERMISSION_DENIED, "permission denied"),
        ("nonsense", Code::PERMISSION_DENIED, "exec format error"),
    ] {
        let mut process = process();
        process["args"] = json!([program]);
        refused(container.exec(process).await, code, text);
    }
    let mut nowhere = process();
    nowhere["cwd"] = json!("/no/such/directory");
    refused(
        container.exec(nowhere).await,
        Code::INVALID_ARGUMENT,
        "working directory /no/such/directory",
    );
    refused(
        container.exec(json!({"args": 5})).await,
        Code::INVALID_ARGUMENT,
        "not an OCI process",
    );
    assert_eq!(container.exec_shell(process(), "exit 0").await.0, 0);
    container.delete(true).await.unwrap();
}

pub async fn a_background_child_does_not_hold_up_a_wait(guest: Guest) {
    let container = guest.run(&script("sleep 1000")).await;
    let mut shell = process();
    shell["args"] = json!(["sh", "-c", "(sleep 1000; echo late) & echo early"]);
    let mut exec = container.exec(shell).await.unwrap();
    assert_eq!(exec.wait().await.exit_code, 0);
    let mut text = [0; 6];
    exec.streams
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut text)
        .await
        .unwrap();
    assert_eq!(&text, b"early\n");
    container.delete(true).await.unwrap();
    // With the child its end of the stream is gone.
    assert_eq!(exec.streams.output().await, "");
}

pub async fn an_exec_can_have_a_terminal(guest: Guest) {
    let container = guest.run(&script("sleep 1000")).await;
    let mut shell = process();
    shell["terminal"] = json!(true);
    shell["user"] = json!({"uid": 33, "gid": 33});
    shell["args"] = json!([
        "sh",
        "-c",
        "stty size; read x; echo got $x; echo own >/dev/tty"
    ]);
    let mut exec = container.exec(shell).await.unwrap();
    exec.streams.expect("33 101").await;
    exec.streams.type_in("word\n").await;
    exec.streams.expect("got word\r\nown").await;
    assert_eq!(exec.wait().await.exit_code, 0);
    container.delete(true).await.unwrap();
}

pub async fn an_exec_is_limited_and_filtered_like_its_container(guest: Guest) {
    let mut spec = script("sleep 1000");
    spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 111, "hard": 222}]);
    spec["process"]["capabilities"] =
        json!({"bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"]});
    spec["process"]["oomScoreAdj"] = json!(77);
    spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}],
    });
    let container = guest.run(&spec).await;
    let text = "ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj; grep -E 'CapEff|Seccomp:' /proc/self/status; \
                mkdir /tmp/x 2>&1";
    for uid in [0, 33] {
        let mut process = process();
        process["user"] = json!({"uid": uid, "gid": uid});
        let (code, output) = container.exec_shell(process, text).await;
        let caps = if uid == 0 {
            "0000000000000001"
        } else {
            "0000000000000000"
        };
        let expected = format!(
            "111\n222\n77\nCapEff:\t{caps}\nSeccomp:\t2\nmkdir: can't create directory '/tmp/x': Not supported\n"
        );
        assert_eq!(
            output.replace("Operation not supported", "Not supported"),
            expected,
            "as user {uid}"
        );
        assert_eq!(code, 1);
    }
    container.delete(true).await.unwrap();
}

pub async fn exec_ids_are_unique_while_they_run(guest: Guest) {
    let container = guest.run(&script("sleep 1000")).await;
    let mut sleeper = process();
    sleeper["args"] = json!(["sleep", "1000"]);
    let first = container.exec_as("same", sleeper.clone()).await.unwrap();
    refused(
        container.exec_as("same", sleeper.clone()).await,
        Code::ALREADY_EXISTS,
        "exec same runs already",
    );
    refused(
        container.exec_as("", sleeper.clone()).await,
        Code::INVALID_ARGUMENT,
        "invalid exec ID",
    );
    first.signal(9, false).await.unwrap();
    first.wait().await;
    container.exec_as("same", sleeper).await.unwrap();
    container.delete(true).await.unwrap();
}
