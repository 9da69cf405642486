//! Configuration space, features, reset, and state that outlives the process.

use super::*;
use crate::{AttachError, VsockError, VsockState};

#[test]
fn the_device_is_a_vsock_with_three_queues() {
    let device = Vsock::new(VsockConfig::default()).unwrap();
    assert_eq!(device.device_type(), 19);
    assert_eq!(device.queue_sizes().len(), 3);
    assert_eq!(device.features(), 1 << 32 | 1 << 29 | 1 << 28);
}

#[test]
fn configuration_space_is_the_guest_s_context_id_and_zeroes() {
    let device = Vsock::new(VsockConfig::default()).unwrap();
    let read = |offset, len| {
        let mut data = vec![0xaa; len];
        device.read_config(offset, &mut data);
        data
    };
    assert_eq!(read(0, 8), [3, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(read(0, 4), [3, 0, 0, 0]);
    assert_eq!(read(4, 8), [0; 8]);
    assert_eq!(read(8, 4), [0; 4]);
    assert_eq!(read(u64::MAX, 4), [0; 4]);
    assert_eq!(read(u64::MAX - 1, 16), [0; 16]);
    assert!(read(0, 0).is_empty());
}

#[test]
fn writes_to_configuration_space_change_nothing() {
    let mut device = Vsock::new(VsockConfig::default()).unwrap();
    device.write_config(0, &[9; 8]);
    let mut cid = [0; 8];
    device.read_config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), 3);
}

#[test]
fn a_reset_drops_streams_and_keeps_attachments() {
    let (reader, _input) = pipe();
    let (out, writer) = pipe();
    let (mut later, sink) = pipe();
    let (done, watch) = done_pipe();
    let first = Attachment {
        done: Some(done),
        ..attachment(Some(reader), Some(writer))
    };
    let second = Attachment {
        port: 7,
        ..attachment(NONE, Some(sink))
    };
    let mut rig = Rig::new(vec![first, second]);
    rig.connect();
    rig.device.reset();
    assert!(at_end(&out) && at_end(&watch));
    rig.say_data(b"of a stream before the reset");
    assert_eq!(rig.heard(), [Heard::Op(Op::Rst)]);
    rig.send(
        Header {
            dst_port: 7,
            ..packet(Op::Request)
        },
        &[],
    );
    rig.send(
        Header {
            dst_port: 7,
            ..packet(Op::Rw)
        },
        b"kept",
    );
    assert_eq!(drain(&mut later), b"kept");
}

#[test]
fn a_reset_forgets_what_the_guest_was_owed() {
    let mut rig = Rig::starved(VsockConfig::default());
    rig.say(Op::Rw);
    rig.device.reset();
    rig.offer(4, 4096);
    assert_eq!(rig.heard(), []);
}

#[test]
fn a_restored_device_tells_the_guest_that_its_streams_are_gone() {
    let (reader, _input) = pipe();
    let (_out, writer) = pipe();
    let mut rig = Rig::new(vec![attachment(Some(reader), Some(writer))]);
    rig.connect();
    let text = serde_json::to_string(&rig.device.state()).unwrap();
    let state: VsockState = serde_json::from_str(&text).unwrap();
    let mut device = Vsock::restore(VsockConfig::default(), &state).unwrap();
    assert_eq!(device.state(), state);
    let event = rig.guest.alloc(4);
    rig.guest.write(event, &[0xff; 4]);
    rig.guest.place(EVENT, &[writable(event, 4)]);
    rig.guest.place(EVENT, &[writable(event, 4)]);
    assert!(
        rig.guest.host(&mut device, 0).unwrap(),
        "it asks to be driven"
    );
    assert_eq!(rig.guest.used(EVENT).map(|used| used.len), Some(4));
    assert_eq!(rig.guest.read(event, 4), [0; 4]);
    rig.guest.kick(&mut device, EVENT).unwrap();
    assert_eq!(rig.guest.used(EVENT), None, "once");
    rig.device = device;
    rig.say_data(b"of a stream from before");
    assert_eq!(rig.heard(), [Heard::Op(Op::Rst)]);
}

#[test]
fn the_event_waits_for_a_buffer_that_can_hold_it() {
    let state = Vsock::new(VsockConfig::default()).unwrap().state();
    let mut rig = Rig::around(Vsock::restore(VsockConfig::default(), &state).unwrap());
    rig.settle();
    let addr = rig.guest.alloc(4096);
    rig.guest.place(EVENT, &[writable(addr, 3)]);
    rig.guest.place(EVENT, &[readable(addr, 4)]);
    rig.guest.place(EVENT, &[writable(Guest::HOLE, 4)]);
    rig.kick(EVENT).unwrap();
    for _ in 0..3 {
        assert_eq!(rig.guest.used(EVENT).map(|used| used.len), Some(0));
    }
    rig.guest
        .place(EVENT, &[writable(addr, 2), writable(addr + 2, 100)]);
    let mask = rig.kick(EVENT).unwrap();
    assert!(mask.contains(EVENT));
    assert_eq!(rig.guest.used(EVENT).map(|used| used.len), Some(4));
}

#[test]
fn a_state_of_another_version_is_refused_with_what_to_do() {
    let state = serde_json::json!({ "version": 999, "acked_features": 0 });
    let state: VsockState = serde_json::from_value(state).unwrap();
    let error = Vsock::restore(VsockConfig::default(), &state).unwrap_err();
    assert!(matches!(error, VsockError::StateVersion { found: 999, .. }));
    assert!(
        error.to_string().contains("make the template again"),
        "{error}"
    );
}

#[test]
fn features_that_were_not_offered_are_not_remembered() {
    let mut device = Vsock::new(VsockConfig::default()).unwrap();
    device.set_acked_features(u64::MAX);
    let state = serde_json::to_value(device.state()).unwrap();
    assert_eq!(state["acked_features"], device.features());
}

#[test]
fn a_bad_attachment_at_the_start_names_its_port() {
    let (reader, _writer) = nix::unistd::pipe().unwrap();
    let attachments = vec![attachment(Some(reader), NONE)];
    let error = Vsock::new(VsockConfig {
        attachments,
        ..VsockConfig::default()
    })
    .unwrap_err();
    assert!(matches!(
        error,
        VsockError::Attach {
            port: HOST_PORT,
            source: AttachError::Unsuitable { which: "read", .. }
        }
    ));
}

#[test]
fn two_attachments_at_one_port_are_an_error_at_the_start() {
    let attachments = vec![attachment(NONE, NONE), attachment(NONE, NONE)];
    let error = Vsock::new(VsockConfig {
        attachments,
        ..VsockConfig::default()
    })
    .unwrap_err();
    assert!(matches!(
        error,
        VsockError::Attach {
            port: HOST_PORT,
            source: AttachError::PortInUse(HOST_PORT)
        }
    ));
}
