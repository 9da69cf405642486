//! `cloison run --profile`: where the time of a run went, from the program's first instruction to its last. The front end, the VM
//! process and the guest's agent each say when they came how far; here that becomes one row of stages without gaps.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use cloison_sandbox::GuestInfo;
use cloison_vmm::{Origin, Timeline, monotonic};
use serde_json::{Value, json};

/// Characters of the longest bar.
const BAR: u64 = 40;

/// Who works during a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    FrontEnd,
    VmProcess,
    Guest,
}

impl Who {
    fn name(self) -> &'static str {
        match self {
            Self::FrontEnd => "front end",
            Self::VmProcess => "VM process",
            Self::Guest => "guest",
        }
    }
}

/// A piece of the run; it begins where the one before it ends.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stage {
    who: Who,
    what: &'static str,
    /// Nanoseconds of CLOCK_MONOTONIC.
    end: u64,
}

/// Takes the times of one run.
#[derive(Debug)]
pub struct Profile {
    /// Where the trace goes, and its name; standard error gets the waterfall without.
    file: Option<(File, PathBuf)>,
    began: u64,
    stages: Vec<Stage>,
    first_output: Option<u64>,
}

impl Profile {
    /// A profile of a run that began at `began`, of [`monotonic`].
    ///
    /// # Errors
    /// When the file cannot be created.
    pub fn new(file: Option<PathBuf>, began: u64) -> Result<Self> {
        let file = file.map(|path| {
            let created = File::create(&path);
            let created =
                created.with_context(|| format!("cannot create the profile {}", path.display()))?;
            Ok::<_, anyhow::Error>((created, path))
        });
        Ok(Self {
            file: file.transpose()?,
            began,
            stages: Vec::new(),
            first_output: None,
        })
    }

    /// The front end has just finished `what`.
    pub fn front_end(&mut self, what: &'static str) {
        self.add(Who::FrontEnd, what, monotonic());
    }

    /// The guest finished `what` at `moment`, of [`monotonic`].
    pub fn guest(&mut self, what: &'static str, moment: u64) {
        self.add(Who::Guest, what, moment);
    }

    /// The VM process has just finished `what`.
    pub fn vm_process(&mut self, what: &'static str) {
        self.add(Who::VmProcess, what, monotonic());
    }

    /// The agent answered for the first time at the moment `answered`.
    pub fn guest_is_up(&mut self, vm: &Timeline, guest: &GuestInfo, answered: u64) {
        // The guest's clocks begin early in its kernel's boot; the answer ties them to the host's.
        let ago = guest.uptime.saturating_sub(guest.agent_began);
        let agent_began = answered.saturating_sub(u64::try_from(ago.as_nanos()).unwrap_or(0));
        self.add(Who::FrontEnd, "starting the VM process", vm.process);
        if let Some(template) = vm.template {
            self.add(Who::VmProcess, "making the template", template);
        }
        self.add(Who::VmProcess, "making the VM", vm.guest);
        let beginning = match vm.origin {
            Origin::Boot => "booting the kernel",
            Origin::Template => "coming out of the template",
        };
        self.add(Who::Guest, beginning, agent_began);
        self.add(Who::Guest, "setting up the agent", answered);
    }

    /// What the VM process knows at the end of the container's process.
    pub fn output(&mut self, vm: &Timeline) {
        self.first_output = vm.output;
    }

    fn add(&mut self, who: Who, what: &'static str, end: u64) {
        // What a guest says of its times may be anything, and an answer may overtake what it speaks of.
        let end = end.max(self.reached());
        self.stages.push(Stage { who, what, end });
    }

    fn reached(&self) -> u64 {
        self.stages.last().map_or(self.began, |stage| stage.end)
    }

    /// Each stage with its beginning and its length, nanoseconds, the beginning since the run's.
    fn rows(&self) -> impl Iterator<Item = (&Stage, u64, u64)> {
        self.stages.iter().scan(self.began, |reached, stage| {
            let (start, length) = (*reached - self.began, stage.end - *reached);
            *reached = stage.end;
            Some((stage, start, length))
        })
    }

    /// Nanoseconds from the run's beginning to the first byte of the container's output.
    fn first_output(&self) -> Option<u64> {
        Some(self.first_output?.saturating_sub(self.began))
    }

    /// Says where the time went.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn report(&self) -> Result<()> {
        let Some((file, path)) = &self.file else {
            // Nobody may be listening any more.
            let _ = self.waterfall(&mut io::stderr().lock());
            return Ok(());
        };
        let mut out = BufWriter::new(file);
        serde_json::to_writer(&mut out, &self.trace())
            .map_err(io::Error::from)
            .and_then(|()| out.flush())
            .with_context(|| format!("cannot write the profile to {}", path.display()))
    }

    fn waterfall(&self, out: &mut impl Write) -> io::Result<()> {
        let whole = self.reached() - self.began;
        writeln!(out, "{:>9}  {:>9}  stage", "at ms", "took ms")?;
        for (stage, start, length) in self.rows() {
            // Both ends are rounded alike, so that the bars join.
            let at = |moment: u64| moment.saturating_mul(BAR).checked_div(whole).unwrap_or(0);
            let (blank, bar) = (at(start), at(start + length) - at(start));
            writeln!(
                out,
                "{:>9}  {:>9}  {:<38} {}{}",
                milliseconds(start),
                milliseconds(length),
                format!("{}: {}", stage.who.name(), stage.what),
                " ".repeat(blank as usize),
                "#".repeat(bar as usize),
            )?;
        }
        writeln!(out, "{:>9}  in all", milliseconds(whole))?;
        match self.first_output() {
            Some(at) => writeln!(out, "{:>9}  first byte of output", milliseconds(at)),
            None => Ok(()),
        }
    }

    /// The Trace Event Format, in its JSON object form: complete events ("X") and an instant ("i"), microseconds.
    fn trace(&self) -> Value {
        let microseconds = |ns: u64| ns as f64 / 1e3;
        let event = |(stage, start, length): (&Stage, u64, u64)| {
            json!({
                "ph": "X", "pid": 1, "tid": stage.who as u8, "name": stage.what, "cat": stage.who.name(),
                "ts": microseconds(start), "dur": microseconds(length),
            })
        };
        let row = |who: Who| {
            json!({
                "ph": "M", "pid": 1, "tid": who as u8, "name": "thread_name", "args": {"name": who.name()},
            })
        };
        let output = self.first_output().map(|at| {
            json!({
                "ph": "i", "s": "p", "pid": 1, "tid": Who::Guest as u8, "name": "first byte of output",
                "ts": microseconds(at),
            })
        });
        let rows = [Who::FrontEnd, Who::VmProcess, Who::Guest].map(row);
        let events: Vec<_> = rows
            .into_iter()
            .chain(self.rows().map(event))
            .chain(output)
            .collect();
        json!({"displayTimeUnit": "ms", "traceEvents": events})
    }
}

fn milliseconds(ns: u64) -> String {
    format!("{:.1}", ns as f64 / 1e6)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use super::*;

    const MS: u64 = 1_000_000;

    fn profile() -> Profile {
        let mut profile = Profile::new(None, 100 * MS).unwrap();
        profile.add(Who::FrontEnd, "reading the image", 110 * MS);
        profile.add(Who::Guest, "booting the kernel", 140 * MS);
        profile.first_output = Some(130 * MS);
        profile
    }

    #[test]
    fn stages_follow_each_other_without_gaps() {
        let mut text = Vec::new();
        profile().waterfall(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        let lines: Vec<_> = text.lines().map(str::trim).collect();
        assert!(lines[1].starts_with("0.0       10.0  front end: reading the image"));
        assert!(lines[2].starts_with("10.0       30.0  guest: booting the kernel"));
        assert!(lines[1].ends_with(" ##########"), "{text}");
        assert_eq!(lines[3], "40.0  in all");
        assert_eq!(lines[4], "30.0  first byte of output");
    }

    #[test]
    fn a_trace_has_an_event_for_each_stage() {
        let trace = profile().trace();
        let events = trace["traceEvents"].as_array().unwrap();
        let boot = events
            .iter()
            .find(|event| event["name"] == "booting the kernel")
            .unwrap();
        assert_eq!(
            (&boot["ts"], &boot["dur"]),
            (&json!(10_000.0), &json!(30_000.0))
        );
        assert_eq!(events.iter().filter(|event| event["ph"] == "X").count(), 2);
        assert_eq!(events.last().unwrap()["ts"], json!(30_000.0));
    }

    #[test]
    fn a_guest_that_lies_about_its_clock_bends_no_stage_backwards() {
        let mut profile = profile();
        let vm = Timeline {
            process: 1,
            guest: u64::MAX,
            output: None,
            origin: Origin::Boot,
            template: None,
        };
        let guest = GuestInfo {
            kernel: String::new(),
            agent: String::new(),
            memory: 0,
            agent_began: Duration::MAX,
            uptime: Duration::ZERO,
        };
        profile.guest_is_up(&vm, &guest, 5);
        assert!(
            profile
                .rows()
                .all(|(_, start, length)| start.checked_add(length).is_some())
        );
        profile.waterfall(&mut Vec::new()).unwrap();
    }

    #[test]
    fn a_run_without_stages_has_a_report() {
        let profile = Profile::new(None, 7).unwrap();
        profile.waterfall(&mut Vec::new()).unwrap();
    }

    #[test]
    fn a_file_that_cannot_be_written_is_named() {
        let missing = Profile::new(Some("/nonexistent/trace.json".into()), 0).unwrap_err();
        assert!(format!("{missing:#}").contains("/nonexistent/trace.json"));
        let full = Profile::new(Some("/dev/full".into()), 0).unwrap();
        let full = format!("{:#}", full.report().unwrap_err());
        assert!(full.contains("/dev/full"), "{full}");
    }
}
