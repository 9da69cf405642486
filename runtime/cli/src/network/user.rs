//! `--network user`: a network that needs nothing of the host's but sockets. pasta, of the passt package, lives beside the container's
//! monitor and dies with it: at one end it is a host on the network namespace that the guest's interface is in, at the other a program that
//! connects and listens as any other does.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use cloison_net::{Namespace, Protocol, Publication};
use cloison_sandbox::Network;
use nix::sys::prctl;
use nix::sys::signal::Signal;
use tokio::io::AsyncReadExt;
use tokio::process::{Child, ChildStderr, Command};

/// The program.
const PASTA: &str = "pasta";
/// How the interface is called.
const INTERFACE: &str = "eth0";
/// Most bytes of pasta's complaints that are read.
const COMPLAINT: u64 = 4096;

/// A network that is yet to be made.
#[derive(Debug)]
pub struct User {
    namespace: PathBuf,
    publish: Vec<Publication>,
}

/// A network that lasts as long as this.
#[derive(Debug)]
pub struct Pasta {
    _child: Child,
    _namespace: Namespace,
}

/// Where a sandbox's namespace is mounted, for the processes of that sandbox alone.
fn namespace(sandbox: &Path) -> PathBuf {
    sandbox.join("netns")
}

impl User {
    /// Checks that the ports are free, which pasta takes later.
    ///
    /// # Errors
    /// When one is not, or there is no pasta.
    pub fn prepare(sandbox: &Path, publish: &[Publication]) -> Result<Self> {
        if find().is_none() {
            bail!("{PASTA} is missing: install it (`apt-get install passt`)");
        }
        drop(cloison_net::reserve(
            &Namespace::current()?,
            publish,
            false,
        )?);
        Ok(Self {
            namespace: namespace(sandbox),
            publish: publish.to_vec(),
        })
    }

    /// Starts pasta, and waits for the interface it makes.
    ///
    /// # Errors
    /// When pasta cannot, in its words.
    pub async fn connect(self) -> Result<(Network, Pasta)> {
        let namespace = Namespace::persistent(&self.namespace)?;
        let mut network = Network::new(&namespace)?;
        let mut child = self.spawn().context("cannot start pasta")?;
        let stderr = child.stderr.take();
        tokio::select! {
            arrived = network.arrival() => arrived?,
            said = complaint(stderr) => bail!("pasta cannot make the network: {said}"),
        }
        let pasta = Pasta {
            _child: child,
            _namespace: namespace,
        };
        Ok((network, pasta))
    }

    fn spawn(&self) -> std::io::Result<Child> {
        let mut command = Command::new(PASTA);
        // The host's loopback stays the host's (--no-map-gw), and its ports do not show up in the container (-T, -U).
        command
            .args(["--foreground", "--quiet", "--config-net", "--no-map-gw"])
            .args(["-T", "none", "-U", "none", "-I", INTERFACE]);
        for (option, protocol) in [("-t", Protocol::Tcp), ("-u", Protocol::Udp)] {
            let ports = self.publish.iter().flat_map(Publication::mappings);
            let ports: Vec<String> = ports
                .filter(|mapping| mapping.protocol == protocol)
                .map(|mapping| {
                    let address = mapping.address.map(|address| format!("{address}/"));
                    let address = address.unwrap_or_default();
                    format!("{address}{}:{}", mapping.host, mapping.container)
                })
                .collect();
            for port in &ports {
                command.args([option, port]);
            }
            if ports.is_empty() {
                command.args([option, "none"]);
            }
        }
        // A namespace of root's can be entered by root alone; of root's rights pasta keeps none it does not need.
        command
            .args(["--runas", "0:0", "--netns-only", "--netns"])
            .arg(&self.namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let parent = nix::unistd::Pid::this();
        // SAFETY: runs between fork and exec, in a copy of one thread: it makes two system calls and allocates nothing.
        unsafe {
            command.pre_exec(move || {
                prctl::set_pdeathsig(Signal::SIGKILL)?;
                // The parent may have died before it could be asked for a signal.
                match nix::unistd::getppid() == parent {
                    true => Ok(()),
                    false => Err(std::io::ErrorKind::BrokenPipe.into()),
                }
            });
        }
        command.spawn()
    }
}

/// Takes away what was mounted in a sandbox's directory; pasta has gone with the monitor.
///
/// # Errors
/// When it cannot be unmounted.
pub fn remove(sandbox: &Path) -> Result<()> {
    Ok(Namespace::remove(&namespace(sandbox))?)
}

/// Where pasta is, if it is installed.
pub fn find() -> Option<PathBuf> {
    super::program(PASTA)
}

/// What pasta says before it ends.
async fn complaint(stderr: Option<ChildStderr>) -> String {
    let mut said = Vec::new();
    if let Some(stderr) = stderr {
        // Whatever could be read is all there is to tell.
        let _ = stderr.take(COMPLAINT).read_to_end(&mut said).await;
    }
    let said = String::from_utf8_lossy(&said);
    // Without a system log it complains of that, too.
    let lines = said.lines().filter(|line| !line.contains("syslog"));
    lines.collect::<Vec<_>>().join("; ")
}
