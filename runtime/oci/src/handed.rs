//! Descriptors that a caller hands on to a container's process beside stdio: those that `--preserve-fds` counts, and before them those that a
//! service manager has opened for its service (sd_listen_fds(3)), which this runtime is for a container, as runc is.

use std::os::fd::RawFd;

use anyhow::{Context, Result, anyhow, ensure};
use cloison_agent_api::MAX_PRESERVED;
use cloison_sandbox::{Preserved, take_inherited};
use oci_spec::runtime::Spec;

use crate::args::Verb;

/// What a service manager says.
const LISTEN_FDS: &str = "LISTEN_FDS";
const LISTEN_PID: &str = "LISTEN_PID";

/// The first number beyond standard error.
const FIRST: RawFd = 3;

/// What a command was given for the process that it makes.
#[derive(Debug)]
pub struct Handed {
    /// From number 3 on.
    pub descriptors: Vec<Preserved>,
    /// How many of them are a service manager's, the first.
    listening: u16,
}

/// How many descriptors there should be.
#[derive(Debug, Default, PartialEq, Eq)]
struct Count {
    listening: u16,
    preserved: u16,
}

impl Handed {
    /// Takes what the caller hands on to a verb's process, and closes whatever else it has left open: the processes that stand for a
    /// container live on, and would hold open for long what some caller did not mean to give away. To be called before anything is opened.
    ///
    /// # Errors
    /// When there is less than it says, or something that cannot be handed into a VM.
    pub fn take(verb: Option<&Verb>) -> Result<Self> {
        let count = Count::of(verb, |name| std::env::var(name).ok());
        let total = count.as_ref().map_or(0, Count::total);
        let taken = take_inherited(total);
        let count = count?;
        let taken = taken.map_err(|number| count.missing(number))?;
        let numbered = (FIRST..).zip(taken);
        let descriptors = numbered.map(|(number, fd)| Ok(Preserved::new(number, fd)?));
        Ok(Self {
            descriptors: descriptors.collect::<Result<_>>()?,
            listening: count.listening,
        })
    }

    /// Tells a container's init of what it has from a service manager.
    ///
    /// # Errors
    /// When there is no process to tell.
    pub fn announce(&self, spec: &mut Spec) -> Result<()> {
        if self.listening == 0 {
            return Ok(());
        }
        let process = spec.process_mut().as_mut();
        let process = process.context("config.json: process is missing")?;
        let told = |entry: &String| {
            let name = entry.split('=').next();
            name == Some(LISTEN_FDS) || name == Some(LISTEN_PID)
        };
        let mut env = process.env().clone().unwrap_or_default();
        env.retain(|entry| !told(entry));
        env.push(format!("{LISTEN_FDS}={}", self.listening));
        env.push(format!("{LISTEN_PID}=1"));
        process.set_env(Some(env));
        Ok(())
    }
}

impl Count {
    fn of(verb: Option<&Verb>, variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let (preserved, is_service) = match verb {
            Some(Verb::Create(create)) => (create.preserve_fds, true),
            Some(Verb::Run(run)) => (run.create.preserve_fds, true),
            // An exec is nobody's service.
            Some(Verb::Exec(exec)) => (exec.preserve_fds, false),
            _ => return Ok(Self::default()),
        };
        let number = |name| variable(name)?.parse::<u32>().ok();
        // Others are for another process, whose environment this one has.
        let is_ours = is_service && number(LISTEN_PID) == Some(std::process::id());
        let listening = number(LISTEN_FDS).filter(|_| is_ours).unwrap_or(0);
        let total = u64::from(listening) + u64::from(preserved);
        ensure!(
            total <= MAX_PRESERVED as u64,
            "{total} descriptors are to be handed to the container's process beside stdio, and at most {MAX_PRESERVED} can be"
        );
        Ok(Self {
            listening: u16::try_from(listening)?,
            preserved: u16::try_from(preserved)?,
        })
    }

    fn total(&self) -> u16 {
        self.listening + self.preserved
    }

    /// The descriptor with that number is not open.
    fn missing(&self, number: RawFd) -> anyhow::Error {
        if number < FIRST + RawFd::from(self.listening) {
            return anyhow!(
                "{LISTEN_FDS}={}: descriptor {number} is not open",
                self.listening
            );
        }
        anyhow!(
            "--preserve-fds {}: please check that descriptor {number} is open",
            self.preserved
        )
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::Cli;

    fn count(words: &str, fds: &str, pid: &str) -> Result<(u16, u16)> {
        let cli = Cli::try_parse_from(words.split(' ')).unwrap();
        let variable = |name: &str| match name {
            LISTEN_FDS => Some(fds.to_owned()),
            LISTEN_PID => Some(pid.to_owned()),
            _ => None,
        };
        let count = Count::of(cli.verb.as_ref(), variable)?;
        Ok((count.listening, count.preserved))
    }

    #[test]
    fn a_service_managers_descriptors_come_before_those_that_are_preserved() {
        let own = std::process::id().to_string();
        let with = |words: &str| count(words, "2", &own).unwrap();
        assert_eq!(with("r create --preserve-fds 3 id"), (2, 3));
        assert_eq!(with("r run id"), (2, 0));
        assert_eq!(with("r exec --preserve-fds 1 id true"), (0, 1));
        assert_eq!(with("r start id"), (0, 0));
    }

    #[test]
    fn what_is_meant_for_another_process_or_no_number_is_passed_over() {
        let own = std::process::id().to_string();
        for (fds, pid) in [("2", "1"), ("2", ""), ("x", &own), ("-1", &own), ("", &own)] {
            assert_eq!(count("r run id", fds, pid).unwrap(), (0, 0), "{fds} {pid}");
        }
    }

    #[test]
    fn there_is_a_bound_that_is_told() {
        let own = std::process::id().to_string();
        let create = "r create --preserve-fds 64 id";
        assert_eq!(count(create, "0", &own).unwrap(), (0, 64));
        for (words, fds) in [
            (create, "1"),
            ("r exec --preserve-fds 65 id true", "0"),
            ("r run --preserve-fds 4294967295 id", "4294967295"),
        ] {
            let error = count(words, fds, &own).unwrap_err().to_string();
            assert!(error.contains("at most 64"), "{error}");
        }
    }

    #[test]
    fn what_is_missing_is_named_by_its_number() {
        let count = Count {
            listening: 1,
            preserved: 2,
        };
        let said = |number| count.missing(number).to_string();
        assert_eq!(said(3), "LISTEN_FDS=1: descriptor 3 is not open");
        assert_eq!(
            said(5),
            "--preserve-fds 2: please check that descriptor 5 is open"
        );
    }

    #[test]
    fn an_init_is_told_of_a_service_managers_descriptors_alone() {
        let told = |listening| {
            let mut spec = Spec::default();
            let env = vec!["A=b".to_owned(), "LISTEN_FDS=7".to_owned()];
            let process = spec.process_mut().as_mut().unwrap();
            process.set_env(Some(env));
            let handed = Handed {
                descriptors: Vec::new(),
                listening,
            };
            handed.announce(&mut spec).unwrap();
            spec.process().as_ref().unwrap().env().clone().unwrap()
        };
        assert_eq!(told(0), ["A=b", "LISTEN_FDS=7"]);
        assert_eq!(told(2), ["A=b", "LISTEN_FDS=2", "LISTEN_PID=1"]);
    }
}
