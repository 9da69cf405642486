//! The I/O ports: a serial line that only talks, for a kernel that dies before its console works, and the keyboard controller's
//! reset line. Everything else is a bus on which nobody answers.

use std::io::{self, Write};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};

use crate::kernel_log::KernelLog;

/// The first serial line's eight registers.
const SERIAL: u16 = 0x3f8;
const SERIAL_END: u16 = 0x400;
/// The keyboard controller's command and status register, and the command that pulses the processor's reset line.
const KEYBOARD_COMMAND: u16 = 0x64;
const PULSE_RESET: u8 = 0xfe;

/// What a write to a port means for the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    Nothing,
    /// The guest wants the machine reset.
    Reset,
}

/// The ports.
pub(super) struct Ports {
    serial: Serial<NoInterrupt, NoEvents, LogWriter>,
}

/// The serial line is polled; it has no interrupt.
struct NoInterrupt;

impl Trigger for NoInterrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

struct LogWriter(KernelLog);

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Ports {
    /// What the serial line says goes to `log`.
    pub(super) fn new(log: KernelLog) -> Self {
        Self {
            serial: Serial::new(NoInterrupt, LogWriter(log)),
        }
    }

    /// The guest reads from `port`.
    pub(super) fn read(&mut self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match (port, data) {
            (SERIAL..SERIAL_END, [byte]) => *byte = self.serial.read((port - SERIAL) as u8),
            // Idle: nothing to read, ready for a command.
            (KEYBOARD_COMMAND, [byte]) => *byte = 0,
            _ => {}
        }
    }

    /// The guest writes to `port`.
    pub(super) fn write(&mut self, port: u16, data: &[u8]) -> Request {
        match (port, data) {
            (KEYBOARD_COMMAND, [PULSE_RESET]) => return Request::Reset,
            (SERIAL..SERIAL_END, [byte]) => {
                if let Err(error) = self.serial.write((port - SERIAL) as u8, *byte) {
                    tracing::debug!("the serial line: {error:?}");
                }
            }
            _ => {}
        }
        Request::Nothing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_to_the_serial_line_is_logged() {
        let log = KernelLog::default();
        let mut ports = Ports::new(log.clone());
        for byte in *b"dying\n" {
            assert_eq!(ports.write(SERIAL, &[byte]), Request::Nothing);
        }
        assert_eq!(log.tail(100), "dying\n");
    }

    #[test]
    fn only_the_reset_command_resets() {
        let mut ports = Ports::new(KernelLog::default());
        assert_eq!(
            ports.write(KEYBOARD_COMMAND, &[PULSE_RESET]),
            Request::Reset
        );
        assert_eq!(ports.write(KEYBOARD_COMMAND, &[0xff]), Request::Nothing);
        assert_eq!(
            ports.write(KEYBOARD_COMMAND, &[PULSE_RESET; 4]),
            Request::Nothing
        );
        assert_eq!(ports.write(KEYBOARD_COMMAND, &[]), Request::Nothing);
        assert_eq!(ports.write(0x60, &[PULSE_RESET]), Request::Nothing);
    }

    #[test]
    fn every_port_can_be_read_and_written_in_every_width() {
        let log = KernelLog::default();
        let mut ports = Ports::new(log.clone());
        for port in 0..=u16::MAX {
            for width in [0, 1, 2, 4, 8] {
                ports.read(port, &mut [0; 8][..width]);
                if port != KEYBOARD_COMMAND {
                    assert_eq!(ports.write(port, &[0x10; 8][..width]), Request::Nothing);
                }
            }
        }
        let mut data = [0; 4];
        ports.read(0xcf8, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}
