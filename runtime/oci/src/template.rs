//! `spec`: a bundle's config.json to begin with.

use std::fs::File;
use std::io::Write;

use anyhow::{Context, Result};
use oci_spec::runtime::{RootBuilder, Spec};

use crate::args;
use crate::container::OCI_VERSION;

/// Writes a template.
pub fn spec(args: &args::Spec) -> Result<()> {
    let mut spec = Spec::default();
    spec.set_version(OCI_VERSION.into());
    let root = RootBuilder::default()
        .path("rootfs")
        .readonly(true)
        .build()?;
    spec.set_root(Some(root));
    if let Some(process) = spec.process_mut() {
        process.set_terminal(Some(true));
    }
    let path = args.bundle.join("config.json");
    let text = serde_json::to_vec_pretty(&spec)?;
    File::create_new(&path)
        .and_then(|mut file| file.write_all(&text))
        .with_context(|| format!("cannot write {}", path.display()))
}
