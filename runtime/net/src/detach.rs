//! Taking a sandbox off its network, whatever state it is in: found by its record, which goes last.

use crate::attach::{Between, on_a_thread};
use crate::links::{Change, Links};
use crate::networks::{find, on};
use crate::store::State;
use crate::{Network, Networks, Result, nft};

impl Networks {
    /// Removes everything there is of a sandbox on the network: its interface, rules, ports and addresses. It is no error when there is
    /// nothing. Whatever of the sandbox still runs is cut off.
    ///
    /// # Errors
    /// When the host refuses to remove something. The sandbox can then be detached again.
    pub async fn detach(&self, id: &str) -> Result<()> {
        let (networks, id) = (self.clone(), id.to_owned());
        on_a_thread(move || networks.detach_blocking(&id)).await
    }

    /// [`Networks::detach`], for a thread that may wait.
    ///
    /// # Errors
    /// Its.
    pub fn detach_blocking(&self, id: &str) -> Result<()> {
        self.detach_until(id, &mut || Ok(()))
    }

    pub(crate) fn detach_until(&self, id: &str, between: Between<'_>) -> Result<()> {
        let state = self.store.read()?;
        let Some(record) = state.sandboxes.get(id) else {
            return Ok(());
        };
        let network = find(&state, &record.network)?;
        let mut locked = self.store.lock_blocking()?;
        // Of two who remove one sandbox the slower must not remove its successor's record, or what is its successor's.
        if locked.state.sandboxes.get(id) != Some(record) {
            return Ok(());
        }
        let port = record.port();
        self.host.run(|| {
            let links = Links::open()?;
            // As long as something can come by way of its port, there are rules about it.
            links.make(&[Change::set_down(&port)])?;
            between()?;
            let filter = nft::remove(&nft::Removal {
                network,
                sandbox: Some(record),
                whole: false,
            })?;
            between()?;
            // The kernel waits here until nobody can use what is gone, which closing the filter's socket before would make it do twice.
            links.make(&[Change::remove(&port)])?;
            drop(filter);
            between()
        })??;
        locked.state.sandboxes.remove(id);
        locked.write()
    }

    /// Removes the bridges of networks that no sandbox is on, and what the packet filter has of them. They come back with the next sandbox.
    ///
    /// # Errors
    /// When the host refuses to remove something.
    pub async fn clear(&self) -> Result<()> {
        let networks = self.clone();
        on_a_thread(move || {
            let locked = networks.store.lock_blocking()?;
            let state = &locked.state;
            let unused = state.networks.values();
            let unused: Vec<_> = unused
                .filter(|network| on(state, &network.name).next().is_none())
                .collect();
            networks.remove_bridges(&unused, state)
        })
        .await
    }

    /// Removes the bridges of networks that no sandbox is on, and what the packet filter has of them, which is all of it when no other
    /// network has a bridge. To be called with the state locked, so that no sandbox comes meanwhile.
    pub(crate) fn remove_bridges(&self, unused: &[&Network], state: &State) -> Result<()> {
        self.host.run(|| {
            let links = Links::open()?;
            let there = |network: &&&Network| -> Result<bool> {
                Ok(links.find(&network.bridge())?.is_some())
            };
            let mut bridges = Vec::new();
            for network in unused {
                if there(&network)? {
                    bridges.push(*network);
                }
            }
            if bridges.is_empty() {
                return Ok(());
            }
            let removals: Vec<_> = bridges
                .iter()
                .map(|network| Change::remove(&network.bridge()))
                .collect();
            let mut others = state
                .networks
                .values()
                .filter(|network| !unused.contains(network));
            let others = others.try_fold(false, |any, network| Ok(any || there(&&network)?))?;
            // What is about a bridge that is gone does no harm; but what is about none would not be found again.
            if others {
                for network in bridges {
                    nft::remove(&nft::Removal {
                        network,
                        sandbox: None,
                        whole: true,
                    })?;
                }
            } else {
                nft::remove_all()?;
            }
            links.make(&removals)
        })?
    }

    /// Detaches every sandbox whose directory is gone. Returns their IDs.
    ///
    /// # Errors
    /// Those of [`Networks::detach`]; the others are detached all the same, and the last error is returned.
    pub async fn prune(&self) -> Result<Vec<String>> {
        let mut pruned = Vec::new();
        let mut failure = None;
        for (id, record) in self.store.read()?.sandboxes {
            if record.home.exists() {
                continue;
            }
            match self.detach(&id).await {
                Ok(()) => pruned.push(id),
                Err(error) => failure = Some(error),
            }
        }
        failure.map_or(Ok(pruned), Err)
    }

    /// Looks the names of a sandbox's egress policy up again, and allows what is found too. Its caller decides when: the system's
    /// resolver does not tell how long its answers are good for.
    ///
    /// # Errors
    /// When a name has no addresses; what was allowed before still is.
    pub async fn refresh(&self, id: &str) -> Result<()> {
        let Some(mut record) = self.store.read()?.sandboxes.remove(id) else {
            return Ok(());
        };
        let Some(egress) = &record.egress else {
            return Ok(());
        };
        let before = record.names.clone();
        egress.resolve(&mut record.names).await?;
        if record.names == before {
            return Ok(());
        }
        let mut locked = self.store.lock().await?;
        match locked.state.sandboxes.get_mut(id) {
            Some(there) if there.index == record.index => *there = record.clone(),
            _ => return Ok(()),
        }
        locked.write()?;
        let mut rules = nft::Batch::default();
        rules.set_egress(id, &record);
        let host = self.host.clone();
        on_a_thread(move || host.run(|| nft::add(&rules))?).await
    }

    /// How many packets that began a connection have been refused to a sandbox by its egress policy.
    ///
    /// # Errors
    /// When the packet filter cannot be read.
    pub async fn refused(&self, id: &str) -> Result<u64> {
        match self.store.read()?.sandboxes.get(id) {
            Some(record) if record.egress.is_some() => nft::refused(&self.host, record.index).await,
            _ => Ok(0),
        }
    }
}
