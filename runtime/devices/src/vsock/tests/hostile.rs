//! A guest that lies, storms, and speaks out of turn. Each lie costs it at most the stream it told it on.

use super::*;

/// A rig with one open stream, an input to it, and an output from it.
fn open() -> (Rig, File, File) {
    let (reader, input) = pipe();
    let (output, writer) = pipe();
    let mut rig = Rig::new(vec![attachment(Some(reader), Some(writer))]);
    rig.connect();
    assert_eq!(rig.heard(), []);
    (rig, input, output)
}

/// Checks that the stream was reset: the guest is told once, the host's descriptors are closed, nothing is left.
fn assert_reset(mut rig: Rig, output: File) {
    assert_eq!(rig.heard(), [Heard::Op(Op::Rst)]);
    assert!(at_end(&output));
    assert_eq!(rig.device.stream_count(), 0);
    rig.settle();
    assert!(!rig.host_ready());
}

#[test]
fn taking_bytes_that_were_never_sent_resets_the_stream() {
    let (mut rig, _input, output) = open();
    rig.send(
        Header {
            fwd_cnt: 1,
            ..packet(Op::CreditUpdate)
        },
        &[],
    );
    assert_reset(rig, output);
}

#[test]
fn taking_more_than_was_sent_resets_the_stream() {
    let (mut rig, mut input, output) = open();
    input.write_all(b"four").unwrap();
    assert_eq!(rig.heard(), [Heard::Data(b"four".to_vec())]);
    rig.send(
        Header {
            fwd_cnt: 5,
            ..packet(Op::Rw)
        },
        b"x",
    );
    assert_reset(rig, output);
}

#[test]
fn a_request_that_took_bytes_already_is_refused() {
    let (reader, _input) = pipe();
    let (output, writer) = pipe();
    let mut rig = Rig::new(vec![attachment(Some(reader), Some(writer))]);
    rig.send(
        Header {
            fwd_cnt: 77,
            ..packet(Op::Request)
        },
        &[],
    );
    assert_reset(rig, output);
}

#[test]
fn data_beyond_our_credit_resets_the_stream() {
    let (reader, _input) = pipe();
    let (mut out, mut writer) = pipe();
    stuff(&mut writer);
    let mut rig = Rig::new(vec![attachment(Some(reader), Some(writer))]);
    rig.connect();
    for _ in 0..4 {
        rig.say_data(&[1; 64 << 10]);
    }
    assert_eq!(rig.heard(), [], "that was all of the credit");
    rig.say_data(&[1]);
    assert_eq!(rig.heard(), [Heard::Op(Op::Rst)]);
    drain(&mut out);
    assert!(at_end(&out));
}

#[test]
fn a_packet_of_more_than_64_kib_resets_the_stream() {
    let (mut rig, _input, output) = open();
    rig.say_data(&vec![0; (64 << 10) + 1]);
    assert_reset(rig, output);
}

#[test]
fn a_length_beyond_the_chain_resets_the_stream() {
    let (mut rig, _input, output) = open();
    rig.send_raw(
        Header {
            len: 11,
            ..packet(Op::Rw)
        },
        b"ten bytes.",
    );
    assert_reset(rig, output);
}

#[test]
fn the_largest_length_resets_the_stream() {
    let (mut rig, _input, output) = open();
    rig.send_raw(
        Header {
            len: u32::MAX,
            ..packet(Op::Rw)
        },
        b"ten bytes.",
    );
    assert_reset(rig, output);
}

#[test]
fn a_length_without_any_payload_resets_the_stream() {
    let (mut rig, _input, output) = open();
    rig.send_raw(
        Header {
            len: 1,
            ..packet(Op::Rw)
        },
        &[],
    );
    assert_reset(rig, output);
}

#[test]
fn a_length_below_the_chain_is_what_counts() {
    let (mut rig, _input, mut output) = open();
    rig.send_raw(
        Header {
            len: 3,
            ..packet(Op::Rw)
        },
        b"ten bytes.",
    );
    assert_eq!(drain(&mut output), b"ten");
    assert_eq!(rig.heard(), []);
}

#[test]
fn data_of_no_bytes_is_nothing() {
    let (mut rig, _input, output) = open();
    rig.say_data(&[]);
    assert!(!at_end(&output));
    assert_eq!(rig.heard(), []);
}

#[test]
fn a_payload_in_a_packet_that_has_none_resets_the_stream() {
    for op in [
        Op::Shutdown,
        Op::CreditUpdate,
        Op::CreditRequest,
        Op::Response,
        Op::Request,
    ] {
        let (mut rig, _input, output) = open();
        rig.send(packet(op), b"surprise");
        assert_reset(rig, output);
    }
}

#[test]
fn a_reset_with_a_payload_is_a_reset() {
    let (mut rig, _input, output) = open();
    rig.send(packet(Op::Rst), b"surprise");
    assert_eq!(rig.heard(), []);
    assert!(at_end(&output));
    assert_eq!(rig.device.stream_count(), 0);
}

#[test]
fn an_unknown_operation_resets_the_stream() {
    for op in [0, 8, 255, u16::MAX] {
        let (mut rig, _input, output) = open();
        rig.send(
            Header {
                op,
                ..packet(Op::Rw)
            },
            &[],
        );
        assert_reset(rig, output);
    }
}

#[test]
fn an_unknown_operation_on_no_stream_is_refused() {
    let mut rig = Rig::new(vec![]);
    for op in [0, 8, u16::MAX] {
        rig.send(
            Header {
                op,
                ..packet(Op::Rw)
            },
            &[],
        );
        assert_eq!(rig.heard(), [Heard::Op(Op::Rst)]);
    }
}

#[test]
fn a_second_request_for_a_stream_resets_it() {
    let (mut rig, _input, output) = open();
    rig.say(Op::Request);
    assert_reset(rig, output);
}

#[test]
fn a_second_request_before_the_first_is_answered_is_a_reset_too() {
    let (reader, _input) = pipe();
    let (output, writer) = pipe();
    let attachments = vec![attachment(Some(reader), Some(writer))];
    let mut rig = Rig::starved(VsockConfig {
        attachments,
        ..VsockConfig::default()
    });
    rig.say(Op::Request);
    rig.say(Op::Request);
    rig.offer(4, 4096);
    assert_reset(rig, output);
}

#[test]
fn a_response_nobody_asked_for_resets_the_stream() {
    let (mut rig, _input, output) = open();
    rig.say(Op::Response);
    assert_reset(rig, output);
}

#[test]
fn data_before_the_response_resets_the_stream() {
    let (reader, _input) = pipe();
    let (output, writer) = pipe();
    let attachments = vec![attachment(Some(reader), Some(writer))];
    let mut rig = Rig::starved(VsockConfig {
        attachments,
        ..VsockConfig::default()
    });
    rig.say(Op::Request);
    rig.say_data(b"early");
    rig.offer(4, 4096);
    assert_reset(rig, output);
}

#[test]
fn data_after_the_guest_s_own_end_resets_the_stream() {
    let (mut rig, _input, output) = open();
    rig.say_shutdown(Shutdown::SEND);
    rig.say_data(b"one more thing");
    assert_reset(rig, output);
}

#[test]
fn a_shutdown_of_nothing_is_nothing_and_so_are_its_unknown_flags() {
    let (mut rig, _input, mut output) = open();
    rig.say_shutdown(Shutdown::NONE);
    rig.send(
        Header {
            flags: !3,
            ..packet(Op::Shutdown)
        },
        &[],
    );
    rig.say_data(b"open");
    assert_eq!(drain(&mut output), b"open");
    assert_eq!(rig.heard(), []);
}

#[test]
fn shutdowns_can_be_said_again_but_not_taken_back() {
    let (mut rig, _input, output) = open();
    for _ in 0..10 {
        rig.say_shutdown(Shutdown::SEND);
    }
    assert!(at_end(&output));
    rig.say_shutdown(Shutdown::NONE);
    rig.say_shutdown(Shutdown::RECEIVE);
    assert_eq!(rig.heard(), [Heard::Op(Op::Rst)]);
}

#[test]
fn packets_of_no_stream_are_refused_and_resets_are_not() {
    let mut rig = Rig::new(vec![]);
    for op in [
        Op::Response,
        Op::Shutdown,
        Op::Rw,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        rig.say(op);
        let packets = rig.packets();
        assert_eq!(packets.len(), 1);
        let header = packets[0].0;
        assert_eq!(header.op, Op::Rst as u16);
        assert_eq!((header.src_port, header.dst_port), (HOST_PORT, GUEST_PORT));
        assert_eq!((header.len, header.buf_alloc), (0, 0));
    }
    rig.say(Op::Rst);
    assert_eq!(rig.heard(), []);
}

#[test]
fn a_request_with_a_payload_is_refused() {
    let mut rig = Rig::new(vec![attachment(NONE, NONE)]);
    rig.send(packet(Op::Request), b"hello?");
    assert_eq!(rig.heard(), [Heard::Op(Op::Rst)]);
}

#[test]
fn a_packet_from_or_to_another_context_is_dropped() {
    let (mut rig, _input, mut output) = open();
    let good = packet(Op::Rw);
    for src_cid in [0, 1, 2, 4, 1 << 32 | 3, u64::MAX] {
        rig.send(Header { src_cid, ..good }, b"x");
    }
    for dst_cid in [0, 1, 3, 4, 1 << 32 | 2, u64::MAX] {
        rig.send(Header { dst_cid, ..good }, b"x");
    }
    assert_eq!(rig.heard(), []);
    assert_eq!(drain(&mut output), b"");
    rig.say_data(b"y");
    assert_eq!(drain(&mut output), b"y");
}

#[test]
fn another_type_of_socket_is_refused_in_its_own_type_and_touches_no_stream() {
    let (mut rig, _input, mut output) = open();
    for socket_type in [0, 2, 3, u16::MAX] {
        rig.send(
            Header {
                socket_type,
                ..packet(Op::Request)
            },
            &[],
        );
        let packets = rig.packets();
        assert_eq!(packets.len(), 1);
        assert_eq!(packets[0].0.op, Op::Rst as u16);
        assert_eq!(packets[0].0.socket_type, socket_type);
        rig.send(
            Header {
                socket_type,
                ..packet(Op::Rst)
            },
            &[],
        );
        assert_eq!(rig.heard(), []);
    }
    rig.say_data(b"still here");
    assert_eq!(drain(&mut output), b"still here");
}

#[test]
fn packets_that_cross_our_reset_are_not_answered_again() {
    let (reader, _input) = pipe();
    let (_output, writer) = pipe();
    let attachments = vec![attachment(Some(reader), Some(writer))];
    let mut rig = Rig::starved(VsockConfig {
        attachments,
        ..VsockConfig::default()
    });
    rig.offer(1, 4096);
    rig.connect();
    rig.say(Op::Response);
    for op in [
        Op::Rw,
        Op::Shutdown,
        Op::CreditUpdate,
        Op::CreditRequest,
        Op::Request,
    ] {
        rig.say(op);
    }
    rig.offer(8, 4096);
    assert_eq!(rig.heard(), [Heard::Op(Op::Rst)]);
}

#[test]
fn a_reset_that_crosses_ours_ends_the_matter() {
    let (reader, _input) = pipe();
    let (_output, writer) = pipe();
    let attachments = vec![attachment(Some(reader), Some(writer))];
    let mut rig = Rig::starved(VsockConfig {
        attachments,
        ..VsockConfig::default()
    });
    rig.offer(1, 4096);
    rig.connect();
    rig.say(Op::Response);
    rig.say(Op::Rst);
    assert_eq!(rig.device.stream_count(), 0);
    rig.offer(8, 4096);
    assert_eq!(rig.heard(), []);
}

#[test]
fn a_credit_that_comes_and_goes_is_obeyed() {
    let (mut rig, mut input, _output) = open();
    rig.send(
        Header {
            buf_alloc: 0,
            ..packet(Op::CreditUpdate)
        },
        &[],
    );
    input.write_all(b"abcdef").unwrap();
    assert_eq!(rig.heard(), [Heard::Op(Op::CreditRequest)]);
    rig.send(
        Header {
            buf_alloc: 2,
            ..packet(Op::CreditUpdate)
        },
        &[],
    );
    assert_eq!(
        rig.heard(),
        [Heard::Data(b"ab".to_vec()), Heard::Op(Op::CreditRequest)]
    );
    rig.send(
        Header {
            buf_alloc: 1,
            ..packet(Op::CreditUpdate)
        },
        &[],
    );
    assert_eq!(rig.heard(), []);
    rig.send(
        Header {
            buf_alloc: u32::MAX,
            ..packet(Op::CreditUpdate)
        },
        &[],
    );
    assert_eq!(rig.heard(), [Heard::Data(b"cdef".to_vec())]);
}

#[test]
fn a_storm_of_credit_requests_gets_one_answer_at_a_time() {
    let (reader, _input) = pipe();
    let (_output, writer) = pipe();
    let attachments = vec![attachment(Some(reader), Some(writer))];
    let mut rig = Rig::starved(VsockConfig {
        attachments,
        ..VsockConfig::default()
    });
    rig.offer(1, 4096);
    rig.connect();
    for _ in 0..1000 {
        rig.say(Op::CreditRequest);
    }
    rig.offer(8, 4096);
    assert_eq!(rig.heard(), [Heard::Op(Op::CreditUpdate)]);
}

#[test]
fn ports_at_the_ends_of_their_range_are_ports() {
    let mut rig = Rig::new(vec![]);
    let handle = rig.device.handle();
    for port in [0, u32::MAX] {
        let (mut out, writer) = pipe();
        handle
            .attach(Attachment {
                port,
                ..attachment(NONE, Some(writer))
            })
            .unwrap();
        let header = Header {
            src_port: port,
            dst_port: port,
            ..packet(Op::Request)
        };
        rig.send(header, &[]);
        rig.send(
            Header {
                op: Op::Rw as u16,
                ..header
            },
            b"ok",
        );
        assert_eq!(drain(&mut out), b"ok");
    }
}
