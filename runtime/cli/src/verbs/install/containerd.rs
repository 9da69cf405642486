//! containerd's config.toml: a runtime of the CRI plugin, by containerd's own shim for runc. Comments and layout of the file stay.

use std::path::Path;

use anyhow::{Context, Result, bail};
use toml_edit::{DocumentMut, Item, Table, TableLike, value};

use super::RUNTIME;

/// containerd's shim for programs with runc's command line.
const SHIM: &str = "io.containerd.runc.v2";

/// The tables between the root and the runtimes, by the version of the file (containerd 1.3 to 1.7, and 2).
fn path(version: i64) -> Result<&'static [&'static str]> {
    match version {
        2 => Ok(&[
            "plugins",
            "io.containerd.grpc.v1.cri",
            "containerd",
            "runtimes",
        ]),
        3 => Ok(&[
            "plugins",
            "io.containerd.cri.v1.runtime",
            "containerd",
            "runtimes",
        ]),
        other => bail!("its version is {other}: containerd's configuration has version 2 or 3"),
    }
}

/// The file with the runtime.
pub fn add(text: &str, runtime: &Path) -> Result<Option<String>> {
    let mut document = parse(text)?;
    if text.trim().is_empty() {
        document.insert("version", value(2));
    }
    let mut table: &mut dyn TableLike = document.as_table_mut();
    for name in path(version(table)?)? {
        table = table
            .entry(name)
            .or_insert_with(|| {
                let mut implicit = Table::new();
                implicit.set_implicit(true);
                Item::Table(implicit)
            })
            .as_table_like_mut()
            .with_context(|| format!("\"{name}\" is not a table"))?;
    }
    let mut options = Table::new();
    options.insert("BinaryName", value(runtime.display().to_string()));
    let mut entry = Table::new();
    entry.insert("runtime_type", value(SHIM));
    entry.insert("options", Item::Table(options));
    let entry = Item::Table(entry);
    if table.get(RUNTIME).is_some_and(|there| same(there, &entry)) {
        return Ok(Some(text.to_owned()));
    }
    table.insert(RUNTIME, entry);
    Ok(Some(document.to_string()))
}

/// Whether two entries say the same, however they are laid out.
fn same(there: &Item, ours: &Item) -> bool {
    let text = |item: &Item, name: &str| item.get(name).and_then(Item::as_str).map(str::to_owned);
    let binary = |item: &Item| item.get("options").and_then(|o| text(o, "BinaryName"));
    text(there, "runtime_type") == text(ours, "runtime_type") && binary(there) == binary(ours)
}

/// The file without it; none when nothing is left but its version.
pub fn remove(text: &str) -> Result<Option<String>> {
    if text.is_empty() {
        return Ok(None);
    }
    let mut document = parse(text)?;
    let mut table: &mut dyn TableLike = document.as_table_mut();
    for name in path(version(table)?)? {
        match table.get_mut(name).and_then(Item::as_table_like_mut) {
            Some(inner) => table = inner,
            None => return Ok(Some(text.to_owned())),
        }
    }
    if table.remove(RUNTIME).is_none() {
        return Ok(Some(text.to_owned()));
    }
    let left = document.to_string();
    match left.trim() == "version = 2" {
        true => Ok(None),
        false => Ok(Some(left)),
    }
}

fn parse(text: &str) -> Result<DocumentMut> {
    text.parse().context("it is not TOML")
}

fn version(table: &dyn TableLike) -> Result<i64> {
    match table.get("version") {
        // A file that says nothing is of version 1, which containerd 2 does not know any more.
        None => bail!("it names no version: begin it with \"version = 2\""),
        Some(version) => version.as_integer().context("its version is not a number"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn added(text: &str) -> String {
        add(text, Path::new("/usr/bin/cloison-runtime"))
            .unwrap()
            .unwrap()
    }

    #[test]
    fn comments_and_other_runtimes_stay() {
        let before = "# mine\nversion = 2\n\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\" # usual\n";
        let after = added(before);
        assert!(
            after.starts_with("# mine\n") && after.contains("# usual"),
            "{after}"
        );
        assert!(
            after.contains("runtimes.cloison]\nruntime_type = \"io.containerd.runc.v2\""),
            "{after}"
        );
        assert!(
            after.contains("BinaryName = \"/usr/bin/cloison-runtime\""),
            "{after}"
        );
        assert_eq!(added(&after), after);
        assert_eq!(remove(&after).unwrap().unwrap(), before);
    }

    #[test]
    fn an_empty_file_gets_a_version_and_goes_again() {
        let after = added("");
        assert!(after.starts_with("version = 2\n"), "{after}");
        assert_eq!(remove(&after).unwrap(), None);
    }

    #[test]
    fn containerd_2_has_another_place_for_runtimes() {
        let after = added("version = 3\n");
        assert!(
            after
                .contains("[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.cloison]"),
            "{after}"
        );
    }

    #[test]
    fn what_is_no_configuration_is_left_alone() {
        for text in [
            "version = 1\n",
            "root = \"/x\"\n",
            "version = \"2\"\n",
            "[",
            "version = 2\nplugins = 3\n",
        ] {
            assert!(add(text, Path::new("/r")).is_err(), "{text}");
        }
    }
}
