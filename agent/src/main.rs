//! The agent's executable: the guest's init, or, with an argument only the agent itself gives, its helper, or, by another name,
//! a container's init.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use cloison_agent::connect::{self, Host, Listener};
use cloison_agent::{Reaper, Service, Shared, boot, chain, helper, init, server};
use cloison_agent_api::AGENT_PORT;
use nix::sys::reboot::{RebootMode, reboot};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let called = arguments.next().unwrap_or_default();
    if Path::new(&called).file_name() == Some(init::NAME.as_ref()) {
        return init::main(arguments);
    }
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some(helper::ARGUMENT) {
        return helper::main(arguments);
    }
    if std::process::id() != 1 {
        eprintln!("cloison-agent is the init of a cloison guest; nobody else can start it");
        return ExitCode::FAILURE;
    }
    // The end of PID 1 is a kernel panic, which ends the VM and says so to the host.
    match run() {
        Ok(()) => eprintln!("cloison-agent: nothing left to serve"),
        Err(error) => eprintln!("cloison-agent: {}", chain(&*error)),
    }
    ExitCode::FAILURE
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let began = boot::uptime();
    // Begun first, so that the host answers while the guest is set up.
    let dialed = connect::dial(AGENT_PORT);
    boot::prepare()?;
    if let Err(error) = boot::mount_shared() {
        eprintln!("cloison-agent: no shared directory: {}", chain(&error));
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(dialed, began))
}

async fn serve(
    dialed: io::Result<OwnedFd>,
    began: Duration,
) -> Result<(), Box<dyn std::error::Error>> {
    let shared = Shared {
        connect: Box::new(Host),
        reaper: Reaper::start()?,
        began,
    };
    let (_server, connections) = server::start(Service::new(shared), end).await?;
    let to_host = connections.clone();
    tokio::spawn(async move {
        let connected = async { to_host.serve(connect::connected(dialed?).await?).await };
        if let Err(error) = connected.await {
            eprintln!("cloison-agent: the host does not answer on port {AGENT_PORT}: {error}");
        }
    });
    let listener = Listener::bind(AGENT_PORT)?;
    loop {
        connections.serve(listener.accept().await?).await?;
    }
}

/// Nobody is left to end the VM: it ends itself.
fn end() {
    // The kernel lets go of its console before it says the same; the host tells by this line that nothing went wrong.
    eprintln!("cloison-agent: shutting down");
    let Err(errno) = reboot(RebootMode::RB_AUTOBOOT);
    eprintln!("cloison-agent: ending the VM: {errno}");
}
