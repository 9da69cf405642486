//! A whole VM between two instructions, as plain data: its processor, its interrupt controllers, its clock, and its slots. With its memory
//! it makes another VM go on where this one was. Only what a guest is that has been given nothing yet: one processor that runs, no
//! memory but that of its start, and in the slots devices that have no state but their queues'.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::bus::Bus;
use super::error::{KvmError, kvm, system};
use super::layout::SLOT_COUNT;
use super::slot::{Event, SlotState};
use super::vcpu_state::VcpuState;

const CONTROLLERS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

/// A VM's state.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct VmState {
    vcpu: VcpuState,
    controllers: Vec<kvm_irqchip>,
    clock: kvm_clock_data,
    slots: Vec<(usize, SlotState)>,
}

impl VmState {
    /// The state of a VM whose processor has left the guest for good, and whose devices nobody serves any more; with these of the
    /// processor's model-specific registers.
    pub(super) fn save(
        vm: &VmFd,
        vcpu: &VcpuFd,
        registers: &[u32],
        bus: &Bus,
    ) -> Result<Self, KvmError> {
        let controller = |chip_id| {
            let mut controller = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.get_irqchip(&mut controller)
                .map_err(kvm("save an interrupt controller's state"))?;
            Ok(controller)
        };
        let slots = (0..SLOT_COUNT).filter_map(|slot| Some((slot, bus.slots().save(slot)?)));
        Ok(Self {
            vcpu: VcpuState::save(vcpu, registers)?,
            controllers: CONTROLLERS
                .into_iter()
                .map(controller)
                .collect::<Result<_, KvmError>>()?,
            clock: vm.get_clock().map_err(kvm("save its clock"))?,
            slots: slots.collect(),
        })
    }

    /// Gives this state to a VM of which nothing has run; but for that of its slots, see [`VmState::restore_slots`].
    pub(super) fn restore(&self, vm: &VmFd, vcpu: &VcpuFd) -> Result<(), KvmError> {
        for controller in &self.controllers {
            vm.set_irqchip(controller)
                .map_err(kvm("restore an interrupt controller's state"))?;
        }
        self.vcpu.restore(vcpu)?;
        // The clock goes on from where it was; by how much it has been saved with, other fields say.
        let clock = kvm_clock_data {
            clock: self.clock.clock,
            ..Default::default()
        };
        vm.set_clock(&clock).map_err(kvm("restore its clock"))
    }

    /// Gives the devices in the slots, which are the same ones, their state, and has them see to their queues, of which it is not known whether
    /// the guest has notified them. The VM's own state must have been restored.
    pub(super) fn restore_slots(&self, bus: &Bus) -> Result<(), KvmError> {
        for (slot, state) in &self.slots {
            bus.slots()
                .restore(*slot, state)
                .map_err(system("restore a slot's state"))?;
            for queue in 0..state.queues() {
                bus.slots().handle(*slot, Event::Queue(queue));
            }
        }
        Ok(())
    }
}
