//! A container's `/etc/hosts`, `/etc/hostname` and `/etc/resolv.conf`: files of the host's in the sandbox's directory, which the container
//! has mounted and may change.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cloison_net::files::{self, ExtraHost};

use super::{NetworkOptions, Source};

/// What is in the files.
pub struct Etc {
    dir: PathBuf,
}

impl Etc {
    /// Writes the files into a directory of `sandbox`'s.
    ///
    /// # Errors
    /// When they cannot be written, or the host's own not be read.
    pub fn write(
        sandbox: &Path,
        hostname: &str,
        options: &NetworkOptions,
        source: &Source,
    ) -> Result<Self> {
        let dir = sandbox.join("etc");
        fs::create_dir(&dir)
            .with_context(|| format!("cannot create the directory {}", dir.display()))?;
        let mut extra = options.add_host.clone();
        let (mut addresses, mut gateway) = (Vec::new(), None);
        if let Source::Leased(_, lease) = source {
            addresses.extend(lease.addresses.all());
            gateway = Some(IpAddr::V4(lease.network.gateway()));
            // A policy does not let the container ask for them.
            let named = lease.names.iter().flat_map(|(name, addresses)| {
                addresses.iter().map(|address| ExtraHost {
                    name: name.clone(),
                    address: Some(*address),
                })
            });
            extra.extend(named);
        }
        // Of a namespace that somebody prepared nothing is known that would speak against it.
        let ipv6 = match source {
            Source::Leased(_, lease) => lease.addresses.ipv6.is_some(),
            Source::None | Source::Namespace(_) | Source::User(_) => true,
        };
        let host = files::host_resolv_conf(Path::new("/"))?;
        let etc = Self { dir };
        let texts = [
            files::hosts(hostname, addresses, &extra, gateway)?,
            files::hostname(hostname),
            files::resolv_conf(&host, &options.dns(), ipv6),
        ];
        for ((file, _), text) in etc.files().zip(texts) {
            fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        }
        Ok(etc)
    }

    /// Each file, and where the container has it.
    pub fn files(&self) -> impl Iterator<Item = (PathBuf, PathBuf)> {
        ["hosts", "hostname", "resolv.conf"]
            .into_iter()
            .map(|name| (self.dir.join(name), Path::new("/etc").join(name)))
    }
}
