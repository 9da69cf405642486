//! The devices that are ours on every engine, made from what the VM process was given.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use cloison_devices::{
    Attachment, Device, Fs, FsError, FsLimits, Net, NetError, Vsock, VsockConfig, VsockError,
    VsockHandle,
};

use crate::launch::VSOCK_SOCKET;
use crate::nic::{self, Nic};

/// Tag of the shared directory in the guest.
pub(crate) const SHARED_TAG: &str = "cloison";

/// Why a device could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DevicesError {
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error("cannot make a network device")]
    Net(#[from] NetError),
    #[error(transparent)]
    Vsock(#[from] VsockError),
}

/// The devices every engine drives.
pub(crate) struct Devices {
    pub(crate) fs: Box<dyn Device>,
    pub(crate) vsock: Box<dyn Device>,
    /// Those with a tap first.
    pub(crate) nics: Vec<Net>,
}

/// Makes the devices, with `spares` network devices beyond `nics`, and the way to attach further streams to the vsock device.
pub(crate) fn make_devices(
    shared: &Path,
    vsock_listener: OwnedFd,
    attachments: Vec<Attachment>,
    nics: Vec<Nic>,
    spares: u8,
) -> Result<(Devices, VsockHandle), DevicesError> {
    let fs = Fs::new(SHARED_TAG, shared, FsLimits::for_this_process())?;
    let vsock = Vsock::new(VsockConfig {
        listener: Some(vsock_listener.into()),
        listen_prefix: Some(PathBuf::from(VSOCK_SOCKET)),
        attachments,
    })?;
    let handle = vsock.handle();
    let nics = nics.into_iter().map(nic::connected);
    let nics = nics.chain((0..spares).map(nic::spare));
    Ok((
        Devices {
            fs: Box::new(fs),
            vsock: Box::new(vsock),
            nics: nics.collect::<Result<_, _>>()?,
        },
        handle,
    ))
}
