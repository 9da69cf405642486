//! The few things of the host's kernel that neither std nor nix offers safely.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::libc::{self, PF_USER_WORKER};
use nix::unistd::{ForkResult, Pid, fork};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A descriptor that becomes readable when the process ends.
///
/// # Errors
/// When there is no such process.
pub fn pidfd(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: the system call takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Waits for a descriptor to become readable; must be called inside a tokio runtime.
///
/// # Errors
/// When it cannot be waited for, as a regular file cannot.
pub fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd's number stays the same and open until it is dropped, and the AsyncFd, which owns it, drops it last.
    let watched = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
    watched.map_err(io::Error::from)
}

/// The size of a terminal in columns and rows; `None` for what is no terminal.
pub fn terminal_size(fd: BorrowedFd<'_>) -> Option<(u16, u16)> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCGWINSZ writes one winsize to the address it is given, which is that of `size`.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    (answer == 0 && size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// Takes the first `count` descriptors beyond standard input, output and error, and closes all others, but those that the command line names
/// as files, as shells do with `<(COMMAND)`. To be called once, in `main`, before anything is opened.
///
/// # Errors
/// The number of one that is not open.
pub fn take_inherited(count: u16) -> Result<Vec<OwnedFd>, RawFd> {
    let mut next = 3 + libc::c_uint::from(count);
    for kept in named_descriptors(std::env::args_os()) {
        close_range(next, kept.saturating_sub(1));
        next = next.max(kept.saturating_add(1));
    }
    close_range(next, libc::c_uint::MAX);
    let numbers = (3..).take(count.into());
    numbers.map(inherited).collect()
}

/// Nobody else is to inherit it.
fn inherited(number: RawFd) -> Result<OwnedFd, RawFd> {
    // SAFETY: F_SETFD takes an integer and touches no memory of ours; a number that is not open is refused.
    match unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } {
        // SAFETY: it is open, and since this process has opened nothing yet it is its parent's gift, which is taken once.
        0 => Ok(unsafe { OwnedFd::from_raw_fd(number) }),
        _ => Err(number),
    }
}

fn close_range(first: libc::c_uint, last: libc::c_uint) {
    if first <= last {
        // SAFETY: nothing of this process has opened a descriptor yet, so none that is closed here belongs to anybody. Where the system
        // call is missing they stay open, which is untidy and no more.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    }
}

fn named_descriptors(arguments: impl Iterator<Item = OsString>) -> BTreeSet<libc::c_uint> {
    let number = |argument: OsString| {
        let text = argument.into_string().ok()?;
        let path = text.rsplit('=').next()?;
        let number = ["/dev/fd/", "/proc/self/fd/"].map(|dir| path.strip_prefix(dir));
        number.into_iter().flatten().next()?.parse().ok()
    };
    arguments.filter_map(number).collect()
}

/// Makes a terminal the controlling one of this process's session, which must be led by it and have none: the process then gets
/// SIGWINCH and SIGHUP from it.
///
/// # Errors
/// When one of the two is not so.
pub fn take_charge(terminal: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer and touches no memory of ours.
    match unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Goes on in a child process; the parent gets its pid. Refused to a process with several threads, of which only one would live on.
///
/// # Errors
/// When the process has more than one thread, or the system has no room for another.
pub fn split() -> io::Result<Option<Pid>> {
    if threads()? != 1 {
        return Err(io::Error::other(
            "a process with several threads cannot be split",
        ));
    }
    // SAFETY: no other thread runs this process's code, as was just seen, so the child finds no lock held by a thread it lacks.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(Some(child)),
        ForkResult::Child => Ok(None),
    }
}

/// The threads of this process, without those that the kernel runs in its name and that never leave the kernel: KVM has one for each VM.
fn threads() -> io::Result<usize> {
    let mut threads = 0;
    for thread in std::fs::read_dir("/proc/self/task")? {
        let stat = std::fs::read_to_string(thread?.path().join("stat"))?;
        // The name, which may have any character, ends with the last parenthesis; the flags are the seventh field after it.
        let flags = stat.rsplit_once(')').and_then(|(_, rest)| {
            let flags = rest.split_whitespace().nth(6)?;
            flags.parse::<libc::c_int>().ok()
        });
        let flags = flags.ok_or(io::ErrorKind::InvalidData)?;
        threads += usize::from(flags & PF_USER_WORKER == 0);
    }
    Ok(threads)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_several_threads_is_not_split() {
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || wait.recv());
        assert!(threads().unwrap() > 1);
        assert!(split().is_err());
        drop(go);
        assert!(other.join().unwrap().is_err());
    }

    #[test]
    fn descriptors_are_named_by_their_paths_alone() {
        let words = [
            "r",
            "exec",
            "-p",
            "/dev/fd/63",
            "--resources=/proc/self/fd/5",
            "/dev/fd/63",
            "/dev/fd/x",
            "/dev/fd/",
            "/dev/fd/-1",
            "7",
            "/dev/fd/99999999999",
            "x/dev/fd/8",
            "",
        ];
        let named = named_descriptors(words.iter().map(OsString::from));
        assert_eq!(named.into_iter().collect::<Vec<_>>(), [5, 63]);
    }
}
