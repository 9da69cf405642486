//! `cloison logs`.

use std::io::{self, Write};
use std::os::fd::AsFd;

use anyhow::{Context, Result, bail};
use cloison_sandbox::Home;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::unistd::pipe;

use crate::args::Logs;
use crate::container::{Container, find};
use crate::log::{Reader, Stream};

/// Prints what the container wrote, each stream to its own.
pub fn logs(home: &Home, args: &Logs) -> Result<()> {
    let container = find(home, &args.container)?;
    let path = container.log_file();
    if !path.exists() {
        bail!(
            "container {} has no log: it does not run detached, and wrote to its own terminal or pipes",
            args.container
        );
    }
    // Before the log is read, so that nothing written afterwards goes unseen.
    let follow = args.follow.then(|| Follow::start(&container)).transpose()?;
    let mut reader = Reader::open(&path, args.tail)?;
    print(&mut reader, args)?;
    if let Some(follow) = follow {
        while follow.wait()? == Happened::Written {
            print(&mut reader, args)?;
        }
        print(&mut reader, args)?;
    }
    Ok(())
}

fn print(reader: &mut Reader, args: &Logs) -> Result<()> {
    let (mut stdout, mut stderr) = (io::stdout().lock(), io::stderr().lock());
    while let Some(entry) = reader.next()? {
        let out: &mut dyn Write = match entry.stream {
            Stream::Stdout => &mut stdout,
            Stream::Stderr => &mut stderr,
        };
        match entry.print(out, args.timestamps).and_then(|()| out.flush()) {
            // The reader has seen enough.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
            other => other.context("cannot write the log")?,
        }
    }
    Ok(())
}

#[derive(PartialEq, Eq)]
enum Happened {
    Written,
    Ended,
}

/// Watches a log and its container's life.
struct Follow {
    inotify: Inotify,
    ended: std::os::fd::OwnedFd,
}

impl Follow {
    fn start(container: &Container) -> Result<Self> {
        let failed = "cannot watch the container's log";
        let inotify =
            Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).context(failed)?;
        inotify
            .add_watch(&container.log_file(), AddWatchFlags::IN_MODIFY)
            .context(failed)?;
        let (ended, alive) = pipe().context(failed)?;
        let container = container.clone();
        std::thread::Builder::new()
            .name("container-end".into())
            .spawn(move || {
                // However the wait ends, there is nothing more to follow.
                let _ = container.wait();
                drop(alive);
            })
            .context(failed)?;
        Ok(Self { inotify, ended })
    }

    fn wait(&self) -> Result<Happened> {
        let mut fds = [
            PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.ended.as_fd(), PollFlags::POLLIN),
        ];
        poll(&mut fds, PollTimeout::NONE).context("cannot wait for the container's log")?;
        if fds[0].any() == Some(true) {
            // What was written is read from the log itself.
            let _ = self.inotify.read_events();
            return Ok(Happened::Written);
        }
        Ok(Happened::Ended)
    }
}
