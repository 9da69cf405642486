//! Each test is a namespace prepared as an engine would, a peer at the other end of its cable, and a namespace in a guest's place.

use std::time::Duration;

use super::*;
use crate::GuestNeighbour;
use crate::testing::{self, Guest, PATIENCE, at, ip, namespace, ping, pings, veth};

/// A namespace with an interface eth0 like Docker's, and its peer.
fn prepared() -> (Namespace, Namespace) {
    let (sandbox, peer) = (namespace(), namespace());
    veth(&sandbox, "eth0", &peer, "out");
    ip(
        &sandbox,
        "addr add 10.9.0.2/24 brd 10.9.0.255 dev eth0
         addr add fd00:9::2/64 dev eth0 nodad
         route add default via 10.9.0.1
         route add 10.77.0.0/16 via 10.9.0.1 src 10.9.0.2 metric 7 mtu 1400
         route add default via fd00:9::1
         neigh add 10.9.0.99 lladdr 02:00:00:00:00:99 dev eth0 nud permanent",
    );
    ip(
        &peer,
        "addr add 10.9.0.1/24 dev out
         addr add fd00:9::1/64 dev out nodad",
    );
    (sandbox, peer)
}

async fn arrived(adopter: &mut Adopter) -> Vec<Adopted> {
    let changes = adopter.changes().await.unwrap();
    let arrival = |change| match change {
        Change::Arrived(adopted) => adopted,
        other => panic!("not an arrival: {other:?}"),
    };
    changes.into_iter().map(arrival).collect()
}

/// The next change that `wanted` makes something of; a caller's many small steps make others before it.
async fn until<T>(adopter: &mut Adopter, wanted: impl Fn(Change) -> Option<T>) -> T {
    let found = async {
        loop {
            if let Some(found) = wanted(adopter.next().await.unwrap()) {
                return found;
            }
        }
    };
    tokio::time::timeout(PATIENCE, found).await.unwrap()
}

fn arrival(change: Change) -> Option<Adopted> {
    match change {
        Change::Arrived(adopted) => Some(adopted),
        _ => None,
    }
}

fn change(change: Change) -> Option<GuestInterface> {
    match change {
        Change::Changed(interface) => Some(interface),
        _ => None,
    }
}

#[tokio::test]
async fn the_guest_is_told_all_that_its_caller_set_up() {
    let (sandbox, _peer) = prepared();
    let mut adopter = Adopter::new(&sandbox).unwrap();
    let adopted = arrived(&mut adopter).await.remove(0);
    let interface = adopted.interface;
    assert_eq!((interface.name.as_str(), interface.mtu), ("eth0", 1500));
    let addresses: Vec<_> = interface
        .addresses
        .iter()
        .map(|a| (a.address.to_string(), a.prefix, a.broadcast))
        .collect();
    assert_eq!(
        addresses,
        [
            ("10.9.0.2".to_owned(), 24, "10.9.0.255".parse().ok()),
            ("fd00:9::2".to_owned(), 64, None)
        ]
    );
    let routes: Vec<_> = interface
        .routes
        .iter()
        .map(|r| {
            (
                r.destination.to_string(),
                r.gateway.map(|g| g.to_string()),
                r.mtu,
            )
        })
        .collect();
    let via = |address: &str| Some(address.to_owned());
    for route in [
        ("10.9.0.0/24".to_owned(), None, None),
        ("fd00:9::/64".to_owned(), None, None),
        ("0.0.0.0/0".to_owned(), via("10.9.0.1"), None),
        ("10.77.0.0/16".to_owned(), via("10.9.0.1"), Some(1400)),
        ("::/0".to_owned(), via("fd00:9::1"), None),
    ] {
        assert!(routes.contains(&route), "{route:?} is not in {routes:?}");
    }
    assert_eq!(routes.len(), 5);
    assert_eq!(
        interface.neighbours,
        [GuestNeighbour {
            address: "10.9.0.99".parse().unwrap(),
            mac: "02:00:00:00:00:99".parse().unwrap()
        }]
    );
    let json = serde_json::to_string(&interface).unwrap();
    assert_eq!(
        serde_json::from_str::<GuestInterface>(&json).unwrap(),
        interface
    );
}

#[tokio::test]
async fn the_guest_speaks_no_ipv6_where_its_caller_has_switched_it_off() {
    let (sandbox, _peer) = prepared();
    let interface = async |adopter: &mut Adopter| arrived(adopter).await.remove(0).interface;
    let spoken = interface(&mut Adopter::new(&sandbox).unwrap()).await;
    assert!(!spoken.ipv4_only);
    sandbox.run(|| sysctl::silence("eth0")).unwrap().unwrap();
    let mut adopter = Adopter::new(&sandbox).unwrap();
    let silent = interface(&mut adopter).await;
    assert!(silent.ipv4_only);
    assert!(silent.addresses.iter().all(|a| a.address.is_ipv4()));
}

#[tokio::test]
async fn everything_passes_between_the_guest_and_the_peer() {
    let (sandbox, peer) = prepared();
    let mut adopter = Adopter::new(&sandbox).unwrap();
    let mut guest = Guest::new();
    guest.plug(arrived(&mut adopter).await.remove(0));
    for (from, to) in [
        (&peer, "10.9.0.2"),
        (&peer, "fd00:9::2"),
        (&guest.namespace, "10.9.0.1"),
        (&guest.namespace, "fd00:9::1"),
    ] {
        assert!(pings(from, to), "{to} does not answer");
    }
    let server = testing::echo(&guest.namespace, at("10.9.0.2", 80));
    testing::exchange(&peer, at("10.9.0.2", 80)).unwrap();
    server.join().unwrap();
    let server = testing::echo(&peer, at("fd00:9::1", 80));
    testing::exchange(&guest.namespace, at("fd00:9::1", 80)).unwrap();
    server.join().unwrap();
    let (there, here) = (at("10.9.0.2", 53), &guest.namespace);
    assert!(testing::datagram(&peer, there, here, there));
}

#[tokio::test]
async fn a_frame_of_nine_thousand_bytes_passes_where_the_callers_mtu_allows_it() {
    let (sandbox, peer) = prepared();
    ip(&sandbox, "link set eth0 mtu 9000");
    ip(&peer, "link set out mtu 9000");
    let mut adopter = Adopter::new(&sandbox).unwrap();
    let mut guest = Guest::new();
    let adopted = arrived(&mut adopter).await.remove(0);
    assert_eq!(adopted.interface.mtu, 9000);
    guest.plug(adopted);
    // 8972 bytes of data, 8 of ICMP and 20 of IP: more than any smaller MTU on the way would let pass in one piece.
    let created = |snmp: String| {
        let lines: Vec<Vec<_>> = snmp.lines().map(|l| l.split(' ').collect()).collect();
        let column = lines[0].iter().position(|name| *name == "FragCreates");
        lines[1][column.unwrap()].to_owned()
    };
    let fragments = || testing::command(&peer, "busybox grep ^Ip: /proc/net/snmp").unwrap();
    let before = created(fragments());
    assert!(ping(&peer, "10.9.0.2", "-c 3 -w 3 -s 8972"));
    assert!(ping(&guest.namespace, "10.9.0.1", "-c 3 -w 3 -s 8972"));
    assert_eq!(created(fragments()), before);
}

#[tokio::test]
async fn the_host_answers_nothing_in_the_guests_place_until_it_is_released() {
    let (sandbox, peer) = prepared();
    assert!(pings(&peer, "10.9.0.2"));
    ip(&peer, "neigh flush dev out");
    let mut adopter = Adopter::new(&sandbox).unwrap();
    let adopted = arrived(&mut adopter).await;
    assert!(!ping(&peer, "10.9.0.2", "-c 1 -W 1"), "the host answered");
    let addresses = testing::command(&sandbox, "ip addr show eth0").unwrap();
    assert!(addresses.contains("10.9.0.2/24"), "{addresses}");
    drop((adopter, adopted));
    release(&sandbox).await.unwrap();
    assert!(pings(&peer, "10.9.0.2"));
    let qdiscs = testing::command(&sandbox, "tc qdisc show").unwrap();
    assert!(!qdiscs.contains("ingress"), "{qdiscs}");
    let links = testing::command(&sandbox, "ip link").unwrap();
    assert!(!links.contains(TAP), "{links}");
    release(&sandbox).await.unwrap();
}

#[tokio::test]
async fn what_a_killed_adopter_left_does_not_keep_the_next_one_from_adopting() {
    let (sandbox, peer) = prepared();
    let mut adopter = Adopter::new(&sandbox).unwrap();
    drop(arrived(&mut adopter).await);
    drop(adopter);
    let mut adopter = Adopter::new(&sandbox).unwrap();
    let mut guest = Guest::new();
    guest.plug(arrived(&mut adopter).await.remove(0));
    assert!(pings(&peer, "10.9.0.2"));
}

#[tokio::test]
async fn an_interface_that_comes_later_is_adopted_changed_and_missed() {
    let (sandbox, _peer) = prepared();
    let mut adopter = Adopter::new(&sandbox).unwrap();
    assert_eq!(arrived(&mut adopter).await.len(), 1);
    let second = namespace();
    // As Docker does it: moved in, named, given an address, brought up, given routes.
    veth(&second, "out", &sandbox, "eth1");
    let adopted = until(&mut adopter, arrival).await;
    assert_eq!(adopted.interface.name, "eth1");
    ip(&second, "addr add 10.10.0.1/24 dev out");
    ip(&sandbox, "addr add 10.10.0.2/24 dev eth1");
    let has_address = |c| change(c).filter(|interface| !interface.addresses.is_empty());
    let interface = until(&mut adopter, has_address).await;
    assert_eq!(interface.index, adopted.interface.index);
    let mut guest = Guest::new();
    guest.plug(Adopted {
        interface,
        ..adopted
    });
    assert!(pings(&second, "10.10.0.2"));
    ip(&sandbox, "link set eth1 mtu 1400");
    let smaller = |c| change(c).filter(|interface| interface.mtu == 1400);
    let index = until(&mut adopter, smaller).await.index;
    ip(&second, "link del out");
    let gone = |c| match c {
        Change::Gone(index) => Some(index),
        _ => None,
    };
    assert_eq!(until(&mut adopter, gone).await, index);
}

#[tokio::test]
async fn an_interface_that_is_down_is_adopted_when_it_comes_up() {
    let (sandbox, peer) = (namespace(), namespace());
    veth(&sandbox, "eth0", &peer, "out");
    ip(&sandbox, "link set eth0 down");
    let mut adopter = Adopter::new(&sandbox).unwrap();
    assert!(arrived(&mut adopter).await.is_empty());
    ip(&sandbox, "link set eth0 address 02:00:00:00:00:42 up");
    let adopted = until(&mut adopter, arrival).await;
    assert_eq!(adopted.interface.mac.to_string(), "02:00:00:00:00:42");
}

#[tokio::test]
async fn two_interfaces_stay_apart() {
    let (sandbox, peer) = prepared();
    let other = namespace();
    veth(&sandbox, "eth1", &other, "out");
    ip(&sandbox, "addr add 10.10.0.2/24 dev eth1");
    ip(&other, "addr add 10.10.0.1/24 dev out");
    let mut adopter = Adopter::new(&sandbox).unwrap();
    let mut guest = Guest::new();
    for adopted in arrived(&mut adopter).await {
        guest.plug(adopted);
    }
    assert!(pings(&peer, "10.9.0.2"));
    assert!(pings(&other, "10.10.0.2"));
    assert!(!ping(&other, "10.9.0.2", "-c 1 -W 1"));
}

#[tokio::test]
async fn a_macvtap_is_its_own_tap() {
    let (sandbox, peer) = (namespace(), namespace());
    veth(&sandbox, "lower", &peer, "out");
    ip(&peer, "addr add 10.9.0.1/24 dev out");
    ip(
        &sandbox,
        "link add link lower name eth0 address 02:00:00:00:00:07 type macvtap mode bridge
         addr add 10.9.0.2/24 dev eth0
         link set lower down
         link set eth0 up",
    );
    let mut adopter = Adopter::new(&sandbox).unwrap();
    let adopted = arrived(&mut adopter).await.remove(0);
    assert_eq!(adopted.interface.name, "eth0");
    let qdiscs = testing::command(&sandbox, "tc qdisc show").unwrap();
    assert!(!qdiscs.contains("ingress"), "{qdiscs}");
    ip(&sandbox, "link set lower up");
    let mut guest = Guest::new();
    guest.plug(adopted);
    assert!(pings(&guest.namespace, "10.9.0.1"));
}

#[tokio::test]
async fn whoever_gives_up_waiting_misses_nothing() {
    let (sandbox, _peer) = prepared();
    let mut adopter = Adopter::new(&sandbox).unwrap();
    let _adopted = arrived(&mut adopter).await;
    ip(&sandbox, "addr add 10.9.0.3/24 dev eth0");
    // Dropped wherever it first has to wait, and wherever it has to wait next.
    let mut pauses = 0;
    let seen = loop {
        pauses += 1;
        let mut next = Box::pin(adopter.next());
        let mut found = None;
        for _ in 0..pauses {
            found = found.or_else(|| (&mut next).now_or_never());
            if found.is_some() {
                break;
            }
            tokio::task::yield_now().await;
        }
        if let Some(seen) = found {
            break seen.unwrap();
        }
        assert!(pauses < 1000, "it never came");
    };
    let interface = change(seen).unwrap();
    assert_eq!(interface.addresses.len(), 3);
}

#[tokio::test]
async fn a_quiet_namespace_has_nothing_to_tell() {
    let (sandbox, _peer) = prepared();
    let mut adopter = Adopter::new(&sandbox).unwrap();
    let _adopted = arrived(&mut adopter).await;
    // Its own taps are no news.
    let next = tokio::time::timeout(Duration::from_secs(2), adopter.next());
    assert!(next.await.is_err());
}

/// Has one of CNI's plugins, as Debian packages them, do something about the namespace at `path`.
fn cni(
    host: &Namespace,
    data: &std::path::Path,
    path: &std::path::Path,
    verb: &str,
    result: &str,
) -> String {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let config = format!(
        r#"{{"cniVersion":"0.4.0","name":"net","type":"bridge","bridge":"cni0","isGateway":true,"mtu":1450,
            "ipam":{{"type":"host-local","dataDir":"{}","ranges":[[{{"subnet":"10.22.0.0/16"}}],[{{"subnet":"fd00:22::/64"}}]],
            "routes":[{{"dst":"0.0.0.0/0"}}]}}{result}}}"#,
        data.display()
    );
    let output = host.run(|| {
        let mut plugin = Command::new("/usr/lib/cni/bridge")
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", "a")
            .env("CNI_NETNS", path)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", "/usr/lib/cni")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a plugin (install containernetworking-plugins)");
        let mut stdin = plugin.stdin.take().unwrap();
        stdin.write_all(config.as_bytes()).unwrap();
        drop(stdin);
        plugin.wait_with_output().unwrap()
    });
    let output = output.unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{verb}: {text}");
    text
}

#[tokio::test]
async fn what_cnis_plugins_prepared_is_adopted_and_stays_as_they_know_it() {
    let host = namespace();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("netns");
    let sandbox = Namespace::persistent(&path).unwrap();
    let result = cni(&host, dir.path(), &path, "ADD", "");
    let previous = format!(r#","prevResult":{result}"#);

    let mut adopter = Adopter::new(&Namespace::open(&path).unwrap()).unwrap();
    let adopted = arrived(&mut adopter).await.remove(0);
    assert_eq!(adopted.interface.mtu, 1450);
    assert_eq!(adopted.interface.addresses.len(), 2);
    let mut guest = Guest::new();
    guest.plug(adopted);
    assert!(pings(&guest.namespace, "10.22.0.1"));
    assert!(pings(&host, "fd00:22::2"));
    cni(&host, dir.path(), &path, "CHECK", &previous);

    cni(&host, dir.path(), &path, "DEL", &previous);
    let gone = |c| matches!(c, Change::Gone(_)).then_some(());
    until(&mut adopter, gone).await;
    drop(sandbox);
    Namespace::remove(&path).unwrap();
}
