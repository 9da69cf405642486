//! Namespaces that containers of one guest share. The host says whose they are; the spec that libcontainer gets says where they are.

use std::borrow::Cow;
use std::path::PathBuf;

use cloison_agent_api::agent::SharedNamespace;
use libcontainer::oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};
use nix::unistd::Pid;

use crate::error::{Error, Result};

fn invalid(why: impl Into<String>) -> Error {
    Error::Invalid {
        what: "spec",
        why: why.into(),
    }
}

/// The spec with the paths of `shared` filled in; `init` knows the first process of a container by its ID.
pub fn fill_in<'a>(
    shared: &[SharedNamespace],
    json: Cow<'a, [u8]>,
    init: impl Fn(&str) -> Result<Pid>,
) -> Result<Cow<'a, [u8]>> {
    if shared.is_empty() {
        return Ok(json);
    }
    let mut spec: Spec = serde_json::from_slice(&json)
        .map_err(|error| invalid(format!("not an OCI spec: {error}")))?;
    let mut linux = spec
        .linux()
        .clone()
        .ok_or_else(|| invalid("linux is missing"))?;
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    for shared in shared {
        let kind = kind(&shared.kind)?;
        let namespace = namespaces.iter_mut().find(|n| n.typ() == kind);
        let namespace: &mut LinuxNamespace = namespace.ok_or_else(|| {
            invalid(format!(
                "linux.namespaces has no {} namespace that could be another container's",
                shared.kind
            ))
        })?;
        let pid = init(&shared.container_id)?;
        let path = format!("/proc/{pid}/ns/{}", shared.kind);
        namespace.set_path(Some(PathBuf::from(path)));
    }
    linux.set_namespaces(Some(namespaces));
    spec.set_linux(Some(linux));
    let json = serde_json::to_vec(&spec).map_err(|error| invalid(error.to_string()))?;
    Ok(json.into())
}

/// What can be shared. The network is the guest's, and so every container's.
fn kind(name: &str) -> Result<LinuxNamespaceType> {
    match name {
        "ipc" => Ok(LinuxNamespaceType::Ipc),
        "uts" => Ok(LinuxNamespaceType::Uts),
        "pid" => Ok(LinuxNamespaceType::Pid),
        _ => Err(invalid(format!(
            "{name:?} is no namespace that containers can share"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn filled(spec: &Value, shared: &[(&str, &str)]) -> Result<Value> {
        let shared: Vec<_> = shared
            .iter()
            .map(|(kind, container)| SharedNamespace {
                kind: (*kind).into(),
                container_id: (*container).into(),
                ..Default::default()
            })
            .collect();
        let json = serde_json::to_vec(spec).unwrap();
        let init = |id: &str| match id {
            "one" => Ok(Pid::from_raw(7)),
            _ => Err(Error::Ended),
        };
        let json = fill_in(&shared, json.into(), init)?;
        Ok(serde_json::from_slice(&json).unwrap())
    }

    fn spec() -> Value {
        json!({
            "ociVersion": "1.2.0",
            "linux": { "namespaces": [{ "type": "pid" }, { "type": "ipc" }, { "type": "uts" }] },
        })
    }

    #[test]
    fn a_shared_namespace_is_that_of_the_other_containers_init() {
        let spec = filled(&spec(), &[("ipc", "one"), ("uts", "one")]).unwrap();
        let namespaces = &spec["linux"]["namespaces"];
        assert_eq!(namespaces[0].get("path"), None);
        assert_eq!(namespaces[1]["path"], "/proc/7/ns/ipc");
        assert_eq!(namespaces[2]["path"], "/proc/7/ns/uts");
    }

    #[test]
    fn what_cannot_be_shared_is_refused() {
        for (kind, container) in [
            ("mount", "one"),
            ("user", "one"),
            ("../../1/ns/pid", "one"),
            ("", "one"),
            ("ipc", "gone"),
        ] {
            assert!(filled(&spec(), &[(kind, container)]).is_err(), "{kind}");
        }
        let without = json!({ "ociVersion": "1.2.0", "linux": { "namespaces": [] } });
        assert!(filled(&without, &[("ipc", "one")]).is_err());
        assert!(filled(&json!({ "ociVersion": "1.2.0" }), &[("ipc", "one")]).is_err());
        assert!(filled(&json!([]), &[("ipc", "one")]).is_err());
    }
}
