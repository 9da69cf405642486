//! `exec`: one more process in a container, and the process that stands for it on the host. That one exits with its status, passes
//! signals on, and holds a lifeline: when it is killed, so is the process in the guest.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use cloison_sandbox::{
    AgentError, Attached, Error, Event, Home, HostCgroup, Id, Lifeline, NewProcess, Preserved,
    RawTerminal, Signals, Streams,
};
use nix::unistd::Pid;
use oci_spec::runtime::{Capabilities, LinuxCapabilities, Process, User};
use serde_json::{Value, json};

use crate::args::Exec;
use crate::capabilities;
use crate::channel::{self, Order, ProcessEnd, Report, VerbEnd};
use crate::console::{Console, inherited_size, inherited_streams};
use crate::container::{Container, Record, Status};
use crate::fork::{Side, split, take_stdio, write_pid};
use crate::handed::Handed;
use crate::log::Log;
use crate::standin::{self, Sizes};
use crate::{network, runtime, translate};

/// Status of an exec that was lost with its VM.
const LOST: u8 = 255;

/// A process that is to be run.
struct Job {
    container: Container,
    record: Record,
    process: Process,
    /// Below the container's in the guest.
    cgroup: String,
    /// In a container that is paused it waits for the resumption.
    when_resumed: bool,
    console_socket: Option<PathBuf>,
    preserved: Vec<Preserved>,
}

/// Runs the process; in the foreground the status is its own.
pub fn exec(home: &Home, log: &Log, args: &Exec, handed: Handed) -> Result<u8> {
    let container = Container::find(home, &args.container)?;
    let (status, record) = container.status()?;
    match status {
        Status::Stopped => bail!("cannot exec in a stopped container"),
        Status::Creating => bail!("cannot exec in a container that is being created"),
        Status::Paused if !args.ignore_paused => {
            bail!("cannot exec in a paused container (use resume first)")
        }
        Status::Created | Status::Running | Status::Paused => {}
    }
    let mut notes = Vec::new();
    let mut process = process(&container, args, log)?;
    translate::adapt_process(&mut process, &mut notes)?;
    for note in &notes {
        log.info(note);
    }
    let terminal = translate::terminal(&process);
    ensure!(
        terminal.is_none() || args.console_socket.is_some() || !args.detach,
        "cannot allocate tty if runc will detach without setting console socket"
    );
    ensure!(
        args.console_socket.is_none() || (args.detach && terminal.is_some()),
        "cannot use console socket if runc will not detach or allocate tty"
    );
    let console_socket = args.console_socket.as_deref().map(std::path::absolute);
    let job = Job {
        container,
        record,
        process,
        cgroup: cgroup(&args.cgroup)?,
        when_resumed: args.ignore_paused,
        console_socket: console_socket.transpose()?,
        preserved: handed.descriptors,
    };
    if args.detach {
        return in_background(job, args.pid_file.as_deref());
    }
    write_pid(args.pid_file.as_deref(), Pid::this())?;
    in_foreground(job)
}

fn in_background(job: Job, pid_file: Option<&Path>) -> Result<u8> {
    let cgroup = HostCgroup::at(&job.record.cgroup)?;
    let child = match split()? {
        Side::Child(channel) => std::process::exit(serve(job, channel).into()),
        Side::Parent(child) => child,
    };
    let mut verb = VerbEnd::new(child.channel.try_clone()?);
    // It is on its way meanwhile.
    let charged = cgroup.take_in(child.pid).map_err(anyhow::Error::from);
    let made = charged
        .and_then(|()| verb.expect_made())
        .and_then(|()| write_pid(pid_file, child.pid));
    match made {
        Ok(()) => {
            verb.order(&Order::Stay);
            Ok(0)
        }
        Err(error) => {
            // It goes when its channel ends.
            drop((verb, child.channel));
            let _ = nix::sys::wait::waitpid(child.pid, None);
            Err(error)
        }
    }
}

fn in_foreground(job: Job) -> Result<u8> {
    let stdio = take_stdio_copy()?;
    let terminal = translate::terminal(&job.process).is_some();
    let raw = terminal.then(RawTerminal::enter).transpose()?;
    let streams = inherited_streams(&stdio, terminal)?;
    let sizes = match terminal {
        true => Sizes::Inherited(stdio),
        false => Sizes::None,
    };
    let status = runtime()?.block_on(async {
        let signals = Signals::of_a_front_end()?;
        job.run(streams, sizes, signals, None).await
    });
    drop(raw);
    status
}

/// Our own stdio, which stays what it is as well: an error has to go somewhere.
fn take_stdio_copy() -> Result<[OwnedFd; 3]> {
    use std::os::fd::AsFd;
    let failed = "cannot duplicate standard input and output";
    Ok([
        std::io::stdin()
            .as_fd()
            .try_clone_to_owned()
            .context(failed)?,
        std::io::stdout()
            .as_fd()
            .try_clone_to_owned()
            .context(failed)?,
        std::io::stderr()
            .as_fd()
            .try_clone_to_owned()
            .context(failed)?,
    ])
}

/// The whole life of a process that stands for an exec, and its exit status.
fn serve(job: Job, channel: UnixStream) -> u8 {
    let early = channel.try_clone();
    match stand_in(job, channel) {
        Ok(status) => status,
        Err(error) => {
            // Whoever waits for the process to be made tells of this; later on, the container's own monitor does.
            if let Ok(channel) = early {
                let _ = channel.set_nonblocking(false);
                let _ = channel::tell(&channel, &Report::Failed(format!("{error:#}")));
            }
            LOST
        }
    }
}

fn stand_in(job: Job, channel: UnixStream) -> Result<u8> {
    let stdio = take_stdio()?;
    network::enter(Path::new(&format!("/proc/{}/ns/net", job.record.pid)))?;
    let (streams, sizes) = match (translate::terminal(&job.process), &job.console_socket) {
        (Some(size), Some(socket)) => {
            let console = Console::hand_over(socket, size)?;
            (console.streams()?, Sizes::Console(console))
        }
        _ => (inherited_streams(&stdio, false)?, Sizes::None),
    };
    drop(stdio);
    runtime()?.block_on(async {
        let signals = Signals::of_a_stand_in()?;
        let channel = ProcessEnd::new(channel)?;
        job.run(streams, sizes, signals, Some(channel)).await
    })
}

impl Job {
    async fn run(
        self,
        mut streams: Streams,
        sizes: Sizes,
        mut signals: Signals,
        channel: Option<ProcessEnd>,
    ) -> Result<u8> {
        let sandbox = self.container.vm(&self.record);
        let id = self.container.id().as_str();
        let exec_id = Id::random().context("cannot make an ID")?;
        // Until the process has ended.
        let mut lent = Vec::new();
        for preserved in self.preserved {
            let descriptor = preserved.prepare(|source| {
                let place = sandbox.lend(source, self.record.pid)?;
                let path = place.in_guest().to_owned();
                lent.push(place);
                Ok(path)
            });
            streams.preserved.push(descriptor?);
        }
        let lifeline = Lifeline::attach(sandbox.control()?)?;
        let wiring = streams.attach(sandbox.control()?)?;
        let agent = sandbox.connect_agent()?;
        let size = match &sizes {
            Sizes::Inherited(stdio) => inherited_size(stdio),
            other => other.size(),
        };
        agent.hello().await.map_err(Error::from)?;
        let process = NewProcess {
            id: exec_id.as_str(),
            process: &self.process,
            stdio: wiring.stdio.clone(),
            tty: size,
            lifeline: Some(&lifeline),
            cgroup: &self.cgroup,
            when_resumed: self.when_resumed,
        };
        let made = agent.exec(id, process);
        match self.when_resumed {
            true => unless_signalled(made, &mut signals).await?,
            false => made.await.map_err(Error::from)?,
        }
        if let Some(mut channel) = channel {
            channel.tell(&Report::Made).await?;
            channel.expect(&Order::Stay).await?;
        }
        let attached = Attached {
            agent: &agent,
            container: id,
            exec_id: exec_id.as_str(),
            size: &|| sizes.size(),
        };
        let status = standin::wait(&attached, wiring, &mut signals).await?;
        Ok(status.code)
    }
}

/// Waits for a process that may not be made for long. There is none yet that could take a signal, so that one is the end.
async fn unless_signalled(
    made: impl Future<Output = Result<(), AgentError>>,
    signals: &mut Signals,
) -> Result<()> {
    tokio::pin!(made);
    loop {
        tokio::select! {
            biased;
            made = &mut made => return Ok(made.map_err(Error::from)?),
            event = signals.next() => match event {
                Event::Forward(number) => {
                    bail!("signal {number} came before the container was resumed")
                }
                // It is asked for its size when it is made.
                Event::Resized => {}
            },
        }
    }
}

/// The process that the options describe.
fn process(container: &Container, args: &Exec, log: &Log) -> Result<Process> {
    ensure!(
        args.apparmor.is_none() && args.process_label.is_none(),
        "--apparmor and --process-label are not supported: neither is in the guest"
    );
    if let Some(file) = &args.process {
        let text = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        let understood = serde_json::from_slice(&text).and_then(|mut process: Value| {
            // runc's callers leave out who is root.
            if let Some(members) = process.as_object_mut() {
                let root = json!({ "uid": 0, "gid": 0 });
                members.entry("user").or_insert(root);
            }
            let left_out = capabilities::leave_out_unknown(&mut process);
            capabilities::note(&left_out).inspect(|note| log.warn(note));
            serde_json::from_value(process)
        });
        return understood.with_context(|| format!("cannot understand {}", file.display()));
    }
    ensure!(!args.command.is_empty(), "process args cannot be empty");
    let spec = container.spec()?;
    let process = spec.process().clone();
    let process = process.context("the container's spec has no process")?;
    with_options(process, args)
}

/// The cgroup that the options name, below the container's own; empty for that one.
fn cgroup(given: &[String]) -> Result<String> {
    let path = match given {
        [] => "",
        [path] => path.as_str(),
        _ => bail!("--cgroup can be given once: a guest has one hierarchy"),
    };
    ensure!(
        !path.contains(':'),
        "--cgroup {path:?} names controllers, and a guest's are all in one hierarchy: give a path"
    );
    Ok(path.trim_matches('/').to_owned())
}

fn with_options(mut process: Process, args: &Exec) -> Result<Process> {
    process.set_args(Some(args.command.clone()));
    process.set_terminal(Some(args.tty));
    process.set_console_size(None);
    if let Some(cwd) = &args.cwd {
        process.set_cwd(cwd.clone());
    }
    if let Some(variable) = args.env.iter().find(|v| !v.contains('=')) {
        bail!("--env {variable:?} is not NAME=VALUE");
    }
    let mut env = process.env().clone().unwrap_or_default();
    env.extend(args.env.iter().cloned());
    process.set_env(Some(env));
    if let Some(user) = &args.user {
        process.set_user(with_user(process.user().clone(), user)?);
    }
    if !args.additional_gids.is_empty() {
        let mut user = process.user().clone();
        let mut gids = user.additional_gids().clone().unwrap_or_default();
        gids.extend(&args.additional_gids);
        user.set_additional_gids(Some(gids));
        process.set_user(user);
    }
    if let Some(set) = args.no_new_privs {
        process.set_no_new_privileges(Some(set));
    }
    if !args.cap.is_empty() {
        let capabilities = process.capabilities().clone().unwrap_or_default();
        process.set_capabilities(Some(with_capabilities(capabilities, &args.cap)?));
    }
    Ok(process)
}

fn with_user(mut user: User, text: &str) -> Result<User> {
    let (uid, gid) = match text.split_once(':') {
        Some((uid, gid)) => (uid, Some(gid)),
        None => (text, None),
    };
    let number = |text: &str| -> Result<u32> {
        text.parse()
            .ok()
            .with_context(|| format!("--user {text:?} is not a number"))
    };
    user.set_uid(number(uid)?);
    if let Some(gid) = gid {
        user.set_gid(number(gid)?);
    }
    Ok(user)
}

/// Adds capabilities to every set but the ambient one, as runc does.
fn with_capabilities(
    mut capabilities: LinuxCapabilities,
    names: &[String],
) -> Result<LinuxCapabilities> {
    let parse = |name: &String| {
        let upper = name.to_ascii_uppercase();
        let upper = match upper.starts_with("CAP_") {
            true => upper,
            false => format!("CAP_{upper}"),
        };
        serde_json::from_value(upper.into()).with_context(|| format!("unknown capability {name:?}"))
    };
    let added: Capabilities = names.iter().map(parse).collect::<Result<_>>()?;
    let with = |set: &Option<Capabilities>| {
        let mut set = set.clone().unwrap_or_default();
        set.extend(added.iter().copied());
        Some(set)
    };
    let bounding = with(capabilities.bounding());
    let effective = with(capabilities.effective());
    let permitted = with(capabilities.permitted());
    capabilities
        .set_bounding(bounding)
        .set_effective(effective)
        .set_permitted(permitted);
    Ok(capabilities)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Verb};

    fn with(words: &str) -> Result<Process> {
        let cli = Cli::try_parse_from(words.split(' ')).unwrap();
        let Some(Verb::Exec(exec)) = cli.verb else {
            panic!("not an exec: {words}");
        };
        with_options(Process::default(), &exec)
    }

    #[test]
    fn options_change_the_containers_process() {
        let process = with(
            "r exec -t --cwd /tmp -e A=b -u 5:6 -g 7 -c net_raw --no-new-privs=false id sh -c x",
        )
        .unwrap();
        assert_eq!(process.args().as_deref().unwrap(), ["sh", "-c", "x"]);
        assert_eq!(process.cwd(), Path::new("/tmp"));
        assert_eq!(process.terminal(), Some(true));
        assert_eq!(process.no_new_privileges(), Some(false));
        assert!(process.env().as_ref().unwrap().contains(&"A=b".to_owned()));
        let user = process.user();
        assert_eq!((user.uid(), user.gid()), (5, 6));
        assert_eq!(user.additional_gids().as_deref().unwrap(), [7]);
        let raw = oci_spec::runtime::Capability::NetRaw;
        let capabilities = process.capabilities().as_ref().unwrap();
        assert!(capabilities.effective().as_ref().unwrap().contains(&raw));
    }

    #[test]
    fn a_cgroup_is_a_path_below_the_containers() {
        let of = |given: &[&str]| {
            let given: Vec<String> = given.iter().map(|&text| text.to_owned()).collect();
            cgroup(&given).ok()
        };
        assert_eq!(of(&[]).as_deref(), Some(""));
        assert_eq!(of(&["/"]).as_deref(), Some(""));
        assert_eq!(of(&["/a/b"]).as_deref(), Some("a/b"));
        assert_eq!((of(&["cpu:/a"]), of(&["a", "b"])), (None, None));
    }

    #[test]
    fn options_that_make_no_sense_are_refused() {
        for words in [
            "r exec -u root id x",
            "r exec -u 1:x id x",
            "r exec -c NONSENSE id x",
            "r exec -e NOVALUE id x",
        ] {
            assert!(with(words).is_err(), "{words}");
        }
    }
}
