//! Unix sockets of the host in a container, as `-v /var/run/docker.sock:/var/run/docker.sock` asks for.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use serde_json::json;

use crate::host::{Host, emulated, fail, image, succeed, text};
use crate::oci::Bundle;

/// A client of the socket at the path that is its argument: sends its second one, says that this is all, and prints the answer.
const CLIENT: &str = r#"use IO::Socket::UNIX; my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or die "refused: $!\n"; print $s $ARGV[1]; $s->flush; shutdown($s, 1); print while <$s>;"#;

/// A server that answers each request with it, its length in front.
fn serve(listener: UnixListener) {
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream: UnixStream = stream.unwrap();
            thread::spawn(move || {
                let mut request = Vec::new();
                stream.read_to_end(&mut request).unwrap();
                let _ = write!(stream, "{}:", request.len());
                let _ = stream.write_all(&request);
                let _ = stream.shutdown(Shutdown::Both);
            });
        }
    });
}

/// A bundle of a Debian, which has perl, with these sockets of the host's at these places.
fn debian(script: &str, sockets: &[(&Path, &str)]) -> Bundle {
    let bundle = Bundle::shell(script).with(|config| {
        let mounts = config["mounts"].as_array_mut().unwrap();
        for (source, destination) in sockets {
            let options = ["rbind", "rprivate"];
            mounts.push(json!({ "destination": destination, "type": "bind", "source": source, "options": options }));
        }
        config["process"]["env"] = json!(["PATH=/usr/bin:/bin", format!("CLIENT={CLIENT}")]);
    });
    let layer = largest(Path::new(&image("debian").replace("oci:", "")));
    fs::remove_dir_all(bundle.dir().join("rootfs")).unwrap();
    fs::create_dir(bundle.dir().join("rootfs")).unwrap();
    let mut tar = std::process::Command::new("tar");
    tar.arg("-C").arg(bundle.dir().join("rootfs"));
    let parts = [
        "./bin",
        "./lib",
        "./lib64",
        "./usr/bin",
        "./usr/lib64",
        "./usr/lib/x86_64-linux-gnu",
    ];
    succeed(&tar.arg("-xzf").arg(layer).args(parts).output().unwrap());
    bundle
}

/// The one layer of an image.
fn largest(layout: &Path) -> std::path::PathBuf {
    let blobs = fs::read_dir(layout.join("blobs/sha256")).unwrap().flatten();
    let largest = blobs.max_by_key(|blob| blob.metadata().unwrap().len());
    largest.unwrap().path()
}

#[test]
fn a_socket_of_the_host_answers_in_the_container() {
    // The lab's machine has no room for a Debian.
    if emulated() {
        return;
    }
    let host = Host::new();
    let (served, other) = (host.path("served.sock"), host.path("other.sock"));
    serve(UnixListener::bind(&served).unwrap());
    fs::set_permissions(&served, fs::Permissions::from_mode(0o620)).unwrap();
    // Nobody listens at this one any more.
    drop(UnixListener::bind(&other).unwrap());
    let script = r#"
        ask() { echo "$(perl -e "$CLIENT" "$@")"; }
        ask /run/served.sock hello
        ask /run/served.sock "$(perl -e 'print "x" x 100000')" | wc -c
        for i in 1 2 3 4 5 6 7 8; do ask /run/served.sock "number $i" & done; wait
        [ -z "$(perl -e "$CLIENT" /run/other.sock x 2>/dev/null)" ] && echo nothing
        perl -e "$CLIENT" /run/nothing.sock x 2>&1
        ls -l /run/served.sock | cut -d ' ' -f 1
    "#;
    let bundle = debian(
        script,
        &[(&served, "/run/served.sock"), (&other, "/run/other.sock")],
    );
    let output = bundle.output();
    let seen = text(&output.stdout);
    let mut lines: Vec<_> = seen.lines().collect();
    assert_eq!(
        lines.len(),
        13,
        "{seen}{}{}",
        text(&output.stderr),
        bundle.log()
    );
    assert_eq!(lines[0], "5:hello");
    assert_eq!(lines[1], "100008", "length, colon, bytes and a line's end");
    lines[2..10].sort_unstable();
    for (line, number) in lines[2..10].iter().zip(1..) {
        assert_eq!(*line, format!("8:number {number}"));
    }
    assert_eq!(lines[10], "nothing");
    assert_eq!(lines[11], "refused: No such file or directory");
    assert_eq!(lines[12], "srw--w----");
}

#[test]
fn a_socket_that_cannot_be_carried_is_refused() {
    let host = Host::new();
    let path = host.path("datagrams.sock");
    let _bound = UnixDatagram::bind(&path).unwrap();
    let bundle = Bundle::shell("true").with(|config| {
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.push(json!({ "destination": "/dev/log", "type": "bind", "source": path, "options": ["bind"] }));
    });
    fail(
        &bundle.output(),
        1,
        &["datagrams.sock", "datagrams", "streams"],
    );
    let many = host.path("many.sock");
    let _listener = UnixListener::bind(&many).unwrap();
    let bundle = bundle.with(|config| {
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.pop();
        for number in 0..65 {
            mounts.push(json!({ "destination": format!("/run/{number}"), "type": "bind", "source": many, "options": ["bind"] }));
        }
    });
    fail(&bundle.output(), 1, &["65 mounts are sockets", "64"]);
}

#[test]
fn a_socket_of_the_host_answers_in_a_container_that_came_to_anothers_vm() {
    if emulated() {
        return;
    }
    let host = Host::new();
    let served = host.path("served.sock");
    serve(UnixListener::bind(&served).unwrap());
    let first = Bundle::shell("while :; do sleep 0.1; done");
    let pid = first.create_and_start();
    let script = r#"perl -e "$CLIENT" /run/served.sock hello"#;
    let second = debian(script, &[(&served, "/run/served.sock")]).with(|config| {
        for namespace in config["linux"]["namespaces"].as_array_mut().unwrap() {
            if namespace["type"] == "network" {
                namespace["path"] = format!("/proc/{pid}/ns/net").into();
            }
        }
    });
    let output = first.run(&["run", "--bundle", second.dir().to_str().unwrap(), "two"]);
    assert_eq!(text(&output.stdout), "5:hello", "{}", text(&output.stderr));
    // It was offered for as long as there was that container.
    let sandbox = fs::read_dir(first.host.run_dir().join("sandboxes/one")).unwrap();
    let names = sandbox.flatten().map(|entry| entry.file_name());
    let offered = names.filter(|name| name.to_str().unwrap().starts_with("vsock.sock_"));
    assert_eq!(offered.count(), 0);
}
