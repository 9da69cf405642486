//! The guest's CPUs. A VM starts with one; the others are present but parked, so that they cost little at boot, and are brought online
//! when a container may use them (Linux, Documentation/core-api/cpu_hotplug.rst). How many there are, and how many of those the guest
//! may use, is the host's decision: one that the host does not run never answers.

use std::fs;
use std::io;
use std::path::Path;

use libcontainer::oci_spec::runtime::LinuxResources;

const CPUS: &str = "/sys/devices/system/cpu";

/// How many CPUs, counted from the first, these limits let a container use; `None` if they do not limit them.
pub fn usable(resources: Option<&LinuxResources>) -> Option<u32> {
    let cpu = resources?.cpu().as_ref()?;
    let quota = match (cpu.quota(), cpu.period()) {
        (Some(quota), period) if quota > 0 => {
            // The kernel's default period, microseconds.
            let period = period.filter(|period| *period > 0).unwrap_or(100_000);
            Some(quota.unsigned_abs().div_ceil(period))
        }
        _ => None,
    };
    let last = cpu.cpus().as_deref().and_then(|list| numbers(list).max());
    let set = last.map(|last| u64::from(last) + 1);
    let most = quota.max(set)?;
    Some(u32::try_from(most).unwrap_or(u32::MAX))
}

/// Brings the first `count` CPUs online that are present.
///
/// # Errors
/// Naming the CPU that could not be started.
pub fn bring_online(count: u32) -> io::Result<()> {
    bring_online_in(Path::new(CPUS), count)
}

/// Takes all CPUs but the first `count` offline. The very first one stays.
///
/// # Errors
/// Naming the CPU that could not be stopped.
pub fn take_offline(count: u32) -> io::Result<()> {
    take_offline_in(Path::new(CPUS), count.max(1))
}

fn take_offline_in(directory: &Path, count: u32) -> io::Result<()> {
    let online = fs::read_to_string(directory.join("online"))?;
    for cpu in numbers(&online).filter(|cpu| *cpu >= count) {
        let file = directory.join(format!("cpu{cpu}/online"));
        fs::write(&file, "0").map_err(|error| {
            io::Error::new(error.kind(), format!("taking CPU {cpu} offline: {error}"))
        })?;
    }
    Ok(())
}

fn bring_online_in(directory: &Path, count: u32) -> io::Result<()> {
    let read = |file: &str| fs::read_to_string(directory.join(file));
    let present = read("present")?;
    if numbers(&present).take(2).count() < 2 {
        return Ok(());
    }
    let online = read("online")?;
    let online: Vec<u32> = numbers(&online).collect();
    for cpu in numbers(&present).filter(|cpu| *cpu < count && !online.contains(cpu)) {
        let file = directory.join(format!("cpu{cpu}/online"));
        fs::write(&file, "1").map_err(|error| {
            io::Error::new(error.kind(), format!("bringing CPU {cpu} online: {error}"))
        })?;
    }
    Ok(())
}

/// The numbers in a list of the kernel's: "0,2-3". What is no number is left out.
fn numbers(list: &str) -> impl Iterator<Item = u32> {
    list.trim().split(',').flat_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        match (first.parse::<u32>(), last.parse::<u32>()) {
            (Ok(first), Ok(last)) => first..last.saturating_add(1),
            _ => 0..0,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resources(cpu: &str) -> LinuxResources {
        serde_json::from_str(&format!("{{\"cpu\":{cpu}}}")).unwrap()
    }

    #[test]
    fn lists_are_read_as_the_kernel_writes_them_and_nonsense_is_nothing() {
        let read = |list| numbers(list).collect::<Vec<_>>();
        assert_eq!(read("0,2-4\n"), [0, 2, 3, 4]);
        assert_eq!(read("0\n"), [0]);
        for nothing in ["", "\n", "x", "3-1", "1-2-3", "-1"] {
            assert_eq!(read(nothing), [] as [u32; 0], "{nothing:?}");
        }
    }

    #[test]
    fn a_quota_and_a_set_say_how_many_cpus_are_of_use() {
        for (cpu, expected) in [
            (r#"{"quota":150000,"period":100000}"#, Some(2)),
            (r#"{"quota":200000}"#, Some(2)),
            (r#"{"quota":1,"period":100000}"#, Some(1)),
            (r#"{"quota":-1,"period":100000}"#, None),
            (r#"{"quota":100000,"period":0}"#, Some(1)),
            (r#"{"cpus":"0,3"}"#, Some(4)),
            (r#"{"cpus":"0-1","quota":400000,"period":100000}"#, Some(4)),
            (r#"{"cpus":""}"#, None),
            (r#"{"shares":100}"#, None),
            (
                r#"{"quota":9223372036854775807,"period":1}"#,
                Some(u32::MAX),
            ),
        ] {
            assert_eq!(usable(Some(&resources(cpu))), expected, "{cpu}");
        }
        assert_eq!(usable(None), None);
    }

    #[test]
    fn parked_cpus_up_to_the_count_are_started_and_no_others() {
        let directory = tempfile::tempdir().unwrap();
        let put = |file: &str, text: &str| {
            let file = directory.path().join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        };
        put("present", "0-3\n");
        put("online", "0-1\n");
        put("cpu2/online", "0");
        put("cpu3/online", "0");
        let state = |cpu: u32| {
            fs::read_to_string(directory.path().join(format!("cpu{cpu}/online"))).unwrap()
        };
        bring_online_in(directory.path(), 2).unwrap();
        assert_eq!((state(2), state(3)), ("0".into(), "0".into()));
        bring_online_in(directory.path(), 3).unwrap();
        assert_eq!((state(2), state(3)), ("1".into(), "0".into()));
        put("online", "0-3\n");
        take_offline_in(directory.path(), 3).unwrap();
        assert_eq!((state(2), state(3)), ("1".into(), "0".into()));
        put("online", "0-1\n");
        fs::remove_dir_all(directory.path().join("cpu3")).unwrap();
        let error = bring_online_in(directory.path(), 4).unwrap_err();
        assert!(error.to_string().contains("CPU 3"), "{error}");
        put("online", "0-3\n");
        let error = take_offline_in(directory.path(), 3).unwrap_err();
        assert!(error.to_string().contains("CPU 3"), "{error}");
    }
}
