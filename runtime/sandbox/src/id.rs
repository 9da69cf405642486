//! Identifiers that have been checked: once one exists, it is safe to use as a file name, in a command line and in a message.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a string is no ID or name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "\"{given}\" is not a valid container name: it must be 1 to {max} characters long, start with a letter or a digit, and go on with \
     letters, digits, \"_\", \".\" or \"-\""
)]
pub struct InvalidName {
    given: String,
    max: usize,
}

/// Longest name or ID, bytes.
const MAX_LENGTH: usize = 128;

fn check(text: &str) -> Result<(), InvalidName> {
    let mut bytes = text.bytes();
    let starts_well = bytes.next().is_some_and(|b| b.is_ascii_alphanumeric());
    let goes_on_well = bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
    if starts_well && goes_on_well && text.len() <= MAX_LENGTH {
        Ok(())
    } else {
        Err(InvalidName {
            given: text.chars().take(MAX_LENGTH).collect(),
            max: MAX_LENGTH,
        })
    }
}

macro_rules! checked_string {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The text itself.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidName;
            fn from_str(text: &str) -> Result<Self, InvalidName> {
                check(text).map(|()| Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidName;
            fn try_from(text: String) -> Result<Self, InvalidName> {
                check(&text).map(|()| Self(text))
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

checked_string!(
    /// A sandbox's or container's ID.
    Id
);
checked_string!(
    /// A container's name, as people give it.
    Name
);

impl Id {
    /// Characters of an ID that people are shown.
    pub const SHORT: usize = 12;

    /// A fresh ID: 64 hexadecimal digits from the kernel's random source.
    ///
    /// # Errors
    /// When `/dev/urandom` cannot be read.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0u8; 32];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        Ok(Self(bytes.iter().map(|b| format!("{b:02x}")).collect()))
    }

    /// The first [`Id::SHORT`] characters.
    pub fn short(&self) -> &str {
        &self.0[..self.0.len().min(Self::SHORT)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_leave_a_directory_or_look_like_an_option_is_no_name() {
        let long = "x".repeat(MAX_LENGTH + 1);
        for bad in [
            "", ".", "..", "-x", "a/b", "/a", "a b", "ä", "a\n", "a\0", &long,
        ] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?} was accepted");
            assert!(bad.parse::<Id>().is_err(), "{bad:?} was accepted");
        }
        for good in ["a", "0", "web-1", "my_db.2", &"x".repeat(MAX_LENGTH)] {
            assert_eq!(good.parse::<Name>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn a_bad_name_in_a_file_is_an_error_not_a_name() {
        assert!(serde_json::from_str::<Id>("\"../etc\"").is_err());
    }

    #[test]
    fn random_ids_differ_and_are_valid() {
        let (a, b) = (Id::random().unwrap(), Id::random().unwrap());
        assert_ne!(a, b);
        assert_eq!(a.as_str().len(), 64);
        assert_eq!(a.as_str().parse::<Id>().unwrap(), a);
        assert_eq!(a.short().len(), 12);
    }
}
