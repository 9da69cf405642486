//! A guest's FUSE client, which can also say what no kernel would.

use std::ffi::CString;
use std::path::{Path, PathBuf};

use fuse_backend_rs::abi::fuse_abi::*;
use tempfile::TempDir;
use vm_memory::ByteValued;

use crate::testing::{Guest, readable, writable};
use crate::{Device, Fs, FsLimits};

/// The queue for ordinary requests.
pub const REQUESTS: usize = 1;
/// The queue for FORGET.
pub const HIPRIO: usize = 0;
/// The root's number.
pub const ROOT: u64 = 1;

/// Room for a request or a reply, in bytes.
const ROOM: u64 = (1 << 20) + 4096;

/// Bounds that no ordinary test reaches.
pub const WIDE: FsLimits = FsLimits {
    inodes: 10_000,
    descriptors: 1000,
    open: 1000,
};

/// A reply's body, or the error number.
pub type Reply<T = Vec<u8>> = Result<T, i32>;

/// An entry of a directory: its name, its node number (of READDIRPLUS) and its type.
pub type Listed = (String, u64, u32);

/// A mounted guest and the directory it shares.
pub struct Client {
    pub fs: Fs,
    pub guest: Guest,
    pub dir: TempDir,
    /// Who asks.
    pub uid: u32,
    pub gid: u32,
    request: u64,
    reply: u64,
    unique: u64,
}

/// A file as an entry tells of it.
#[derive(Debug, Clone, Copy)]
pub struct Found {
    pub node: u64,
    pub attr: Attr,
}

/// Takes a structure from the front of `bytes`.
pub fn take<T: ByteValued>(bytes: &[u8]) -> T {
    let mut value = T::zeroed();
    value
        .as_mut_slice()
        .copy_from_slice(&bytes[..size_of::<T>()]);
    value
}

/// A name and its NUL.
pub fn name(name: &str) -> Vec<u8> {
    CString::new(name).unwrap().into_bytes_with_nul()
}

/// A structure and what follows it.
pub fn body(head: impl ByteValued, tail: &[u8]) -> Vec<u8> {
    [head.as_slice(), tail].concat()
}

impl Client {
    /// A guest that has mounted an empty directory.
    pub fn new() -> Self {
        Self::with(WIDE)
    }

    /// As [`Client::new`], within `limits`.
    pub fn with(limits: FsLimits) -> Self {
        // The umask belongs to the process, and tests run in many threads of one.
        unshare_umask();
        let dir = tempfile::tempdir().unwrap();
        let fs = Fs::new("cloison", dir.path(), limits).unwrap();
        let mut guest = Guest::new(&fs, true);
        let request = guest.alloc(ROOM);
        let reply = guest.alloc(ROOM);
        let mut client = Self {
            fs,
            guest,
            dir,
            uid: 0,
            gid: 0,
            request,
            reply,
            unique: 0,
        };
        client.mount();
        client
    }

    /// Sends INIT as a current kernel does; answers what the device chose.
    pub fn mount(&mut self) -> InitOut {
        let init = InitIn {
            major: 7,
            minor: 41,
            max_readahead: 1 << 20,
            flags: u32::MAX,
        };
        let reply = self.call(Opcode::Init, 0, &body(init, InitIn2::default().as_slice()));
        take(&reply.unwrap())
    }

    /// A path in the shared directory, on the host.
    pub fn host(&self, path: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(path)
    }

    /// The header of a request with a body of `length` bytes.
    pub fn header(&mut self, opcode: u32, node: u64, length: usize) -> InHeader {
        self.unique += 1;
        InHeader {
            len: (size_of::<InHeader>() + length) as u32,
            opcode,
            unique: self.unique,
            nodeid: node,
            uid: self.uid,
            gid: self.gid,
            pid: 1,
            padding: 0,
        }
    }

    /// Sends a request and takes its reply.
    pub fn call(&mut self, opcode: Opcode, node: u64, body: &[u8]) -> Reply {
        self.call_for(opcode as u32, node, body, ROOM as u32 - 4096)
    }

    /// As [`Client::call`], with `room` bytes for the reply's body, and any opcode.
    pub fn call_for(&mut self, opcode: u32, node: u64, body: &[u8], room: u32) -> Reply {
        let header = self.header(opcode, node, body.len());
        self.send(header, body, room)
            .unwrap_or_else(|| panic!("no reply to opcode {opcode}"))
    }

    /// Sends exactly this header and body; `None` when there is no reply.
    pub fn send(&mut self, header: InHeader, body: &[u8], room: u32) -> Option<Reply> {
        let request = [header.as_slice(), body].concat();
        self.guest.write(self.request, &request);
        self.guest.write(self.reply, &[0; 16]);
        let head = self.guest.place(
            REQUESTS,
            &[
                readable(self.request, request.len() as u32),
                writable(self.reply, 16 + room),
            ],
        );
        self.guest.kick(&mut self.fs, REQUESTS).unwrap();
        let used = self.guest.used(REQUESTS).expect("the chain comes back");
        assert_eq!(used.head, head);
        assert_eq!(self.guest.used(REQUESTS), None);
        if used.len == 0 {
            return None;
        }
        assert!(used.len <= 16 + room, "{} > {room}", used.len);
        let reply = self.guest.read(self.reply, used.len as usize);
        let out: OutHeader = take(&reply);
        assert_eq!(out.len, used.len);
        assert_eq!(out.unique, header.unique);
        Some(match out.error {
            0 => Ok(reply[16..].to_vec()),
            error => {
                assert_eq!(out.len, 16);
                assert!((-4095..0).contains(&error), "{error}");
                Err(-error)
            }
        })
    }

    /// Sends a request that has no reply, on the queue for those.
    pub fn tell(&mut self, opcode: Opcode, node: u64, body: &[u8]) {
        let header = self.header(opcode as u32, node, body.len());
        let request = [header.as_slice(), body].concat();
        self.guest.write(self.request, &request);
        self.guest
            .place(HIPRIO, &[readable(self.request, request.len() as u32)]);
        self.guest.kick(&mut self.fs, HIPRIO).unwrap();
        assert_eq!(self.guest.used(HIPRIO).unwrap().len, 0);
    }

    fn entry(reply: &[u8]) -> Found {
        let entry: EntryOut = take(reply);
        assert_ne!(entry.nodeid, 0);
        Found {
            node: entry.nodeid,
            attr: entry.attr,
        }
    }

    pub fn lookup(&mut self, parent: u64, at: &str) -> Reply<Found> {
        let reply = self.call(Opcode::Lookup, parent, &name(at))?;
        Ok(Self::entry(&reply))
    }

    /// Looks up a path of any number of components.
    pub fn walk(&mut self, path: &str) -> Reply<Found> {
        let mut at = Err(libc::EINVAL);
        let mut node = ROOT;
        for part in path.split('/') {
            at = self.lookup(node, part);
            node = at?.node;
        }
        at
    }

    pub fn forget(&mut self, node: u64, nlookup: u64) {
        self.tell(Opcode::Forget, node, ForgetIn { nlookup }.as_slice());
    }

    pub fn getattr(&mut self, node: u64) -> Reply<Attr> {
        let reply = self.call(Opcode::Getattr, node, GetattrIn::default().as_slice())?;
        Ok(take::<AttrOut>(&reply).attr)
    }

    pub fn setattr(&mut self, node: u64, set: SetattrIn) -> Reply<Attr> {
        let reply = self.call(Opcode::Setattr, node, set.as_slice())?;
        Ok(take::<AttrOut>(&reply).attr)
    }

    pub fn mkdir(&mut self, parent: u64, at: &str, mode: u32, umask: u32) -> Reply<Found> {
        let request = body(MkdirIn { mode, umask }, &name(at));
        Ok(Self::entry(&self.call(Opcode::Mkdir, parent, &request)?))
    }

    pub fn mknod(&mut self, parent: u64, at: &str, mode: u32, rdev: u32) -> Reply<Found> {
        let head = MknodIn {
            mode,
            rdev,
            ..MknodIn::default()
        };
        let reply = self.call(Opcode::Mknod, parent, &body(head, &name(at)))?;
        Ok(Self::entry(&reply))
    }

    pub fn symlink(&mut self, parent: u64, at: &str, target: &str) -> Reply<Found> {
        let request = [name(at), name(target)].concat();
        Ok(Self::entry(&self.call(
            Opcode::Symlink,
            parent,
            &request,
        )?))
    }

    pub fn readlink(&mut self, node: u64) -> Reply {
        self.call(Opcode::Readlink, node, &[])
    }

    pub fn link(&mut self, node: u64, parent: u64, at: &str) -> Reply<Found> {
        let request = body(LinkIn { oldnodeid: node }, &name(at));
        Ok(Self::entry(&self.call(Opcode::Link, parent, &request)?))
    }

    pub fn unlink(&mut self, parent: u64, at: &str) -> Reply<()> {
        self.call(Opcode::Unlink, parent, &name(at)).map(|_| ())
    }

    pub fn rmdir(&mut self, parent: u64, at: &str) -> Reply<()> {
        self.call(Opcode::Rmdir, parent, &name(at)).map(|_| ())
    }

    pub fn rename(
        &mut self,
        (parent, old): (u64, &str),
        (newdir, new): (u64, &str),
        flags: u32,
    ) -> Reply<()> {
        let head = Rename2In {
            newdir,
            flags,
            padding: 0,
        };
        let request = body(head, &[name(old), name(new)].concat());
        self.call(Opcode::Rename2, parent, &request).map(|_| ())
    }

    pub fn create(
        &mut self,
        parent: u64,
        at: &str,
        flags: i32,
        mode: u32,
        umask: u32,
    ) -> Reply<(Found, u64)> {
        let head = CreateIn {
            flags: flags as u32,
            mode: mode | libc::S_IFREG,
            umask,
            fuse_flags: 0,
        };
        let reply = self.call(Opcode::Create, parent, &body(head, &name(at)))?;
        let open: OpenOut = take(&reply[size_of::<EntryOut>()..]);
        Ok((Self::entry(&reply), open.fh))
    }

    pub fn open(&mut self, node: u64, flags: i32) -> Reply<OpenOut> {
        let request = OpenIn {
            flags: flags as u32,
            fuse_flags: 0,
        };
        Ok(take(&self.call(Opcode::Open, node, request.as_slice())?))
    }

    pub fn release(&mut self, node: u64, fh: u64) -> Reply<()> {
        let request = ReleaseIn {
            fh,
            ..ReleaseIn::default()
        };
        self.call(Opcode::Release, node, request.as_slice())
            .map(|_| ())
    }

    pub fn read(&mut self, node: u64, fh: u64, offset: u64, size: u32) -> Reply {
        let request = ReadIn {
            fh,
            offset,
            size,
            ..ReadIn::default()
        };
        self.call_for(Opcode::Read as u32, node, request.as_slice(), size)
    }

    pub fn write(&mut self, node: u64, fh: u64, offset: u64, data: &[u8]) -> Reply<u32> {
        self.write_as(node, fh, offset, data, 0, 0)
    }

    pub fn write_as(
        &mut self,
        node: u64,
        fh: u64,
        offset: u64,
        data: &[u8],
        flags: i32,
        fuse_flags: u32,
    ) -> Reply<u32> {
        let head = WriteIn {
            fh,
            offset,
            size: data.len() as u32,
            flags: flags as u32,
            fuse_flags,
            ..WriteIn::default()
        };
        let reply = self.call(Opcode::Write, node, &body(head, data))?;
        Ok(take::<WriteOut>(&reply).size)
    }

    pub fn opendir(&mut self, node: u64) -> Reply<u64> {
        let reply = self.call(Opcode::Opendir, node, OpenIn::default().as_slice())?;
        Ok(take::<OpenOut>(&reply).fh)
    }

    /// The entries of one answer, and where to go on.
    pub fn list(
        &mut self,
        node: u64,
        fh: u64,
        offset: u64,
        size: u32,
        plus: bool,
    ) -> Reply<(Vec<Listed>, u64)> {
        let request = ReadIn {
            fh,
            offset,
            size,
            ..ReadIn::default()
        };
        let opcode = if plus {
            Opcode::Readdirplus
        } else {
            Opcode::Readdir
        };
        let reply = self.call_for(opcode as u32, node, request.as_slice(), size)?;
        let mut rest = &reply[..];
        let mut entries = Vec::new();
        let mut next = offset;
        while !rest.is_empty() {
            let mut node = 0;
            if plus {
                node = take::<EntryOut>(rest).nodeid;
                rest = &rest[size_of::<EntryOut>()..];
            }
            let dirent: Dirent = take(rest);
            let name = &rest[size_of::<Dirent>()..][..dirent.namelen as usize];
            entries.push((
                String::from_utf8(name.to_vec()).unwrap(),
                node,
                dirent.type_,
            ));
            next = dirent.off;
            rest = &rest[(size_of::<Dirent>() + name.len()).next_multiple_of(8)..];
        }
        Ok((entries, next))
    }

    /// All of a directory, in answers of `size` bytes.
    pub fn list_all(&mut self, node: u64, size: u32, plus: bool) -> Vec<Listed> {
        let fh = self.opendir(node).unwrap();
        let mut all = Vec::new();
        let mut offset = 0;
        loop {
            let (entries, next) = self.list(node, fh, offset, size, plus).unwrap();
            if entries.is_empty() {
                break;
            }
            offset = next;
            all.extend(entries);
        }
        let release = ReleaseIn {
            fh,
            ..ReleaseIn::default()
        };
        self.call(Opcode::Releasedir, node, release.as_slice())
            .unwrap();
        all.sort();
        all
    }

    pub fn setxattr(&mut self, node: u64, at: &str, value: &[u8], flags: i32) -> Reply<()> {
        let head = SetxattrIn {
            size: value.len() as u32,
            flags: flags as u32,
        };
        let request = body(head, &[&name(at), value].concat());
        self.call(Opcode::Setxattr, node, &request).map(|_| ())
    }

    pub fn getxattr(&mut self, node: u64, at: &str, size: u32) -> Reply {
        let head = GetxattrIn { size, padding: 0 };
        self.call(Opcode::Getxattr, node, &body(head, &name(at)))
    }

    pub fn listxattr(&mut self, node: u64, size: u32) -> Reply {
        let head = GetxattrIn { size, padding: 0 };
        self.call(Opcode::Listxattr, node, head.as_slice())
    }

    /// Lets the device go on with what it has left for later.
    pub fn go_on(&mut self) -> bool {
        self.guest.host(&mut self.fs, 0).unwrap()
    }

    /// Resets the device, as a driver does.
    pub fn reset(&mut self) {
        self.fs.reset();
    }
}

/// Gives this thread a umask and a working directory of its own.
pub fn unshare_umask() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
}
