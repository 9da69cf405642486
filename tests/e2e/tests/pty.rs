//! A terminal with a person at it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use nix::pty::{Winsize, openpty};
use nix::sys::termios::{LocalFlags, tcgetattr};

/// A program on a terminal of its own.
pub struct Terminal {
    master: File,
    slave: OwnedFd,
    pub child: Child,
    seen: String,
}

fn size(columns: u16, rows: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

impl Terminal {
    /// Starts the command with the terminal as its controlling one.
    pub fn start(mut command: Command, columns: u16, rows: u16) -> Self {
        let pty = openpty(&size(columns, rows), None).unwrap();
        let stdio = || Stdio::from(pty.slave.try_clone().unwrap());
        command.stdin(stdio()).stdout(stdio()).stderr(stdio());
        // SAFETY: setsid and ioctl are async-signal-safe, and nothing else is done between fork and exec.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                match nix::libc::ioctl(0, nix::libc::TIOCSCTTY, 0) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            });
        }
        Self {
            master: pty.master.into(),
            child: command.spawn().unwrap(),
            slave: pty.slave,
            seen: String::new(),
        }
    }

    /// Types.
    pub fn type_(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }

    /// Reads until `text` is on the screen, and gives all that came up to and with it.
    pub fn expect(&mut self, text: &str) -> String {
        let mut block = [0; 4096];
        loop {
            if let Some(end) = self.seen.find(text) {
                let rest = self.seen.split_off(end + text.len());
                return std::mem::replace(&mut self.seen, rest);
            }
            // The end of a terminal is an error on its other side.
            let count = self.master.read(&mut block).unwrap_or(0);
            assert!(count > 0, "{text:?} did not come: {}", self.seen);
            self.seen
                .push_str(&String::from_utf8_lossy(&block[..count]));
        }
    }

    /// Gives the terminal another size, which the kernel tells the program.
    pub fn resize(&self, columns: u16, rows: u16) {
        let size = size(columns, rows);
        // SAFETY: TIOCSWINSZ reads one winsize from the address it is given.
        let answer = unsafe {
            nix::libc::ioctl(
                self.master.as_raw_fd(),
                nix::libc::TIOCSWINSZ,
                &raw const size,
            )
        };
        assert_eq!(answer, 0);
    }

    /// Whether what is typed is echoed and edited, as it is when no program has changed that.
    pub fn is_cooked(&self) -> bool {
        tcgetattr(&self.slave)
            .unwrap()
            .local_flags
            .contains(LocalFlags::ICANON | LocalFlags::ECHO)
    }
}
