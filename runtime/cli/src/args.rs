//! The command line as a person types it: docker's names and meanings, and nothing done yet.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use cloison_image::Reference;
use cloison_sandbox::{Home, Name, Parts, signal_number};
use cloison_vmm::EngineChoice;

use crate::network::NetworkOptions;
use crate::values::{Bytes, EnvVar, MilliCpus, Tmpfs, Ulimit, Volume};

/// Runs each container in its own lightweight virtual machine.
#[derive(Debug, Parser)]
#[command(
    name = "cloison",
    version,
    propagate_version = true,
    max_term_width = 100
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Verb,
}

/// Options of every verb.
#[derive(Debug, Args)]
pub struct Global {
    /// Directory for the state of running containers
    #[arg(long, global = true, value_name = "DIR", env = "CLOISON_RUN_DIR", default_value = Home::DEFAULT_RUN)]
    pub run_dir: PathBuf,
    /// Directory for images, writable layers and logs
    #[arg(long, global = true, value_name = "DIR", env = "CLOISON_DATA_DIR", default_value = Home::DEFAULT_DATA)]
    pub data_dir: PathBuf,
    /// Guest kernel, an uncompressed ELF file [default: vmlinux beside this program or in /usr/lib/cloison]
    #[arg(long, global = true, value_name = "FILE", env = "CLOISON_KERNEL")]
    pub kernel: Option<PathBuf>,
    /// Guest's initial ramfs with the agent [default: initramfs beside this program or in /usr/lib/cloison]
    #[arg(long, global = true, value_name = "FILE", env = "CLOISON_INITRAMFS")]
    pub initramfs: Option<PathBuf>,
    /// QEMU for the software engine [default: qemu-system-x86_64 in PATH]
    #[arg(long, global = true, value_name = "FILE", env = "CLOISON_QEMU")]
    pub qemu: Option<PathBuf>,
    /// Say on standard error what is being done, and errors with all their causes
    #[arg(long, global = true)]
    pub debug: bool,
}

impl Global {
    /// What was said about the parts of a VM.
    pub fn parts(&self) -> Parts {
        Parts {
            kernel: self.kernel.clone(),
            initramfs: self.initramfs.clone(),
            qemu: self.qemu.clone(),
        }
    }
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Create a container from an image and run a command in it
    #[command(disable_help_flag = true)]
    Run(Box<Run>),
    /// Run a command in a running container
    Exec(Exec),
    /// List containers
    Ps(Ps),
    /// Send a signal to containers
    Kill(Kill),
    /// Stop containers: their stop signal first, SIGKILL after a while
    Stop(Stop),
    /// Wait for containers to stop and print their exit codes
    Wait(Containers),
    /// Remove containers
    Rm(Rm),
    /// Show what a detached container wrote
    Logs(Logs),
    /// Show all that is known of containers, as JSON
    Inspect(Containers),
    /// Remove every container that does not run, templates, and whatever a crash left behind
    Prune(Prune),
    /// Manage networks
    #[command(subcommand)]
    Network(NetworkVerb),
    /// Say what this host can do, and what it lacks
    Doctor,
    /// Make the runtime known to docker, podman or containerd
    Install(Install),
    /// Take it out of their configuration again
    Uninstall(Install),
    /// Print a completion script for a shell
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Subcommand)]
pub enum NetworkVerb {
    /// Create a network
    Create(NetworkCreate),
    /// List networks
    #[command(alias = "list")]
    Ls(NetworkLs),
    /// Show all that is known of networks, as JSON
    Inspect(NetworkNames),
    /// Remove networks that no container is on
    #[command(alias = "remove")]
    Rm(NetworkNames),
}

#[derive(Debug, Args)]
pub struct NetworkCreate {
    /// Subnet of the network; one of IPv4 and one of IPv6 can be given [default: one that is free]
    #[arg(long, value_name = "CIDR", value_parser = cloison_net::parse_subnet)]
    pub subnet: Vec<cloison_net::IpNet>,
    /// Give the network IPv6 [default: if the host has a default IPv6 route]
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub ipv6: Option<bool>,
    /// Most bytes in a packet [default: what the host's default route allows]
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<u32>,
    /// Name of the network
    pub name: String,
}

#[derive(Debug, Args)]
pub struct NetworkLs {
    /// Only names
    #[arg(short, long)]
    pub quiet: bool,
    /// A table, or an object a line
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub format: Format,
}

#[derive(Debug, Args)]
pub struct NetworkNames {
    /// Networks, by name
    #[arg(required = true)]
    pub networks: Vec<String>,
}

/// Whose configuration is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Program {
    /// /etc/docker/daemon.json
    Docker,
    /// /etc/containers/containers.conf.d/cloison.conf
    Podman,
    /// /etc/containerd/config.toml
    Containerd,
}

#[derive(Debug, Args)]
pub struct Install {
    /// Whose configuration
    pub program: Program,
    /// Its file, where it is not at its usual place
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The runtime [default: cloison-runtime beside this program]
    #[arg(long, value_name = "FILE")]
    pub runtime: Option<PathBuf>,
    /// Only print what would be written
    #[arg(long)]
    pub dry_run: bool,
}

/// What both `run` and `exec` take.
#[derive(Debug, Args)]
pub struct ProcessOptions {
    /// Run in the background
    #[arg(short, long)]
    pub detach: bool,
    /// Keep standard input open
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the process a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Set an environment variable; without a value, pass this one on
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<EnvVar>,
    /// Read environment variables from a file
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// Working directory
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// User name or ID, and group name or ID
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
}

#[derive(Debug, Args)]
pub struct Run {
    #[command(flatten)]
    pub process: ProcessOptions,
    /// Remove the container when it has stopped
    #[arg(long)]
    pub rm: bool,
    /// Name of the container
    #[arg(long)]
    pub name: Option<Name>,
    /// Mount a file or directory of the host
    #[arg(short, long, value_name = "SRC:DST[:ro]")]
    pub volume: Vec<Volume>,
    /// Mount a tmpfs
    #[arg(long, value_name = "DST[:OPTIONS]")]
    pub tmpfs: Vec<Tmpfs>,
    /// Mount the container's root file system read-only
    #[arg(long)]
    pub read_only: bool,
    /// Replace the image's entrypoint; an empty one removes it
    #[arg(long, value_name = "COMMAND")]
    pub entrypoint: Option<String>,
    /// Memory the container may use; its VM gets a little more [default: what a VM of 1 GiB has]
    #[arg(short, long, value_name = "BYTES")]
    pub memory: Option<Bytes>,
    /// CPUs the container may use
    #[arg(long, value_name = "NUMBER")]
    pub cpus: Option<MilliCpus>,
    /// Host name of the container
    #[arg(short = 'h', long, value_name = "NAME")]
    pub hostname: Option<String>,
    #[command(flatten)]
    pub network: NetworkOptions,
    /// Add a capability, or ALL
    #[arg(long, value_name = "CAPABILITY", value_delimiter = ',')]
    pub cap_add: Vec<String>,
    /// Drop a capability, or ALL
    #[arg(long, value_name = "CAPABILITY", value_delimiter = ',')]
    pub cap_drop: Vec<String>,
    /// no-new-privileges, seccomp=unconfined or seccomp=PROFILE.json
    #[arg(long, value_name = "OPTION")]
    pub security_opt: Vec<String>,
    /// Limit a resource of each process
    #[arg(long, value_name = "NAME=SOFT[:HARD]")]
    pub ulimit: Vec<Ulimit>,
    /// Run an init as process 1 that passes signals on and reaps
    #[arg(long)]
    pub init: bool,
    /// Signal that stops the container [default: the image's, or TERM]
    #[arg(long, value_name = "SIGNAL", value_parser = signal_number)]
    pub stop_signal: Option<i32>,
    /// Write the container's ID to a file
    #[arg(long, value_name = "FILE")]
    pub cidfile: Option<PathBuf>,
    /// What runs the VM: kvm, software, or whichever works
    #[arg(long, value_enum, env = "CLOISON_ENGINE", default_value_t = EngineArg::Auto)]
    pub engine: EngineArg,
    /// Whether the VM starts from a template, which is made where there is none
    #[arg(long, value_enum, env = "CLOISON_TEMPLATE", default_value_t = TemplateArg::Auto)]
    pub template: TemplateArg,
    /// Say on standard error where the run's time went, or write it to FILE as a Chrome trace
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true, conflicts_with = "detach")]
    pub profile: Option<Option<PathBuf>>,
    /// oci:DIR[:TAG], docker-archive:FILE[:REF] or rootfs:DIR
    pub image: Reference,
    /// Command and arguments, in place of the image's
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
    /// Print help
    #[arg(long, action = clap::ArgAction::Help)]
    pub help: Option<bool>,
}

/// `--engine`'s values.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum EngineArg {
    Auto,
    Kvm,
    Software,
}

impl From<EngineArg> for EngineChoice {
    fn from(arg: EngineArg) -> Self {
        match arg {
            EngineArg::Auto => Self::Auto,
            EngineArg::Kvm => Self::Kvm,
            EngineArg::Software => Self::Software,
        }
    }
}

/// `--template`'s values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TemplateArg {
    /// Wherever the engine can
    Auto,
    /// Every VM boots
    Off,
}

#[derive(Debug, Args)]
pub struct Exec {
    #[command(flatten)]
    pub process: ProcessOptions,
    /// Container, by name or ID
    pub container: String,
    /// Command and arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// How a listing is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    Json,
}

#[derive(Debug, Args)]
pub struct Ps {
    /// Also those that have stopped
    #[arg(short, long)]
    pub all: bool,
    /// Only IDs
    #[arg(short, long)]
    pub quiet: bool,
    /// IDs and commands in full
    #[arg(long)]
    pub no_trunc: bool,
    /// A table, or an object a line
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub format: Format,
}

#[derive(Debug, Args)]
pub struct Kill {
    /// Signal, by name or number
    #[arg(short, long, value_parser = signal_number, default_value = "KILL")]
    pub signal: i32,
    #[command(flatten)]
    pub on: Containers,
}

#[derive(Debug, Args)]
pub struct Stop {
    /// Seconds until SIGKILL
    #[arg(
        short,
        long,
        alias = "timeout",
        value_name = "SECONDS",
        default_value_t = 10
    )]
    pub time: u32,
    #[command(flatten)]
    pub on: Containers,
}

#[derive(Debug, Args)]
pub struct Rm {
    /// Kill them if they run
    #[arg(short, long)]
    pub force: bool,
    #[command(flatten)]
    pub on: Containers,
}

#[derive(Debug, Args)]
pub struct Logs {
    /// Go on until the container stops
    #[arg(short, long)]
    pub follow: bool,
    /// When each line was written
    #[arg(short, long)]
    pub timestamps: bool,
    /// Only the last lines
    #[arg(short = 'n', long, value_name = "LINES")]
    pub tail: Option<usize>,
    /// Container, by name or ID
    pub container: String,
}

#[derive(Debug, Args)]
pub struct Prune {
    /// Do not ask
    #[arg(short, long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct Containers {
    /// Containers, by name or ID
    #[arg(required = true)]
    pub containers: Vec<String>,
}
