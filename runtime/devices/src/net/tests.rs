//! Frames between a guest and a real tap, and what is dropped on the way.

mod features;
mod receiving;
mod sending;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO4,
};

use super::*;
use crate::testing::{Guest, HostEnd, readable, tap, writable};

const MAC: MacAddress = [2, 0, 0, 0, 0, 1];
const CONFIG: NetConfig = NetConfig {
    mac: MAC,
    mtu: 1500,
    spoofing: false,
};

struct Bench {
    net: Net,
    guest: Guest,
    host: HostEnd,
}

impl Bench {
    fn new() -> Self {
        Self::with(CONFIG)
    }

    fn with(config: NetConfig) -> Self {
        let (tap, host) = tap();
        let mut net = Net::new(tap, config).unwrap();
        net.set_acked_features(net.features());
        let guest = Guest::new(&net, true);
        Self { net, guest, host }
    }

    /// Offers `count` buffers of `size` bytes; answers where they are.
    fn offer(&mut self, count: usize, size: u32) -> Vec<u64> {
        let addresses = (0..count).map(|_| {
            let address = self.guest.alloc(size.into());
            self.guest.place(RX, &[writable(address, size)]);
            address
        });
        let addresses = addresses.collect();
        self.guest.kick(&mut self.net, RX).unwrap();
        addresses
    }

    /// Lets the device do what it can; it must come to an end.
    fn settle(&mut self) {
        for _ in 0..1000 {
            if !self.guest.host(&mut self.net, 0).unwrap() {
                return;
            }
        }
        panic!("the device is never done");
    }

    /// Lengths of what has come back in the receive queue.
    fn received(&mut self) -> Vec<u32> {
        self.settle();
        std::iter::from_fn(|| self.guest.used(RX))
            .map(|used| used.len)
            .collect()
    }

    /// Sends a frame behind a header, in one buffer.
    fn send(&mut self, header: [u8; HEADER_LENGTH], frame: &[u8]) {
        let bytes = [&header[..], frame].concat();
        let at = self.guest.alloc_bytes(&bytes);
        self.guest.place(TX, &[readable(at, bytes.len() as u32)]);
        assert!(self.guest.kick(&mut self.net, TX).unwrap().contains(TX));
        assert_eq!(self.guest.used(TX).unwrap().len, 0);
    }

    fn counters(&self) -> NetCounters {
        self.net.handle().counters()
    }
}

/// A frame of `length` bytes from the guest to everybody.
fn frame(length: usize) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(MAC);
    // A type that is free for experiments (IEEE 802, local experimental).
    frame.extend([0x88, 0xb5]);
    frame.extend((frame.len()..length).map(|i| (i % 251) as u8));
    frame
}

const PLAIN: [u8; HEADER_LENGTH] = [0; HEADER_LENGTH];
