//! Descriptors that a process has beside stdio, as the host asks for them. They are checked here, before anything is made.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

use cloison_agent_api::agent::{self as api, descriptor::What};
use cloison_agent_api::{DEVICES, MAX_PRESERVED, SHARED_DIR};
use nix::fcntl::OFlag;
use nix::unistd::{Whence, lseek};

use crate::error::{Error, Result};

/// The number of the first.
pub const FIRST: RawFd = 3;

/// What a process is to have at one number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Descriptor {
    /// A pipe to read from, filled from this port of the host.
    Input(u32),
    /// A pipe to write to, carried to this port.
    Output(u32),
    /// A socket, connected with this port.
    Socket(u32),
    Opened(Opened),
}

/// A file that the process has open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opened {
    path: PathBuf,
    read: bool,
    write: bool,
    append: bool,
    offset: i64,
}

fn invalid(why: impl Into<String>) -> Error {
    Error::Invalid {
        what: "preserved descriptors",
        why: why.into(),
    }
}

/// Reads the descriptors of a process.
pub fn read(wanted: &[api::Descriptor]) -> Result<Vec<Descriptor>> {
    if wanted.len() > MAX_PRESERVED {
        let why = format!("{} of them, more than {MAX_PRESERVED}", wanted.len());
        return Err(invalid(why));
    }
    let numbered = wanted.iter().zip(FIRST..);
    let read = numbered.map(|(wanted, number)| match &wanted.what {
        Some(What::Input(0) | What::Output(0) | What::Socket(0)) => {
            Err(invalid(format!("{number} has no port of the host")))
        }
        Some(What::Input(port)) => Ok(Descriptor::Input(*port)),
        Some(What::Output(port)) => Ok(Descriptor::Output(*port)),
        Some(What::Socket(port)) => Ok(Descriptor::Socket(*port)),
        Some(What::File(file)) => Opened::read(number, file).map(Descriptor::Opened),
        _ => Err(invalid(format!("{number} is nothing that is known here"))),
    });
    read.collect()
}

impl Opened {
    fn read(number: RawFd, file: &api::File) -> Result<Self> {
        let path = Path::new(&file.path);
        if !is_shared(path) && DEVICES.iter().all(|(device, _)| *device != file.path) {
            let why = format!("{number} is {path:?}, which is not the host's to give");
            return Err(invalid(why));
        }
        if !file.read && !file.write {
            return Err(invalid(format!(
                "{number} is to be neither read nor written"
            )));
        }
        let offset = i64::try_from(file.offset)
            .map_err(|_| invalid(format!("{number} begins beyond the end of any file")))?;
        Ok(Self {
            path: path.to_owned(),
            read: file.read,
            write: file.write,
            append: file.append,
            offset,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens it.
    pub fn open(&self) -> io::Result<OwnedFd> {
        let mut flags = OFlag::O_NOFOLLOW | OFlag::O_NOCTTY;
        if self.append {
            flags |= OFlag::O_APPEND;
        }
        let file: File = OpenOptions::new()
            .read(self.read)
            .write(self.write)
            .custom_flags(flags.bits())
            .open(&self.path)?;
        if self.offset != 0 {
            lseek(&file, self.offset, Whence::SeekSet)?;
        }
        Ok(file.into())
    }
}

/// Whether a path is below the shared directory, and says so by itself.
fn is_shared(path: &Path) -> bool {
    let below = path.strip_prefix(SHARED_DIR);
    below.is_ok_and(|below| {
        let mut components = below.components().peekable();
        components.peek().is_some() && components.all(|c| matches!(c, Component::Normal(_)))
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn descriptor(what: What) -> api::Descriptor {
        api::Descriptor {
            what: Some(what),
            ..Default::default()
        }
    }

    fn file(path: &str) -> api::File {
        api::File {
            path: path.into(),
            read: true,
            ..Default::default()
        }
    }

    #[track_caller]
    fn refused(wanted: &[api::Descriptor], text: &str) {
        let error = read(wanted).unwrap_err().to_string();
        assert!(error.contains(text), "{error:?} lacks {text:?}");
    }

    #[test]
    fn descriptors_are_read_in_their_order() {
        let wanted = [
            descriptor(What::Output(7)),
            descriptor(What::Socket(8)),
            descriptor(What::Input(9)),
            descriptor(What::File(file("/dev/null"))),
            descriptor(What::File(file(&format!("{SHARED_DIR}/one/mounts/0")))),
        ];
        let read = read(&wanted).unwrap();
        assert_eq!(
            read[..3],
            [
                Descriptor::Output(7),
                Descriptor::Socket(8),
                Descriptor::Input(9)
            ]
        );
        assert!(
            matches!(&read[3], Descriptor::Opened(null) if null.path() == Path::new("/dev/null"))
        );
        assert_eq!(read.len(), 5);
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_number() {
        refused(&[api::Descriptor::default()], "3 is nothing");
        let good = descriptor(What::Input(9));
        refused(
            &[good.clone(), descriptor(What::Socket(0))],
            "4 has no port",
        );
        refused(&[descriptor(What::Output(0))], "3 has no port");
        refused(&vec![good; MAX_PRESERVED + 1], "65 of them");
        let neither = api::File {
            read: false,
            ..file("/dev/null")
        };
        refused(&[descriptor(What::File(neither))], "3 is to be neither");
        let far = api::File {
            offset: u64::MAX,
            ..file("/dev/null")
        };
        refused(&[descriptor(What::File(far))], "3 begins beyond");
    }

    #[test]
    fn only_what_is_shared_and_some_devices_can_be_opened() {
        for path in [
            "",
            "/",
            "/dev/kmsg",
            "/dev/null/",
            "/etc/passwd",
            SHARED_DIR,
            "/run/cloison/shared/",
            "/run/cloison/shared/../state",
            "/run/cloison/shared/./../state",
            "/run/cloison/sharedother",
            "run/cloison/shared/one",
        ] {
            let wanted = [descriptor(What::File(file(path)))];
            assert!(read(&wanted).is_err(), "{path}");
        }
    }

    #[test]
    fn a_file_is_opened_as_asked_for() {
        let mut there = tempfile::NamedTempFile::new().unwrap();
        there.write_all(b"0123456789").unwrap();
        let opened = |write, append, offset| Opened {
            path: there.path().to_owned(),
            read: true,
            write,
            append,
            offset,
        };
        let mut text = String::new();
        let mut file = File::from(opened(false, false, 4).open().unwrap());
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "456789");
        assert!(file.write_all(b"x").is_err());
        let mut file = File::from(opened(true, true, 0).open().unwrap());
        file.write_all(b"end").unwrap();
        let text = std::fs::read_to_string(there.path()).unwrap();
        assert_eq!(text, "0123456789end");
    }
}
