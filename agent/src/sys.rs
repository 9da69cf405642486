//! The few system calls no safe wrapper exists for. Each function takes and gives owned or borrowed descriptors and
//! checked values; nothing here decides anything.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use cloison_agent_api::{MAX_ENTROPY, MAX_PRESERVED};
use libcontainer::oci_spec::runtime::PosixRlimit;
use nix::cmsg_space;
use nix::sys::signal::SigSet;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socket,
};
use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Options of a vsock socket (linux/vm_sockets.h), which libc lacks.
const SO_VM_SOCKETS_BUFFER_SIZE: libc::c_int = 0;
const SO_VM_SOCKETS_BUFFER_MAX_SIZE: libc::c_int = 2;

/// _IOW('R', 3, int[2]) and _IO('R', 7) of linux/random.h.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

/// Lets tokio watch a descriptor. Must be called within a tokio runtime.
pub fn register(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open, names one file description and gives the same number until it is dropped, which
    // AsyncFd, its only owner from here on, does after it has stopped watching.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, interest) }?)
}

/// Brings the loopback interface of the caller's network namespace up.
pub fn loopback_up() -> io::Result<()> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: ifreq is plain old data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which lives and is filled in; the descriptor is open.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    check(result)
}

/// The index and the hardware address of the interface called `name`, in the network namespace of `socket`.
pub fn interface(socket: BorrowedFd<'_>, name: &str) -> io::Result<(i32, [u8; 6])> {
    // SAFETY: ifreq is plain old data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays the zero that ends the name.
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let ask = |what, request: &mut libc::ifreq| {
        // SAFETY: both requests that are made read the name in an ifreq, which lives, and write an answer into it.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), what, &raw mut *request) })
    };
    ask(libc::SIOCGIFINDEX, &mut request)?;
    // SAFETY: the request has filled the index in, and any bytes are a number.
    let index = unsafe { request.ifr_ifru.ifru_ifindex };
    ask(libc::SIOCGIFHWADDR, &mut request)?;
    // SAFETY: the request has filled an address in, and any bytes are one.
    let data = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
    let mut address = [0; 6];
    for (to, from) in address.iter_mut().zip(data) {
        *to = from.cast_unsigned();
    }
    Ok((index, address))
}

/// rand_pool_info (linux/random.h) with its bytes.
#[repr(C)]
struct Entropy {
    bits: libc::c_int,
    size: libc::c_int,
    bytes: [u8; MAX_ENTROPY],
}

/// Adds entropy, at most [`MAX_ENTROPY`] bytes, to the kernel's pool and has it seed its random numbers from the pool at once, through a
/// descriptor of /dev/urandom (random(4)).
pub fn reseed_random(device: BorrowedFd<'_>, entropy: &[u8]) -> io::Result<()> {
    let mut bytes = [0; MAX_ENTROPY];
    let taken = bytes.get_mut(..entropy.len());
    taken
        .ok_or(io::ErrorKind::InvalidInput)?
        .copy_from_slice(entropy);
    let size = libc::c_int::try_from(entropy.len()).map_err(io::Error::other)?;
    let bits = 8 * size;
    let entropy = Entropy { bits, size, bytes };
    // SAFETY: RNDADDENTROPY reads one rand_pool_info and as many bytes behind it as that says, all of which live; the descriptor is
    // borrowed, so it is open.
    check(unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &raw const entropy) })?;
    // SAFETY: RNDRESEEDCRNG reads nothing of ours.
    check(unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) })
}

/// Sets a terminal's size in characters, on either of its sides.
pub fn set_window(terminal: BorrowedFd<'_>, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads one winsize, which lives; the descriptor is borrowed, so it is open.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })
}

/// Sets one limit of the calling process.
pub fn set_rlimit(limit: &PosixRlimit) -> io::Result<()> {
    let value = libc::rlimit {
        rlim_cur: limit.soft(),
        rlim_max: limit.hard(),
    };
    // SAFETY: setrlimit reads one rlimit, which lives; an unknown resource number is refused by the kernel.
    check(unsafe { libc::setrlimit(limit.typ() as libc::__rlimit_resource_t, &raw const value) })
}

/// How the kernel schedules the calling process among others (sched(7)).
pub enum Policy {
    Normal,
    /// Does not interrupt whoever wakes it.
    Batch,
}

/// Sets the calling process's scheduling policy, which its children inherit.
pub fn set_policy(policy: Policy) -> io::Result<()> {
    let policy = match policy {
        Policy::Normal => libc::SCHED_OTHER,
        Policy::Batch => libc::SCHED_BATCH,
    };
    // SAFETY: sched_param is plain old data; the call reads one that lives. Both policies have priority 0.
    check(unsafe {
        let none: libc::sched_param = std::mem::zeroed();
        libc::sched_setscheduler(0, policy, &raw const none)
    })
}

/// What rt_sigaction(2) takes on x86-64 (kernel_sigaction; glibc's own structure differs).
#[repr(C)]
struct KernelAction {
    handler: usize,
    flags: libc::c_ulong,
    restorer: usize,
    mask: u64,
}

/// Gives every signal its default action and blocks none. For a process about to execute a program that must not
/// inherit what this one ignores: the Rust runtime ignores SIGPIPE, glibc's posix_spawn(3) its own two signals, which
/// its sigaction(3) refuses to touch.
pub fn reset_signals() -> io::Result<()> {
    let default = KernelAction {
        handler: libc::SIG_DFL,
        flags: 0,
        restorer: 0,
        mask: 0,
    };
    for number in (1..=64).filter(|n| ![libc::SIGKILL, libc::SIGSTOP].contains(n)) {
        // SAFETY: the kernel reads one action of the layout and mask size it is told of; the default action runs no
        // code of this process.
        let result = unsafe {
            let none = std::ptr::null_mut::<KernelAction>();
            libc::syscall(
                libc::SYS_rt_sigaction,
                number,
                &raw const default,
                none,
                size_of::<u64>(),
            )
        };
        if result == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    SigSet::empty().thread_set_mask()?;
    Ok(())
}

/// Sends a signal by its number: nix knows no real-time signals.
pub fn kill(pid: Pid, signal: i32) -> io::Result<()> {
    // SAFETY: kill(2) takes two integers and touches no memory.
    check(unsafe { libc::kill(pid.as_raw(), signal) })
}

/// Most descriptors that come with one message: what a helper's process has, and the helper's pipe.
const MAX_DESCRIPTORS: usize = MAX_PRESERVED + 4;

/// Sends descriptors with some bytes over a connected Unix socket.
pub fn send_descriptors(
    socket: impl AsFd,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&numbers)];
    let iov = [io::IoSlice::new(bytes)];
    let socket = socket.as_fd().as_raw_fd();
    sendmsg::<()>(socket, &iov, &control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Receives bytes over a connected Unix socket, and the descriptors that come with the first of them: how many bytes came, and all of the
/// descriptors.
pub fn receive_descriptors(
    socket: impl AsFd,
    bytes: &mut [u8],
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut iov = [io::IoSliceMut::new(bytes)];
    let mut space = cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let socket = socket.as_fd().as_raw_fd();
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket, &mut iov, Some(&mut space), flags)?;
    let mut received = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control {
            // SAFETY: the kernel has just made these descriptors for us, and nobody else knows their numbers.
            let own = |number| unsafe { OwnedFd::from_raw_fd(number) };
            received.extend(descriptors.into_iter().map(own));
        }
    }
    Ok((message.bytes, received))
}

/// Receives the one descriptor a peer sends over a connected Unix socket.
pub fn receive_descriptor(socket: impl AsFd) -> io::Result<OwnedFd> {
    let (_, mut received) = receive_descriptors(socket, &mut [0; 64])?;
    match (received.pop(), received.is_empty()) {
        (Some(descriptor), true) => Ok(descriptor),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the message does not carry one descriptor",
        )),
    }
}

/// Takes over a descriptor this process inherited under a number it knows.
///
/// # Safety
/// The number must be one the parent opened for this process, taken over once.
pub unsafe fn inherited(number: RawFd) -> OwnedFd {
    // SAFETY: the caller's promise: the descriptor is open and has no other owner.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// Makes a descriptor known under this number as well, which a program that is executed keeps.
pub fn duplicate_as(descriptor: BorrowedFd<'_>, number: RawFd) -> io::Result<()> {
    // SAFETY: dup2 takes two numbers; who had the second one, if anybody, is the caller's to know.
    check(unsafe { libc::dup2(descriptor.as_raw_fd(), number) }.min(0))
}

/// Sets how much a connected vsock socket takes from its peer before it is read, bytes.
pub fn set_vsock_buffer(socket: BorrowedFd<'_>, bytes: u64) -> io::Result<()> {
    // The maximum first: the size is cut to it.
    for option in [SO_VM_SOCKETS_BUFFER_MAX_SIZE, SO_VM_SOCKETS_BUFFER_SIZE] {
        // SAFETY: both options read one u64, which lives; the descriptor is borrowed, so it is open.
        check(unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::AF_VSOCK,
                option,
                (&raw const bytes).cast(),
                size_of::<u64>() as libc::socklen_t,
            )
        })?;
    }
    Ok(())
}

/// Commands and constants of bpf(2) (linux/bpf.h), which libc lacks.
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;
const BPF_F_REPLACE: u32 = 4;

/// The beginning of bpf_attr for `BPF_PROG_LOAD`; the kernel takes the rest for zero.
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
}

/// bpf_attr for `BPF_PROG_ATTACH`.
#[repr(C)]
struct Attach {
    cgroup: RawFd,
    program: RawFd,
    kind: u32,
    flags: u32,
    replaced: RawFd,
}

/// How often the loading of a program is begun anew. Each signal costs one attempt, and as many as a guest's dying processes
/// can send meanwhile are fewer.
const LOAD_ATTEMPTS: usize = 100;

/// Loads a program that decides on devices, as instructions of eight bytes.
pub fn load_device_program(instructions: &[u64]) -> io::Result<OwnedFd> {
    let attributes = Load {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        count: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        instructions: instructions.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
    };
    let mut attempts = 0;
    let number = loop {
        attempts += 1;
        // SAFETY: the kernel reads the instructions, as many as it is told, and the license, which ends with NUL; all live.
        match unsafe { bpf(BPF_PROG_LOAD, &attributes) } {
            // The verifier gives up when a signal waits for its thread, a SIGCHLD mostly (Linux, kernel/bpf/verifier.c).
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && attempts < LOAD_ATTEMPTS => {}
            result => break result?,
        }
    };
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Has a program decide on the devices of a cgroup, beside those of the cgroups above it, in place of `replaced`.
pub fn attach_device_program(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    replaced: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let attributes = Attach {
        cgroup: cgroup.as_raw_fd(),
        program: program.as_raw_fd(),
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI | replaced.map_or(0, |_| BPF_F_REPLACE),
        replaced: replaced.map_or(0, |program| program.as_raw_fd()),
    };
    // SAFETY: attaching reads nothing but the attributes.
    unsafe { bpf(BPF_PROG_ATTACH, &attributes) }.map(drop)
}

/// # Safety
/// What the attributes point to must be there for the command to read.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_int> {
    // SAFETY: the kernel reads one T, which lives; what it points to is the caller's promise.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    match libc::c_int::try_from(result) {
        Ok(number) if number >= 0 => Ok(number),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Has a program decide on all system calls that this thread makes from here on (seccomp(2)).
pub fn load_filter(program: &[libc::sock_filter], flags: libc::c_ulong) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(io::Error::other)?,
        // The kernel does not write to it.
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel reads one sock_fprog and as many instructions as that says, all of which live, and verifies them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    };
    match result {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        // SECCOMP_FILTER_FLAG_TSYNC: the thread that could not have it.
        thread => Err(io::Error::other(format!(
            "thread {thread} has another filter"
        ))),
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_descriptor_arrives_and_works() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut near, far) = UnixStream::pair().unwrap();
        send_descriptors(&theirs, b"x", &[far.as_fd()]).unwrap();
        drop(far);
        let received = receive_descriptor(&ours).unwrap();
        near.write_all(b"hello").unwrap();
        let mut text = [0; 5];
        UnixStream::from(received).read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hello");
    }

    #[test]
    fn a_message_without_a_descriptor_is_an_error() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"x").unwrap();
        assert_eq!(
            receive_descriptor(&ours).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
    }

    #[test]
    fn more_descriptors_than_one_are_an_error_and_are_closed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut near, far) = UnixStream::pair().unwrap();
        send_descriptors(&theirs, b"x", &[far.as_fd(), far.as_fd()]).unwrap();
        drop(far);
        assert!(receive_descriptor(&ours).is_err());
        assert_eq!(near.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn descriptors_come_in_their_order_with_the_bytes_and_have_close_on_exec() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let pairs: Vec<_> = (0..MAX_DESCRIPTORS)
            .map(|_| UnixStream::pair().unwrap())
            .collect();
        let far: Vec<_> = pairs.iter().map(|(_, far)| far.as_fd()).collect();
        send_descriptors(&theirs, b"some bytes", &far).unwrap();
        let mut bytes = [0; 64];
        let (count, received) = receive_descriptors(&ours, &mut bytes).unwrap();
        assert_eq!(&bytes[..count], b"some bytes");
        assert_eq!(received.len(), MAX_DESCRIPTORS);
        for (index, (received, (near, _))) in received.into_iter().zip(&pairs).enumerate() {
            let flags = rustix::io::fcntl_getfd(&received).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
            let text = [u8::try_from(index).unwrap()];
            UnixStream::from(received).write_all(&text).unwrap();
            let mut near = near;
            let mut read = [0];
            near.read_exact(&mut read).unwrap();
            assert_eq!(read, text);
        }
    }

    #[test]
    fn a_pipe_has_no_window() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert!(set_window(ours.as_fd(), 80, 24).is_err());
    }
}
