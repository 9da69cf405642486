//! What a verb and the process it has made tell each other, a line of JSON each. The end of the channel is the end of the other side.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt};

/// From the process that stands for one in the guest.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Report {
    /// Its namespaces are there: hooks may use them.
    Ready,
    /// The process in the guest has been made.
    Made,
    /// It could not be made, and the reporter goes.
    Failed(String),
}

/// From the verb, in this order.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// The process, and whatever it starts, is charged to the container's cgroup: it may start the VM.
    Charged,
    /// The hooks have run: go on.
    GoOn,
    /// The caller has been told: the verb is not needed any more.
    Stay,
}

/// The verb's end.
pub struct VerbEnd(BufReader<UnixStream>);

/// The other process's end, for use in a tokio runtime.
pub struct ProcessEnd(tokio::io::BufReader<tokio::net::UnixStream>);

fn line(value: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

fn parse<T: DeserializeOwned>(line: &str) -> Result<T> {
    serde_json::from_str(line).context("cannot understand the other process")
}

/// Says something before there is a runtime.
///
/// # Errors
/// When the verb is gone.
pub fn tell(channel: &UnixStream, report: &Report) -> Result<()> {
    let mut channel = channel;
    let told = line(report).and_then(|line| channel.write_all(&line));
    told.context("the command that began this is gone")
}

impl VerbEnd {
    pub fn new(channel: UnixStream) -> Self {
        Self(BufReader::new(channel))
    }

    /// Waits until the other process has come as far as `Report::Ready` or `Report::Made`.
    ///
    /// # Errors
    /// What it says went wrong, or that it is gone.
    pub fn expect_ready(&mut self) -> Result<()> {
        match self.next()? {
            Report::Ready => Ok(()),
            Report::Failed(why) => Err(anyhow!(why)),
            Report::Made => bail!("the process that stands for the container's is confused"),
        }
    }

    /// Waits until the process in the guest has been made.
    ///
    /// # Errors
    /// As for [`VerbEnd::expect_ready`].
    pub fn expect_made(&mut self) -> Result<()> {
        loop {
            match self.next()? {
                Report::Made => return Ok(()),
                Report::Failed(why) => return Err(anyhow!(why)),
                Report::Ready => {}
            }
        }
    }

    /// What the other process has said by now of its failure. To be asked when something else has failed, and for the last time.
    pub fn failure(&mut self) -> Option<anyhow::Error> {
        self.0.get_ref().set_nonblocking(true).ok()?;
        loop {
            match self.next().ok()? {
                Report::Failed(why) => return Some(anyhow!(why)),
                Report::Ready | Report::Made => {}
            }
        }
    }

    fn next(&mut self) -> Result<Report> {
        let mut text = String::new();
        let read = self.0.read_line(&mut text);
        if read.context("cannot hear from the process that stands for the container's")? == 0 {
            bail!("the process that stands for the container's was killed before that was made");
        }
        parse(&text)
    }

    /// Tells the other process; one that is gone shows at the next report.
    pub fn order(&mut self, order: &Order) {
        let _ = line(order).and_then(|line| self.0.get_mut().write_all(&line));
    }
}

impl ProcessEnd {
    /// # Errors
    /// When the runtime cannot watch the channel.
    pub fn new(channel: UnixStream) -> Result<Self> {
        channel.set_nonblocking(true)?;
        let channel = tokio::net::UnixStream::from_std(channel)?;
        Ok(Self(tokio::io::BufReader::new(channel)))
    }

    /// Says how far things are.
    ///
    /// # Errors
    /// When the verb is gone.
    pub async fn tell(&mut self, report: &Report) -> Result<()> {
        let line = line(report)?;
        let told = self.0.get_mut().write_all(&line).await;
        told.context("the command that began this is gone")
    }

    /// Waits for an order, which is the next.
    ///
    /// # Errors
    /// When the verb is gone, whose caller then knows nothing of this process.
    pub async fn expect(&mut self, order: &Order) -> Result<()> {
        let gone = "the command that began this is gone";
        let mut line = String::new();
        if self.0.read_line(&mut line).await.context(gone)? == 0 {
            bail!(gone);
        }
        let said: Order = parse(&line)?;
        ensure!(said == *order, "expected {order:?}, and was told {said:?}");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_other_sides_end_is_an_error_and_its_failure_the_error_itself() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut verb = VerbEnd::new(ours);
        tell(&theirs, &Report::Ready).unwrap();
        verb.expect_ready().unwrap();
        tell(&theirs, &Report::Failed("no\nroom".into())).unwrap();
        assert_eq!(verb.expect_made().unwrap_err().to_string(), "no\nroom");
        drop(theirs);
        let error = verb.expect_made().unwrap_err().to_string();
        assert!(error.contains("killed"), "{error}");
    }

    #[test]
    fn a_failure_that_has_not_been_said_is_not_waited_for() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut verb = VerbEnd::new(ours);
        assert!(verb.failure().is_none());
        tell(&theirs, &Report::Ready).unwrap();
        tell(&theirs, &Report::Failed("no room".into())).unwrap();
        assert_eq!(verb.failure().unwrap().to_string(), "no room");
        drop(theirs);
        assert!(verb.failure().is_none());
    }

    #[test]
    fn nonsense_is_an_error() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut verb = VerbEnd::new(ours);
        (&theirs).write_all(b"{\"unheard\":1}\n").unwrap();
        assert!(verb.expect_made().is_err());
    }
}
