//! `events`: what a container uses, by its cgroup in the guest, in runc's form.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use cloison_sandbox::{Agent, Home, Usage};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::{MissedTickBehavior, interval};

use crate::args::Events;
use crate::container::{Container, Status};
use crate::{print, runtime};

/// Prints statistics, once or until the container stops.
pub fn events(home: &Home, args: &Events) -> Result<()> {
    let container = Container::find(home, &args.container)?;
    let (status, record) = container.status()?;
    ensure!(
        status != Status::Stopped,
        "container with id {} is not running",
        container.id()
    );
    let period = period(&args.interval)?;
    let id = container.id().as_str();
    runtime()?.block_on(async {
        let agent = container.vm(&record).connect_agent()?;
        agent.hello().await?;
        if args.stats {
            print(stats(id, &agent.usage(id).await?)?);
            return Ok(());
        }
        follow(&agent, id, period).await
    })
}

/// A line each period, and one whenever the OOM killer has struck, to the end of the agent.
async fn follow(agent: &Agent, id: &str, period: Duration) -> Result<()> {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut kills = None;
    let ended = agent.wait(id, "");
    tokio::pin!(ended);
    loop {
        tokio::select! {
            // However the wait ends, there is nothing more to be told.
            _ = &mut ended => return Ok(()),
            _ = ticks.tick() => {
                let Ok(usage) = agent.usage(id).await else { return Ok(()) };
                if kills.is_some_and(|kills| kills < usage.oom_kills) {
                    print(line("oom", id, None)?);
                }
                kills = Some(usage.oom_kills);
                print(stats(id, &usage)?);
            }
        }
    }
}

/// An event, as runc writes it; there are readers who go by the order.
#[derive(Serialize)]
struct Event<'a> {
    r#type: &'a str,
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Value>,
}

fn line(r#type: &str, id: &str, data: Option<Value>) -> Result<String> {
    let event = Event { r#type, id, data };
    serde_json::to_string(&event).context("cannot write an event")
}

fn stats(id: &str, usage: &Usage) -> Result<String> {
    let data = json!({
            "cpu": {
                "usage": {
                    "total": usage.cpu_ns,
                    "user": usage.cpu_user_ns,
                    "kernel": usage.cpu_system_ns,
                },
                "throttling": {},
            },
            "cpuset": {},
            "memory": {
                "cache": usage.memory_inactive_file_bytes,
                "usage": { "limit": usage.memory_limit_bytes, "usage": usage.memory_bytes, "failcnt": 0 },
                "swap": { "limit": 0, "failcnt": 0 },
                "kernel": { "limit": 0, "failcnt": 0 },
                "kernelTCP": { "limit": 0, "failcnt": 0 },
                "raw": { "inactive_file": usage.memory_inactive_file_bytes },
            },
            "pids": { "current": usage.pids },
            "blkio": {},
            "hugetlb": {},
            "intel_rdt": {},
            "network_interfaces": null,
    });
    line("stats", id, Some(data))
}

/// A time as Go writes it: a number with a unit, such as 5s, 500ms or 1m.
fn period(text: &str) -> Result<Duration> {
    let split = text.find(|c: char| !c.is_ascii_digit());
    let (number, unit) = text.split_at(split.unwrap_or(text.len()));
    let number: u32 = number
        .parse()
        .ok()
        .filter(|number| *number > 0)
        .with_context(|| format!("--interval {text:?} is not a time: give one such as 5s"))?;
    let unit = match unit {
        "ms" => Duration::from_millis(1),
        "s" => Duration::from_secs(1),
        "m" => Duration::from_secs(60),
        "h" => Duration::from_secs(3600),
        _ => bail!("--interval {text:?} is not a time: give one such as 5s"),
    };
    Ok(unit.saturating_mul(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_begins_with_its_kind_and_the_container() {
        assert_eq!(
            line("oom", "one", None).unwrap(),
            r#"{"type":"oom","id":"one"}"#
        );
        let stats = stats("one", &Usage::default()).unwrap();
        assert!(
            stats.starts_with(r#"{"type":"stats","id":"one","data":{"#),
            "{stats}"
        );
    }

    #[test]
    fn times_have_units() {
        assert_eq!(period("5s").unwrap(), Duration::from_secs(5));
        assert_eq!(period("500ms").unwrap(), Duration::from_millis(500));
        assert_eq!(period("2m").unwrap(), Duration::from_secs(120));
        for bad in ["", "5", "s", "0s", "-1s", "5x", "99999999999s"] {
            assert!(period(bad).is_err(), "{bad}");
        }
    }
}
