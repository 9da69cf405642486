//! The names containers and execs go by. A value of these types is safe as one component of a path and short enough for
//! a socket's address below `dirs::STATE`; nothing else in the agent checks an ID.

use std::fmt;

/// Longest ID, bytes: containerd's limit. A Unix socket below the container's state directory must fit in
/// `sockaddr_un` (108 bytes) with it.
pub const MAX_ID_LEN: usize = 76;

/// Why a string is no ID.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    #[error("it is empty")]
    Empty,
    #[error("it has {0} bytes, at most {MAX_ID_LEN} are allowed")]
    TooLong(usize),
    #[error("only letters, digits and _ + - . are allowed, not {0:?}")]
    Character(char),
    #[error("it names a directory")]
    Dots,
}

fn check(text: &str) -> Result<(), IdError> {
    if text.is_empty() {
        return Err(IdError::Empty);
    }
    if text.len() > MAX_ID_LEN {
        return Err(IdError::TooLong(text.len()));
    }
    if text == "." || text == ".." {
        return Err(IdError::Dots);
    }
    match text
        .chars()
        .find(|c| !c.is_ascii_alphanumeric() && !"_+-.".contains(*c))
    {
        Some(c) => Err(IdError::Character(c)),
        None => Ok(()),
    }
}

/// A container's ID.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ContainerId(String);

impl ContainerId {
    pub fn parse(text: &str) -> Result<Self, IdError> {
        check(text).map(|()| Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Which process of a container: its init, or the one an exec started.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ProcessId {
    Init,
    Exec(ExecId),
}

impl ProcessId {
    /// The empty string names the container's init.
    pub fn parse(text: &str) -> Result<Self, IdError> {
        if text.is_empty() {
            return Ok(Self::Init);
        }
        ExecId::parse(text).map(Self::Exec)
    }
}

/// An exec's ID, unique within its container.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ExecId(String);

impl ExecId {
    pub fn parse(text: &str) -> Result<Self, IdError> {
        check(text).map(|()| Self(text.to_owned()))
    }
}

impl fmt::Display for ExecId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_as_docker_podman_and_containerd_make_them_are_accepted() {
        for id in [
            "a",
            "web-1",
            "a.b_c+d",
            &"f".repeat(64),
            &"x".repeat(MAX_ID_LEN),
        ] {
            assert!(ContainerId::parse(id).is_ok(), "{id}");
        }
    }

    #[test]
    fn an_id_that_could_leave_its_directory_is_refused() {
        assert_eq!(ContainerId::parse(""), Err(IdError::Empty));
        assert_eq!(ContainerId::parse("."), Err(IdError::Dots));
        assert_eq!(ContainerId::parse(".."), Err(IdError::Dots));
        assert_eq!(ContainerId::parse("../x"), Err(IdError::Character('/')));
        assert_eq!(ContainerId::parse("a\0"), Err(IdError::Character('\0')));
        assert_eq!(ContainerId::parse("a b"), Err(IdError::Character(' ')));
        assert_eq!(ContainerId::parse("é"), Err(IdError::Character('é')));
    }

    #[test]
    fn an_id_too_long_for_a_socket_address_is_refused() {
        let long = "x".repeat(MAX_ID_LEN + 1);
        assert_eq!(
            ContainerId::parse(&long),
            Err(IdError::TooLong(MAX_ID_LEN + 1))
        );
        let longest = format!(
            "{}/{}/notify.sock",
            crate::dirs::STATE,
            "x".repeat(MAX_ID_LEN)
        );
        assert!(longest.len() < 108, "{}", longest.len());
    }

    #[test]
    fn the_empty_exec_id_names_the_init() {
        assert_eq!(ProcessId::parse(""), Ok(ProcessId::Init));
        assert!(matches!(ProcessId::parse("e1"), Ok(ProcessId::Exec(_))));
        assert_eq!(ProcessId::parse("a/b"), Err(IdError::Character('/')));
    }
}
