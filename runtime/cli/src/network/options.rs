//! The options about a container's network, in docker's notation, and which of them go together.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Result, bail};
use clap::Args;
use cloison_net::files::{Dns, ExtraHost};
use cloison_net::{Egress, Mac, Networks, Publication};

/// `cloison run`'s options about the network.
#[derive(Debug, Args)]
pub struct NetworkOptions {
    /// bridge, none, user, the name of a network, or ns:PATH for the interfaces of a network namespace [default: bridge, or user where
    /// the kernel lacks nf_tables]
    #[arg(long, alias = "net", value_name = "NETWORK", env = "CLOISON_NETWORK")]
    pub network: Option<NetworkArg>,
    /// Have a port of the host, or a range of them, lead to the container
    #[arg(short, long, value_name = "[IP:]HOST:CONTAINER[/udp]")]
    pub publish: Vec<Publication>,
    /// Address of the container on its network
    #[arg(long, value_name = "IPV4")]
    pub ip: Option<Ipv4Addr>,
    /// Hardware address of the container's interface
    #[arg(long, value_name = "MAC")]
    pub mac_address: Option<Mac>,
    /// What the container may connect to: deny, or allow=CIDR[:PORT],…,dns=NAME,…
    #[arg(long, value_name = "POLICY")]
    pub egress: Option<Egress>,
    /// Name server of the container [default: the host's]
    #[arg(long, value_name = "IP")]
    pub dns: Vec<IpAddr>,
    /// Domain in which the container looks names up; "." for none
    #[arg(long, value_name = "DOMAIN")]
    pub dns_search: Vec<String>,
    /// Option in the container's resolv.conf
    #[arg(long, value_name = "OPTION", alias = "dns-opt")]
    pub dns_option: Vec<String>,
    /// Add a line to the container's /etc/hosts
    #[arg(long, value_name = "NAME:IP")]
    pub add_host: Vec<ExtraHost>,
}

/// `--network`'s value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkArg {
    /// Loopback only.
    None,
    /// The host's own.
    Host,
    /// The interfaces of a network namespace that somebody prepared.
    Namespace(PathBuf),
    /// One that a program makes of sockets.
    User,
    /// One of cloison's own, by its name.
    Named(String),
}

impl FromStr for NetworkArg {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match (text, text.strip_prefix("ns:")) {
            (_, Some(path)) => Self::Namespace(path.into()),
            ("none", _) => Self::None,
            ("host", _) => Self::Host,
            ("user", _) => Self::User,
            // Docker's other word for its default.
            ("default", _) => Self::Named(Networks::DEFAULT.to_owned()),
            _ => Self::Named(text.to_owned()),
        })
    }
}

impl NetworkOptions {
    /// What is to be in the container's `resolv.conf`.
    pub fn dns(&self) -> Dns {
        Dns {
            servers: self.dns.clone(),
            search: self.dns_search.clone(),
            options: self.dns_option.clone(),
        }
    }

    /// Refuses what cannot be, or not together.
    ///
    /// # Errors
    /// The first thing found wrong.
    pub fn check(&self) -> Result<()> {
        let publishes = matches!(self.network, Some(NetworkArg::User));
        match &self.network {
            None | Some(NetworkArg::Named(_)) => return Ok(()),
            Some(NetworkArg::Host) => bail!(
                "a container in a VM has a kernel of its own and cannot be on the host's network: publish the ports it serves with -p"
            ),
            Some(NetworkArg::Namespace(path)) if path.as_os_str().is_empty() => {
                bail!("give the path of the network namespace: --network ns:PATH")
            }
            Some(NetworkArg::None | NetworkArg::User | NetworkArg::Namespace(_)) => {}
        }
        let given = [
            ("-p", !self.publish.is_empty() && !publishes),
            ("--ip", self.ip.is_some()),
            ("--mac-address", self.mac_address.is_some()),
            ("--egress", self.egress.is_some()),
        ];
        match given.iter().find(|(_, given)| *given) {
            None => Ok(()),
            Some((option, _)) => bail!(
                "{option} is for networks of cloison's own, and --network names none: take it away, or the --network"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: NetworkOptions,
    }

    fn parse(line: &str) -> Result<NetworkOptions, String> {
        let words = std::iter::once("run").chain(line.split_whitespace());
        let parsed = Line::try_parse_from(words).map_err(|error| error.to_string())?;
        let checked = parsed.options.check();
        checked.map_err(|error| error.to_string())?;
        Ok(parsed.options)
    }

    #[test]
    fn options_are_read_as_docker_reads_them() {
        let options = parse("-p 8080:80 -p 127.0.0.1:53:53/udp --dns 9.9.9.9 --add-host a:1.2.3.4");
        let options = options.unwrap();
        assert_eq!(options.network, None);
        assert_eq!(options.publish.len(), 2);
        assert_eq!(
            options.dns().servers,
            ["9.9.9.9".parse::<IpAddr>().unwrap()]
        );
        let options = parse("--network ns:/run/netns/a").unwrap();
        assert_eq!(
            options.network,
            Some(NetworkArg::Namespace("/run/netns/a".into()))
        );
        let options = parse("--net none").unwrap();
        assert_eq!(options.network, Some(NetworkArg::None));
        parse("--network user -p 8080:80").unwrap();
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_the_reason() {
        for (line, why) in [
            ("--network host", "publish the ports"),
            ("--network ns:", "give the path"),
            ("--network none -p 80:80", "-p is for networks"),
            ("--network ns:/x --ip 10.0.0.1", "--ip is for networks"),
            ("--network none --egress deny", "--egress is for networks"),
            (
                "--network none --mac-address 02:00:00:00:00:01",
                "--mac-address is",
            ),
            ("--network user --ip 10.0.0.1", "--ip is for networks"),
            ("-p 80", "give a host port"),
            ("--ip fe80::1", "invalid"),
            ("--mac-address 01:00:00:00:00:01", "group address"),
            ("--egress allow=everything", "an address or subnet"),
            ("--dns localhost", "invalid"),
            ("--add-host a", "NAME:ADDRESS"),
        ] {
            let error = parse(line).err().unwrap_or_default();
            assert!(error.contains(why), "{line}: {error}");
        }
    }
}
