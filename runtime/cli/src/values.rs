//! The values that options take, in docker's notations, parsed without touching the system.

use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A value that makes no sense; the text says what would.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadValue(String);

fn bad<T>(text: impl Into<String>) -> Result<T, BadValue> {
    Err(BadValue(text.into()))
}

/// A size in bytes: a number with an optional unit b, k, m, g or t (powers of 1024), as `--memory` takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes(pub u64);

/// Digits after the point that still change a size.
const MAX_FRACTION: usize = 12;

impl FromStr for Bytes {
    type Err = BadValue;
    fn from_str(text: &str) -> Result<Self, BadValue> {
        let explain = || {
            BadValue(format!(
                "\"{text}\" is not a size: give a number with an optional unit b, k, m or g, such as 512m"
            ))
        };
        let lower = text.to_ascii_lowercase();
        let lower = lower
            .strip_suffix("ib")
            .or_else(|| lower.strip_suffix('b'))
            .unwrap_or(&lower);
        let (digits, shift) = match lower.as_bytes().last() {
            Some(b'k') => (&lower[..lower.len() - 1], 10),
            Some(b'm') => (&lower[..lower.len() - 1], 20),
            Some(b'g') => (&lower[..lower.len() - 1], 30),
            Some(b't') => (&lower[..lower.len() - 1], 40),
            _ => (lower, 0),
        };
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        if whole.is_empty() || !(whole.bytes().chain(fraction.bytes())).all(|b| b.is_ascii_digit())
        {
            return Err(explain());
        }
        let whole: u64 = whole.parse().map_err(|_| explain())?;
        let whole = whole.checked_mul(1 << shift).ok_or_else(explain)?;
        let fraction = &fraction[..fraction.len().min(MAX_FRACTION)];
        let mut part = 0;
        for digit in fraction.bytes().rev() {
            part = (part + (u64::from(digit - b'0') << shift)) / 10;
        }
        let bytes = whole.checked_add(part).ok_or_else(explain)?;
        Ok(Self(bytes))
    }
}

/// A share of CPUs, as `--cpus` takes it, in thousandths of one CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MilliCpus(pub u32);

impl FromStr for MilliCpus {
    type Err = BadValue;
    fn from_str(text: &str) -> Result<Self, BadValue> {
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
        let whole = if whole.is_empty() && !fraction.is_empty() {
            "0"
        } else {
            whole
        };
        if digits(whole) && digits(fraction) && fraction.len() <= 9 {
            let thousandths = format!("{fraction:0<3}");
            if let (Ok(whole), Ok(part)) = (whole.parse::<u32>(), thousandths[..3].parse::<u32>())
                && let Some(all) = whole.checked_mul(1000).and_then(|w| w.checked_add(part))
                && (10..=64_000).contains(&all)
            {
                return Ok(Self(all));
            }
        }
        bad(format!(
            "\"{text}\" is not a number of CPUs: give a number from 0.01 to 64, such as 1.5"
        ))
    }
}

/// A bind mount, `SRC:DST[:OPTIONS]`.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Volume {
    /// Absolute path on the host.
    pub source: PathBuf,
    /// Absolute path in the container.
    pub destination: PathBuf,
    /// Whether the container may only read.
    pub read_only: bool,
}

impl FromStr for Volume {
    type Err = BadValue;
    fn from_str(text: &str) -> Result<Self, BadValue> {
        let parts: Vec<&str> = text.split(':').collect();
        let (source, destination, options) = match parts[..] {
            [source, destination] => (source, destination, ""),
            [source, destination, options] => (source, destination, options),
            _ => {
                return bad(format!(
                    "\"{text}\" is not a volume: give SRC:DST or SRC:DST:ro, with absolute paths"
                ));
            }
        };
        if !source.starts_with('/') {
            return bad(format!(
                "volume source \"{source}\" is not an absolute path (named volumes are not supported)"
            ));
        }
        let destination = container_path(destination)?;
        let mut read_only = false;
        for option in options.split(',').filter(|o| !o.is_empty()) {
            match option {
                "ro" => read_only = true,
                "rw" => read_only = false,
                // What relabelling is about, SELinux's view of the host, is nothing the guest can reach.
                "z" | "Z" => {}
                other => {
                    return bad(format!(
                        "unknown volume option \"{other}\" in \"{text}\": give ro or rw"
                    ));
                }
            }
        }
        Ok(Self {
            source: source.into(),
            destination,
            read_only,
        })
    }
}

/// An absolute path in the container that is not its root.
fn container_path(text: &str) -> Result<PathBuf, BadValue> {
    let path = Path::new(text);
    if !path.is_absolute() {
        return bad(format!(
            "\"{text}\" must be an absolute path in the container"
        ));
    }
    if path
        .components()
        .any(|c| c == std::path::Component::ParentDir)
    {
        return bad(format!("\"{text}\" must not contain \"..\""));
    }
    if path.components().count() < 2 {
        return bad(format!(
            "\"{text}\" is the container's root, which cannot be mounted over"
        ));
    }
    Ok(path.to_owned())
}

/// A tmpfs, `DST[:OPTIONS]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tmpfs {
    /// Absolute path in the container.
    pub destination: PathBuf,
    /// Mount options.
    pub options: Vec<String>,
}

impl FromStr for Tmpfs {
    type Err = BadValue;
    fn from_str(text: &str) -> Result<Self, BadValue> {
        let (destination, given) = text.split_once(':').unwrap_or((text, ""));
        let mut options: Vec<String> = ["noexec", "nosuid", "nodev"].map(String::from).into();
        for option in given.split(',').filter(|o| !o.is_empty()) {
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            match (key, value) {
                ("size", size) => {
                    if !size.ends_with('%') {
                        size.parse::<Bytes>()?;
                    }
                }
                ("mode", mode) if u32::from_str_radix(mode, 8).is_ok_and(|m| m <= 0o7777) => {}
                ("uid" | "gid" | "nr_inodes", number) if number.parse::<u32>().is_ok() => {}
                (
                    "rw" | "ro" | "noexec" | "nosuid" | "nodev" | "noatime" | "relatime"
                    | "nodiratime",
                    "",
                ) => {}
                ("exec" | "suid" | "dev", "") => options.retain(|o| o != &format!("no{key}")),
                _ => return bad(format!("unknown tmpfs option \"{option}\" in \"{text}\"")),
            }
            if !options.iter().any(|o| o == option) {
                options.push(option.to_owned());
            }
        }
        Ok(Self {
            destination: container_path(destination)?,
            options,
        })
    }
}

/// A resource limit, `NAME=SOFT[:HARD]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ulimit {
    /// The OCI name: "RLIMIT_NOFILE".
    pub name: String,
    /// Soft limit; `u64::MAX` for none.
    pub soft: u64,
    /// Hard limit; `u64::MAX` for none.
    pub hard: u64,
}

/// The limits there are, by the names that docker gives them.
const ULIMITS: [&str; 16] = [
    "as",
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

impl FromStr for Ulimit {
    type Err = BadValue;
    fn from_str(text: &str) -> Result<Self, BadValue> {
        let Some((name, limits)) = text.split_once('=') else {
            return bad(format!(
                "\"{text}\" is not a limit: give NAME=SOFT or NAME=SOFT:HARD"
            ));
        };
        if !ULIMITS.contains(&name) {
            return bad(format!(
                "unknown limit \"{name}\": give one of {}",
                ULIMITS.join(", ")
            ));
        }
        let limit = |text: &str| match text {
            "-1" | "unlimited" => Ok(u64::MAX),
            number => number.parse::<u64>().map_err(|_| {
                BadValue(format!(
                    "\"{text}\" is not a value for the limit {name}: give a number, or -1 for none"
                ))
            }),
        };
        let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
        let (soft, hard) = (limit(soft)?, limit(hard)?);
        if soft > hard {
            return bad(format!(
                "the soft limit of {name} is above its hard limit in \"{text}\""
            ));
        }
        Ok(Self {
            name: format!("RLIMIT_{}", name.to_ascii_uppercase()),
            soft,
            hard,
        })
    }
}

/// An environment variable, `NAME=VALUE`, or `NAME` for the caller's own value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnvVar {
    /// Name.
    pub name: String,
    /// Value; `None` when the caller's is meant.
    pub value: Option<String>,
}

impl FromStr for EnvVar {
    type Err = BadValue;
    fn from_str(text: &str) -> Result<Self, BadValue> {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (text, None),
        };
        if name.is_empty() || text.contains('\0') {
            return bad(format!(
                "\"{text}\" is not an environment variable: give NAME=VALUE or NAME"
            ));
        }
        Ok(Self {
            name: name.into(),
            value,
        })
    }
}

impl EnvVar {
    /// Parses the text of an environment file: a variable a line, empty lines and lines that start with "#" skipped.
    ///
    /// # Errors
    /// Naming the line.
    pub fn parse_file(text: &str) -> Result<Vec<Self>, BadValue> {
        let lines = text.lines().enumerate();
        let lines = lines.map(|(number, line)| (number + 1, line.trim_start()));
        let variables = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
        variables
            .map(|(number, line)| match line.parse::<Self>() {
                Ok(variable) if !variable.name.contains(char::is_whitespace) => Ok(variable),
                _ => bad(format!(
                    "line {number} is not NAME=VALUE or NAME: \"{line}\""
                )),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused<T: FromStr<Err = BadValue> + std::fmt::Debug>(texts: &[&str]) {
        for text in texts {
            let result = text.parse::<T>();
            assert!(result.is_err(), "{text:?} was taken for {result:?}");
        }
    }

    #[test]
    fn sizes_take_dockers_units() {
        for (text, bytes) in [
            ("1", 1),
            ("512m", 512 << 20),
            ("1G", 1 << 30),
            ("64MiB", 64 << 20),
            ("1.5g", 3 << 29),
            ("10kb", 10240),
        ] {
            assert_eq!(text.parse::<Bytes>().map(|b| b.0), Ok(bytes), "{text}");
        }
        refused::<Bytes>(&[
            "",
            "m",
            "-1",
            "1x",
            "1e9",
            "18446744073709551616",
            "99999999999t",
            "1 g",
            ".5g",
        ]);
    }

    #[test]
    fn cpus_are_fractions_of_a_cpu() {
        for (text, milli) in [
            ("1", 1000),
            ("0.5", 500),
            (".25", 250),
            ("2.75", 2750),
            ("64", 64_000),
        ] {
            assert_eq!(text.parse::<MilliCpus>().map(|c| c.0), Ok(milli), "{text}");
        }
        refused::<MilliCpus>(&["", ".", "0", "0.001", "-1", "65", "1e3", "nan", "1.2.3"]);
    }

    #[test]
    fn volumes_are_two_absolute_paths_and_options() {
        let volume = "/a:/b:ro".parse::<Volume>().unwrap();
        assert_eq!(
            (
                volume.source.to_str(),
                volume.destination.to_str(),
                volume.read_only
            ),
            (Some("/a"), Some("/b"), true)
        );
        assert!(!"/a:/b".parse::<Volume>().unwrap().read_only);
        refused::<Volume>(&[
            "",
            "/a",
            "a:/b",
            "/a:b",
            "/a:/",
            "/a:/b/../..",
            "/a:/b:rx",
            "/a:/b:ro:z",
        ]);
    }

    #[test]
    fn tmpfs_options_are_checked() {
        let tmpfs = "/t:size=64m,exec,mode=1777".parse::<Tmpfs>().unwrap();
        assert_eq!(
            tmpfs.options,
            ["nosuid", "nodev", "size=64m", "exec", "mode=1777"]
        );
        assert_eq!(
            "/t".parse::<Tmpfs>().unwrap().options,
            ["noexec", "nosuid", "nodev"]
        );
        refused::<Tmpfs>(&[
            "",
            "t",
            "/",
            "/t:size=x",
            "/t:mode=9",
            "/t:bind",
            "/t:uid=root",
        ]);
    }

    #[test]
    fn limits_have_known_names_and_an_order() {
        let limit = "nofile=1024:2048".parse::<Ulimit>().unwrap();
        assert_eq!(
            (limit.name.as_str(), limit.soft, limit.hard),
            ("RLIMIT_NOFILE", 1024, 2048)
        );
        assert_eq!("core=-1".parse::<Ulimit>().unwrap().hard, u64::MAX);
        refused::<Ulimit>(&[
            "nofile",
            "files=1",
            "nofile=",
            "nofile=2:1",
            "nofile=x",
            "nofile=-2",
        ]);
    }

    #[test]
    fn environment_files_are_read_line_by_line() {
        let variables = EnvVar::parse_file("# comment\n\nA=1\n  B=x y=z \nC\n").unwrap();
        let of = |n: usize| (variables[n].name.as_str(), variables[n].value.as_deref());
        assert_eq!(
            (variables.len(), of(0), of(1), of(2)),
            (3, ("A", Some("1")), ("B", Some("x y=z ")), ("C", None))
        );
        assert!(
            EnvVar::parse_file("A=1\nB C=2\n")
                .unwrap_err()
                .to_string()
                .contains("line 2")
        );
        assert!(EnvVar::parse_file("=1").is_err());
        refused::<EnvVar>(&["", "=x", "a\0=x"]);
    }
}
