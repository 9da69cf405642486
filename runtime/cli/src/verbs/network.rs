//! `cloison network`: networks of cloison's own, under docker's names.

use std::io::{self, Write};

use anyhow::{Context, Result, bail};
use cloison_net::{Inspection, IpNet, Network, NetworkSpec, Networks};
use cloison_sandbox::Home;
use comfy_table::{ContentArrangement, Table, presets};
use serde_json::{Map, Value, json};

use crate::args::{Format, NetworkCreate, NetworkLs, NetworkNames, NetworkVerb};
use crate::network::networks;
use crate::verbs::{print, runtime};

/// Every network is a bridge on this host, in docker's words.
const DRIVER: &str = "bridge";
const SCOPE: &str = "local";

/// Does what the verb says.
pub fn network(home: &Home, verb: &NetworkVerb) -> Result<()> {
    let networks = networks(home)?;
    match verb {
        NetworkVerb::Create(args) => create(&networks, args),
        NetworkVerb::Ls(args) => ls(&networks, args),
        NetworkVerb::Inspect(args) => inspect(&networks, args),
        NetworkVerb::Rm(args) => rm(&networks, args),
    }
}

fn create(networks: &Networks, args: &NetworkCreate) -> Result<()> {
    if let name @ ("none" | "host" | "user" | "default") = args.name.as_str() {
        bail!("--network {name} means something else: choose another name");
    }
    let mut spec = NetworkSpec {
        name: args.name.clone(),
        ipv6: args.ipv6,
        mtu: args.mtu,
        ..NetworkSpec::default()
    };
    for subnet in &args.subnet {
        let twice = match subnet {
            IpNet::V4(subnet) => spec.subnet.replace(*subnet).is_some(),
            IpNet::V6(subnet) => spec.subnet6.replace(*subnet).is_some(),
        };
        if twice {
            bail!("a network has one IPv4 subnet and one IPv6 subnet: {subnet} is one too many");
        }
    }
    let network = runtime()?.block_on(networks.create(&spec))?;
    print(network.name);
    Ok(())
}

fn ls(networks: &Networks, args: &NetworkLs) -> Result<()> {
    let all = networks.list()?;
    let text = match (args.quiet, args.format) {
        (true, _) => all.iter().map(|n| format!("{}\n", n.name)).collect(),
        (false, Format::Json) => all.iter().map(|n| format!("{}\n", as_json(n))).collect(),
        (false, Format::Table) => format!("{}\n", as_table(&all)),
    };
    io::stdout()
        .write_all(text.as_bytes())
        .context("cannot write the list")
}

fn as_json(network: &Network) -> Value {
    json!({
        "Name": network.name,
        "Driver": DRIVER,
        "Scope": SCOPE,
        "IPv6": network.subnet6.is_some(),
    })
}

fn as_table(networks: &[Network]) -> Table {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(["NAME", "DRIVER", "SCOPE", "SUBNETS"]);
    for network in networks {
        let subnets = subnets(network).map(|(subnet, _)| subnet);
        table.add_row([
            network.name.clone(),
            DRIVER.to_owned(),
            SCOPE.to_owned(),
            subnets.collect::<Vec<_>>().join(", "),
        ]);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

/// The network's subnets, and the host's address in each.
fn subnets(network: &Network) -> impl Iterator<Item = (String, String)> {
    let ipv4 = (network.subnet.to_string(), network.gateway().to_string());
    let ipv6 = network.subnet6.zip(network.gateway6());
    let ipv6 = ipv6.map(|(subnet, gateway)| (subnet.to_string(), gateway.to_string()));
    std::iter::once(ipv4).chain(ipv6)
}

fn inspect(networks: &Networks, args: &NetworkNames) -> Result<()> {
    let mut objects = Vec::new();
    let result = each(args, |name| {
        objects.push(object(&networks.inspect(name)?));
        Ok(())
    });
    let text = serde_json::to_string_pretty(&objects)?;
    writeln!(io::stdout(), "{text}").context("cannot write the description")?;
    result
}

fn object(inspection: &Inspection) -> Value {
    let network = &inspection.network;
    let config = subnets(network)
        .map(|(subnet, gateway)| json!({ "Subnet": subnet, "Gateway": gateway }))
        .collect::<Vec<_>>();
    let mut containers = Map::new();
    for (id, addresses) in &inspection.sandboxes {
        let ipv6 = addresses.ipv6.zip(network.subnet6);
        let ipv6 = ipv6.map(|(address, subnet)| format!("{address}/{}", subnet.prefix_len()));
        let container = json!({
            "MacAddress": addresses.mac,
            "IPv4Address": format!("{}/{}", addresses.ipv4, network.subnet.prefix_len()),
            "IPv6Address": ipv6.unwrap_or_default(),
        });
        containers.insert(id.clone(), container);
    }
    json!({
        "Name": network.name,
        "Driver": DRIVER,
        "Scope": SCOPE,
        "EnableIPv6": network.subnet6.is_some(),
        "IPAM": { "Driver": "default", "Config": config },
        "Internal": false,
        "Containers": containers,
        "Options": {
            "com.docker.network.bridge.name": network.bridge(),
            "com.docker.network.driver.mtu": network.mtu.to_string(),
        },
    })
}

fn rm(networks: &Networks, args: &NetworkNames) -> Result<()> {
    let runtime = runtime()?;
    each(args, |name| {
        runtime.block_on(networks.remove_network(name))?;
        print(name);
        Ok(())
    })
}

/// One that fails is told of and does not keep the others from their turn.
fn each(args: &NetworkNames, mut action: impl FnMut(&str) -> Result<()>) -> Result<()> {
    let mut failed: Vec<_> = args
        .networks
        .iter()
        .filter_map(|name| action(name).err())
        .collect();
    let Some(last) = failed.pop() else {
        return Ok(());
    };
    for error in failed {
        eprintln!("cloison: {error:#}");
    }
    Err(last)
}
