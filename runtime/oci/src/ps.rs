//! `ps`: the processes that a container has on the host. Those in its guest are not the host's.

use std::process::Command;

use anyhow::{Context, Result, bail};
use cloison_sandbox::{Home, HostCgroup};

use crate::args::Ps;
use crate::container::{Container, Status};
use crate::print;

/// Lists the processes.
pub fn ps(home: &Home, args: &Ps) -> Result<()> {
    let container = Container::find(home, &args.container)?;
    let (status, record) = container.status()?;
    let pids = match status {
        Status::Stopped => Vec::new(),
        _ => HostCgroup::at(&record.cgroup)?.pids(),
    };
    if args.format == "json" {
        print(serde_json::to_string(&pids)?);
        return Ok(());
    }
    let options = match args.options.is_empty() {
        true => vec!["-ef".to_owned()],
        false => args.options.clone(),
    };
    let output = Command::new("ps").args(&options).output();
    let output = output.context("cannot run ps")?;
    if !output.status.success() {
        bail!(
            "ps failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let mut lines = text.lines();
    let header = lines.next().unwrap_or_default();
    let column = header.split_whitespace().position(|title| title == "PID");
    let column = column.context("the options of ps leave the column PID out")?;
    print(header);
    for line in lines {
        let pid = line.split_whitespace().nth(column);
        if pid
            .and_then(|pid| pid.parse().ok())
            .is_some_and(|pid| pids.contains(&pid))
        {
            print(line);
        }
    }
    Ok(())
}
