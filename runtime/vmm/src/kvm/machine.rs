//! A whole virtual machine under KVM: put together, started, paused, changed, and ended.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use cloison_devices::{
    Balloon, Blk, Console, Device, MEMORY_BLOCK, Mem, MemHandle, NetHandle, Pmem, Rng, Sink,
};
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use super::backing::Backing;
use super::bus::Bus;
use super::error::{KvmError, kvm, system};
use super::gate::Gate;
use super::layout::{FS_SLOT, KVM_IDENTITY_MAP, KVM_TSS, NIC_SLOT, OWN_SLOTS, ROOT, VSOCK_SLOT};
use super::ports::Ports;
use super::run::{self, Machine as Shared};
use super::start::{Content, Start};
use super::state::VmState;
use super::vcpu::{self, Offer};
use super::{image, kick, memory, vcpu_state};
use crate::control::{DeviceKind, State};
use crate::devices::Devices;
use crate::kernel_log::KernelLog;
use crate::machine::{Machine, Watch};
use crate::nic::{self, Nic, Plugged};
use crate::spec::VmSpec;
use crate::stop::{Stop, chain};

/// What the agent of a guest that has become a template waits for on its console.
const GO_ON: &[u8] = b"\n";

/// A virtual machine.
pub(crate) struct KvmMachine {
    vm: Arc<VmFd>,
    memory: GuestMemoryMmap,
    content: Content,
    /// What the guest was when it was saved, until it has its devices.
    resumed: Option<VmState>,
    offer: Offer,
    max_vcpus: u8,
    shared: Arc<Shared>,
    bus: Bus,
    /// Gives the guest memory while it runs, if it may ever have more.
    hot_memory: Option<MemHandle>,
    /// The slots with devices that the VM has from its first instruction on.
    own_slots: Range<usize>,
    /// The slots of network devices that have an interface.
    nics: Vec<u32>,
    /// The network device in [`NIC_SLOT`] that the guest has known since it was saved, if there is one.
    waiting: Option<NetHandle>,
    /// The vCPU that boots, until it has its thread.
    first: Option<VcpuFd>,
    /// A thread for each vCPU there is, by their IDs.
    vcpus: Vec<JoinHandle<Option<VcpuFd>>>,
}

impl KvmMachine {
    /// Puts the machine together with all devices that are the VM's own, up to and not including the guest's first instruction. What the
    /// guest writes to its console goes to `sink`, and what it writes to its serial line to `log`.
    pub(super) fn new(
        spec: &VmSpec,
        start: Start<'_>,
        sink: Sink,
        log: KernelLog,
        stop: Stop,
    ) -> Result<Self, KvmError> {
        let kvm_fd = Kvm::new().map_err(|error| KvmError::Open(error.into()))?;
        let vm = kvm_fd.create_vm().map_err(kvm("create a VM"))?;
        let mut memory = memory::reserve(spec.memory_mib)?;
        let content = start.lay(spec, &mut memory)?;
        let hot = match spec.max_memory_mib - spec.memory_mib {
            0 => None,
            mib => Some(memory::hot_range(&memory, mib)),
        };
        if let Some(range) = hot {
            memory = memory::add_region(&memory, range, memory::HELD)?;
        }
        register_memory(&vm, &memory)?;
        vm.set_identity_map_address(KVM_IDENTITY_MAP)
            .map_err(kvm("place its identity map"))?;
        vm.set_tss_address(KVM_TSS as usize)
            .map_err(kvm("place its task state"))?;
        vm.create_irq_chip()
            .map_err(kvm("make interrupt controllers"))?;

        let vm = Arc::new(vm);
        let mut bus = Bus::new(Arc::clone(&vm), memory.clone())?;
        let mut own_slots = OWN_SLOTS..OWN_SLOTS;
        let mut own = |bus: &mut Bus, name, device| {
            own_slots.end += 1;
            bus.plug_into(own_slots.end - 1, name, device)
        };
        for (name, device) in boot_devices(&start, sink, &memory)? {
            own(&mut bus, name, device)?;
        }
        if let Some((start, length)) = content.root.mapped() {
            let pmem = Pmem::new(start, length).map_err(io::Error::other);
            let pmem = pmem.map_err(system("show the guest its root file system"))?;
            own(&mut bus, "pmem", Box::new(pmem))?;
        }
        let hot_memory = hot
            .map(|(start, length)| {
                let backing = Box::new(Backing(memory.clone()));
                let mem = Mem::new(start, length, backing).map_err(io::Error::other);
                let mem = mem.map_err(system("make room for more memory"))?;
                let handle = mem.handle();
                own(&mut bus, "mem", Box::new(mem))?;
                Ok::<_, KvmError>(handle)
            })
            .transpose()?;
        let offer = Offer::of(&kvm_fd)?;
        let first = vcpu::create(&vm, &offer, 0, spec.max_vcpus)?;
        kick::install().map_err(system("install a signal handler"))?;
        let shared = Arc::new(Shared {
            slots: Arc::clone(bus.slots()),
            ports: Mutex::new(Ports::new(log.clone())),
            log,
            stop,
            gate: Gate::new(spec.vcpus),
        });
        let resumed = match start {
            Start::Boot(_) => {
                vcpu::point_at(&first, content.entry)?;
                None
            }
            Start::Load(image) => {
                image.vm().restore(&vm, &first)?;
                Some(image.into_vm())
            }
        };
        Ok(Self {
            vm,
            memory,
            content,
            resumed,
            offer,
            max_vcpus: spec.max_vcpus,
            shared,
            bus,
            hot_memory,
            own_slots,
            nics: Vec::new(),
            waiting: None,
            first: Some(first),
            vcpus: Vec::new(),
        })
    }

    /// Gives the guest a network device that waits for its interface. To be called before the guest is served, for one that becomes a template
    /// and for those that come from that.
    pub(super) fn await_nic(&mut self) -> Result<(), KvmError> {
        let net = nic::spare(0).map_err(io::Error::other);
        let net = net.map_err(system("make a network device"))?;
        let handle = net.handle();
        // That a cable comes later is nothing the guest has to be told: until then its interface is down.
        handle.set_link(true);
        self.bus.plug_into(NIC_SLOT, "net", Box::new(net))?;
        self.waiting = Some(handle);
        Ok(())
    }

    /// Lets the guest run, with these devices. All threads are started here, when the process has locked itself in.
    pub(crate) fn serve(&mut self, devices: Devices) -> Result<(), KvmError> {
        self.bus.start(&self.shared.stop)?;
        let Devices { fs, vsock, nics } = devices;
        self.bus.plug_into(VSOCK_SLOT, "vsock", vsock)?;
        self.bus.plug_into(FS_SLOT, "fs", fs)?;
        if let Some(state) = self.resumed.take() {
            state.restore_slots(&self.bus)?;
        }
        for net in nics {
            let slot = self.bus.plug("net", Box::new(net))?;
            self.nics.push(slot as u32);
        }
        self.start()
    }

    /// Lets the guest run. The other vCPUs it may have are made while it boots; it asks for them much later.
    fn start(&mut self) -> Result<(), KvmError> {
        if let Some(first) = self.first.take() {
            self.add(first)?;
        }
        self.make_vcpus(self.shared.gate.allowed())
    }

    /// Whether [`KvmMachine::save`] can be had of it: what the guest unpacks itself is in no file that others could map.
    pub(super) fn can_be_saved(&self) -> bool {
        self.content.root.mapped().is_some()
    }

    /// Stops the guest for good, and writes a template of it. It has been given nothing yet: no vCPU beyond the first, and no memory.
    pub(super) fn save(mut self, file: &File, mib: u32) -> Result<(), KvmError> {
        let what = "save the guest";
        self.shared.gate.pause();
        self.kick();
        self.shared.gate.await_outside();
        self.shared.gate.end();
        let mut vcpus = self.vcpus.drain(..);
        let first = vcpus.next().and_then(|thread| thread.join().ok().flatten());
        let first = first.ok_or_else(|| system(what)(io::ErrorKind::BrokenPipe))?;
        drop(vcpus);
        self.bus.end();
        let kvm_fd = Kvm::new().map_err(|error| KvmError::Open(error.into()))?;
        let registers = vcpu_state::registers(&kvm_fd)?;
        let state = VmState::save(&self.vm, &first, &registers, &self.bus)?;
        image::write(file, &state, &self.memory, mib, self.content.laid).map_err(system(what))
    }

    /// Makes the vCPUs that are missing up to `count`. They wait in KVM until the guest starts them.
    fn make_vcpus(&mut self, count: u8) -> Result<(), KvmError> {
        for id in self.vcpus.len() as u8..count {
            let vcpu = vcpu::create(&self.vm, &self.offer, id, self.max_vcpus)?;
            vcpu::announce(&vcpu)?;
            self.add(vcpu)?;
        }
        Ok(())
    }

    /// Where the guest finds the network device in `slot`.
    fn place(&self, slot: u32) -> Plugged {
        let known = self.waiting.is_some() && slot == NIC_SLOT as u32;
        Plugged {
            slot,
            present: known.then(|| nic::spare_mac(0)),
        }
    }

    fn add(&mut self, vcpu: VcpuFd) -> Result<(), KvmError> {
        let id = self.vcpus.len() as u8;
        let shared = Arc::clone(&self.shared);
        let thread = self
            .shared
            .stop
            .spawn(&format!("vcpu{id}"), move || run::run(id, vcpu, &shared));
        self.vcpus
            .push(thread.map_err(system("start a vCPU's thread"))?);
        Ok(())
    }

    /// Has every vCPU pass the gate again.
    fn kick(&self) {
        for thread in &self.vcpus {
            if let Err(error) = kick::kick(thread) {
                tracing::error!("cannot kick a vCPU: {error}");
            }
        }
    }
}

impl Machine for KvmMachine {
    fn watched(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    fn ready(&mut self, _index: usize) -> Watch {
        Watch::Drop
    }

    fn state(&self) -> State {
        if self.shared.gate.is_paused() {
            State::Paused
        } else if self.shared.slots.taken() {
            State::Running
        } else {
            State::Starting
        }
    }

    fn pids(&self) -> Vec<u32> {
        Vec::new()
    }

    fn vcpus(&self) -> u8 {
        self.shared.gate.allowed()
    }

    fn max_vcpus(&self) -> u8 {
        self.max_vcpus
    }

    fn pause(&mut self) -> Result<(), String> {
        self.shared.gate.pause();
        self.kick();
        self.shared.gate.await_outside();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), String> {
        self.shared.gate.resume();
        Ok(())
    }

    fn hot_memory_mib(&self) -> u32 {
        let plugged = self.hot_memory.as_ref().map_or(0, MemHandle::plugged);
        (plugged >> 20) as u32
    }

    fn resize_vcpus(&mut self, vcpus: u8) -> Result<(), String> {
        if !(1..=self.max_vcpus).contains(&vcpus) {
            let most = self.max_vcpus;
            return Err(format!("this VM can have 1 to {most} vCPUs, not {vcpus}"));
        }
        self.make_vcpus(vcpus).map_err(|error| chain(&error))?;
        self.shared.gate.allow(vcpus);
        self.kick();
        self.shared.gate.await_outside();
        Ok(())
    }

    fn resize_hot_memory(&mut self, mib: u32, done: Option<OwnedFd>) -> Result<(), String> {
        let Some(hot_memory) = &self.hot_memory else {
            return Ok(());
        };
        let bytes = (u64::from(mib) << 20).next_multiple_of(MEMORY_BLOCK);
        hot_memory
            .request(bytes, done)
            .map_err(|error| chain(&error))
    }

    fn nics(&self) -> Vec<Plugged> {
        self.nics.iter().map(|slot| self.place(*slot)).collect()
    }

    fn plug(&mut self, kind: DeviceKind, file: Option<OwnedFd>) -> Result<Plugged, String> {
        let is_net = matches!(kind, DeviceKind::Net { .. });
        let plugged = match kind {
            DeviceKind::Rng => {
                let rng = Rng::new().map_err(|errno| format!("cannot make the device: {errno}"))?;
                self.bus.plug("rng", Box::new(rng))
            }
            DeviceKind::Blk { read_only, serial } => {
                let blk = Blk::new(from(file)?.into(), read_only, &serial);
                let blk = blk.map_err(|error| chain(&error))?;
                self.bus.plug("blk", Box::new(blk))
            }
            DeviceKind::Net { mac } => {
                let tap = from(file)?;
                if let Some(waiting) = &self.waiting
                    && !self.nics.contains(&(NIC_SLOT as u32))
                {
                    waiting.connect(tap, mac).map_err(|error| chain(&error))?;
                    self.nics.push(NIC_SLOT as u32);
                    return Ok(self.place(NIC_SLOT as u32));
                }
                let net = nic::connected(Nic { tap, mac }).map_err(|error| chain(&error))?;
                self.bus.plug("net", Box::new(net))
            }
        };
        let slot = plugged.map_err(|error| chain(&error))? as u32;
        if is_net {
            self.nics.push(slot);
        }
        Ok(in_slot(slot))
    }

    fn unplug(&mut self, slot: u32) -> Result<(), String> {
        let index = slot as usize;
        if [VSOCK_SLOT, FS_SLOT].contains(&index) || self.own_slots.contains(&index) {
            return Err(format!("the device in slot {slot} belongs to the VM"));
        }
        if index == NIC_SLOT
            && let Some(waiting) = &self.waiting
        {
            waiting.disconnect();
            self.nics.retain(|nic| *nic != slot);
            return Ok(());
        }
        let unplugged = self.bus.unplug(index);
        unplugged.map_err(|error| chain(&error))?;
        self.nics.retain(|nic| *nic != slot);
        Ok(())
    }

    fn end(&mut self) {
        self.shared.gate.end();
        self.kick();
        let threads = std::mem::take(&mut self.vcpus);
        let began = !threads.is_empty();
        // A thread that panicked has said so before it ended.
        threads.into_iter().for_each(|thread| drop(thread.join()));
        self.bus.end();
        if began {
            // The end of a VM waits for grace periods of the kernel's, in which the memory can be given back.
            let backing = Backing(self.memory.clone());
            let given = self
                .shared
                .stop
                .spawn("memory", move || backing.give_back());
            given.map_or_else(|error| tracing::debug!("{error}"), drop);
        }
    }
}

impl Drop for KvmMachine {
    fn drop(&mut self) {
        self.end();
    }
}

/// Tells KVM of the guest's memory.
fn register_memory(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), KvmError> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let what = "give the guest its memory";
        let host = memory.get_host_address(region.start_addr());
        let host = host.map_err(|source| KvmError::Write {
            what: "guest's memory",
            source,
        })?;
        let region = kvm_userspace_memory_region {
            slot,
            flags: match region.start_addr() {
                GuestAddress(ROOT) => KVM_MEM_READONLY,
                _ => 0,
            },
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        // SAFETY: guest memory stays mapped to the end of the process, and nothing in it is referred to but by raw pointers and
        // volatile accesses.
        unsafe { vm.set_user_memory_region(region) }.map_err(kvm(what))?;
    }
    Ok(())
}

/// How many devices every guest has from its first instruction on, beside those of its own.
const BOOT_DEVICES: usize = 3;

/// A device and its name.
type Named = (&'static str, Box<dyn Device>);

/// The descriptor that a device is made from.
fn from(descriptor: Option<OwnedFd>) -> Result<OwnedFd, String> {
    descriptor.ok_or_else(|| "this device is made from a descriptor, and none came along".into())
}

/// A device whose place the guest has yet to look at.
fn in_slot(slot: u32) -> Plugged {
    Plugged {
        slot,
        present: None,
    }
}

fn boot_devices(
    start: &Start<'_>,
    sink: Sink,
    memory: &GuestMemoryMmap,
) -> Result<[Named; BOOT_DEVICES], KvmError> {
    let mut console = Console::new(sink).map_err(system("make the console"))?;
    if let Start::Load(_) = start {
        console.say(GO_ON);
    }
    let rng = Rng::new().map_err(system("make the entropy device"))?;
    // Nobody inflates it; it is there for the pages that the guest reports free.
    let balloon = Balloon::new(Box::new(Backing(memory.clone())));
    let balloon = balloon.map_err(system("make the balloon"))?;
    Ok([
        ("console", Box::new(console)),
        ("rng", Box::new(rng)),
        ("balloon", Box::new(balloon)),
    ])
}
