//! What the tests share: the agent under test, its client, a root file system, and a container with its streams.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use cloison_agent::connect::Connect;
use cloison_agent::server::{self, Connections};
use cloison_agent::{Reaper, Service, Shared, boot};
use cloison_agent_api::agent::*;
use cloison_agent_api::agent_ttrpc::AgentClient;
use protobuf::MessageField;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use ttrpc::Code;
use ttrpc::r#async::Client;
use ttrpc::asynchronous::transport::Socket;

pub const ROOT: &str = "/container";

/// Makes the containers' root file system from the initramfs's busybox.
pub fn make_root() {
    for directory in [
        "bin", "dev", "etc", "proc", "sys", "tmp", "run", "masked", "fixed",
    ] {
        fs::create_dir_all(format!("{ROOT}/{directory}")).unwrap();
    }
    fs::set_permissions(format!("{ROOT}/tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    fs::copy("/busybox", format!("{ROOT}/bin/busybox")).unwrap();
    let applets = "sh cat echo id sleep true false env pwd stty head yes kill ls mkdir mknod mount grep wc tr seq dd \
                   hostname ifconfig touch ps sed sha256sum test rm cut ip";
    for applet in applets.split_whitespace() {
        symlink("busybox", format!("{ROOT}/bin/{applet}")).unwrap();
    }
    let file = |path: &str, text: &str, mode| {
        let path = format!("{ROOT}/{path}");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    };
    file(
        "etc/passwd",
        "root:x:0:0::/root:/bin/sh\nweb:x:33:33::/tmp:/bin/sh\n",
        0o644,
    );
    file("etc/data", "not a program", 0o644);
    file("bin/nonsense", "\u{7f}neither script nor program", 0o755);
    file("bin/secret", "#!/bin/sh\n", 0o700);
    file("masked/file", "secret", 0o644);
    file("fixed/file", "text", 0o644);
}

/// Streams that were connected, by port.
#[derive(Clone, Default)]
struct Ports(Arc<Mutex<HashMap<u32, UnixStream>>>);

#[async_trait]
impl Connect for Ports {
    async fn connect(&self, port: u32) -> io::Result<OwnedFd> {
        let stream = self.0.lock().unwrap().remove(&port);
        let stream = stream.ok_or(io::ErrorKind::ConnectionRefused)?;
        stream.set_nonblocking(true)?;
        Ok(stream.into())
    }
}

/// The agent, and a way to reach it.
#[derive(Clone)]
pub struct Guest {
    pub client: AgentClient,
    connections: Connections,
    ports: Ports,
}

pub fn context() -> ttrpc::context::Context {
    ttrpc::context::Context::default()
}

fn unused() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Guest {
    /// Starts the agent, which serves as long as the second value lives.
    pub async fn start() -> (Self, ttrpc::r#async::Server) {
        let ports = Ports::default();
        let shared = Shared::new(Box::new(ports.clone()), Reaper::start().unwrap());
        let service = Service::new(shared);
        service.begin(boot::uptime());
        // The VM must live on after the last connection, to say how the tests went.
        let (server, connections) = server::start(service, || {}).await.unwrap();
        let client = connect(&connections).await;
        let guest = Self {
            client,
            connections,
            ports,
        };
        (guest, server)
    }

    /// One more connection to the agent.
    pub async fn connect(&self) -> AgentClient {
        connect(&self.connections).await
    }

    /// A stream of the host: its port, and the host's side.
    pub fn stream(&self) -> (u32, tokio::net::UnixStream) {
        let (guest, host) = UnixStream::pair().unwrap();
        let port = unused();
        self.ports.0.lock().unwrap().insert(port, guest);
        host.set_nonblocking(true).unwrap();
        (port, tokio::net::UnixStream::from_std(host).unwrap())
    }

    fn streams(&self, terminal: bool) -> (Stdio, Streams) {
        let mut stdio = Stdio::new();
        let (port, stdin) = self.stream();
        stdio.stdin = port;
        let mut streams = Streams {
            stdin: Some(stdin),
            stdout: None,
            stderr: None,
        };
        if !terminal {
            let (port, stdout) = self.stream();
            (stdio.stdout, streams.stdout) = (port, Some(stdout));
            let (port, stderr) = self.stream();
            (stdio.stderr, streams.stderr) = (port, Some(stderr));
        }
        (stdio, streams)
    }

    /// Creates a container from a spec.
    pub async fn create(&self, spec: &Value) -> Result<Container, (Code, String)> {
        self.create_with(spec, Vec::new()).await
    }

    /// Creates a container whose init has these beside stdio.
    pub async fn create_with(
        &self,
        spec: &Value,
        preserved: Vec<Descriptor>,
    ) -> Result<Container, (Code, String)> {
        let terminal = spec["process"]["terminal"] == json!(true);
        let (mut stdio, streams) = self.streams(terminal);
        stdio.preserved = preserved;
        let mut request = CreateContainerRequest::new();
        request.container_id = format!("c{}", unused());
        request.spec = spec.to_string().into_bytes();
        request.stdio = MessageField::some(stdio);
        request.tty_size = MessageField::some(size(101, 33));
        let id = request.container_id.clone();
        let response = self
            .client
            .create_container(context(), &request)
            .await
            .map_err(refusal)?;
        assert!(response.pid > 1);
        Ok(Container {
            guest: self.clone(),
            id,
            exec: String::new(),
            streams,
        })
    }

    /// Creates and starts a container.
    pub async fn run(&self, spec: &Value) -> Container {
        let container = self.create(spec).await.unwrap();
        container.start().await.unwrap();
        container
    }

    /// Runs a shell's script in a container to its end: exit code and standard output.
    pub async fn shell(&self, spec: Value, script: &str) -> (u32, String) {
        let mut spec = spec;
        spec["process"]["args"] = json!(["sh", "-c", script]);
        let mut container = self.run(&spec).await;
        container.streams.stdin = None;
        let output = container.streams.output().await;
        let wait = container.wait().await;
        container.delete(false).await.unwrap();
        (wait.exit_code, output)
    }
}

async fn connect(connections: &Connections) -> AgentClient {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    connections.serve(theirs.into()).await.unwrap();
    ours.set_nonblocking(true).unwrap();
    let ours = tokio::net::UnixStream::from_std(ours).unwrap();
    AgentClient::new(Client::new(Socket::new(ours)))
}

pub fn size(columns: u32, rows: u32) -> TtySize {
    let mut size = TtySize::new();
    size.columns = columns;
    size.rows = rows;
    size
}

pub fn refusal(error: ttrpc::Error) -> (Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("{other}"),
    }
}

/// The host's sides of a process's streams.
pub struct Streams {
    /// The only one with a terminal.
    pub stdin: Option<tokio::net::UnixStream>,
    pub stdout: Option<tokio::net::UnixStream>,
    pub stderr: Option<tokio::net::UnixStream>,
}

impl Streams {
    /// All of standard output.
    pub async fn output(&mut self) -> String {
        read(self.stdout.as_mut().unwrap()).await
    }

    pub async fn errors(&mut self) -> String {
        read(self.stderr.as_mut().unwrap()).await
    }

    /// Reads a terminal until it has shown a text.
    pub async fn expect(&mut self, text: &str) -> String {
        let terminal = self.stdin.as_mut().unwrap();
        let mut shown = Vec::new();
        loop {
            let so_far = String::from_utf8_lossy(&shown).into_owned();
            if so_far.contains(text) {
                return so_far;
            }
            let count = terminal.read_buf(&mut shown).await.unwrap();
            assert!(
                count > 0,
                "the terminal ended after {so_far:?}, without {text:?}"
            );
        }
    }

    pub async fn type_in(&mut self, text: &str) {
        self.stdin
            .as_mut()
            .unwrap()
            .write_all(text.as_bytes())
            .await
            .unwrap();
    }
}

async fn read(stream: &mut tokio::net::UnixStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

/// A container's init, or an exec in it, with its streams.
pub struct Container {
    pub guest: Guest,
    pub id: String,
    pub exec: String,
    pub streams: Streams,
}

impl Container {
    fn request(&self) -> ContainerRequest {
        let mut request = ContainerRequest::new();
        request.container_id = self.id.clone();
        request
    }

    pub async fn start(&self) -> Result<(), (Code, String)> {
        let result = self
            .guest
            .client
            .start_container(context(), &self.request())
            .await;
        result.map(drop).map_err(refusal)
    }

    pub async fn state(&self) -> Result<(Status, u32), (Code, String)> {
        let response = self
            .guest
            .client
            .container_state(context(), &self.request())
            .await;
        response
            .map(|r| (r.status.enum_value().unwrap(), r.pid))
            .map_err(refusal)
    }

    pub async fn pause(&self) -> Result<(), (Code, String)> {
        let result = self
            .guest
            .client
            .pause_container(context(), &self.request())
            .await;
        result.map(drop).map_err(refusal)
    }

    pub async fn resume(&self) -> Result<(), (Code, String)> {
        let result = self
            .guest
            .client
            .resume_container(context(), &self.request())
            .await;
        result.map(drop).map_err(refusal)
    }

    pub async fn update(&self, resources: Value) -> Result<(), (Code, String)> {
        let mut request = UpdateContainerRequest::new();
        request.container_id = self.id.clone();
        request.resources = resources.to_string().into_bytes();
        let result = self
            .guest
            .client
            .update_container(context(), &request)
            .await;
        result.map(drop).map_err(refusal)
    }

    pub async fn stats(&self) -> ContainerStatsResponse {
        self.guest
            .client
            .container_stats(context(), &self.request())
            .await
            .unwrap()
    }

    pub async fn processes(&self) -> Vec<u32> {
        self.guest
            .client
            .list_processes(context(), &self.request())
            .await
            .unwrap()
            .pids
    }

    pub async fn delete(&self, force: bool) -> Result<(), (Code, String)> {
        let mut request = DeleteContainerRequest::new();
        request.container_id = self.id.clone();
        request.force = force;
        let result = self
            .guest
            .client
            .delete_container(context(), &request)
            .await;
        result.map(drop).map_err(refusal)
    }

    pub async fn signal(&self, signal: u32, all: bool) -> Result<(), (Code, String)> {
        let mut request = SignalRequest::new();
        request.container_id = self.id.clone();
        request.exec_id = self.exec.clone();
        request.signal = signal;
        request.all = all;
        let result = self.guest.client.signal(context(), &request).await;
        result.map(drop).map_err(refusal)
    }

    pub async fn resize(&self, columns: u32, rows: u32) -> Result<(), (Code, String)> {
        let mut request = ResizeTtyRequest::new();
        request.container_id = self.id.clone();
        request.exec_id = self.exec.clone();
        request.size = MessageField::some(size(columns, rows));
        let result = self.guest.client.resize_tty(context(), &request).await;
        result.map(drop).map_err(refusal)
    }

    pub async fn try_wait(&self) -> Result<WaitResponse, (Code, String)> {
        let mut request = ProcessRequest::new();
        request.container_id = self.id.clone();
        request.exec_id = self.exec.clone();
        self.guest
            .client
            .wait(context(), &request)
            .await
            .map_err(refusal)
    }

    pub async fn wait(&self) -> WaitResponse {
        self.try_wait().await.unwrap()
    }

    /// Starts one more process in the container, under a name of its own.
    pub async fn exec(&self, process: Value) -> Result<Container, (Code, String)> {
        self.exec_as(&format!("e{}", unused()), process).await
    }

    pub async fn exec_as(&self, id: &str, process: Value) -> Result<Container, (Code, String)> {
        self.exec_with(id, process, Vec::new()).await
    }

    /// Starts one more process that has these beside stdio.
    pub async fn exec_with(
        &self,
        id: &str,
        process: Value,
        preserved: Vec<Descriptor>,
    ) -> Result<Container, (Code, String)> {
        let terminal = process["terminal"] == json!(true);
        let (mut stdio, streams) = self.guest.streams(terminal);
        stdio.preserved = preserved;
        let mut request = ExecRequest::new();
        request.container_id = self.id.clone();
        request.exec_id = id.to_owned();
        request.process = process.to_string().into_bytes();
        request.stdio = MessageField::some(stdio);
        request.tty_size = MessageField::some(size(101, 33));
        self.guest
            .client
            .exec(context(), &request)
            .await
            .map_err(refusal)?;
        Ok(Container {
            guest: self.guest.clone(),
            id: self.id.clone(),
            exec: id.to_owned(),
            streams,
        })
    }

    /// Runs a shell's script in the container to its end: exit code and standard output.
    pub async fn exec_shell(&self, mut process: Value, script: &str) -> (u32, String) {
        process["args"] = json!(["sh", "-c", script]);
        let mut exec = self.exec(process).await.unwrap();
        exec.streams.stdin = None;
        let output = exec.streams.output().await;
        (exec.wait().await.exit_code, output)
    }
}

/// The process of a shell as root.
pub fn process() -> Value {
    json!({
        "user": {"uid": 0, "gid": 0},
        "args": ["sh"],
        "env": ["PATH=/bin"],
        "cwd": "/",
    })
}

/// A spec as container engines write it, without the parts a test adds.
pub fn spec() -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": process(),
        "root": {"path": ROOT},
        "hostname": "inside",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
        ],
        "linux": {
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"}
            ],
        },
    })
}

/// The spec of a shell's script.
pub fn script(text: &str) -> Value {
    let mut spec = spec();
    spec["process"]["args"] = json!(["sh", "-c", text]);
    spec
}

#[track_caller]
pub fn refused<T>(result: Result<T, (Code, String)>, code: Code, text: &str) {
    match result {
        Ok(_) => panic!("not refused; expected {code:?} with {text:?}"),
        Err((actual, message)) => {
            assert_eq!(actual, code, "{message}");
            assert!(message.contains(text), "{message:?} lacks {text:?}");
        }
    }
}
