//! QEMU's command line. Each option is there for a reason that is said beside it; what is passed as a number is a descriptor
//! that QEMU inherits.

use std::ffi::OsString;
use std::os::fd::RawFd;

use cloison_devices::MacAddress;

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
const NET_OPTIONS: &str = "ctrl_vq=off,ctrl_rx=off,ctrl_vlan=off,ctrl_rx_extra=off,ctrl_mac_addr=off,\
    ctrl_guest_offloads=off,guest_announce=off";

/// One processor does without its local timer, whose calibration takes the kernel a fifth of a second; more would have to send
/// each other every tick.
const ONE_PROCESSOR: &str = " nolapic_timer";

/// Interrupts need a controller (pic), the kernel calibrates its clocks by the timer (pit), and without a clock of the time
/// of day (rtc) it looks for one for a second. Firmware tables, option ROMs and a serial port would only cost time.
const MACHINE: &str =
    "microvm,pit=on,pic=on,rtc=on,acpi=off,x-option-roms=off,isa-serial=off,memory-backend=ram";

/// All that TCG can do but the string instructions that promise to be fast: it runs them a byte at a time, and a kernel that is
/// promised nothing copies a word at a time, which halves the work of a stream.
const CPU: &str = "max,-erms,-fsrm";

/// QEMU may not start programs, change its identity or its place in the scheduler.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// The descriptors that QEMU inherits, by number.
#[derive(Debug, Clone)]
pub(super) struct Inherited {
    /// Connected vhost-user socket of the fs device.
    pub(super) fs: RawFd,
    /// Connected vhost-user socket of the vsock device.
    pub(super) vsock: RawFd,
    /// Pipe that gets the guest's console.
    pub(super) console: RawFd,
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

/// The arguments after the program's name.
pub(super) fn arguments(spec: &VmSpec, inherited: &Inherited) -> Vec<OsString> {
    let Inherited {
        fs,
        vsock,
        console,
        nics,
    } = inherited;
    let memory = spec.memory_mib;
    let alone = if spec.vcpus == 1 { ONE_PROCESSOR } else { "" };
    let pairs = [
        ("-name", format!("cloison-{}", spec.id)),
        ("-sandbox", SANDBOX.into()),
        ("-display", "none".into()),
        ("-machine", MACHINE.into()),
        (
            "-accel",
            if spec.vcpus > 1 {
                "tcg,thread=multi"
            } else {
                "tcg"
            }
            .into(),
        ),
        ("-cpu", CPU.into()),
        ("-smp", spec.vcpus.to_string()),
        ("-m", format!("{memory}M")),
        // Our devices map the guest's memory, so it must be a file that can be passed on.
        (
            "-object",
            format!("memory-backend-memfd,id=ram,share=on,size={memory}M"),
        ),
        (
            "-append",
            format!("{CMDLINE} {BOUNCE_BUFFERS}{alone} {}", spec.cmdline),
        ),
        ("-global", "virtio-mmio.force-legacy=false".into()),
        ("-chardev", format!("socket,id=fs,fd={fs}")),
        (
            "-device",
            format!("vhost-user-fs-device,chardev=fs,tag={SHARED_TAG},iommu_platform=on"),
        ),
        ("-chardev", format!("socket,id=vsock,fd={vsock}")),
        ("-device", "vhost-user-vsock-device,chardev=vsock".into()),
        ("-device", "virtio-rng-device".into()),
        // A pipe and not a socket, whose buffer would be full after a few lines: the guest writes sixteen bytes at a time.
        ("-add-fd", format!("fd={console},set=1")),
        (
            "-chardev",
            "file,id=console,path=/dev/fdset/1,append=on".into(),
        ),
        ("-device", "virtio-serial-device".into()),
        ("-device", "virtconsole,chardev=console".into()),
    ];
    // Whatever is not asked for is not there, and a guest that resets itself has ended.
    let flags = ["-nodefaults", "-no-user-config", "-no-reboot"].map(OsString::from);
    let files = [("-kernel", &spec.kernel), ("-initrd", &spec.initramfs)];
    let nics = (0..)
        .zip(nics)
        .flat_map(|(number, nic)| nic_options(number, nic));
    let pairs = pairs
        .into_iter()
        .chain(nics)
        .map(|(option, value)| (option, OsString::from(value)));
    let files = files
        .into_iter()
        .map(|(option, path)| (option, OsString::from(path)));
    let pairs = pairs
        .chain(files)
        .flat_map(|(option, value)| [OsString::from(option), value]);
    flags.into_iter().chain(pairs).collect()
}

fn nic_options(number: usize, nic: &InheritedNic) -> [(&'static str, String); 3] {
    let InheritedNic { socket, mac } = nic;
    let [a, b, c, d, e, f] = mac;
    let mac = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
    let id = format!("net{number}");
    [
        (
            "-chardev",
            format!("socket,id={id},path=/proc/self/fd/{socket}"),
        ),
        ("-netdev", format!("vhost-user,id={id}n,chardev={id}")),
        (
            "-device",
            format!("virtio-net-device,netdev={id}n,mac={mac},{NET_OPTIONS}"),
        ),
    ]
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
            memory_mib: 192,
            max_memory_mib: 192,
            vcpus: 2,
            max_vcpus: 2,
            spare_nics: 0,
            kernel: "/a dir/vm,linux".into(),
            initramfs: "-initramfs".into(),
            cmdline: "agent.debug quiet".into(),
            qemu: "qemu".into(),
        };
        let line = arguments(
            &spec,
            &Inherited {
                fs: 10,
                vsock: 11,
                console: 12,
                nics: vec![InheritedNic {
                    socket: 13,
                    mac: [2, 0xc1, 0, 0, 0, 0xa],
                }],
            },
        );
        let after = |option: &str| {
            let at = line.iter().position(|word| word == option).unwrap();
            line[at + 1].to_str().unwrap()
        };
        assert_eq!(after("-kernel"), "/a dir/vm,linux");
        assert_eq!(after("-initrd"), "-initramfs");
        assert_eq!(after("-m"), "192M");
        assert_eq!(after("-smp"), "2");
        assert_eq!(after("-accel"), "tcg,thread=multi");
        assert!(after("-append").ends_with(" agent.debug quiet"));
        let net = line
            .iter()
            .find(|word| word.to_str().unwrap().starts_with("virtio-net-device,"));
        let net = net.unwrap().to_str().unwrap();
        assert!(net.contains(",mac=02:c1:00:00:00:0a,"), "{net}");
        // One without the other would let TCG run what is no longer there.
        let dma = |word: &std::ffi::OsString| {
            let word = word.to_str().unwrap();
            word.starts_with("vhost-user-fs-device,") && word.ends_with(",iommu_platform=on")
        };
        assert!(line.iter().any(dma));
        assert!(after("-append").contains(BOUNCE_BUFFERS));
    }
}
