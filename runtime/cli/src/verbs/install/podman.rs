//! podman's containers.conf.d: a file of our own.

use std::path::Path;

use anyhow::Result;
use toml_edit::{Array, DocumentMut, Item, Table, value};

use super::RUNTIME;

/// The file.
pub fn add(_: &str, runtime: &Path) -> Result<Option<String>> {
    let mut paths = Array::new();
    paths.push(runtime.display().to_string());
    let mut runtimes = Table::new();
    runtimes.insert(RUNTIME, value(paths));
    let mut engine = Table::new();
    engine.set_implicit(true);
    engine.insert("runtimes", Item::Table(runtimes));
    let mut document = DocumentMut::new();
    document.insert("engine", Item::Table(engine));
    Ok(Some(document.to_string()))
}

/// None.
pub fn remove(_: &str) -> Result<Option<String>> {
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_names_the_runtime() {
        let text = add("", Path::new("/usr/bin/cloison-runtime")).unwrap();
        let expected = "[engine.runtimes]\ncloison = [\"/usr/bin/cloison-runtime\"]\n";
        assert_eq!(text.unwrap(), expected);
    }
}
