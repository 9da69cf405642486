//! What persistent memory answers.

use super::*;
use crate::testing::{Guest, readable, writable};

const START: GuestAddress = GuestAddress(1 << 32);
const LENGTH: u64 = 4 << 20;

/// The answer to a request of these bytes with this much room, and how many bytes the device says it wrote.
fn ask(request: &[u8], room: u32) -> (Vec<u8>, u32) {
    let mut pmem = Pmem::new(START, LENGTH).unwrap();
    let mut guest = Guest::new(&pmem, true);
    let at = guest.alloc_bytes(request);
    let answer = guest.alloc_bytes(&[0xaa; 8]);
    guest.place(
        Pmem::QUEUE,
        &[readable(at, request.len() as u32), writable(answer, room)],
    );
    assert!(
        guest
            .kick(&mut pmem, Pmem::QUEUE)
            .unwrap()
            .contains(Pmem::QUEUE)
    );
    let written = guest.used(Pmem::QUEUE).unwrap().len;
    (guest.read(answer, 8), written)
}

#[test]
fn a_flush_is_done() {
    assert_eq!(
        ask(&[0; 4], 4),
        (vec![0, 0, 0, 0, 0xaa, 0xaa, 0xaa, 0xaa], 4)
    );
    assert_eq!(
        ask(&[0; 64], 8).1,
        4,
        "what is beyond the request is left alone"
    );
}

#[test]
fn anything_else_fails() {
    for request in [&[1, 0, 0, 0][..], &[0, 0, 0, 1], &[0xff; 4], &[0; 3], &[0]] {
        let (answer, written) = ask(request, 4);
        assert_eq!((&answer[..4], written), (&[0xff; 4][..], 4), "{request:?}");
    }
}

#[test]
fn without_room_for_an_answer_there_is_none() {
    for room in [0, 1, 3] {
        assert_eq!(ask(&[0; 4], room), (vec![0xaa; 8], 0));
    }
}

#[test]
fn the_configuration_says_where_it_is() {
    let mut config = [0; 17];
    Pmem::new(START, LENGTH)
        .unwrap()
        .read_config(0, &mut config);
    assert_eq!(config[..8], START.0.to_le_bytes());
    assert_eq!(config[8..16], LENGTH.to_le_bytes());
    assert_eq!(config[16], 0);
}

#[test]
fn places_that_cannot_be_mapped_are_refused() {
    for (start, length) in [
        (0, 0),
        (4096, LENGTH),
        (0, 4096),
        (0, LENGTH + 1),
        (u64::MAX - LENGTH + 1, LENGTH),
        (ALIGNMENT, u64::MAX - ALIGNMENT + 1),
    ] {
        let pmem = Pmem::new(GuestAddress(start), length);
        assert!(
            matches!(pmem, Err(PmemError::Range { .. })),
            "{start:#x} {length:#x}"
        );
    }
}

#[test]
fn a_state_makes_the_same_device_in_the_same_place_alone() {
    let mut pmem = Pmem::new(START, LENGTH).unwrap();
    pmem.set_acked_features(pmem.features());
    let text = serde_json::to_string(&pmem.state()).unwrap();
    let state: PmemState = serde_json::from_str(&text).unwrap();
    let mut other = Pmem::new(START, LENGTH).unwrap();
    other.restore(&state).unwrap();
    assert_eq!(other.state(), pmem.state());
    let mut elsewhere = Pmem::new(START, 2 * LENGTH).unwrap();
    assert!(matches!(
        elsewhere.restore(&state),
        Err(PmemError::StateRange { .. })
    ));
    let newer = PmemState {
        version: 2,
        ..state
    };
    assert!(matches!(
        other.restore(&newer),
        Err(PmemError::StateVersion(2))
    ));
}
