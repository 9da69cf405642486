//! The helper: the agent's own executable, started again as a process of one thread that calls libcontainer once,
//! reports and exits. libcontainer forks, changes directories and makes itself undumpable; all of that ends here. The
//! container's process outlives the helper and becomes PID 1's child.

mod copy_up;
mod filter;
mod finish;
mod lookup;
mod trace;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd, RawFd};
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
use crate::report::{ChildStdio, Create, Exec, Failure, FailureKind, Report, Request, Update};
use crate::sys;
use crate::workload::Workload;

/// First argument of the agent's executable that makes it a helper. The numbers of the request's and the report's
/// descriptors follow.
pub const ARGUMENT: &str = "helper";

/// Runs the helper with the arguments after `ARGUMENT`. It has failed only if it could not even report.
pub fn main(mut arguments: impl Iterator<Item = String>) -> ExitCode {
    let mut number = || arguments.next()?.parse::<RawFd>().ok();
    let (Some(request), Some(report)) = (number(), number()) else {
        eprintln!("cloison-agent: the helper is started by the agent only");
        return ExitCode::FAILURE;
    };
    // SAFETY: `spawn::helper` opened both for this process; nothing else has run in it yet.
    let (request, report) = unsafe { (sys::inherited(request), sys::inherited(report)) };
    match serve(File::from(request), &report) {
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

fn send(report: impl AsFd, answer: &Report) -> ExitCode {
    match nix::unistd::write(report, &answer.line()) {
        Ok(_) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn serve(mut request: File, report: &OwnedFd) -> Result<Report, String> {
    let mut json = Vec::new();
    request
        .read_to_end(&mut json)
        .map_err(|error| format!("reading the helper's request: {error}"))?;
    drop(request);
    let request: Request =
        serde_json::from_slice(&json).map_err(|error| format!("the helper's request: {error}"))?;
    // Containers are scheduled like anybody.
    sys::set_policy(sys::Policy::Normal)
        .map_err(|error| format!("leaving the agent's scheduling policy: {error}"))?;
    let copy = report
        .try_clone()
        .map_err(|error| format!("copying the report's descriptor: {error}"))?;
    trace::install(File::from(copy));
    match request {
        Request::Create(create) => run_create(create, report),
        Request::Exec(exec) => run_exec(exec, report),
        Request::Update(update) => run_update(&update),
    }
}

fn run_create(create: Create, report: &OwnedFd) -> Result<Report, String> {
    // First, since a set of CPUs can hold only those that are online.
    cpus::bring_online(create.cpus).map_err(|error| error.to_string())?;
    let workload = finish(create.workload, report)?;
    let container = builder(create.container_id, create.stdio, create.preserved)
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

fn run_exec(exec: Exec, report: &OwnedFd) -> Result<Report, String> {
    let workload = finish(exec.workload, report)?;
    mark_running(&exec.container_id).map_err(|error| describe(&error))?;
    builder(exec.container_id, exec.stdio, exec.preserved)
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
    preserved: usize,
) -> Result<ContainerBuilder, LibcontainerError> {
    let preserved = i32::try_from(preserved)
        .map_err(|error| LibcontainerError::Other(format!("preserved descriptors: {error}")))?;
    let builder = ContainerBuilder::new(container_id, SyscallType::default())
        .with_root_path(dirs::STATE)?
        .with_preserved_fds(preserved);
    Ok(match stdio {
        ChildStdio::Terminal(console) => builder.with_console_socket(Some(console)),
        ChildStdio::Descriptors(numbers) => {
            // SAFETY: `spawn::helper` opened all three for this process, and this is called once.
            let [stdin, stdout, stderr] = numbers.map(|number| unsafe { sys::inherited(number) });
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
