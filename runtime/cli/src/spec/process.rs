//! A process as the OCI specification describes it, from what an image and a person say.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use cloison_image::{DEFAULT_PATH, ImageConfig, User, resolve_user};
use oci_spec::runtime::{PosixRlimit, PosixRlimitBuilder, Process, ProcessBuilder, UserBuilder};

use super::Capabilities;
use crate::args::ProcessOptions;
use crate::values::{EnvVar, Ulimit};

/// What a process is.
pub struct ProcessPlan<'a> {
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub workdir: String,
    pub user: &'a User,
    pub terminal: bool,
    pub capabilities: &'a Capabilities,
    pub ulimits: &'a [Ulimit],
}

impl ProcessPlan<'_> {
    /// Makes the OCI process.
    ///
    /// # Errors
    /// When a part of it contradicts the OCI specification.
    pub fn into_process(self) -> Result<Process> {
        if self
            .args
            .iter()
            .chain(&self.env)
            .any(|text| text.contains('\0'))
        {
            bail!("the command or its environment contains a NUL character");
        }
        if !self.workdir.starts_with('/') {
            bail!(
                "the working directory \"{}\" is not an absolute path",
                self.workdir
            );
        }
        let user = UserBuilder::default()
            .uid(self.user.uid)
            .gid(self.user.gid)
            .additional_gids(self.user.additional_gids.clone())
            .build()?;
        Ok(ProcessBuilder::default()
            .args(self.args)
            .env(self.env)
            .cwd(self.workdir)
            .user(user)
            .terminal(self.terminal)
            .capabilities(self.capabilities.for_user(self.user.uid)?)
            .rlimits(
                self.ulimits
                    .iter()
                    .map(rlimit)
                    .collect::<Result<Vec<_>>>()?,
            )
            .no_new_privileges(false)
            .build()?)
    }
}

fn rlimit(limit: &Ulimit) -> Result<PosixRlimit> {
    Ok(PosixRlimitBuilder::default()
        .typ(
            serde_json::from_value::<oci_spec::runtime::PosixRlimitType>(
                limit.name.clone().into(),
            )?,
        )
        .soft(limit.soft)
        .hard(limit.hard)
        .build()?)
}

/// The command an image and a person agree on: the person's entrypoint drops the image's command, as in docker.
///
/// # Errors
/// When there is nothing to run.
pub fn command(
    image: &ImageConfig,
    entrypoint: Option<&str>,
    command: &[String],
) -> Result<Vec<String>> {
    let mut args: Vec<String> = match entrypoint {
        Some("") => Vec::new(),
        Some(program) => vec![program.to_owned()],
        None => image.entrypoint.clone(),
    };
    if command.is_empty() && entrypoint.is_none() {
        args.extend(image.cmd.iter().cloned());
    } else {
        args.extend(command.iter().cloned());
    }
    if args.first().is_none_or(String::is_empty) {
        bail!("the image names no command to run: give one after the image");
    }
    Ok(args)
}

/// A process's environment: `base`, then the options' files and variables over it, each name once.
///
/// # Errors
/// When an environment file cannot be read.
pub fn environment(
    base: &[String],
    options: &ProcessOptions,
    home: Option<&str>,
) -> Result<Vec<String>> {
    let mut env = Environment::default();
    for variable in std::iter::once(DEFAULT_PATH).chain(base.iter().map(String::as_str)) {
        let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
        env.set(name, value);
    }
    if options.tty {
        env.set_default("TERM", "xterm");
    }
    for file in &options.env_file {
        let text = fs::read_to_string(file)
            .with_context(|| format!("cannot read the environment file {}", file.display()))?;
        let variables = EnvVar::parse_file(&text)
            .with_context(|| format!("cannot use the environment file {}", file.display()))?;
        variables.iter().for_each(|variable| env.apply(variable));
    }
    options.env.iter().for_each(|variable| env.apply(variable));
    if let Some(home) = home {
        env.set_default("HOME", home);
    }
    Ok(env
        .0
        .into_iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect())
}

/// Variables in the order in which they were first set.
#[derive(Default)]
struct Environment(Vec<(String, String)>);

impl Environment {
    fn set(&mut self, name: &str, value: &str) {
        match self.0.iter_mut().find(|(n, _)| n == name) {
            Some(entry) => value.clone_into(&mut entry.1),
            None => self.0.push((name.to_owned(), value.to_owned())),
        }
    }

    fn set_default(&mut self, name: &str, value: &str) {
        if !self.0.iter().any(|(n, _)| n == name) {
            self.set(name, value);
        }
    }

    fn apply(&mut self, variable: &EnvVar) {
        match &variable.value {
            Some(value) => self.set(&variable.name, value),
            // A variable that the caller does not have is not set, as in docker.
            None => match std::env::var(&variable.name) {
                Ok(value) => self.set(&variable.name, &value),
                Err(_) => self.0.retain(|(name, _)| *name != variable.name),
            },
        }
    }
}

/// The user that `text` names in the root file system at `rootfs`; root when nobody is named.
///
/// # Errors
/// When there is no such user or group.
pub fn user_of(rootfs: &Path, text: Option<&str>) -> Result<User> {
    let text = text.filter(|text| !text.is_empty()).unwrap_or("0");
    Ok(resolve_user(rootfs, text)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(entrypoint: &[&str], cmd: &[&str]) -> ImageConfig {
        let own = |texts: &[&str]| texts.iter().map(|t| (*t).to_owned()).collect();
        ImageConfig {
            entrypoint: own(entrypoint),
            cmd: own(cmd),
            ..Default::default()
        }
    }

    #[test]
    fn entrypoint_and_command_combine_as_in_docker() {
        let own = |texts: &[&str]| texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>();
        let image_ = image(&["e"], &["c"]);
        let choose = |entrypoint, args: &[&str]| command(&image_, entrypoint, &own(args)).unwrap();
        assert_eq!(choose(None, &[]), ["e", "c"]);
        assert_eq!(choose(None, &["x"]), ["e", "x"]);
        assert_eq!(choose(Some("p"), &[]), ["p"]);
        assert_eq!(choose(Some("p"), &["x"]), ["p", "x"]);
        assert_eq!(choose(Some(""), &["x"]), ["x"]);
        assert!(command(&image_, Some(""), &[]).is_err());
        assert!(command(&image(&[], &[]), None, &[]).is_err());
        assert!(command(&image(&[], &[""]), None, &[]).is_err());
    }

    fn options() -> ProcessOptions {
        ProcessOptions {
            detach: false,
            interactive: false,
            tty: false,
            env: Vec::new(),
            env_file: Vec::new(),
            workdir: None,
            user: None,
        }
    }

    #[test]
    fn variables_are_set_once_and_the_persons_win() {
        let mut options = options();
        options.tty = true;
        options.env = vec![
            "A=2".parse().unwrap(),
            "CLOISON_TEST_UNSET".parse().unwrap(),
        ];
        let base = vec![
            "A=1".to_owned(),
            "PATH=/p".to_owned(),
            "CLOISON_TEST_UNSET=1".to_owned(),
        ];
        let env = environment(&base, &options, Some("/root")).unwrap();
        assert_eq!(env, ["PATH=/p", "A=2", "TERM=xterm", "HOME=/root"]);
    }

    #[test]
    fn a_missing_environment_file_is_named() {
        let mut options = options();
        options.env_file = vec!["/nonexistent/env".into()];
        let error = environment(&[], &options, None).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/env"), "{error}");
    }
}
