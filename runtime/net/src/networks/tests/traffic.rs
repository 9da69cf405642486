//! Who reaches whom.

use super::*;
use crate::testing::{at, connect, datagram, echo, exchange, ping, pings};

#[tokio::test]
async fn sandboxes_the_host_and_the_world_reach_each_other() {
    let world = World::new();
    let (a, b) = (world.attach("a").await, world.attach("b").await);
    let gateway = a.network.gateway().to_string();
    let gateway6 = a.network.gateway6().unwrap().to_string();
    for (from, to) in [
        (&a.namespace, ipv4(&b)),
        (&a.namespace, ipv6(&b)),
        (&a.namespace, gateway),
        (&a.namespace, gateway6),
        (&a.namespace, "192.0.2.1".to_owned()),
        (&a.namespace, "2001:db8::1".to_owned()),
        (&world.host, ipv4(&a)),
        (&world.host, ipv6(&a)),
    ] {
        assert!(pings(from, &to), "{to} does not answer");
    }
    for (from, to, server) in [
        (&a.namespace, ipv4(&b), &b.namespace),
        (&b.namespace, ipv6(&a), &a.namespace),
        (&a.namespace, "192.0.2.1".to_owned(), &world.outside),
        (&a.namespace, "2001:db8::1".to_owned(), &world.outside),
    ] {
        let to = at(&to, 80);
        let serving = echo(server, to);
        exchange(from, to).unwrap();
        serving.join().unwrap();
        assert!(datagram(from, to, server, to), "no datagram from {to}");
    }
}

#[tokio::test]
async fn jumbo_frames_pass_where_the_network_has_them() {
    let world = World::new();
    let spec = NetworkSpec {
        mtu: Some(9000),
        ..network("jumbo", "10.3.0.0/24")
    };
    world.networks.create(&spec).await.unwrap();
    let wanted = Attachment {
        network: "jumbo".to_owned(),
        ..world.wanted("a")
    };
    let a = world.attach_as(&wanted).await.unwrap();
    let link = command(&a.namespace, "ip link show eth0").unwrap();
    assert!(link.contains("mtu 9000"), "{link}");
    assert!(ping(&world.host, &ipv4(&a), "-c 3 -w 3 -s 8972"));
}

#[tokio::test]
async fn a_published_port_is_reached_from_everywhere() {
    // Kernels with br_netfilter change a bridged packet's destination in another place.
    for bridge_netfilter in ["1", "0"] {
        let world = World::new();
        let publish = ["8080-8081:80-81", "5353:53/udp"];
        let web = world.publish("web", &publish).await;
        let other = world.attach("other").await;
        let _ = world.host.run(|| {
            fs::write(
                "/proc/sys/net/bridge/bridge-nf-call-iptables",
                bridge_netfilter,
            )
        });
        for (who, from, to) in [
            ("the world", &world.outside, "192.0.2.2"),
            ("the world by IPv6", &world.outside, "2001:db8::2"),
            ("the host by loopback", &world.host, "127.0.0.1"),
            ("the host by its address", &world.host, "192.0.2.2"),
            ("the host by IPv6", &world.host, "2001:db8::2"),
            ("a neighbour", &other.namespace, "192.0.2.2"),
            ("a neighbour by IPv6", &other.namespace, "2001:db8::2"),
            ("itself", &web.namespace, "192.0.2.2"),
            ("itself by IPv6", &web.namespace, "2001:db8::2"),
        ] {
            let any = if to.contains(':') { "::" } else { "0.0.0.0" };
            let serving = echo(&web.namespace, at(any, 81));
            let exchanged = exchange(from, at(to, 8081));
            assert!(
                exchanged.is_ok(),
                "{who} ({bridge_netfilter}): {exchanged:?}"
            );
            serving.join().unwrap();
            let arrived = datagram(from, at(to, 5353), &web.namespace, at(any, 53));
            assert!(arrived, "{who} ({bridge_netfilter}): no datagram");
        }
    }
}

#[tokio::test]
async fn a_port_published_on_one_address_is_not_on_another() {
    let world = World::new();
    let web = world.publish("web", &["127.0.0.1:8080:80"]).await;
    let serving = echo(&web.namespace, at("0.0.0.0", 80));
    assert!(connect(&world.outside, at("192.0.2.2", 8080)).is_err());
    exchange(&world.host, at("127.0.0.1", 8080)).unwrap();
    serving.join().unwrap();
}

#[tokio::test]
async fn a_sandbox_is_reached_from_outside_by_its_published_ports_only() {
    let world = World::new();
    let web = world.publish("web", &["8080:80"]).await;
    // Somebody outside who knows the way in.
    ip(
        &world.outside,
        &format!("route add {} via 192.0.2.2", web.network.subnet),
    );
    let _serving = echo(&web.namespace, at("0.0.0.0", 80));
    assert!(!ping(&world.outside, &ipv4(&web), "-c 1 -W 1"));
    assert!(connect(&world.outside, at(&ipv4(&web), 80)).is_err());
    connect(&world.outside, at("192.0.2.2", 8080)).unwrap();
}

#[tokio::test]
async fn networks_are_apart() {
    let world = World::new();
    let spec = network("other", "10.3.0.0/24");
    world.networks.create(&spec).await.unwrap();
    let wanted = Attachment {
        network: "other".to_owned(),
        ..world.wanted("b")
    };
    let a = world.attach("a").await;
    let b = world.attach_as(&wanted).await.unwrap();
    assert!(!ping(&a.namespace, &ipv4(&b), "-c 1 -W 1"));
    assert!(!ping(&b.namespace, &ipv4(&a), "-c 1 -W 1"));
    assert!(pings(&b.namespace, "192.0.2.1"));
}

#[tokio::test]
async fn a_loopback_service_of_the_host_is_not_a_sandboxs() {
    let world = World::new();
    let a = world.attach("a").await;
    let gateway = a.network.gateway();
    ip(
        &a.namespace,
        &format!(
            "addr del 127.0.0.1/8 dev lo
                  route add 127.0.0.1/32 via {gateway} src {}",
            ipv4(&a)
        ),
    );
    let local = "/proc/sys/net/ipv4/conf/eth0/route_localnet";
    a.namespace.run(|| fs::write(local, "1")).unwrap().unwrap();
    let _serving = echo(&world.host, at("0.0.0.0", 631));
    assert!(connect(&a.namespace, at("127.0.0.1", 631)).is_err());
    connect(&a.namespace, at(&gateway.to_string(), 631)).unwrap();
}
