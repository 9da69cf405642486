//! `cloison install` and `cloison uninstall`: the runtime's entry in the configuration of docker, podman or containerd, and nothing else
//! of it. What a file said before is kept beside it.

mod containerd;
mod docker;
mod podman;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::args::{Install, Program};
use crate::verbs::print;

/// The name under which callers know the runtime.
const RUNTIME: &str = "cloison";
/// Beside a file that was changed: what it was before it was changed for the first time.
const BACKUP: &str = "before-cloison";

/// Adds the runtime's entry.
pub fn install(args: &Install) -> Result<()> {
    let runtime = match &args.runtime {
        Some(path) => std::path::absolute(path)?,
        None => beside_this_program()?,
    };
    if !runtime.exists() {
        bail!(
            "there is no {}: \"make install\" installs it, --runtime names another",
            runtime.display()
        );
    }
    change(args, |program, text| match program {
        Program::Docker => docker::add(text, &runtime),
        Program::Podman => podman::add(text, &runtime),
        Program::Containerd => containerd::add(text, &runtime),
    })
}

/// Takes it out again.
pub fn uninstall(args: &Install) -> Result<()> {
    change(args, |program, text| match program {
        Program::Docker => docker::remove(text),
        Program::Podman => podman::remove(text),
        Program::Containerd => containerd::remove(text),
    })
}

fn beside_this_program() -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot find this program's own file")?;
    Ok(own.with_file_name(cloison_oci::NAME))
}

/// The file that a program reads.
fn file_of(program: Program) -> &'static Path {
    Path::new(match program {
        Program::Docker => "/etc/docker/daemon.json",
        Program::Podman => "/etc/containers/containers.conf.d/cloison.conf",
        Program::Containerd => "/etc/containerd/config.toml",
    })
}

/// What makes a program read its file again.
fn afterwards(program: Program) -> &'static str {
    match program {
        Program::Docker => {
            "have docker read it: systemctl reload docker; then: docker run --runtime cloison ..."
        }
        Program::Podman => "podman reads it at once: podman --runtime cloison run ...",
        Program::Containerd => {
            "have containerd read it: systemctl restart containerd; Kubernetes' RuntimeClass has the handler cloison"
        }
    }
}

fn change(
    args: &Install,
    edit: impl FnOnce(Program, &str) -> Result<Option<String>>,
) -> Result<()> {
    let path = args.config.as_deref().unwrap_or(file_of(args.program));
    let before = match fs::read_to_string(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        other => Some(other.with_context(|| format!("cannot read {}", path.display()))?),
    };
    let after = edit(args.program, before.as_deref().unwrap_or_default())
        .with_context(|| format!("cannot change {}: it is left as it is", path.display()))?;
    let shown = path.display();
    if after == before {
        print(format_args!("{shown}: nothing to do"));
        return Ok(());
    }
    if args.dry_run {
        match &after {
            Some(text) => print(format_args!("{shown} would be:\n{}", text.trim_end())),
            None => print(format_args!("{shown} would be removed")),
        }
        return Ok(());
    }
    if let Some(before) = &before {
        keep(path, before)?;
    }
    match &after {
        Some(text) => replace(path, text)?,
        None => fs::remove_file(path).with_context(|| format!("cannot remove {shown}"))?,
    }
    print(format_args!("{shown}: done; {}", afterwards(args.program)));
    Ok(())
}

/// Keeps the first version that was found.
fn keep(path: &Path, text: &str) -> Result<()> {
    let mut backup = path.as_os_str().to_owned();
    backup.push(".");
    backup.push(BACKUP);
    let backup = PathBuf::from(backup);
    if backup.exists() {
        return Ok(());
    }
    fs::write(&backup, text).with_context(|| format!("cannot write {}", backup.display()))
}

/// Replaces a file, or makes it, so that a reader sees the old or the whole new one.
fn replace(path: &Path, text: &str) -> Result<()> {
    let failed = || format!("cannot write {}", path.display());
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(failed)?;
    }
    let temporary = path.with_extension("cloison-new");
    fs::write(&temporary, text).with_context(failed)?;
    if let Ok(old) = fs::metadata(path) {
        fs::set_permissions(&temporary, old.permissions()).with_context(failed)?;
    }
    fs::rename(&temporary, path).with_context(failed)
}
