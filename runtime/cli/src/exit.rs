//! Exit statuses, as docker's users know them.

use std::process::ExitCode;

/// Something of ours went wrong, or the command line is not one.
pub const OURS: u8 = 125;
/// The command is there but cannot be executed.
pub const NOT_EXECUTABLE: u8 = 126;
/// There is no such command.
pub const NOT_FOUND: u8 = 127;

/// The status of a process that signal `number` ended.
pub fn by_signal(number: i32) -> u8 {
    u8::try_from(128 + number).unwrap_or(u8::MAX)
}

/// An error together with the status that tells it apart.
#[derive(Debug)]
pub struct Failed {
    pub status: u8,
    pub error: anyhow::Error,
}

impl From<anyhow::Error> for Failed {
    fn from(error: anyhow::Error) -> Self {
        let status = match error
            .chain()
            .find_map(|e| e.downcast_ref::<cloison_sandbox::AgentError>())
        {
            // Only the start of a process finds out about executables.
            Some(agent) if agent.names_executable() => match agent.failure {
                cloison_sandbox::Failure::NotFound => NOT_FOUND,
                cloison_sandbox::Failure::PermissionDenied => NOT_EXECUTABLE,
                _ => OURS,
            },
            _ => OURS,
        };
        Self { status, error }
    }
}

impl Failed {
    /// The same error with docker's status for a verb that runs no process.
    pub fn general(error: anyhow::Error) -> Self {
        Self { status: 1, error }
    }

    /// Tells the person and gives the status.
    pub fn report(&self, debug: bool) -> ExitCode {
        if debug {
            eprintln!("cloison: {:?}", self.error);
        } else {
            eprintln!("cloison: {:#}", self.error);
        }
        ExitCode::from(self.status)
    }
}
