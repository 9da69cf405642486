//! Volumes, tmpfs, read-only root file systems, and what stays of a run.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::host::{Host, busybox, fail, succeed};

#[test]
fn a_directory_of_the_host_is_shared_both_ways_with_owners_and_modes() {
    let host = Host::new();
    let dir = host.path("shared");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("from-host"), "host\n").unwrap();
    let volume = format!("{}:/data/deep", dir.display());
    let script = "cat /data/deep/from-host; echo guest > /data/deep/from-guest; chown 1000:2000 /data/deep/from-guest;
        chmod 640 /data/deep/from-guest; mkdir /data/deep/d; ln -s from-guest /data/deep/link; mv /data/deep/d /data/deep/e";
    assert_eq!(host.shell(&["-v", &volume], script), "host\n");
    let made = fs::metadata(dir.join("from-guest")).unwrap();
    assert_eq!(
        (made.uid(), made.gid(), made.permissions().mode() & 0o7777),
        (1000, 2000, 0o640)
    );
    assert_eq!(fs::read_to_string(dir.join("link")).unwrap(), "guest\n");
    assert!(dir.join("e").is_dir() && !dir.join("d").exists());
}

#[test]
fn what_changes_on_the_host_is_seen_by_a_container_that_runs() {
    let host = Host::new();
    let dir = host.path("shared");
    fs::create_dir(&dir).unwrap();
    let volume = format!("{}:/data", dir.display());
    let id = host.detached(&["-v", &volume], &["sleep", "1000"]);
    fs::write(dir.join("new"), "one").unwrap();
    assert_eq!(
        succeed(&host.cloison(["exec", &id, "cat", "/data/new"])),
        "one"
    );
    fs::write(dir.join("new"), "three").unwrap();
    let script = "while test \"$(cat /data/new)\" != three; do sleep 0.1; done; echo seen";
    assert_eq!(
        succeed(&host.cloison(["exec", &id, "sh", "-c", script])),
        "seen\n"
    );
    succeed(&host.cloison(["rm", "-f", &id]));
}

#[test]
fn a_single_file_can_be_a_volume_and_a_read_only_one_cannot_be_written() {
    let host = Host::new();
    let file = host.file("settings", "value\n");
    let volume = format!("{}:/etc/settings:ro", file.display());
    let output = host.shell(
        &["-v", &volume],
        "cat /etc/settings; echo x 2>/dev/null > /etc/settings || echo refused",
    );
    assert_eq!(output, "value\nrefused\n");
    assert_eq!(fs::read_to_string(&file).unwrap(), "value\n");
}

#[test]
fn a_container_may_end_while_its_last_reads_are_under_way() {
    let host = Host::new();
    let dir = host.path("shared");
    fs::create_dir(&dir).unwrap();
    let file = fs::File::create(dir.join("large")).unwrap();
    file.set_len(64 << 20).unwrap();
    io::copy(&mut io::repeat(b'x').take(64 << 20), &mut &file).unwrap();
    file.sync_all().unwrap();
    let volume = format!("{}:/data", dir.display());
    for round in 1..=10 {
        // Read from the disk, what the guest reads ahead takes longer than the process lives.
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        let count = format!("count={}", 200 + 10 * round);
        let skip = format!("skip={}", 1000 * round);
        let dd = [
            "dd",
            "if=/data/large",
            "of=/dev/null",
            "bs=4k",
            &count,
            &skip,
        ];
        succeed(&host.run(&["-v", &volume], &dd));
    }
}

#[test]
fn a_read_only_volume_cannot_be_made_writable_from_inside() {
    let host = Host::new();
    let file = host.file("settings", "value\n");
    let volume = format!("{}:/etc/settings:ro", file.display());
    let script = "mount -o remount,rw,bind /etc/settings && echo x > /etc/settings || echo refused";
    let output = host.run(&["-v", &volume, "--cap-add", "ALL"], &["sh", "-c", script]);
    assert_eq!(
        succeed(&output),
        "refused\n",
        "the host's own mount must be read-only"
    );
    assert_eq!(fs::read_to_string(&file).unwrap(), "value\n");
}

#[test]
fn a_volume_source_that_is_missing_is_an_error_before_anything_runs() {
    let host = Host::new();
    fail(
        &host.run(&["-v", "/nonexistent/dir:/data"], &["true"]),
        125,
        &["/nonexistent/dir", "does not exist"],
    );
    fail(
        &host.run(&["-v", "relative:/data"], &["true"]),
        125,
        &["relative"],
    );
}

#[test]
fn a_tmpfs_has_the_size_and_mode_asked_for() {
    let host = Host::new();
    let script = "df -k /scratch | tail -1 | awk '{print $2}'; stat -c %a /scratch; echo x > /scratch/f && cat /scratch/f";
    assert_eq!(
        host.shell(&["--tmpfs", "/scratch:size=1m,mode=1777"], script),
        "1024\n1777\nx\n"
    );
}

#[test]
fn a_read_only_container_can_write_only_to_its_volumes() {
    let host = Host::new();
    let script = "touch /x 2>/dev/null || echo root refused; touch /t/x && echo tmpfs written";
    assert_eq!(
        host.shell(&["--read-only", "--tmpfs", "/t"], script),
        "root refused\ntmpfs written\n"
    );
}

#[test]
fn a_run_changes_neither_its_image_nor_the_next_run() {
    let host = Host::new();
    host.shell(&[], "echo changed > /etc/passwd; rm -rf /bin; :");
    assert_eq!(
        host.shell(&[], "head -n 1 /etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\n"
    );

    let root = host.path("root");
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    let reference = format!("rootfs:{}", root.display());
    let output = host.cloison([
        "run",
        "--rm",
        &reference,
        "/bin/busybox",
        "sh",
        "-c",
        "echo made > /made; /bin/busybox cat /made",
    ]);
    assert_eq!(succeed(&output), "made\n");
    let names: Vec<_> = fs::read_dir(&root)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["bin"]);
}

#[test]
fn the_root_file_system_behaves_like_a_file_system() {
    let host = Host::new();
    let script = r#"
        set -e; cd /tmp
        echo a > f; ln f g; test "$(stat -c %h f)" = 2; mkfifo p; (echo through > p &) ; cat p
        mknod null c 1 3; echo x > null; chmod 4755 f; stat -c %a f
        dd if=/dev/urandom of=big bs=1M count=8 2>/dev/null; cp big copy; cmp big copy; truncate -s 100 big; stat -c %s big
        mkdir -p deep/er; for n in $(seq 300); do echo $n > deep/er/$n; done; ls deep/er | wc -l; rm -r deep; ls -d deep 2>/dev/null || echo gone
        exec 3>open; rm open; echo unlinked >&3
    "#;
    assert_eq!(host.shell(&[], script), "through\n4755\n100\n300\ngone\n");
}

#[test]
fn an_image_archive_can_be_run() {
    let host = Host::new();
    let image = busybox();
    assert_eq!(
        succeed(&host.cloison(["run", "--rm", &format!("{image}:latest"), "echo", "tagged"])),
        "tagged\n"
    );
    fail(
        &host.cloison(["run", "--rm", &format!("{image}:nonesuch"), "true"]),
        125,
        &["nonesuch", "latest"],
    );
}
