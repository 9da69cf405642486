//! Capabilities that a spec names and that are not known here. As with runc they are left out, and said to be: no process could have them.

use oci_spec::runtime::{Capability, Spec};
use serde_json::Value;

/// Takes from a process, as in config.json, what it names of unknown capabilities, and answers that.
pub fn leave_out_unknown(process: &mut Value) -> Vec<String> {
    let mut left_out = Vec::new();
    let sets = process
        .get_mut("capabilities")
        .and_then(Value::as_object_mut);
    for set in sets.into_iter().flat_map(|sets| sets.values_mut()) {
        let Some(names) = set.as_array_mut() else {
            continue;
        };
        names.retain(|name| {
            let unknown = name
                .as_str()
                .filter(|_| serde_json::from_value::<Capability>(name.clone()).is_err());
            left_out.extend(unknown.map(str::to_owned));
            unknown.is_none()
        });
    }
    left_out.sort();
    left_out.dedup();
    left_out
}

/// What the log says of capabilities that were left out.
pub fn note(left_out: &[String]) -> Option<String> {
    (!left_out.is_empty()).then(|| {
        format!(
            "ignoring unknown or unavailable capabilities: {}",
            left_out.join(", ")
        )
    })
}

/// A config.json as it is understood, its text, and what the log says of it.
///
/// # Errors
/// When it cannot be understood.
pub fn parse(text: Vec<u8>) -> serde_json::Result<(Spec, Vec<u8>, Option<String>)> {
    let error = match serde_json::from_slice(&text) {
        Ok(spec) => return Ok((spec, text, None)),
        Err(error) => error,
    };
    let Ok(mut config) = serde_json::from_slice::<Value>(&text) else {
        return Err(error);
    };
    let left_out = config
        .get_mut("process")
        .map(leave_out_unknown)
        .unwrap_or_default();
    if left_out.is_empty() {
        return Err(error);
    }
    let text = serde_json::to_vec(&config)?;
    Ok((serde_json::from_slice(&text)?, text, note(&left_out)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(capabilities: Value) -> Vec<u8> {
        let process = json!({ "user": { "uid": 0, "gid": 0 }, "cwd": "/", "args": ["true"], "capabilities": capabilities });
        serde_json::to_vec(&json!({ "ociVersion": "1.0.0", "process": process })).unwrap()
    }

    #[test]
    fn unknown_capabilities_are_left_out_of_all_sets_and_named_once() {
        let given = config(json!({
            "bounding": ["CAP_KILL", "CAP_UNKNOWN", "UNKNOWN_CAP"],
            "permitted": ["CAP_UNKNOWN"],
        }));
        let (spec, text, note) = parse(given).unwrap();
        let process = spec.process().clone().unwrap();
        let sets = process.capabilities().clone().unwrap();
        assert_eq!(
            sets.bounding().clone().unwrap(),
            [Capability::Kill].into_iter().collect()
        );
        assert!(sets.permitted().clone().unwrap().is_empty());
        assert!(note.unwrap().ends_with(": CAP_UNKNOWN, UNKNOWN_CAP"));
        let (again, _, note) = parse(text).unwrap();
        assert_eq!((again, note), (spec, None));
    }

    #[test]
    fn what_is_known_is_kept_to_the_byte_and_what_is_no_name_is_an_error() {
        let given = config(json!({ "bounding": ["CAP_KILL", "SYS_ADMIN"] }));
        let (_, text, note) = parse(given.clone()).unwrap();
        assert_eq!((text, note), (given, None));
        for bad in [
            json!({ "bounding": [7] }),
            json!({ "bounding": "CAP_KILL" }),
            json!({ "bounding": [7, "CAP_UNKNOWN"] }),
        ] {
            assert!(parse(config(bad)).is_err());
        }
        assert!(parse(b"{".to_vec()).is_err());
    }
}
