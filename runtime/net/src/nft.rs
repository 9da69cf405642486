//! cloison's packet filter: the fixed rules, and the scripts that put a network or a sandbox into them and take it out.
//!
//! Rules are written in nft's own language and given to `nft`, a script at a time, which the kernel takes as a whole or not at all.
//! What is put into a script is an address, a number, or a name made here; never what somebody wrote. Taking out first
//! puts in: adding what is there is no error, so that afterwards removing it is none either, whatever was there before.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::IpAddr;
use std::process::{Command, Stdio};

use crate::network::Network;
use crate::sandbox::Record;
use crate::{Error, Namespace, Result};

/// The part of the rules that is the same on every host.
pub(crate) const RULES: &str = include_str!("rules.nft");
/// Takes all of it away, if it is there.
pub(crate) const NOTHING: &str = "\
table inet cloison { }
delete table inet cloison
table bridge cloison { }
delete table bridge cloison
";
/// Most characters of a sandbox's ID in the kernel's log, whose prefixes have at most 127.
const LOGGED: usize = 64;

/// Runs a script that counts on the fixed rules. They are loaded only when it turns out that they are missing: that takes the kernel
/// longer than all the rest.
pub(crate) async fn change(host: &Namespace, script: String) -> Result<()> {
    match run(host, script.clone()).await {
        Err(Error::Rules(_)) => run(host, RULES.to_owned() + &script).await,
        done => done,
    }
}

/// Runs a script in the namespace `host`.
pub(crate) async fn run(host: &Namespace, script: String) -> Result<()> {
    nft(host, &["-f", "-"], script).await.map(drop)
}

async fn nft(host: &Namespace, args: &'static [&'static str], input: String) -> Result<String> {
    host.run_long(move || {
        let missing = "run nft (install the package nftables)";
        let mut child = Command::new("nft")
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(Error::system(missing))?;
        if let Some(mut stdin) = child.stdin.take() {
            // nft reads to the end before it writes; when it does not, its complaint says more than this one.
            let _ = stdin.write_all(input.as_bytes());
        }
        let output = child.wait_with_output().map_err(Error::system(missing))?;
        if !output.status.success() {
            let complaint = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(Error::Rules(complaint));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    })
    .await
}

/// How many packets beginning a connection have been refused to the sandbox with this index.
pub(crate) async fn refused(host: &Namespace, index: u32) -> Result<u64> {
    let listed = nft(
        host,
        &["-j", "list", "counters", "table", "inet", "cloison"],
        String::new(),
    );
    let unreadable = |_| Error::Rules("its list of counters cannot be read".to_owned());
    let listed: serde_json::Value = serde_json::from_str(&listed.await?).map_err(unreadable)?;
    let name = counter(index);
    let objects = listed["nftables"].as_array().into_iter().flatten();
    let counter = objects
        .filter_map(|object| object.get("counter"))
        .find(|counter| counter["name"] == name);
    Ok(counter
        .and_then(|counter| counter["packets"].as_u64())
        .unwrap_or(0))
}

/// The chains of others that drop what they do not know when it is forwarded, as their family, table and name.
pub(crate) async fn obstacles(host: &Namespace) -> Result<Vec<String>> {
    let listed = nft(host, &["-j", "list", "chains"], String::new()).await?;
    let unreadable = |_| Error::Rules("its list of chains cannot be read".to_owned());
    let listed: serde_json::Value = serde_json::from_str(&listed).map_err(unreadable)?;
    let objects = listed["nftables"].as_array().into_iter().flatten();
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let chains = objects
        .filter_map(|object| object.get("chain"))
        .filter(|chain| chain["hook"] == "forward" && chain["policy"] == "drop");
    Ok(chains
        .map(|chain| {
            ["family", "table", "name"]
                .map(|key| text(&chain[key]))
                .join(" ")
        })
        .collect())
}

fn counter(index: u32) -> String {
    format!("refused-{index}")
}

fn chain(index: u32) -> String {
    format!("egress-{index}")
}

/// Puts a network in.
pub(crate) fn add_network(network: &Network) -> String {
    let mut script = String::new();
    for (table, set, element) in network_elements(network) {
        line(&mut script, "add", table, set, &element);
    }
    script
}

/// Takes a network out.
pub(crate) fn remove_network(network: &Network) -> String {
    remove(network_elements(network))
}

/// Puts a sandbox in.
pub(crate) fn add_sandbox(id: &str, record: &Record, network: &Network) -> String {
    let mut script = egress(id, record);
    for (table, set, element) in sandbox_elements(record, network) {
        line(&mut script, "add", table, set, &element);
    }
    script
}

/// Takes a sandbox out.
pub(crate) fn remove_sandbox(record: &Record, network: &Network) -> String {
    let elements = remove(sandbox_elements(record, network));
    if record.egress.is_none() {
        return elements;
    }
    let (chain, counter) = (chain(record.index), counter(record.index));
    format!(
        "add counter inet cloison {counter}\nadd chain inet cloison {chain}\n{elements}\
         flush chain inet cloison {chain}\ndelete chain inet cloison {chain}\ndelete counter inet cloison {counter}\n"
    )
}

/// The chain of a sandbox's egress policy as its record has it; nothing when there is none.
pub(crate) fn egress(id: &str, record: &Record) -> String {
    let Some(policy) = &record.egress else {
        return String::new();
    };
    let (chain, counter) = (chain(record.index), counter(record.index));
    let id: String = id.chars().take(LOGGED).collect();
    let mut script = format!(
        "add counter inet cloison {counter}\nadd chain inet cloison {chain}\nflush chain inet cloison {chain}\n"
    );
    let rules = policy.rules(&record.names).into_iter().chain([
        format!("limit rate 10/second burst 20 packets log prefix \"cloison {id} refused: \""),
        // The kernel sends a host a message of ICMP a second, and some of those are redirects; resets it does not count.
        format!("meta l4proto tcp counter name {counter} reject with tcp reset"),
        format!("counter name {counter} reject with icmpx admin-prohibited"),
    ]);
    for rule in rules {
        // Writing to a string cannot fail.
        let _ = writeln!(script, "add rule inet cloison {chain} {rule}");
    }
    script
}

/// The family of a table, a set of it, and an element.
type Element = (&'static str, &'static str, String);

fn line(script: &mut String, verb: &str, family: &str, set: &str, element: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(
        script,
        "{verb} element {family} cloison {set} {{ {element} }}"
    );
}

fn remove(elements: Vec<Element>) -> String {
    let mut script = String::new();
    for (family, set, element) in elements {
        line(&mut script, "add", family, set, &element);
        line(&mut script, "delete", family, set, &element);
    }
    script
}

fn network_elements(network: &Network) -> Vec<Element> {
    let bridge = network.bridge();
    let mut elements = vec![
        ("inet", "bridges", format!("\"{bridge}\"")),
        ("inet", "pairs", format!("\"{bridge}\" . \"{bridge}\"")),
        ("inet", "subnets4", network.subnet.to_string()),
    ];
    if let Some(subnet) = network.subnet6 {
        elements.push(("inet", "subnets6", subnet.to_string()));
    }
    elements
}

fn sandbox_elements(record: &Record, network: &Network) -> Vec<Element> {
    let (port, mac) = (record.port(), record.mac);
    let link_local = mac.link_local();
    let mut elements = vec![
        ("bridge", "ports", format!("\"{port}\"")),
        (
            "bridge",
            "hosts4",
            format!("\"{port}\" . {mac} . {}", record.address),
        ),
        (
            "bridge",
            "hosts6",
            format!("\"{port}\" . {mac} . {link_local}"),
        ),
    ];
    if let Some(address) = record.address6 {
        let host = format!("\"{port}\" . {mac} . {address}");
        elements.push(("bridge", "hosts6", host));
    }
    if record.egress.is_some() {
        let jump = format!("jump {}", chain(record.index));
        elements.push(("inet", "egress4", format!("{} : {jump}", record.address)));
        for address in record.address6.into_iter().chain([link_local]) {
            elements.push(("inet", "egress6", format!("{address} : {jump}")));
        }
    }
    let ipv6 = network.subnet6.is_some();
    for mapping in record.publish.iter().flat_map(|p| p.mappings()) {
        for socket in mapping.sockets(ipv6) {
            let key = format!("{} . {}", mapping.protocol, mapping.host);
            let to = match (socket.ip(), record.address6) {
                (IpAddr::V4(_), _) => record.address.to_string(),
                (IpAddr::V6(_), Some(address)) => address.to_string(),
                (IpAddr::V6(_), None) => continue,
            };
            let to = format!("{to} . {}", mapping.container);
            elements.push(match (socket.ip(), socket.ip().is_unspecified()) {
                (IpAddr::V4(_), true) => ("inet", "publish4", format!("{key} : {to}")),
                (IpAddr::V6(_), true) => ("inet", "publish6", format!("{key} : {to}")),
                (at @ IpAddr::V4(_), false) => {
                    ("inet", "publish4_at", format!("{at} . {key} : {to}"))
                }
                (at @ IpAddr::V6(_), false) => {
                    ("inet", "publish6_at", format!("{at} . {key} : {to}"))
                }
            });
        }
    }
    elements
}
