//! Both sides of the control protocol on bytes that did not come over a socket.

use std::os::fd::OwnedFd;

use super::server::{Host, handle};
use super::{DeviceKind, Reply, State, Status};
use crate::nic::Plugged;
use crate::packet::Packet;
use crate::spec::Engine;
use crate::timeline::Timeline;

/// The reply to a request.
pub fn control_request(bytes: &[u8], fds: Vec<OwnedFd>) -> Vec<u8> {
    let bytes = bytes.to_vec();
    let reply = handle(Packet { bytes, fds }, &mut Nobody);
    serde_json::to_vec(&reply).unwrap_or_default()
}

/// Whether the asking side understands a reply.
pub fn control_reply(bytes: &[u8]) -> bool {
    serde_json::from_slice::<Reply>(bytes).is_ok()
}

/// A VM process with nothing in it.
struct Nobody;

impl Host for Nobody {
    fn status(&self) -> Status {
        Status {
            id: "nobody".into(),
            engine: Engine::Software,
            state: State::Starting,
            pid: 0,
            engine_pids: Vec::new(),
            uptime_ms: 0,
            timeline: Timeline::default(),
            memory_mib: 0,
            min_memory_mib: 0,
            max_memory_mib: 0,
            vcpus: 1,
            max_vcpus: 1,
            nics: Vec::new(),
        }
    }

    fn attach(
        &mut self,
        _read: Option<OwnedFd>,
        _write: Option<OwnedFd>,
        _done: Option<OwnedFd>,
    ) -> Result<u32, String> {
        Ok(1)
    }

    fn detach(&mut self, _port: u32) {}

    fn kernel_log(&self, _limit: usize) -> String {
        String::new()
    }

    fn pause(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn resize_vcpus(&mut self, _vcpus: u8) -> Result<(), String> {
        Ok(())
    }

    fn resize_memory(&mut self, _mib: u32, _done: Option<OwnedFd>) -> Result<(), String> {
        Ok(())
    }

    fn plug(&mut self, _device: DeviceKind, _file: Option<OwnedFd>) -> Result<Plugged, String> {
        Ok(Plugged {
            slot: 1,
            present: None,
        })
    }

    fn unplug(&mut self, _slot: u32) -> Result<(), String> {
        Ok(())
    }

    fn kill(&mut self) {}
}
