//! The adapter against the vhost crate's own front end, guest memory in a memfd, and a driver that lays out rings by hand.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use cloison_devices::{Broken, Context, QueueMask};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueT;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;

const MEMORY: u64 = 1 << 20;
/// Where the front end claims to have guest memory: told addresses are its own, not the guest's.
const FRONT: u64 = 0x7000_0000_0000;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const QUEUE_SIZE: u16 = 8;
const VERSION_1: u64 = 1 << 32;
const PROTOCOL: u64 = 1 << 30;
const ACCESS_PLATFORM: u64 = 1 << 33;

/// Returns every chain unwritten; breaks on a buffer of 666 bytes; a host event returns a chain as well.
struct Returner {
    host: EventFd,
    resets: Arc<std::sync::atomic::AtomicU32>,
}

impl Device for Returner {
    fn device_type(&self) -> u32 {
        42
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        VERSION_1
    }

    fn set_acked_features(&mut self, features: u64) {
        assert_eq!(features & !VERSION_1, 0);
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8 + 1);
    }

    fn queue_event(
        &mut self,
        ctx: &mut Context<'_, '_>,
        index: usize,
    ) -> Result<QueueMask, Broken> {
        let mut grown = QueueMask::NONE;
        if !ctx.queues[index].ready() {
            return Ok(grown);
        }
        while let Some(chain) = ctx.queues[index].pop_descriptor_chain(ctx.memory) {
            let head = chain.head_index();
            if chain.into_iter().any(|descriptor| descriptor.len() == 666) {
                return Err(Broken {
                    device: "returner",
                    what: "666 bytes".into(),
                });
            }
            ctx.queues[index].add_used(ctx.memory, head, 0).unwrap();
            grown.insert(index);
        }
        Ok(grown)
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the descriptor lives as long as the device.
        Some(unsafe { BorrowedFd::borrow_raw(self.host.as_raw_fd()) })
    }

    fn host_event(&mut self, ctx: &mut Context<'_, '_>) -> Result<QueueMask, Broken> {
        self.host.read().unwrap();
        self.queue_event(ctx, 0)
    }

    fn reset(&mut self) {
        self.resets.fetch_add(1, Ordering::SeqCst);
    }
}

/// QEMU and the guest in one.
struct Peer {
    front: Frontend,
    memory: GuestMemoryMmap,
    file: File,
    kick: EventFd,
    call: EventFd,
    host: EventFd,
    resets: Arc<std::sync::atomic::AtomicU32>,
    running: Arc<AtomicBool>,
    available: u16,
    service: JoinHandle<Result<(), ServeError>>,
    /// Closed when "QEMU" has ended.
    qemu: Option<OwnedFd>,
}

impl Peer {
    fn new() -> Self {
        let file = File::from(memfd_create(c"guest", MFdFlags::empty()).unwrap());
        file.set_len(MEMORY).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let memory = GuestMemoryMmap::from_ranges_with_files([(
            GuestAddress(0),
            MEMORY as usize,
            Some(offset),
        )])
        .unwrap();
        let host = EventFd::new(EFD_NONBLOCK).unwrap();
        let resets = Arc::default();
        let device = Returner {
            host: host.try_clone().unwrap(),
            resets: Arc::clone(&resets),
        };
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (dead, alive) = nix::unistd::pipe().unwrap();
        let running = Arc::new(AtomicBool::new(false));
        let service = Service::new(Box::new(device), theirs, dead, Arc::clone(&running)).unwrap();
        Self {
            front: Frontend::from_stream(ours, 16),
            memory,
            file,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(0).unwrap(),
            host,
            resets,
            running,
            available: 0,
            service: std::thread::spawn(move || service.run()),
            qemu: Some(alive),
        }
    }

    fn handshake(&mut self) {
        self.front.set_owner().unwrap();
        let features = self.front.get_features().unwrap();
        assert_eq!(features, VERSION_1 | PROTOCOL | ACCESS_PLATFORM);
        let offered = self.front.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK;
        assert!(offered.contains(wanted));
        self.front.set_protocol_features(wanted).unwrap();
        self.front
            .set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        self.front.set_features(features).unwrap();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY,
            userspace_addr: FRONT,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        };
        self.front.set_mem_table(&[region]).unwrap();
    }

    fn set_up(&mut self, size: u16, descriptors: u64) -> Result<(), vhost::Error> {
        self.front.set_vring_num(0, size)?;
        self.front.set_vring_base(0, self.available)?;
        let config = VringConfigData {
            queue_max_size: size,
            queue_size: size,
            flags: 0,
            desc_table_addr: FRONT + descriptors,
            used_ring_addr: FRONT + USED,
            avail_ring_addr: FRONT + AVAILABLE,
            log_addr: None,
        };
        self.front.set_vring_addr(0, &config)?;
        self.front.set_vring_kick(0, &self.kick)?;
        self.front.set_vring_call(0, &self.call)
    }

    fn start(&mut self) {
        self.handshake();
        self.set_up(QUEUE_SIZE, DESCRIPTORS).unwrap();
        self.front.set_vring_enable(0, true).unwrap();
    }

    fn offer(&mut self, length: u32) {
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&0x8000u64.to_le_bytes());
        descriptor[8..12].copy_from_slice(&length.to_le_bytes());
        self.memory
            .write_slice(&descriptor, GuestAddress(DESCRIPTORS))
            .unwrap();
        let slot = u64::from(self.available % QUEUE_SIZE);
        self.memory
            .write_obj(0u16, GuestAddress(AVAILABLE + 4 + 2 * slot))
            .unwrap();
        self.available += 1;
        self.memory
            .write_obj(self.available, GuestAddress(AVAILABLE + 2))
            .unwrap();
    }

    fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    fn used(&self) -> u16 {
        self.memory.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    /// Returns when what was kicked before has been dealt with: the second answer can only come from a later wait.
    fn settle(&self) {
        self.front.get_features().unwrap();
        self.front.get_features().unwrap();
    }

    /// One chain goes there and back.
    fn round_trip(&mut self) {
        let before = self.used();
        self.offer(16);
        self.kick();
        assert_eq!(self.call.read().unwrap(), 1);
        assert_eq!(self.used(), before.wrapping_add(1));
    }

    /// The guest resets the device.
    fn stop(&mut self) {
        self.front.get_vring_base(0).unwrap();
        self.memory
            .write_obj(0u32, GuestAddress(AVAILABLE))
            .unwrap();
        self.memory.write_obj(0u32, GuestAddress(USED)).unwrap();
        self.available = 0;
    }

    /// "QEMU" ends; what its device's thread makes of it.
    fn end(mut self) -> Result<(), ServeError> {
        drop(self.qemu.take());
        drop(self.front);
        self.service.join().unwrap()
    }
}

#[test]
fn a_chain_goes_to_the_device_and_comes_back() {
    let mut peer = Peer::new();
    peer.start();
    assert!(peer.running.load(Ordering::SeqCst));
    for _ in 0..100 {
        peer.round_trip();
    }
    peer.end().unwrap();
}

#[test]
fn configuration_space_is_the_devices() {
    let mut peer = Peer::new();
    peer.handshake();
    let flags = VhostUserConfigFlags::empty();
    let (_, data) = peer.front.get_config(4, 8, flags, &[0; 8]).unwrap();
    assert_eq!(data, [5; 8]);
    peer.end().unwrap();
}

#[test]
fn a_kick_before_the_ring_is_enabled_is_not_lost() {
    let mut peer = Peer::new();
    peer.handshake();
    peer.set_up(QUEUE_SIZE, DESCRIPTORS).unwrap();
    peer.offer(16);
    peer.kick();
    assert_eq!(peer.used(), 0);
    peer.front.set_vring_enable(0, true).unwrap();
    assert_eq!(peer.call.read().unwrap(), 1);
    assert_eq!(peer.used(), 1);
    peer.end().unwrap();
}

#[test]
fn a_chain_whose_kick_got_lost_is_found() {
    let mut peer = Peer::new();
    peer.start();
    peer.round_trip();
    peer.offer(16);
    assert_eq!(peer.call.read().unwrap(), 1);
    assert_eq!(peer.used(), 2);
    peer.end().unwrap();
}

#[test]
fn an_interrupt_that_the_guest_seemed_not_to_want_is_made_up_for_once() {
    let mut peer = Peer::new();
    peer.start();
    // VRING_AVAIL_F_NO_INTERRUPT.
    let unwanted = GuestAddress(AVAILABLE);
    peer.memory.write_obj(1u16, unwanted).unwrap();
    peer.round_trip();
    peer.memory.write_obj(0u16, unwanted).unwrap();
    peer.round_trip();
    peer.end().unwrap();
}

#[test]
fn the_devices_own_events_reach_it() {
    let mut peer = Peer::new();
    peer.start();
    peer.offer(16);
    peer.host.write(1).unwrap();
    assert_eq!(peer.call.read().unwrap(), 1);
    peer.end().unwrap();
}

#[test]
fn a_broken_device_is_silent_until_the_guest_resets_it() {
    let mut peer = Peer::new();
    peer.start();
    peer.round_trip();
    for length in [666, 16] {
        peer.offer(length);
        peer.kick();
        peer.settle();
    }
    assert_eq!(peer.used(), 1);
    peer.stop();
    assert_eq!(peer.resets.load(Ordering::SeqCst), 1);
    peer.set_up(QUEUE_SIZE, DESCRIPTORS).unwrap();
    peer.front.set_vring_enable(0, true).unwrap();
    peer.round_trip();
    peer.end().unwrap();
}

#[test]
fn rings_that_make_no_sense_stay_silent_and_can_be_set_up_again() {
    for (size, descriptors) in [
        (3, DESCRIPTORS),
        (2048, DESCRIPTORS),
        (QUEUE_SIZE, MEMORY - 16),
    ] {
        let mut peer = Peer::new();
        peer.handshake();
        peer.set_up(size, descriptors).unwrap();
        peer.front.set_vring_enable(0, true).unwrap();
        peer.offer(16);
        peer.kick();
        peer.settle();
        assert_eq!(
            peer.used(),
            0,
            "size {size}, descriptors at {descriptors:#x}"
        );
        peer.stop();
        peer.set_up(QUEUE_SIZE, DESCRIPTORS).unwrap();
        peer.front.set_vring_enable(0, true).unwrap();
        peer.round_trip();
        peer.end().unwrap();
    }
}

#[test]
fn a_stopped_ring_is_left_alone() {
    let mut peer = Peer::new();
    peer.start();
    peer.round_trip();
    peer.stop();
    peer.offer(16);
    peer.kick();
    peer.host.write(1).unwrap();
    peer.settle();
    assert_eq!(peer.used(), 0);
    peer.end().unwrap();
}

#[test]
fn a_front_end_that_asks_for_the_impossible_ends_the_service_with_an_error() {
    let impossible: [fn(&mut Peer); 5] = [
        |peer| drop(peer.front.set_features(u64::MAX)),
        |peer| drop(peer.front.get_vring_base(7)),
        |peer| drop(peer.set_up(QUEUE_SIZE, 0x1008)),
        |peer| drop(peer.set_up(QUEUE_SIZE, MEMORY)),
        |peer| {
            let region = VhostUserMemoryRegionInfo {
                guest_phys_addr: 0,
                memory_size: 2 * MEMORY,
                userspace_addr: FRONT,
                mmap_offset: 0,
                mmap_handle: peer.file.as_raw_fd(),
            };
            drop(peer.front.set_mem_table(&[region]));
        },
    ];
    for (number, ask) in impossible.into_iter().enumerate() {
        let mut peer = Peer::new();
        peer.handshake();
        ask(&mut peer);
        let Err(error) = peer.end() else {
            panic!("request {number} was honoured")
        };
        assert!(
            matches!(error, ServeError::Protocol(_)),
            "request {number}: {error}"
        );
    }
}

#[test]
fn garbage_on_the_socket_ends_the_service_with_an_error() {
    let peer = Peer::new();
    // SAFETY: the front end and its descriptor live until the end of this test.
    let front = unsafe { BorrowedFd::borrow_raw(peer.front.as_raw_fd()) };
    let mut socket = File::from(front.try_clone_to_owned().unwrap());
    socket.write_all(&[0xff; 64]).unwrap();
    drop(socket);
    assert!(matches!(peer.end(), Err(ServeError::Protocol(_))));
}
