//! The devices, each with a request of its own kind and a way to see that it works.

use std::any::Any;
use std::io;
use std::sync::{Arc, Mutex};

use cloison_devices::testing::{Guest, HostEnd, readable, tap, writable};
use cloison_devices::{
    Balloon, Blk, Console, Device, Fs, FsLimits, HotMemory, Mem, Net, NetConfig, Pmem, Reclaim,
    Rng, Vsock, VsockConfig,
};
use vm_memory::GuestAddress;

/// A device, and what is known of its requests.
pub struct Subject {
    pub device: Box<dyn Device>,
    /// The queue its requests go to.
    pub queue: usize,
    /// A request that it carries out.
    pub request: Vec<u8>,
    /// Bytes of room that its answer needs.
    pub room: u32,
    /// Has the device do something useful for a guest it has not seen before, and checks that it did.
    pub works: fn(&mut dyn Device, &mut Guest, &mut dyn Any),
    /// What `works` needs of the host's end.
    pub host: Box<dyn Any>,
}

/// What a device has given to the host.
type Taken = Arc<Mutex<Vec<u8>>>;

fn host<T: 'static>(host: &mut dyn Any) -> &mut T {
    host.downcast_mut().expect("what the subject was made with")
}

/// Has the device answer a request in `queue`; answers what it wrote.
fn ask(
    device: &mut dyn Device,
    guest: &mut Guest,
    queue: usize,
    request: &[u8],
    room: u32,
) -> Vec<u8> {
    let at = guest.alloc_bytes(request);
    let answer = guest.alloc(room.max(1).into());
    let mut chain = vec![readable(at, request.len() as u32)];
    if room > 0 {
        chain.push(writable(answer, room));
    }
    guest.place(queue, &chain);
    let grown = guest.kick(device, queue).expect("a device in order");
    assert!(grown.contains(queue), "the request was taken");
    let used = guest.used(queue).expect("the request came back");
    guest.read(answer, used.len as usize)
}

pub fn rng() -> Subject {
    Subject {
        device: Box::new(Rng::new().unwrap()),
        queue: 0,
        request: vec![0; 8],
        room: 64,
        works: |device, guest, _| {
            let at = guest.alloc(32);
            guest.place(0, &[writable(at, 32)]);
            guest.kick(device, 0).unwrap();
            assert_eq!(guest.used(0).unwrap().len, 32);
        },
        host: Box::new(()),
    }
}

pub fn console() -> Subject {
    // Nobody reads what the guest writes: the last of it is all that is kept.
    let taken = Taken::default();
    let sink = Arc::clone(&taken);
    let sink = move |bytes: &[u8]| {
        let mut taken = sink.lock().unwrap();
        taken.clear();
        taken.extend_from_slice(bytes);
    };
    Subject {
        device: Box::new(Console::new(Box::new(sink)).unwrap()),
        queue: 1,
        request: b"Kernel panic - not syncing: Attempted to kill init!\n".to_vec(),
        room: 0,
        works: |device, guest, taken| {
            ask(device, guest, 1, b"alive\n", 0);
            assert_eq!(*host::<Taken>(taken).lock().unwrap(), b"alive\n");
        },
        host: Box::new(taken),
    }
}

pub fn vsock() -> Subject {
    /// A packet from port 5000 of the guest to port 1024 of the host, where nobody is (virtio 1.3 §5.10.6).
    fn packet(op: u16) -> Vec<u8> {
        let mut packet = Vec::new();
        packet.extend(3u64.to_le_bytes());
        packet.extend(2u64.to_le_bytes());
        packet.extend(5000u32.to_le_bytes());
        packet.extend(1024u32.to_le_bytes());
        packet.extend(0u32.to_le_bytes());
        packet.extend(1u16.to_le_bytes());
        packet.extend(op.to_le_bytes());
        packet.extend(0u32.to_le_bytes());
        packet.extend((256u32 << 10).to_le_bytes());
        packet.extend(0u32.to_le_bytes());
        packet
    }
    Subject {
        device: Box::new(Vsock::new(VsockConfig::default()).unwrap()),
        queue: 1,
        request: packet(1),
        room: 0,
        works: |device, guest, _| {
            let at = guest.alloc(4096);
            guest.place(0, &[writable(at, 4096)]);
            ask(device, guest, 1, &packet(1), 0);
            // A connection to nobody is refused.
            assert_eq!(guest.used(0).unwrap().len, 44);
            assert_eq!(guest.read(at + 30, 2), 3u16.to_le_bytes());
        },
        host: Box::new(()),
    }
}

pub fn fs() -> Subject {
    /// The first request of a guest that mounts (include/uapi/linux/fuse.h).
    fn init() -> Vec<u8> {
        let mut init = Vec::new();
        init.extend(56u32.to_le_bytes());
        init.extend(26u32.to_le_bytes());
        init.extend(1u64.to_le_bytes());
        init.extend([0; 24]);
        for word in [7u32, 31, 1 << 17, 0] {
            init.extend(word.to_le_bytes());
        }
        init
    }
    let dir = tempfile::tempdir().unwrap();
    let limits = FsLimits {
        inodes: 1000,
        descriptors: 100,
        open: 100,
    };
    Subject {
        device: Box::new(Fs::new("cloison", dir.path(), limits).unwrap()),
        queue: 1,
        request: init(),
        room: 128,
        works: |device, guest, _| {
            let answer = ask(device, guest, 1, &init(), 128);
            assert_eq!(answer[4..8], [0; 4], "no error");
        },
        host: Box::new(dir),
    }
}

pub fn net() -> Subject {
    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
    /// Header and frame of the guest's to everybody.
    fn frame() -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0xff; 6]);
        frame.extend(MAC);
        frame.extend([0x88, 0xb5]);
        frame.resize(12 + 60, 7);
        frame
    }
    let (tap, host_end) = tap();
    let config = NetConfig {
        mac: MAC,
        mtu: 1500,
        spoofing: false,
    };
    Subject {
        device: Box::new(Net::new(tap, config).unwrap()),
        queue: 1,
        request: frame(),
        room: 0,
        works: |device, guest, end| {
            let end = host::<HostEnd>(end);
            while end.receive().is_some() {}
            ask(device, guest, 1, &frame(), 0);
            assert_eq!(end.receive().unwrap(), frame()[12..]);
            let at = guest.alloc(2048);
            guest.place(0, &[writable(at, 2048)]);
            guest.kick(device, 0).unwrap();
            assert!(end.send(&frame()[12..]));
            while guest.host(device, 0).unwrap() {}
            assert_eq!(guest.used(0).unwrap().len, 72);
        },
        host: Box::new(host_end),
    }
}

pub fn blk() -> Subject {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    // Type and first sector; a write has its data behind them, a read its room.
    fn header(kind: u32) -> Vec<u8> {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(8u64.to_le_bytes());
        header
    }
    Subject {
        device: Box::new(Blk::new(file, false, "hostile").unwrap()),
        queue: 0,
        request: header(0),
        room: 513,
        works: |device, guest, _| {
            let write = [header(1), vec![9; 512]].concat();
            assert_eq!(ask(device, guest, 0, &write, 1), [0]);
            let read = ask(device, guest, 0, &header(0), 513);
            assert_eq!(read, [vec![9; 512], vec![0]].concat());
        },
        host: Box::new(()),
    }
}

pub fn pmem() -> Subject {
    Subject {
        device: Box::new(Pmem::new(GuestAddress(1 << 32), 2 << 20).unwrap()),
        queue: 0,
        request: vec![0; 4],
        room: 4,
        works: |device, guest, _| assert_eq!(ask(device, guest, 0, &[0; 4], 4), [0; 4]),
        host: Box::new(()),
    }
}

/// The end of guest memory: no range that is given back or plugged reaches beyond it.
fn in_memory(start: GuestAddress, length: u64) -> bool {
    let in_low = start.0 < 2 * Guest::BORDER && start.0 + length <= 2 * Guest::BORDER;
    in_low || start.0 > Guest::HOLE && start.0 + length <= Guest::END
}

pub fn balloon() -> Subject {
    struct Pages(Arc<Mutex<u64>>);
    impl Reclaim for Pages {
        fn discard(&mut self, start: GuestAddress, length: u64) -> io::Result<()> {
            assert!(in_memory(start, length) && length > 0);
            assert!(start.0.is_multiple_of(4096) && length.is_multiple_of(4096));
            *self.0.lock().unwrap() = start.0;
            Ok(())
        }
    }
    let last = Arc::<Mutex<u64>>::default();
    Subject {
        device: Box::new(Balloon::new(Box::new(Pages(Arc::clone(&last)))).unwrap()),
        queue: 0,
        request: [1000u32, 1001, 2000].map(u32::to_le_bytes).concat(),
        room: 0,
        works: |device, guest, last| {
            ask(device, guest, 0, &3000u32.to_le_bytes(), 0);
            assert_eq!(*host::<Arc<Mutex<u64>>>(last).lock().unwrap(), 3000 << 12);
        },
        host: Box::new(last),
    }
}

pub fn mem() -> Subject {
    const START: u64 = 1 << 32;
    const LENGTH: u64 = 256 << 20;
    struct Region;
    impl HotMemory for Region {
        fn plug(&mut self, start: GuestAddress, length: u64) -> io::Result<()> {
            assert!(start.0 >= START && start.0 + length <= START + LENGTH && length > 0);
            Ok(())
        }
        fn unplug(&mut self, start: GuestAddress, length: u64) -> io::Result<()> {
            self.plug(start, length)
        }
    }
    fn request(kind: u16) -> Vec<u8> {
        let mut request = vec![0; 24];
        request[0..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&START.to_le_bytes());
        request[16..18].copy_from_slice(&1u16.to_le_bytes());
        request
    }
    let mem = Mem::new(GuestAddress(START), LENGTH, Box::new(Region)).unwrap();
    mem.handle().request(LENGTH / 2, None).unwrap();
    Subject {
        device: Box::new(mem),
        queue: 0,
        request: request(0),
        room: 10,
        works: |device, guest, _| {
            // Unplug all, plug one, ask for its state.
            assert_eq!(ask(device, guest, 0, &request(2), 10), [0; 10]);
            assert_eq!(ask(device, guest, 0, &request(0), 10), [0; 10]);
            assert_eq!(ask(device, guest, 0, &request(3), 10), [0; 10]);
            assert_eq!(
                ask(device, guest, 0, &request(0), 10)[0],
                3,
                "it is plugged"
            );
        },
        host: Box::new(()),
    }
}
