//! How fast the file system device reads a file that is in the host's page cache, against preadv(2) into the same memory:
//!
//! ```sh
//! cargo run --release -p cloison-devices --features testing --example fs_read
//! ```
//!
//! The requests are Linux's: a table of a header, a place for the reply's, and a page for each 4 KiB, one request at a time.

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::time::{Duration, Instant};

use cloison_devices::testing::{Descriptor, Guest, INDIRECT, NEXT, WRITE};
use cloison_devices::{Fs, FsLimits};
use vm_memory::{GuestAddress, GuestMemory};

/// Length of the file, bytes.
const FILE: usize = 64 << 20;
/// How often it is read, of which the fastest time counts.
const ROUNDS: usize = 5;
const REQUESTS: usize = 1;
const PAGE: u64 = 4096;
/// Guest memory for the request, the table, and the data; pages of the latter are far apart.
const REQUEST: u64 = 0x40_0000;
const TABLE: u64 = 0x41_0000;
const DATA: u64 = 0x80_0000;
const LOOKUP: u32 = 1;
const OPEN: u32 = 14;
const READ: u32 = 15;
const INIT: u32 = 26;
const ROOT: u64 = 1;
const OUT_HEADER: u32 = 16;

fn main() -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir_in("/dev/shm")?;
    let path = dir.path().join("file");
    File::create(&path)?.write_all(&vec![7; FILE])?;
    for pages in [1, 32, 256] {
        let mut client = Client::new(dir.path(), pages)?;
        let device = fastest(|| client.read_all())?;
        let file = File::open(&path)?;
        let host = fastest(|| client.read_all_directly(&file))?;
        let rate = |time: Duration| FILE as f64 / time.as_secs_f64() / 1e6;
        println!(
            "{:5} KiB a request: device {:6.0} MB/s, preadv {:6.0} MB/s, ratio {:.2}, {:.2} us more a request",
            pages * 4,
            rate(device),
            rate(host),
            rate(device) / rate(host),
            (device.as_secs_f64() - host.as_secs_f64()) * 1e6
                / (FILE as f64 / (pages * PAGE) as f64),
        );
    }
    Ok(())
}

fn fastest(
    mut read: impl FnMut() -> Result<(), Box<dyn Error>>,
) -> Result<Duration, Box<dyn Error>> {
    let mut fastest = Duration::MAX;
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        read()?;
        fastest = fastest.min(begin.elapsed());
    }
    Ok(fastest)
}

struct Client {
    device: Fs,
    guest: Guest,
    pages: u64,
    node: u64,
    handle: u64,
    used: u16,
}

impl Client {
    fn new(dir: &std::path::Path, pages: u64) -> Result<Self, Box<dyn Error>> {
        let device = Fs::new("cloison", dir, FsLimits::for_this_process())?;
        let guest = Guest::new(&device, true);
        let mut client = Self {
            device,
            guest,
            pages,
            node: 0,
            handle: 0,
            used: 0,
        };
        client.lay_table();
        let init: Vec<u8> = [7u32, 31, 1 << 20, 1 << 22]
            .iter()
            .flat_map(|n| n.to_le_bytes())
            .collect();
        client.call(INIT, 0, &init)?;
        client.call(LOOKUP, ROOT, b"file\0")?;
        client.node = client.word(0);
        client.call(OPEN, client.node, &[0; 8])?;
        client.handle = client.word(0);
        Ok(client)
    }

    /// Address of a page for data: no two are neighbours.
    fn page(&self, index: u64) -> u64 {
        DATA + 2 * PAGE * index
    }

    /// The descriptors of all requests, whose first is as long as the longest.
    fn lay_table(&mut self) {
        let reply = REQUEST + PAGE;
        let mut table = vec![(REQUEST, 80, 0), (reply, OUT_HEADER, WRITE)];
        table.extend((0..self.pages).map(|index| (self.page(index), PAGE as u32, WRITE)));
        let last = table.len() - 1;
        for (index, (addr, len, flags)) in table.into_iter().enumerate() {
            let next = if index < last { NEXT } else { 0 };
            let mut bytes = addr.to_le_bytes().to_vec();
            bytes.extend(u32::to_le_bytes(len));
            bytes.extend(u16::to_le_bytes(flags | next));
            bytes.extend((index as u16 + 1).to_le_bytes());
            self.guest.write(TABLE + 16 * index as u64, &bytes);
        }
        let descriptor = Descriptor {
            addr: TABLE,
            len: 16 * (last as u32 + 1),
            flags: INDIRECT,
            next: 0,
        };
        self.guest.write_descriptor(REQUESTS, 0, descriptor);
    }

    fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<u32, Box<dyn Error>> {
        let mut request = Vec::with_capacity(80);
        request.extend((40 + body.len() as u32).to_le_bytes());
        request.extend(opcode.to_le_bytes());
        request.extend(1u64.to_le_bytes());
        request.extend(node.to_le_bytes());
        request.extend([0; 16]);
        request.extend(body);
        self.guest.write(REQUEST, &request);
        self.guest.offer(REQUESTS, 0);
        self.guest.kick(&mut self.device, REQUESTS)?;
        if self.guest.host(&mut self.device, 0)? {
            return Err("one request was too many".into());
        }
        self.used = self.used.wrapping_add(1);
        let reply = self.guest.read(REQUEST + PAGE, 8);
        let word = |at: usize| [reply[at], reply[at + 1], reply[at + 2], reply[at + 3]];
        match i32::from_le_bytes(word(4)) {
            0 => Ok(u32::from_le_bytes(word(0)) - OUT_HEADER),
            errno => Err(std::io::Error::from_raw_os_error(-errno).into()),
        }
    }

    /// A number in the reply's body.
    fn word(&self, at: u64) -> u64 {
        let bytes = self.guest.read(DATA + at, 8);
        bytes
            .iter()
            .rev()
            .fold(0, |word, byte| word << 8 | u64::from(*byte))
    }

    fn read_all(&mut self) -> Result<(), Box<dyn Error>> {
        let length = self.pages * PAGE;
        for offset in (0..FILE as u64).step_by(length as usize) {
            let mut body = Vec::with_capacity(40);
            body.extend(self.handle.to_le_bytes());
            body.extend(offset.to_le_bytes());
            body.extend((length as u32).to_le_bytes());
            body.extend([0; 20]);
            let read = self.call(READ, self.node, &body)?;
            if u64::from(read) != length {
                return Err("a short read".into());
            }
        }
        Ok(())
    }

    fn read_all_directly(&self, file: &File) -> Result<(), Box<dyn Error>> {
        use std::os::fd::AsRawFd;
        let iovecs: Result<Vec<_>, _> = (0..self.pages)
            .map(|index| {
                let address = self
                    .guest
                    .memory()
                    .get_host_address(GuestAddress(self.page(index)))?;
                Ok::<_, vm_memory::GuestMemoryError>(libc::iovec {
                    iov_base: address.cast(),
                    iov_len: PAGE as usize,
                })
            })
            .collect();
        let iovecs = iovecs?;
        let length = self.pages * PAGE;
        for offset in (0..FILE as u64).step_by(length as usize) {
            // SAFETY: each iovec is a page of guest memory, which lives as long as `self`, and which nothing here refers to.
            let read = unsafe {
                libc::preadv(
                    file.as_raw_fd(),
                    iovecs.as_ptr(),
                    iovecs.len() as i32,
                    offset as i64,
                )
            };
            if read != length as isize {
                return Err("a short read".into());
            }
        }
        Ok(())
    }
}
