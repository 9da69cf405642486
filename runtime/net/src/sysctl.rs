//! What the host's kernel must be told so that it carries a network's packets: it forwards, and it lets loopback addresses out to the
//! network's bridge, for ports that are published to the host itself.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

const IPV4: &str = "/proc/sys/net/ipv4";
const IPV6: &str = "/proc/sys/net/ipv6/conf";

/// Has the calling thread's namespace forward what comes by way of `bridge`.
pub(crate) fn set_up_host(bridge: &str, ipv6: bool) -> Result<()> {
    set(format!("{IPV4}/ip_forward"), "1")?;
    set(format!("{IPV4}/conf/{bridge}/route_localnet"), "1")?;
    // Nobody on the bridge is a router.
    set_if_there(format!("{IPV6}/{bridge}/accept_ra"), "0")?;
    if ipv6 { forward_ipv6() } else { Ok(()) }
}

/// Keeps the calling thread's namespace from speaking IPv6 at `interface`: a port, which only carries others' frames, or a bridge without
/// addresses of that kind.
pub(crate) fn silence(interface: &str) -> Result<()> {
    set_if_there(format!("{IPV6}/{interface}/disable_ipv6"), "1")
}

/// A host that forwards no longer listens to routers (accept_ra of 1), and would lose a default route that it has from one, unless it
/// is told to listen all the same (2; Linux's Documentation/networking/ip-sysctl.rst).
fn forward_ipv6() -> Result<()> {
    let all = format!("{IPV6}/all/forwarding");
    if fs::read_to_string(&all).is_ok_and(|forwards| forwards.trim() == "1") {
        return Ok(());
    }
    let interfaces = fs::read_dir(IPV6).map_err(Error::system(format!("read {IPV6}")))?;
    for interface in interfaces.flatten() {
        let accept = interface.path().join("accept_ra");
        if fs::read_to_string(&accept).is_ok_and(|accepts| accepts.trim() == "1") {
            set_if_there(accept, "2")?;
        }
    }
    set(all, "1")
}

/// Writes only what is different: where `/proc/sys` cannot be written, somebody may have seen to it before.
fn set(path: impl Into<PathBuf>, value: &str) -> Result<()> {
    let path = path.into();
    write(&path, value).map_err(Error::system(format!("set {} to {value}", path.display())))
}

fn set_if_there(path: impl Into<PathBuf>, value: &str) -> Result<()> {
    let path = path.into();
    match write(&path, value) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        written => written.map_err(Error::system(format!("set {} to {value}", path.display()))),
    }
}

fn write(path: &Path, value: &str) -> io::Result<()> {
    if fs::read_to_string(path)?.trim() == value {
        return Ok(());
    }
    fs::write(path, value)
}
