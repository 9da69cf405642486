//! What a sandbox may not do.

use super::*;
use crate::Error;
use crate::testing::{at, connect, echo, exchange, ping, pings};

#[tokio::test]
async fn a_sandbox_that_may_connect_to_nothing_cannot_and_still_answers() {
    let world = World::new();
    let other = world.attach("other").await;
    let wanted = Attachment {
        egress: "deny".parse().ok(),
        publish: vec!["8080:80".parse().unwrap()],
        ..world.wanted("shut")
    };
    let shut = world.attach_as(&wanted).await.unwrap();
    let gateway = shut.network.gateway().to_string();
    let gateway6 = shut.network.gateway6().unwrap().to_string();
    for to in ["192.0.2.1", "2001:db8::1", "192.0.2.2", &gateway, &gateway6]
        .map(str::to_owned)
        .into_iter()
        .chain([ipv4(&other), ipv6(&other)])
    {
        assert!(!ping(&shut.namespace, &to, "-c 1 -W 1"), "{to} answers");
    }
    let before = world.networks.refused("shut").await.unwrap();
    assert!(before >= 7, "{before}");
    let _serving = echo(&world.outside, at("192.0.2.1", 80));
    let error = connect(&shut.namespace, at("192.0.2.1", 80)).unwrap_err();
    // At once, not after a time-out.
    assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED), "{error}");
    assert!(world.networks.refused("shut").await.unwrap() > before);
    assert_eq!(world.networks.refused("other").await.unwrap(), 0);

    let serving = echo(&shut.namespace, at("0.0.0.0", 80));
    exchange(&world.outside, at("192.0.2.2", 8080)).unwrap();
    serving.join().unwrap();
    assert!(pings(&world.host, &ipv4(&shut)));
    assert!(pings(&other.namespace, &ipv4(&shut)));
}

#[tokio::test]
async fn what_a_policy_allows_is_allowed_and_nothing_else() {
    let world = World::new();
    ip(&world.outside, "addr add 192.0.2.9/24 dev eth0");
    let policy = "allow=192.0.2.1:80,[2001:db8::/64]";
    let some = world.restrict("some", policy).await;
    let _web = echo(&world.outside, at("192.0.2.1", 80));
    let _other_port = echo(&world.outside, at("192.0.2.1", 81));
    let _other_host = echo(&world.outside, at("192.0.2.9", 80));
    connect(&some.namespace, at("192.0.2.1", 80)).unwrap();
    assert!(connect(&some.namespace, at("192.0.2.1", 81)).is_err());
    assert!(connect(&some.namespace, at("192.0.2.9", 80)).is_err());
    assert!(!ping(&some.namespace, "192.0.2.1", "-c 1 -W 1"));
    assert!(pings(&some.namespace, "2001:db8::1"));
}

#[tokio::test]
async fn a_policy_does_not_open_other_networks() {
    let world = World::new();
    let spec = network("other", "10.3.0.0/24");
    world.networks.create(&spec).await.unwrap();
    let wanted = Attachment {
        network: "other".to_owned(),
        ..world.wanted("b")
    };
    let b = world.attach_as(&wanted).await.unwrap();
    let a = world.restrict("a", "allow=0.0.0.0/0").await;
    assert!(!ping(&a.namespace, &ipv4(&b), "-c 1 -W 1"));
    assert!(pings(&a.namespace, "192.0.2.1"));
}

#[tokio::test]
async fn a_name_in_a_policy_is_looked_up_on_the_host() {
    let world = World::new();
    let a = world.restrict("a", "allow=dns=localhost").await;
    let addresses = &a.names["localhost"];
    assert!(addresses.contains(&"127.0.0.1".parse().unwrap()));
    let rules = command(&world.host, "nft list chain inet cloison egress-0").unwrap();
    assert!(rules.contains("ip daddr 127.0.0.1 return"), "{rules}");
    assert!(
        rules.contains("log prefix \"cloison a refused: \""),
        "{rules}"
    );
    world.networks.refresh("a").await.unwrap();
    world.networks.refresh("nobody").await.unwrap();
}

#[tokio::test]
async fn nobody_sends_in_anothers_name() {
    let world = World::new();
    let a = world.attach("a").await;
    let shut = world.restrict("shut", "deny").await;
    assert!(pings(&a.namespace, "192.0.2.1"));
    // A guest that takes its neighbour's address, or any other, or another hardware address, to be free of its policy.
    for change in [
        format!("addr add {}/32 dev eth0", ipv4(&a)),
        format!("addr del {}/32 dev eth0", ipv4(&shut)),
    ] {
        ip(&shut.namespace, &change);
    }
    assert!(!ping(&shut.namespace, "192.0.2.1", "-c 1 -W 1"));
    ip(&shut.namespace, "addr add 10.192.9.9/32 dev eth0");
    ip(
        &shut.namespace,
        &format!("addr del {}/32 dev eth0", ipv4(&a)),
    );
    assert!(!ping(&shut.namespace, "192.0.2.1", "-c 1 -W 1"));
    ip(
        &shut.namespace,
        &format!("addr add {}/128 dev eth0 nodad", ipv6(&a)),
    );
    ip(
        &shut.namespace,
        &format!("addr del {}/128 dev eth0", ipv6(&shut)),
    );
    assert!(!ping(&shut.namespace, "2001:db8::1", "-c 1 -W 1"));
    assert!(
        pings(&a.namespace, "192.0.2.1"),
        "the neighbour was cut off"
    );

    let gateway = a.network.gateway();
    assert!(pings(&a.namespace, &gateway.to_string()));
    ip(&a.namespace, "link set eth0 address 02:00:00:00:00:66");
    assert!(!ping(&a.namespace, &gateway.to_string(), "-c 1 -W 1"));
}

#[tokio::test]
async fn what_somebody_has_is_refused_by_its_owners_name() {
    let world = World::new();
    let web = world.publish("web", &["8080:80"]).await;
    let wanted = || world.wanted("b");
    for (wanted, owner) in [
        (
            Attachment {
                publish: vec!["8080:81".parse().unwrap()],
                ..wanted()
            },
            "8080/tcp is in use by the sandbox web",
        ),
        (
            Attachment {
                address: Some(web.addresses.ipv4),
                ..wanted()
            },
            "in use by the sandbox web",
        ),
        (
            Attachment {
                address: Some(web.network.gateway()),
                ..wanted()
            },
            "in use by the host",
        ),
        (
            Attachment {
                mac: Some(web.addresses.mac),
                ..wanted()
            },
            "it is the sandbox web's",
        ),
        (
            Attachment {
                publish: vec!["81:80".parse().unwrap(), "80-82:80-82".parse().unwrap()],
                ..wanted()
            },
            "published twice",
        ),
        (
            Attachment {
                network: "missing".to_owned(),
                ..wanted()
            },
            "there is no network missing",
        ),
        (world.wanted("web"), "web is on a network already"),
    ] {
        let before = world.traces();
        let error = world.networks.attach(&wanted).await.unwrap_err();
        assert!(error.to_string().contains(owner), "{error}");
        assert_same(&world.traces(), &before, "at the end");
    }
    let listener = world
        .host
        .run(|| std::net::TcpListener::bind("0.0.0.0:9090"));
    let _listener = listener.unwrap().unwrap();
    let taken = Attachment {
        publish: vec!["9090:80".parse().unwrap()],
        ..wanted()
    };
    let error = world.networks.attach(&taken).await.unwrap_err();
    assert!(matches!(error, Error::PortInUse { .. }), "{error}");
    assert!(error.to_string().contains("pid"), "{error}");
    // What was refused is no obstacle to what is right.
    world.networks.attach(&wanted()).await.unwrap();
}

#[tokio::test]
async fn an_id_that_could_be_a_rule_is_none() {
    let world = World::new();
    let before = world.traces();
    for id in [
        "",
        "a\"",
        "a b",
        "a\nflush ruleset",
        "../a",
        &"x".repeat(129),
    ] {
        let wanted = Attachment {
            id: id.to_owned(),
            egress: "deny".parse().ok(),
            ..world.wanted("a")
        };
        let error = world.networks.attach(&wanted).await.unwrap_err();
        assert!(matches!(error, Error::SandboxId(_)), "{error}");
    }
    assert_same(&world.traces(), &before, "at the end");
}

#[tokio::test]
async fn what_somebody_flushed_is_restored() {
    let world = World::new();
    let _shut = world.restrict("shut", "deny").await;
    let _web = world.publish("web", &["8080:80"]).await;
    let before = world.traces();
    command(&world.host, "nft delete table inet cloison").unwrap();
    command(&world.host, "nft delete table bridge cloison").unwrap();
    world.networks.restore().await.unwrap();
    assert_eq!(sorted(&world.traces()), sorted(&before));
    world.networks.restore().await.unwrap();
    assert_eq!(sorted(&world.traces()), sorted(&before));
}

fn sorted(text: &str) -> Vec<&str> {
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    lines
}

#[tokio::test]
async fn a_chain_that_drops_what_is_forwarded_is_reported() {
    let world = World::new();
    let _a = world.attach("a").await;
    assert!(world.networks.obstacles().await.unwrap().is_empty());
    command(&world.host, "iptables -P FORWARD DROP").unwrap();
    let obstacles = world.networks.obstacles().await.unwrap();
    assert_eq!(obstacles, ["ip filter FORWARD"]);
}
