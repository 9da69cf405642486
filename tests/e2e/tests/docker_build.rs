//! `docker build` with cloison as the daemon's default runtime: every RUN is a container in a VM.

use std::fs;
use std::process::Command;

use serde_json::json;

use crate::dockerd::{Daemon, Release};
use crate::host::{succeed, text};

const DOCKERFILE: &str = r#"
FROM busybox
RUN uname -r > /kernel && mkdir /made && echo made > /made/file && ln -s file /made/link
WORKDIR /made
COPY context .
RUN cat file context > /sum && chown 1000:1000 /sum && chmod 640 /sum && rm context
USER 1000
RUN id -u > /tmp/id && touch /denied 2>/dev/null || echo denied >> /tmp/id
CMD ["sh", "-c", "cat /kernel /sum /tmp/id; readlink link; ls -ln /sum | cut -c1-10; ls /made"]
"#;

fn build(docker: &Daemon, dockerfile: &str) -> Command {
    let dir = docker.path("context");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("Dockerfile"), dockerfile).unwrap();
    fs::write(dir.join("context"), "copied\n").unwrap();
    let mut command = docker.command(&["build", "-t", "built", dir.to_str().unwrap()]);
    command.env("DOCKER_BUILDKIT", "0");
    command
}

#[test]
fn images_are_built_in_vms_when_cloison_is_the_default_runtime() {
    let config = json!({ "default-runtime": "cloison" });
    let Some(docker) = Daemon::own(Release::Host, config) else {
        return;
    };
    succeed(&build(&docker, DOCKERFILE).output().unwrap());
    let said = docker.say(&["run", "--rm", "--network", "none", "built"]);
    let host = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let (kernel, rest) = said.split_once('\n').unwrap();
    assert_ne!(kernel, host.trim());
    assert_eq!(
        rest,
        "made\ncopied\n1000\ndenied\nfile\n-rw-r-----\nDockerfile\nfile\nlink"
            .replace("Dockerfile\n", "")
    );
    let failing = build(&docker, "FROM busybox\nRUN echo why >&2; exit 3\n")
        .output()
        .unwrap();
    let (out, err) = (text(&failing.stdout), text(&failing.stderr));
    assert!(!failing.status.success());
    assert!(err.contains("non-zero code: 3"), "{out}{err}");
    // What a failed step leaves is a stopped container, as with runc.
    let stopped = docker.say(&["ps", "-aq"]);
    docker.say(&["rm", &stopped]);
}
