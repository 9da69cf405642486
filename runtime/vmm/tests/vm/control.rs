//! The control socket, and what bad clients can do to it: nothing.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use cloison_vmm::{ControlClient, ControlError, EndReason, VmProcess};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, sendmsg,
    socket,
};

use crate::support::{Bench, readable, wait};

crate::tests![
    a_vm_process_answers_from_the_moment_it_was_launched,
    malformed_requests_earn_an_error_and_harm_nobody,
    a_request_that_is_too_long_earns_an_error,
    descriptors_that_belong_to_nothing_are_refused_and_closed,
    a_client_that_takes_no_replies_is_hung_up_on_and_delays_nobody,
    a_client_too_many_is_told_so,
    a_stream_that_cannot_be_served_is_refused,
    clients_see_the_vm_process_go,
];

struct Vm {
    bench: Bench,
    process: VmProcess,
}

impl Vm {
    fn new() -> Self {
        let mut bench = Bench::with_fake_qemu("exec sleep 1000");
        let process = bench.launch().unwrap();
        Self { bench, process }
    }

    fn raw(&self) -> Raw {
        Raw::connect(&self.bench.path().join("control.sock"))
    }

    /// All is well: the VM answers, and ends when asked.
    fn finish(mut self) {
        let control = self.bench.control();
        assert_eq!(control.status().unwrap().id, "test");
        control.kill().unwrap();
        assert_eq!(wait(&mut self.process).reason, EndReason::Killed);
    }
}

/// A client that says what it likes.
struct Raw(OwnedFd);

impl Raw {
    fn connect(path: &Path) -> Self {
        let socket = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .unwrap();
        connect(socket.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
        Self(socket)
    }

    fn send(&self, text: &[u8], fds: &[i32], flags: MsgFlags) -> nix::Result<usize> {
        let rights = [ControlMessage::ScmRights(fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights };
        let iov = [io::IoSlice::new(text)];
        sendmsg::<()>(
            self.0.as_raw_fd(),
            &iov,
            rights,
            flags | MsgFlags::MSG_NOSIGNAL,
            None,
        )
    }

    fn ask(&self, text: &[u8], fds: &[i32]) -> String {
        self.send(text, fds, MsgFlags::empty()).unwrap();
        self.reply()
    }

    fn reply(&self) -> String {
        assert!(readable(&self.0));
        let mut buffer = vec![0; 65536];
        let length = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }
}

fn a_vm_process_answers_from_the_moment_it_was_launched() {
    let vm = Vm::new();
    let control = vm.bench.control();
    let status = control.status().unwrap();
    assert_eq!(status.pid, vm.process.pid().as_raw() as u32);
    assert_eq!(status.memory_mib, 128);
    assert_eq!(status.engine_pids.len(), 1);
    assert_eq!(control.kernel_log().unwrap(), "");
    vm.finish();
}

fn malformed_requests_earn_an_error_and_harm_nobody() {
    let vm = Vm::new();
    let client = vm.raw();
    let requests: [&[u8]; 12] = [
        b"status",
        b"{}",
        b"[]",
        b"null",
        b"\0",
        b"\xff\xfe",
        br#"{"request":"fly"}"#,
        br#"{"request":"status","extra":1}"#,
        br#"{"request":"attach"}"#,
        br#"{"request":"attach","read":1,"write":true,"done":true}"#,
        br#"{"request":"kill"}{"request":"kill"}"#,
        &[b'['; 60_000],
    ];
    for request in requests {
        let reply = client.ask(request, &[]);
        assert!(reply.contains(r#""reply":"error""#), "{reply}");
    }
    let reply = client.ask(br#"{"request":"status"}"#, &[]);
    assert!(reply.contains(r#""reply":"status""#), "{reply}");
    vm.finish();
}

fn a_request_that_is_too_long_earns_an_error() {
    let vm = Vm::new();
    let client = vm.raw();
    let reply = client.ask(&vec![b' '; 100_000], &[]);
    assert!(reply.contains("65536 bytes"), "{reply}");
    vm.finish();
}

fn descriptors_that_belong_to_nothing_are_refused_and_closed() {
    let vm = Vm::new();
    let client = vm.raw();
    let (reader, writer) = io::pipe().unwrap();
    let fd = writer.as_raw_fd();
    let requests: [(&[u8], &[i32]); 4] = [
        (br#"{"request":"status"}"#, &[fd]),
        (
            br#"{"request":"attach","read":true,"write":true,"done":true}"#,
            &[fd],
        ),
        (
            br#"{"request":"attach","read":false,"write":false,"done":true}"#,
            &[fd, fd],
        ),
        (b"nonsense", &[fd; 253]),
    ];
    for (request, fds) in requests {
        let reply = client.ask(request, fds);
        assert!(reply.contains(r#""reply":"error""#), "{reply}");
    }
    drop(writer);
    assert!(
        readable(reader.as_fd()),
        "a refused descriptor is still open"
    );
    vm.finish();
}

fn a_client_that_takes_no_replies_is_hung_up_on_and_delays_nobody() {
    let vm = Vm::new();
    let stuck = vm.raw();
    let mut sent = 0;
    loop {
        match stuck.send(br#"{"request":"status"}"#, &[], MsgFlags::empty()) {
            Ok(_) => sent += 1,
            Err(Errno::EPIPE | Errno::ECONNRESET) => break,
            Err(errno) => panic!("{errno}"),
        }
        assert!(sent < 1_000_000, "the VM process keeps every reply");
    }
    vm.finish();
}

fn a_client_too_many_is_told_so() {
    let vm = Vm::new();
    let clients: Vec<Raw> = (0..64).map(|_| vm.raw()).collect();
    for client in &clients {
        assert!(
            client
                .ask(br#"{"request":"status"}"#, &[])
                .contains("uptime")
        );
    }
    let late = vm.raw();
    assert!(late.reply().contains("64 clients"));
    assert_eq!(late.reply(), "");
    drop(clients);
    vm.finish();
}

fn a_stream_that_cannot_be_served_is_refused() {
    let vm = Vm::new();
    let control = vm.bench.control();
    let (reader, _writer) = io::pipe().unwrap();
    let error = control
        .attach(Some(reader.as_fd()), None, None)
        .unwrap_err();
    assert!(matches!(error, ControlError::Refused(_)), "{error}");
    let null = std::fs::File::open("/dev/null").unwrap();
    let first = control.attach(Some(null.as_fd()), None, None).unwrap();
    let second = control.attach(None, None, None).unwrap();
    assert!(first >= 0x4000_0000 && second != first);
    vm.finish();
}

fn clients_see_the_vm_process_go() {
    let mut vm = Vm::new();
    let (one, other) = (vm.bench.control(), vm.bench.control());
    one.kill().unwrap();
    assert!(readable(&other));
    assert_eq!(wait(&mut vm.process).reason, EndReason::Killed);
    assert!(matches!(other.status(), Err(ControlError::Gone)));
    let path = vm.bench.path().join("control.sock");
    assert!(matches!(
        ControlClient::connect(&path),
        Err(ControlError::Connect { .. })
    ));
}
