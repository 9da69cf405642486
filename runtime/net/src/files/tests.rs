use super::*;

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn extra_hosts_are_read_as_docker_reads_them() {
    for (given, name, host) in [
        ("db:10.0.0.5", "db", Some("10.0.0.5")),
        ("db=10.0.0.5", "db", Some("10.0.0.5")),
        ("db:fd00::5", "db", Some("fd00::5")),
        ("db:[fd00::5]", "db", Some("fd00::5")),
        (
            "host.docker.internal:host-gateway",
            "host.docker.internal",
            None,
        ),
    ] {
        let extra: ExtraHost = given.parse().unwrap();
        assert_eq!(extra.name, name);
        assert_eq!(extra.address, host.map(address));
    }
    for bad in [
        "",
        "db",
        "db:",
        ":10.0.0.5",
        "db:10.0.0",
        "a b:10.0.0.5",
        "a\nb:10.0.0.5",
        "#:10.0.0.5",
        "db:gateway",
        "db:10.0.0.5\n",
    ] {
        assert!(bad.parse::<ExtraHost>().is_err(), "{bad:?} was accepted");
    }
}

#[test]
fn hosts_name_the_container_last() {
    let extra = ["db:10.0.0.5", "gw:host-gateway"].map(|text| text.parse().unwrap());
    let own = [address("10.0.0.2"), address("fd00::2")];
    let text = hosts("web.example.org", own, &extra, Some(address("10.0.0.1"))).unwrap();
    let lines: Vec<_> = text.lines().skip(6).collect();
    assert_eq!(
        lines,
        [
            "10.0.0.5\tdb",
            "10.0.0.1\tgw",
            "10.0.0.2\tweb.example.org web",
            "fd00::2\tweb.example.org web"
        ]
    );
    assert!(text.starts_with("127.0.0.1\tlocalhost\n"));
    assert!(hosts("web", [], &extra, None).is_err());
    assert_eq!(hostname("web"), "web\n");
}

#[test]
fn a_host_name_that_is_none_is_refused() {
    for good in ["a", "web-1", "web.example.org", &"x".repeat(64)] {
        check_hostname(good).unwrap();
    }
    for bad in ["", "-a", ".a", "a b", "a\n", "ä", &"x".repeat(65)] {
        assert!(check_hostname(bad).is_err(), "{bad:?} was accepted");
    }
}

#[test]
fn the_hosts_name_servers_are_the_containers_where_it_can_reach_them() {
    let none = Dns::default();
    for (host, ipv6, expected) in [
        ("nameserver 10.0.0.53\n", false, "nameserver 10.0.0.53\n"),
        (
            "# made by hand\nnameserver 127.0.0.1\nnameserver 10.0.0.53 # ours\nsearch a.org b.org\noptions ndots:2\n",
            false,
            "nameserver 10.0.0.53\nsearch a.org b.org\noptions ndots:2\n",
        ),
        (
            "domain a.org\nnameserver ::1\nnameserver fd00::53\n",
            true,
            "nameserver fd00::53\nsearch a.org\n",
        ),
        (
            "nameserver fd00::53\n",
            false,
            "nameserver 8.8.8.8\nnameserver 8.8.4.4\n",
        ),
        (
            "nameserver fe80::1%eth0\nnameserver 10.0.0.53\n",
            true,
            "nameserver 10.0.0.53\n",
        ),
        (
            "",
            true,
            "nameserver 8.8.8.8\nnameserver 8.8.4.4\nnameserver 2001:4860:4860::8888\nnameserver 2001:4860:4860::8844\n",
        ),
    ] {
        assert_eq!(resolv_conf(host, &none, ipv6), expected, "{host}");
    }
}

#[test]
fn what_the_caller_wants_takes_the_place_of_the_hosts() {
    let host = "nameserver 10.0.0.53\nsearch a.org\noptions ndots:2\n";
    let wanted = Dns {
        servers: vec![address("1.1.1.1"), address("127.0.0.1")],
        search: vec![".".to_owned()],
        options: vec!["timeout:1".to_owned()],
    };
    assert_eq!(
        resolv_conf(host, &wanted, false),
        "nameserver 1.1.1.1\nnameserver 127.0.0.1\noptions timeout:1\n"
    );
}

#[test]
fn behind_systemds_stub_are_the_servers_it_asks() {
    let root = tempfile::tempdir().unwrap();
    let write = |path: &str, text: &str| {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    assert_eq!(host_resolv_conf(root.path()).unwrap(), "");
    write("etc/resolv.conf", "nameserver 127.0.0.53\n");
    assert_eq!(
        host_resolv_conf(root.path()).unwrap(),
        "nameserver 127.0.0.53\n"
    );
    write(RESOLVED_CONF, "nameserver 10.0.0.53\n");
    assert_eq!(
        host_resolv_conf(root.path()).unwrap(),
        "nameserver 10.0.0.53\n"
    );
    write(
        "etc/resolv.conf",
        "nameserver 127.0.0.53\nnameserver 9.9.9.9\n",
    );
    assert!(host_resolv_conf(root.path()).unwrap().contains("9.9.9.9"));
}
