//! The means of saving a guest and of having QEMU load one: QEMU's monitor, a file for the state of its devices, and the guest's console.

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use cloison_devices::MacAddress;
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::json;

use super::command::{Late, late_devices};
use super::qmp::{Qmp, QmpError};

/// How long QEMU may take for an answer; its guest is stopped meanwhile.
const PATIENCE: Duration = Duration::from_secs(30);

/// Our ends.
pub(super) struct Monitor {
    qmp: Qmp,
    /// The state of QEMU's devices.
    pub(super) state: File,
    /// What is written here the guest reads from its console.
    input: PipeWriter,
}

/// QEMU's ends; it inherits the state's file as well.
pub(super) struct OfQemu {
    pub(super) socket: UnixStream,
    pub(super) input: PipeReader,
}

impl Monitor {
    pub(super) fn new() -> io::Result<(Self, OfQemu)> {
        let (ours, socket) = UnixStream::pair()?;
        ours.set_read_timeout(Some(PATIENCE))?;
        let (input, of_guest) = io::pipe()?;
        let monitor = Self {
            qmp: Qmp::new(ours),
            state: memfd_create(c"cloison-state", MFdFlags::MFD_CLOEXEC)?.into(),
            input: of_guest,
        };
        Ok((monitor, OfQemu { socket, input }))
    }

    /// The file of the state as QEMU sees it: under the number it has here.
    fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.state.as_raw_fd())
    }

    /// Stops the guest for good, and returns the state of QEMU's devices.
    pub(super) fn save(&mut self) -> Result<Vec<u8>, QmpError> {
        let path = self.path();
        self.qmp.save(&path)?;
        let mut state = Vec::new();
        self.state.rewind()?;
        self.state.read_to_end(&mut state)?;
        // What cannot be done here could not be done to a guest that is loaded either.
        for Late { bus, .. } in late_devices(&[]) {
            let device = json!({ "driver": "virtio-rng-device", "bus": bus });
            self.qmp.plug(bus, device)?;
        }
        Ok(state)
    }

    /// Has QEMU load the devices' state. The guest's memory must be there.
    pub(super) fn load(&mut self, state: &[u8]) -> Result<(), QmpError> {
        self.state.write_all(state)?;
        let path = self.path();
        self.qmp.load(&path)
    }

    /// Gives a guest that has been loaded our devices, `nics` among them, which must be served, and lets it go on. Returned is what must be kept: the end of
    /// its input would hang the guest's console up. Nobody listens to QEMU any more, so that the guest cannot have it talk without end.
    pub(super) fn let_go(mut self, nics: &[MacAddress]) -> Result<PipeWriter, QmpError> {
        for late in late_devices(nics) {
            if let Some(netdev) = late.netdev {
                self.qmp.add_netdev(netdev)?;
            }
            self.qmp.plug(late.bus, late.device)?;
        }
        self.input.write_all(b"\n")?;
        self.qmp.go_on()?;
        Ok(self.input)
    }
}
