//! `cloison ps`.

use std::io::{self, Write};

use anyhow::{Context, Result};
use cloison_sandbox::Home;
use comfy_table::{ContentArrangement, Table, presets};
use serde_json::json;
use time::{Duration, OffsetDateTime};

use crate::args::{Format, Ps};
use crate::container::{Life, Record, State, all, now};

/// Characters of a command that a table shows.
const COMMAND_WIDTH: usize = 20;

/// Lists containers, the youngest first.
pub fn ps(home: &Home, args: &Ps) -> Result<()> {
    let mut rows = Vec::new();
    for container in all(home)? {
        match container.life() {
            Ok(row) => rows.push(row),
            // It may have been removed since it was listed; a damaged one must not hide the others.
            Err(error) if container.sandbox().dir().exists() => eprintln!("cloison: {error:#}"),
            Err(_) => {}
        }
    }
    rows.retain(|(life, _)| args.all || matches!(life, Life::Running));
    rows.sort_by_key(|(_, record)| std::cmp::Reverse(record.created));
    let text = match (args.quiet, args.format) {
        (true, _) => rows
            .iter()
            .map(|(_, record)| format!("{}\n", id(record, args)))
            .collect(),
        (false, Format::Json) => rows
            .iter()
            .map(|(life, record)| format!("{}\n", as_json(life, record, args)))
            .collect(),
        (false, Format::Table) => format!("{}\n", as_table(&rows, args)),
    };
    io::stdout()
        .write_all(text.as_bytes())
        .context("cannot write the list")
}

fn id<'a>(record: &'a Record, args: &Ps) -> &'a str {
    if args.no_trunc {
        record.id.as_str()
    } else {
        record.id.short()
    }
}

fn command(record: &Record, args: &Ps) -> String {
    let whole = record.command.join(" ");
    if args.no_trunc || whole.chars().count() <= COMMAND_WIDTH {
        return format!("\"{whole}\"");
    }
    let short: String = whole.chars().take(COMMAND_WIDTH - 1).collect();
    format!("\"{short}…\"")
}

fn as_table(rows: &[(Life, Record)], args: &Ps) -> Table {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled);
    table.set_header([
        "CONTAINER ID",
        "IMAGE",
        "COMMAND",
        "CREATED",
        "STATUS",
        "PORTS",
        "ENGINE",
        "NAMES",
    ]);
    for (life, record) in rows {
        table.add_row([
            id(record, args).to_owned(),
            record.image.clone(),
            command(record, args),
            format!("{} ago", age(now() - record.created)),
            status(life, record),
            ports(life, record),
            engine(record),
            record.name.to_string(),
        ]);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

fn as_json(life: &Life, record: &Record, args: &Ps) -> serde_json::Value {
    json!({
        "ID": id(record, args),
        "Image": record.image,
        "Command": command(record, args),
        "CreatedAt": record.created.to_string(),
        "Status": status(life, record),
        "State": state(life),
        "Ports": ports(life, record),
        "Networks": record.network.name,
        "Engine": engine(record),
        "Names": record.name,
    })
}

/// Ports lead to what runs.
fn ports(life: &Life, record: &Record) -> String {
    match life {
        Life::Running => record.network.ports(),
        _ => String::new(),
    }
}

fn engine(record: &Record) -> String {
    format!("{:?}", record.engine).to_lowercase()
}

/// A container's state in docker's word.
pub fn state(life: &Life) -> &'static str {
    match life {
        Life::Creating => "created",
        Life::Running => "running",
        Life::Exited => "exited",
        Life::Dead => "dead",
    }
}

fn status(life: &Life, record: &Record) -> String {
    let since = |time: &OffsetDateTime| age(now() - *time);
    match (life, &record.state) {
        (Life::Running, State::Running { started, .. }) => format!("Up {}", since(started)),
        (_, State::Exited { code, finished, .. }) => {
            format!("Exited ({code}) {} ago", since(finished))
        }
        (Life::Dead, _) => "Dead".into(),
        _ => "Created".into(),
    }
}

/// A duration as a person says it.
fn age(duration: Duration) -> String {
    let seconds = duration.whole_seconds().max(0);
    let (count, unit) = match seconds {
        0 => return "Less than a second".into(),
        1..60 => (seconds, "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..172_800 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    format!("{count} {unit}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_said_in_one_unit() {
        let said = |seconds| age(Duration::seconds(seconds));
        assert_eq!(
            [-5, 0, 1, 59, 60, 3599, 3600, 172_799, 172_800].map(said),
            [
                "Less than a second",
                "Less than a second",
                "1 second",
                "59 seconds",
                "1 minute",
                "59 minutes",
                "1 hour",
                "47 hours",
                "2 days"
            ]
        );
    }
}
