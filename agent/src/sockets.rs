//! Sockets of the host in a container. For each the agent listens at a socket of its own, which is mounted where the container wants
//! the host's, and carries the bytes of whoever connects to it to a port of the host and back. Where that port leads is the host's to
//! decide; a guest that dials it without the agent reaches nothing else. Descriptors do not travel.

use std::borrow::Cow;
use std::os::unix::fs::{PermissionsExt, lchown};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{fs, io};

use cloison_agent_api::agent::HostSocket;
use libcontainer::oci_spec::runtime::Spec;
use tokio::io::copy_bidirectional;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::connect::Stream;
use crate::container::Shared;
use crate::dirs;
use crate::error::{Doing, Error, Result};

/// Most sockets of one container.
const MAX_SOCKETS: usize = 64;
/// Most connections through one socket at one time. More wait to be accepted, as with a server that is busy.
const MAX_CONNECTIONS: usize = 128;

/// A container's sockets. They are served until this is dropped.
#[derive(Default)]
pub struct Sockets {
    served: JoinSet<()>,
    paths: Vec<PathBuf>,
}

impl Sockets {
    /// Listens for what the host offers, and gives the spec with its mounts' sources filled in.
    pub fn open<'a>(
        offered: &[HostSocket],
        json: &'a [u8],
        shared: &Arc<Shared>,
    ) -> Result<(Self, Cow<'a, [u8]>)> {
        let mut sockets = Self::default();
        if offered.is_empty() {
            return Ok((sockets, json.into()));
        }
        if offered.len() > MAX_SOCKETS {
            return Err(Error::TooMany("sockets of the host"));
        }
        let mut spec: Spec = serde_json::from_slice(json)
            .map_err(|error| invalid(format!("the spec is no OCI spec: {error}")))?;
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for socket in offered {
            let place = usize::try_from(socket.mount).ok();
            let mount = place.and_then(|place| mounts.get_mut(place));
            let mount = mount.ok_or_else(|| {
                invalid(format!(
                    "the spec has no mount with number {}",
                    socket.mount
                ))
            })?;
            let path = sockets
                .serve(socket, shared)
                .doing(|| format!("making the socket for {}", mount.destination().display()))?;
            mount.set_source(Some(path));
        }
        spec.set_mounts(Some(mounts));
        let json = serde_json::to_vec(&spec).map_err(|error| invalid(error.to_string()))?;
        Ok((sockets, json.into()))
    }

    fn serve(&mut self, socket: &HostSocket, shared: &Arc<Shared>) -> io::Result<PathBuf> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        fs::create_dir_all(dirs::SOCKETS)?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = PathBuf::from(format!("{}/{number}", dirs::SOCKETS));
        let listener = UnixListener::bind(&path)?;
        self.paths.push(path.clone());
        fs::set_permissions(&path, fs::Permissions::from_mode(socket.mode & 0o777))?;
        lchown(&path, Some(socket.uid), Some(socket.gid))?;
        let (shared, port) = (Arc::clone(shared), socket.port);
        self.served.spawn(accept(listener, shared, port));
        Ok(path)
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        for path in &self.paths {
            // Whatever is left is on a tmpfs nobody else looks at.
            let _ = fs::remove_file(path);
        }
    }
}

fn invalid(why: String) -> Error {
    Error::Invalid {
        what: "sockets",
        why,
    }
}

/// Carries connections until it is dropped, and they with it.
async fn accept(listener: UnixListener, shared: Arc<Shared>, port: u32) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut carried = JoinSet::new();
    loop {
        // It is never closed.
        let Ok(place) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        while carried.try_join_next().is_some() {}
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            // The client is gone already.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            // Descriptors are short. The next connection to end gives some back; without one nothing will.
            Err(_) if carried.join_next().await.is_some() => continue,
            Err(_) => return,
        };
        let shared = Arc::clone(&shared);
        carried.spawn(async move {
            // A failure on either side is the end of the connection, which the other side sees.
            let _ = carry(client, &shared, port).await;
            drop(place);
        });
    }
}

async fn carry(mut client: UnixStream, shared: &Shared, port: u32) -> io::Result<()> {
    let mut host = Stream::new(shared.connect.connect(port).await?)?;
    copy_bidirectional(&mut client, &mut host).await?;
    Ok(())
}
