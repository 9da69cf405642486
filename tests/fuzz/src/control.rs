//! The control protocol: any bytes as a request, with any number of descriptors, and any bytes as a reply.

use std::fs::File;
use std::os::fd::OwnedFd;

use cloison_vmm::testing::{control_reply, control_request};

use crate::input::Input;

pub fn control(data: &[u8]) {
    let mut input = Input::new(data);
    let count = input.u8() % 5;
    let rest = input.bytes(data.len());
    let descriptors: Vec<OwnedFd> = (0..count)
        .map(|_| File::open("/dev/null").expect("/dev/null").into())
        .collect();
    // Whatever comes back is a reply that the other side understands.
    let reply = control_request(rest, descriptors);
    assert!(control_reply(&reply), "{}", String::from_utf8_lossy(&reply));
    control_reply(rest);
}
