//! `cloison inspect`: a container as JSON, under docker's names where docker has one.

use std::io::{self, Write};

use anyhow::{Context, Result};
use cloison_sandbox::Home;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::args::Containers;
use crate::container::{Container, Life, State};
use crate::verbs::{each, ps};

/// Prints an array with an object for each container.
pub fn inspect(home: &Home, args: &Containers) -> Result<()> {
    let mut objects = Vec::new();
    let result = each(home, &args.containers, |container| {
        objects.push(object(container)?);
        Ok(())
    });
    let text = serde_json::to_string_pretty(&objects)?;
    writeln!(io::stdout(), "{text}").context("cannot write the description")?;
    result
}

fn time(time: Option<&OffsetDateTime>) -> Value {
    time.and_then(|t| t.format(&Rfc3339).ok())
        .map_or(Value::Null, Value::from)
}

fn object(container: &Container) -> Result<Value> {
    let (life, record) = container.life()?;
    let (pid, started, finished, code, oom_killed, error) = match &record.state {
        State::Creating => (0, None, None, None, false, None),
        State::Running { started, pid } => (*pid, Some(started), None, None, false, None),
        State::Exited {
            started,
            finished,
            code,
            oom_killed,
            error,
        } => (
            0,
            started.as_ref(),
            Some(finished),
            Some(*code),
            *oom_killed,
            error.clone(),
        ),
    };
    let error = match life {
        Life::Dead => Some("the container's monitor was killed".to_owned()),
        _ => error,
    };
    let mounts: Vec<Value> = record
        .volumes
        .iter()
        .map(|v| json!({ "Type": "bind", "Source": v.source, "Destination": v.destination, "RW": !v.read_only }))
        .collect();
    // A container that failed while it was being made has no spec.
    let spec = container.spec().ok();
    Ok(json!({
        "Id": record.id,
        "Name": record.name,
        "Created": time(Some(&record.created)),
        "Path": record.command.first(),
        "Args": record.command.get(1..).unwrap_or_default(),
        "State": {
            "Status": ps::state(&life),
            "Running": life == Life::Running,
            "Dead": life == Life::Dead,
            "Pid": if life == Life::Running { pid } else { 0 },
            "ExitCode": code,
            "OOMKilled": oom_killed,
            "Error": error.unwrap_or_default(),
            "StartedAt": time(started),
            "FinishedAt": time(finished),
        },
        "Image": record.image_id,
        "ImageReference": record.image,
        "Engine": { "Name": record.engine, "Reason": record.engine_reason },
        "VM": { "MemoryMiB": record.vm_memory_mib, "VCPUs": record.vcpus, "Origin": record.vm_origin },
        "NetworkSettings": record.network.settings(),
        "Mounts": mounts,
        "LogPath": container.log_file(),
        "AutoRemove": record.auto_remove,
        "Tty": record.tty,
        "StopSignal": record.stop_signal,
        "Spec": spec,
    }))
}
