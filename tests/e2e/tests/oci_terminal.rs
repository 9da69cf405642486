//! Terminals of `cloison-runtime`'s containers: what a caller gets at its console socket, and what it is told where there is no terminal.

use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::process::Child;

use serde_json::json;

use crate::host::{fail, succeed, text};
use crate::oci::{Bundle, command};

/// A caller that takes the terminal of a container at a console socket.
struct Recipient {
    listener: UnixListener,
}

impl Recipient {
    fn take(self) -> File {
        use std::os::fd::{AsRawFd, FromRawFd};
        let (stream, _) = self.listener.accept().unwrap();
        let mut name = [0; 64];
        let mut io = [std::io::IoSliceMut::new(&mut name)];
        let mut space = nix::cmsg_space!(i32);
        let message = nix::sys::socket::recvmsg::<()>(
            stream.as_raw_fd(),
            &mut io,
            Some(&mut space),
            nix::sys::socket::MsgFlags::empty(),
        )
        .unwrap();
        let mut fds = message
            .cmsgs()
            .unwrap()
            .filter_map(|message| match message {
                nix::sys::socket::ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
                _ => None,
            });
        // SAFETY: the kernel has just made this descriptor for us.
        unsafe { File::from_raw_fd(fds.next().unwrap()) }
    }
}

#[test]
fn a_terminal_goes_to_the_console_socket_and_follows_its_size() {
    let bundle = Bundle::shell("stty size; read line; stty size; echo got $line").with(|config| {
        config["process"]["terminal"] = true.into();
        config["process"]["consoleSize"] = json!({ "width": 81, "height": 24 });
    });
    let socket = bundle.host.path("console");
    let recipient = Recipient {
        listener: UnixListener::bind(&socket).unwrap(),
    };
    let mut create: Child = command(&bundle.host)
        .args([
            "create",
            "--console-socket",
            socket.to_str().unwrap(),
            "--bundle",
        ])
        .args([bundle.dir().to_str().unwrap(), "one"])
        .spawn()
        .unwrap();
    let mut terminal = recipient.take();
    assert!(create.wait().unwrap().success(), "{}", bundle.log());
    succeed(&bundle.run(&["start", "one"]));
    let mut seen = until(&mut terminal, "24 81");
    let size = libc::winsize {
        ws_row: 30,
        ws_col: 100,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads one winsize from the address it is given.
    let set = unsafe {
        libc::ioctl(
            std::os::fd::AsRawFd::as_raw_fd(&terminal),
            libc::TIOCSWINSZ,
            &raw const size,
        )
    };
    assert_eq!(set, 0);
    // The size and the line take different ways; a second line shows that the first has arrived.
    let follow = "while [ \"$(stty size < /dev/console)\" != '30 100' ]; do sleep 0.1; done";
    succeed(&bundle.run(&["exec", "one", "sh", "-c", follow]));
    std::io::Write::write_all(&mut terminal, b"hello\n").unwrap();
    seen += &until(&mut terminal, "got hello");
    assert!(seen.contains("30 100"), "{seen}");
}

#[test]
fn a_terminal_where_the_caller_has_none_is_an_error_and_nothing_is_left() {
    let bundle = Bundle::shell("true").with(|config| config["process"]["terminal"] = true.into());
    let dir = bundle.dir();
    let mut run = command(&bundle.host);
    run.args(["run", "--bundle", dir.to_str().unwrap(), "one"]);
    // SAFETY: setsid is async-signal-safe, and nothing else is done between fork and exec.
    unsafe { run.pre_exec(|| Ok(nix::unistd::setsid().map(drop)?)) };
    fail(&run.output().unwrap(), 1, &["terminal"]);
    assert_eq!(text(&bundle.run(&["list", "-q"]).stdout), "");
}

#[test]
fn a_console_socket_that_nobody_listens_at_is_an_error_that_names_it() {
    let bundle = Bundle::shell("true").with(|config| config["process"]["terminal"] = true.into());
    let socket = bundle.host.path("console");
    let socket = socket.to_str().unwrap();
    let dir = bundle.dir();
    let create = [
        "create",
        "--console-socket",
        socket,
        "--bundle",
        dir.to_str().unwrap(),
        "one",
    ];
    fail(&bundle.run(&create), 1, &["console socket", socket]);
}

fn until(terminal: &mut File, word: &str) -> String {
    let mut seen = String::new();
    let mut block = [0; 1024];
    while !seen.contains(word) {
        let count = terminal.read(&mut block).unwrap_or(0);
        assert!(count > 0, "{word:?} did not come: {seen}");
        seen += &String::from_utf8_lossy(&block[..count]);
    }
    seen
}
