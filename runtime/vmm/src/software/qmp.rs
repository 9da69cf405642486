//! QEMU's machine protocol, as much of it as a template takes: one JSON object a line, over a socket that QEMU inherits
//! (QEMU's docs/interop/qmp-spec.rst).

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;

use serde::Deserialize;
use serde_json::{Value, json};

/// The longest line that is taken from QEMU, bytes; its answers here have some hundreds.
const MAX_LINE: u64 = 64 << 10;

/// Why QEMU did not do as it was told.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QmpError {
    #[error("cannot talk to QEMU")]
    Io(#[from] io::Error),
    #[error("QEMU says what is not understood: {0:?}")]
    Nonsense(String),
    #[error("QEMU refuses {command}: {why}")]
    Refused { command: &'static str, why: String },
    #[error("QEMU cannot write or read its devices' state")]
    NotMigrated,
}

/// A line of QEMU's: its greeting has none of these fields.
#[derive(Debug, Deserialize)]
struct Message {
    #[serde(rename = "return")]
    done: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
}

#[derive(Debug, Deserialize)]
struct Refusal {
    desc: String,
}

/// Our end of the socket.
pub(super) struct Qmp(BufReader<UnixStream>);

impl Qmp {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self(BufReader::new(socket))
    }

    /// Stops the guest, has QEMU write its devices' state to `path`, without memory, and waits until it has.
    pub(super) fn save(&mut self, path: &str) -> Result<(), QmpError> {
        self.begin()?;
        self.execute("stop", json!({}))?;
        self.execute("migrate", json!({ "uri": format!("file:{path}") }))?;
        self.migrated()
    }

    /// Has QEMU read its devices' state from `path`, and waits until it has.
    pub(super) fn load(&mut self, path: &str) -> Result<(), QmpError> {
        self.begin()?;
        self.execute("migrate-incoming", json!({ "uri": format!("file:{path}") }))?;
        self.migrated()
    }

    /// Adds a device on `bus`, one of those that are mapped into memory.
    ///
    /// Such a bus takes devices after the start as well, but QEMU wants it to name somebody who is asked before, and nobody has put
    /// himself down for these. A SCSI bus does: it has no objection to any device.
    pub(super) fn plug(&mut self, bus: &str, device: Value) -> Result<(), QmpError> {
        let handler = json!({ "path": bus, "property": "hotplug-handler", "value": "plug.0" });
        self.execute("qom-set", handler)?;
        self.execute("device_add", device)
    }

    /// Adds what a network device is connected to.
    pub(super) fn add_netdev(&mut self, netdev: Value) -> Result<(), QmpError> {
        self.execute("netdev_add", netdev)
    }

    /// Lets a stopped guest go on.
    pub(super) fn go_on(&mut self) -> Result<(), QmpError> {
        self.execute("cont", json!({}))
    }

    fn begin(&mut self) -> Result<(), QmpError> {
        self.execute("qmp_capabilities", json!({}))?;
        // Memory that is shared with others stays out of it, and its course is told.
        let on = |capability| json!({ "capability": capability, "state": true });
        let capabilities = json!({ "capabilities": [on("x-ignore-shared"), on("events")] });
        self.execute("migrate-set-capabilities", capabilities)
    }

    fn migrated(&mut self) -> Result<(), QmpError> {
        loop {
            let Message { event, data, .. } = self.receive()?;
            if event.as_deref() != Some("MIGRATION") {
                continue;
            }
            match data.get("status").and_then(Value::as_str) {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => return Err(QmpError::NotMigrated),
                _ => {}
            }
        }
    }

    fn execute(&mut self, command: &'static str, arguments: Value) -> Result<(), QmpError> {
        self.send(command, arguments)?;
        loop {
            let answer = self.receive()?;
            if let Some(Refusal { desc: why }) = answer.error {
                return Err(QmpError::Refused { command, why });
            }
            if answer.done.is_some() {
                return Ok(());
            }
        }
    }

    fn send(&mut self, command: &str, arguments: Value) -> io::Result<()> {
        let line = format!(
            "{}\n",
            json!({ "execute": command, "arguments": arguments })
        );
        self.0.get_mut().write_all(line.as_bytes())
    }

    fn receive(&mut self) -> Result<Message, QmpError> {
        let mut line = String::new();
        self.0.by_ref().take(MAX_LINE).read_line(&mut line)?;
        if line.is_empty() {
            return Err(QmpError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
        serde_json::from_str(&line).map_err(|_| QmpError::Nonsense(line))
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// A QEMU that says `lines`, whatever it is told.
    fn qemu(lines: &'static str) -> Qmp {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            theirs.write_all(lines.as_bytes()).unwrap();
            theirs.shutdown(std::net::Shutdown::Write).unwrap();
            io::copy(&mut theirs, &mut io::sink()).unwrap();
        });
        Qmp::new(ours)
    }

    const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": [\"oob\"]}}\n";
    const STOP: &str = "{\"event\": \"STOP\", \"timestamp\": {}}\n";
    const DONE: &str = "{\"return\": {}}\n";

    fn save(lines: &[&str]) -> Result<(), QmpError> {
        qemu(lines.concat().leak()).save("/state")
    }

    fn status(status: &str) -> String {
        format!("{{\"event\": \"MIGRATION\", \"data\": {{\"status\": \"{status}\"}}}}\n")
    }

    #[test]
    fn a_save_is_over_when_qemu_says_so_among_other_things() {
        let saved = |last: &str| {
            let (setup, last) = (status("setup"), status(last));
            save(&[GREETING, DONE, DONE, STOP, DONE, DONE, &setup, &last])
        };
        saved("completed").unwrap();
        assert!(matches!(saved("failed"), Err(QmpError::NotMigrated)));
        assert!(matches!(saved("active"), Err(QmpError::Io(_))));
    }

    #[test]
    fn a_refusal_is_told_in_qemus_words() {
        let no = "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\n";
        let error = save(&[GREETING, DONE, DONE, STOP, DONE, no]);
        assert_eq!(error.unwrap_err().to_string(), "QEMU refuses migrate: no");
    }

    #[test]
    fn what_is_not_the_protocol_is_an_error() {
        for lines in [
            "",
            "\n",
            "{",
            "[]\n",
            "{\"error\": 1}\n",
            &"x".repeat(1 << 20),
        ] {
            assert!(save(&[lines]).is_err(), "{lines:.20}");
        }
    }
}
