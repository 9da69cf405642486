//! `cloison exec`: one more process in a container that runs, from a front end of its own.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use cloison_sandbox::{Attached, Home, Id, NewProcess, RawTerminal, Signals, Streams};
use oci_spec::runtime::Process;

use crate::args::{Exec, ProcessOptions};
use crate::attached::{self, Outcome, foreground_streams};
use crate::container::{Container, Life, State, find};
use crate::exit::{self, Failed};
use crate::spec::{Capabilities, environment, user_of};
use crate::terminal;
use crate::verbs::runtime;

/// Runs the process; the status is its own.
pub fn exec(home: &Home, args: &Exec) -> Result<u8, Failed> {
    let options = &args.process;
    if options.tty && options.interactive && !options.detach {
        terminal::require()?;
    }
    let container = find(home, &args.container).map_err(Failed::general)?;
    let vm = running(&container).map_err(Failed::general)?;
    let process = process(&container, vm, args)?;
    let exec_id = Id::random().context("cannot make an ID")?;
    let run = async {
        let mut signals = Signals::of_a_front_end()?;
        let sandbox = container.sandbox();
        let wiring = streams(options)?.attach(sandbox.control()?)?;
        let agent = sandbox.connect_agent()?;
        agent.hello().await?;
        let size = options.tty.then(terminal::size).flatten();
        let raw = (options.tty && options.interactive && !options.detach)
            .then(RawTerminal::enter)
            .transpose()?;
        agent
            .exec(
                container.id().as_str(),
                NewProcess {
                    id: exec_id.as_str(),
                    process: &process,
                    stdio: wiring.stdio.clone(),
                    tty: size,
                    lifeline: None,
                    cgroup: "",
                    when_resumed: false,
                },
            )
            .await?;
        if options.detach {
            return Ok(0);
        }
        let attached = Attached {
            agent: &agent,
            container: container.id().as_str(),
            exec_id: exec_id.as_str(),
            size: &|| options.tty.then(terminal::size).flatten(),
        };
        let outcome = attached::wait(&attached, wiring, &mut signals).await;
        drop(raw);
        match outcome? {
            Outcome::Exited(status) => Ok(status.code),
            Outcome::Abandoned(signal) => Ok(exit::by_signal(signal)),
        }
    };
    let status: Result<u8> = runtime()?.block_on(run);
    Ok(status?)
}

/// The VM process of a container that runs.
fn running(container: &Container) -> Result<u32> {
    match container.life()? {
        (Life::Running, record) => match record.state {
            State::Running { pid, .. } => Ok(pid),
            _ => Err(anyhow!("container {} is about to start", record.name)),
        },
        (_, record) => Err(anyhow!("container {} is not running", record.name)),
    }
}

/// The container's own process with what the options say in its place.
fn process(container: &Container, vm: u32, args: &Exec) -> Result<Process> {
    let options = &args.process;
    let spec = container.spec()?;
    let mut process = spec
        .process()
        .clone()
        .context("the container's spec has no process")?;
    process.set_args(Some(args.command.clone()));
    process.set_terminal(Some(options.tty));
    if let Some(workdir) = &options.workdir {
        process.set_cwd(workdir.into());
    }
    let base = process.env().clone().unwrap_or_default();
    let mut home = None;
    if options.user.is_some() {
        let user = user_of(&rootfs(container, vm)?, options.user.as_deref())?;
        let capabilities = Capabilities::bounding(&process)?;
        process.set_capabilities(Some(capabilities.for_user(user.uid)?));
        let mut oci = process.user().clone();
        oci.set_uid(user.uid)
            .set_gid(user.gid)
            .set_additional_gids(Some(user.additional_gids));
        process.set_user(oci);
        home = Some(user.home);
    }
    let inherited: Vec<String> = base
        .into_iter()
        .filter(|v| home.is_none() || !v.starts_with("HOME="))
        .collect();
    process.set_env(Some(environment(&inherited, options, home.as_deref())?));
    Ok(process)
}

/// The container's root file system, which only the processes of its sandbox have mounted.
fn rootfs(container: &Container, vm: u32) -> Result<PathBuf> {
    let sandbox = container.sandbox();
    let inside = sandbox.rootfs_on_host(container.id());
    let inside = inside.strip_prefix("/").unwrap_or(&inside);
    Ok(Path::new("/proc")
        .join(vm.to_string())
        .join("root")
        .join(inside))
}

fn streams(options: &ProcessOptions) -> Result<Streams> {
    if options.detach {
        return Ok(Streams {
            terminal: options.tty,
            ..Default::default()
        });
    }
    foreground_streams(options)
}
