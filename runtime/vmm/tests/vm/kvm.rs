//! What only the KVM engine does. The guests of the first tests are a few instructions of our own, which any KVM can run; the others
//! need one that can boot a kernel.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use cloison_vmm::{ControlError, DeviceKind, End, EndReason, Engine, State};

use crate::support::{Bench, engine, wait};

crate::tests![
    a_guest_whose_processor_gives_up_is_a_triple_fault,
    a_guest_that_kvm_cannot_go_on_with_is_an_internal_error_of_kvm,
    a_guest_that_pulls_the_reset_line_without_a_word_was_reset,
    a_kernel_that_reboots_by_triple_fault_is_told_from_one_that_resets,
    a_device_and_a_cpu_that_come_while_the_guest_runs_are_taken_up,
    a_vm_takes_no_more_vcpus_devices_and_slots_than_it_has,
    memory_comes_and_goes_while_the_guest_runs,
    memory_that_a_guest_has_freed_goes_back_to_the_host,
];

/// Where the guest's instructions are.
const ENTRY: u64 = 0x100_0000;

/// A kernel that is nothing but these instructions (System V ABI, "ELF Header" and "Program Header").
fn kernel_of(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    file.resize(16, 0);
    for half in [2_u16, 62] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1_u32.to_le_bytes());
    for word in [ENTRY, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    // One segment to be loaded, readable and executable.
    file.extend(1_u32.to_le_bytes());
    file.extend(5_u32.to_le_bytes());
    let size = code.len() as u64;
    for word in [0x1000, ENTRY, ENTRY, size, size, 0x1000] {
        file.extend(word.to_le_bytes());
    }
    file.resize(0x1000, 0);
    file.extend(code);
    file
}

/// How a guest of these instructions ends; `None` where there is no KVM.
fn run(code: &[u8]) -> Option<End> {
    if !Path::new("/dev/kvm").exists() {
        println!("skipped: there is no /dev/kvm");
        return None;
    }
    let mut bench = Bench::with_fake_qemu("exit 1");
    bench.spec.engine = Engine::Kvm;
    bench.spec.kernel = bench.path().join("kernel");
    bench.spec.initramfs = bench.path().join("initramfs");
    fs::write(&bench.spec.kernel, kernel_of(code)).unwrap();
    fs::write(&bench.spec.initramfs, [0; 512]).unwrap();
    Some(bench.run())
}

fn a_guest_whose_processor_gives_up_is_a_triple_fault() {
    // An invalid instruction, and no table of handlers: ud2.
    let Some(end) = run(&[0x0f, 0x0b]) else {
        return;
    };
    assert_eq!(end.reason, EndReason::TripleFault, "{end:?}");
}

fn a_guest_that_kvm_cannot_go_on_with_is_an_internal_error_of_kvm() {
    // Instructions where there is no memory: mov eax, 0x20000000; jmp rax.
    let Some(end) = run(&[0xb8, 0, 0, 0, 0x20, 0xff, 0xe0]) else {
        return;
    };
    assert_eq!(end.reason, EndReason::KvmInternalError, "{end:?}");
    assert!(end.message.contains("0x20000000"), "{}", end.message);
}

fn a_guest_that_pulls_the_reset_line_without_a_word_was_reset() {
    // mov al, 0xfe; out 0x64, al.
    let Some(end) = run(&[0xb0, 0xfe, 0xe6, 0x64]) else {
        return;
    };
    assert_eq!(end.reason, EndReason::GuestReset, "{end:?}");
}

/// A guest with this init under KVM; `None` where another engine is tested.
fn with_init(script: &str) -> Option<Bench> {
    if engine() != Engine::Kvm {
        return None;
    }
    Bench::with_init(script)
}

fn until_logged(bench: &Bench, text: &str) {
    let control = bench.control();
    let begun = Instant::now();
    loop {
        let log = control.kernel_log().unwrap();
        if log.contains(text) {
            return;
        }
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "{text:?} is not in:\n{log}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn a_kernel_that_reboots_by_triple_fault_is_told_from_one_that_resets() {
    let Some(mut bench) = with_init("/busybox reboot -f") else {
        return;
    };
    bench.spec.cmdline = "reboot=t".into();
    assert_eq!(bench.run().reason, EndReason::TripleFault);
}

fn a_device_and_a_cpu_that_come_while_the_guest_runs_are_taken_up() {
    // The guest looks into the first slot that was empty at its boot until there is something in it.
    let script = "export PATH=/; b() { /busybox \"$@\"; }
        b mkdir /sys; b mount -t sysfs sysfs /sys; cpu=/sys/devices/system/cpu
        echo \"CPUs $(b cat $cpu/online) of $(b cat $cpu/present)\" >/dev/hvc0
        cd /sys/bus/platform/drivers/virtio-mmio
        until echo virtio-mmio.2 >bind; do b usleep 50000; done
        echo \"found $(b head -c 3 /dev/vda)\" >/dev/hvc0
        echo 1 >$cpu/cpu1/online; echo \"CPUs are $(b cat $cpu/online)\" >/dev/hvc0
        echo virtio-mmio.2 >unbind; echo gone >/dev/hvc0; b sleep 1000";
    let Some(mut bench) = with_init(script) else {
        return;
    };
    bench.spec.max_vcpus = 3;
    let mut process = bench.launch().unwrap();
    until_logged(&bench, "CPUs 0 of 0-2");
    let control = bench.control();
    let status = control.status().unwrap();
    assert_eq!((status.vcpus, status.max_vcpus), (1, 3));
    control.resize_vcpus(2).unwrap();
    assert_eq!(control.status().unwrap().vcpus, 2);
    let disk = bench.path().join("disk");
    fs::write(&disk, [b'd'; 4096]).unwrap();
    let disk = fs::File::open(disk).unwrap();
    let kind = DeviceKind::Blk {
        read_only: true,
        serial: "data".into(),
    };
    let slot = control.plug(kind, Some(disk.as_fd())).unwrap().slot;
    assert_eq!(slot, 2);
    until_logged(&bench, "found ddd");
    until_logged(&bench, "CPUs are 0-1");
    until_logged(&bench, "gone");
    control.unplug(slot).unwrap();
    assert_eq!(control.plug(DeviceKind::Rng, None).unwrap().slot, slot);
    control.kill().unwrap();
    assert_eq!(wait(&mut process).reason, EndReason::Killed);
}

fn a_vm_takes_no_more_vcpus_devices_and_slots_than_it_has() {
    let Some(mut bench) = with_init("echo ready >/dev/hvc0; /busybox sleep 1000") else {
        return;
    };
    bench.spec.max_vcpus = 2;
    let mut process = bench.launch().unwrap();
    until_logged(&bench, "ready");
    let control = bench.control();
    let refused = |result: Result<(), ControlError>| {
        assert!(
            matches!(result, Err(ControlError::Refused(_))),
            "{result:?}"
        );
    };
    refused(control.resize_vcpus(0));
    refused(control.resize_vcpus(3));
    for slot in [0, 1, 4, 5, 15, 16, u32::MAX] {
        refused(control.unplug(slot));
    }
    let disk = DeviceKind::Blk {
        read_only: false,
        serial: String::new(),
    };
    refused(control.plug(disk.clone(), None).map(drop));
    let nothing = fs::File::open("/dev/null").unwrap();
    refused(control.plug(disk, Some(nothing.as_fd())).map(drop));
    refused(
        control
            .plug(DeviceKind::Rng, Some(nothing.as_fd()))
            .map(drop),
    );
    while control.plug(DeviceKind::Rng, None).is_ok() {}
    refused(control.plug(DeviceKind::Rng, None).map(drop));
    control.resize_vcpus(2).unwrap();
    control.resize_vcpus(1).unwrap();
    assert_eq!(control.status().unwrap().state, State::Running);
    control.kill().unwrap();
    assert_eq!(wait(&mut process).reason, EndReason::Killed);
}

/// The number at the end of the last line in the guest's log that begins with `word`.
fn last_number(bench: &Bench, word: &str) -> Option<u64> {
    let log = bench.control().kernel_log().unwrap();
    let mut lines = log.lines().rev();
    let line = lines.find(|line| line.starts_with(word));
    line?.rsplit(' ').next()?.trim().parse().ok()
}

fn until(what: &str, done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn memory_comes_and_goes_while_the_guest_runs() {
    let script = "export PATH=/; b() { /busybox \"$@\"; }; b mkdir /proc; b mount -t proc proc /proc
        while true; do echo \"total $(b awk '/MemTotal/ {print $2}' /proc/meminfo)\" >/dev/hvc0; b usleep 200000; done";
    let Some(mut bench) = with_init(script) else {
        return;
    };
    bench.spec.max_memory_mib = 512;
    let mut process = bench.launch().unwrap();
    until("no word from the guest", || {
        last_number(&bench, "total").is_some()
    });
    let before = last_number(&bench, "total").unwrap();
    let control = bench.control();
    let status = control.status().unwrap();
    assert_eq!((status.memory_mib, status.max_memory_mib), (128, 512));
    control.resize_memory(512, None).unwrap();
    until("no memory came", || {
        last_number(&bench, "total").unwrap() == before + (384 << 10)
    });
    assert_eq!(control.status().unwrap().memory_mib, 512);
    control.resize_memory(256, None).unwrap();
    until("no memory went", || {
        control.status().unwrap().memory_mib == 256
    });
    for mib in [0, 127, 513, u32::MAX] {
        let refused = control.resize_memory(mib, None);
        assert!(
            matches!(refused, Err(ControlError::Refused(_))),
            "{mib} MiB: {refused:?}"
        );
    }
    control.kill().unwrap();
    assert_eq!(wait(&mut process).reason, EndReason::Killed);
}

fn memory_that_a_guest_has_freed_goes_back_to_the_host() {
    let script =
        "export PATH=/; b() { /busybox \"$@\"; }; b mkdir /tmp; b mount -t tmpfs tmpfs /tmp
        b dd if=/dev/zero of=/tmp/x bs=1M count=64 2>/dev/null; echo filled >/dev/hvc0; b sleep 3
        b rm /tmp/x; echo freed >/dev/hvc0; b sleep 1000";
    let Some(mut bench) = with_init(script) else {
        return;
    };
    bench.spec.memory_mib = 256;
    bench.spec.max_memory_mib = 256;
    let mut process = bench.launch().unwrap();
    let pid = process.pid().as_raw().unsigned_abs();
    until_logged(&bench, "filled");
    let most = crate::guest::anonymous_kib(pid);
    assert!(most > 64 << 10, "{most} KiB");
    until_logged(&bench, "freed");
    until("no page went back", || {
        crate::guest::anonymous_kib(pid) < most - (48 << 10)
    });
    bench.control().kill().unwrap();
    assert_eq!(wait(&mut process).reason, EndReason::Killed);
}
