//! Floods. Whatever the guest does a thousand times, the device holds no more than its limits, does no more than so much in
//! one call, and goes on afterwards.

use super::*;
use crate::vsock::handshake::MAX_HANDSHAKES;
use crate::vsock::table::MAX_CONNECTIONS;

#[test]
fn only_so_many_streams_exist_and_the_next_request_is_refused() {
    let mut rig = Rig::new(vec![]);
    let handle = rig.device.handle();
    let mut taken = 0;
    for _ in 0..MAX_CONNECTIONS {
        let port = handle.attach_any(None, None, None).unwrap();
        taken = port;
        rig.send(
            Header {
                dst_port: port,
                ..packet(Op::Request)
            },
            &[],
        );
    }
    rig.packets();
    assert_eq!(rig.device.stream_count(), MAX_CONNECTIONS);
    let port = handle.attach_any(None, None, None).unwrap();
    let request = Header {
        dst_port: port,
        ..packet(Op::Request)
    };
    rig.send(request, &[]);
    assert_eq!(rig.heard(), [Heard::Op(Op::Rst)]);
    let last = Header {
        dst_port: taken,
        ..packet(Op::Rst)
    };
    rig.send(last, &[]);
    rig.send(request, &[]);
    assert_eq!(rig.receive_op(), Op::Response, "the attachment has waited");
}

#[test]
fn refusals_wait_for_buffers_in_bounded_number_and_hold_up_the_guest_s_packets_meanwhile() {
    let mut rig = Rig::starved(VsockConfig::default());
    rig.guest.write(rig.outgoing, &packet(Op::Rw).to_bytes());
    for _ in 0..128 {
        rig.guest.place(TX, &[readable(rig.outgoing, 44)]);
    }
    rig.kick(TX).unwrap();
    rig.settle();
    let taken = std::iter::from_fn(|| rig.guest.used(TX)).count();
    assert_eq!(taken, 64);
    assert!(
        !rig.host_ready(),
        "the device rests until there are buffers"
    );
    rig.recycle = true;
    rig.offer(3, 4096);
    assert_eq!(rig.packets().len(), 128);
    assert_eq!(std::iter::from_fn(|| rig.guest.used(TX)).count(), 64);
}

#[test]
fn one_call_does_only_so_much_and_the_rest_follows_through_the_host_descriptor() {
    let (mut out, writer) = pipe();
    let mut rig = Rig::new(vec![attachment(NONE, Some(writer))]);
    rig.connect();
    rig.packets();
    let header = Header {
        len: 1,
        ..packet(Op::Rw)
    };
    rig.guest.write(rig.outgoing, &header.to_bytes());
    rig.guest.write(rig.outgoing + 44, b"x");
    for _ in 0..128 {
        rig.guest.place(TX, &[readable(rig.outgoing, 45)]);
    }
    rig.kick(TX).unwrap();
    assert_eq!(drain(&mut out).len(), 64);
    assert!(rig.host_ready());
    rig.settle();
    assert_eq!(drain(&mut out).len(), 64);
    assert!(!rig.host_ready());
}

#[test]
fn requests_and_resets_without_end_leave_nothing_behind() {
    let mut rig = Rig::starved(VsockConfig::default());
    let handle = rig.device.handle();
    for _ in 0..5000 {
        let (done, watch) = done_pipe();
        let (reader, _input) = pipe();
        let both = Attachment {
            done: Some(done),
            ..attachment(Some(reader), NONE)
        };
        handle.attach(both).unwrap();
        rig.say(Op::Request);
        rig.say(Op::Rst);
        assert!(at_end(&watch));
    }
    assert_eq!(rig.device.stream_count(), 0);
    assert!(!rig.device.owes_packets());
    rig.offer(4, 4096);
    assert_eq!(rig.heard(), []);
}

#[test]
fn requests_and_closes_without_buffers_end_in_refusals_not_in_growth() {
    let mut rig = Rig::starved(VsockConfig::default());
    let handle = rig.device.handle();
    let mut streams = 0;
    for guest_port in 0..2 * MAX_CONNECTIONS as u32 {
        // The device stops looking at packets once too many refusals wait; then the attachment stays where it is.
        let _ = handle.attach(attachment(NONE, NONE));
        if rig.guest.free_descriptors(TX) < 4 {
            break;
        }
        let request = Header {
            src_port: guest_port,
            ..packet(Op::Request)
        };
        rig.send(request, &[]);
        let close = Header {
            op: Op::Shutdown as u16,
            flags: 3,
            ..request
        };
        rig.send(close, &[]);
        streams = streams.max(rig.device.stream_count());
    }
    assert_eq!(streams, MAX_CONNECTIONS);
    rig.recycle = true;
    rig.offer(64, 4096);
    rig.packets();
    assert_eq!(rig.device.stream_count(), 0, "each has got its reset");
}

#[test]
fn a_stream_holds_no_more_than_its_credit_whatever_the_sizes_of_packets() {
    for size in [100, 1000, 4096, 65_536] {
        let (reader, _kept) = pipe();
        let (mut out, mut writer) = pipe();
        let stuffed = stuff(&mut writer);
        let mut rig = Rig::new(vec![attachment(Some(reader), Some(writer))]);
        rig.connect();
        let data = vec![5; size];
        let packets = (256 << 10) / size;
        for _ in 0..packets {
            rig.say_data(&data);
        }
        assert_eq!(rig.heard(), []);
        let rest = (256 << 10) - packets * size;
        rig.say_data(&vec![5; rest]);
        rig.say_shutdown(Shutdown::SEND);
        let mut got = 0;
        while !at_end_or_take(&mut out, &mut got) {
            rig.settle();
        }
        assert_eq!(got, stuffed + (256 << 10));
    }
}

/// Takes what there is; answers whether the end was met.
fn at_end_or_take(out: &mut File, got: &mut usize) -> bool {
    let mut buffer = [0; 64 << 10];
    loop {
        match out.read(&mut buffer) {
            Ok(0) => return true,
            Ok(count) => *got += count,
            Err(_) => return false,
        }
    }
}

#[test]
fn clients_that_never_finish_their_line_give_way_to_those_who_come_later() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let mut rig = Rig::with(VsockConfig {
        listener: Some(listener),
        ..VsockConfig::default()
    });
    let mut idle = Vec::new();
    for _ in 0..MAX_HANDSHAKES + 3 {
        let mut client = std::os::unix::net::UnixStream::connect(&path).unwrap();
        client.write_all(b"CONN").unwrap();
        idle.push(client);
        rig.settle();
    }
    for client in &mut idle[..3] {
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "ERR too many clients are connecting\n");
    }
    idle[3].write_all(b"ECT 80\n").unwrap();
    let heard = rig.packets();
    assert_eq!(heard.len(), 1);
    assert_eq!(heard[0].0.dst_port, 80);
}

#[test]
fn more_clients_at_once_than_one_call_lets_in_are_all_let_in() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let mut rig = Rig::with(VsockConfig {
        listener: Some(listener),
        ..VsockConfig::default()
    });
    let clients: Vec<_> = (0..50)
        .map(|port| {
            let mut client = std::os::unix::net::UnixStream::connect(&path).unwrap();
            writeln!(client, "CONNECT {port}").unwrap();
            client
        })
        .collect();
    let mut ports: Vec<u32> = rig
        .packets()
        .iter()
        .map(|(header, _)| header.dst_port)
        .collect();
    ports.sort_unstable();
    assert_eq!(ports, (0..50).collect::<Vec<_>>());
    drop(clients);
}

#[test]
fn a_client_beyond_the_limit_of_streams_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let mut rig = Rig::with(VsockConfig {
        listener: Some(listener),
        ..VsockConfig::default()
    });
    let handle = rig.device.handle();
    for _ in 0..MAX_CONNECTIONS {
        let port = handle.attach_any(None, None, None).unwrap();
        rig.send(
            Header {
                dst_port: port,
                ..packet(Op::Request)
            },
            &[],
        );
    }
    rig.packets();
    let mut client = std::os::unix::net::UnixStream::connect(&path).unwrap();
    client.write_all(b"CONNECT 80\n").unwrap();
    rig.settle();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "ERR there are too many connections\n");
}
