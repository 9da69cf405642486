//! An image's configuration, as far as running it needs it: plain data with the specification's nulls and empty strings
//! smoothed away. It may assume that the document's digest has been verified.

use std::collections::BTreeMap;

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};

/// The search path of a container whose image sets none: docker's for Linux.
pub const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How an image wants to be run (image-spec config.md, `config`). An absent list is empty, an absent text `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// Put before the command.
    pub entrypoint: Vec<String>,
    /// The command, unless the person gives one.
    pub cmd: Vec<String>,
    /// `NAME=VALUE`, in the image's order.
    pub env: Vec<String>,
    /// `user[:group]`, names or numbers; see [`crate::resolve_user`].
    pub user: Option<String>,
    /// Where the process starts.
    pub working_dir: Option<String>,
    /// Signal that asks the container to stop, as a name or number.
    pub stop_signal: Option<String>,
    /// Paths that hold data of a container's own, sorted.
    pub volumes: Vec<String>,
    /// `port[/protocol]`, sorted.
    pub exposed_ports: Vec<String>,
    /// Free metadata.
    pub labels: BTreeMap<String, String>,
    /// Docker's extension; image-spec has none.
    pub healthcheck: Option<Healthcheck>,
}

/// How to find out whether the container works (Docker's image configuration, `Healthcheck`). Durations are nanoseconds, 0
/// meaning the default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Healthcheck {
    /// `NONE`, or `CMD` with arguments, or `CMD-SHELL` with a command line.
    pub test: Vec<String>,
    /// Between two checks.
    pub interval: u64,
    /// For one check.
    pub timeout: u64,
    /// In which failures do not count.
    pub start_period: u64,
    /// Failures in a row that make the container unhealthy.
    pub retries: u32,
}

#[derive(Deserialize)]
struct DockerConfiguration {
    config: Option<DockerConfig>,
}

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(rename = "Healthcheck")]
    healthcheck: Option<Healthcheck>,
}

impl ImageConfig {
    /// What a bare root directory gets: a search path, nothing else.
    pub(crate) fn of_bare_rootfs() -> ImageConfig {
        ImageConfig {
            env: vec![DEFAULT_PATH.to_owned()],
            ..ImageConfig::default()
        }
    }

    /// Reads `config` out of a whole configuration and the text it came from.
    pub(crate) fn new(whole: &ImageConfiguration, text: &[u8]) -> Result<ImageConfig, String> {
        let docker: DockerConfiguration =
            serde_json::from_slice(text).map_err(|e| e.to_string())?;
        let config = whole.config().clone().unwrap_or_default();
        let given = |text: &Option<String>| text.clone().filter(|t| !t.is_empty());
        let sorted = |list: &Option<Vec<String>>| {
            let mut list = list.clone().unwrap_or_default();
            list.sort();
            list
        };
        let config = ImageConfig {
            entrypoint: config.entrypoint().clone().unwrap_or_default(),
            cmd: config.cmd().clone().unwrap_or_default(),
            env: config.env().clone().unwrap_or_default(),
            user: given(config.user()),
            working_dir: given(config.working_dir()),
            stop_signal: given(config.stop_signal()),
            volumes: sorted(config.volumes()),
            exposed_ports: sorted(config.exposed_ports()),
            labels: config
                .labels()
                .clone()
                .unwrap_or_default()
                .into_iter()
                .collect(),
            healthcheck: docker.config.and_then(|c| c.healthcheck),
        };
        config.check()?;
        Ok(config)
    }

    /// Refuses what no process can be given.
    fn check(&self) -> Result<(), String> {
        let texts = [&self.entrypoint, &self.cmd, &self.env]
            .into_iter()
            .flatten();
        let single = [&self.user, &self.working_dir, &self.stop_signal]
            .into_iter()
            .flatten();
        if texts
            .chain(single)
            .chain(&self.volumes)
            .any(|t| t.contains('\0'))
        {
            return Err("a text in its config contains a NUL character".to_owned());
        }
        if let Some(bad) = self.env.iter().find(|e| e.starts_with('=') || e.is_empty()) {
            return Err(format!(
                "its environment has an entry without a name: {bad:?}"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(config: &str) -> Result<ImageConfig, String> {
        let text = format!(
            r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":[]}},"config":{config}}}"#
        );
        ImageConfig::new(&serde_json::from_str(&text).unwrap(), text.as_bytes())
    }

    #[test]
    fn all_that_an_image_can_ask_for_is_kept() {
        let config = read(
            r#"{"User":"www:33","ExposedPorts":{"80/tcp":{},"443/tcp":{}},"Env":["A=b","C"],"Entrypoint":["/e"],"Cmd":["x","y"],
                "Volumes":{"/v":{},"/data":{}},"WorkingDir":"/w","Labels":{"k":"v"},"StopSignal":"SIGQUIT",
                "Healthcheck":{"Test":["CMD","true"],"Interval":30000000000,"Retries":3}}"#,
        )
        .unwrap();
        assert_eq!(config.user.as_deref(), Some("www:33"));
        assert_eq!(config.exposed_ports, ["443/tcp", "80/tcp"]);
        assert_eq!(config.env, ["A=b", "C"]);
        assert_eq!(
            (config.entrypoint, config.cmd),
            (vec!["/e".to_owned()], vec!["x".to_owned(), "y".to_owned()])
        );
        assert_eq!(config.volumes, ["/data", "/v"]);
        assert_eq!(config.working_dir.as_deref(), Some("/w"));
        assert_eq!(config.labels["k"], "v");
        assert_eq!(config.stop_signal.as_deref(), Some("SIGQUIT"));
        let health = config.healthcheck.unwrap();
        assert_eq!(
            (health.test, health.interval, health.retries),
            (vec!["CMD".to_owned(), "true".to_owned()], 30_000_000_000, 3)
        );
    }

    #[test]
    fn null_and_empty_mean_absent() {
        let nulls = r#"{"User":"","Env":null,"Entrypoint":null,"Cmd":null,"Volumes":null,"WorkingDir":"","Labels":null,
                        "ExposedPorts":null,"Healthcheck":null,"OnBuild":null}"#;
        for config in ["null", "{}", nulls] {
            assert_eq!(read(config).unwrap(), ImageConfig::default(), "{config}");
        }
    }

    #[test]
    fn texts_that_no_process_can_get_are_refused() {
        for config in [
            r#"{"Env":["A=\u0000"]}"#,
            r#"{"Cmd":["\u0000"]}"#,
            r#"{"Env":["=x"]}"#,
            r#"{"User":"\u0000"}"#,
        ] {
            assert!(read(config).is_err(), "{config}");
        }
    }
}
