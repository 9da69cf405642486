//! Taking a sandbox off its network, whatever state it is in: found by its record, which goes last.

use crate::attach::Between;
use crate::netlink::Netlink;
use crate::networks::{find, on};
use crate::{Namespace, Networks, Result, nft};

impl Networks {
    /// Removes everything there is of a sandbox on the network: its namespace, interfaces, rules, ports and addresses. It is no
    /// error when there is nothing. Whatever of the sandbox still runs is cut off.
    ///
    /// # Errors
    /// When the host refuses to remove something. The sandbox can then be detached again.
    pub async fn detach(&self, id: &str) -> Result<()> {
        self.detach_until(id, &mut || Ok(())).await
    }

    pub(crate) async fn detach_until(&self, id: &str, between: Between<'_>) -> Result<()> {
        let state = self.store.read()?;
        let Some(record) = state.sandboxes.get(id) else {
            return Ok(());
        };
        let network = find(&state, &record.network)?;
        // While the cable is there, so are the rules about it.
        let netlink = Netlink::connect(&self.host)?;
        netlink.remove_link(&record.port()).await?;
        between()?;
        if let Some(path) = &record.namespace {
            Namespace::remove(path)?;
        }
        between()?;
        let mut locked = self.store.lock().await?;
        // Of two who remove one sandbox the slower must not remove its successor's record, or what is its successor's.
        if locked.state.sandboxes.get(id) != Some(record) {
            return Ok(());
        }
        locked.state.sandboxes.remove(id);
        let alone = on(&locked.state, &network.name).next().is_none();
        if alone {
            let left = Some(record);
            self.take_down(network, left, &locked.state).await?;
        } else {
            let removal = nft::Removal {
                network,
                sandbox: Some(record),
                whole: false,
            };
            nft::remove(&self.host, removal).await?;
        }
        between()?;
        locked.write()
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
        nft::add(&self.host, rules).await
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
