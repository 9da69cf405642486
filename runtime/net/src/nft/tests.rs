//! Against the kernel, in namespaces of the tests' own, and with `nft` to say what is there.

use std::io::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::{Command, Stdio};

use super::message::{Batch, Element, HEADER, message};
use super::*;
use crate::testing::{command, namespace};
use crate::{Egress, Mac};

/// The fixed part in nft's language.
const RULES: &str = include_str!("rules.nft");

/// Has `nft` run a script.
fn nft(host: &Namespace, script: &str) {
    let run = || {
        let mut child = Command::new("nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(script.as_bytes()).unwrap();
        drop(stdin);
        assert!(child.wait().unwrap().success(), "{script}");
    };
    host.run(run).unwrap();
}

/// Everything in the packet filter.
fn listed(host: &Namespace) -> String {
    command(host, "nft list ruleset").unwrap()
}

/// The filters of two hosts are the same, apart from the order of a set's elements, which is the kernel's.
fn same(ours: &Namespace, theirs: &Namespace) {
    let sorted = |host| {
        let listed = listed(host).replace(",\n", ",");
        let in_order = |line: &str| match line.split_once("elements = {") {
            None => line.to_owned(),
            Some((_, elements)) => {
                let mut elements: Vec<_> = elements.split([',', '}']).map(str::trim).collect();
                elements.sort_unstable();
                elements.join(", ")
            }
        };
        let lines = listed.lines().map(in_order);
        // nft does not know the number.
        let lines = lines.filter(|line| !line.contains(&format!("{:#010x}", fixed::REVISION)));
        lines.collect::<Vec<_>>().join("\n")
    };
    let (ours, theirs) = (sorted(ours), sorted(theirs));
    assert!(ours == theirs, "ours:\n{ours}\nnft's:\n{theirs}");
}

fn network() -> Network {
    let text = r#"{ "name": "net", "index": 3, "subnet": "10.192.16.0/20", "subnet6": "fd12:3456:789a:1::/64", "mtu": 1500 }"#;
    serde_json::from_str(text).unwrap()
}

fn record() -> Record {
    Record {
        address6: Some("fd12:3456:789a:1::a".parse().unwrap()),
        publish: ["8080:80", "127.0.0.1:53:54/udp", "[2001:db8::2]:22:23"]
            .map(|text| text.parse().unwrap())
            .to_vec(),
        egress: Some(
            "allow=10.0.0.0/9:80-90,10.1.2.3,0.0.0.0/0:53,[2001:db8::/33]:443,2001:db8::1"
                .parse::<Egress>()
                .unwrap(),
        ),
        ..Record::example(7, "net", Ipv4Addr::new(10, 192, 16, 2))
    }
}

/// What [`network`] and [`record`] are in nft's language.
const BOTH: &str = r#"
add element inet cloison bridges { "cloison3" }
add element inet cloison pairs { "cloison3" . "cloison3" }
add element inet cloison subnets4 { 10.192.16.0/20 }
add element inet cloison subnets6 { fd12:3456:789a:1::/64 }
add counter inet cloison refused-7
add chain inet cloison egress-7
add rule inet cloison egress-7 ip daddr 10.0.0.0/9 meta l4proto @transports th dport 80-90 return
add rule inet cloison egress-7 ip daddr 10.1.2.3 return
add rule inet cloison egress-7 ip daddr 0.0.0.0/0 meta l4proto @transports th dport 53-53 return
add rule inet cloison egress-7 ip6 daddr 2001:db8::/33 meta l4proto @transports th dport 443-443 return
add rule inet cloison egress-7 ip6 daddr 2001:db8::1 return
add rule inet cloison egress-7 limit rate 10/second burst 20 packets log prefix "cloison web refused: "
add rule inet cloison egress-7 meta l4proto tcp counter name refused-7 reject with tcp reset
add rule inet cloison egress-7 counter name refused-7 reject with icmpx admin-prohibited
add element inet cloison egress4 { 10.192.16.2 : jump egress-7 }
add element inet cloison egress6 { fd12:3456:789a:1::a : jump egress-7 }
add element inet cloison egress6 { fe80::c1:aff:fec0:1002 : jump egress-7 }
add element inet cloison publish4 { tcp . 8080 : 10.192.16.2 . 80 }
add element inet cloison publish6 { tcp . 8080 : fd12:3456:789a:1::a . 80 }
add element inet cloison publish4_at { 127.0.0.1 . udp . 53 : 10.192.16.2 . 54 }
add element inet cloison publish6_at { 2001:db8::2 . tcp . 22 : fd12:3456:789a:1::a . 23 }
add element bridge cloison ports { "clv7" }
add element bridge cloison hosts4 { "clv7" . 02:c1:0a:c0:10:02 . 10.192.16.2 }
add element bridge cloison hosts6 { "clv7" . 02:c1:0a:c0:10:02 . fd12:3456:789a:1::a }
add element bridge cloison hosts6 { "clv7" . 02:c1:0a:c0:10:02 . fe80::c1:aff:fec0:1002 }
"#;

fn both() -> Batch {
    let mut batch = Batch::default();
    batch.add_network(&network());
    batch.add_sandbox("web", &record(), &network());
    batch
}

#[tokio::test]
async fn the_fixed_rules_are_what_nft_makes_of_their_text() {
    let (ours, theirs) = (namespace(), namespace());
    nft(&theirs, RULES);
    for _ in 0..2 {
        ours.run(|| restore(&Batch::default())).unwrap().unwrap();
        same(&ours, &theirs);
    }
    // Those that nft has loaded are taken for our own, and the other way round.
    nft(&ours, RULES);
    theirs.run(|| restore(&Batch::default())).unwrap().unwrap();
    same(&ours, &theirs);
}

/// FNV-1a.
fn digest(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

#[test]
fn the_fixed_rules_have_the_number_that_goes_with_them() {
    let is = digest(&fixed::load().encode().0);
    assert_eq!(is, fixed::REVISION, "fixed::REVISION should be {is:#010x}");
}

#[test]
fn fixed_rules_of_another_version_are_replaced() {
    let (ours, theirs) = (namespace(), namespace());
    nft(&theirs, RULES);
    nft(&ours, RULES);
    nft(
        &ours,
        "add rule inet cloison forward drop\nadd element inet cloison revision { 7 }",
    );
    ours.run(|| add(&Batch::default())).unwrap().unwrap();
    same(&ours, &theirs);
    // Those of this version are not looked at again.
    nft(&ours, "add rule inet cloison forward drop");
    let before = listed(&ours);
    ours.run(|| add(&both())).unwrap().unwrap();
    assert!(before.lines().all(|line| listed(&ours).contains(line)));
}

#[tokio::test]
async fn networks_and_sandboxes_are_what_nft_makes_of_them() {
    let (ours, theirs) = (namespace(), namespace());
    nft(&theirs, RULES);
    nft(&theirs, BOTH);
    // Without the fixed rules, with them, and with everything.
    for _ in 0..2 {
        ours.run(|| add(&both())).unwrap().unwrap();
        same(&ours, &theirs);
    }
    let (network, record) = (network(), record());
    let removal = |whole| Removal {
        network: &network,
        sandbox: Some(&record),
        whole,
    };
    let bare = namespace();
    nft(&bare, RULES);
    // All of it, what is left of it, and nothing at all.
    ours.run(|| remove(&removal(false))).unwrap().unwrap();
    ours.run(|| remove(&removal(true))).unwrap().unwrap();
    same(&ours, &bare);
    ours.run(|| remove(&removal(true))).unwrap().unwrap();
    same(&ours, &bare);
    ours.run(remove_all).unwrap().unwrap();
    assert_eq!(listed(&ours), "");
    ours.run(remove_all).unwrap().unwrap();
    ours.run(|| remove(&removal(true))).unwrap().unwrap();
    assert_eq!(listed(&ours), "");
}

#[tokio::test]
async fn a_subnet_may_end_with_the_last_address() {
    let (ours, theirs) = (namespace(), namespace());
    nft(&theirs, RULES);
    nft(
        &theirs,
        "add element inet cloison subnets4 { 255.255.0.0/16 }",
    );
    let mut batch = Batch::default();
    batch.add_elements(&range("subnets4", "255.255.0.0/16".parse().unwrap()));
    ours.run(|| add(&batch)).unwrap().unwrap();
    same(&ours, &theirs);
}

#[tokio::test]
async fn every_port_can_be_published_at_once() {
    let host = namespace();
    let network = network();
    let mut record = record();
    record.publish = vec!["1-65535:1-65535".parse().unwrap()];
    let mut batch = Batch::default();
    batch.add_sandbox("web", &record, &network);
    host.run(|| add(&batch)).unwrap().unwrap();
    for last in [
        "get element inet cloison publish6 { tcp . 65535 }",
        "get element inet cloison publish4 { tcp . 1 }",
    ] {
        command(&host, &format!("nft {last}")).unwrap();
    }
    let removal = || Removal {
        network: &network,
        sandbox: Some(&record),
        whole: false,
    };
    host.run(|| remove(&removal())).unwrap().unwrap();
    // Whether they are there or not.
    host.run(|| remove(&removal())).unwrap().unwrap();
    let left = command(&host, "nft list map inet cloison publish4").unwrap();
    assert!(!left.contains("elements"), "{left}");
}

#[tokio::test]
async fn what_the_kernel_refuses_changes_nothing_and_is_named() {
    let host = namespace();
    host.run(|| add(&both())).unwrap().unwrap();
    let before = listed(&host);
    let mut batch = Batch::default();
    batch.add_elements(&[Element::new(Inet, "bridges", &[&interface("other")])]);
    // It is jumped to.
    batch.remove_chain(Inet, "egress-7");
    let error = host.run(|| add(&batch)).unwrap().unwrap_err();
    assert_eq!(error.os_error(), Some(libc::EBUSY));
    let shown = error.to_string();
    let expected = "cannot change the packet filter: remove the chain egress-7";
    assert_eq!(shown, expected);
    assert_eq!(listed(&host), before);
    // Of a set that is nowhere there is nothing to load.
    let mut batch = Batch::default();
    batch.add_elements(&[Element::new(Inet, "nowhere", &[&[1]])]);
    let error = host.run(|| add(&batch)).unwrap().unwrap_err();
    assert!(
        error.to_string().contains("add to the set nowhere"),
        "{error}"
    );
    assert_eq!(error.os_error(), Some(libc::ENOENT));
}

#[tokio::test]
async fn what_is_refused_is_counted_and_a_sandbox_without_a_counter_has_none() {
    let host = namespace();
    assert_eq!(refused(&host, 7).await.unwrap(), 0);
    let counted = "table inet cloison {\n counter refused-7 { packets 258 bytes 9; }\n}";
    nft(&host, counted);
    assert_eq!(refused(&host, 7).await.unwrap(), 258);
    assert_eq!(refused(&host, 8).await.unwrap(), 0);
}

/// An answer of the kernel's to the message with this number.
fn answer(sequence: u32, code: i32) -> Vec<u8> {
    let mut bytes = message(libc::NLMSG_ERROR, 0, code.to_ne_bytes(), |inside| {
        inside.0.extend([0; HEADER]);
    });
    bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
    bytes
}

/// A batch of two messages and what comes of these answers to it.
fn judged(datagrams: &[Vec<u8>]) -> Result<()> {
    let mut batch = Batch::default();
    batch.add_chain(Inet, "first", None);
    batch.add_chain(Inet, "second", None);
    let (_, last) = batch.encode();
    let mut answers = socket::Answers::default();
    for datagram in datagrams {
        answers.read(datagram)?;
    }
    answers.judge(&batch, last)
}

#[test]
fn a_batch_is_made_when_its_last_change_was_taken_and_none_refused() {
    judged(&[answer(2, 0)]).unwrap();
    let error = judged(&[answer(1, -libc::EPERM), answer(2, 0)]).unwrap_err();
    assert!(error.to_string().contains("add the chain first"), "{error}");
    assert_eq!(error.os_error(), Some(libc::EPERM));
    // Several in one datagram, of which the first counts.
    let two = [answer(2, -libc::EINVAL), answer(1, -libc::EPERM)].concat();
    let error = judged(&[two]).unwrap_err();
    assert!(
        error.to_string().contains("add the chain second"),
        "{error}"
    );
    // About the batch as a whole.
    let error = judged(&[answer(0, -libc::EOPNOTSUPP)]).unwrap_err();
    assert!(error.to_string().contains("have nf_tables?"), "{error}");
}

#[test]
fn answers_that_make_no_sense_are_errors() {
    let whole = answer(2, 0);
    let mut long = whole.clone();
    long[0] = 0xff;
    let mut short = whole.clone();
    short[0] = 3;
    let mut other = whole.clone();
    other[4] = 0x55;
    let mut absurd = answer(99, i32::MIN);
    for datagrams in [
        vec![],
        vec![answer(1, 0)],
        vec![whole[..HEADER - 1].to_vec()],
        vec![whole[..whole.len() - 1].to_vec()],
        vec![long],
        vec![short],
        vec![other],
        vec![vec![0xff; 100]],
        vec![std::mem::take(&mut absurd)],
    ] {
        judged(&datagrams).unwrap_err();
    }
}

#[test]
fn objects_that_make_no_sense_are_errors() {
    let object = |payload: &[u8]| {
        let mut bytes = message(0xa03, 0, [1, 0, 0, 0], |inside| inside.0.extend(payload));
        let length = u32::try_from(bytes.len()).unwrap();
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        bytes
    };
    let read = |bytes: &[u8]| {
        let mut objects = Vec::new();
        socket::objects_in(bytes, &mut objects).map(|()| objects)
    };
    let good = object(&[5, 0, 9, 0, 7, 0, 0, 0]);
    assert_eq!(read(&good).unwrap(), [(1, vec![(9, vec![7])])]);
    let error = read(&answer(0, -libc::EPERM)).unwrap_err();
    assert_eq!(error.os_error(), Some(libc::EPERM));
    for bad in [
        object(&[200, 0, 9, 0]),
        object(&[1, 0, 9, 0]),
        object(&[5, 0]),
        good[..HEADER + 2].to_vec(),
        message(0xa03, 0, [0; 4], |_| {})[..HEADER].to_vec(),
    ] {
        read(&bad).unwrap_err();
    }
}

#[test]
fn names_and_addresses_are_laid_out_as_the_kernel_has_them() {
    let element = Element::new(
        Bridge,
        "hosts4",
        &[
            &interface("clv1"),
            &Mac::new([2, 0, 0, 0, 0, 1]).unwrap().bytes(),
            &Ipv4Addr::new(1, 2, 3, 4).octets(),
        ],
    );
    let mut expected = b"clv1".to_vec();
    expected.resize(16, 0);
    expected.extend([2, 0, 0, 0, 0, 1, 0, 0, 1, 2, 3, 4]);
    assert_eq!(element.key, expected);
    let all = range("subnets6", "::/0".parse().unwrap());
    assert_eq!(all.len(), 1);
    assert_eq!(all[0].key, Ipv6Addr::UNSPECIFIED.octets());
}
