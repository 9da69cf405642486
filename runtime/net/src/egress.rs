//! What a sandbox may connect to: reading a policy, finding the addresses of the names in it, and what it allows.
//!
//! A policy is about connections that the sandbox begins; answers to connections from outside always pass. Names are looked up on
//! the host, when the sandbox is attached and whenever its caller refreshes them. An address that a name once had stays
//! allowed as long as the sandbox lives, for a program that was told it goes on using it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::publish::parse_range;
use crate::{Error, Result};

/// Most addresses kept for a name: one whose addresses change with every question must not fill the filter.
const MAX_ADDRESSES: usize = 256;

/// What a sandbox may connect to: nothing but what a rule allows.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Egress {
    rules: Vec<Rule>,
}

/// First and last port, TCP and UDP; `None` for everything.
type Ports = Option<(u16, u16)>;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    to: Destination,
    ports: Ports,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Destination {
    Net(IpNet),
    Name(String),
}

/// The addresses that each name of a policy has had.
pub type Names = BTreeMap<String, BTreeSet<IpAddr>>;

impl Egress {
    /// The names whose addresses the policy depends on.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.rules.iter().filter_map(|rule| match &rule.to {
            Destination::Name(name) => Some(name.as_str()),
            Destination::Net(_) => None,
        })
    }

    /// Looks the policy's names up and adds what is found to `names`.
    pub(crate) async fn resolve(&self, names: &mut Names) -> Result<()> {
        for name in self.names() {
            let found = tokio::net::lookup_host((name, 0)).await;
            let found = found.map_err(|source| Error::Resolve {
                name: name.to_owned(),
                source,
            })?;
            let known = names.entry(name.to_owned()).or_default();
            for address in found {
                if known.len() < MAX_ADDRESSES {
                    known.insert(address.ip());
                }
            }
        }
        Ok(())
    }

    /// The subnets that the policy allows, with their ports.
    pub(crate) fn allowed(&self, names: &Names) -> Vec<(IpNet, Ports)> {
        let mut allowed = Vec::new();
        for Rule { to, ports } in &self.rules {
            match to {
                Destination::Net(net) => allowed.push((*net, *ports)),
                Destination::Name(name) => {
                    let addresses = names.get(name).into_iter().flatten();
                    allowed.extend(addresses.map(|address| (IpNet::from(*address), *ports)));
                }
            }
        }
        allowed
    }
}

impl FromStr for Egress {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let invalid = |why| Error::Syntax {
            what: "the egress policy",
            given: text.to_owned(),
            why,
        };
        if text == "deny" {
            return Ok(Self::default());
        }
        let list = text
            .strip_prefix("allow=")
            .ok_or_else(|| invalid("give deny, or allow=CIDR[:PORT],…,dns=NAME,…"))?;
        let rules: std::result::Result<_, _> = list.split(',').map(parse_rule).collect();
        Ok(Self {
            rules: rules.map_err(invalid)?,
        })
    }
}

fn parse_rule(text: &str) -> std::result::Result<Rule, &'static str> {
    if let Some(text) = text.strip_prefix("dns=") {
        let (name, ports) = split_ports(text)?;
        let to = Destination::Name(parse_name(name)?);
        return Ok(Rule { to, ports });
    }
    let (net, ports) = if let Some(rest) = text.strip_prefix('[') {
        let (net, after) = rest.split_once(']').ok_or("a bracket is not closed")?;
        let (nothing, ports) = split_ports(after)?;
        if !nothing.is_empty() {
            return Err("after the bracket there can only be a port");
        }
        (net, ports)
    } else if text.matches(':').count() > 1 {
        // IPv6 without brackets has no port.
        (text, None)
    } else {
        split_ports(text)?
    };
    let no_net = "an address or subnet is written as 10.0.0.0/8, 10.1.2.3 or [2001:db8::/32]";
    let net = match net.parse::<IpNet>() {
        Ok(net) => net,
        Err(_) => net.parse::<IpAddr>().map(IpNet::from).map_err(|_| no_net)?,
    };
    if net.trunc() != net {
        return Err("a subnet has no bits set after its prefix");
    }
    let to = Destination::Net(net);
    Ok(Rule { to, ports })
}

fn split_ports(text: &str) -> std::result::Result<(&str, Ports), &'static str> {
    match text.split_once(':') {
        None => Ok((text, None)),
        Some((rest, ports)) => Ok((rest, Some(parse_range(ports)?))),
    }
}

/// A name that can be looked up (RFC 1123 §2.1, with the underscore that some use).
fn parse_name(name: &str) -> std::result::Result<String, &'static str> {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    };
    let bare = name.strip_suffix('.').unwrap_or(name);
    if bare.len() > 253 || !bare.split('.').all(label) {
        return Err("what follows dns= is no host name");
    }
    if bare.parse::<IpAddr>().is_ok() {
        return Err("what follows dns= is an address, not a name");
    }
    Ok(bare.to_ascii_lowercase())
}

impl fmt::Display for Egress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.rules.is_empty() {
            return f.write_str("deny");
        }
        for (position, Rule { to, ports }) in self.rules.iter().enumerate() {
            f.write_str(if position == 0 { "allow=" } else { "," })?;
            match to {
                Destination::Name(name) => write!(f, "dns={name}")?,
                Destination::Net(IpNet::V6(net)) => write!(f, "[{net}]")?,
                Destination::Net(net) => write!(f, "{net}")?,
            }
            match ports {
                None => {}
                Some((first, last)) if first == last => write!(f, ":{first}")?,
                Some((first, last)) => write!(f, ":{first}-{last}")?,
            }
        }
        Ok(())
    }
}

impl TryFrom<String> for Egress {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Egress> for String {
    fn from(egress: Egress) -> Self {
        egress.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_read_and_shown_alike() {
        for (given, shown) in [
            ("deny", "deny"),
            ("allow=10.0.0.0/8", "allow=10.0.0.0/8"),
            ("allow=10.1.2.3:443", "allow=10.1.2.3/32:443"),
            (
                "allow=10.0.0.0/8:80-90,dns=Example.COM.:443",
                "allow=10.0.0.0/8:80-90,dns=example.com:443",
            ),
            ("allow=2001:db8::/32", "allow=[2001:db8::/32]"),
            ("allow=[2001:db8::1]:53", "allow=[2001:db8::1/128]:53"),
            ("allow=0.0.0.0/0,[::/0]", "allow=0.0.0.0/0,[::/0]"),
        ] {
            let policy: Egress = given.parse().unwrap();
            assert_eq!(policy.to_string(), shown);
            assert_eq!(shown.parse::<Egress>().unwrap(), policy);
        }
    }

    #[test]
    fn what_is_no_policy_is_refused_with_the_reason() {
        for (given, why) in [
            ("", "give deny"),
            ("allow", "give deny"),
            ("Deny", "give deny"),
            ("allow=", "an address or subnet"),
            ("allow=10.0.0.0/8,", "an address or subnet"),
            ("allow=10.0.0.0/33", "an address or subnet"),
            ("allow=10.0.0.1/8", "bits set"),
            ("allow=example.com", "an address or subnet"),
            ("allow=10.0.0.0/8:0", "a port is"),
            ("allow=10.0.0.0/8:", "a port is"),
            ("allow=10.0.0.0/8:90-80", "lower port"),
            ("allow=[2001:db8::/32", "not closed"),
            ("allow=[2001:db8::/32]443", "only be a port"),
            ("allow=dns=", "no host name"),
            ("allow=dns=a..b", "no host name"),
            ("allow=dns=10.0.0.1", "an address, not a name"),
            ("allow=dns=x\" accept; add rule", "no host name"),
            ("allow=10.0.0.0/8 accept", "an address or subnet"),
        ] {
            let error = given.parse::<Egress>().unwrap_err().to_string();
            assert!(error.contains(why), "{given}: {error}");
        }
    }

    #[tokio::test]
    async fn a_names_addresses_are_allowed_and_stay_so() {
        let policy: Egress = "allow=dns=localhost:443".parse().unwrap();
        let old: IpAddr = "10.0.0.9".parse().unwrap();
        let mut names = Names::from([("localhost".to_owned(), BTreeSet::from([old]))]);
        policy.resolve(&mut names).await.unwrap();
        let allowed = policy.allowed(&names);
        for address in ["10.0.0.9/32", "127.0.0.1/32"] {
            let expected = (address.parse().unwrap(), Some((443, 443)));
            assert!(allowed.contains(&expected), "{allowed:?}");
        }
    }

    #[tokio::test]
    async fn a_name_without_addresses_is_an_error_that_names_it() {
        let policy: Egress = "allow=dns=no-such-host.invalid".parse().unwrap();
        let error = policy.resolve(&mut Names::new()).await.unwrap_err();
        assert!(error.to_string().contains("no-such-host.invalid"));
    }
}
