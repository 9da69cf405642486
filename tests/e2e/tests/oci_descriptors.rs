//! Descriptors that a caller hands on beside stdio: `--preserve-fds` of `create`, `run` and `exec`, and those of a service manager.

use std::fs::{self, File};
use std::io::{PipeReader, PipeWriter, Read, Seek, SeekFrom, Write, pipe};
use std::net::{Shutdown, TcpListener};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::eventfd::EventFd;

use crate::host::{fail, succeed, text};
use crate::oci::{Bundle, arguments, command};

/// Says the numbers of a shell's descriptors, and one more: that of the directory that ls reads.
const NUMBERS: &str = "echo $(ls /proc/self/fd)";

/// Has a command find these at 3 and the numbers after it.
pub fn hand(command: &mut Command, descriptors: Vec<OwnedFd>) {
    // Out of the way of the numbers that they get.
    let above = |fd: OwnedFd| {
        let number = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(200)).unwrap();
        // SAFETY: fcntl(2) has just made it, and nobody else knows its number.
        unsafe { OwnedFd::from_raw_fd(number) }
    };
    let descriptors: Vec<OwnedFd> = descriptors.into_iter().map(above).collect();
    let hand = move || {
        for (fd, number) in descriptors.iter().zip(3..) {
            // SAFETY: dup2(2) takes two integers.
            if unsafe { libc::dup2(fd.as_raw_fd(), number) } == -1 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: system calls alone between fork and exec.
    unsafe { command.pre_exec(hand) };
}

/// Runs a verb that is given these descriptors, which are the test's no longer.
fn run(bundle: &Bundle, args: &[&str], descriptors: Vec<OwnedFd>) -> Output {
    let mut command = command(&bundle.host);
    hand(command.args(args), descriptors);
    command.output().unwrap()
}

/// Runs the container in the foreground, with that many preserved.
fn run_container(bundle: &Bundle, count: &str, descriptors: Vec<OwnedFd>) -> Output {
    let dir = bundle.dir();
    let dir = dir.to_str().unwrap();
    let args = ["run", "--preserve-fds", count, "--bundle", dir, "one"];
    run(bundle, &args, descriptors)
}

/// A pipe that has this to be read, and no more.
fn filled(text: &str) -> PipeReader {
    let (reader, mut writer) = pipe().unwrap();
    writer.write_all(text.as_bytes()).unwrap();
    reader
}

fn read(mut from: impl Read) -> String {
    let mut text = String::new();
    from.read_to_string(&mut text).unwrap();
    text
}

/// A file with ten digits, opened to be read from the fifth on.
fn digits(bundle: &Bundle) -> File {
    let mut file = File::open(bundle.host.file("digits", "0123456789")).unwrap();
    file.seek(SeekFrom::Start(4)).unwrap();
    file
}

/// A file that is opened to be appended to.
fn appended(bundle: &Bundle) -> (PathBuf, File) {
    let path = bundle.host.file("appended", "before\n");
    let file = File::options().append(true).open(&path).unwrap();
    (path, file)
}

#[test]
fn run_hands_on_pipes_files_and_sockets_under_their_numbers_and_nothing_else() {
    let script = "cat <&3; echo four >&4; head -c 3 <&5; echo >&5 || echo read-only
        echo after >&6; cat <&7; echo answer >&7; ls /proc/self/fd/8/; echo > /proc/self/fd/8/made; cat <&9 | wc -c
        readlink /proc/self/fd/9";
    let bundle = Bundle::shell(&format!("{NUMBERS}; ({script}) 2>/dev/null"));
    let dir = bundle.host.path("directory");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("inside"), "").unwrap();
    let (mut read_four, four) = pipe().unwrap();
    let (seven, mut host) = UnixStream::pair().unwrap();
    host.write_all(b"question\n").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    let (path, after) = appended(&bundle);
    let descriptors = vec![
        filled("three\n").into(),
        four.into(),
        digits(&bundle).into(),
        after.into(),
        seven.into(),
        File::open(&dir).unwrap().into(),
        File::open("/dev/null").unwrap().into(),
        // One that is not to be handed on.
        filled("leaked").into(),
    ];
    let output = run_container(&bundle, "7", descriptors);
    assert_eq!(
        succeed(&output),
        "0 1 10 2 3 4 5 6 7 8 9\nthree\n456read-only\nquestion\ninside\n0\n/dev/null\n",
        "{}",
        bundle.log()
    );
    assert_eq!(read(&mut read_four), "four\n");
    assert_eq!(read(&mut host), "answer\n");
    assert_eq!(fs::read_to_string(path).unwrap(), "before\nafter\n");
    assert!(dir.join("made").exists());
}

#[test]
fn a_created_container_has_its_services_descriptors_first() {
    let script = "echo $LISTEN_FDS $LISTEN_PID $$; cat <&3; cat <&4";
    let bundle = Bundle::shell(&format!("{script}; {NUMBERS}"));
    let dir = bundle.dir();
    let create = |descriptors: Vec<OwnedFd>, pid: &str| {
        let script = format!("LISTEN_FDS=1 LISTEN_PID={pid} exec \"$0\" \"$@\"");
        let mut command = Command::new("busybox");
        command.args(["sh", "-c", &script]);
        command.args(arguments(&bundle.host));
        let args = ["create", "--preserve-fds", "1", "--bundle"];
        command.args(args).arg(&dir).arg("one");
        hand(&mut command, descriptors);
        let out = File::create(bundle.host.path("out")).unwrap();
        command
            .stdin(Stdio::null())
            .stderr(out.try_clone().unwrap());
        command.stdout(out).status().unwrap()
    };
    let (service, mut host) = UnixStream::pair().unwrap();
    let (reader, mut writer) = pipe().unwrap();
    let created = create(vec![service.into(), reader.into()], "$$");
    assert!(created.success(), "{}{}", bundle.written(), bundle.log());
    // What is handed on stays with the container.
    host.write_all(b"to the service\n").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    writer.write_all(b"and preserved\n").unwrap();
    drop(writer);
    succeed(&bundle.run(&["start", "one"]));
    // It has ended when its end of the socket is closed.
    assert_eq!(read(&mut host), "");
    until_stopped(&bundle);
    let written = bundle.written();
    assert_eq!(
        written,
        "1 1 1\nto the service\nand preserved\n0 1 2 3 4 5\n",
        "{}",
        bundle.log()
    );
    succeed(&bundle.run(&["delete", "one"]));

    // Those of another process are not ours, and what is preserved begins at 3.
    let script = format!("echo -$LISTEN_FDS-; cat <&3; {NUMBERS}");
    let bundle = bundle.with(|config| config["process"]["args"][2] = script.into());
    let mut command = command(&bundle.host);
    command.env("LISTEN_FDS", "1").env("LISTEN_PID", "1");
    command.args(["run", "--preserve-fds", "1", "--bundle"]);
    command.arg(bundle.dir()).arg("one");
    hand(&mut command, vec![filled("three\n").into()]);
    let said = succeed(&command.output().unwrap());
    assert_eq!(said, "--\nthree\n0 1 2 3 4\n");
}

fn until_stopped(bundle: &Bundle) {
    while !succeed(&bundle.run(&["state", "one"])).contains("stopped") {
        thread::yield_now();
    }
}

#[test]
fn an_exec_has_descriptors_of_its_own() {
    let bundle = Bundle::shell("while :; do sleep 1; done");
    bundle.create_and_start();
    let exec = |script: &str, count: &str, descriptors: Vec<OwnedFd>| {
        let args = ["exec", "--preserve-fds", count, "one", "sh", "-c", script];
        run(&bundle, &args, descriptors)
    };
    let (mut read_four, four) = pipe().unwrap();
    let (five, mut host) = UnixStream::pair().unwrap();
    host.write_all(b"question\n").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    let script = format!("{NUMBERS}; cat <&3; echo four >&4; cat <&5; echo answer >&5");
    let descriptors = vec![filled("three\n").into(), four.into(), five.into()];
    assert_eq!(
        succeed(&exec(&script, "3", descriptors)),
        "0 1 2 3 4 5 6\nthree\nquestion\n"
    );
    assert_eq!(read(&mut read_four), "four\n");
    assert_eq!(read(&mut host), "answer\n");

    // Files are shown to the guest that runs.
    let (path, after) = appended(&bundle);
    let descriptors = vec![digits(&bundle).into(), after.into()];
    let script = "head -c 3 <&3; echo after >&4; echo x >&3 2>/dev/null || echo read-only";
    let script = format!("{script}; {NUMBERS}");
    assert_eq!(
        succeed(&exec(&script, "2", descriptors)),
        "456read-only\n0 1 2 3 4 5\n",
        "{}",
        bundle.log()
    );
    assert_eq!(fs::read_to_string(path).unwrap(), "before\nafter\n");
    let sandbox = bundle.host.run_dir().join("sandboxes/one");
    let entries = [sandbox.clone(), sandbox.join("shared")].map(|dir| fs::read_dir(dir).unwrap());
    let names = entries.into_iter().flatten().flatten();
    let lent = names.filter(|entry| entry.file_name().len() == 64);
    assert_eq!(lent.count(), 0, "what was shown for an exec is there still");

    // One that goes on by itself, as podman's does.
    let (mut reader, writer) = pipe().unwrap();
    let script = "echo detached >&4; cat <&3 >&4";
    let exec = ["exec", "--detach", "--preserve-fds", "2", "one"];
    let words = [&exec[..], &["sh", "-c", script]].concat();
    let descriptors = vec![digits(&bundle).into(), writer.into()];
    succeed(&run(&bundle, &words, descriptors));
    assert_eq!(read(&mut reader), "detached\n456789");
}

#[test]
fn a_container_in_the_vm_of_another_and_its_execs_have_descriptors() {
    let first = Bundle::shell("while :; do sleep 1; done");
    let pid = first.create_and_start();
    let script = "cat <&3; cat <&4; while :; do sleep 1; done";
    let second = Bundle::shell(script).with(|config| {
        for namespace in config["linux"]["namespaces"].as_array_mut().unwrap() {
            if namespace["type"] == "network" {
                namespace["path"] = format!("/proc/{pid}/ns/net").into();
            }
        }
    });
    let dir = second.dir();
    let run_two = ["run", "--detach", "--preserve-fds", "2", "--bundle"];
    let words = [&run_two[..], &[dir.to_str().unwrap(), "two"]].concat();
    let mut command = command(&first.host);
    let out = first.host.path("two");
    let descriptors = vec![filled("three\n").into(), digits(&first).into()];
    hand(command.args(words), descriptors);
    let status = command.stdout(File::create(&out).unwrap()).status();
    assert!(status.unwrap().success(), "{}", first.log());
    let words = ["exec", "--preserve-fds", "1", "two", "head", "-c", "3"];
    let words = [&words[..], &["/proc/self/fd/3"]].concat();
    let exec = run(&first, &words, vec![digits(&first).into()]);
    // Opened by its path it begins at its beginning.
    assert_eq!(succeed(&exec), "012", "{}", first.log());
    succeed(&first.run(&["delete", "--force", "two"]));
    assert_eq!(fs::read_to_string(out).unwrap(), "three\n456789");
}

#[test]
fn an_end_waits_for_nobody_who_keeps_a_descriptor_open_and_loses_nothing() {
    let bundle = Bundle::shell(
        "yes four | head -c 50000 >&4; yes five | head -c 50000 >&5; sleep 1000 <&3 & exit 6",
    );
    let (reader, kept) = pipe().unwrap();
    let (mut four, writer) = pipe().unwrap();
    let (five, mut host) = UnixStream::pair().unwrap();
    // The test has the other ends, and a copy of one that is handed on.
    let (kept, copy): (PipeWriter, PipeWriter) = (kept, writer.try_clone().unwrap());
    let output = run_container(
        &bundle,
        "3",
        vec![reader.into(), writer.into(), five.into()],
    );
    assert_eq!(output.status.code(), Some(6), "{}", text(&output.stderr));
    drop(copy);
    assert_eq!(read(&mut four).len(), 50_000);
    assert_eq!(read(&mut host).len(), 50_000);
    // Nobody reads it any more.
    let mut kept = kept;
    assert!(kept.write_all(b"x").is_err());
}

#[test]
fn megabytes_pass_through_a_preserved_pipe_and_socket() {
    let bundle = Bundle::shell("cat <&3 >&4; cat <&5 | sha256sum");
    let sent: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    let (three, mut to_three) = pipe().unwrap();
    let (mut from_four, four) = pipe().unwrap();
    let (five, mut to_five) = UnixStream::pair().unwrap();
    let copies = [sent.clone(), sent.clone()];
    let [copy, other] = copies;
    let writer = thread::spawn(move || to_three.write_all(&copy).unwrap());
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        from_four.read_to_end(&mut all).map(|_| all).unwrap()
    });
    let talker = thread::spawn(move || to_five.write_all(&other).unwrap());
    let output = run_container(&bundle, "3", vec![three.into(), four.into(), five.into()]);
    writer.join().unwrap();
    talker.join().unwrap();
    assert!(reader.join().unwrap() == sent);
    let mut sum: Child = Command::new("busybox")
        .arg("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    sum.stdin.take().unwrap().write_all(&sent).unwrap();
    let sum = sum.wait_with_output().unwrap();
    assert_eq!(succeed(&output), text(&sum.stdout));
}

#[test]
fn a_container_with_a_terminal_has_descriptors_beside_it() {
    let bundle = Bundle::shell("cat <&3 >&4; test -t 0 && echo tty >&4")
        .with(|config| config["process"]["terminal"] = true.into());
    let (reader, four) = pipe().unwrap();
    let console = bundle.host.path("console.sock");
    let listener = UnixListener::bind(&console).unwrap();
    let (dir, console) = (bundle.dir(), console.to_str().unwrap().to_owned());
    let create = [
        "create",
        "--preserve-fds",
        "2",
        "--console-socket",
        &console,
    ];
    let words = [&create[..], &["--bundle", dir.to_str().unwrap(), "one"]].concat();
    let descriptors = vec![filled("three\n").into(), four.into()];
    succeed(&run(&bundle, &words, descriptors));
    // The terminal's master is in what is not received.
    let _terminal = listener.accept().unwrap();
    succeed(&bundle.run(&["start", "one"]));
    assert_eq!(read(reader), "three\ntty\n");
}

#[test]
fn what_cannot_be_handed_into_a_vm_is_refused_with_its_number_and_the_reason() {
    let bundle = Bundle::shell("true");
    let listener = || UnixListener::bind(bundle.host.path("listener")).unwrap();
    let good = || OwnedFd::from(filled("x"));
    let refused = |descriptors: Vec<OwnedFd>, words: &[&str]| {
        let count = descriptors.len().to_string();
        fail(&run_container(&bundle, &count, descriptors), 1, words);
        assert_eq!(succeed(&bundle.run(&["list", "-q"])), "");
    };
    refused(
        vec![good(), listener().into()],
        &["descriptor 4", "listens"],
    );
    let tcp = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    refused(vec![tcp.into()], &["descriptor 3", "listens"]);
    let (datagrams, _other) = UnixDatagram::pair().unwrap();
    refused(vec![datagrams.into()], &["descriptor 3", "datagrams"]);
    let event = EventFd::new().unwrap();
    refused(
        vec![good(), good(), event.into()],
        &["descriptor 5", "eventfd"],
    );
    let fuse = File::open("/dev/kmsg").unwrap();
    refused(vec![fuse.into()], &["descriptor 3", "/dev/kmsg"]);
    let two = || vec![good(), good()];
    let missing = run_container(&bundle, "3", two());
    fail(&missing, 1, &["--preserve-fds 3", "descriptor 5"]);
    let many = run_container(&bundle, "65", two());
    fail(&many, 1, &["65 descriptors", "at most 64"]);
    assert_eq!(succeed(&bundle.run(&["list", "-q"])), "");

    let bundle = bundle.with(|config| {
        config["process"]["args"][2] = "while :; do sleep 1; done".into();
    });
    bundle.create_and_start();
    let words = ["exec", "--preserve-fds", "2", "one", "true"];
    let exec = run(&bundle, &words, vec![good()]);
    fail(&exec, 255, &["--preserve-fds 2", "descriptor 4"]);
    let (datagrams, _other) = UnixDatagram::pair().unwrap();
    let exec = run(&bundle, &words, vec![good(), datagrams.into()]);
    fail(&exec, 255, &["descriptor 4", "datagrams"]);
}

#[test]
fn as_many_as_there_can_be_are_handed_on() {
    let bundle = Bundle::shell("for n in $(seq 3 66); do eval \"echo \\$n >&$n\"; done");
    let pairs: Vec<_> = (0..64).map(|_| UnixStream::pair().unwrap()).collect();
    let (ours, theirs): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    let descriptors = theirs.into_iter().map(OwnedFd::from).collect();
    let output = run_container(&bundle, "64", descriptors);
    assert_eq!(succeed(&output), "", "{}", bundle.log());
    for (number, host) in (3 as RawFd..).zip(ours) {
        assert_eq!(read(host), format!("{number}\n"));
    }
}
