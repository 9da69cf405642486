//! The init that a container may ask for: the same executable, bound into the container and run as its process 1 under the name
//! [`NAME`]. It runs one command, passes every signal on to it, reaps whatever is orphaned, and ends as the command does.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitCode, ExitStatus};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, tcsetpgrp};

/// The name it is called by.
pub const NAME: &str = "cloison-init";

/// There is no such command, as a shell says it.
const NOT_FOUND: u8 = 127;
/// The command cannot be executed.
const NOT_EXECUTABLE: u8 = 126;

/// Runs `-- COMMAND [ARG...]`.
pub fn main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let (Some(separator), Some(command)) = (arguments.next(), arguments.next()) else {
        return usage();
    };
    if separator != "--" {
        return usage();
    }
    match run(&command, arguments) {
        Ok(status) => ExitCode::from(code(status)),
        Err(error) => {
            eprintln!("{NAME}: cannot run {}: {error}", command.display());
            match error.kind() {
                io::ErrorKind::NotFound => NOT_FOUND.into(),
                _ => NOT_EXECUTABLE.into(),
            }
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("usage: {NAME} -- COMMAND [ARG...]");
    ExitCode::FAILURE
}

/// As a shell reports it.
fn code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    u8::try_from(code).unwrap_or(u8::MAX)
}

fn run(command: &OsString, arguments: impl Iterator<Item = OsString>) -> io::Result<ExitStatus> {
    // Blocked, so that none is lost between two waits.
    let signals = SigSet::all();
    let before = signals.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
    let mut command = Command::new(command);
    // A process group of its own, so that the terminal's signals reach the command once and not through us as well.
    command.args(arguments).process_group(0);
    // SAFETY: between fork and exec only sigprocmask is called, which is async-signal-safe, on a set that is ready.
    unsafe {
        command.pre_exec(move || Ok(before.thread_set_mask()?));
    }
    let child = command.spawn()?;
    let child = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
    // Without a terminal there is no foreground to be given.
    let _ = tcsetpgrp(io::stdin(), child);
    loop {
        match signals.wait()? {
            Signal::SIGCHLD => {
                if let Some(status) = reap(child)? {
                    return Ok(status);
                }
            }
            // The command may have ended already; its SIGCHLD comes next.
            signal => drop(kill(child, signal)),
        }
    }
}

/// Reaps all that has ended; the command's status when it is among them.
fn reap(child: Pid) -> io::Result<Option<ExitStatus>> {
    let mut ended = None;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == child => {
                ended = Some(ExitStatus::from_raw((code & 0xff) << 8));
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => {
                ended = Some(ExitStatus::from_raw(signal as i32));
            }
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(ended),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commands_end_is_told_as_a_shell_tells_it() {
        assert_eq!(code(ExitStatus::from_raw(7 << 8)), 7);
        assert_eq!(code(ExitStatus::from_raw(9)), 137);
    }

    #[test]
    fn what_is_not_a_command_line_is_refused() {
        for words in [&[][..], &["--"], &["x", "y"]] {
            let exit = main(words.iter().map(OsString::from));
            assert_eq!(
                format!("{exit:?}"),
                format!("{:?}", ExitCode::FAILURE),
                "{words:?}"
            );
        }
    }
}
