use super::*;
use crate::sandbox::Record;

const RANDOM: [u8; 7] = [1, 2, 3, 4, 5, 6, 7];

fn spec(subnet: &str) -> NetworkSpec {
    NetworkSpec {
        name: "a".to_owned(),
        subnet: Some(subnet.parse().unwrap()),
        ..NetworkSpec::default()
    }
}

fn plan(spec: &NetworkSpec) -> Result<Network> {
    Network::plan(spec, &State::default(), &Surroundings::default(), RANDOM)
}

fn route(net: &str) -> Surroundings {
    Surroundings {
        routes: vec![(net.parse().unwrap(), "eth0".to_owned())],
        ..Surroundings::default()
    }
}

#[test]
fn a_network_nobody_specified_takes_the_first_subnet_that_is_free() {
    let unspecified = |name: &str| NetworkSpec {
        name: name.to_owned(),
        ..NetworkSpec::default()
    };
    let mut state = State::default();
    let host = route("10.192.16.0/24");
    let mut subnets = Vec::new();
    for name in ["a", "b"] {
        let network = Network::plan(&unspecified(name), &state, &host, RANDOM).unwrap();
        subnets.push((network.subnet.to_string(), network.bridge()));
        state.networks.insert(name.to_owned(), network);
    }
    let expected = [
        ("10.192.0.0/20", "cloison0"),
        ("10.192.32.0/20", "cloison1"),
    ];
    assert_eq!(subnets, expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
    let full = route("10.0.0.0/8");
    let error = Network::plan(&unspecified("c"), &state, &full, RANDOM).unwrap_err();
    assert!(matches!(error, Error::NoSubnet(_)), "{error}");
}

#[test]
fn a_subnet_that_overlaps_a_route_or_a_network_is_refused_with_its_name() {
    let state = State {
        networks: [("b".to_owned(), plan(&spec("10.5.0.0/16")).unwrap())].into(),
        ..State::default()
    };
    let host = route("10.6.0.0/16");
    for (subnet, with) in [
        ("10.5.0.0/16", "the network a (10.5.0.0/16)"),
        ("10.5.9.0/24", "the network a"),
        ("10.0.0.0/8", "the network a"),
        ("10.6.7.0/24", "route to 10.6.0.0/16 through eth0"),
    ] {
        let error = Network::plan(&spec(subnet), &state, &host, RANDOM);
        let error = error.unwrap_err().to_string();
        assert!(error.contains(with), "{subnet}: {error}");
    }
    Network::plan(&spec("10.7.0.0/16"), &state, &host, RANDOM).unwrap();
}

#[test]
fn a_subnet_that_cannot_serve_is_refused() {
    for subnet in [
        "10.0.0.1/24",
        "10.0.0.0/31",
        "10.0.0.0/32",
        "0.0.0.0/0",
        "127.0.0.0/8",
        "224.0.0.0/24",
    ] {
        let error = plan(&spec(subnet)).unwrap_err();
        assert!(matches!(error, Error::Subnet { .. }), "{subnet}: {error}");
    }
    plan(&spec("192.168.0.0/30")).unwrap();
    for subnet in ["fd00::/48", "fd00::1/64", "fe80::/64", "ff02::/64"] {
        let spec = NetworkSpec {
            subnet6: Some(subnet.parse().unwrap()),
            ..spec("10.0.0.0/24")
        };
        assert!(plan(&spec).is_err(), "{subnet} was accepted");
    }
}

#[test]
fn an_mtu_too_small_for_ipv6_is_refused_only_with_ipv6() {
    for (mtu, ipv6, fine) in [
        (1280, true, true),
        (1279, true, false),
        (1279, false, true),
        (68, false, true),
        (67, false, false),
        (65535, true, true),
        (65536, true, false),
    ] {
        let spec = NetworkSpec {
            mtu: Some(mtu),
            ipv6: Some(ipv6),
            ..spec("10.0.0.0/24")
        };
        let planned = plan(&spec);
        assert_eq!(planned.is_ok(), fine, "{mtu} {ipv6}: {planned:?}");
    }
}

#[test]
fn a_name_that_is_none_is_refused() {
    for name in ["", "-a", "a b", "a/b", "ä", "a\n", &"x".repeat(64)] {
        let spec = NetworkSpec {
            name: name.to_owned(),
            ..spec("10.0.0.0/24")
        };
        assert!(matches!(plan(&spec), Err(Error::NetworkName(_))), "{name}");
    }
}

#[test]
fn addresses_are_leased_from_the_lowest_until_there_are_none() {
    let network = plan(&spec("10.0.0.0/29")).unwrap();
    assert_eq!(network.gateway().to_string(), "10.0.0.1");
    let mut state = State::default();
    for last in 2..=6 {
        let address = network.lease(None, &state).unwrap();
        assert_eq!(address, Ipv4Addr::new(10, 0, 0, last));
        let record = Record::example(last.into(), "a", address);
        state.sandboxes.insert(last.to_string(), record);
    }
    let error = network.lease(None, &state).unwrap_err();
    assert!(matches!(error, Error::Exhausted(_)), "{error}");
    state.sandboxes.remove("4");
    assert_eq!(network.lease(None, &state).unwrap().octets()[3], 4);
}

#[test]
fn an_address_that_is_wanted_is_given_or_its_owner_named() {
    let network = plan(&spec("10.0.0.0/29")).unwrap();
    let address = Ipv4Addr::new(10, 0, 0, 3);
    let record = Record::example(0, "a", address);
    let state = State {
        sandboxes: [("web".to_owned(), record)].into(),
        ..State::default()
    };
    for (wanted, error) in [
        ("10.0.0.3", "in use by the sandbox web"),
        ("10.0.0.1", "in use by the host"),
        ("10.0.0.0", "not a host's address"),
        ("10.0.0.7", "not a host's address"),
        ("10.0.1.2", "not a host's address"),
    ] {
        let refused = network.lease(wanted.parse().ok(), &state).unwrap_err();
        assert!(refused.to_string().contains(error), "{wanted}: {refused}");
    }
    network.lease("10.0.0.4".parse().ok(), &state).unwrap();
}

#[test]
fn the_ipv6_address_has_the_number_of_the_ipv4_address() {
    let spec = NetworkSpec {
        ipv6: Some(true),
        ..spec("10.0.0.0/16")
    };
    let network = plan(&spec).unwrap();
    let subnet = network.subnet6.unwrap().to_string();
    assert_eq!(subnet, "fd01:203:405:607::/64");
    let address = network.address6(Ipv4Addr::new(10, 0, 1, 2)).unwrap();
    assert_eq!(address.to_string(), "fd01:203:405:607::102");
}
