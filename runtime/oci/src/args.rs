//! runc's command line, as runc 1.1 and 1.2 have it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Runs each OCI container in its own lightweight virtual machine.
#[derive(Debug, Parser)]
#[command(name = crate::NAME, disable_version_flag = true, max_term_width = 100, args_override_self = true)]
pub struct Cli {
    /// Directory for the state of containers
    #[arg(
        long,
        value_name = "DIR",
        env = "CLOISON_RUNTIME_ROOT",
        default_value = "/run/cloison-runtime"
    )]
    pub root: PathBuf,
    /// Write log lines to a file instead of standard error
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Format of log lines
    #[arg(long, value_name = "FORMAT", default_value = "text", value_parser = ["text", "json"])]
    pub log_format: String,
    /// Log more
    #[arg(long)]
    pub debug: bool,
    /// Have systemd make the container's cgroup; cgroupsPath is then "slice:prefix:name"
    #[arg(long)]
    pub systemd_cgroup: bool,
    /// Only "false" and "auto": this runtime needs root
    #[arg(long, value_name = "WORD", default_value = "auto", value_parser = ["auto", "false"])]
    pub rootless: String,
    /// Accepted for callers that pass it; checkpoints are not supported
    #[arg(long, value_name = "PATH", hide = true)]
    pub criu: Option<PathBuf>,
    /// Print the version
    #[arg(short, long)]
    pub version: bool,
    #[command(subcommand)]
    pub verb: Option<Verb>,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Create a container from a bundle
    Create(Create),
    /// Create, start and await a container, and delete it
    Run(Run),
    /// Start a created container's process
    Start(Container),
    /// Print a container's state
    State(Container),
    /// Send a signal to a container's init
    Kill(Kill),
    /// Delete a container
    Delete(Delete),
    /// Run another process in a container
    Exec(Box<Exec>),
    /// List the processes of a container on the host
    Ps(Ps),
    /// List containers
    List(List),
    /// Suspend all processes of a container
    Pause(Container),
    /// Let a container's processes go on
    Resume(Container),
    /// Change a container's limits
    Update(Box<Update>),
    /// Print a container's statistics
    Events(Events),
    /// Print what this runtime supports
    Features,
    /// Write a template of a bundle's config.json
    Spec(Spec),
    /// Not supported
    Checkpoint(Anything),
    /// Not supported
    Restore(Anything),
}

/// A verb that takes nothing but a container.
#[derive(Debug, Args)]
pub struct Container {
    /// Container ID
    pub container: String,
}

/// A verb that is refused whatever it is given.
#[derive(Debug, Args)]
pub struct Anything {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub anything: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Create {
    /// Container ID
    pub container: String,
    /// Directory with config.json
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub bundle: PathBuf,
    /// Where to write the pid of the process that stands for the container's init
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Socket that takes the descriptor of the container's terminal
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// Hand on so many descriptors beyond standard error: pipes, files, connected sockets and terminals
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u32,
    /// Accepted: the guest's root file system is always pivoted to
    #[arg(long)]
    pub no_pivot: bool,
    /// Accepted: the guest's keyrings are its own
    #[arg(long)]
    pub no_new_keyring: bool,
}

#[derive(Debug, Args)]
pub struct Run {
    #[command(flatten)]
    pub create: Create,
    /// Return as soon as the container runs
    #[arg(short, long)]
    pub detach: bool,
    /// Keep the container when it has stopped
    #[arg(long)]
    pub keep: bool,
    /// Accepted: the process that stands for the container is this one's child
    #[arg(long)]
    pub no_subreaper: bool,
}

#[derive(Debug, Args)]
pub struct Kill {
    /// Container ID
    pub container: String,
    /// Signal, by name or number; 0 only asks whether there is a process
    #[arg(default_value = "SIGTERM", value_parser = signal_or_none)]
    pub signal: i32,
    /// Send it to every process of the container
    #[arg(short, long)]
    pub all: bool,
}

#[derive(Debug, Args)]
pub struct Delete {
    /// Container ID
    pub container: String,
    /// Kill it first if it runs; no error if there is none
    #[arg(short, long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct Exec {
    /// Working directory
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<PathBuf>,
    /// Set an environment variable
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Give the process a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// User and group, by number
    #[arg(short, long, value_name = "UID[:GID]")]
    pub user: Option<String>,
    /// Additional group
    #[arg(short = 'g', long, value_name = "GID")]
    pub additional_gids: Vec<u32>,
    /// File with the process, as in config.json
    #[arg(short, long, value_name = "FILE")]
    pub process: Option<PathBuf>,
    /// Return as soon as the process runs
    #[arg(short, long)]
    pub detach: bool,
    /// Where to write the pid of the process that stands for this one
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Socket that takes the descriptor of the process's terminal
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// Add a capability
    #[arg(short, long, value_name = "NAME")]
    pub cap: Vec<String>,
    /// Forbid to gain privileges by an exec; "=false" allows it
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub no_new_privs: Option<bool>,
    /// Hand on so many descriptors beyond standard error: pipes, files, connected sockets and terminals
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u32,
    /// In a container that is paused, wait until it is resumed
    #[arg(long)]
    pub ignore_paused: bool,
    /// Refused: AppArmor is not in the guest
    #[arg(long, value_name = "PROFILE", hide = true)]
    pub apparmor: Option<String>,
    /// Refused: SELinux is not in the guest
    #[arg(long, value_name = "LABEL", hide = true)]
    pub process_label: Option<String>,
    /// A cgroup that there is, by its path below the container's
    #[arg(long, value_name = "PATH")]
    pub cgroup: Vec<String>,
    /// Accepted: the process that stands for this one is this command's child
    #[arg(long, hide = true)]
    pub no_subreaper: bool,
    /// Container ID
    pub container: String,
    /// Command and arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Ps {
    /// "table" or "json"
    #[arg(short, long, default_value = "table", value_parser = ["table", "json"])]
    pub format: String,
    /// Container ID
    pub container: String,
    /// Options of ps(1), -ef by default
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub options: Vec<String>,
}

#[derive(Debug, Args)]
pub struct List {
    /// "table" or "json"
    #[arg(short, long, default_value = "table", value_parser = ["table", "json"])]
    pub format: String,
    /// Print IDs only
    #[arg(short, long)]
    pub quiet: bool,
}

#[derive(Debug, Args)]
pub struct Update {
    /// Container ID
    pub container: String,
    /// File with resources as in config.json; "-" is standard input
    #[arg(short, long, value_name = "FILE")]
    pub resources: Option<PathBuf>,
    /// CFS period, microseconds
    #[arg(long)]
    pub cpu_period: Option<u64>,
    /// CFS quota, microseconds
    #[arg(long, allow_hyphen_values = true)]
    pub cpu_quota: Option<i64>,
    /// Time beyond the quota that a period may take of what others have left, microseconds
    #[arg(long)]
    pub cpu_burst: Option<u64>,
    /// 1: give its processes only what no others want
    #[arg(long)]
    pub cpu_idle: Option<i64>,
    /// CPU shares
    #[arg(long)]
    pub cpu_share: Option<u64>,
    /// Refused: real-time limits are not supported
    #[arg(long, hide = true)]
    pub cpu_rt_period: Option<u64>,
    /// Refused: real-time limits are not supported
    #[arg(long, hide = true)]
    pub cpu_rt_runtime: Option<i64>,
    /// CPUs of the host for the VM, as in 0-2,7
    #[arg(long, value_name = "LIST")]
    pub cpuset_cpus: Option<String>,
    /// Memory nodes of the host for the VM
    #[arg(long, value_name = "LIST")]
    pub cpuset_mems: Option<String>,
    /// Share of block devices beside other cgroups, 10 to 1000
    #[arg(long)]
    pub blkio_weight: Option<u16>,
    /// Memory limit, bytes
    #[arg(long, allow_hyphen_values = true)]
    pub memory: Option<String>,
    /// Memory reservation, bytes
    #[arg(long, allow_hyphen_values = true)]
    pub memory_reservation: Option<String>,
    /// Memory and swap, bytes
    #[arg(long, allow_hyphen_values = true)]
    pub memory_swap: Option<String>,
    /// Most processes
    #[arg(long, allow_hyphen_values = true)]
    pub pids_limit: Option<i64>,
}

#[derive(Debug, Args)]
pub struct Events {
    /// Print statistics once
    #[arg(long)]
    pub stats: bool,
    /// Time between two lines of statistics, such as 5s
    #[arg(long, default_value = "5s")]
    pub interval: String,
    /// Container ID
    pub container: String,
}

#[derive(Debug, Args)]
pub struct Spec {
    /// Directory to write config.json into
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub bundle: PathBuf,
}

/// A signal, or 0 for none.
fn signal_or_none(text: &str) -> Result<i32, cloison_sandbox::UnknownSignal> {
    match text {
        "0" => Ok(0),
        _ => cloison_sandbox::signal_number(text),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(words: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(words.split(' '))
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn callers_words_are_understood() {
        for words in [
            "r --root /x --log /l --log-format json create --bundle /b --pid-file /b/init.pid id",
            "r --systemd-cgroup create --bundle /b --pid-file /p --console-socket /s --no-pivot --no-new-keyring id",
            "r --log /l --log-format=json --debug kill --all id 9",
            "r kill id KILL",
            "r kill id",
            "r exec --process /p --detach --pid-file /x id",
            "r exec -u 1:2 -e A=b -t --cwd / --cap CAP_NET_RAW -g 5 -g 6 id sh -c x",
            "r exec --no-new-privs id true",
            "r exec --no-new-privs=false id true",
            "r delete --force id",
            "r ps --format json id",
            "r ps id -o pid,cmd",
            "r list -f json",
            "r list -q",
            "r update -r - id",
            "r update --memory 64M --memory-swap -1 id",
            "r update id --cpuset-cpus 1 --cpu-period 900000 --cpu-quota -1 --blkio-weight 500",
            "r events --stats id",
            "r events --interval=10s id",
            "r features",
            "r spec -b /b",
            "r run -d -b /b id",
            "r checkpoint --image-path /x id",
            "r restore --bundle /b id",
            "r --rootless false list",
            "r -v",
            "r --version",
        ] {
            parse(words).unwrap_or_else(|error| panic!("{words}: {error}"));
        }
    }

    #[test]
    fn what_makes_no_sense_is_an_error() {
        for words in [
            "r create",
            "r create a b",
            "r kill id NOSIGNAL",
            "r kill id 99",
            "r kill id -1",
            "r ps --format yaml id",
            "r --rootless true list",
            "r --log-format xml list",
            "r exec",
            "r nonsense",
            "r create --preserve-fds x id",
        ] {
            assert!(parse(words).is_err(), "{words}");
        }
    }
}
