//! VMs that start from a template: each is a guest of its own, and whatever becomes of the template, they start.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::host::{Host, busybox, dist, succeed, text};

fn templates(host: &Host) -> Vec<PathBuf> {
    let entries = fs::read_dir(host.data_dir().join("templates"));
    let entries = entries.into_iter().flatten();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// What the VM of a container began as.
fn origin(host: &Host, options: &[&str]) -> String {
    let id = host.detached(options, &["true"]);
    let status = succeed(&host.cloison(["wait", &id]));
    let container = host.inspect(&id);
    assert_eq!(status, "0\n", "{container}");
    let origin = container["VM"]["Origin"].clone();
    succeed(&host.cloison(["rm", &id]));
    origin.as_str().unwrap().to_owned()
}

#[test]
fn no_two_guests_of_a_template_have_the_same_random_numbers() {
    let host = Host::with_own_data();
    let script = "cd /proc/sys/kernel/random; cat uuid boot_id; head -c 16 /dev/urandom | od -x";
    let first = host.shell(&[], script);
    let second = host.shell(&[], script);
    assert_eq!(templates(&host).len(), 1);
    for (first, second) in first.lines().zip(second.lines()).take(3) {
        assert_ne!(first, second);
    }
}

#[test]
fn a_guest_of_a_template_knows_the_time_and_sleeps_as_long_as_it_should() {
    let host = Host::with_own_data();
    assert_eq!(origin(&host, &[]), "template");
    let seconds = || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        now.unwrap().as_secs()
    };
    let (before, began) = (seconds(), Instant::now());
    let script = "date +%s; cut -d ' ' -f 1 /proc/uptime; sleep 2; cut -d ' ' -f 1 /proc/uptime";
    let output = host.shell(&[], script);
    let took = began.elapsed().as_secs_f64();
    let numbers: Vec<f64> = output.lines().map(|line| line.parse().unwrap()).collect();
    let [date, slept, woke] = numbers[..] else {
        panic!("{output}")
    };
    assert!(
        (before as f64..=seconds() as f64).contains(&date),
        "{date}, {before}"
    );
    assert!(
        (2.0..=took).contains(&(woke - slept)),
        "{slept} to {woke}, of {took}"
    );
}

#[test]
fn a_profile_says_what_the_template_took() {
    let host = Host::with_own_data();
    let profile = || text(&host.run(&["--profile"], &["true"]).stderr);
    let (first, second) = (profile(), profile());
    let made = "VM process: making the template";
    let used = "guest: coming out of the template";
    assert!(first.contains(made) && first.contains(used), "{first}");
    assert!(!second.contains(made) && second.contains(used), "{second}");
}

#[test]
fn a_damaged_template_is_replaced() {
    let host = Host::with_own_data();
    assert_eq!(origin(&host, &[]), "template");
    let [template] = &templates(&host)[..] else {
        panic!("not one template")
    };
    let whole = fs::metadata(template).unwrap().len();
    let damages: [fn(&fs::File, u64); 4] = [
        |file, whole| file.set_len(whole / 2).unwrap(),
        |file, _| file.set_len(0).unwrap(),
        |file, whole| file.write_all_at(b"damage", whole / 2).unwrap(),
        |file, _| file.write_all_at(b"damage", 30).unwrap(),
    ];
    for damage in damages {
        let file = OpenOptions::new().write(true).open(template).unwrap();
        damage(&file, whole);
        drop(file);
        assert_eq!(origin(&host, &[]), "template");
        assert_eq!(templates(&host).len(), 1);
    }
}

#[test]
fn two_runs_that_make_a_template_at_once_make_one() {
    let host = Host::with_own_data();
    let image = busybox();
    let run = || host.spawn(["run", "--rm", &image, "echo", "done"]);
    let runs = [run(), run()];
    for run in runs {
        assert_eq!(succeed(&run.wait_with_output().unwrap()), "done\n");
    }
    assert_eq!(templates(&host).len(), 1);
}

#[test]
fn another_kernel_has_another_template() {
    let host = Host::with_own_data();
    assert_eq!(origin(&host, &[]), "template");
    let kernel = host.path("vmlinux");
    fs::copy(dist().join("vmlinux"), &kernel).unwrap();
    let kernel = kernel.to_str().unwrap();
    assert_eq!(origin(&host, &["--kernel", kernel]), "template");
    assert_eq!(templates(&host).len(), 2);
}

#[test]
fn a_template_is_removed_by_prune_and_can_be_done_without() {
    let host = Host::with_own_data();
    assert_eq!(origin(&host, &["--template", "off"]), "boot");
    assert_eq!(templates(&host).len(), 0);
    assert_eq!(origin(&host, &["--memory", "64m"]), "template");
    assert_eq!(templates(&host).len(), 1);
    succeed(&host.cloison(["prune", "-f"]));
    assert!(!host.data_dir().join("templates").exists());
}

#[test]
fn a_guest_boots_where_no_template_can_be_kept() {
    let host = Host::with_own_data();
    fs::create_dir_all(host.data_dir()).unwrap();
    fs::write(host.data_dir().join("templates"), "no directory").unwrap();
    assert_eq!(origin(&host, &[]), "boot");
}
