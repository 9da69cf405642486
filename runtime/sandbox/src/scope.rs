//! Scopes of systemd's: on hosts where systemd makes the cgroups, a sandbox's is that of a transient unit, asked for over D-Bus
//! (org.freedesktop.systemd1(5), systemd.scope(5)).

use std::future::Future;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use cgroups_rs::fs::hierarchies::is_cgroup2_unified_mode;
use cgroups_rs::systemd::props::PropertiesBuilder;
use cgroups_rs::systemd::utils::expand_slice;
use cgroups_rs::systemd::{DEFAULT_SLICE, SCOPE_SUFFIX, SLICE_SUFFIX, cpu, cpuset, memory};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use zbus::export::ordered_stream::OrderedStreamExt;
use zbus::zvariant::{OwnedObjectPath, Value};
use zbus::{Connection, Proxy};

use crate::HostLimits;

/// How long systemd may take for a scope.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest name of a unit, bytes (systemd.unit(5)).
const MAX_NAME: usize = 255;

const UNIT_EXISTS: &str = "org.freedesktop.systemd1.UnitExists";
const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";

/// A scope, which may or may not exist.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scope {
    slice: String,
    unit: String,
}

/// Why a scope could not be made, changed or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ScopeError {
    /// systemd cannot be talked to.
    #[error(
        "cannot reach systemd over D-Bus; where it does not run, the cgroup driver must be cgroupfs"
    )]
    Unreachable(#[source] zbus::Error),
    /// systemd refuses.
    #[error("systemd refuses it")]
    Refused(#[source] zbus::Error),
    /// systemd has tried.
    #[error("systemd's job has ended with {0:?}")]
    Job(String),
    /// systemd has not answered.
    #[error("systemd has taken more than {} s", PATIENCE.as_secs())]
    Late,
    /// A limit is none.
    #[error("{0:?} is no list of numbers as in \"0-2,7\"")]
    List(String),
    /// The program cannot wait.
    #[error("cannot wait for systemd")]
    Wait(#[source] std::io::Error),
}

/// Why a `cgroupsPath` names no scope.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is not of the form SLICE:PREFIX:NAME: {why}")]
pub struct ScopeSyntaxError {
    given: String,
    why: &'static str,
}

impl Scope {
    /// The scope of a sandbox for which nobody has said one.
    pub fn default_of(id: &str) -> Self {
        Self {
            slice: DEFAULT_SLICE.to_owned(),
            unit: format!("cloison-{id}{SCOPE_SUFFIX}"),
        }
    }

    /// Its cgroup, below the hierarchies' roots.
    pub fn path(&self) -> PathBuf {
        // Checked when it was read.
        Path::new(&expand_slice(&self.slice).unwrap_or_default()).join(&self.unit)
    }

    /// Makes it, with a process in it.
    ///
    /// # Errors
    /// When systemd cannot be reached, refuses, or does not come to an end.
    pub(crate) fn start(&self, limits: &HostLimits, process: Pid) -> Result<(), ScopeError> {
        let mut properties = PropertiesBuilder::default_cgroup(&self.slice, &self.unit)
            .description(format!("cloison container {}", self.unit))
            .pids(vec![process.as_raw().unsigned_abs()])
            .build();
        properties.extend(self.properties(limits)?);
        let auxiliary: Vec<(&str, Vec<(&str, Value<'_>)>)> = Vec::new();
        let arguments = (&self.unit, "replace", &properties, &auxiliary);
        wait(async {
            let systemd = Systemd::connect().await?;
            let started = systemd.job("StartTransientUnit", &arguments).await;
            if !started.as_ref().is_err_and(|error| is(error, UNIT_EXISTS)) {
                return started;
            }
            // One that failed keeps its name until somebody has taken notice.
            self.clear(&systemd).await?;
            systemd.job("StartTransientUnit", &arguments).await
        })
    }

    /// Sets limits.
    ///
    /// # Errors
    /// As [`Scope::start`].
    pub(crate) fn limit(&self, limits: &HostLimits) -> Result<(), ScopeError> {
        let properties = self.properties(limits)?;
        if properties.is_empty() {
            return Ok(());
        }
        wait(async {
            let systemd = Systemd::connect().await?;
            // Until it ends: a scope does not outlive that.
            let arguments = (&self.unit, true, &properties);
            systemd.call("SetUnitProperties", &arguments).await
        })
    }

    /// Stops it. One that there is not is stopped already.
    ///
    /// # Errors
    /// As [`Scope::start`].
    pub(crate) fn stop(&self) -> Result<(), ScopeError> {
        wait(async { self.clear(&Systemd::connect().await?).await })
    }

    async fn clear(&self, systemd: &Systemd) -> Result<(), ScopeError> {
        let there = |result: Result<(), ScopeError>| match result {
            Err(error) if is(&error, NO_SUCH_UNIT) => Ok(()),
            other => other,
        };
        there(systemd.job("StopUnit", &(&self.unit, "replace")).await)?;
        there(systemd.call("ResetFailedUnit", &(&self.unit,)).await)
    }

    /// What of limits systemd wants to know: it sets them again when it is told to read its configuration anew.
    fn properties(
        &self,
        limits: &HostLimits,
    ) -> Result<Vec<(&'static str, Value<'static>)>, ScopeError> {
        let unified = is_cgroup2_unified_mode();
        let mut properties = Vec::new();
        if let Some(bytes) = limits.memory {
            let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
            properties.extend(memory::limit(bytes, unified).ok());
        }
        if let Some(shares) = limits.cpu_shares {
            let shares = if unified { weight(shares) } else { shares };
            properties.extend(cpu::shares(shares, unified).ok());
        }
        let mut properties: Vec<_> = properties
            .into_iter()
            .map(|(name, number)| (name, Value::from(number)))
            .collect();
        // On cgroup v1 systemd leaves cpusets alone.
        let sets = [(&limits.cpus, cpus as Set), (&limits.mems, mems as Set)];
        for (list, set) in sets.into_iter().filter(|_| unified) {
            if let Some(list) = list {
                let (name, mask) = set(list).ok_or_else(|| ScopeError::List(list.clone()))?;
                properties.push((name, Value::from(mask)));
            }
        }
        Ok(properties)
    }
}

type Set = fn(&str) -> Option<(&'static str, Vec<u8>)>;

fn cpus(list: &str) -> Option<(&'static str, Vec<u8>)> {
    cpuset::cpus(list).ok()
}

fn mems(list: &str) -> Option<(&'static str, Vec<u8>)> {
    cpuset::mems(list).ok()
}

/// Shares of cgroup v1 (2 to 262144) as a weight of v2 (1 to 10000), as the OCI runtimes convert them.
fn weight(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    1 + (shares - 2) * 9_999 / 262_142
}

impl FromStr for Scope {
    type Err = ScopeSyntaxError;

    fn from_str(text: &str) -> Result<Self, ScopeSyntaxError> {
        let wrong = |why| ScopeSyntaxError {
            given: text.to_owned(),
            why,
        };
        let parts: Vec<&str> = text.split(':').collect();
        let [slice, prefix, name] = parts[..] else {
            return Err(wrong("it needs two colons"));
        };
        let slice = if slice.is_empty() {
            DEFAULT_SLICE
        } else {
            slice
        };
        expand_slice(slice).map_err(|_| wrong("the first part is no slice's name"))?;
        if name.ends_with(SLICE_SUFFIX) {
            return Err(wrong("a container cannot be a slice"));
        }
        let unit = match prefix {
            "" => format!("{name}{SCOPE_SUFFIX}"),
            prefix => format!("{prefix}-{name}{SCOPE_SUFFIX}"),
        };
        // systemd.unit(5)
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
        if name.is_empty() || unit.len() > MAX_NAME || !unit.bytes().all(valid) {
            return Err(wrong("the other two make no unit's name"));
        }
        Ok(Self {
            slice: slice.to_owned(),
            unit,
        })
    }
}

/// systemd, as far as it is needed here.
struct Systemd(Proxy<'static>);

impl Systemd {
    async fn connect() -> Result<Self, ScopeError> {
        let bus = Connection::system()
            .await
            .map_err(ScopeError::Unreachable)?;
        let manager = Proxy::new(
            &bus,
            "org.freedesktop.systemd1",
            "/org/freedesktop/systemd1",
            "org.freedesktop.systemd1.Manager",
        );
        Ok(Self(manager.await.map_err(ScopeError::Unreachable)?))
    }

    async fn call<A>(&self, method: &str, arguments: &A) -> Result<(), ScopeError>
    where
        A: Serialize + zbus::zvariant::DynamicType,
    {
        let answer = self.0.call_method(method, arguments).await;
        answer.map(drop).map_err(ScopeError::Refused)
    }

    /// Calls a method that begins a job, and waits for that one's end.
    async fn job<A>(&self, method: &str, arguments: &A) -> Result<(), ScopeError>
    where
        A: Serialize + zbus::zvariant::DynamicType,
    {
        // Its end may come before the answer.
        let ends = self.0.receive_signal("JobRemoved").await;
        let mut ends = ends.map_err(ScopeError::Unreachable)?;
        let job: OwnedObjectPath = self
            .0
            .call(method, arguments)
            .await
            .map_err(ScopeError::Refused)?;
        while let Some(end) = ends.next().await {
            let body = end.body();
            let (_, ended, _, result): (u32, OwnedObjectPath, String, String) =
                body.deserialize().map_err(ScopeError::Unreachable)?;
            if ended == job {
                return match result.as_str() {
                    "done" => Ok(()),
                    _ => Err(ScopeError::Job(result)),
                };
            }
        }
        Err(ScopeError::Late)
    }
}

fn is(error: &ScopeError, name: &str) -> bool {
    matches!(error, ScopeError::Refused(zbus::Error::MethodError(given, ..)) if given.as_str() == name)
}

/// On the calling thread: its process may be one that has to stay alone.
fn wait<T>(work: impl Future<Output = Result<T, ScopeError>>) -> Result<T, ScopeError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(ScopeError::Wait)?;
    let done = runtime.block_on(async { timeout(PATIENCE, work).await });
    done.unwrap_or(Err(ScopeError::Late))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroups_path_names_a_slice_and_a_scope() {
        for (given, path) in [
            ("system.slice:docker:0a1b", "system.slice/docker-0a1b.scope"),
            (":runc:web", "system.slice/runc-web.scope"),
            ("machine.slice::web", "machine.slice/web.scope"),
            (
                "kubepods-besteffort.slice:cri:x",
                "kubepods.slice/kubepods-besteffort.slice/cri-x.scope",
            ),
            ("-.slice:libpod:x", "libpod-x.scope"),
        ] {
            let scope: Scope = given.parse().unwrap();
            assert_eq!(scope.path(), Path::new(path), "{given}");
        }
        let default = Scope::default_of("web").path();
        assert_eq!(default, Path::new("system.slice/cloison-web.scope"));
    }

    #[test]
    fn what_names_no_scope_is_refused_with_the_reason() {
        for (given, why) in [
            ("", "two colons"),
            ("/docker/0a1b", "two colons"),
            ("a:b", "two colons"),
            ("a.slice:b:c:d", "two colons"),
            ("system:b:c", "no slice's name"),
            ("../x.slice:b:c", "no slice's name"),
            ("a--b.slice:b:c", "no slice's name"),
            ("a.slice:b:c.slice", "cannot be a slice"),
            ("a.slice:b:", "no unit's name"),
            ("a.slice:b:../c", "no unit's name"),
            ("a.slice:b c:d", "no unit's name"),
        ] {
            let error = given.parse::<Scope>().unwrap_err().to_string();
            assert!(error.contains(why), "{given}: {error}");
        }
        let long = format!("a.slice:b:{}", "x".repeat(MAX_NAME));
        assert!(long.parse::<Scope>().is_err());
    }

    #[test]
    fn shares_become_weights() {
        for (shares, expected) in [
            (0, 1),
            (2, 1),
            (1024, 39),
            (262_144, 10_000),
            (u64::MAX, 10_000),
        ] {
            assert_eq!(weight(shares), expected);
        }
    }

    #[test]
    fn a_list_of_cpus_that_is_none_is_refused() {
        for list in ["", "x", "1-", "1-2-3", "-1"] {
            assert!(cpus(list).is_none(), "{list}");
        }
        assert_eq!(cpus("0,2"), Some(("AllowedCPUs", vec![0b101])));
    }
}
