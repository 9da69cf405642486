//! Image references: the text by which a person names an image. Parsing looks at the text alone, never at the file system,
//! so that one text means one thing everywhere.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::Error;

/// Where an image is to be found.
///
/// | text | meaning |
/// |---|---|
/// | `oci:DIR[:TAG]` | an OCI image layout; TAG is an `org.opencontainers.image.ref.name` in its index |
/// | `docker-archive:FILE[:REF]` | what `docker save` writes; REF is one of its repository tags |
/// | `rootfs:DIR` | a directory that is a root filesystem already |
/// | `[HOST/]NAME[:TAG][@DIGEST]` | an image in a registry |
///
/// DIR and FILE of the first two end at their first colon; a path that contains one can be given to the variant but not in
/// text. After `rootfs:` all is path. A text is never longer than [`Reference::MAX_LEN`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Reference {
    /// `oci:DIR[:TAG]`
    OciLayout {
        /// The directory with `oci-layout`, `index.json` and `blobs`.
        dir: PathBuf,
        /// Which of its images; needed when there are several.
        tag: Option<String>,
    },
    /// `docker-archive:FILE[:REF]`
    DockerArchive {
        /// The tar archive, possibly compressed with gzip or zstd.
        file: PathBuf,
        /// Which of its images, as `name[:tag]`; needed when there are several.
        reference: Option<String>,
    },
    /// `rootfs:DIR`
    RootfsDir(PathBuf),
    /// Anything shaped like a name in a registry.
    Registry(String),
}

impl Reference {
    /// Longest reference accepted, bytes: a path and a tag.
    pub const MAX_LEN: usize = 8192;
}

const OCI: &str = "oci";
const DOCKER_ARCHIVE: &str = "docker-archive";
const ROOTFS: &str = "rootfs";

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Reference, Error> {
        let invalid = |reason: &str| Error::InvalidReference {
            reference: text.chars().take(200).collect(),
            reason: reason.to_owned(),
        };
        if text.is_empty() {
            return Err(invalid("it is empty"));
        }
        if text.len() > Reference::MAX_LEN {
            return Err(invalid("it is too long"));
        }
        if text.contains('\0') {
            return Err(invalid("it contains a NUL character"));
        }
        match text.split_once(':') {
            Some((OCI, rest)) => {
                let (dir, tag) = path_and_name(rest).map_err(invalid)?;
                Ok(Reference::OciLayout { dir, tag })
            }
            Some((DOCKER_ARCHIVE, rest)) => {
                let (file, reference) = path_and_name(rest).map_err(invalid)?;
                Ok(Reference::DockerArchive { file, reference })
            }
            Some((ROOTFS, "")) => Err(invalid("a directory is missing after rootfs:")),
            Some((ROOTFS, dir)) => Ok(Reference::RootfsDir(dir.into())),
            _ => registry_name(text)
                .map(|()| Reference::Registry(text.to_owned()))
                .map_err(invalid),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (transport, path, name) = match self {
            Reference::OciLayout { dir, tag } => (OCI, dir, tag),
            Reference::DockerArchive { file, reference } => (DOCKER_ARCHIVE, file, reference),
            Reference::RootfsDir(dir) => (ROOTFS, dir, &None),
            Reference::Registry(name) => return f.write_str(name),
        };
        write!(f, "{transport}:{}", path.display())?;
        match name {
            Some(name) => write!(f, ":{name}"),
            None => Ok(()),
        }
    }
}

fn path_and_name(rest: &str) -> Result<(PathBuf, Option<String>), &'static str> {
    let (path, name) = match rest.split_once(':') {
        Some((path, name)) => (path, Some(name)),
        None => (rest, None),
    };
    if path.is_empty() {
        return Err("a path is missing after the first colon");
    }
    if name == Some("") {
        return Err("nothing follows the last colon");
    }
    Ok((path.into(), name.map(str::to_owned)))
}

/// Whether a text has the shape of a name in a registry (distribution-spec "Pulling manifests"; the host is what stands
/// before the first slash if it has a dot or a port or is `localhost`).
fn registry_name(text: &str) -> Result<(), &'static str> {
    if text.contains("://") {
        return Err("a reference is not a URL");
    }
    if text.starts_with(['/', '.']) {
        return Err(
            "it looks like a path, and a path needs oci:, docker-archive: or rootfs: in front of it",
        );
    }
    let (name, digest) = match text.split_once('@') {
        Some((name, digest)) => (name, Some(digest)),
        None => (text, None),
    };
    if digest.is_some_and(|d| d.parse::<crate::Digest>().is_err()) {
        return Err("what follows the @ is not a digest");
    }
    let (host, rest) = match name.split_once('/') {
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => {
            (Some(first), rest)
        }
        _ => (None, name),
    };
    if host.is_some_and(|h| !is_host(h)) {
        return Err("the part before the first slash is not a host name with an optional port");
    }
    let (repository, tag) = match rest.split_once(':') {
        Some((repository, tag)) => (repository, Some(tag)),
        None => (rest, None),
    };
    if !repository.split('/').all(is_component) {
        return Err(
            "an image name is made of lower-case letters, digits and single . _ - between them",
        );
    }
    if tag.is_some_and(|t| !is_tag(t)) {
        return Err(
            "a tag is at most 128 letters, digits and . _ -, and does not begin with . or -",
        );
    }
    Ok(())
}

fn is_host(text: &str) -> bool {
    let (name, port) = match text.split_once(':') {
        Some((name, port)) => (name, Some(port)),
        None => (text, None),
    };
    let label = |l: &str| {
        !l.is_empty()
            && !l.starts_with('-')
            && !l.ends_with('-')
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    name.split('.').all(label) && port.is_none_or(|p| p.parse::<u16>().is_ok())
}

fn is_component(text: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let mut separator = String::new();
    for c in text.chars() {
        match c {
            'a'..='z' | '0'..='9' => separator.clear(),
            '.' | '_' | '-' => separator.push(c),
            _ => return false,
        }
        let joins = matches!(separator.as_str(), "" | "." | "_" | "__")
            || separator.bytes().all(|b| b == b'-');
        if !joins {
            return false;
        }
    }
    text.bytes().next().is_some_and(alphanumeric) && separator.is_empty()
}

fn is_tag(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    text.len() <= 128
        && text.bytes().next().is_some_and(word)
        && text.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Reference {
        text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
    }

    #[test]
    fn each_transport_has_its_form() {
        assert_eq!(
            parse("oci:/a/b"),
            Reference::OciLayout {
                dir: "/a/b".into(),
                tag: None
            }
        );
        assert_eq!(
            parse("oci:b:v1"),
            Reference::OciLayout {
                dir: "b".into(),
                tag: Some("v1".into())
            }
        );
        assert_eq!(
            parse("oci:b:docker.io/library/busybox:latest"),
            Reference::OciLayout {
                dir: "b".into(),
                tag: Some("docker.io/library/busybox:latest".into())
            }
        );
        assert_eq!(
            parse("docker-archive:f.tar:busybox:1"),
            Reference::DockerArchive {
                file: "f.tar".into(),
                reference: Some("busybox:1".into())
            }
        );
        assert_eq!(
            parse("rootfs:/with:colon"),
            Reference::RootfsDir("/with:colon".into())
        );
    }

    #[test]
    fn names_in_registries_are_recognized() {
        let pinned = format!("quay.io/a/b@sha256:{}", "0".repeat(64));
        for text in [
            "busybox",
            "busybox:1.36",
            "library/busybox",
            "localhost:5000/a/b:t",
            "a__b/c--d.e",
            "OCI.example/x",
            &pinned,
        ] {
            assert_eq!(parse(text), Reference::Registry(text.into()));
        }
    }

    #[test]
    fn what_names_nothing_is_refused_with_the_text_and_a_reason() {
        let bad = [
            "",
            "oci:",
            "oci::tag",
            "oci:dir:",
            "docker-archive:",
            "rootfs:",
            "/srv/image",
            "./image",
            "../image",
            "Busybox",
            "busybox:",
            "busybox:-x",
            "busybox:a b",
            "a//b",
            "a/",
            "-a",
            "a.",
            "a..b",
            "a___b",
            "docker://busybox",
            "bad_host.io/x",
            "host:99999/x",
            "x@sha256:12",
            "a\0b",
            "oci:a\0b",
        ];
        for text in bad {
            let error = text.parse::<Reference>().expect_err(text).to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
        assert!(
            "a".repeat(Reference::MAX_LEN + 1)
                .parse::<Reference>()
                .is_err()
        );
    }

    proptest! {
        #[test]
        fn any_text_parses_or_is_refused_without_a_panic(text in any::<String>()) {
            let _ = text.parse::<Reference>();
        }

        #[test]
        fn what_parses_is_shown_as_it_was_written(
            text in "(oci|docker-archive|rootfs):[a-zA-Z0-9/._-]{1,40}(:[a-zA-Z0-9/._:-]{1,40})?|[a-z0-9./:_-]{1,40}"
        ) {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(reference.to_string(), text);
            }
        }

        #[test]
        fn layouts_come_back_from_their_text(dir in "[^:\0]{1,60}", tag in proptest::option::of("[^\0]{1,60}")) {
            let reference = Reference::OciLayout { dir: dir.into(), tag };
            prop_assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
        }

        #[test]
        fn directories_come_back_from_their_text(dir in "[^\0]{1,60}") {
            let reference = Reference::RootfsDir(dir.into());
            prop_assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
        }
    }
}
