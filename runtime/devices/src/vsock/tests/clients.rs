//! Streams that a client on the host asks for.

use std::io::{BufRead, BufReader};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use super::*;

struct Door {
    rig: Rig,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Door {
    fn new() -> Self {
        let (config, path, dir) = Self::config();
        Self {
            rig: Rig::with(config),
            path,
            _dir: dir,
        }
    }

    fn config() -> (VsockConfig, PathBuf, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = Some(UnixListener::bind(&path).unwrap());
        (
            VsockConfig {
                listener,
                ..VsockConfig::default()
            },
            path,
            dir,
        )
    }

    fn client(&self, line: &str) -> UnixStream {
        let mut client = UnixStream::connect(&self.path).unwrap();
        client.write_all(line.as_bytes()).unwrap();
        client
    }

    /// A client that has asked for guest port 80, and the request the guest has got.
    fn ask(&mut self) -> (UnixStream, Header) {
        let client = self.client("CONNECT 80\n");
        let packets = self.rig.packets();
        assert_eq!(packets.len(), 1);
        let request = packets[0].0;
        assert_eq!((request.op, request.dst_port), (Op::Request as u16, 80));
        (client, request)
    }

    /// A client that is connected, past its OK line, and a template for the guest's packets.
    fn open(&mut self) -> (UnixStream, Header) {
        let (client, request) = self.ask();
        self.rig.send(answer(&request, Op::Response), &[]);
        let mut line = String::new();
        // The line is all there is, so that nothing else is read ahead.
        BufReader::new(&client).read_line(&mut line).unwrap();
        assert_eq!(line, format!("OK {}\n", request.src_port));
        (client, answer(&request, Op::Rw))
    }
}

/// A packet of the guest's on the stream that `request` asked for.
fn answer(request: &Header, op: Op) -> Header {
    Header {
        src_port: request.dst_port,
        dst_port: request.src_port,
        ..packet(op)
    }
}

fn all(client: &mut UnixStream) -> String {
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn a_client_is_connected_and_bytes_go_both_ways() {
    let mut door = Door::new();
    let (mut client, data) = door.open();
    client.write_all(b"ping").unwrap();
    assert_eq!(door.rig.heard(), [Heard::Data(b"ping".to_vec())]);
    door.rig.send(data, b"pong");
    let mut pong = [0; 4];
    client.read_exact(&mut pong).unwrap();
    assert_eq!(&pong, b"pong");
}

#[test]
fn what_a_client_writes_behind_its_line_is_the_stream_s() {
    let mut door = Door::new();
    let mut client = door.client("CONNECT 80\nGET / HTTP/1.0\r\n\r\n");
    let request = door.rig.packets().remove(0).0;
    assert_eq!(door.rig.heard(), [], "not before the guest has accepted");
    door.rig.send(answer(&request, Op::Response), &[]);
    assert_eq!(
        door.rig.heard(),
        [Heard::Data(b"GET / HTTP/1.0\r\n\r\n".to_vec())]
    );
    door.rig.send(
        Header {
            flags: 3,
            ..answer(&request, Op::Shutdown)
        },
        &[],
    );
    assert_eq!(all(&mut client), format!("OK {}\n", request.src_port));
}

#[test]
fn a_line_in_pieces_is_a_line() {
    let mut door = Door::new();
    let mut client = door.client("CON");
    assert_eq!(door.rig.heard(), []);
    client.write_all(b"NECT 8").unwrap();
    assert_eq!(door.rig.heard(), []);
    client.write_all(b"0\n").unwrap();
    assert_eq!(door.rig.packets()[0].0.dst_port, 80);
}

#[test]
fn a_client_is_told_when_the_guest_refuses() {
    let mut door = Door::new();
    let (mut client, request) = door.ask();
    door.rig.send(answer(&request, Op::Rst), &[]);
    assert_eq!(all(&mut client), "ERR the guest refused the connection\n");
    assert_eq!(door.rig.device.stream_count(), 0);
}

#[test]
fn a_client_that_says_something_else_is_told_what_is_expected() {
    for line in [
        "\n",
        "CONNECT\n",
        "CONNECT eighty\n",
        "CONNECT 4294967296\n",
        "GET /\r\n",
    ] {
        let mut door = Door::new();
        let mut client = door.client(line);
        assert_eq!(door.rig.heard(), []);
        assert_eq!(all(&mut client), "ERR expected: CONNECT <port>\n");
    }
}

#[test]
fn a_line_without_end_is_refused() {
    let mut door = Door::new();
    let mut client = door.client(&"CONNECT 0000000000000000000000000000000000000001\n".repeat(100));
    assert_eq!(door.rig.heard(), []);
    let mut line = String::new();
    BufReader::new(&mut client).read_line(&mut line).unwrap();
    assert_eq!(line, "ERR the line is too long; expected: CONNECT <port>\n");
}

#[test]
fn a_client_that_hangs_up_in_the_middle_of_its_line_is_forgotten() {
    let mut door = Door::new();
    drop(door.client("CONNECT 8"));
    assert_eq!(door.rig.heard(), []);
    drop(door.client(""));
    assert_eq!(door.rig.heard(), []);
    door.open();
}

#[test]
fn a_client_that_connects_before_the_guest_is_up_is_served_when_it_is() {
    let (config, path, _dir) = Door::config();
    let mut rig = Rig::starved(config);
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"CONNECT 80\n").unwrap();
    rig.settle();
    rig.offer(4, 4096);
    let request = rig.receive_now().unwrap().0;
    rig.send(answer(&request, Op::Response), &[]);
    let mut ok = [0; 3];
    client.read_exact(&mut ok).unwrap();
    assert_eq!(&ok, b"OK ");
}

#[test]
fn a_client_that_hangs_up_before_the_guest_is_up_leaves_no_trace() {
    let (config, path, _dir) = Door::config();
    let mut rig = Rig::starved(config);
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"CONNECT 80\n").unwrap();
    rig.settle();
    assert_eq!(rig.device.stream_count(), 1);
    drop(client);
    rig.settle();
    assert_eq!(rig.device.stream_count(), 0);
    rig.offer(4, 4096);
    assert_eq!(rig.heard(), []);
}

#[test]
fn a_client_that_hangs_up_before_the_guest_answers_has_the_request_withdrawn() {
    let mut door = Door::new();
    let (client, request) = door.ask();
    drop(client);
    assert_eq!(door.rig.heard(), [Heard::Op(Op::Rst)]);
    assert_eq!(door.rig.device.stream_count(), 0);
    door.rig.send(answer(&request, Op::Response), &[]);
    assert_eq!(
        door.rig.heard(),
        [Heard::Op(Op::Rst)],
        "and the guest's late answer is refused"
    );
}

#[test]
fn half_closes_are_respected_both_ways() {
    let mut door = Door::new();
    let (mut client, data) = door.open();
    client.write_all(b"question").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(
        door.rig.heard(),
        [
            Heard::Data(b"question".to_vec()),
            Heard::Shutdown(Shutdown::SEND)
        ]
    );
    door.rig.send(data, b"answer");
    let end = Header {
        op: Op::Shutdown as u16,
        flags: 2,
        ..data
    };
    door.rig.send(end, &[]);
    assert_eq!(all(&mut client), "answer");
    door.rig.send(Header { flags: 1, ..end }, &[]);
    assert_eq!(door.rig.heard(), [Heard::Op(Op::Rst)]);
}

#[test]
fn a_client_that_asks_and_half_closes_at_once_is_served() {
    let mut door = Door::new();
    let client = door.client("CONNECT 80\nquestion");
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let request = door.rig.packets().remove(0).0;
    door.rig.send(answer(&request, Op::Response), &[]);
    assert_eq!(
        door.rig.heard(),
        [
            Heard::Data(b"question".to_vec()),
            Heard::Shutdown(Shutdown::SEND)
        ]
    );
}

#[test]
fn a_client_that_closes_ends_the_stream_both_ways() {
    let mut door = Door::new();
    let (client, data) = door.open();
    drop(client);
    let told = door
        .rig
        .heard()
        .into_iter()
        .fold(Shutdown::NONE, |mut told, heard| {
            let Heard::Shutdown(shutdown) = heard else {
                panic!("{heard:?}")
            };
            told.insert(shutdown);
            told
        });
    assert_eq!(told, Shutdown::BOTH);
    door.rig.send(
        Header {
            op: Op::Rst as u16,
            ..data
        },
        &[],
    );
    assert_eq!(door.rig.device.stream_count(), 0);
}

#[test]
fn a_guest_that_resets_an_open_stream_closes_the_client_s_socket() {
    let mut door = Door::new();
    let (mut client, data) = door.open();
    door.rig.send(
        Header {
            op: Op::Rst as u16,
            ..data
        },
        &[],
    );
    assert_eq!(all(&mut client), "");
}

#[test]
fn a_guest_that_answers_a_request_with_something_else_is_refused_and_the_client_told() {
    for op in [
        Op::Request,
        Op::Rw,
        Op::Shutdown,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        let mut door = Door::new();
        let (mut client, request) = door.ask();
        door.rig.send(answer(&request, op), &[]);
        assert_eq!(door.rig.heard(), [Heard::Op(Op::Rst)]);
        assert_eq!(
            all(&mut client),
            "ERR the guest sent a packet out of turn\n"
        );
    }
}

#[test]
fn a_guest_that_answers_before_it_was_asked_is_refused_and_the_client_told() {
    let (config, path, _dir) = Door::config();
    let mut rig = Rig::starved(config);
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"CONNECT 80\n").unwrap();
    rig.settle();
    rig.send(
        Header {
            src_port: 80,
            dst_port: 0x8000_0000,
            ..packet(Op::Response)
        },
        &[],
    );
    assert_eq!(
        all(&mut client),
        "ERR the guest sent a packet out of turn\n"
    );
    rig.offer(4, 4096);
    assert_eq!(rig.heard(), [Heard::Op(Op::Rst)]);
}

#[test]
fn a_second_response_resets_the_stream() {
    let mut door = Door::new();
    let (mut client, data) = door.open();
    door.rig.send(
        Header {
            op: Op::Response as u16,
            ..data
        },
        &[],
    );
    assert_eq!(door.rig.heard(), [Heard::Op(Op::Rst)]);
    assert_eq!(all(&mut client), "");
}

#[test]
fn clients_of_one_guest_port_have_host_ports_of_their_own() {
    let mut door = Door::new();
    let (_first, a) = door.open();
    let (_second, b) = door.open();
    assert_ne!(a.dst_port, b.dst_port);
    assert!(a.dst_port >= 0x8000_0000 && b.dst_port >= 0x8000_0000);
}

#[test]
fn a_device_reset_tells_clients_that_wait_and_keeps_the_door_open() {
    let mut door = Door::new();
    let (mut waiting, _) = door.ask();
    let (mut open, _) = door.open();
    let slow = door.client("CONNECT ");
    door.rig.settle();
    door.rig.device.reset();
    assert_eq!(all(&mut waiting), "ERR the guest has reset the device\n");
    assert_eq!(all(&mut open), "");
    (&slow).write_all(b"80\n").unwrap();
    assert_eq!(
        door.rig.packets().len(),
        1,
        "who was in the middle of the line goes on"
    );
}
