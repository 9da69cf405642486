//! What a guest can make the device hold, and that files are found again when the device has let go of them.

use std::fs;
use std::os::fd::AsFd;

use fuse_backend_rs::abi::fuse_abi::*;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vm_memory::ByteValued;

use super::client::*;
use crate::FsLimits;

/// Few enough descriptors that a handful of files takes them all.
const NARROW: FsLimits = FsLimits {
    descriptors: 4,
    ..WIDE
};

fn files(client: &Client, n: usize) {
    for i in 0..n {
        fs::write(client.host(format!("f{i}")), i.to_string()).unwrap();
    }
}

/// Has other files take every descriptor there is.
fn crowd_out(client: &mut Client) {
    for i in 0..20 {
        let at = format!("other{i}");
        fs::write(client.host(&at), b"").unwrap();
        client.lookup(ROOT, &at).unwrap();
    }
}

fn is_readable(fd: impl AsFd) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).unwrap() > 0
}

#[test]
fn a_forgotten_file_costs_nothing() {
    let mut client = Client::new();
    files(&client, 10);
    let mut nodes = Vec::new();
    for i in 0..10 {
        nodes.push(client.lookup(ROOT, &format!("f{i}")).unwrap().node);
    }
    client.lookup(ROOT, "f0").unwrap();
    assert_eq!(client.fs.usage().inodes, 11);
    client.forget(nodes[0], 1);
    assert_eq!(client.fs.usage().inodes, 11, "it was looked up twice");
    client.forget(nodes[0], 1);
    let one = |node: &u64| ForgetOne {
        nodeid: *node,
        nlookup: 1,
    };
    let rest: Vec<u8> = nodes[1..]
        .iter()
        .flat_map(|node| one(node).as_slice().to_vec())
        .collect();
    let head = BatchForgetIn { count: 9, dummy: 0 };
    client.tell(Opcode::BatchForget, 0, &body(head, &rest));
    let usage = client.fs.usage();
    assert_eq!((usage.inodes, usage.descriptors), (1, 1));
    assert_eq!(client.getattr(nodes[3]).unwrap_err(), libc::ESTALE);
}

#[test]
fn a_number_is_never_used_again_so_a_late_forget_hits_nothing() {
    let mut client = Client::new();
    let (old, fh) = client.create(ROOT, "a", libc::O_RDWR, 0o644, 0).unwrap();
    client.release(old.node, fh).unwrap();
    client.unlink(ROOT, "a").unwrap();
    client.forget(old.node, 1);
    let (new, _) = client.create(ROOT, "a", libc::O_RDWR, 0o644, 0).unwrap();
    assert_ne!(new.node, old.node);
    client.forget(old.node, 1);
    client.getattr(new.node).unwrap();
}

#[test]
fn forgetting_more_than_was_known_is_forgetting() {
    let mut client = Client::new();
    files(&client, 1);
    let file = client.lookup(ROOT, "f0").unwrap().node;
    for node in [0, 2_000_000, u64::MAX, ROOT] {
        client.forget(node, u64::MAX);
    }
    client.forget(file, u64::MAX);
    assert_eq!(client.fs.usage().inodes, 1);
    client.getattr(ROOT).unwrap();
}

#[test]
fn one_file_too_many_is_refused_until_another_is_forgotten() {
    let mut client = Client::with(FsLimits { inodes: 6, ..WIDE });
    files(&client, 10);
    let mut nodes = Vec::new();
    for i in 0..5 {
        nodes.push(client.lookup(ROOT, &format!("f{i}")).unwrap().node);
    }
    assert_eq!(client.lookup(ROOT, "f5").unwrap_err(), libc::ENFILE);
    assert_eq!(client.lookup(ROOT, "f4").unwrap().node, nodes[4]);
    client.forget(nodes[0], 1);
    client.lookup(ROOT, "f5").unwrap();
    assert_eq!(client.fs.usage().inodes, 6);
}

#[test]
fn one_open_file_too_many_is_refused_before_anything_is_created() {
    let mut client = Client::with(FsLimits { open: 3, ..WIDE });
    files(&client, 1);
    let file = client.lookup(ROOT, "f0").unwrap().node;
    let fh = client.open(file, libc::O_RDONLY).unwrap().fh;
    client.open(file, libc::O_RDONLY).unwrap();
    client.opendir(ROOT).unwrap();
    let truncate = libc::O_RDWR | libc::O_TRUNC;
    assert_eq!(client.open(file, truncate).unwrap_err(), libc::ENFILE);
    assert_eq!(fs::read(client.host("f0")).unwrap(), b"0");
    assert_eq!(client.opendir(ROOT), Err(libc::ENFILE));
    let refused = client.create(ROOT, "new", libc::O_RDWR, 0o644, 0);
    assert_eq!(refused.unwrap_err(), libc::ENFILE);
    assert!(!client.host("new").exists());
    client.release(file, fh).unwrap();
    client.opendir(ROOT).unwrap();
}

#[test]
fn far_more_files_than_descriptors_are_known_and_all_of_them_work() {
    let mut client = Client::with(NARROW);
    let mut nodes = Vec::new();
    for d in 0..10 {
        fs::create_dir(client.host(format!("d{d}"))).unwrap();
        for f in 0..30 {
            let at = format!("d{d}/f{f}");
            fs::write(client.host(&at), &at).unwrap();
            nodes.push((client.walk(&at).unwrap().node, at));
        }
    }
    assert_eq!(client.fs.usage().inodes, 1 + 10 + 300);
    for (node, at) in nodes {
        let fh = client.open(node, libc::O_RDONLY).unwrap().fh;
        assert_eq!(client.read(node, fh, 0, 99).unwrap(), at.as_bytes());
        client.release(node, fh).unwrap();
        assert!(client.fs.usage().descriptors <= 4);
    }
}

#[test]
fn listing_a_large_tree_needs_few_descriptors() {
    let mut client = Client::with(NARROW);
    files(&client, 500);
    let listed = client.list_all(ROOT, 65536, true);
    assert_eq!(listed.len(), 502);
    assert_eq!(client.fs.usage().inodes, 501);
    assert!(client.fs.usage().descriptors <= 4);
    for (name, node, _) in &listed[2..] {
        assert_eq!(client.getattr(*node).unwrap().size as usize, name.len() - 1);
    }
}

#[test]
fn a_file_is_found_in_a_directory_that_the_guest_has_moved() {
    let mut client = Client::with(NARROW);
    fs::create_dir_all(client.host("a/b/c")).unwrap();
    fs::write(client.host("a/b/c/f"), b"here").unwrap();
    let file = client.walk("a/b/c/f").unwrap().node;
    let b = client.walk("a/b").unwrap().node;
    let a = client.walk("a").unwrap().node;
    client.rename((a, "b"), (ROOT, "moved"), 0).unwrap();
    crowd_out(&mut client);
    assert_eq!(client.getattr(file).unwrap().size, 4);
    client.rename((b, "c"), (a, "c2"), 0).unwrap();
    crowd_out(&mut client);
    assert_eq!(client.getattr(file).unwrap().size, 4);
    client.create(ROOT, "g", libc::O_RDWR, 0o644, 0).unwrap();
    let c = client.walk("a/c2").unwrap().node;
    client
        .rename((c, "f"), (ROOT, "g"), libc::RENAME_EXCHANGE)
        .unwrap();
    crowd_out(&mut client);
    assert_eq!(client.getattr(file).unwrap().size, 4);
    assert_eq!(client.walk("a/c2/f").unwrap().attr.size, 0);
}

#[test]
fn a_file_whose_name_the_guest_removes_is_kept_even_if_it_had_no_descriptor() {
    let mut client = Client::with(NARROW);
    files(&client, 2);
    let gone = client.lookup(ROOT, "f0").unwrap().node;
    let replaced = client.lookup(ROOT, "f1").unwrap().node;
    fs::create_dir(client.host("d")).unwrap();
    let dir = client.lookup(ROOT, "d").unwrap().node;
    crowd_out(&mut client);
    client.unlink(ROOT, "f0").unwrap();
    client.rename((ROOT, "other3"), (ROOT, "f1"), 0).unwrap();
    client.rmdir(ROOT, "d").unwrap();
    for i in 4..20 {
        client.lookup(ROOT, &format!("other{i}")).unwrap_err();
    }
    assert_eq!(client.getattr(gone).unwrap().nlink, 0);
    assert_eq!(client.getattr(replaced).unwrap().nlink, 0);
    assert_eq!(client.getattr(dir).unwrap().nlink, 0);
}

#[test]
fn files_without_names_use_descriptors_up_and_give_them_back() {
    let mut client = Client::with(NARROW);
    files(&client, 5);
    let mut nodes = Vec::new();
    for i in 0..3 {
        let at = format!("f{i}");
        nodes.push(client.lookup(ROOT, &at).unwrap().node);
        client.unlink(ROOT, &at).unwrap();
    }
    assert_eq!(client.lookup(ROOT, "f3").unwrap_err(), libc::ENFILE);
    client.forget(nodes[0], 1);
    client.lookup(ROOT, "f3").unwrap();
    client.lookup(ROOT, "f4").unwrap();
}

#[test]
fn a_file_that_the_host_has_taken_away_or_replaced_is_stale() {
    let mut client = Client::with(NARROW);
    files(&client, 3);
    let nodes = [0, 1, 2].map(|i| client.lookup(ROOT, &format!("f{i}")).unwrap().node);
    crowd_out(&mut client);
    fs::remove_file(client.host("f0")).unwrap();
    fs::write(client.host("new"), b"another").unwrap();
    fs::rename(client.host("new"), client.host("f1")).unwrap();
    fs::rename(client.host("f2"), client.host("f9")).unwrap();
    for node in nodes {
        assert_eq!(client.getattr(node).unwrap_err(), libc::ESTALE);
        assert_eq!(client.open(node, libc::O_RDONLY).unwrap_err(), libc::ESTALE);
    }
    // The guest then asks by path, and has the same file again.
    assert_eq!(client.lookup(ROOT, "f9").unwrap().node, nodes[2]);
    assert_eq!(client.getattr(nodes[2]).unwrap().size, 1);
}

#[test]
fn a_link_in_place_of_a_lost_file_or_directory_is_not_followed() {
    let mut client = Client::with(NARROW);
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("f"), b"secret").unwrap();
    fs::create_dir(client.host("d")).unwrap();
    fs::write(client.host("d/f"), b"").unwrap();
    let file = client.walk("d/f").unwrap().node;
    let dir = client.walk("d").unwrap().node;
    crowd_out(&mut client);
    fs::rename(client.host("d"), client.host("e")).unwrap();
    std::os::unix::fs::symlink(outside.path(), client.host("d")).unwrap();
    assert_eq!(client.getattr(file).unwrap_err(), libc::ESTALE);
    assert_eq!(client.lookup(dir, "f").unwrap_err(), libc::ESTALE);
}

#[test]
fn a_directory_stays_known_while_a_file_in_it_is() {
    let mut client = Client::with(NARROW);
    fs::create_dir_all(client.host("a/b")).unwrap();
    fs::write(client.host("a/b/f"), b"x").unwrap();
    let a = client.walk("a").unwrap().node;
    let b = client.lookup(a, "b").unwrap().node;
    let file = client.lookup(b, "f").unwrap().node;
    client.forget(b, 1);
    client.forget(a, 1);
    crowd_out(&mut client);
    assert_eq!(client.getattr(file).unwrap().size, 1);
    let with = client.fs.usage().inodes;
    client.forget(file, 1);
    assert_eq!(client.fs.usage().inodes, with - 3);
}

#[test]
fn directories_moved_into_one_another_on_the_host_do_not_make_a_ring() {
    let mut client = Client::with(NARROW);
    fs::create_dir_all(client.host("a/b")).unwrap();
    let a = client.walk("a").unwrap().node;
    let b = client.lookup(a, "b").unwrap().node;
    fs::rename(client.host("a/b"), client.host("b")).unwrap();
    fs::rename(client.host("a"), client.host("b/a")).unwrap();
    // Seen from below first: each is now the other's parent as far as the guest's requests tell.
    assert_eq!(client.lookup(b, "a").unwrap().node, a);
    crowd_out(&mut client);
    let _ = client.getattr(a);
    let _ = client.getattr(b);
    assert_eq!(client.lookup(ROOT, "b").unwrap().node, b);
    assert_eq!(client.lookup(b, "a").unwrap().node, a);
    for node in [a, b] {
        client.forget(node, 100);
    }
    assert_eq!(client.fs.usage().inodes, 21);
}

#[test]
fn the_guest_is_asked_to_forget_once_it_knows_much_and_again_after_it_has() {
    let mut client = Client::with(FsLimits {
        inodes: 100,
        ..WIDE
    });
    let reclaim = client.fs.reclaim_fd().unwrap();
    files(&client, 99);
    let mut nodes = Vec::new();
    for i in 0..73 {
        nodes.push(client.lookup(ROOT, &format!("f{i}")).unwrap().node);
    }
    assert!(!is_readable(&reclaim));
    nodes.push(client.lookup(ROOT, "f73").unwrap().node);
    assert!(is_readable(&reclaim));
    nix::unistd::read(&reclaim, &mut [0; 8]).unwrap();
    nodes.push(client.lookup(ROOT, "f74").unwrap().node);
    assert!(!is_readable(&reclaim), "once is enough");
    // Crowded: names only, from a listing.
    let listed = client.list_all(ROOT, 65536, true);
    assert_eq!(listed.len(), 101);
    assert!(listed.iter().all(|(_, node, _)| *node == 0));
    while client.fs.usage().inodes >= 50 {
        client.forget(nodes.pop().unwrap(), 1);
    }
    for i in 0..74 {
        client.lookup(ROOT, &format!("f{i}")).unwrap();
    }
    assert!(is_readable(&reclaim));
}

#[test]
fn a_second_mount_and_an_unmount_start_from_nothing() {
    let mut client = Client::new();
    files(&client, 3);
    let file = client.lookup(ROOT, "f0").unwrap().node;
    client.open(file, libc::O_RDONLY).unwrap();
    client.mount();
    assert_eq!(client.fs.usage().inodes, 1);
    assert_eq!(client.fs.usage().open, 0);
    let file = client.lookup(ROOT, "f0").unwrap().node;
    client.open(file, libc::O_RDONLY).unwrap();
    let header = client.header(Opcode::Destroy as u32, 0, 0);
    client.send(header, &[], 0);
    assert_eq!(client.fs.usage().inodes, 1);
    assert_eq!(client.fs.usage().open, 0);
}

#[test]
fn creating_and_forgetting_without_end_leaves_nothing_behind() {
    let mut client = Client::with(NARROW);
    for _ in 0..2000 {
        let (file, fh) = client.create(ROOT, "a", libc::O_RDWR, 0o644, 0).unwrap();
        client.release(file.node, fh).unwrap();
        client.unlink(ROOT, "a").unwrap();
        client.forget(file.node, 1);
    }
    let usage = client.fs.usage();
    assert_eq!((usage.inodes, usage.descriptors, usage.open), (1, 1, 0));
}

#[test]
fn a_tree_of_any_depth_stays_within_reach() {
    let mut client = Client::with(NARROW);
    let mut node = ROOT;
    let mut nodes = Vec::new();
    for _ in 0..1500 {
        node = client.mkdir(node, "d", 0o755, 0).unwrap().node;
        nodes.push(node);
    }
    crowd_out(&mut client);
    for node in nodes.into_iter().step_by(100) {
        client.getattr(node).unwrap();
    }
    assert!(client.fs.usage().descriptors <= 4);
}

#[test]
fn the_bounds_follow_the_processs_own() {
    let limits = FsLimits::for_this_process();
    assert!((64..=1 << 14).contains(&limits.descriptors));
    assert!((64..=1 << 16).contains(&limits.open));
    assert_eq!(limits.inodes, 1 << 19);
}
