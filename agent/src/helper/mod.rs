//! The helper: the agent's own executable, started again as a process of one thread that calls libcontainer once,
//! reports and exits. libcontainer forks, changes directories and makes itself undumpable; all of that ends here. The
//! container's process outlives the helper and becomes PID 1's child.

mod copy_up;
mod filter;
mod finish;
mod lookup;
mod trace;

use std::fs::File;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;

use libcgroups::common::{CgroupManager, ControllerOpt};
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::error::LibcontainerError;
use libcontainer::syscall::syscall::SyscallType;

use crate::cpus;
use crate::dirs;
use crate::error::chain;
use crate::preserved;
use crate::report::{ChildStdio, Create, Exec, Failure, FailureKind, Report, Request, Update};
use crate::sys;
use crate::workload::Workload;

/// First argument of the agent's executable that makes it a helper.
pub const ARGUMENT: &str = "helper";

/// Bytes of a request that are read at once.
const FIRST_BYTES: usize = 16 << 10;

/// The descriptor over which it is asked. Whatever it is handed has higher numbers, in their order, while this is open.
pub const SOCKET: RawFd = preserved::FIRST;

/// What is handed to a helper with its request.
struct Handed {
    /// Its process's descriptors beside stdio, and its standard input, output and error after these.
    descriptors: Vec<OwnedFd>,
    report: OwnedFd,
}

/// Waits for a request and does what it asks. It has failed only if it could not even report.
pub fn main() -> ExitCode {
    // SAFETY: `spawn::Waiting` opened it for this process; nothing else has run in it yet.
    let socket = UnixStream::from(unsafe { sys::inherited(SOCKET) });
    let (request, handed) = match receive(socket) {
        Ok(Some(received)) => received,
        // The agent asks nothing of it.
        Ok(None) => return ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cloison-agent: the helper is not asked anything: {error}");
            return ExitCode::FAILURE;
        }
    };
    let Handed {
        descriptors,
        report,
    } = handed;
    match serve(&request, descriptors, &report) {
        Ok(answer) => send(report.as_fd(), &answer),
        Err(message) => send(
            report.as_fd(),
            &Report::Failed(Failure {
                kind: FailureKind::Internal,
                message,
            }),
        ),
    }
}

/// Says that it is there by saying nothing more, waits for the request, which comes with its descriptors, and reads it to its end.
fn receive(mut socket: UnixStream) -> io::Result<Option<(Vec<u8>, Handed)>> {
    let mut json = vec![0; FIRST_BYTES];
    // An agent that has asked already does not listen.
    let _ = socket.shutdown(Shutdown::Write);
    let (count, mut descriptors) = sys::receive_descriptors(&socket, &mut json)?;
    json.truncate(count);
    let Some(report) = descriptors.pop() else {
        return match count {
            0 => Ok(None),
            _ => Err(io::ErrorKind::InvalidData.into()),
        };
    };
    socket.read_to_end(&mut json)?;
    let handed = Handed {
        descriptors,
        report,
    };
    Ok(Some((json, handed)))
}

fn send(report: impl AsFd, answer: &Report) -> ExitCode {
    match nix::unistd::write(report, &answer.line()) {
        Ok(_) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn serve(request: &[u8], descriptors: Vec<OwnedFd>, report: &OwnedFd) -> Result<Report, String> {
    let request: Request = serde_json::from_slice(request)
        .map_err(|error| format!("the helper's request: {error}"))?;
    // Before anything is opened, which would have their numbers.
    let standard = put_in_place(descriptors, request.preserved())
        .map_err(|error| format!("the helper's descriptors: {error}"))?;
    // Containers are scheduled like anybody.
    sys::set_policy(sys::Policy::Normal)
        .map_err(|error| format!("leaving the agent's scheduling policy: {error}"))?;
    let copy = report
        .try_clone()
        .map_err(|error| format!("copying the report's descriptor: {error}"))?;
    trace::install(File::from(copy));
    match request {
        Request::Create(create) => run_create(create, standard, report),
        Request::Exec(exec) => run_exec(exec, standard, report),
        Request::Update(update) => run_update(&update),
    }
}

/// Gives the first of these the numbers from 3 on, which they keep, and answers the others.
fn put_in_place(mut descriptors: Vec<OwnedFd>, preserved: usize) -> io::Result<Vec<OwnedFd>> {
    if preserved > descriptors.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let others = descriptors.split_off(preserved);
    for (descriptor, number) in descriptors.into_iter().zip(preserved::FIRST..) {
        // Each came under a higher number than it gets, so that none takes the place of one that is still to move.
        sys::duplicate_as(descriptor.as_fd(), number)?;
    }
    Ok(others)
}

fn run_create(create: Create, standard: Vec<OwnedFd>, report: &OwnedFd) -> Result<Report, String> {
    // First, since a set of CPUs can hold only those that are online.
    cpus::bring_online(create.cpus).map_err(|error| error.to_string())?;
    let workload = finish(create.workload, report)?;
    let container = builder(
        create.container_id,
        create.stdio,
        standard,
        create.preserved,
    )
    .and_then(|builder| {
        builder
            .with_executor(workload)
            .as_init(create.bundle)
            .with_systemd(false)
            .with_detach(true)
            .build()
    })
    .map_err(|error| describe(&error))?;
    match container.pid() {
        Some(pid) => Ok(Report::Ready { pid: pid.as_raw() }),
        None => Err("libcontainer gave no PID".into()),
    }
}

fn run_exec(exec: Exec, standard: Vec<OwnedFd>, report: &OwnedFd) -> Result<Report, String> {
    let workload = finish(exec.workload, report)?;
    mark_running(&exec.container_id).map_err(|error| describe(&error))?;
    builder(exec.container_id, exec.stdio, standard, exec.preserved)
        .and_then(|builder| {
            builder
                .with_executor(workload)
                .as_tenant()
                .with_process(Some(exec.process))
                .with_detach(true)
                .build()
        })
        .map(|pid| Report::Ready { pid: pid.as_raw() })
        .map_err(|error| describe(&error))
}

fn finish(workload: Workload, report: &OwnedFd) -> Result<finish::Finish, String> {
    finish::Finish::new(workload, report.as_fd())
        .map_err(|error| format!("opening what the container needs of the guest: {error}"))
}

/// The agent starts and pauses containers itself and keeps their state; libcontainer's file says "created" until the
/// first exec, which libcontainer allows in a running container only.
fn mark_running(container_id: &str) -> Result<(), LibcontainerError> {
    let mut container = Container::load(Path::new(dirs::STATE).join(container_id))?;
    if container.status() == ContainerStatus::Created {
        container.set_status(ContainerStatus::Running).save()?;
    }
    Ok(())
}

/// libcontainer leaves as many descriptors as are preserved open for the process, from number 3 on, where they are already.
fn builder(
    container_id: String,
    stdio: ChildStdio,
    standard: Vec<OwnedFd>,
    preserved: usize,
) -> Result<ContainerBuilder, LibcontainerError> {
    let preserved = i32::try_from(preserved)
        .map_err(|error| LibcontainerError::Other(format!("preserved descriptors: {error}")))?;
    let builder = ContainerBuilder::new(container_id, SyscallType::default())
        .with_root_path(dirs::STATE)?
        .with_preserved_fds(preserved);
    Ok(match stdio {
        ChildStdio::Terminal(console) => builder.with_console_socket(Some(console)),
        ChildStdio::Handed => {
            let standard = <[OwnedFd; 3]>::try_from(standard);
            let [stdin, stdout, stderr] = standard.map_err(|standard| {
                LibcontainerError::Other(format!("{} standard streams", standard.len()))
            })?;
            builder
                .with_stdin(stdin)
                .with_stdout(stdout)
                .with_stderr(stderr)
        }
    })
}

fn run_update(update: &Update) -> Result<Report, String> {
    let describe = |error: &dyn std::error::Error| {
        format!(
            "changing the limits of cgroup {}: {}",
            update.cgroup.display(),
            chain(error)
        )
    };
    let manager =
        libcgroups::v2::manager::Manager::new(dirs::CGROUPS.into(), update.cgroup.clone())
            .map_err(|error| describe(&error))?;
    let options = ControllerOpt {
        resources: &update.resources,
        disable_oom_killer: false,
        oom_score_adj: None,
        freezer_state: None,
    };
    if let Some(count) = update.cpus {
        cpus::bring_online(count).map_err(|error| describe(&error))?;
    }
    manager.apply(&options).map_err(|error| describe(&error))?;
    Ok(Report::Done)
}

/// libcontainer's errors repeat some of their causes; each distinct text is said once.
fn describe(error: &LibcontainerError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}
