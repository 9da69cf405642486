//! QEMU's command line. Each option is there for a reason that is said beside it; what is passed as a number is a descriptor
//! that QEMU inherits.

use std::ffi::OsString;
use std::os::fd::RawFd;

use cloison_devices::MacAddress;
use serde_json::{Value, json};

use crate::devices::SHARED_TAG;
use crate::spec::VmSpec;

/// What the kernel is told beside [`VmSpec::cmdline`]. `quiet` keeps the log to what matters; a panic becomes a reset at once
/// (`panic=-1`), and a reset a triple fault (`reboot=t`), which ends a machine that is not to reboot. The rest saves time at
/// boot: nothing here needs patching for one processor (`noreplace-smp`), the timer works (`no_timer_check`), and so does
/// the TSC, which needs no second clock to watch it (`tsc=reliable`). No network interface is there that nobody asked for
/// (`dummy.numdummies=0`).
const CMDLINE: &str = "console=hvc0 quiet panic=-1 reboot=t noreplace-smp no_timer_check tsc=reliable dummy.numdummies=0";

/// TCG runs translations of the guest's code and throws them away when the guest, or QEMU, writes to the page they were made from.
/// It does not see what our fs device, another process, writes there, and would go on with the code of whatever program's page was
/// in that place before. So that device is one behind the guest's DMA layer (`iommu_platform=on`), which is told to give it
/// buffers of its own and to copy (`force`): the copy is the guest's own write. 4096 times 2 KiB serve the longest reads.
const BOUNCE_BUFFERS: &str = "swiotlb=4096,force";

/// (What other devices write of their own accord is never run: only by way of the processor does it get to where code is.) All of a
/// network device that QEMU would do itself is left out.
const NET_OPTIONS: [&str; 7] = [
    "ctrl_vq",
    "ctrl_rx",
    "ctrl_vlan",
    "ctrl_rx_extra",
    "ctrl_mac_addr",
    "ctrl_guest_offloads",
    "guest_announce",
];

/// One processor does without its local timer, whose calibration takes the kernel a fifth of a second; more would have to send
/// each other every tick.
const ONE_PROCESSOR: &str = " nolapic_timer";
/// Of several, those beyond the first wait until they are asked for.
const PROCESSORS: &str = " maxcpus=1";

/// Interrupts need a controller (pic), the kernel calibrates its clocks by the timer (pit), and without a clock of the time
/// of day (rtc) it looks for one for a second. Firmware tables, option ROMs and a serial port would only cost time.
const MACHINE: &str =
    "microvm,pit=on,pic=on,rtc=on,acpi=off,x-option-roms=off,isa-serial=off,memory-backend=ram";

/// All that TCG can do but the string instructions that promise to be fast: it runs them a byte at a time, and a kernel that is
/// promised nothing copies a word at a time, which halves the work of a stream.
const CPU: &str = "max,-erms,-fsrm";

/// QEMU may not start programs, change its identity or its place in the scheduler.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// Where our devices are on the memory-mapped bus.
const VSOCK_BUS: &str = "virtio-mmio-bus.7";
const FS_BUS: &str = "virtio-mmio-bus.6";

/// Network devices of a guest from a template; there is no more room beside [`PLUG`].
const NIC_BUSES: [&str; 3] = [
    "virtio-mmio-bus.3",
    "virtio-mmio-bus.2",
    "virtio-mmio-bus.1",
];

/// The most network devices of a guest from a template.
pub(super) const MAX_TEMPLATE_NICS: usize = NIC_BUSES.len();

/// QEMU tells the kernel of the places where it has devices. A guest that gets ours later is told of all places by us instead: theirs
/// first, in the order above, so that they are its slots from 0 on, then those of the entropy source and the console
/// (hw/i386/microvm.c in QEMU's source; `virtio_mmio.device` in the kernel's documentation).
const PLACES: &str = "virtio_mmio.device=512@0xfeb00e00:12 virtio_mmio.device=512@0xfeb00c00:11 \
                      virtio_mmio.device=512@0xfeb00600:8 virtio_mmio.device=512@0xfeb00400:7 \
                      virtio_mmio.device=512@0xfeb00200:6 virtio_mmio.device=512@0xfeb00a00:10 virtio_mmio.device=512@0xfeb00800:9";
const UNTOLD: &str = ",auto-kernel-cmdline=off";

/// A device that the guest is not told of, for the bus behind it: see [`super::qmp`].
const PLUG: &str = "virtio-scsi-device,id=plug,bus=virtio-mmio-bus.0";

/// A device that QEMU is told to add to a guest that has been loaded.
#[derive(Debug)]
pub(super) struct Late {
    pub(super) bus: &'static str,
    /// What is behind a network device.
    pub(super) netdev: Option<Value>,
    pub(super) device: Value,
}

/// All of them; network devices by their addresses.
pub(super) fn late_devices(nics: &[MacAddress]) -> Vec<Late> {
    let vsock =
        json!({ "driver": "vhost-user-vsock-device", "chardev": "vsock", "bus": VSOCK_BUS });
    let fs = json!({ "driver": "vhost-user-fs-device", "chardev": "fs", "bus": FS_BUS,
                     "tag": SHARED_TAG, "iommu_platform": true });
    let ours = [(VSOCK_BUS, vsock), (FS_BUS, fs)].map(|(bus, device)| Late {
        bus,
        netdev: None,
        device,
    });
    let nics = NIC_BUSES.into_iter().zip(nics).enumerate();
    let nics = nics.map(|(number, (bus, mac))| {
        let (chardev, netdev) = (nic_id(number), netdev_id(number));
        let mut device = json!({ "driver": "virtio-net-device", "netdev": netdev, "bus": bus,
                                 "mac": mac_text(*mac) });
        for option in NET_OPTIONS {
            device[option] = false.into();
        }
        let netdev = json!({ "type": "vhost-user", "id": netdev, "chardev": chardev });
        Late {
            bus,
            netdev: Some(netdev),
            device,
        }
    });
    ours.into_iter().chain(nics).collect()
}

/// How a guest comes to life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    /// It boots.
    Boot,
    /// It boots without our devices, to be saved.
    Save,
    /// It comes from a template.
    Load,
}

/// The descriptors that QEMU inherits, by number.
#[derive(Debug, Clone, Default)]
pub(super) struct Inherited {
    /// The guest's memory.
    pub(super) memory: RawFd,
    /// Pipe that gets the guest's console.
    pub(super) console: RawFd,
    /// Unless the guest is to be saved.
    pub(super) devices: Option<DeviceSockets>,
    /// Unless the guest just boots.
    pub(super) control: Option<Control>,
    /// Network devices.
    pub(super) nics: Vec<InheritedNic>,
}

/// A network device of QEMU's.
#[derive(Debug, Clone, Copy)]
pub(super) struct InheritedNic {
    /// The file of a listening vhost-user socket. QEMU takes no connected one for this kind of device (10.0, net/vhost-user.c: "does not
    /// support FD passing").
    pub(super) socket: RawFd,
    pub(super) mac: MacAddress,
}

/// Connected vhost-user sockets.
#[derive(Debug, Clone, Copy)]
pub(super) struct DeviceSockets {
    pub(super) fs: RawFd,
    pub(super) vsock: RawFd,
}

/// What a guest is saved and loaded with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Control {
    /// QEMU's side of its monitor.
    pub(super) monitor: RawFd,
    /// Pipe to the guest's console.
    pub(super) input: RawFd,
    /// File of the devices' state; it is named over the monitor.
    pub(super) state: RawFd,
}

/// The arguments after the program's name; `tsc_khz` is for a kernel that boots.
pub(super) fn arguments(
    spec: &VmSpec,
    inherited: &Inherited,
    start: Start,
    tsc_khz: Option<i64>,
) -> Vec<OsString> {
    let Inherited {
        memory,
        console,
        devices,
        control,
        nics,
    } = inherited;
    // All that the guest may ever have: nothing can be added, and what is not touched costs next to nothing.
    let mib = spec.max_memory_mib;
    let accelerator = if spec.max_vcpus > 1 {
        "tcg,thread=multi"
    } else {
        "tcg"
    };
    let machine = match start {
        Start::Boot => MACHINE.to_owned(),
        Start::Save | Start::Load => format!("{MACHINE}{UNTOLD}"),
    };
    let mut line = Line::default();
    // Whatever is not asked for is not there, and a guest that resets itself has ended.
    line.flag("-nodefaults")
        .flag("-no-user-config")
        .flag("-no-reboot")
        .option("-name", format!("cloison-{}", spec.id))
        .option("-sandbox", SANDBOX)
        .option("-display", "none")
        .option("-machine", machine)
        .option("-accel", accelerator)
        .option("-cpu", CPU)
        .option("-smp", spec.max_vcpus.to_string())
        .option("-m", format!("{mib}M"))
        // Our devices map the guest's memory, so it must be shared; and QEMU leaves it out of the state it saves only if it is a file with a
        // name.
        .option(
            "-object",
            format!(
                "memory-backend-file,id=ram,share=on,size={mib}M,mem-path=/proc/self/fd/{memory}"
            ),
        )
        .option("-global", "virtio-mmio.force-legacy=false")
        .option("-device", "virtio-rng-device,bus=virtio-mmio-bus.5")
        .option("-device", "virtio-serial-device,bus=virtio-mmio-bus.4")
        // A pipe and not a socket, whose buffer would be full after a few lines: the guest writes sixteen bytes at a time.
        .option("-add-fd", format!("fd={console},set=1"));
    let mut chardev = "file,id=console,path=/dev/fdset/1,append=on".to_owned();
    if let Some(Control { monitor, input, .. }) = control {
        line.option("-add-fd", format!("fd={input},set=2"))
            .option("-chardev", format!("socket,id=monitor,fd={monitor}"))
            .option("-mon", "chardev=monitor,mode=control");
        chardev.push_str(",input-path=/dev/fdset/2");
    }
    line.option("-chardev", chardev)
        .option("-device", "virtconsole,chardev=console");
    if let Some(DeviceSockets { fs, vsock }) = devices {
        line.option("-chardev", format!("socket,id=fs,fd={fs}"))
            .option("-chardev", format!("socket,id=vsock,fd={vsock}"));
    }
    for (number, InheritedNic { socket, .. }) in nics.iter().enumerate() {
        let id = nic_id(number);
        line.option(
            "-chardev",
            format!("socket,id={id},path=/proc/self/fd/{socket}"),
        );
    }
    match start {
        Start::Boot => line
            .option(
                "-device",
                format!("vhost-user-fs-device,chardev=fs,tag={SHARED_TAG},iommu_platform=on,bus={FS_BUS}"),
            )
            .option(
                "-device",
                format!("vhost-user-vsock-device,chardev=vsock,bus={VSOCK_BUS}"),
            ),
        Start::Save => line.option("-device", PLUG),
        Start::Load => line
            .option("-device", PLUG)
            .option("-incoming", "defer")
            // It is let go when its devices are there.
            .flag("-S"),
    };
    if start == Start::Boot {
        for (number, InheritedNic { mac, .. }) in nics.iter().enumerate() {
            let (chardev, netdev) = (nic_id(number), netdev_id(number));
            let options = NET_OPTIONS.map(|option| format!(",{option}=off")).concat();
            let mac = mac_text(*mac);
            line.option(
                "-netdev",
                format!("vhost-user,id={netdev},chardev={chardev}"),
            )
            .option(
                "-device",
                format!("virtio-net-device,netdev={netdev},mac={mac}{options}"),
            );
        }
    }
    if start != Start::Load {
        line.option("-kernel", &spec.kernel)
            .option("-initrd", &spec.initramfs)
            .option("-append", kernel_command_line(spec, start, tsc_khz));
    }
    line.0
}

fn nic_id(number: usize) -> String {
    format!("net{number}")
}

fn netdev_id(number: usize) -> String {
    format!("net{number}n")
}

fn mac_text([a, b, c, d, e, f]: MacAddress) -> String {
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

fn kernel_command_line(spec: &VmSpec, start: Start, tsc_khz: Option<i64>) -> String {
    let processors = match spec.max_vcpus {
        1 => ONE_PROCESSOR,
        _ => PROCESSORS,
    };
    let clock = tsc_khz.map_or_else(String::new, |khz| format!(" tsc_early_khz={khz}"));
    let mut words = format!(
        "{CMDLINE} {BOUNCE_BUFFERS}{processors}{clock} {}",
        spec.cmdline
    );
    if let (Start::Save, Some(template)) = (start, &spec.template) {
        words = format!("{words} {PLACES} {}", template.word);
    }
    words
}

/// A command line in the making.
#[derive(Default)]
struct Line(Vec<OsString>);

impl Line {
    fn flag(&mut self, flag: &str) -> &mut Self {
        self.0.push(flag.into());
        self
    }

    fn option(&mut self, option: &str, value: impl Into<OsString>) -> &mut Self {
        self.flag(option);
        self.0.push(value.into());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Engine;

    #[test]
    fn every_word_of_the_spec_is_one_argument_or_a_checked_part_of_one() {
        let spec = VmSpec {
            id: "web-1".into(),
            engine: Engine::Software,
            memory_mib: 96,
            max_memory_mib: 192,
            vcpus: 1,
            max_vcpus: 2,
            spare_nics: 0,
            awaits_nic: false,
            kernel: "/a dir/vm,linux".into(),
            initramfs: "-initramfs".into(),
            cmdline: "agent.debug quiet".into(),
            qemu: "qemu".into(),
            template: None,
        };
        let (fs, vsock) = (10, 11);
        let inherited = Inherited {
            devices: Some(DeviceSockets { fs, vsock }),
            nics: vec![InheritedNic {
                socket: 13,
                mac: [2, 0xc1, 0, 0, 0, 0xa],
            }],
            ..Inherited::default()
        };
        let line = arguments(&spec, &inherited, Start::Boot, Some(2_595_124));
        let after = |option: &str| {
            let at = line.iter().position(|word| word == option).unwrap();
            line[at + 1].to_str().unwrap()
        };
        assert_eq!(after("-kernel"), "/a dir/vm,linux");
        assert_eq!(after("-initrd"), "-initramfs");
        assert_eq!(after("-m"), "192M");
        assert_eq!(after("-smp"), "2");
        assert_eq!(after("-accel"), "tcg,thread=multi");
        assert!(after("-append").ends_with(" maxcpus=1 tsc_early_khz=2595124 agent.debug quiet"));
        let net = line
            .iter()
            .find(|word| word.to_str().unwrap().starts_with("virtio-net-device,"));
        let net = net.unwrap().to_str().unwrap();
        assert!(net.contains(",mac=02:c1:00:00:00:0a,"), "{net}");
        // One without the other would let TCG run what is no longer there.
        let dma = |word: &std::ffi::OsString| {
            let word = word.to_str().unwrap();
            word.starts_with("vhost-user-fs-device,") && word.contains(",iommu_platform=on,")
        };
        assert!(line.iter().any(dma));
        assert!(after("-append").contains(BOUNCE_BUFFERS));
    }
    #[test]
    fn a_guest_that_is_saved_is_told_of_the_places_of_its_devices_and_the_word() {
        let spec = VmSpec {
            template: Some(crate::spec::Template {
                dir: "/templates".into(),
                word: "wait".into(),
                ready: "ready".into(),
            }),
            ..crate::spec::tests::spec()
        };
        let appended = |start| {
            let line = arguments(&spec, &Inherited::default(), start, None);
            let at = line.iter().position(|word| word == "-append");
            at.map(|at| line[at + 1].to_str().unwrap().to_owned())
        };
        let saved = appended(Start::Save).unwrap();
        assert!(
            saved.contains(PLACES) && saved.ends_with(" wait"),
            "{saved}"
        );
        assert!(saved.contains(BOUNCE_BUFFERS));
        assert!(!appended(Start::Boot).unwrap().contains("wait"));
        assert_eq!(appended(Start::Load), None);
    }

    #[test]
    fn the_shared_directory_is_behind_the_guests_dma_layer_when_it_comes_later_too() {
        let devices = late_devices(&[[2, 0xc1, 0, 0, 0, 0xa]]);
        let [_, fs, net] = &devices[..] else {
            panic!("{devices:?}")
        };
        assert_eq!(fs.device["iommu_platform"], true);
        assert_eq!(fs.device["tag"], SHARED_TAG);
        assert_eq!(net.device["mac"], "02:c1:00:00:00:0a");
        assert_eq!(net.device["ctrl_vq"], false);
    }
}
