//! Much data, and readers and writers of all speeds.

use std::os::unix::net::UnixStream;
use std::thread;

use sha2::{Digest, Sha256};

use super::*;

/// Bytes that repeat only after a long while, from `at` on.
fn pattern(at: usize, len: usize) -> Vec<u8> {
    (at..at + len)
        .map(|i| (i ^ (i >> 8) ^ (i >> 16)).wrapping_mul(31) as u8)
        .collect()
}

/// What the guest of an echo does: takes data, gives it back as credit allows, keeps its own credit right.
struct Echo {
    /// Bytes received that were not sent back yet.
    pending: Vec<u8>,
    received: u32,
    sent: u32,
    device_fwd: u32,
    device_buffer: u32,
    ended: bool,
    said_end: bool,
}

impl Echo {
    fn new() -> Self {
        Self {
            pending: Vec::new(),
            received: 0,
            sent: 0,
            device_fwd: 0,
            device_buffer: 256 << 10,
            ended: false,
            said_end: false,
        }
    }

    fn take(&mut self, (header, payload): (Header, Vec<u8>)) {
        self.device_fwd = header.fwd_cnt;
        self.device_buffer = header.buf_alloc;
        match Op::from_number(header.op).unwrap() {
            Op::Rw => {
                self.received = self.received.wrapping_add(payload.len() as u32);
                self.pending.extend(payload);
            }
            Op::Shutdown => {
                self.ended = Shutdown::from_flags(header.flags).contains(Shutdown::SEND);
            }
            Op::CreditUpdate | Op::CreditRequest => {}
            op => panic!("{op:?}"),
        }
    }

    /// Sends back what the credit allows; then tells how much it has taken.
    fn give(&mut self, rig: &mut Rig) {
        loop {
            let credit = self.device_buffer - self.sent.wrapping_sub(self.device_fwd);
            let count = self.pending.len().min(credit as usize).min(64 << 10);
            let fwd_cnt = self
                .received
                .wrapping_sub((self.pending.len() - count) as u32);
            if count == 0 {
                rig.send(
                    Header {
                        fwd_cnt,
                        ..packet(Op::CreditUpdate)
                    },
                    &[],
                );
                break;
            }
            let data: Vec<u8> = self.pending.drain(..count).collect();
            self.sent = self.sent.wrapping_add(count as u32);
            rig.send(
                Header {
                    fwd_cnt,
                    ..packet(Op::Rw)
                },
                &data,
            );
        }
        if self.ended && self.pending.is_empty() && !self.said_end {
            self.said_end = true;
            rig.say_shutdown(Shutdown::BOTH);
        }
    }
}

/// Runs the echo until `done` is at its end.
fn run_echo(rig: &mut Rig, watch: &File) {
    let mut echo = Echo::new();
    while !at_end(watch) {
        let mut any = false;
        while let Some(packet) = rig.receive_now() {
            if packet.0.op != Op::Rst as u16 {
                echo.take(packet);
                any = true;
            }
        }
        if any {
            echo.give(rig);
        }
        // Ten seconds for the other threads to do something is a hang.
        if !at_end(watch) && !any {
            assert!(
                rig.guest.host(&mut rig.device, 10_000).unwrap(),
                "nothing happens any more"
            );
        }
    }
}

fn echo_through(read: impl Into<OwnedFd>, write: impl Into<OwnedFd>) -> (Rig, File) {
    let (done, watch) = done_pipe();
    let both = Attachment {
        done: Some(done),
        ..attachment(Some(read), Some(write))
    };
    let mut rig = Rig::new(vec![both]);
    rig.connect();
    (rig, watch)
}

/// Writes the pattern from one thread, hashes what comes back in another, with `pause` called for every block read.
fn check_echo(
    mut input: impl Write + Send + 'static,
    mut output: impl Read + Send + 'static,
    mut rig: Rig,
    watch: File,
    total: usize,
    block: usize,
) {
    let writer = thread::spawn(move || {
        let mut hash = Sha256::new();
        for at in (0..total).step_by(block) {
            let data = pattern(at, block.min(total - at));
            hash.update(&data);
            input.write_all(&data).unwrap();
        }
        hash.finalize()
    });
    let reader = thread::spawn(move || {
        let mut hash = Sha256::new();
        let mut count = 0;
        let mut buffer = vec![0; block];
        loop {
            match output.read(&mut buffer).unwrap() {
                0 => return (hash.finalize(), count),
                n => {
                    hash.update(&buffer[..n]);
                    count += n;
                }
            }
        }
    });
    run_echo(&mut rig, &watch);
    let (got, count) = reader.join().unwrap();
    assert_eq!(count, total);
    assert_eq!(writer.join().unwrap(), got);
}

/// Two pipes of which the device's ends do not block and the test's ends do.
fn one_sided_pipe() -> (File, File) {
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
    (reader.into(), writer.into())
}

fn make_non_blocking(file: &File) {
    nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
}

#[test]
fn sixteen_mebibytes_come_back_through_pipes_unchanged() {
    let (read, input) = one_sided_pipe();
    let (output, write) = one_sided_pipe();
    make_non_blocking(&read);
    make_non_blocking(&write);
    let (rig, watch) = echo_through(read, write);
    check_echo(input, output, rig, watch, 16 << 20, 1 << 16);
}

#[test]
fn one_blocking_socket_carries_both_ways_unchanged() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (rig, watch) = echo_through(ours.try_clone().unwrap(), ours);
    let input = ShutdownOnDrop(theirs.try_clone().unwrap());
    check_echo(input, theirs, rig, watch, 4 << 20, 10_007);
}

struct ShutdownOnDrop(UnixStream);

impl Write for ShutdownOnDrop {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

impl Drop for ShutdownOnDrop {
    fn drop(&mut self) {
        self.0.shutdown(std::net::Shutdown::Write).unwrap();
    }
}

#[test]
fn small_writes_and_small_reads_change_nothing() {
    let (read, input) = one_sided_pipe();
    let (output, write) = one_sided_pipe();
    make_non_blocking(&read);
    make_non_blocking(&write);
    let (rig, watch) = echo_through(read, write);
    check_echo(input, output, rig, watch, 100_000, 7);
}

#[test]
fn a_reader_that_does_not_read_stops_the_guest_at_its_credit_and_loses_nothing() {
    let (mut out, writer) = pipe();
    let (reader, _kept) = pipe();
    let mut rig = Rig::new(vec![attachment(Some(reader), Some(writer))]);
    rig.connect();
    let sent = pattern(0, 256 << 10);
    for block in sent.chunks(32 << 10) {
        rig.say_data(block);
    }
    let mut credit = 0;
    for (header, _) in rig.packets() {
        assert_eq!(header.op, Op::CreditUpdate as u16);
        credit = header.fwd_cnt;
    }
    assert_eq!(credit, 64 << 10, "what the pipe took, and no more");
    let mut got = Vec::new();
    while got.len() < sent.len() {
        got.extend(drain(&mut out));
        rig.settle();
    }
    assert!(got == sent);
    let (last, _) = rig.packets().pop().unwrap();
    assert!(
        last.fwd_cnt >= 128 << 10,
        "the guest knows of room for two packets at least"
    );
}

#[test]
fn nothing_is_read_from_the_host_without_credit_and_the_guest_is_asked_once() {
    let (reader, mut writer) = pipe();
    let (_out, sink) = pipe();
    let mut rig = Rig::new(vec![attachment(Some(reader), Some(sink))]);
    rig.send(
        Header {
            buf_alloc: 10,
            ..packet(Op::Request)
        },
        &[],
    );
    writer.write_all(b"0123456789abcdef").unwrap();
    assert_eq!(
        rig.heard(),
        [
            Heard::Op(Op::Response),
            Heard::Data(b"0123456789".to_vec()),
            Heard::Op(Op::CreditRequest)
        ]
    );
    rig.send(
        Header {
            buf_alloc: 10,
            ..packet(Op::CreditUpdate)
        },
        &[],
    );
    assert_eq!(
        rig.heard(),
        [],
        "an answer without credit is not asked for again"
    );
    assert!(!rig.host_ready(), "and the device rests");
    rig.send(
        Header {
            buf_alloc: 10,
            fwd_cnt: 4,
            ..packet(Op::CreditUpdate)
        },
        &[],
    );
    assert_eq!(
        rig.heard(),
        [Heard::Data(b"abcd".to_vec()), Heard::Op(Op::CreditRequest)]
    );
    rig.send(
        Header {
            buf_alloc: 10,
            fwd_cnt: 14,
            ..packet(Op::CreditUpdate)
        },
        &[],
    );
    assert_eq!(rig.heard(), [Heard::Data(b"ef".to_vec())]);
}

#[test]
fn nothing_is_read_from_the_host_without_buffers_and_the_device_rests() {
    let (reader, mut writer) = pipe();
    let (_out, sink) = pipe();
    let attachments = vec![attachment(Some(reader), Some(sink))];
    let mut rig = Rig::starved(VsockConfig {
        attachments,
        ..VsockConfig::default()
    });
    rig.say(Op::Request);
    writer.write_all(b"waiting").unwrap();
    rig.settle();
    assert!(!rig.host_ready());
    assert!(rig.guest.must_kick(RX) || rig.offered.is_empty());
    rig.offer(1, 4096);
    assert_eq!(rig.heard(), [Heard::Op(Op::Response)]);
    rig.offer(1, 4096);
    assert_eq!(rig.heard(), [Heard::Data(b"waiting".to_vec())]);
}

#[test]
fn an_endless_input_neither_keeps_the_device_busy_nor_starves_another_stream() {
    let zero = File::open("/dev/zero").unwrap();
    let (mut out, sink) = pipe();
    let endless = Attachment {
        port: 1,
        ..attachment(Some(zero), NONE)
    };
    let mut rig = Rig::new(vec![endless, attachment(NONE, Some(sink))]);
    rig.connect();
    rig.packets();
    rig.recycle = false;
    rig.send(
        Header {
            dst_port: 1,
            buf_alloc: u32::MAX,
            ..packet(Op::Request)
        },
        &[],
    );
    rig.settle();
    assert!(
        !rig.host_ready(),
        "all buffers are full, and the device waits for more"
    );
    rig.say_data(b"me too");
    assert_eq!(drain(&mut out), b"me too");
    while rig.receive_now().is_some() {}
    rig.say(Op::CreditRequest);
    rig.offer(18, 4096);
    let ports: Vec<u32> = rig
        .packets()
        .into_iter()
        .map(|(header, _)| header.src_port)
        .collect();
    assert!(
        ports.contains(&HOST_PORT),
        "the answer comes in its turn: {ports:?}"
    );
}

#[test]
fn streams_take_turns() {
    let mut rig = Rig::new(vec![]);
    rig.recycle = false;
    let handle = rig.device.handle();
    for port in 1..=4 {
        let zero = File::open("/dev/zero").unwrap();
        handle
            .attach(Attachment {
                port,
                ..attachment(Some(zero), NONE)
            })
            .unwrap();
        let request = Header {
            dst_port: port,
            buf_alloc: u32::MAX,
            ..packet(Op::Request)
        };
        rig.send(request, &[]);
    }
    while rig.receive_now().is_some() {}
    let buffers: Vec<u64> = (0..40).map(|_| rig.guest.alloc(4096)).collect();
    let mut counts = [0; 5];
    for _ in 0..50 {
        for &addr in &buffers {
            rig.offer_at(addr, 4096);
        }
        rig.kick(RX).unwrap();
        for (header, _) in rig.packets() {
            counts[header.src_port as usize] += 1;
        }
    }
    assert_eq!(counts.iter().sum::<i32>(), 2000);
    assert!(counts[1..].iter().all(|&count| count > 400), "{counts:?}");
}

#[test]
fn a_payload_fills_the_guest_s_buffer_up_to_the_largest_packet() {
    let zero = File::open("/dev/zero").unwrap();
    let mut rig = Rig::starved(VsockConfig {
        attachments: vec![attachment(Some(zero), NONE)],
        ..VsockConfig::default()
    });
    rig.offer(2, 4096);
    rig.send(
        Header {
            buf_alloc: u32::MAX,
            ..packet(Op::Request)
        },
        &[],
    );
    rig.offer(1, 4096);
    rig.offer(1, 256 << 10);
    let lengths: Vec<u32> = rig.packets().iter().map(|(header, _)| header.len).collect();
    assert_eq!(
        lengths,
        [0, 0, 4052, 65536],
        "a response, the end of the other way, data"
    );
}
