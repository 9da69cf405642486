//! Descriptors that a process in a guest is to have beside stdio, because its caller has handed them on. A pipe, a socket or a terminal
//! becomes a stream to the VM, as stdio does; a file or a directory is shown to the guest, which opens it once more. Anything else
//! is an object of the host's kernel with which nothing in a VM can do what it is for, and is refused with the reason.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use cloison_agent_api::DEVICES;
use cloison_agent_api::agent as api;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{SockType, SockaddrStorage, getpeername, getsockopt, sockopt};
use nix::sys::stat::{FileStat, SFlag, fstat, major, minor};
use nix::sys::statfs::{FsType, fstatfs};
use nix::unistd::{Whence, isatty, lseek};

use crate::{BindOptions, Error, HostStream, Source};

/// Major number of the devices that are the kernel's memory, /dev/null for one, and what opens a new terminal's master
/// (Documentation/admin-guide/devices.txt).
const MEMORY: u64 = 1;
const MASTERS: (u64, u64) = (5, 2);

/// The file system whose files are namespaces (NSFS_MAGIC of linux/magic.h).
const NAMESPACES: FsType = FsType(0x6e73_6673);

/// A descriptor that can be handed on.
#[derive(Debug)]
pub struct Preserved {
    number: RawFd,
    what: What,
}

#[derive(Debug)]
enum What {
    Input(OwnedFd),
    Output(OwnedFd),
    Both(HostStream),
    File(Source, Opened),
    Device(&'static str, Opened),
}

/// How a file is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Opened {
    read: bool,
    write: bool,
    append: bool,
    offset: u64,
}

/// A descriptor as a process in a guest gets it.
#[derive(Debug)]
pub enum Descriptor {
    /// The process reads.
    Input(HostStream),
    /// The process writes.
    Output(HostStream),
    /// It does both.
    Both(HostStream),
    /// The guest has it.
    File(api::File),
}

impl Preserved {
    /// Finds out what a caller's descriptor is, of which it knows the number.
    ///
    /// # Errors
    /// When it cannot be handed on, with the reason.
    pub fn new(number: RawFd, fd: OwnedFd) -> Result<Self, Error> {
        let failed = || Error::system("find out what a preserved descriptor is");
        let flags = fcntl(&fd, FcntlArg::F_GETFL).map_err(|errno| failed()(errno.into()))?;
        let flags = OFlag::from_bits_retain(flags);
        let stat = fstat(&fd).map_err(|errno| failed()(errno.into()))?;
        let found = match SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT {
            _ if flags.contains(OFlag::O_PATH) => Err(Refusal(
                "a mere place in a file system (O_PATH)".into(),
                "there is nothing in it that could be read or written",
            )),
            SFlag::S_IFIFO => pipe(fd, flags),
            SFlag::S_IFSOCK => socket(fd),
            SFlag::S_IFREG => file(fd, flags, false),
            SFlag::S_IFDIR => file(fd, flags, true),
            SFlag::S_IFCHR => character_device(fd, flags, &stat),
            SFlag::S_IFBLK => Err(Refusal(
                format!("the device {}", name(&fd)),
                "it is the host's and not in the guest",
            )),
            _ => Err(Refusal(
                name(&fd),
                "it is part of the host's kernel, which is not the guest's",
            )),
        };
        match found {
            Ok(what) => Ok(Self { number, what }),
            Err(Refusal(what, why)) => Err(Error::Descriptor { number, what, why }),
        }
    }

    /// Prepares it for a process. `show` shows the guest a file, and says where the guest finds it.
    ///
    /// # Errors
    /// When it cannot be used, or shown.
    pub fn prepare(
        self,
        show: impl FnOnce(Source) -> Result<PathBuf, Error>,
    ) -> Result<Descriptor, Error> {
        let failed = |source| Error::PreserveDescriptor {
            number: self.number,
            source: Box::new(source),
        };
        let prepared = match self.what {
            What::Input(fd) => HostStream::input(fd.as_fd()).map(Descriptor::Input),
            What::Output(fd) => HostStream::output(fd.as_fd()).map(Descriptor::Output),
            What::Both(stream) => Ok(Descriptor::Both(stream)),
            What::File(source, opened) => {
                show(source).map(|path| opened.at(&path.to_string_lossy()))
            }
            What::Device(path, opened) => Ok(opened.at(path)),
        };
        prepared.map_err(failed)
    }
}

impl Opened {
    fn new(flags: OFlag, offset: u64) -> Self {
        let access = flags & OFlag::O_ACCMODE;
        Self {
            read: access != OFlag::O_WRONLY,
            write: access != OFlag::O_RDONLY,
            append: flags.contains(OFlag::O_APPEND),
            offset,
        }
    }

    fn at(self, path: &str) -> Descriptor {
        Descriptor::File(api::File {
            path: path.into(),
            read: self.read,
            write: self.write,
            append: self.append,
            offset: self.offset,
            ..Default::default()
        })
    }
}

/// What a descriptor is, and why that cannot be handed on.
struct Refusal(String, &'static str);

impl Refusal {
    /// The system does not say what is to be known.
    fn unknown(fd: &OwnedFd) -> Self {
        Self(name(fd), "it cannot be examined")
    }
}

fn pipe(fd: OwnedFd, flags: OFlag) -> Result<What, Refusal> {
    match flags & OFlag::O_ACCMODE {
        OFlag::O_RDONLY => Ok(What::Input(fd)),
        OFlag::O_WRONLY => Ok(What::Output(fd)),
        _ => Err(Refusal(
            "a FIFO that is open for reading and writing".into(),
            "what is read ahead for a VM would be missing for others that read: open it for one of the two",
        )),
    }
}

fn socket(fd: OwnedFd) -> Result<What, Refusal> {
    let unknown = |_| Refusal::unknown(&fd);
    if getsockopt(&fd, sockopt::SockType).map_err(unknown)? != SockType::Stream {
        return Err(Refusal(
            "a socket for datagrams".into(),
            "only streams are carried into a VM",
        ));
    }
    if getsockopt(&fd, sockopt::AcceptConn).map_err(unknown)? {
        return Err(Refusal(
            "a socket that listens".into(),
            "the connections to it are made in the host's kernel, and none of them could be accepted in a VM",
        ));
    }
    if getpeername::<SockaddrStorage>(fd.as_raw_fd()).is_err() {
        return Err(Refusal(
            "a socket that is not connected".into(),
            "only what goes through a connection is carried into a VM",
        ));
    }
    Ok(What::Both(HostStream::ready(fd)))
}

fn file(fd: OwnedFd, flags: OFlag, is_dir: bool) -> Result<What, Refusal> {
    let unknown = |_| Refusal::unknown(&fd);
    if fstatfs(&fd).map_err(unknown)?.filesystem_type() == NAMESPACES {
        return Err(Refusal(
            format!("the namespace {}", name(&fd)),
            "it is the host's, and cannot be entered from inside a VM",
        ));
    }
    // A directory's offset means something to its file system alone.
    let offset = match is_dir {
        true => 0,
        false => lseek(&fd, 0, Whence::SeekCur).map_err(unknown)?,
    };
    let opened = Opened::new(flags, offset.unsigned_abs());
    let options = BindOptions {
        // What is below a directory belongs to it, and is reached under its own permissions.
        recursive: is_dir,
        read_only: !is_dir && !opened.write,
        ..BindOptions::default()
    };
    match Source::of_descriptor(&fd, name(&fd).into(), is_dir, options) {
        Ok(source) => Ok(What::File(source, opened)),
        Err(_) => Err(Refusal(
            format!("the file {}", name(&fd)),
            "it is in no file system that is mounted here, as memory files are, so that a VM cannot be shown it",
        )),
    }
}

fn character_device(fd: OwnedFd, flags: OFlag, stat: &FileStat) -> Result<What, Refusal> {
    let device = (major(stat.st_rdev), minor(stat.st_rdev));
    let known = DEVICES
        .iter()
        .find(|(_, number)| device == (MEMORY, u64::from(*number)));
    if let Some((path, _)) = known {
        return Ok(What::Device(path, Opened::new(flags, 0)));
    }
    let refused = |why| Refusal(format!("the device {}", name(&fd)), why);
    if device == MASTERS {
        return Err(refused(
            "a terminal's master cannot be opened once more, and a VM would stall on one that blocks",
        ));
    }
    if !isatty(&fd).unwrap_or(false) {
        return Err(refused("it is the host's and not in the guest"));
    }
    match flags & OFlag::O_ACCMODE {
        OFlag::O_RDONLY => Ok(What::Input(fd)),
        OFlag::O_WRONLY => Ok(What::Output(fd)),
        _ => match HostStream::both(fd.as_fd()) {
            Ok(stream) => Ok(What::Both(stream)),
            Err(_) => Err(refused("this terminal cannot be opened once more")),
        },
    }
}

/// What the system calls it.
fn name(fd: &OwnedFd) -> String {
    let name: io::Result<PathBuf> = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    name.map_or_else(
        |_| "something unknown".into(),
        |name| name.to_string_lossy().into_owned(),
    )
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Seek, SeekFrom, Write};
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use nix::sys::epoll::{Epoll, EpollCreateFlags};
    use nix::sys::eventfd::EventFd;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::sys::socket::{AddressFamily, SockFlag, socket};
    use nix::sys::stat::Mode;
    use nix::unistd::{mkfifo, pipe};

    use super::*;

    fn of(fd: impl Into<OwnedFd>) -> Result<What, Error> {
        Preserved::new(7, fd.into()).map(|preserved| preserved.what)
    }

    #[track_caller]
    fn refused(fd: impl Into<OwnedFd>, words: &[&str]) {
        let error = of(fd).unwrap_err().to_string();
        assert!(error.starts_with("descriptor 7 cannot"), "{error}");
        for word in words {
            assert!(error.contains(word), "{error:?} lacks {word:?}");
        }
    }

    #[test]
    fn a_pipe_has_one_direction() {
        let (reader, writer) = pipe().unwrap();
        assert!(matches!(of(reader), Ok(What::Input(_))));
        assert!(matches!(of(writer), Ok(What::Output(_))));
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        let both = File::options().read(true).write(true).open(&fifo).unwrap();
        refused(both, &["FIFO", "reading and writing"]);
    }

    #[test]
    fn a_socket_is_a_connected_stream_or_refused() {
        let (one, _other) = UnixStream::pair().unwrap();
        assert!(matches!(of(one), Ok(What::Both(_))));
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        refused(listener, &["listens"]);
        let tcp = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        refused(tcp, &["listens"]);
        let (datagram, _other) = UnixDatagram::pair().unwrap();
        refused(datagram, &["datagrams"]);
        let alone = socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::empty(),
            None,
        );
        refused(alone.unwrap(), &["not connected"]);
    }

    #[test]
    fn a_terminal_is_carried_and_its_master_is_not() {
        let pty = nix::pty::openpty(None, None).unwrap();
        assert!(matches!(of(pty.slave), Ok(What::Both(_))));
        refused(pty.master, &["ptmx", "master"]);
    }

    #[test]
    fn devices_that_every_guest_has_are_the_guests_and_others_are_refused() {
        let null = File::options().write(true).open("/dev/null").unwrap();
        let Ok(What::Device("/dev/null", opened)) = of(null) else {
            panic!("not the device");
        };
        assert_eq!((opened.read, opened.write), (false, true));
        let random = File::open("/dev/urandom").unwrap();
        assert!(matches!(of(random), Ok(What::Device("/dev/urandom", _))));
        let ptmx = File::open("/dev/ptmx").unwrap();
        refused(ptmx, &["/dev/"]);
    }

    #[test]
    fn what_is_the_kernels_own_is_refused_by_its_name() {
        refused(EventFd::new().unwrap(), &["eventfd"]);
        let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
        refused(epoll.0, &["eventpoll"]);
        let pid = crate::pidfd(nix::unistd::Pid::this()).unwrap();
        refused(pid, &["pidfd"]);
        let place = nix::fcntl::open("/", OFlag::O_PATH, Mode::empty()).unwrap();
        refused(place, &["O_PATH"]);
        refused(File::open("/proc/self/ns/net").unwrap(), &["namespace"]);
        let memory = memfd_create("x", MFdFlags::empty()).unwrap();
        refused(memory, &["memfd:x", "no file system"]);
    }

    #[test]
    fn a_file_is_open_in_the_guest_as_it_is_here() {
        // Mounts are root's.
        if !nix::unistd::Uid::effective().is_root() {
            return;
        }
        let mut named = tempfile::NamedTempFile::new().unwrap();
        named.write_all(b"0123456789").unwrap();
        let shown = |fd: File| {
            let preserved = Preserved::new(7, fd.into()).unwrap();
            let mut read_only = None;
            let place = "/run/cloison/shared/x";
            let descriptor = preserved.prepare(|source| {
                read_only = Some(source.is_read_only());
                Ok(place.into())
            });
            let Descriptor::File(file) = descriptor.unwrap() else {
                panic!("not a file");
            };
            assert_eq!(file.path, place);
            (file, read_only.unwrap())
        };
        let mut at_four = File::open(named.path()).unwrap();
        at_four.seek(SeekFrom::Start(4)).unwrap();
        let (file, read_only) = shown(at_four);
        assert_eq!(
            (file.read, file.write, file.append, file.offset, read_only),
            (true, false, false, 4, true)
        );
        let (file, read_only) = shown(File::options().append(true).open(named.path()).unwrap());
        assert_eq!(
            (file.read, file.write, file.append, read_only),
            (false, true, true, false)
        );
        // Files may be made through a directory.
        let (file, read_only) = shown(File::open("/etc").unwrap());
        assert_eq!((file.read, file.write, read_only), (true, false, false));
    }

    #[test]
    fn a_file_without_a_name_can_be_handed_on() {
        if nix::unistd::Uid::effective().is_root() {
            let file = tempfile::tempfile().unwrap();
            assert!(matches!(of(file), Ok(What::File(..))));
        }
    }
}
