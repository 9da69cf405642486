//! Log lines as runc writes them, which its callers read: the last line of level "error" is what they tell their user.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::SystemTime;

use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::args::Cli;

/// Where log lines go.
#[derive(Debug, Clone)]
pub struct Log {
    file: Option<PathBuf>,
    json: bool,
    debug: bool,
}

impl Log {
    /// As the command line has it.
    pub fn new(cli: &Cli) -> Self {
        let file = cli.log.as_ref().filter(|path| !path.as_os_str().is_empty());
        Self {
            // The processes that stand for a container leave the directory they were started in.
            file: file.map(|path| std::path::absolute(path).unwrap_or_else(|_| path.clone())),
            json: cli.log_format == "json",
            debug: cli.debug,
        }
    }

    /// Something a person who looks for trouble wants to know.
    pub fn info(&self, message: impl AsRef<str>) {
        self.line("info", message.as_ref());
    }

    /// Something that is not as it was asked for.
    pub fn warn(&self, message: impl AsRef<str>) {
        self.line("warning", message.as_ref());
    }

    /// Something that only a person who looks for trouble wants to know.
    pub fn debug(&self, message: impl AsRef<str>) {
        if self.debug {
            self.line("debug", message.as_ref());
        }
    }

    /// Why a process that stands for one in a guest goes.
    pub fn error(&self, error: &anyhow::Error) {
        self.line("error", &format!("{error:#}"));
    }

    /// Why the command failed: to the log, and to standard error for who reads only that.
    pub fn fatal(&self, error: &anyhow::Error) {
        self.error(error);
        if self.file.is_some() {
            let _ = writeln!(io::stderr(), "{error:#}");
        }
    }

    fn line(&self, level: &str, message: &str) {
        let time = OffsetDateTime::from(SystemTime::now());
        let time = time.format(&Rfc3339).unwrap_or_default();
        let line = if self.json {
            json!({ "level": level, "msg": message, "time": time }).to_string()
        } else {
            format!("time={time:?} level={level} msg={message:?}")
        };
        // A log that cannot be written has nowhere to say so. One write a line, so that lines of several processes do not mix.
        let _ = match &self.file {
            Some(path) => File::options()
                .create(true)
                .append(true)
                .open(path)
                .and_then(|mut file| file.write_all(format!("{line}\n").as_bytes())),
            // Without a log file standard error is where a person looks, who has asked for no more than errors.
            None if level == "error" || level == "warning" || self.debug => {
                io::stderr().write_all(format!("{line}\n").as_bytes())
            }
            None => Ok(()),
        };
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn json_lines_are_what_callers_of_runc_read() {
        let dir = tempfile::tempdir().unwrap();
        let log = Log {
            file: Some(dir.path().join("log.json")),
            json: true,
            debug: false,
        };
        log.info("an \"engine\"");
        log.debug("nothing");
        log.error(&anyhow::anyhow!("two\nlines").context("outer"));
        let text = std::fs::read_to_string(dir.path().join("log.json")).unwrap();
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(
            (&lines[0]["level"], &lines[0]["msg"]),
            (&"info".into(), &"an \"engine\"".into())
        );
        assert_eq!(
            (&lines[1]["level"], &lines[1]["msg"]),
            (&"error".into(), &"outer: two\nlines".into())
        );
        assert!(lines[1]["time"].as_str().unwrap().contains('T'));
    }
}
