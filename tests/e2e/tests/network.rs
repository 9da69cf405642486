//! Containers on networks: those that somebody prepared, and cloison's own.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::host::{busybox, fail, image, succeed, text};
use crate::world::{Netns, World};

/// A namespace with an interface eth0 as a CNI plugin would leave it, connected with `host`.
fn prepared(host: &Netns) -> Netns {
    let netns = Netns::new();
    host.veth("veth0", &netns, "eth0");
    host.ip("link set veth0 mtu 9000
             addr add 10.9.0.1/24 dev veth0
             addr add fd00:9::1/64 dev veth0 nodad");
    netns.ip("link set eth0 mtu 9000
              addr add 10.9.0.2/24 dev eth0
              addr add fd00:9::2/64 dev eth0 nodad
              route add default via 10.9.0.1
              route add 10.77.0.0/16 via 10.9.0.9 metric 7
              -6 route add default via fd00:9::1");
    netns
}

fn in_namespace(netns: &Netns) -> String {
    format!("ns:{}", netns.path())
}

#[test]
fn a_container_has_the_interfaces_of_a_prepared_namespace() {
    let world = World::new();
    let netns = prepared(&world.netns);
    let network = in_namespace(&netns);
    world.netns.name_server("10.9.0.1", [10, 9, 0, 1]);
    let options = ["--network", &network, "--dns", "10.9.0.1", "--name", "c"];
    world.server(&options, "prepared");

    let routes = succeed(&world.exec("c", "ip route; ip -6 route; cat /sys/class/net/eth0/mtu"));
    for route in [
        "default via 10.9.0.1 dev eth0",
        "10.9.0.0/24 dev eth0 scope link  src 10.9.0.2",
        "10.77.0.0/16 via 10.9.0.9 dev eth0  metric 7",
        "default via fd00:9::1 dev eth0",
        "\n9000\n",
    ] {
        assert!(routes.contains(route), "{route} is not in {routes}");
    }
    let mac = |netns: &Netns| text(&netns.run("ip -o link show eth0").stdout);
    let address = succeed(&world.exec("c", "cat /sys/class/net/eth0/address"));
    assert!(mac(&netns).contains(address.trim()));

    for address in ["10.9.0.2", "fd00:9::2"] {
        assert!(world.netns.pings(address, 56), "{address}");
        assert!(world.netns.pings(address, 8900), "{address}, large");
    }
    assert!(world.netns.page("10.9.0.2:80").contains("prepared"));
    assert!(world.netns.page("[fd00:9::2]:80").contains("prepared"));
    let script =
        "ping -c 1 -w 5 -s 8900 10.9.0.1 && ping6 -c 1 -w 5 fd00:9::1 && nslookup some.name";
    let said = succeed(&world.exec("c", script));
    assert!(said.contains("Address: 10.9.0.1"), "{said}");

    world.remove(&["c"]);
    // The namespace is as it was: its maker can take it away as it always does.
    let links = text(&netns.run("ip -o link").stdout);
    assert!(!links.contains("cltap"), "{links}");
    assert!(world.netns.pings("10.9.0.2", 56), "nobody is there");
}

#[test]
fn interfaces_that_come_change_and_go_are_followed() {
    let world = World::new();
    let netns = Netns::new();
    let network = in_namespace(&netns);
    let id = world.detached(&["--network", &network], "sleep 1000");
    let host = &world.netns;
    host.veth("veth0", &netns, "net1");
    host.ip("addr add 10.9.0.1/24 dev veth0");
    netns.ip("addr add 10.9.0.2/24 dev net1");
    world.until(&id, "ip addr show net1 | grep -q 10.9.0.2/24");
    world.until(&id, "ping -c 1 -w 5 10.9.0.1");

    netns.ip("addr add 10.9.0.3/24 dev net1
              link set net1 mtu 1400
              route add 10.66.0.0/16 via 10.9.0.1
              neigh add 10.9.0.77 lladdr 02:00:00:00:00:77 dev net1 nud permanent");
    world.until(&id, "ip addr show net1 | grep -q 10.9.0.3/24");
    world.until(&id, "ip route | grep -q '10.66.0.0/16 via 10.9.0.1'");
    world.until(&id, "ip neigh | grep -q 02:00:00:00:00:77");
    world.until(&id, "ip link show net1 | grep -q 'mtu 1400'");
    netns.ip("addr del 10.9.0.2/24 dev net1");
    world.until(&id, "! ip addr show net1 | grep -q 10.9.0.2/24");

    host.ip("link del veth0");
    world.until(&id, "! ip link show net1 2>/dev/null");
    // There is room for another.
    host.veth("veth0", &netns, "net2");
    host.ip("addr add 10.8.0.1/24 dev veth0");
    netns.ip("addr add 10.8.0.2/24 dev net2");
    world.until(&id, "ping -c 1 -w 5 10.8.0.1");
    world.remove(&[&id]);
}

#[test]
fn a_namespace_that_a_cni_plugin_made_serves() {
    let plugins = "/usr/lib/cni";
    let world = World::new();
    let netns = Netns::new();
    let data = world.host.path("ipam");
    let config = json!({
        "cniVersion": "0.4.0",
        "name": "pods",
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": true,
        "ipam": { "type": "host-local", "subnet": "10.22.0.0/16", "dataDir": data,
                  "routes": [{ "dst": "0.0.0.0/0" }] },
    });
    let plugin = |verb: &str, config: &Value| {
        let file = world.host.file("config.json", config.to_string());
        let mut command = Command::new(Path::new(plugins).join("bridge"));
        command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", "pod")
            .env("CNI_NETNS", netns.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", plugins)
            .stdin(Stdio::from(fs::File::open(file).unwrap()));
        succeed(&world.netns.enter(command).output().unwrap())
    };
    let result: Value = serde_json::from_str(&plugin("ADD", &config)).unwrap();
    let address = result["ips"][0]["address"].as_str().unwrap();
    let address = address.split('/').next().unwrap().to_owned();
    let id = world.server(&["--network", &in_namespace(&netns)], "pod");
    assert!(world.netns.page(&format!("{address}:80")).contains("pod"));
    succeed(&world.exec(&id, "ping -c 1 -w 5 10.22.0.1"));
    let mut check = config.clone();
    check["prevResult"] = result;
    plugin("CHECK", &check);
    world.remove(&[&id]);
    plugin("DEL", &config);
}

#[test]
fn containers_on_a_network_reach_each_other_the_host_and_the_world() {
    let world = World::new();
    let outside = Netns::new();
    world.netns.veth("uplink", &outside, "eth0");
    world
        .netns
        .ip("addr add 192.0.2.1/24 dev uplink\nroute add default via 192.0.2.9");
    outside.ip("addr add 192.0.2.9/24 dev eth0");
    let options = [
        "network",
        "create",
        "--ipv6",
        "--subnet",
        "10.50.0.0/24",
        "blue",
    ];
    assert_eq!(succeed(&world.cloison(&options)), "blue\n");
    let options = [
        "--network",
        "blue",
        "-p",
        "8080:80",
        "--ip",
        "10.50.0.9",
        "--hostname",
        "web",
    ];
    let web = world.server(&[&options[..], &["--name", "web"]].concat(), "from-web");
    let place = world.place("web", "blue");
    assert_eq!(place["IPAddress"], "10.50.0.9");
    let ipv6 = place["GlobalIPv6Address"].as_str().unwrap().to_owned();

    let host = &world.netns;
    for address in ["10.50.0.9", &ipv6] {
        assert!(host.pings(address, 56), "{address}");
    }
    assert!(host.page("10.50.0.9:80").contains("from-web"));
    assert!(host.page(&format!("[{ipv6}]:80")).contains("from-web"));
    assert!(host.page("127.0.0.1:8080").contains("from-web"));
    assert!(outside.page("192.0.2.1:8080").contains("from-web"));
    let script = format!(
        "set -e; wget -qO- http://10.50.0.9/; ping6 -c 1 -w 5 {ipv6} >/dev/null; ping -c 1 -w 5 192.0.2.9 >/dev/null
         grep -q '10.50.0.2.*me' /etc/hosts; cat /etc/hostname; grep nameserver /etc/resolv.conf"
    );
    let options = [
        "--network",
        "blue",
        "-h",
        "me",
        "--dns",
        "192.0.2.53",
        "--mac-address",
        "02:00:00:00:50:02",
    ];
    let said = world.shell(&options, &script);
    assert_eq!(said, "from-web\nme\nnameserver 192.0.2.53\n");

    let shown = succeed(&world.cloison(&["ps"]));
    assert!(shown.contains("0.0.0.0:8080->80/tcp"), "{shown}");
    let shown = succeed(&world.cloison(&["network", "inspect", "blue"]));
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown[0]["Containers"][&web]["IPv4Address"], "10.50.0.9/24");
    fail(
        &world.cloison(&["network", "rm", "blue"]),
        1,
        &["in use", &web],
    );
    world.remove(&["web"]);
    succeed(&world.cloison(&["network", "rm", "blue"]));
}

#[test]
fn datagrams_reach_a_published_port_and_come_back() {
    // The lab's machine has no room for a Debian, and busybox knows no datagrams.
    if std::env::var_os("CLOISON_TEST_SMALL").is_some() {
        return;
    }
    let world = World::new();
    let echo = "use IO::Socket::INET; my $s = IO::Socket::INET->new(Proto => 'udp', LocalPort => 54) or die; print qq(ready\n);
        while ($s->recv(my $data, 512)) { $s->send($data) }";
    let image = image("debian");
    let words = [
        "run",
        "-d",
        "-p",
        "5300-5301:53-54/udp",
        &image,
        "perl",
        "-e",
        echo,
    ];
    let id = succeed(&world.command(words).output().unwrap());
    let id = id.trim();
    let listens = "grep -q ':0036 ' /proc/net/udp";
    world.until(id, listens);
    let back = world.netns.inside(|| {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket
            .set_read_timeout(Some(crate::world::PATIENCE))
            .unwrap();
        socket.send_to(b"ping", "127.0.0.1:5301").unwrap();
        let mut back = [0; 16];
        let (length, _) = socket.recv_from(&mut back).unwrap();
        back[..length].to_vec()
    });
    assert_eq!(back, b"ping");
    world.remove(&[id]);
}

#[test]
fn a_network_made_of_sockets_reaches_the_world_and_is_reached() {
    let world = World::new();
    let outside = Netns::new();
    world.netns.veth("uplink", &outside, "eth0");
    world
        .netns
        .ip("addr add 192.0.2.1/24 dev uplink\nroute add default via 192.0.2.9");
    outside.ip("addr add 192.0.2.9/24 dev eth0");
    outside.name_server("192.0.2.9", [192, 0, 2, 9]);
    let options = [
        "--network",
        "user",
        "--dns",
        "192.0.2.9",
        "-p",
        "8080:80",
        "--name",
        "web",
    ];
    world.server(&options, "by-sockets");
    for from in [&world.netns, &outside] {
        assert!(from.page("192.0.2.1:8080").contains("by-sockets"));
    }
    let said = succeed(&world.exec("web", "nslookup some.name"));
    assert!(said.contains("Address: 192.0.2.9"), "{said}");
    let taken = world.run(&["--network", "user", "-p", "8080:80"], &["true"]);
    fail(&taken, 125, &["8080/tcp", "in use"]);
    world.remove(&["web"]);
}

#[test]
fn a_policy_holds_for_what_a_container_begins_and_for_nothing_else() {
    let world = World::new();
    let open = world.server(&[], "open");
    let place = world.place(&open, "bridge");
    let address = place["IPAddress"].as_str().unwrap().to_owned();
    let shut = world.server(&["--egress", "deny", "-p", "8081:80"], "shut");
    let get = format!("wget -qO- http://{address}/");
    let refused = world.exec(&shut, &get);
    assert!(
        text(&refused.stderr).contains("Connection refused"),
        "{refused:?}"
    );
    assert!(
        !world
            .exec(&shut, "ping -c 1 -w 2 10.192.0.1")
            .status
            .success()
    );
    assert!(world.netns.page("127.0.0.1:8081").contains("shut"));
    let some = format!("allow={address}:80");
    let script = format!("{get}; ping -c 1 -w 2 {address} >/dev/null || echo no more");
    assert_eq!(
        world.shell(&["--egress", &some], &script),
        "open\nno more\n"
    );
    world.remove(&[&open, &shut]);
}

#[test]
fn without_a_network_there_is_loopback_and_nothing_else() {
    let world = World::new();
    let script = "ls /sys/class/net; ping -c 1 127.0.0.1 >/dev/null && ping6 -c 1 ::1 >/dev/null && cat /etc/hosts";
    let said = world.shell(&["--network", "none", "--add-host", "a:1.2.3.4"], script);
    assert!(said.starts_with("lo\n127.0.0.1\tlocalhost"), "{said}");
    assert!(said.ends_with("1.2.3.4\ta\n"), "{said}");
}

#[test]
fn what_cannot_be_had_is_refused_before_a_vm_boots() {
    let world = World::new();
    let refused = |options: &[&str], words: &[&str]| {
        fail(&world.run(options, &["true"]), 125, words);
    };
    let file = world.host.file("file", "");
    let file = format!("ns:{}", file.display());
    refused(&["--network", &file], &["is not a network namespace"]);
    refused(
        &["--network", "ns:/proc/self/ns/mnt"],
        &["is not a network namespace"],
    );
    refused(&["--network", "ns:/missing"], &["/missing", "No such file"]);
    refused(
        &["--network", "nobody"],
        &["no network nobody", "cloison network ls"],
    );
    refused(
        &["--add-host", "a:host-gateway", "--network", "none"],
        &["on no network"],
    );

    // A port that a process of the host's has.
    let taken = world
        .netns
        .inside(|| TcpListener::bind("0.0.0.0:9090").unwrap());
    let pid = std::process::id().to_string();
    refused(&["-p", "9089-9091:1-3"], &["9090", "in use", &pid]);
    drop(taken);

    let id = world.detached(&["-p", "9090:90"], "sleep 1000");
    let place = world.place(&id, "bridge");
    let (address, mac) = (
        place["IPAddress"].as_str().unwrap(),
        place["MacAddress"].as_str().unwrap(),
    );
    refused(&["--ip", address], &[address, "in use", &id]);
    refused(&["--ip", "10.1.2.3"], &["10.1.2.3", "10.192.0.0/20"]);
    refused(&["--mac-address", mac], &[mac, &id]);
    refused(&["-p", "9090:1"], &["9090/tcp", "in use", &id]);
    refused(&["-p", "127.0.0.1:9090:1"], &["9090/tcp", "in use"]);
    refused(&["-p", "1:1", "-p", "1:2"], &["published twice"]);
    world.remove(&[&id]);
}

#[test]
fn networks_that_cannot_be_are_refused_and_a_full_one_says_so() {
    let world = World::new();
    world.netns.ip("link add d0 type veth peer name d1\naddr add 10.60.0.1/16 dev d0\nlink set d0 up\nlink set d1 up");
    let create = |words: &[&str]| world.cloison(&[&["network", "create"], words].concat());
    succeed(&create(&["--subnet", "10.70.0.0/30", "tiny"]));
    for (words, reasons) in [
        (
            &["--subnet", "10.60.5.0/24", "a"][..],
            &["10.60.0.0/16", "d0"][..],
        ),
        (&["--subnet", "10.70.0.0/24", "a"], &["the network tiny"]),
        (&["--subnet", "10.1.0.0/31", "a"], &["no room"]),
        (&["--subnet", "10.1.0.1/24", "a"], &["bits set"]),
        (
            &["--subnet", "10.1.0.0/24", "--subnet", "10.2.0.0/24", "a"],
            &["one too many"],
        ),
        (&["--mtu", "1279", "--ipv6", "a"], &["1280"]),
        (&["tiny"], &["exists already"]),
        (&["a/b"], &["not a valid network name"]),
        (&["host"], &["another name"]),
    ] {
        fail(&create(words), 1, reasons);
    }
    let id = world.detached(&["--network", "tiny"], "sleep 1000");
    let full = world.run(&["--network", "tiny"], &["true"]);
    fail(&full, 125, &["every address of the network tiny is taken"]);
    world.remove(&[&id]);
    succeed(&world.run(&["--network", "tiny"], &["true"]));
    assert_eq!(succeed(&world.cloison(&["network", "ls", "-q"])), "tiny\n");
    fail(&world.cloison(&["network", "rm", "nobody"]), 1, &["nobody"]);
    succeed(&world.cloison(&["network", "rm", "tiny"]));
}

#[test]
fn whatever_is_killed_its_network_can_be_removed() {
    let world = World::new();
    for victim in ["cloison run", "cloison-vm"] {
        for cleaner in [&["rm", "-f", "victim"][..], &["prune", "-f"]] {
            let image = busybox();
            let words = [
                "run",
                "--name",
                "victim",
                "-p",
                "7070:70",
                &image,
                "sh",
                "-c",
                "echo up; sleep 1000",
            ];
            let mut child = world.command(words).stdout(Stdio::piped()).spawn().unwrap();
            let mut line = [0; 3];
            std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
            let killed = if victim == "cloison run" {
                child.kill().unwrap();
                1
            } else {
                let processes = world.host.processes();
                let victims = processes
                    .iter()
                    .filter(|(_, line)| line.starts_with(victim));
                victims
                    .map(|(pid, _)| kill(Pid::from_raw(*pid), Signal::SIGKILL).unwrap())
                    .count()
            };
            assert_eq!(killed, 1);
            child.wait().unwrap();
            succeed(&world.cloison(cleaner));
            world.assert_clean();
        }
    }
    // Its port is free again.
    succeed(&world.run(&["-p", "7070:70"], &["true"]));
}

#[test]
fn several_at_once_come_and_go() {
    let world = World::new();
    let children: Vec<_> = (0..4)
        .map(|_| {
            let image = busybox();
            let words = [
                "run",
                "--rm",
                &image,
                "ping",
                "-c",
                "1",
                "-w",
                "20",
                "10.192.0.1",
            ];
            let mut command = world.command(words);
            command
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    for child in children {
        succeed(&child.wait_with_output().unwrap());
    }
}
