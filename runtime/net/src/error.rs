//! What can go wrong on the way to a network.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;

/// An operation on a network failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("cannot {what}")]
    System {
        /// Verb phrase with its object.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel refused a change to an interface, an address or a route.
    #[error("cannot {what}")]
    Netlink {
        /// Verb phrase with its object.
        what: String,
        /// What the kernel said.
        source: rtnetlink::Error,
    },
    /// The path names something else.
    #[error("{} is not a network namespace", .0.display())]
    NotANamespace(PathBuf),
    /// The interface is gone, or was never there.
    #[error("there is no interface {0}")]
    NoInterface(String),
    /// A state file holds something else than state.
    #[error("{} is damaged; remove it when no sandbox runs", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A name that cannot be a network's.
    #[error(
        "\"{0}\" is not a valid network name: give 1 to 63 letters, digits, \"_\", \".\" or \"-\", a letter or a digit first"
    )]
    NetworkName(String),
    /// There is a network of that name.
    #[error("a network with the name {0} exists already")]
    NetworkExists(String),
    /// There is no network of that name.
    #[error("there is no network {0}; `cloison network ls` lists them")]
    NoNetwork(String),
    /// The network has sandboxes.
    #[error("the network {name} is in use by {}", sandboxes.join(", "))]
    NetworkInUse {
        /// The network.
        name: String,
        /// Who is on it.
        sandboxes: Vec<String>,
    },
    /// Two networks would share addresses.
    #[error("the subnet {subnet} overlaps {with}; choose another")]
    Overlap {
        /// What was asked for.
        subnet: IpNet,
        /// What it overlaps, in words.
        with: String,
    },
    /// Every subnet of the default pool is taken.
    #[error("every subnet in {0} is taken; give one with --subnet")]
    NoSubnet(IpNet),
    /// A subnet cannot serve.
    #[error("the subnet {subnet} cannot be used: {why}")]
    Subnet {
        /// What was asked for.
        subnet: IpNet,
        /// The reason.
        why: &'static str,
    },
    /// An MTU cannot serve.
    #[error("an MTU of {mtu} cannot be used: {why}")]
    Mtu {
        /// What was asked for.
        mtu: u32,
        /// The reason.
        why: &'static str,
    },
    /// All addresses are leased.
    #[error(
        "every address of the network {0} is taken; remove sandboxes, or create a larger network"
    )]
    Exhausted(String),
    /// The address is somebody else's.
    #[error("the address {address} is in use by {owner}")]
    AddressInUse {
        /// The address.
        address: IpAddr,
        /// Whose it is.
        owner: String,
    },
    /// The address is none of the network's.
    #[error("the address {address} is not a host's address in {subnet}")]
    AddressOutside {
        /// The address.
        address: IpAddr,
        /// The network's subnet.
        subnet: IpNet,
    },
    /// The hardware address is somebody else's, or nobody's.
    #[error("the hardware address {mac} cannot be used: {why}")]
    Mac {
        /// The address.
        mac: String,
        /// The reason.
        why: String,
    },
    /// An ID that cannot be a sandbox's.
    #[error(
        "{0:?} is not a valid sandbox ID: give 1 to 128 letters, digits, \"_\", \".\" or \"-\", a letter or a digit first"
    )]
    SandboxId(String),
    /// The sandbox has a lease.
    #[error("the sandbox {0} is on a network already")]
    SandboxExists(String),
    /// A host port is somebody else's.
    #[error("the port {port} is in use{}", owner.as_ref().map(|owner| format!(" by {owner}")).unwrap_or_default())]
    PortInUse {
        /// Address, port and protocol.
        port: String,
        /// Whose it is, where it can be known.
        owner: Option<String>,
    },
    /// What a person wrote cannot be understood.
    #[error("{what} \"{given}\" is not valid: {why}")]
    Syntax {
        /// What kind of thing it is.
        what: &'static str,
        /// What was written.
        given: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A name has no addresses.
    #[error("cannot find the addresses of {name}")]
    Resolve {
        /// The name.
        name: String,
        /// What the resolver said.
        source: io::Error,
    },
}

/// What functions of this crate return.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System {
            what: what.into(),
            source,
        }
    }

    pub(crate) fn errno(what: impl Into<String>) -> impl FnOnce(nix::Error) -> Self {
        move |errno| Self::System {
            what: what.into(),
            source: errno.into(),
        }
    }

    pub(crate) fn netlink(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Self {
        move |source| Self::Netlink {
            what: what.into(),
            source,
        }
    }

    /// What the kernel said, when it was the kernel.
    pub(crate) fn os_error(&self) -> Option<i32> {
        match self {
            Self::System { source, .. } => source.raw_os_error(),
            Self::Netlink {
                source: rtnetlink::Error::NetlinkError(message),
                ..
            } => Some(-message.raw_code()),
            _ => None,
        }
    }
}
