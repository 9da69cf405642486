//! The vhost-user requests ("Vhost-user Protocol", QEMU's docs/interop/vhost-user.rst) in terms of a [`Device`]. Only what
//! QEMU's virtio-mmio devices need is offered: no migration, no in-flight tracking, no memory hot-plug, no shared objects.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cloison_devices::{Broken, Context, Device, QueueMask};
use nix::sys::epoll::{Epoll, EpollCreateFlags};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags,
    VhostUserVringState,
};
use vhost::vhost_user::{Error as VhostError, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_config::VIRTIO_F_ACCESS_PLATFORM;
use virtio_bindings::virtio_ids::{VIRTIO_ID_FS, VIRTIO_ID_NET};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::ring::Ring;
use super::{ServeError, system};

/// The most bytes of configuration space that are handed out at once; no device here has a tenth of that.
const MAX_CONFIG: u32 = 256;

/// The size of queue that QEMU's virtio-mmio transport offers to the guest whatever the device would like
/// (VIRTQUEUE_MAX_SIZE).
const QEMU_QUEUE_SIZE: u16 = 1024;

/// What the transport answers for. QEMU passes VIRTIO_F_ACCESS_PLATFORM on to the guest for the devices whose command line asks
/// for it, and is what makes their driver use the guest's DMA layer; addresses are the same with and without it.
const OF_TRANSPORT: u64 =
    VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | 1 << VIRTIO_F_ACCESS_PLATFORM;

/// Where QEMU has a piece of guest memory, for rings are told by QEMU's own addresses.
struct Mapping {
    qemu: u64,
    guest: u64,
    size: u64,
}

/// A device and what QEMU has told about its guest.
pub(super) struct Backend {
    device: Box<dyn Device>,
    rings: Vec<Ring>,
    memory: GuestMemoryMmap,
    mappings: Vec<Mapping>,
    epoll: Arc<Epoll>,
    /// The device has given up on this guest until the next reset.
    broken: bool,
    /// QEMU and the device have agreed on features.
    agreed: bool,
    running: Arc<AtomicBool>,
    /// The way back to QEMU. Nothing is asked on it, but QEMU wants it before it passes VIRTIO_F_ACCESS_PLATFORM on, and
    /// complains when it is closed.
    requests_to_qemu: Option<vhost::vhost_user::Backend>,
}

impl Backend {
    pub(super) fn new(
        device: Box<dyn Device>,
        running: Arc<AtomicBool>,
    ) -> std::result::Result<Self, ServeError> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(system("make an epoll"))?;
        let epoll = Arc::new(epoll);
        let rings = device
            .queue_sizes()
            .iter()
            .enumerate()
            .map(|(index, &size)| Ring::new(index, size.max(QEMU_QUEUE_SIZE), Arc::clone(&epoll)))
            .collect::<std::result::Result<_, _>>()
            .map_err(ServeError::Queue)?;
        Ok(Self {
            device,
            rings,
            memory: GuestMemoryMmap::new(),
            mappings: Vec::new(),
            epoll,
            broken: false,
            agreed: false,
            running,
            requests_to_qemu: None,
        })
    }

    fn is_net(&self) -> bool {
        self.device.device_type() == VIRTIO_ID_NET
    }

    /// Whether the next request may be one that comes too early ([`super::early`]).
    pub(super) fn expects_early(&self) -> bool {
        self.is_net() && !self.agreed
    }

    pub(super) fn epoll(&self) -> &Arc<Epoll> {
        &self.epoll
    }

    pub(super) fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        self.device.host_fd()
    }

    /// The guest has kicked a queue.
    pub(super) fn kicked(&mut self, index: usize) {
        if self.rings.get_mut(index).is_some_and(Ring::take_kick) {
            self.call_device(|device, context| device.queue_event(context, index));
        }
    }

    /// Does what would have been done on notifications that got lost, in both directions.
    pub(super) fn look_again(&mut self) {
        for index in 0..self.rings.len() {
            if self.rings[index].queue.ready() {
                self.call_device(|device, context| device.queue_event(context, index));
                self.rings[index].notify_again();
            }
        }
    }

    /// The device's host descriptor is readable.
    pub(super) fn host_event(&mut self) {
        self.call_device(|device, context| device.host_event(context));
    }

    fn call_device(
        &mut self,
        call: impl FnOnce(
            &mut dyn Device,
            &mut Context<'_, '_>,
        ) -> std::result::Result<QueueMask, Broken>,
    ) {
        if self.broken {
            return;
        }
        let mut queues: Vec<&mut Queue> =
            self.rings.iter_mut().map(|ring| &mut ring.queue).collect();
        let mut context = Context {
            memory: &self.memory,
            queues: &mut queues,
        };
        match call(&mut *self.device, &mut context) {
            Ok(grown) => {
                for (index, ring) in self.rings.iter_mut().enumerate() {
                    if grown.contains(index) {
                        ring.notify(&self.memory);
                    }
                }
            }
            Err(broken) => {
                // vhost-user has no way to raise DEVICE_NEEDS_RESET: the device falls silent.
                tracing::warn!("{broken}");
                self.broken = true;
            }
        }
    }

    pub(super) fn enable(&mut self, index: usize, enable: bool) -> Result<()> {
        let ring = self.rings.get_mut(index);
        let ring = ring.ok_or(VhostError::InvalidParam)?;
        ring.set_enabled(enable, &self.memory).map_err(internal)
    }

    fn ring(&mut self, index: usize) -> Result<&mut Ring> {
        self.rings.get_mut(index).ok_or(VhostError::InvalidParam)
    }

    fn guest_address(&self, qemu: u64) -> Result<u64> {
        self.mappings
            .iter()
            .find_map(|mapping| {
                let offset = qemu.checked_sub(mapping.qemu)?;
                (offset < mapping.size).then_some(mapping.guest + offset)
            })
            .ok_or(VhostError::InvalidParam)
    }

    /// The guest has reset the device, or lets go of it.
    fn reset(&mut self) -> Result<()> {
        for ring in &mut self.rings {
            ring.reset().map_err(internal)?;
        }
        self.device.reset();
        self.broken = false;
        Ok(())
    }
}

fn internal(error: ServeError) -> VhostError {
    VhostError::ReqHandlerError(io::Error::other(error))
}

fn unsupported<T>(what: &'static str) -> Result<T> {
    Err(VhostError::InvalidOperation(what))
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset()
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.device.features() | OF_TRANSPORT)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let of_device = features & !OF_TRANSPORT;
        if of_device & !self.device.features() != 0 {
            return Err(VhostError::InvalidParam);
        }
        self.agreed = true;
        self.device.set_acked_features(of_device);
        let event_idx = of_device & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        for ring in &mut self.rings {
            ring.queue.set_event_idx(event_idx);
            if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
                // A front-end that does not know how to enable rings gets them enabled.
                ring.set_enabled(true, &self.memory).map_err(internal)?;
            }
        }
        Ok(())
    }

    fn set_mem_table(&mut self, regions: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<()> {
        let mut mapped = Vec::with_capacity(regions.len());
        let mut mappings = Vec::with_capacity(regions.len());
        for (region, file) in regions.iter().zip(files) {
            let start = GuestAddress(region.guest_phys_addr);
            // Touching a page that the file does not have would kill this process.
            let end = region.mmap_offset.checked_add(region.memory_size);
            let length = file.metadata().map_err(VhostError::ReqHandlerError)?.len();
            if end.is_none_or(|end| end > length) {
                return Err(VhostError::InvalidParam);
            }
            let memory = GuestRegionMmap::new(region.mmap_region(file)?, start);
            mapped.push(memory.ok_or(VhostError::InvalidParam)?);
            mappings.push(Mapping {
                qemu: region.user_addr,
                guest: region.guest_phys_addr,
                size: region.memory_size,
            });
        }
        self.memory = GuestMemoryMmap::from_regions(mapped)
            .map_err(|error| VhostError::ReqHandlerError(io::Error::other(error)))?;
        self.mappings = mappings;
        Ok(())
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.ring(index as usize)?.set_size(num);
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let descriptors = self.guest_address(descriptor)?;
        let available = self.guest_address(available)?;
        let used = self.guest_address(used)?;
        let ring = self
            .rings
            .get_mut(index as usize)
            .ok_or(VhostError::InvalidParam)?;
        ring.set_addresses(&self.memory, descriptors, available, used);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        // An index into a split ring has sixteen bits; the field has more for packed ones.
        self.ring(index as usize)?.queue.set_next_avail(base as u16);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let next = self.ring(index as usize)?.stop().map_err(internal)?;
        if !self.rings.iter().any(Ring::is_started) {
            self.reset()?;
        }
        Ok(VhostUserVringState::new(index, next.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let ring = self
            .rings
            .get_mut(usize::from(index))
            .ok_or(VhostError::InvalidParam)?;
        ring.set_kick(fd, &self.memory).map_err(internal)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.ring(index.into())?.set_call(fd);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _fd: Option<File>) -> Result<()> {
        self.ring(index.into()).map(drop)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let mut features = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::BACKEND_REQ;
        // QEMU keeps the configuration space of its fs and net devices itself, and complains about being offered another.
        if !self.is_net() && self.device.device_type() != VIRTIO_ID_FS {
            features |= VhostUserProtocolFeatures::CONFIG;
        }
        Ok(features)
    }

    fn set_backend_req_fd(&mut self, requests: vhost::vhost_user::Backend) {
        self.requests_to_qemu = Some(requests);
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.enable(index as usize, enable)?;
        self.running.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        if size > MAX_CONFIG {
            return Err(VhostError::InvalidParam);
        }
        let mut data = vec![0; size as usize];
        self.device.read_config(offset.into(), &mut data);
        Ok(data)
    }

    fn set_config(&mut self, offset: u32, data: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.device.write_config(offset.into(), data);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        unsupported("memory hot-plug")
    }

    fn add_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion, _fd: File) -> Result<()> {
        unsupported("memory hot-plug")
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> Result<()> {
        unsupported("memory hot-plug")
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        unsupported("graphics")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        unsupported("shared objects")
    }

    fn get_inflight_fd(
        &mut self,
        _inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        unsupported("in-flight tracking")
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        unsupported("in-flight tracking")
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        unsupported("migration")
    }

    fn check_device_state(&mut self) -> Result<()> {
        unsupported("migration")
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        unsupported("migration")
    }
}
