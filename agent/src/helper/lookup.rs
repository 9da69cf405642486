//! Finds the program a process shall execute, the way execvp(3) does, with an error that says which of "not there" and
//! "not executable" it is. Runs inside the container as the process's user, so mounts, symbolic links and permissions
//! are the real ones.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::stat::{SFlag, stat};
use nix::unistd::{AccessFlags, access};

use crate::report::{Failure, FailureKind};

/// Where programs are looked for when the environment has no PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The path to execute for `name`, given the process's environment; relative paths are relative to the working
/// directory of the caller.
pub fn program(name: &str, env: &[String]) -> Result<CString, Failure> {
    let found = if name.contains('/') {
        let path = PathBuf::from(name);
        usable(&path)
            .map(|()| path)
            .map_err(|errno| explain(name, errno))
    } else {
        search(name, path_of(env))
    }?;
    CString::new(found.as_os_str().as_bytes()).map_err(|_| explain(name, Errno::ENOENT))
}

/// Why executing `name` failed with `errno`.
pub fn explain(name: &str, errno: Errno) -> Failure {
    let kind = match errno {
        Errno::ENOENT | Errno::ENOTDIR => FailureKind::NotFound,
        _ => FailureKind::NotExecutable,
    };
    let why = match errno {
        // Callers look for the one or the other, by their age: execve(2) says the latter.
        Errno::EISDIR => "is a directory: permission denied".into(),
        errno => errno.desc().to_lowercase(),
    };
    Failure {
        kind,
        message: format!("exec: {name:?}: {why}"),
    }
}

fn path_of(env: &[String]) -> &str {
    // The last one counts, as in the array a shell or C library would search for a duplicate it set itself.
    let path = env
        .iter()
        .rev()
        .find_map(|entry| entry.strip_prefix("PATH="));
    path.unwrap_or(DEFAULT_PATH)
}

fn search(name: &str, path: &str) -> Result<PathBuf, Failure> {
    let mut refused = None;
    for directory in path.split(':') {
        let candidate = Path::new(if directory.is_empty() { "." } else { directory }).join(name);
        match usable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(errno) => refused = refused.or(Some(errno)),
        }
    }
    Err(match refused {
        Some(errno) => explain(name, errno),
        None => Failure {
            kind: FailureKind::NotFound,
            message: format!("exec: {name:?}: executable file not found in $PATH"),
        },
    })
}

fn usable(path: &Path) -> Result<(), Errno> {
    let kind = SFlag::from_bits_truncate(stat(path)?.st_mode) & SFlag::S_IFMT;
    if kind == SFlag::S_IFDIR {
        return Err(Errno::EISDIR);
    }
    access(path, AccessFlags::X_OK)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn tree() -> tempfile::TempDir {
        let tree = tempfile::tempdir().unwrap();
        let make = |path: &str, mode| {
            let path = tree.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "#!/bin/sh\n").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        };
        make("a/tool", 0o644);
        make("b/tool", 0o755);
        make("a/data", 0o644);
        fs::create_dir(tree.path().join("a/folder")).unwrap();
        symlink("../b/tool", tree.path().join("a/link")).unwrap();
        symlink("nowhere", tree.path().join("a/dangling")).unwrap();
        tree
    }

    fn env(tree: &Path, path: &str) -> Vec<String> {
        let path = path.replace('@', tree.to_str().unwrap());
        vec!["X=1".into(), format!("PATH={path}")]
    }

    #[track_caller]
    fn fails(result: Result<CString, Failure>, kind: FailureKind, text: &str) {
        let failure = result.unwrap_err();
        assert_eq!(failure.kind, kind, "{}", failure.message);
        assert!(failure.message.contains(text), "{}", failure.message);
    }

    #[test]
    fn a_program_is_found_behind_one_that_cannot_be_executed() {
        let tree = tree();
        let found = program("tool", &env(tree.path(), "@/none:@/a:@/b")).unwrap();
        assert!(found.to_str().unwrap().ends_with("/b/tool"));
    }

    #[test]
    fn symbolic_links_are_followed() {
        let tree = tree();
        assert!(program("link", &env(tree.path(), "@/a")).is_ok());
        let absolute = tree.path().join("a/link");
        assert!(program(absolute.to_str().unwrap(), &[]).is_ok());
    }

    #[test]
    fn a_program_that_is_nowhere_is_not_found() {
        let tree = tree();
        let env = env(tree.path(), "@/a:@/b");
        fails(
            program("nope", &env),
            FailureKind::NotFound,
            "executable file not found in $PATH",
        );
        fails(
            program("dangling", &env),
            FailureKind::NotFound,
            "not found in $PATH",
        );
        fails(
            program("/no/such/file", &env),
            FailureKind::NotFound,
            "no such file",
        );
        let below_a_file = tree.path().join("a/data/x");
        fails(
            program(below_a_file.to_str().unwrap(), &env),
            FailureKind::NotFound,
            "not a directory",
        );
    }

    #[test]
    fn a_file_without_execute_permission_or_a_directory_is_not_executable() {
        let tree = tree();
        let env = env(tree.path(), "@/a");
        fails(
            program("data", &env),
            FailureKind::NotExecutable,
            "permission denied",
        );
        fails(
            program("folder", &env),
            FailureKind::NotExecutable,
            "is a directory",
        );
        let file = tree.path().join("a/data");
        fails(
            program(file.to_str().unwrap(), &env),
            FailureKind::NotExecutable,
            "permission denied",
        );
    }

    #[test]
    fn without_path_the_usual_directories_are_searched() {
        assert!(program("sh", &[]).is_ok());
        assert_eq!(path_of(&["PATH=/x".into(), "PATH=/y".into()]), "/y");
        fails(
            program("sh", &["PATH=".into()]),
            FailureKind::NotFound,
            "not found",
        );
    }
}
