//! Connections of the guest's that lead to Unix sockets on the host.

use std::os::unix::net::{UnixListener, UnixStream};

use super::*;
use crate::VsockError;

fn rig() -> (Rig, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let listen_prefix = Some(dir.path().join("vsock.sock"));
    (
        Rig::with(VsockConfig {
            listen_prefix,
            ..VsockConfig::default()
        }),
        dir,
    )
}

fn listen(dir: &tempfile::TempDir) -> UnixListener {
    UnixListener::bind(dir.path().join(format!("vsock.sock_{HOST_PORT}"))).unwrap()
}

#[test]
fn a_connection_leads_to_the_socket_named_after_its_port() {
    let (mut rig, dir) = rig();
    let listener = listen(&dir);
    rig.connect();
    let (mut server, _) = listener.accept().unwrap();
    rig.say_data(b"request");
    let mut request = [0; 7];
    server.read_exact(&mut request).unwrap();
    assert_eq!(&request, b"request");
    server.write_all(b"reply").unwrap();
    server.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(
        rig.heard(),
        [
            Heard::Data(b"reply".to_vec()),
            Heard::Shutdown(Shutdown::SEND)
        ]
    );
    rig.say_shutdown(Shutdown::SEND);
    assert_eq!(server.read(&mut [0]).unwrap(), 0);
}

#[test]
fn without_a_listener_the_guest_is_refused() {
    let (mut rig, dir) = rig();
    rig.say(Op::Request);
    assert_eq!(rig.heard(), [Heard::Op(Op::Rst)], "no such socket");
    drop(listen(&dir));
    rig.say(Op::Request);
    assert_eq!(
        rig.heard(),
        [Heard::Op(Op::Rst)],
        "a socket nobody listens at"
    );
    assert_eq!(rig.device.stream_count(), 0);
}

#[test]
fn something_that_is_no_socket_is_a_refusal() {
    let (mut rig, dir) = rig();
    std::fs::write(dir.path().join(format!("vsock.sock_{HOST_PORT}")), "").unwrap();
    rig.say(Op::Request);
    assert_eq!(rig.heard(), [Heard::Op(Op::Rst)]);
}

#[test]
fn without_a_prefix_every_port_is_refused() {
    let mut rig = Rig::new(vec![]);
    rig.say(Op::Request);
    assert_eq!(rig.heard(), [Heard::Op(Op::Rst)]);
}

#[test]
fn an_attachment_goes_before_a_listener() {
    let (mut rig, dir) = rig();
    let listener = listen(&dir);
    listener.set_nonblocking(true).unwrap();
    let (mut out, writer) = pipe();
    rig.device
        .handle()
        .attach(attachment(NONE, Some(writer)))
        .unwrap();
    rig.connect();
    rig.say_data(b"attached");
    assert_eq!(drain(&mut out), b"attached");
    assert!(listener.accept().is_err());
}

#[test]
fn a_listener_that_does_not_accept_is_a_refusal_and_no_wait() {
    let (mut rig, dir) = rig();
    let listener = listen(&dir);
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(2).unwrap()).unwrap();
    let mut refused = 0;
    for guest_port in 0..10 {
        rig.send(
            Header {
                src_port: guest_port,
                ..packet(Op::Request)
            },
            &[],
        );
        refused += rig
            .packets()
            .iter()
            .filter(|(h, _)| h.op == Op::Rst as u16)
            .count();
        if refused > 0 {
            break;
        }
    }
    assert_eq!(refused, 1);
    let (_server, _) = listener.accept().unwrap();
    rig.connect();
}

#[test]
fn a_server_that_closes_is_seen_by_the_guest() {
    let (mut rig, dir) = rig();
    let listener = listen(&dir);
    rig.connect();
    drop(listener.accept().unwrap());
    let mut told = Shutdown::NONE;
    for heard in rig.heard() {
        let Heard::Shutdown(shutdown) = heard else {
            panic!("{heard:?}")
        };
        told.insert(shutdown);
    }
    assert_eq!(told, Shutdown::BOTH);
}

#[test]
fn a_slow_server_stops_the_guest_and_gets_everything() {
    let (mut rig, dir) = rig();
    let listener = listen(&dir);
    rig.connect();
    let (mut server, _): (UnixStream, _) = listener.accept().unwrap();
    // All of the credit, and again as much of it as came back because the socket took it.
    let mut sent = 0u32;
    let mut credit = 256 << 10;
    while credit >= sent + 1000 {
        rig.say_data(&[3; 1000]);
        sent += 1000;
        for (header, _) in rig.packets() {
            assert_eq!(header.op, Op::CreditUpdate as u16);
            credit = header.fwd_cnt + header.buf_alloc;
        }
    }
    rig.say_shutdown(Shutdown::BOTH);
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        server.read_to_end(&mut all).unwrap();
        all.len()
    });
    while rig.device.stream_count() > 0 {
        rig.guest.host(&mut rig.device, 10_000).unwrap();
        while rig.receive_now().is_some() {}
    }
    assert_eq!(reader.join().unwrap(), sent as usize);
}

#[test]
fn a_prefix_too_long_for_a_socket_s_name_is_an_error_at_the_start() {
    let listen_prefix = Some("x".repeat(100).into());
    let error = Vsock::new(VsockConfig {
        listen_prefix,
        ..VsockConfig::default()
    })
    .unwrap_err();
    assert!(matches!(error, VsockError::Prefix { .. }));
    assert!(error.to_string().contains("shorter"), "{error}");
}
