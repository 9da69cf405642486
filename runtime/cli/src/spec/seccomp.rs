//! `--security-opt`: no_new_privs and seccomp profiles, in docker's format or the OCI specification's.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use oci_spec::runtime::LinuxSeccomp;
use serde::Deserialize;
use serde_json::{Value, json};

/// The architectures whose system calls a guest can make.
const ARCHITECTURES: [&str; 3] = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"];

/// What the `--security-opt`s of a container say.
#[derive(Debug, Default, Clone)]
pub struct SecurityOptions {
    pub no_new_privileges: bool,
    pub seccomp: Option<LinuxSeccomp>,
}

impl SecurityOptions {
    /// Reads the options, and the profiles they name; `capabilities` are the container's, which profiles may depend on.
    ///
    /// # Errors
    /// When an option is unknown, or a profile is not one.
    pub fn read(options: &[String], capabilities: &[String]) -> Result<Self> {
        let mut read = Self::default();
        for option in options {
            let (key, value) = option.split_once(['=', ':']).unwrap_or((option, ""));
            match (key, value) {
                ("no-new-privileges", "" | "true") => read.no_new_privileges = true,
                ("no-new-privileges", "false") => read.no_new_privileges = false,
                ("seccomp", "unconfined") => read.seccomp = None,
                ("seccomp", path) if !path.is_empty() => {
                    read.seccomp = Some(profile(Path::new(path), capabilities)?)
                }
                _ => bail!(
                    "unknown security option \"{option}\": give no-new-privileges, seccomp=unconfined or seccomp=PROFILE.json"
                ),
            }
        }
        Ok(read)
    }
}

/// Docker's profile format; the OCI specification's is the part of it without conditions.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Profile {
    default_action: String,
    default_errno_ret: Option<u32>,
    #[serde(default)]
    flags: Vec<String>,
    #[serde(default)]
    syscalls: Vec<Rule>,
    listener_path: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    name: Option<String>,
    #[serde(default)]
    names: Vec<String>,
    action: String,
    errno_ret: Option<u32>,
    args: Option<Vec<Value>>,
    includes: Option<Conditions>,
    excludes: Option<Conditions>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Conditions {
    caps: Option<Vec<String>>,
    arches: Option<Vec<String>>,
    min_kernel: Option<String>,
}

fn profile(path: &Path, capabilities: &[String]) -> Result<LinuxSeccomp> {
    let text = fs::read(path)
        .with_context(|| format!("cannot read the seccomp profile {}", path.display()))?;
    parse(&text, capabilities)
        .with_context(|| format!("cannot use the seccomp profile {}", path.display()))
}

fn parse(text: &[u8], capabilities: &[String]) -> Result<LinuxSeccomp> {
    let profile: Profile = serde_json::from_slice(text)?;
    if profile.listener_path.is_some() {
        bail!("it asks for a listener, which cannot be reached from inside a virtual machine");
    }
    let mut rules = Vec::new();
    for rule in profile.syscalls {
        let holds = |conditions: &Conditions| conditions.hold(capabilities);
        if rule.includes.as_ref().is_some_and(|c| !holds(c))
            || rule
                .excludes
                .as_ref()
                .is_some_and(|c| c.hold_any(capabilities))
        {
            continue;
        }
        let names: Vec<String> = rule.names.into_iter().chain(rule.name).collect();
        let mut out = json!({ "names": names, "action": rule.action });
        if let Some(errno) = rule.errno_ret {
            out["errnoRet"] = errno.into();
        }
        if let Some(args) = rule.args {
            out["args"] = args.into();
        }
        rules.push(out);
    }
    let mut out = json!({
        "defaultAction": profile.default_action,
        "architectures": ARCHITECTURES,
        "syscalls": rules,
    });
    if let Some(errno) = profile.default_errno_ret {
        out["defaultErrnoRet"] = errno.into();
    }
    if !profile.flags.is_empty() {
        out["flags"] = profile.flags.into();
    }
    Ok(serde_json::from_value(out)?)
}

impl Conditions {
    /// Whether every condition holds, as an `includes` wants. Any kernel that a profile asks for is older than the guest's.
    fn hold(&self, capabilities: &[String]) -> bool {
        self.caps.iter().flatten().all(|c| capabilities.contains(c))
            && self
                .arches
                .as_ref()
                .is_none_or(|arches| arches.iter().any(|a| is_ours(a)))
    }

    /// Whether any condition holds, as an `excludes` wants.
    fn hold_any(&self, capabilities: &[String]) -> bool {
        self.caps.iter().flatten().any(|c| capabilities.contains(c))
            || self.arches.iter().flatten().any(|a| is_ours(a))
            || self.min_kernel.is_some()
    }
}

fn is_ours(arch: &str) -> bool {
    matches!(arch, "amd64" | "x86" | "x32")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(options: &[&str]) -> Result<SecurityOptions> {
        let options: Vec<String> = options.iter().map(|o| (*o).to_owned()).collect();
        SecurityOptions::read(&options, &[])
    }

    #[test]
    fn both_notations_of_an_option_are_taken_and_others_refused() {
        assert!(read(&["no-new-privileges"]).unwrap().no_new_privileges);
        assert!(read(&["no-new-privileges:true"]).unwrap().no_new_privileges);
        assert!(
            !read(&["no-new-privileges=false"])
                .unwrap()
                .no_new_privileges
        );
        assert!(read(&["seccomp=unconfined"]).unwrap().seccomp.is_none());
        for bad in [
            "",
            "apparmor=x",
            "label=disable",
            "no-new-privileges=maybe",
            "seccomp=",
            "seccomp=/nonexistent",
        ] {
            assert!(read(&[bad]).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_docker_profiles_conditions_are_decided_here() {
        let profile = br#"{ "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "archMap": [],
            "syscalls": [
              { "names": ["read"], "action": "SCMP_ACT_ALLOW" },
              { "names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": { "caps": ["CAP_SYS_ADMIN"] } },
              { "names": ["arm_sync"], "action": "SCMP_ACT_ALLOW", "includes": { "arches": ["arm64"] } },
              { "names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": { "minKernel": "4.8" } },
              { "names": ["chroot"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38, "excludes": { "caps": ["CAP_SYS_CHROOT"] } } ] }"#;
        let names = |capabilities: &[&str]| {
            let capabilities: Vec<String> = capabilities.iter().map(|c| (*c).to_owned()).collect();
            let seccomp = parse(profile, &capabilities).unwrap();
            let rules = seccomp.syscalls().clone().unwrap();
            rules
                .iter()
                .flat_map(|rule| rule.names().clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(names(&[]), ["read", "ptrace", "chroot"]);
        assert_eq!(
            names(&["CAP_SYS_ADMIN", "CAP_SYS_CHROOT"]),
            ["read", "mount", "ptrace"]
        );
    }

    #[test]
    fn what_is_not_a_profile_is_refused() {
        for bad in [
            "",
            "{}",
            "[]",
            r#"{"defaultAction":"SCMP_ACT_NOPE"}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/x"}"#,
        ] {
            assert!(parse(bad.as_bytes(), &[]).is_err(), "{bad}");
        }
    }
}
