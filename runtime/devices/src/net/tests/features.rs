//! What is offered, what is told, and what outlives the device.

use super::*;
use crate::testing::host_ready;

#[test]
fn checksums_and_segments_are_offered_both_ways() {
    let bench = Bench::new();
    for feature in [
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_MRG_RXBUF,
    ] {
        assert_ne!(bench.net.features() & 1 << feature, 0, "{feature}");
    }
}

#[test]
fn offloads_are_the_tap_s_only_while_the_guest_wants_them() {
    let mut bench = Bench::new();
    // Nothing to look at but that the tap takes any set of features.
    let offered = bench.net.features();
    for features in (0..64).map(|bit| offered & !(1 << bit)).chain([0, offered]) {
        bench
            .net
            .tap
            .as_ref()
            .unwrap()
            .set_offloads(features)
            .unwrap();
    }
    for bit in 0..64 {
        bench
            .net
            .tap
            .as_ref()
            .unwrap()
            .set_offloads(1 << bit)
            .unwrap();
        let with_checksums = 1 << bit | 1 << VIRTIO_NET_F_GUEST_CSUM;
        bench
            .net
            .tap
            .as_ref()
            .unwrap()
            .set_offloads(with_checksums)
            .unwrap();
    }
    bench.net.reset();
    assert_eq!(bench.net.acked_features, 0);
}

#[test]
fn the_configuration_says_who_the_guest_is_and_whether_there_is_a_link() {
    let mut bench = Bench::new();
    let config = |net: &Net| {
        let mut config = [0; 12];
        net.read_config(0, &mut config);
        config
    };
    assert_eq!(config(&bench.net), [2, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0xdc, 5]);
    let before = bench.net.config_generation();
    bench.net.handle().set_link(false);
    assert!(bench.guest.host(&mut bench.net, 0).unwrap());
    assert_ne!(bench.net.config_generation(), before);
    assert!(!host_ready(&bench.net, 0));
    assert_eq!(config(&bench.net)[6..8], [0, 0]);
    bench.net.write_config(0, &[9; 12]);
    assert_eq!(config(&bench.net)[..6], MAC, "the guest cannot change it");
}

#[test]
fn addresses_and_mtus_that_cannot_be_are_refused() {
    for (mac, mtu) in [
        ([0; 6], 1500),
        ([1, 0, 0, 0, 0, 1], 1500),
        ([0xff; 6], 1500),
        (MAC, 0),
        (MAC, 1279),
    ] {
        let (tap, _host) = tap();
        let config = NetConfig { mac, mtu, ..CONFIG };
        assert!(Net::new(tap, config).is_err(), "{config:?}");
    }
}

#[test]
fn what_is_no_tap_is_refused() {
    let file = tempfile::tempfile().unwrap();
    assert!(matches!(
        Net::new(file.into(), CONFIG),
        Err(NetError::Unsuitable)
    ));
    // A tap that has no interface yet.
    let fresh = std::fs::File::open("/dev/net/tun").unwrap();
    assert!(matches!(
        Net::new(fresh.into(), CONFIG),
        Err(NetError::Unsuitable)
    ));
}

#[test]
fn a_state_makes_the_same_device_with_the_same_address_alone() {
    let mut bench = Bench::new();
    bench.offer(4, 2048);
    let text = serde_json::to_string(&bench.net.state()).unwrap();
    let state: NetState = serde_json::from_str(&text).unwrap();
    // The tap lives on in the other device, as it does when a descriptor is handed on.
    let tap = bench
        .net
        .tap
        .as_ref()
        .unwrap()
        .fd()
        .try_clone_to_owned()
        .unwrap();
    let mut other = Net::new(tap, CONFIG).unwrap();
    other.restore(&state).unwrap();
    assert_eq!(other.state(), bench.net.state());
    bench.net = other;
    assert!(bench.host.send(&frame(60)));
    assert_eq!(bench.received(), [72], "the same queues go on");
    for wrong in [
        NetState {
            version: 2,
            ..state.clone()
        },
        NetState {
            mtu: 9000,
            ..state.clone()
        },
        NetState {
            mac: [2; 6],
            ..state
        },
    ] {
        bench.net.restore(&wrong).unwrap_err();
    }
}

#[test]
fn a_device_without_a_tap_works_once_it_is_connected_and_again_after_it_was_not() {
    let mut bench = Bench::new();
    let net = Net::unconnected(CONFIG).unwrap();
    assert_ne!(net.features() & 1 << VIRTIO_NET_F_CSUM, 0);
    bench.net = net;
    bench.net.set_acked_features(bench.net.features());
    bench.offer(8, 2048);
    bench.send(PLAIN, &frame(60));
    assert_eq!(bench.counters().refused, 1);
    let handle = bench.net.handle();
    for mac in [MAC, [2, 0, 0, 0, 0, 9]] {
        let (tap, host) = tap();
        let state = bench.net.config_generation();
        handle.connect(tap, mac).unwrap();
        assert_ne!(bench.net.config_generation(), state);
        assert!(host.send(&frame(60)));
        assert_eq!(bench.received(), [72]);
        // The guest is known by the address that came with the tap.
        let mut sent = frame(60);
        sent[6..12].copy_from_slice(&mac);
        bench.send(PLAIN, &sent);
        assert_eq!(host.receive().unwrap(), sent);
        handle.disconnect();
        bench.settle();
        assert!(!bench.net.is_connected());
        bench.send(PLAIN, &sent);
        assert_eq!(host.receive(), None);
    }
}

#[test]
fn a_handle_refuses_what_a_device_cannot_be_connected_to() {
    let mut bench = Bench::new();
    let handle = bench.net.handle();
    let (other, _host) = tap();
    assert!(matches!(handle.connect(other, [1; 6]), Err(NetError::Mac)));
    let file = tempfile::tempfile().unwrap();
    assert!(matches!(
        handle.connect(file.into(), MAC),
        Err(NetError::Unsuitable)
    ));
    bench.settle();
    assert!(bench.net.is_connected(), "it keeps what it had");
}
