//! What the tests share: namespaces with interfaces in them, traffic between them, and a stand-in for a guest. They need root.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{pipe, read, write};

use crate::{Adopted, GuestInterface, Namespace, sys};

/// How long something may take that is sure to happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// How long to wait for what is not to happen.
const DOUBT: Duration = Duration::from_millis(500);

/// Runs a program inside `namespace`; its output, when it succeeds.
pub(crate) fn command(namespace: &Namespace, line: &str) -> Result<String, String> {
    let words: Vec<_> = line.split_whitespace().collect();
    let output = namespace
        .run(|| Command::new(words[0]).args(&words[1..]).output())
        .unwrap()
        .unwrap();
    if output.status.success() {
        Ok(String::from_utf8(output.stdout).unwrap())
    } else {
        Err(format!(
            "{line}: {}",
            String::from_utf8_lossy(&output.stderr)
        ))
    }
}

/// Runs `ip` inside `namespace`, once per line.
pub(crate) fn ip(namespace: &Namespace, lines: &str) {
    for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
        command(namespace, &format!("ip {line}")).unwrap();
    }
}

/// A fresh namespace with its loopback up.
pub(crate) fn namespace() -> Namespace {
    let namespace = Namespace::anonymous().unwrap();
    ip(&namespace, "link set lo up");
    namespace
}

/// Puts a veth's ends into two namespaces, up.
pub(crate) fn veth(a: &Namespace, a_name: &str, b: &Namespace, b_name: &str) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ns");
    std::fs::File::create(&path).unwrap();
    // `ip` wants the other namespace by a path that holds in a process of its own.
    let fd = format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        std::os::fd::AsRawFd::as_raw_fd(&b.as_fd())
    );
    nix::mount::mount(
        Some(fd.as_str()),
        &path,
        None::<&str>,
        nix::mount::MsFlags::MS_BIND,
        None::<&str>,
    )
    .unwrap();
    ip(
        a,
        &format!(
            "link add {a_name} type veth peer name {b_name} netns {}",
            path.display()
        ),
    );
    nix::mount::umount(&path).unwrap();
    ip(a, &format!("link set {a_name} up"));
    ip(b, &format!("link set {b_name} up"));
}

pub(crate) fn pings(from: &Namespace, to: &str) -> bool {
    ping(from, to, "-c 3 -w 3")
}

/// Whether a ping is answered within half a second or so: for when it should not be.
pub(crate) fn ping(from: &Namespace, to: &str, options: &str) -> bool {
    let program = if to.contains(':') { "ping6" } else { "ping" };
    command(from, &format!("busybox {program} {options} {to}")).is_ok()
}

/// Serves one TCP connection inside `namespace`: sends back what comes, to the end.
pub(crate) fn echo(namespace: &Namespace, at: SocketAddr) -> JoinHandle<()> {
    let listener = namespace.run(|| TcpListener::bind(at)).unwrap().unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut sender = stream.try_clone().unwrap();
        let mut buffer = vec![0; 1 << 16];
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            if sender.write_all(&buffer[..count]).is_err() {
                return;
            }
        }
    })
}

/// Sends a megabyte to an [`echo`] and gets it back.
pub(crate) fn exchange(from: &Namespace, to: SocketAddr) -> std::io::Result<()> {
    let stream = connect(from, to)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let data: Vec<u8> = (0..1u32 << 18).flat_map(u32::to_le_bytes).collect();
    let (mut sender, sent) = (stream.try_clone()?, data.clone());
    let sending = thread::spawn(move || {
        sender.write_all(&sent)?;
        sender.shutdown(std::net::Shutdown::Write)
    });
    let mut back = Vec::new();
    (&stream).read_to_end(&mut back)?;
    sending.join().unwrap()?;
    assert!(back == data, "what came back is not what was sent");
    Ok(())
}

pub(crate) fn connect(from: &Namespace, to: SocketAddr) -> std::io::Result<TcpStream> {
    from.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(3)))
        .unwrap()
}

/// Whether a datagram sent from one namespace to `to` arrives at a socket bound to `at` in another.
pub(crate) fn datagram(
    from: &Namespace,
    to: SocketAddr,
    namespace: &Namespace,
    at: SocketAddr,
) -> bool {
    let receiver = namespace.run(|| UdpSocket::bind(at)).unwrap().unwrap();
    receiver.set_read_timeout(Some(DOUBT * 4)).unwrap();
    let any = if to.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" };
    let sender = from.run(|| UdpSocket::bind(any)).unwrap().unwrap();
    if sender.send_to(b"hello", to).is_err() {
        return false;
    }
    let mut buffer = [0; 16];
    let Ok((5, back)) = receiver.recv_from(&mut buffer) else {
        return false;
    };
    // The answer must come from where the question went.
    receiver.send_to(b"world", back).unwrap();
    sender.set_read_timeout(Some(DOUBT * 4)).unwrap();
    sender
        .recv_from(&mut buffer)
        .is_ok_and(|(_, from)| from == to)
}

pub(crate) fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse::<IpAddr>().unwrap(), port)
}

/// A namespace in a guest's place: a kernel whose only way out are the taps it was given.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) namespace: Namespace,
    cables: Vec<Cable>,
}

/// Carries frames between two taps until it is dropped.
#[derive(Debug)]
struct Cable {
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Guest {
    pub(crate) fn new() -> Self {
        Self {
            namespace: namespace(),
            cables: Vec::new(),
        }
    }

    /// Gives the guest an interface, as the agent will from the same description.
    pub(crate) fn plug(&mut self, adopted: Adopted) {
        let interface = &adopted.interface;
        let tap = self
            .namespace
            .run(|| sys::create_tap(&interface.name))
            .unwrap()
            .unwrap();
        configure(&self.namespace, interface);
        self.cables.push(Cable::new(adopted.tap, tap));
    }
}

fn configure(namespace: &Namespace, interface: &GuestInterface) {
    let GuestInterface { name, mac, mtu, .. } = interface;
    ip(
        namespace,
        &format!("link set {name} address {mac} mtu {mtu} up"),
    );
    for address in &interface.addresses {
        let mut line = format!("addr add {}", address.address);
        match address.peer {
            Some(peer) => line += &format!(" peer {peer}/{}", address.prefix),
            None => line += &format!("/{}", address.prefix),
        }
        let nodad = if address.address.is_ipv6() {
            "nodad"
        } else {
            ""
        };
        ip(
            namespace,
            &format!("{line} dev {name} noprefixroute {nodad}"),
        );
    }
    for route in &interface.routes {
        let mut line = format!("route add {} dev {name}", route.destination);
        if let Some(gateway) = route.gateway {
            line += &format!(" via {gateway}");
        }
        if let Some(source) = route.source {
            line += &format!(" src {source}");
        }
        if let Some(metric) = route.metric {
            line += &format!(" metric {metric}");
        }
        if let Some(mtu) = route.mtu {
            line += &format!(" mtu {mtu}");
        }
        if route.onlink {
            line += " onlink";
        }
        ip(namespace, &line);
    }
    for neighbour in &interface.neighbours {
        ip(
            namespace,
            &format!(
                "neigh add {} lladdr {} dev {name} nud permanent",
                neighbour.address, neighbour.mac
            ),
        );
    }
}

impl Cable {
    fn new(a: OwnedFd, b: OwnedFd) -> Self {
        let (stopped, stop) = pipe().unwrap();
        let thread = thread::spawn(move || {
            let mut frame = vec![0; 1 << 17];
            loop {
                let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
                let mut fds = [
                    readable(a.as_fd()),
                    readable(b.as_fd()),
                    PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
                ];
                poll(&mut fds, PollTimeout::NONE).unwrap();
                if fds[2].any() == Some(true) {
                    return;
                }
                for (from, to) in [(&a, &b), (&b, &a)] {
                    while let Ok(length) = read(from, &mut frame) {
                        let _ = write(to, &frame[..length]);
                    }
                }
            }
        });
        Self {
            stop: Some(stop),
            thread: Some(thread),
        }
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        drop(self.stop.take());
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
