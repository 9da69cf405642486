//! The agent's executable: the guest's init, or, with an argument only the agent itself gives, its helper, or, by another name,
//! a container's init.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use cloison_agent::connect::{self, Host, Listener};
use cloison_agent::{Reaper, Service, Shared, boot, chain, helper, init, server, template};
use cloison_agent_api::{AGENT_PORT, TEMPLATE_ARGUMENT};
use nix::sys::reboot::{RebootMode, reboot};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let called = arguments.next().unwrap_or_default();
    if Path::new(&called).file_name() == Some(init::NAME.as_ref()) {
        return init::main(arguments);
    }
    let mut arguments = std::env::args().skip(1);
    let argument = arguments.next();
    if argument.as_deref() == Some(helper::ARGUMENT) {
        return helper::main();
    }
    if std::process::id() != 1 {
        eprintln!("cloison-agent is the init of a cloison guest; nobody else can start it");
        return ExitCode::FAILURE;
    }
    // The end of PID 1 is a kernel panic, which ends the VM and says so to the host.
    match run(argument.as_deref() == Some(TEMPLATE_ARGUMENT)) {
        Ok(()) => eprintln!("cloison-agent: nothing left to serve"),
        Err(error) => eprintln!("cloison-agent: {}", chain(&*error)),
    }
    ExitCode::FAILURE
}

/// The moment from which the guest works for one sandbox and no other.
struct Begun {
    at: Duration,
    dialed: io::Result<OwnedFd>,
}

impl Begun {
    fn now() -> Self {
        let (at, dialed) = (boot::uptime(), connect::dial(AGENT_PORT));
        Self { at, dialed }
    }
}

fn run(template: bool) -> Result<(), Box<dyn std::error::Error>> {
    // Begun first, so that the host answers while the guest is set up.
    let begun = (!template).then(Begun::now);
    boot::prepare()?;
    if begun.is_some() {
        mount_shared();
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(begun))
}

fn mount_shared() {
    if let Err(error) = boot::mount_shared() {
        eprintln!("cloison-agent: no shared directory: {}", chain(&error));
    }
}

async fn serve(begun: Option<Begun>) -> Result<(), Box<dyn std::error::Error>> {
    let service = Service::new(Shared::new(Box::new(Host), Reaper::start()?));
    let (_server, connections) = server::start(service.clone(), end).await?;
    let listener = Listener::bind(AGENT_PORT)?;
    let begun = match begun {
        Some(begun) => begun,
        None => {
            service.prepare()?;
            template::wait()?;
            let begun = Begun::now();
            mount_shared();
            begun
        }
    };
    service.begin(begun.at);
    let to_host = connections.clone();
    tokio::spawn(async move {
        let connected = async {
            to_host
                .serve(connect::connected(begun.dialed?).await?)
                .await
        };
        if let Err(error) = connected.await {
            eprintln!("cloison-agent: the host does not answer on port {AGENT_PORT}: {error}");
        }
    });
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
