//! docker's daemon.json: an entry in "runtimes".

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::RUNTIME;

/// The file with the runtime.
pub fn add(text: &str, runtime: &Path) -> Result<Option<String>> {
    let mut config = parse(text)?;
    let entry = json!({ "path": runtime });
    let runtimes = config.entry("runtimes").or_insert_with(|| json!({}));
    let runtimes = runtimes.as_object_mut();
    let runtimes = runtimes.context("\"runtimes\" is not an object")?;
    if runtimes.get(RUNTIME) == Some(&entry) {
        return Ok(Some(text.to_owned()));
    }
    runtimes.insert(RUNTIME.into(), entry);
    print(&config).map(Some)
}

/// The file without it; none when nothing is left.
pub fn remove(text: &str) -> Result<Option<String>> {
    if text.is_empty() {
        return Ok(None);
    }
    let mut config = parse(text)?;
    let runtimes = config.get_mut("runtimes").and_then(Value::as_object_mut);
    let Some(runtimes) = runtimes else {
        return Ok(Some(text.to_owned()));
    };
    if runtimes.remove(RUNTIME).is_none() {
        return Ok(Some(text.to_owned()));
    }
    if runtimes.is_empty() {
        config.remove("runtimes");
    }
    match config.is_empty() {
        true => Ok(None),
        false => print(&config).map(Some),
    }
}

fn parse(text: &str) -> Result<Map<String, Value>> {
    if text.trim().is_empty() {
        return Ok(Map::new());
    }
    serde_json::from_str(text).context("it is not a JSON object")
}

fn print(config: &Map<String, Value>) -> Result<String> {
    Ok(serde_json::to_string_pretty(config)? + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNTIME_PATH: &str = "/usr/local/bin/cloison-runtime";

    fn added(text: &str) -> String {
        add(text, Path::new(RUNTIME_PATH)).unwrap().unwrap()
    }

    #[test]
    fn everything_else_stays_as_it_is() {
        let before =
            "{\"log-driver\": \"journald\", \"runtimes\": {\"other\": {\"path\": \"/o\"}}}";
        let after = added(before);
        let config: Value = serde_json::from_str(&after).unwrap();
        assert_eq!(config["log-driver"], "journald");
        assert_eq!(config["runtimes"]["other"]["path"], "/o");
        assert_eq!(config["runtimes"]["cloison"]["path"], RUNTIME_PATH);
        let back: Value = serde_json::from_str(&remove(&after).unwrap().unwrap()).unwrap();
        assert_eq!(back, serde_json::from_str::<Value>(before).unwrap());
    }

    #[test]
    fn a_second_time_changes_nothing_and_a_file_of_ours_alone_goes() {
        let once = added("");
        assert_eq!(added(&once), once);
        assert_eq!(remove(&once).unwrap(), None);
        assert_eq!(remove("{}").unwrap().as_deref(), Some("{}"));
    }

    #[test]
    fn what_is_no_configuration_is_left_alone() {
        for text in ["[]", "{", "{\"runtimes\": []}", "# comment"] {
            assert!(add(text, Path::new("/r")).is_err(), "{text}");
        }
    }
}
