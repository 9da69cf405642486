//! Hooks: programs of the host that a caller wants to be run at points of a container's life, with its state on their standard input.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::Pid;
use oci_spec::runtime::Hook;

use crate::container::OciState;

/// Most of a failed hook's output that is told, bytes.
const MAX_OUTPUT: u64 = 4096;

/// Runs hooks one after the other, to the first that fails.
///
/// # Errors
/// Naming the hook, with what it wrote.
pub fn run(kind: &str, hooks: Option<&Vec<Hook>>, state: &OciState<'_>) -> Result<()> {
    for hook in hooks.into_iter().flatten() {
        run_one(hook, state)
            .with_context(|| format!("the {kind} hook {} failed", hook.path().display()))?;
    }
    Ok(())
}

/// Runs hooks one after the other, all of them, and gives what went wrong.
pub fn run_all(kind: &str, hooks: Option<&Vec<Hook>>, state: &OciState<'_>) -> Vec<anyhow::Error> {
    let each = hooks.into_iter().flatten().filter_map(|hook| {
        let result = run_one(hook, state);
        let result =
            result.with_context(|| format!("the {kind} hook {} failed", hook.path().display()));
        result.err()
    });
    each.collect()
}

fn run_one(hook: &Hook, state: &OciState<'_>) -> Result<()> {
    // Files in memory, so that a hook that reads or writes nothing holds up nobody.
    let mut input = memory("state")?;
    input.write_all(&serde_json::to_vec(state)?)?;
    input.rewind()?;
    let mut output = memory("output")?;
    let mut command = Command::new(hook.path());
    let mut args = hook.args().iter().flatten();
    if let Some(name) = args.next() {
        command.arg0(name);
    }
    command.args(args);
    // Without any it has this process's, as with runc.
    if let Some(env) = hook.env() {
        command.env_clear();
        command.envs(env.iter().filter_map(|variable| variable.split_once('=')));
    }
    command
        .stdin(input)
        .stdout(output.try_clone()?)
        .stderr(output.try_clone()?);
    let mut child = command.spawn().context("cannot run it")?;
    let timeout = hook.timeout().filter(|seconds| *seconds > 0);
    let in_time = within(&child, timeout);
    if !in_time.as_ref().is_ok_and(|in_time| *in_time) {
        // It may end at the same moment.
        let _ = child.kill();
    }
    let status = child.wait().context("cannot wait for it")?;
    if !in_time? {
        bail!("it took longer than its {} s", timeout.unwrap_or_default());
    }
    if !status.success() {
        let mut text = Vec::new();
        output.rewind()?;
        output.take(MAX_OUTPUT).read_to_end(&mut text)?;
        let text = String::from_utf8_lossy(&text);
        bail!("{status}: {}", text.trim());
    }
    Ok(())
}

fn memory(name: &str) -> Result<File> {
    let file = memfd_create(name, MFdFlags::MFD_CLOEXEC);
    Ok(file.context("cannot make a file in memory")?.into())
}

/// Whether it ended within so many seconds, if there is such a limit.
fn within(child: &Child, seconds: Option<i64>) -> Result<bool> {
    let Some(seconds) = seconds else {
        return Ok(true);
    };
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    let ended = cloison_sandbox::pidfd(pid).context("cannot watch it")?;
    let mut watched = [PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(seconds.saturating_mul(1000)).unwrap_or(PollTimeout::MAX);
    Ok(poll(&mut watched, timeout).context("cannot wait for it")? > 0)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::path::Path;

    use oci_spec::runtime::HookBuilder;

    use super::*;
    use crate::container::{OCI_VERSION, Status};

    fn state() -> OciState<'static> {
        OciState {
            oci_version: OCI_VERSION,
            id: "x",
            status: Status::Creating,
            pid: Some(7),
            bundle: Path::new("/b"),
            annotations: HashMap::new(),
        }
    }

    fn shell(script: &str, timeout: Option<i64>) -> Vec<Hook> {
        let args = ["sh", "-c", script].map(str::to_owned).to_vec();
        let mut hook = HookBuilder::default()
            .path("/bin/sh")
            .args(args)
            .env(vec!["MARK=42".to_owned()])
            .build()
            .unwrap();
        hook.set_timeout(timeout);
        vec![hook]
    }

    #[test]
    fn a_hook_gets_the_state_and_its_own_environment_only() {
        let script = "grep -q '\"pid\":7' && test $MARK = 42 && test -z \"$CARGO\"";
        run("x", Some(&shell(script, None)), &state()).unwrap();
    }

    #[test]
    fn a_hook_without_an_environment_gets_this_processs() {
        let script = "test -n \"$CARGO\" && test -z \"$MARK\"";
        let mut hooks = shell(script, None);
        hooks[0].set_env(None);
        run("x", Some(&hooks), &state()).unwrap();
        hooks[0].set_env(Some(Vec::new()));
        run("x", Some(&hooks), &state()).unwrap_err();
    }

    #[test]
    fn a_failed_hook_is_told_of_with_its_own_words() {
        let error = run(
            "prestart",
            Some(&shell("echo oh no >&2; exit 3", None)),
            &state(),
        );
        let error = format!("{:#}", error.unwrap_err());
        assert!(
            error.contains("prestart") && error.contains("oh no"),
            "{error}"
        );
    }

    #[test]
    fn a_hook_that_takes_too_long_is_ended() {
        let error = run("x", Some(&shell("exec sleep 60", Some(1))), &state());
        assert!(format!("{:#}", error.unwrap_err()).contains("longer"));
    }

    #[test]
    fn a_hook_that_does_not_read_its_input_is_no_problem() {
        let mut state = state();
        let large = ("k".to_owned(), "v".repeat(1 << 20));
        state.annotations = HashMap::from([large]);
        run("x", Some(&shell("exit 0", Some(60))), &state).unwrap();
    }

    #[test]
    fn a_missing_hook_is_named() {
        let hook = HookBuilder::default()
            .path("/nonexistent/hook")
            .build()
            .unwrap();
        let errors = run_all("poststop", Some(&vec![hook]), &state());
        assert!(format!("{:#}", errors[0]).contains("/nonexistent/hook"));
    }
}
