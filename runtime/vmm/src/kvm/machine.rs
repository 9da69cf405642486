//! A whole virtual machine under KVM: put together, started, and ended.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use cloison_devices::{Console, Device, Rng};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::error::{KvmError, kvm, system};
use super::layout::{KVM_IDENTITY_MAP, KVM_TSS, MP_TABLE, SLOT_COUNT, slot_address, slot_irq};
use super::ports::Ports;
use super::registers::QUEUE_NOTIFY;
use super::run::{self, Machine as Shared};
use super::slot::Slots;
use super::vcpu::{self, Offer};
use super::worker::Worker;
use super::{boot, kernel, kick, memory, mptable};
use crate::control::State;
use crate::devices::Devices;
use crate::kernel_log::KernelLog;
use crate::machine::{Machine, Watch};
use crate::spec::VmSpec;
use crate::stop::Stop;

/// Which worker serves a device. File system requests wait for the host's disks, so they keep nobody else waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Serves {
    Files,
    Rest,
}

/// A virtual machine.
pub(crate) struct KvmMachine {
    /// Keeps the VM, and with it its memory slots, lines and notifications, for as long as there are threads.
    _vm: VmFd,
    shared: Arc<Shared>,
    /// vCPUs that have no thread yet.
    idle: Vec<VcpuFd>,
    vcpus: Vec<JoinHandle<()>>,
    workers: Vec<(JoinHandle<()>, EventFd)>,
}

impl KvmMachine {
    /// Puts the machine together, up to and not including the guest's first instruction.
    pub(crate) fn new(
        spec: &VmSpec,
        devices: Devices,
        log: KernelLog,
        stop: Stop,
    ) -> Result<Self, KvmError> {
        let kvm_fd = Kvm::new().map_err(|error| KvmError::Open(error.into()))?;
        let vm = kvm_fd.create_vm().map_err(kvm("create a VM"))?;
        let memory = memory::reserve(spec.memory_mib)?;
        register_memory(&vm, &memory)?;
        let entry = load(spec, &memory)?;
        vm.set_identity_map_address(KVM_IDENTITY_MAP)
            .map_err(kvm("place its identity map"))?;
        vm.set_tss_address(KVM_TSS as usize)
            .map_err(kvm("place its task state"))?;
        vm.create_irq_chip()
            .map_err(kvm("make interrupt controllers"))?;

        let slots = Arc::new(Slots::new(lines(&vm)?, memory));
        let workers = plug(&vm, &slots, devices, log.clone())?;

        let offer = Offer::of(&kvm_fd)?;
        let idle = (0..spec.vcpus)
            .map(|id| vcpu::create(&vm, &offer, id, spec.vcpus))
            .collect::<Result<Vec<_>, _>>()?;
        if let Some(first) = idle.first() {
            vcpu::point_at(first, entry)?;
        }
        kick::install().map_err(system("install a signal handler"))?;
        let shared = Arc::new(Shared {
            slots,
            ports: Mutex::new(Ports::new(log.clone())),
            log,
            stop,
            ending: AtomicBool::new(false),
        });
        let mut machine = Self {
            _vm: vm,
            shared,
            idle,
            vcpus: Vec::new(),
            workers: Vec::new(),
        };
        for (name, worker) in workers {
            let stopper = worker.stopper().map_err(system("make a worker"))?;
            let slots = Arc::clone(&machine.shared.slots);
            let thread = machine.shared.stop.spawn(name, move || worker.run(&slots));
            machine
                .workers
                .push((thread.map_err(system("start a worker"))?, stopper));
        }
        Ok(machine)
    }

    /// Lets the guest run.
    pub(crate) fn start(&mut self) -> Result<(), KvmError> {
        for (id, vcpu) in (0..).zip(self.idle.drain(..)) {
            let shared = Arc::clone(&self.shared);
            let thread = self
                .shared
                .stop
                .spawn(&format!("vcpu{id}"), move || run::run(id, vcpu, &shared));
            self.vcpus
                .push(thread.map_err(system("start a vCPU's thread"))?);
        }
        Ok(())
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
        if self.shared.slots.taken() {
            State::Running
        } else {
            State::Starting
        }
    }

    fn pids(&self) -> Vec<u32> {
        Vec::new()
    }

    fn end(&mut self) {
        self.shared.ending.store(true, Ordering::Release);
        for thread in &self.vcpus {
            if let Err(error) = kick::kick(thread) {
                tracing::error!("cannot kick a vCPU: {error}");
            }
        }
        // A thread that panicked has said so before it ended.
        self.vcpus.drain(..).for_each(|thread| drop(thread.join()));
        for (thread, stopper) in self.workers.drain(..) {
            match stopper.write(1) {
                Ok(()) => drop(thread.join()),
                Err(error) => tracing::error!("cannot stop a worker: {error}"),
            }
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
            flags: 0,
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

/// Fills the guest's memory with what it starts from; answers where it starts.
fn load(spec: &VmSpec, memory: &GuestMemoryMmap) -> Result<u64, KvmError> {
    let file = |role, path: &Path| File::open(path).map_err(in_file(role, path));
    let kernel = kernel::load(&file("guest kernel", &spec.kernel)?, memory);
    let kernel = kernel.map_err(|source| KvmError::Kernel {
        path: spec.kernel.clone(),
        source,
    })?;
    let (role, path) = ("guest's initramfs", &spec.initramfs);
    let initramfs = boot::load_initramfs(&file(role, path)?, memory, &kernel, spec.memory_mib);
    let initramfs = initramfs.map_err(in_file(role, path))??;
    boot::write(memory, &boot::command_line(&spec.cmdline)?, initramfs)?;
    let table = mptable::build(spec.vcpus);
    memory
        .write_slice(&table, GuestAddress(MP_TABLE))
        .map_err(|source| KvmError::Write {
            what: "MP table",
            source,
        })?;
    Ok(kernel.entry)
}

fn in_file(role: &'static str, path: &Path) -> impl Fn(io::Error) -> KvmError {
    move |source| KvmError::File {
        role,
        path: path.to_owned(),
        source,
    }
}

/// Interrupt lines for all slots, so that a device plugged later needs no more of KVM than its notifications.
fn lines(vm: &VmFd) -> Result<Vec<EventFd>, KvmError> {
    let line = |slot| {
        let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(system("make an interrupt line"))?;
        vm.register_irqfd(&line, slot_irq(slot))
            .map_err(kvm("connect an interrupt line"))?;
        Ok(line)
    };
    (0..SLOT_COUNT).map(line).collect()
}

/// Puts the devices every guest has into the first slots, and has their notifications go to the workers that serve them.
fn plug(
    vm: &VmFd,
    slots: &Slots,
    devices: Devices,
    log: KernelLog,
) -> Result<[(&'static str, Worker); 2], KvmError> {
    let console =
        Console::new(Box::new(move |bytes| log.push(bytes))).map_err(system("make the console"))?;
    let rng = Rng::new().map_err(system("make the entropy device"))?;
    let all: [(&str, Serves, Box<dyn Device>); 4] = [
        ("console", Serves::Rest, Box::new(console)),
        ("rng", Serves::Rest, Box::new(rng)),
        ("vsock", Serves::Rest, devices.vsock),
        ("fs", Serves::Files, devices.fs),
    ];
    let worker = || Worker::new().map_err(system("make a worker"));
    let (mut files, mut rest) = (worker()?, worker()?);
    for (slot, (name, serves, device)) in all.into_iter().enumerate() {
        let worker = if serves == Serves::Files {
            &mut files
        } else {
            &mut rest
        };
        let notify = IoEventAddress::Mmio(slot_address(slot) + QUEUE_NOTIFY);
        for (queue, _) in (0_u32..).zip(device.queue_sizes()) {
            let notification = worker
                .notification(slot, queue as usize)
                .map_err(system("make a queue's notification"))?;
            vm.register_ioevent(notification, &notify, queue)
                .map_err(kvm("watch a queue's notification"))?;
        }
        slots
            .plug(slot, name, device, worker.host_watch(slot))
            .map_err(system("plug a device"))?;
    }
    Ok([("fs", files), ("devices", rest)])
}
