//! Streams that behave: data, ends, and errors of the host's descriptors, over attachments.

use std::os::unix::net::UnixStream;

use super::*;

#[test]
fn bytes_of_the_guest_s_come_out_of_the_write_descriptor() {
    let (mut reader, writer) = pipe();
    let mut rig = Rig::new(vec![attachment(NONE, Some(writer))]);
    rig.connect();
    rig.say_data(b"hello ");
    rig.say_data(b"world");
    assert_eq!(drain(&mut reader), b"hello world");
}

#[test]
fn bytes_of_the_read_descriptor_reach_the_guest() {
    let (reader, mut writer) = pipe();
    let (_kept, sink) = pipe();
    let mut rig = Rig::new(vec![attachment(Some(reader), Some(sink))]);
    writer.write_all(b"there from the start").unwrap();
    rig.connect();
    assert_eq!(rig.heard(), [Heard::Data(b"there from the start".to_vec())]);
    writer.write_all(b"later").unwrap();
    assert_eq!(rig.heard(), [Heard::Data(b"later".to_vec())]);
}

#[test]
fn the_end_of_the_read_descriptor_follows_its_last_byte() {
    let (reader, mut writer) = pipe();
    let (_kept, sink) = pipe();
    let mut rig = Rig::new(vec![attachment(Some(reader), Some(sink))]);
    writer.write_all(b"last words").unwrap();
    drop(writer);
    rig.connect();
    assert_eq!(
        rig.heard(),
        [
            Heard::Data(b"last words".to_vec()),
            Heard::Shutdown(Shutdown::SEND)
        ]
    );
    rig.say_data(b"still open this way");
    assert_eq!(rig.heard(), []);
}

#[test]
fn the_guest_s_end_closes_the_write_descriptor_after_its_last_byte() {
    let (reader, _kept) = pipe();
    let (mut out, writer) = pipe();
    let mut rig = Rig::new(vec![attachment(Some(reader), Some(writer))]);
    rig.connect();
    rig.say_data(b"last words");
    assert!(!at_end_after(&mut out, b"last words"));
    rig.say_shutdown(Shutdown::SEND);
    assert!(at_end(&out));
    assert_eq!(rig.heard(), [], "the other way stays open");
}

fn at_end_after(out: &mut File, expected: &[u8]) -> bool {
    assert_eq!(drain(&mut *out), expected);
    at_end(out)
}

#[test]
fn without_a_read_descriptor_the_guest_sees_the_end_at_once() {
    let (_out, writer) = pipe();
    let mut rig = Rig::new(vec![attachment(NONE, Some(writer))]);
    rig.connect();
    assert_eq!(rig.heard(), [Heard::Shutdown(Shutdown::SEND)]);
}

#[test]
fn without_a_write_descriptor_the_guest_is_told_not_to_send() {
    let (reader, mut writer) = pipe();
    let mut rig = Rig::new(vec![attachment(Some(reader), NONE)]);
    rig.connect();
    assert_eq!(rig.heard(), [Heard::Shutdown(Shutdown::RECEIVE)]);
    rig.say_data(b"sent before it was told");
    writer.write_all(b"and still").unwrap();
    assert_eq!(rig.heard(), [Heard::Data(b"and still".to_vec())]);
}

#[test]
fn without_descriptors_the_stream_is_over_both_ways_and_done_is_closed() {
    let (done, watch) = done_pipe();
    let nothing = Attachment {
        done: Some(done),
        ..attachment(NONE, NONE)
    };
    let mut rig = Rig::new(vec![nothing]);
    assert!(!at_end(&watch), "it waits for the guest");
    rig.connect();
    assert_eq!(rig.heard(), [Heard::Shutdown(Shutdown::BOTH)]);
    assert!(at_end(&watch));
    assert_eq!(
        rig.device.stream_count(),
        1,
        "the guest still has its socket"
    );
    rig.say_shutdown(Shutdown::BOTH);
    assert_eq!(rig.heard(), [Heard::Op(Op::Rst)]);
    assert_eq!(rig.device.stream_count(), 0);
}

#[test]
fn a_reader_that_is_gone_makes_the_guest_s_writes_fail_and_nothing_else() {
    let (reader, mut writer) = pipe();
    let (out, sink) = pipe();
    let mut rig = Rig::new(vec![attachment(Some(reader), Some(sink))]);
    rig.connect();
    drop(out);
    assert_eq!(rig.heard(), [], "nothing was written yet");
    rig.say_data(b"into the void");
    assert_eq!(rig.heard(), [Heard::Shutdown(Shutdown::RECEIVE)]);
    rig.say_data(b"sent before the guest knew");
    writer.write_all(b"the other way").unwrap();
    assert_eq!(rig.heard(), [Heard::Data(b"the other way".to_vec())]);
}

#[test]
fn a_full_device_file_makes_the_guest_s_writes_fail() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut rig = Rig::new(vec![attachment(NONE, Some(full))]);
    rig.connect();
    assert_eq!(rig.heard(), [Heard::Shutdown(Shutdown::SEND)]);
    rig.say_data(b"no room");
    assert_eq!(rig.heard(), [Heard::Shutdown(Shutdown::RECEIVE)]);
}

#[test]
fn a_read_error_is_an_end() {
    let pty = nix::pty::openpty(None, None).unwrap();
    nix::fcntl::fcntl(
        &pty.master,
        nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK),
    )
    .unwrap();
    drop(pty.slave);
    let (_out, sink) = pipe();
    let mut rig = Rig::new(vec![attachment(Some(pty.master), Some(sink))]);
    rig.connect();
    assert_eq!(rig.heard(), [Heard::Shutdown(Shutdown::SEND)]);
}

#[test]
fn a_regular_file_is_read_to_its_end_and_written() {
    let mut input = tempfile::NamedTempFile::new().unwrap();
    let text: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
    input.write_all(&text).unwrap();
    let output = tempfile::NamedTempFile::new().unwrap();
    let write = output.reopen().unwrap();
    let mut rig = Rig::new(vec![attachment(Some(input.reopen().unwrap()), Some(write))]);
    rig.connect();
    let mut heard = rig.heard();
    assert_eq!(heard.pop(), Some(Heard::Shutdown(Shutdown::SEND)));
    let mut got = Vec::new();
    for packet in heard {
        let Heard::Data(data) = packet else {
            panic!("{packet:?}")
        };
        rig.say_data(&data);
        got.extend(data);
    }
    assert_eq!(got, text);
    rig.say_shutdown(Shutdown::BOTH);
    assert_eq!(std::fs::read(output.path()).unwrap(), text);
}

#[test]
fn the_null_device_is_an_empty_input_and_a_bottomless_output() {
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .unwrap();
    let both = attachment(Some(null.try_clone().unwrap()), Some(null));
    let mut rig = Rig::new(vec![both]);
    rig.connect();
    for _ in 0..100 {
        rig.say_data(&[7; 60_000]);
        for packet in rig.heard() {
            assert!(
                [Heard::Shutdown(Shutdown::SEND), Heard::Op(Op::CreditUpdate)].contains(&packet)
            );
        }
    }
}

#[test]
fn one_socket_for_both_ways_is_half_closed_by_shutdown() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let kept_elsewhere = ours.try_clone().unwrap();
    let both = attachment(Some(ours.try_clone().unwrap()), Some(ours));
    let mut rig = Rig::new(vec![both]);
    theirs.set_nonblocking(true).unwrap();
    rig.connect();
    rig.say_data(b"question");
    rig.say_shutdown(Shutdown::SEND);
    let mut question = String::new();
    theirs.read_to_string(&mut question).unwrap();
    assert_eq!(
        question, "question",
        "and then the end, though a duplicate is open elsewhere"
    );
    theirs.write_all(b"answer").unwrap();
    assert_eq!(rig.heard(), [Heard::Data(b"answer".to_vec())]);
    drop(theirs);
    assert_eq!(rig.heard(), [Heard::Shutdown(Shutdown::SEND)]);
    drop(kept_elsewhere);
}

#[test]
fn a_socket_that_is_only_written_to_is_closed_but_not_shut_down() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let shared_with_others = ours.try_clone().unwrap();
    let mut rig = Rig::new(vec![attachment(NONE, Some(ours))]);
    theirs.set_nonblocking(true).unwrap();
    rig.connect();
    rig.say_shutdown(Shutdown::BOTH);
    assert!(!at_end(&theirs), "others may still write to it");
    drop(shared_with_others);
    assert!(at_end(&theirs));
}

#[test]
fn a_socket_whose_other_end_is_closed_ends_both_ways_unasked() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut rig = Rig::new(vec![attachment(
        Some(ours.try_clone().unwrap()),
        Some(ours),
    )]);
    rig.connect();
    theirs.write_all(b"bye").unwrap();
    drop(theirs);
    let heard = rig.heard();
    let mut told = Shutdown::NONE;
    let mut data = Vec::new();
    for packet in heard {
        match packet {
            Heard::Data(bytes) => data.extend(bytes),
            Heard::Shutdown(shutdown) => told.insert(shutdown),
            Heard::Op(op) => panic!("{op:?}"),
        }
    }
    assert_eq!((data.as_slice(), told), (&b"bye"[..], Shutdown::BOTH));
}

#[test]
fn closing_by_the_guest_is_answered_at_once_and_a_slow_reader_still_gets_every_byte() {
    let (mut out, mut writer) = pipe();
    let stuffed = stuff(&mut writer);
    let (done, watch) = done_pipe();
    let slow = Attachment {
        done: Some(done),
        ..attachment(NONE, Some(writer))
    };
    let mut rig = Rig::new(vec![slow]);
    rig.connect();
    assert_eq!(rig.heard(), [Heard::Shutdown(Shutdown::SEND)]);
    rig.say_data(b"the last line");
    rig.say_shutdown(Shutdown::BOTH);
    assert_eq!(rig.heard(), [Heard::Op(Op::Rst)]);
    assert!(!at_end(&watch), "not all bytes are written");
    let got = drain(&mut out);
    assert_eq!(got.len(), stuffed);
    rig.settle();
    assert_eq!(drain(&mut out), b"the last line");
    assert!(at_end(&watch));
    assert_eq!(rig.device.stream_count(), 0);
}

#[test]
fn a_guest_that_tires_of_waiting_for_a_slow_reader_takes_nothing_back() {
    let (mut out, mut writer) = pipe();
    let stuffed = stuff(&mut writer);
    let (reader, _kept) = pipe();
    let mut rig = Rig::new(vec![attachment(Some(reader), Some(writer))]);
    rig.connect();
    rig.say_data(b"the last line");
    rig.say_shutdown(Shutdown::SEND);
    rig.say(Op::Rst);
    assert_eq!(drain(&mut out).len(), stuffed);
    rig.settle();
    assert_eq!(drain(&mut out), b"the last line");
    assert!(at_end(&out));
    assert_eq!(rig.device.stream_count(), 0);
}

#[test]
fn a_reset_by_the_guest_closes_everything_and_is_not_answered() {
    let (reader, writer) = pipe();
    let (out, sink) = pipe();
    let (done, watch) = done_pipe();
    let both = Attachment {
        done: Some(done),
        ..attachment(Some(reader), Some(sink))
    };
    let mut rig = Rig::new(vec![both]);
    rig.connect();
    rig.say(Op::Rst);
    assert_eq!(rig.heard(), []);
    assert!(at_end(&out) && at_end(&watch));
    assert!(
        nix::unistd::write(&writer, b"x").is_err(),
        "nobody reads the input any more"
    );
    assert_eq!(rig.device.stream_count(), 0);
}

#[test]
fn a_guest_that_wants_no_more_stops_the_reading() {
    let (reader, writer) = pipe();
    let (mut out, sink) = pipe();
    let mut rig = Rig::new(vec![attachment(Some(reader), Some(sink))]);
    rig.connect();
    rig.say_shutdown(Shutdown::RECEIVE);
    assert_eq!(rig.heard(), []);
    assert_eq!(
        nix::unistd::write(&writer, b"x"),
        Err(nix::errno::Errno::EPIPE)
    );
    rig.say_data(b"but sends on");
    assert_eq!(drain(&mut out), b"but sends on");
    rig.say_shutdown(Shutdown::SEND);
    assert_eq!(rig.heard(), [Heard::Op(Op::Rst)], "both ways, in two steps");
}

#[test]
fn done_is_closed_when_both_ways_are_over_though_the_guest_keeps_its_socket() {
    let (reader, writer) = pipe();
    let (_out, sink) = pipe();
    let (done, watch) = done_pipe();
    let both = Attachment {
        done: Some(done),
        ..attachment(Some(reader), Some(sink))
    };
    let mut rig = Rig::new(vec![both]);
    rig.connect();
    drop(writer);
    assert_eq!(rig.heard(), [Heard::Shutdown(Shutdown::SEND)]);
    assert!(!at_end(&watch));
    rig.say_shutdown(Shutdown::SEND);
    assert!(at_end(&watch));
}

#[test]
fn done_is_closed_when_the_device_is_dropped() {
    let (reader, _writer) = pipe();
    let (done, watch) = done_pipe();
    let (waiting, watch_waiting) = done_pipe();
    let attached = Attachment {
        done: Some(done),
        ..attachment(Some(reader), NONE)
    };
    let unused = Attachment {
        port: 1,
        done: Some(waiting),
        ..attachment(NONE, NONE)
    };
    let mut rig = Rig::new(vec![attached, unused]);
    let handle = rig.device.handle();
    rig.connect();
    assert!(!at_end(&watch) && !at_end(&watch_waiting));
    drop(rig);
    assert!(at_end(&watch) && at_end(&watch_waiting));
    assert!(handle.attach_any(None, None, None).is_err());
}

#[test]
fn an_attachment_is_for_one_connection() {
    let mut rig = Rig::new(vec![attachment(NONE, NONE)]);
    rig.connect();
    rig.packets();
    rig.send(
        Header {
            src_port: GUEST_PORT + 1,
            ..packet(Op::Request)
        },
        &[],
    );
    assert_eq!(rig.heard(), [Heard::Op(Op::Rst)]);
}

#[test]
fn an_attachment_made_from_another_thread_is_there_for_the_next_request() {
    let mut rig = Rig::new(vec![]);
    rig.say(Op::Request);
    assert_eq!(rig.heard(), [Heard::Op(Op::Rst)], "nothing is attached yet");
    let handle = rig.device.handle();
    let (mut reader, writer) = pipe();
    let port = std::thread::spawn(move || handle.attach_any(None, Some(writer.into()), None))
        .join()
        .unwrap()
        .unwrap();
    rig.send(
        Header {
            dst_port: port,
            ..packet(Op::Request)
        },
        &[],
    );
    rig.send(
        Header {
            dst_port: port,
            ..packet(Op::Rw)
        },
        b"found",
    );
    assert_eq!(drain(&mut reader), b"found");
}

#[test]
fn streams_to_one_host_port_from_two_guest_ports_are_two() {
    let mut rig = Rig::new(vec![]);
    let handle = rig.device.handle();
    let mut outs = Vec::new();
    for guest_port in [1, 2] {
        let (out, writer) = pipe();
        handle.attach(attachment(NONE, Some(writer))).unwrap();
        rig.send(
            Header {
                src_port: guest_port,
                ..packet(Op::Request)
            },
            &[],
        );
        outs.push(out);
    }
    rig.send(
        Header {
            src_port: 1,
            ..packet(Op::Rw)
        },
        b"one",
    );
    rig.send(
        Header {
            src_port: 2,
            ..packet(Op::Rw)
        },
        b"two",
    );
    assert_eq!(
        (drain(&mut outs[0]), drain(&mut outs[1])),
        (b"one".to_vec(), b"two".to_vec())
    );
}

#[test]
fn every_packet_carries_our_credit_and_a_request_for_it_is_answered() {
    let (_out, writer) = pipe();
    let (reader, _kept) = pipe();
    let mut rig = Rig::new(vec![attachment(Some(reader), Some(writer))]);
    rig.say(Op::Request);
    let (response, _) = rig.packets().remove(0);
    assert_eq!((response.buf_alloc, response.fwd_cnt), (256 << 10, 0));
    rig.say_data(b"12345");
    assert_eq!(rig.heard(), [], "five bytes are not worth a packet");
    rig.say(Op::CreditRequest);
    let packets = rig.packets();
    assert_eq!(packets.len(), 1);
    assert_eq!(packets[0].0.op, Op::CreditUpdate as u16);
    assert_eq!(packets[0].0.fwd_cnt, 5);
}
