//! The registers of a virtio device on the memory-mapped transport (virtio 1.3 §4.2.2), as plain state: what a read answers, what a
//! write changes, and what the write makes necessary. It never touches guest memory or a device.

use serde::{Deserialize, Serialize};

/// "virt".
const MAGIC: u32 = 0x7472_6976;
/// The modern interface, the only one there is here.
const VERSION: u32 = 2;
/// "clsn", for want of a PCI vendor ID of our own.
const VENDOR: u32 = 0x6e73_6c63;
/// VIRTIO_F_VERSION_1: without it, no driver of a modern device can go on.
const VERSION_1: u64 = 1 << 32;

/// Register offsets, in bytes (§4.2.2).
mod offset {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

pub(super) use offset::{CONFIG, CONFIG_GENERATION, INTERRUPT_ACK, INTERRUPT_STATUS, QUEUE_NOTIFY};

/// Device status bits (§2.1).
mod status {
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
    pub const FAILED: u8 = 128;
}

/// What the guest has written about one queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct QueueRegisters {
    /// The device's limit; a power of two.
    pub(super) max: u16,
    /// A power of two up to `max`, or 0 for anything else.
    pub(super) size: u16,
    pub(super) ready: bool,
    pub(super) descriptors: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
}

/// All registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registers {
    status: u8,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueRegisters>,
}

/// What never changes about a device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Identity {
    pub(super) device_type: u32,
    pub(super) features: u64,
}

/// What a write makes necessary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    Nothing,
    /// The driver is done: the queues are as they are from here on, and the device comes to life.
    Start,
    /// The guest has reset the device.
    Reset,
}

impl Registers {
    /// The registers of a device nobody has touched, with queues of at most these sizes.
    pub(super) fn new(queue_sizes: &[u16]) -> Self {
        let queue = |&max: &u16| QueueRegisters {
            max,
            size: 0,
            ready: false,
            descriptors: 0,
            driver: 0,
            device: 0,
        };
        Self {
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues: queue_sizes.iter().map(queue).collect(),
        }
    }

    /// The features both sides agreed on, once [`Effect::Start`] has come.
    pub(super) fn features(&self) -> u64 {
        self.driver_features
    }

    pub(super) fn queues(&self) -> &[QueueRegisters] {
        &self.queues
    }

    /// Tells the guest that nothing works until it resets the device.
    pub(super) fn set_needs_reset(&mut self) {
        self.status |= status::NEEDS_RESET;
    }

    /// What the register at `at` holds; what is not a register reads as zero.
    pub(super) fn read(&self, at: u64, identity: Identity) -> u32 {
        match at {
            offset::MAGIC => MAGIC,
            offset::VERSION => VERSION,
            offset::DEVICE_ID => identity.device_type,
            offset::VENDOR_ID => VENDOR,
            offset::DEVICE_FEATURES => half(identity.features, self.device_features_sel),
            offset::QUEUE_SIZE_MAX => self.queue().map_or(0, |queue| queue.max.into()),
            offset::QUEUE_READY => self.queue().is_some_and(|queue| queue.ready).into(),
            offset::STATUS => self.status.into(),
            // No shared memory regions: length and base of any read as all ones (§4.2.2, SHMLenLow).
            offset::SHM_LEN_LOW..=offset::SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    /// Writes the register at `at`. Whatever comes out of turn is ignored: features once they are agreed, queues before that and
    /// once the device lives, anything on a device that needs a reset.
    pub(super) fn write(&mut self, at: u64, value: u32, identity: Identity) -> Effect {
        match at {
            offset::STATUS => return self.write_status(value, identity),
            offset::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            offset::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            offset::DRIVER_FEATURES if self.is_negotiating() => {
                set_half(&mut self.driver_features, self.driver_features_sel, value);
            }
            offset::QUEUE_SEL => self.queue_sel = value,
            _ if self.is_configuring() => {
                if let Some(queue) = self.queues.get_mut(self.queue_sel as usize) {
                    queue.write(at, value);
                }
            }
            _ => {}
        }
        Effect::Nothing
    }

    /// Whether these can be the registers of a device that has `untouched` ones before any driver has seen it.
    pub(super) fn fit(&self, untouched: &Self, identity: Identity) -> bool {
        let sizes = |registers: &Self| -> Vec<u16> {
            registers.queues.iter().map(|queue| queue.max).collect()
        };
        sizes(self) == sizes(untouched) && self.driver_features & !identity.features == 0
    }

    fn queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(self.queue_sel as usize)
    }

    fn is_negotiating(&self) -> bool {
        self.status & (status::DRIVER | status::FEATURES_OK) == status::DRIVER
    }

    fn is_configuring(&self) -> bool {
        let bits = status::FEATURES_OK | status::DRIVER_OK | status::NEEDS_RESET | status::FAILED;
        self.status & bits == status::FEATURES_OK
    }

    fn write_status(&mut self, value: u32, identity: Identity) -> Effect {
        use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK};
        let Ok(value) = u8::try_from(value) else {
            return Effect::Nothing;
        };
        if value == 0 {
            let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max).collect();
            *self = Self::new(&sizes);
            return Effect::Reset;
        }
        // Bits are set one after the other and never cleared but by a reset (§2.1.1, §3.1.1).
        let new = value & !self.status;
        let mut effect = Effect::Nothing;
        self.status |= new & (ACKNOWLEDGE | DRIVER | FAILED);
        if new & FEATURES_OK != 0 && self.status & DRIVER != 0 {
            let features = self.driver_features;
            if features & !identity.features == 0 && features & VERSION_1 != 0 {
                self.status |= FEATURES_OK;
            }
        }
        if new & DRIVER_OK != 0 && self.is_configuring() {
            self.status |= DRIVER_OK;
            effect = Effect::Start;
        }
        effect
    }
}

impl QueueRegisters {
    fn write(&mut self, at: u64, value: u32) {
        if self.ready {
            // A ready queue is only ever made unready, and that takes a reset where queues cannot be reset one by one.
            return;
        }
        match at {
            offset::QUEUE_SIZE => {
                let size = u16::try_from(value)
                    .ok()
                    .filter(|size| size.is_power_of_two() && *size <= self.max);
                self.size = size.unwrap_or(0);
            }
            offset::QUEUE_READY => self.ready = value == 1 && self.size != 0,
            offset::QUEUE_DESC_LOW => set_half(&mut self.descriptors, 0, value),
            offset::QUEUE_DESC_HIGH => set_half(&mut self.descriptors, 1, value),
            offset::QUEUE_DRIVER_LOW => set_half(&mut self.driver, 0, value),
            offset::QUEUE_DRIVER_HIGH => set_half(&mut self.driver, 1, value),
            offset::QUEUE_DEVICE_LOW => set_half(&mut self.device, 0, value),
            offset::QUEUE_DEVICE_HIGH => set_half(&mut self.device, 1, value),
            _ => {}
        }
    }
}

/// The lower (0) or upper (1) half; there are no others.
fn half(word: u64, select: u32) -> u32 {
    match select {
        0 => word as u32,
        1 => (word >> 32) as u32,
        _ => 0,
    }
}

fn set_half(word: &mut u64, select: u32, value: u32) {
    match select {
        0 => *word = *word & !0xffff_ffff | u64::from(value),
        1 => *word = *word & 0xffff_ffff | u64::from(value) << 32,
        _ => {}
    }
}

#[cfg(test)]
mod tests;
