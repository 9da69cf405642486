//! The host's side of the agent's protocol: calls with the host's types and errors for people. Answers come from a hostile
//! guest: they are bounded by ttrpc's own message limit, and nothing in them is used as a path or a command.

use std::fs::File;
use std::io::Read;
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cloison_agent_api::PROTOCOL;
use cloison_agent_api::agent::{self as api, HostSocket, Stdio, TtySize};
use cloison_agent_api::agent_ttrpc::AgentClient;
use cloison_vmm::MacAddress;
use oci_spec::runtime::{LinuxResources, Process, Spec};
use ttrpc::context::{self, Context};
use ttrpc::proto::Code;

use crate::Lifeline;

/// How long a guest may take from the start of its VM to its agent's first answer. Far beyond what any engine needs on a
/// loaded host; it only turns a hung guest into an error.
const BOOT_TIMEOUT: Duration = Duration::from_secs(180);
/// How long any call but a wait may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// Random bytes a guest is given, twice what its generator is seeded with.
const ENTROPY: usize = 64;

/// Longest text taken from an agent's answer into a message, characters.
const MAX_MESSAGE: usize = 4096;

/// The calls that look for an executable, in words.
const CREATE: &str = "create the container";
const START: &str = "start the container";
const EXEC: &str = "run the process";

/// Why the agent refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// No such container, process or executable.
    NotFound,
    /// The executable may not be executed.
    PermissionDenied,
    /// The container or process is in the wrong state.
    WrongState,
    /// The request makes no sense to the agent.
    Invalid,
    /// Anything else, a lost connection included.
    Other,
}

/// A call to the agent failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} in the guest: {message}")]
pub struct AgentError {
    /// Verb phrase: "create the container".
    pub what: &'static str,
    /// What kind of failure.
    pub failure: Failure,
    /// The agent's own words, or what happened to the connection.
    pub message: String,
}

impl AgentError {
    /// Whether the call was one that looks for an executable, so that [`Failure::NotFound`] speaks of that.
    pub fn names_executable(&self) -> bool {
        matches!(self.what, CREATE | START | EXEC)
    }

    fn new(what: &'static str, error: ttrpc::Error) -> Self {
        let (failure, message) = match error {
            ttrpc::Error::RpcStatus(status) => (
                match status.code() {
                    Code::NOT_FOUND => Failure::NotFound,
                    Code::PERMISSION_DENIED => Failure::PermissionDenied,
                    Code::FAILED_PRECONDITION | Code::ALREADY_EXISTS => Failure::WrongState,
                    Code::INVALID_ARGUMENT => Failure::Invalid,
                    _ => Failure::Other,
                },
                status.message().to_owned(),
            ),
            other => (Failure::Other, other.to_string()),
        };
        Self {
            what,
            failure,
            message: printable(&message),
        }
    }
}

/// A guest's text made fit for a person's terminal: no control characters but line feeds and tabs, and not without end.
fn printable(text: &str) -> String {
    text.chars()
        .filter(|c| !c.is_control() || matches!(c, '\n' | '\t'))
        .take(MAX_MESSAGE)
        .collect()
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitStatus {
    /// 0..=255; 128+n when ended by signal n.
    pub code: u8,
    /// The container's memory limit was hit while the process ran.
    pub oom_killed: bool,
}

/// What a container uses, by its cgroup in the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time, nanoseconds.
    pub cpu_ns: u64,
    /// Of it, in user mode.
    pub cpu_user_ns: u64,
    /// Of it, in the guest's kernel.
    pub cpu_system_ns: u64,
    /// Memory, page cache included, bytes.
    pub memory_bytes: u64,
    /// Its limit, bytes; 0: none.
    pub memory_limit_bytes: u64,
    /// Page cache that can go first, bytes.
    pub memory_inactive_file_bytes: u64,
    /// Processes and threads.
    pub pids: u64,
    /// How often the OOM killer has hit it.
    pub oom_kills: u64,
}

/// What the agent says of its guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestInfo {
    /// The guest's `uname -r`.
    pub kernel: String,
    /// The agent's release.
    pub agent: String,
    /// The guest's memory, bytes.
    pub memory: u64,
    /// From the start of the guest's clock to the agent's first instruction.
    pub agent_began: Duration,
    /// From the start of the guest's clock to this answer.
    pub uptime: Duration,
}

/// What a container has of others of its guest, which it came to.
pub struct Joined<'a> {
    /// Namespaces.
    pub namespaces: Vec<api::SharedNamespace>,
    /// When this is cut, the container is killed and deleted.
    pub lifeline: &'a Lifeline,
}

/// One more process for a container.
pub struct NewProcess<'a> {
    /// Names it; nobody else's while it runs.
    pub id: &'a str,
    /// What it is.
    pub process: &'a Process,
    /// Its streams.
    pub stdio: Stdio,
    /// The first size of its terminal.
    pub tty: Option<TtySize>,
    /// When this is cut, it is killed.
    pub lifeline: Option<&'a Lifeline>,
    /// Its cgroup, by the path below the container's; empty for that one itself.
    pub cgroup: &'a str,
    /// In a container that is paused, to wait until it is resumed.
    pub when_resumed: bool,
}

/// A connection to the agent. Clones share it.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
}

fn within(limit: Duration) -> Context {
    context::with_duration(limit)
}

impl Agent {
    /// Speaks over `stream`, one end of a connection whose other end is or will be the agent's. Must be called inside a tokio
    /// runtime.
    ///
    /// # Errors
    /// When the runtime cannot watch the stream.
    pub fn over(stream: UnixStream) -> std::io::Result<Self> {
        stream.set_nonblocking(true)?;
        let stream = tokio::net::UnixStream::from_std(stream)?;
        let client = ttrpc::r#async::Client::new(ttrpc::r#async::transport::Socket::new(stream));
        Ok(Self {
            client: AgentClient::new(client),
        })
    }

    /// Waits for the guest to come up, checks that both sides speak the same protocol, sets the guest's clock and has its random
    /// numbers begin anew: a guest that was made from a template has both from there.
    ///
    /// # Errors
    /// [`AgentError`], a mismatch of versions included.
    pub async fn hello(&self) -> Result<GuestInfo, AgentError> {
        self.greet(0).await
    }

    /// As [`Agent::hello`], for a guest that may use so many of the CPUs that it finds. The others are not there for it yet.
    ///
    /// # Errors
    /// As for [`Agent::hello`].
    pub async fn hello_with_cpus(&self, cpus: u8) -> Result<GuestInfo, AgentError> {
        self.greet(cpus.into()).await
    }

    async fn greet(&self, cpus: u32) -> Result<GuestInfo, AgentError> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let request = api::HelloRequest {
            protocol: PROTOCOL,
            realtime_ns: u64::try_from(now.as_nanos()).unwrap_or(0),
            entropy: entropy()?,
            cpus,
            ..Default::default()
        };
        let answer = self
            .client
            .hello(within(BOOT_TIMEOUT), &request)
            .await
            .map_err(|e| AgentError::new("reach the agent", e))?;
        if answer.protocol != PROTOCOL {
            return Err(AgentError {
                what: "reach the agent",
                failure: Failure::Invalid,
                message: format!(
                    "it speaks protocol {} (release {}), this cloison speaks {PROTOCOL}: install an initramfs and a cloison of the same release",
                    answer.protocol,
                    printable(&answer.version)
                ),
            });
        }
        Ok(GuestInfo {
            kernel: printable(&answer.kernel),
            agent: printable(&answer.version),
            memory: answer.memory_bytes,
            agent_began: Duration::from_nanos(answer.began_ns),
            uptime: Duration::from_nanos(answer.now_ns),
        })
    }

    /// Creates a container and its init, which waits for [`Agent::start`]. Paths in `spec` are the guest's, but for the sources of
    /// the mounts that `sockets` are for. One that came to the guest of another is `joined`.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn create(
        &self,
        container: &str,
        spec: &Spec,
        stdio: Stdio,
        tty: Option<TtySize>,
        sockets: Vec<HostSocket>,
        joined: Option<Joined<'_>>,
    ) -> Result<(), AgentError> {
        let what = CREATE;
        let lifeline = joined.as_ref().map_or(0, |joined| joined.lifeline.port());
        let request = api::CreateContainerRequest {
            container_id: container.into(),
            spec: json(what, spec)?,
            stdio: Some(stdio).into(),
            tty_size: tty.into(),
            sockets,
            namespaces: joined.map_or_else(Vec::new, |joined| joined.namespaces),
            lifeline,
            ..Default::default()
        };
        // The first call of a sandbox may be sent before the guest is up.
        let answer = self
            .client
            .create_container(within(BOOT_TIMEOUT), &request)
            .await;
        answer.map(drop).map_err(|e| AgentError::new(what, e))
    }

    /// Runs the container's process.
    ///
    /// # Errors
    /// [`Failure::NotFound`] and [`Failure::PermissionDenied`] when there is no such executable or it is not one.
    pub async fn start(&self, container: &str) -> Result<(), AgentError> {
        let answer = self
            .client
            .start_container(within(CALL_TIMEOUT), &of(container))
            .await;
        answer.map(drop).map_err(|e| AgentError::new(START, e))
    }

    /// Removes a container with all that runs in it.
    ///
    /// # Errors
    /// [`Failure::NotFound`] when there is none.
    pub async fn delete(&self, container: &str) -> Result<(), AgentError> {
        let request = api::DeleteContainerRequest {
            container_id: container.into(),
            force: true,
            ..Default::default()
        };
        let answer = self
            .client
            .delete_container(within(CALL_TIMEOUT), &request)
            .await;
        answer
            .map(drop)
            .map_err(|e| AgentError::new("delete the container in its guest", e))
    }

    /// Runs one more process in a container.
    ///
    /// # Errors
    /// As for [`Agent::start`].
    pub async fn exec(&self, container: &str, exec: NewProcess<'_>) -> Result<(), AgentError> {
        let what = EXEC;
        let request = api::ExecRequest {
            container_id: container.into(),
            exec_id: exec.id.into(),
            process: json(what, exec.process)?,
            stdio: Some(exec.stdio).into(),
            tty_size: exec.tty.into(),
            lifeline: exec.lifeline.map_or(0, Lifeline::port),
            cgroup: exec.cgroup.into(),
            when_resumed: exec.when_resumed,
            ..Default::default()
        };
        let context = match exec.when_resumed {
            true => Context::default(),
            false => within(CALL_TIMEOUT),
        };
        let answer = self.client.exec(context, &request).await;
        answer.map(drop).map_err(|e| AgentError::new(what, e))
    }

    /// Waits for a process to end and its output to be sent; the empty `exec_id` names the container's init.
    ///
    /// # Errors
    /// [`AgentError`], a lost connection included.
    pub async fn wait(&self, container: &str, exec_id: &str) -> Result<ExitStatus, AgentError> {
        let request = api::ProcessRequest {
            container_id: container.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        let what = "wait for the process";
        let answer = self.client.wait(Context::default(), &request).await;
        let answer = answer.map_err(|e| AgentError::new(what, e))?;
        let code = u8::try_from(answer.exit_code).map_err(|_| AgentError {
            what,
            failure: Failure::Invalid,
            message: format!(
                "the agent reports the impossible exit code {}",
                answer.exit_code
            ),
        })?;
        Ok(ExitStatus {
            code,
            oom_killed: answer.oom_killed,
        })
    }

    /// Sends a signal to a process, or to all of the container's.
    ///
    /// # Errors
    /// [`Failure::NotFound`] when it has ended.
    pub async fn signal(
        &self,
        container: &str,
        exec_id: &str,
        signal: i32,
        all: bool,
    ) -> Result<(), AgentError> {
        let request = api::SignalRequest {
            container_id: container.into(),
            exec_id: exec_id.into(),
            signal: signal.unsigned_abs(),
            all,
            ..Default::default()
        };
        let answer = self.client.signal(within(CALL_TIMEOUT), &request).await;
        answer
            .map(drop)
            .map_err(|e| AgentError::new("send the signal", e))
    }

    /// Tells a process's terminal its size.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn resize(
        &self,
        container: &str,
        exec_id: &str,
        size: TtySize,
    ) -> Result<(), AgentError> {
        let request = api::ResizeTtyRequest {
            container_id: container.into(),
            exec_id: exec_id.into(),
            size: Some(size).into(),
            ..Default::default()
        };
        let answer = self.client.resize_tty(within(CALL_TIMEOUT), &request).await;
        answer
            .map(drop)
            .map_err(|e| AgentError::new("resize the terminal", e))
    }

    /// Changes a container's limits.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn update(
        &self,
        container: &str,
        resources: &LinuxResources,
    ) -> Result<(), AgentError> {
        let what = "update the container's limits";
        let request = api::UpdateContainerRequest {
            container_id: container.into(),
            resources: json(what, resources)?,
            ..Default::default()
        };
        let answer = self
            .client
            .update_container(within(CALL_TIMEOUT), &request)
            .await;
        answer.map(drop).map_err(|e| AgentError::new(what, e))
    }

    /// Has the guest use so many CPUs from now on: it starts those that the host allows it now, or stops those that are going to be
    /// taken from it.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn use_cpus(&self, count: u8) -> Result<(), AgentError> {
        let request = api::CpusRequest {
            count: count.into(),
            ..Default::default()
        };
        let answer = self.client.use_cpus(within(CALL_TIMEOUT), &request).await;
        answer
            .map(drop)
            .map_err(|e| AgentError::new("change the number of CPUs", e))
    }

    /// Has the guest's kernel let go of the device in a slot.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn release_device(&self, slot: u32) -> Result<(), AgentError> {
        let answer = self
            .client
            .release_device(within(CALL_TIMEOUT), &in_slot(slot))
            .await;
        answer
            .map(drop)
            .map_err(|e| AgentError::new("let go of a device", e))
    }

    /// Makes a network device of the guest's what `interface` says, or what it says by now.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn configure_interface(&self, interface: &api::Interface) -> Result<(), AgentError> {
        let answer = self
            .client
            .configure_interface(within(CALL_TIMEOUT), interface)
            .await;
        answer
            .map(drop)
            .map_err(|e| AgentError::new("configure a network interface", e))
    }

    /// Takes everything from a network device of the guest's that it was given.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn remove_interface(&self, device: MacAddress) -> Result<(), AgentError> {
        let request = api::InterfaceRequest {
            device: device.to_vec(),
            ..Default::default()
        };
        let answer = self
            .client
            .remove_interface(within(CALL_TIMEOUT), &request)
            .await;
        answer
            .map(drop)
            .map_err(|e| AgentError::new("remove a network interface", e))
    }

    /// Has what is asked at a loopback address of the guest's passed to the host over the stream at `port`.
    ///
    /// # Errors
    /// [`AgentError`].
    pub(crate) async fn serve_resolver(
        &self,
        address: Ipv4Addr,
        port: u32,
    ) -> Result<(), AgentError> {
        let request = api::ResolverRequest {
            address: address.octets().to_vec(),
            port,
            ..Default::default()
        };
        let answer = self
            .client
            .serve_resolver(within(CALL_TIMEOUT), &request)
            .await;
        answer
            .map(drop)
            .map_err(|e| AgentError::new("serve a resolver", e))
    }

    /// Suspends a container's processes.
    ///
    /// # Errors
    /// [`Failure::WrongState`] when it does not run.
    pub async fn pause(&self, container: &str) -> Result<(), AgentError> {
        let answer = self
            .client
            .pause_container(within(CALL_TIMEOUT), &of(container))
            .await;
        answer
            .map(drop)
            .map_err(|e| AgentError::new("pause the container", e))
    }

    /// Lets a container's processes go on.
    ///
    /// # Errors
    /// [`Failure::WrongState`] when it is not paused.
    pub async fn resume(&self, container: &str) -> Result<(), AgentError> {
        let answer = self
            .client
            .resume_container(within(CALL_TIMEOUT), &of(container))
            .await;
        answer
            .map(drop)
            .map_err(|e| AgentError::new("resume the container", e))
    }

    /// What a container uses.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn usage(&self, container: &str) -> Result<Usage, AgentError> {
        let answer = self
            .client
            .container_stats(within(CALL_TIMEOUT), &of(container))
            .await
            .map_err(|e| AgentError::new("read the container's statistics", e))?;
        Ok(Usage {
            cpu_ns: answer.cpu_usage_ns,
            cpu_user_ns: answer.cpu_user_ns,
            cpu_system_ns: answer.cpu_system_ns,
            memory_bytes: answer.memory_usage_bytes,
            memory_limit_bytes: answer.memory_limit_bytes,
            memory_inactive_file_bytes: answer.memory_inactive_file_bytes,
            pids: answer.pids,
            oom_kills: answer.oom_kills,
        })
    }

    /// Ends every process and writes every file back; the VM may be ended afterwards. Containers with a lifeline may take so long to be gone
    /// by themselves.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn shutdown(&self, grace: Duration) -> Result<(), AgentError> {
        let request = api::ShutdownRequest {
            grace_ms: u32::try_from(grace.as_millis()).unwrap_or(u32::MAX),
            ..Default::default()
        };
        let answer = self.client.shutdown(within(CALL_TIMEOUT), &request).await;
        answer
            .map(drop)
            .map_err(|e| AgentError::new("shut the guest down", e))
    }
}

fn entropy() -> Result<Vec<u8>, AgentError> {
    let mut bytes = vec![0; ENTROPY];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(|error| AgentError {
        what: "seed the random numbers",
        failure: Failure::Other,
        message: format!("cannot read /dev/urandom: {error}"),
    })?;
    Ok(bytes)
}

fn of(container: &str) -> api::ContainerRequest {
    api::ContainerRequest {
        container_id: container.into(),
        ..Default::default()
    }
}

fn in_slot(slot: u32) -> api::DeviceRequest {
    api::DeviceRequest {
        slot,
        ..Default::default()
    }
}

fn json(what: &'static str, value: &impl serde::Serialize) -> Result<Vec<u8>, AgentError> {
    serde_json::to_vec(value).map_err(|e| AgentError {
        what,
        failure: Failure::Invalid,
        message: e.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_text_cannot_drive_the_terminal_or_fill_it() {
        assert_eq!(printable("a\x1b[2Jb\r\n\tc\u{9b}"), "a[2Jb\n\tc");
        assert_eq!(printable(&"x".repeat(1 << 20)).len(), MAX_MESSAGE);
    }
}
