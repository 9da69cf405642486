//! `cloison install` and `cloison uninstall`.

use std::fs;

use serde_json::Value;

use crate::host::{Host, dist, fail, succeed};

#[test]
fn a_configuration_gains_the_runtime_and_loses_it_again() {
    let host = Host::new();
    let before = "{ \"log-level\": \"warn\" }\n";
    let file = host.file("daemon.json", before);
    let args = |verb| [verb, "docker", "--config", file.to_str().unwrap()];
    let install = args("install");
    let dry: Vec<&str> = install.iter().copied().chain(["--dry-run"]).collect();
    assert!(succeed(&host.cloison(&dry)).contains("cloison-runtime"));
    assert_eq!(fs::read_to_string(&file).unwrap(), before);
    succeed(&host.cloison(install));
    let config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    assert_eq!(config["log-level"], "warn");
    let runtime = dist().join("cloison-runtime");
    assert_eq!(
        config["runtimes"]["cloison"]["path"],
        runtime.to_str().unwrap()
    );
    assert!(succeed(&host.cloison(install)).contains("nothing to do"));
    let backup = host.path("daemon.json.before-cloison");
    assert_eq!(fs::read_to_string(backup).unwrap(), before);
    succeed(&host.cloison(args("uninstall")));
    let config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    assert_eq!(config, serde_json::from_str::<Value>(before).unwrap());
}

#[test]
fn what_cannot_be_understood_stays_as_it_is() {
    let host = Host::new();
    let file = host.file("daemon.json", "not json");
    let output = host.cloison(["install", "docker", "--config", file.to_str().unwrap()]);
    fail(&output, 1, &["daemon.json", "left as it is"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "not json");
    let missing = host.cloison([
        "install",
        "podman",
        "--runtime",
        "/nonexistent/r",
        "--config",
        "/nonexistent/c",
    ]);
    fail(&missing, 1, &["/nonexistent/r"]);
}
