//! A container's network on the host: what it is promised before its VM is launched, how it gets that while its guest boots, and how all
//! of it goes again.

mod etc;
mod options;
mod record;
mod user;

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use cloison_net::{Attachment, Lease, Namespace, Networks, Reservation};
use cloison_sandbox::{Home, Id, Network};
use cloison_vmm::Nic;
use nix::unistd::{AccessFlags, access};
use tokio::time::{Instant, interval_at};

pub use etc::Etc;
pub use options::{NetworkArg, NetworkOptions};
pub use record::NetworkRecord;

use crate::verbs::runtime;
use user::{Pasta, User};

/// How many interfaces can come to a prepared namespace after the launch, on an engine that must know.
const LATER: u8 = 1;
/// How often names in egress policies are looked up: the system's resolver does not say how long its answers are good for, and a minute is
/// as short a life as most names' owners give them.
const NAMES_PERIOD: Duration = Duration::from_secs(60);

/// The networks of the host this process is on.
///
/// # Errors
/// When `/proc` is not there.
pub fn networks(home: &Home) -> Result<Networks> {
    Ok(Networks::new(
        Namespace::current()?,
        home.run(),
        home.data(),
    ))
}

/// Where a container's interfaces come from.
pub enum Source {
    /// There are none.
    None,
    /// A namespace that somebody prepared.
    Namespace(Namespace),
    /// One that a program makes.
    User(User),
    /// One of cloison's networks.
    Leased(Networks, Box<Lease>),
}

/// What must be held as long as the container is on its network.
#[derive(Default)]
pub struct Held {
    _pasta: Option<Pasta>,
    _reservation: Option<Reservation>,
    /// The container's egress policy has names in it: where, and under which ID.
    names: Option<(Networks, String)>,
}

impl Held {
    /// Looks the names in the container's egress policy up from time to time, for as long as this is polled. Where that fails, what was
    /// allowed before still is, and the log says so.
    pub async fn look_up_names(&self) -> Infallible {
        let Some((networks, id)) = &self.names else {
            return std::future::pending().await;
        };
        let first = Instant::now() + NAMES_PERIOD;
        let mut period = interval_at(first, NAMES_PERIOD);
        loop {
            period.tick().await;
            if let Err(error) = networks.refresh(id).await {
                tracing::warn!("cannot look up the names in the egress policy again: {error}");
            }
        }
    }
}

/// What is used when nothing is asked for: `bridge`, unless this host lacks what that is made with.
fn default() -> NetworkArg {
    if !Networks::available() && user::find().is_some() {
        eprintln!(
            "cloison: using --network user: this host's kernel lacks what bridge is made of (nf_tables)"
        );
        return NetworkArg::User;
    }
    NetworkArg::Named(Networks::DEFAULT.to_owned())
}

/// Where an executable is in PATH.
fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| access(file, AccessFlags::X_OK).is_ok())
}

impl Source {
    /// Finds out whether the container can have the network it asks for, and leases what it needs there. A lease ends by
    /// [`detach`].
    ///
    /// # Errors
    /// When it cannot, before anything is made for it.
    pub fn prepare(home: &Home, id: &Id, sandbox: &Path, options: &NetworkOptions) -> Result<Self> {
        let wanted = options.network.clone().unwrap_or_else(default);
        match &wanted {
            NetworkArg::User => Ok(Self::User(User::prepare(sandbox, &options.publish)?)),
            NetworkArg::None | NetworkArg::Host => Ok(Self::None),
            NetworkArg::Namespace(path) => Ok(Self::Namespace(Namespace::open(path)?)),
            NetworkArg::Named(name) => {
                let networks = networks(home)?;
                let wanted = Attachment {
                    id: id.to_string(),
                    home: sandbox.to_owned(),
                    network: name.clone(),
                    address: options.ip,
                    mac: options.mac_address,
                    publish: options.publish.clone(),
                    egress: options.egress.clone(),
                };
                let lease = runtime()?.block_on(networks.lease(&wanted))?;
                Ok(Self::Leased(networks, Box::new(lease)))
            }
        }
    }

    /// What is written down of it.
    pub fn record(&self, options: &NetworkOptions) -> NetworkRecord {
        match self {
            Self::None => NetworkRecord::none(),
            Self::Namespace(_) => match &options.network {
                Some(NetworkArg::Namespace(path)) => NetworkRecord::namespace(path),
                _ => NetworkRecord::none(),
            },
            Self::User(_) => NetworkRecord::user(options),
            Self::Leased(_, lease) => NetworkRecord::leased(lease, options),
        }
    }

    /// Network devices that the VM is to have for interfaces that are not there at its launch.
    pub fn later(&self) -> u8 {
        match self {
            Self::None => 0,
            Self::Namespace(_) => LATER,
            Self::User(_) | Self::Leased(..) => 1,
        }
    }

    /// Whether an interface comes while the guest starts, whatever happens.
    pub fn is_sure(&self) -> bool {
        match self {
            Self::None | Self::Namespace(_) => false,
            Self::User(_) | Self::Leased(..) => true,
        }
    }

    /// The interfaces that are there before the launch.
    ///
    /// # Errors
    /// When the namespace cannot be entered, or holds what a guest cannot have.
    pub async fn early(&self) -> Result<(Option<Network>, Vec<Nic>)> {
        let Self::Namespace(namespace) = self else {
            return Ok((None, Vec::new()));
        };
        let mut network = Network::new(namespace)?;
        let nics = network.early().await?;
        Ok((Some(network), nics))
    }

    /// Makes what was promised.
    ///
    /// # Errors
    /// When the host refuses.
    pub async fn connect(self) -> Result<Option<(Network, Held)>> {
        match self {
            Self::None | Self::Namespace(_) => Ok(None),
            Self::User(user) => {
                let (network, pasta) = user.connect().await?;
                let held = Held {
                    _pasta: Some(pasta),
                    ..Held::default()
                };
                Ok(Some((network, held)))
            }
            Self::Leased(networks, lease) => {
                let has_names = !lease.names.is_empty();
                let id = lease.id().to_owned();
                let attached = networks.connect(*lease).await?;
                let network = Network::of(attached.adopted);
                let held = Held {
                    _reservation: Some(attached.reservation),
                    names: has_names.then_some((networks, id)),
                    ..Held::default()
                };
                Ok(Some((network, held)))
            }
        }
    }
}

/// Takes a container off its network, whatever state that is in. It is no error when it is on none.
///
/// # Errors
/// When something of it cannot be removed; it can be tried again.
pub fn detach(home: &Home, id: &Id) -> Result<()> {
    let detached = networks(home)?.detach_blocking(id.as_str());
    detached.with_context(|| format!("cannot take container {} off its network", id.short()))
}

/// Leaves the namespace that somebody prepared for a container, if somebody did, as it was. To be called when the container's VM is gone and
/// nobody else can have the namespace yet. It is no error when it is gone.
///
/// # Errors
/// When the namespace cannot be entered or changed.
pub fn release(sandbox: &Path, record: &NetworkRecord) -> Result<()> {
    if record.is_user() {
        return user::remove(sandbox);
    }
    let Some(path) = record.prepared() else {
        return Ok(());
    };
    let Ok(namespace) = Namespace::open(path) else {
        return Ok(());
    };
    on_a_runtime(|| async {
        let released = cloison_net::release(&namespace).await;
        released.with_context(|| format!("cannot give {} back as it was", path.display()))
    })
}

/// Takes every container off its network that is gone, and the bridges away of networks that no container is on.
///
/// # Errors
/// As for [`detach`].
pub fn prune(home: &Home) -> Result<()> {
    on_a_runtime(|| async {
        let networks = networks(home)?;
        let pruned = networks.prune().await;
        pruned.context("cannot take containers that are gone off their networks")?;
        let cleared = networks.clear().await;
        cleared.context("cannot remove the bridges of networks that nobody is on")
    })
}

/// Runs what is asynchronous to its end for a caller that is not, or whose own runtime waits for it.
fn on_a_runtime<F: Future<Output = Result<()>>>(work: impl FnOnce() -> F + Send) -> Result<()> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("network".into())
            .spawn_scoped(scope, || runtime()?.block_on(work()))
            .context("cannot start a thread")?;
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
