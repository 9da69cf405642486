//! Another size for a VM that runs. A VM grows before a container in it is allowed more, and shrinks when the container has been allowed
//! less: at no time is a limit more than there is.

use std::io;
use std::os::fd::AsFd;

use cloison_vmm::{ControlClient, ControlError, Status};
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe2;

use crate::{Agent, Error, Sandbox, VmSize};

/// How long a guest may take to take up memory, milliseconds.
const GROW_TIMEOUT_MS: u16 = 30_000;
/// How long it may take to give memory back, before what it has not given back is left to it, milliseconds. What cannot be spared is
/// not waited for.
const SHRINK_TIMEOUT_MS: u16 = 2_000;

/// A VM on its way to another size.
#[derive(Debug)]
pub struct Resize {
    control: ControlClient,
    /// As it is before.
    before: Status,
    /// As it is to be.
    size: VmSize,
}

impl Resize {
    /// Finds out how large the VM can be. `memory_mib` and `vcpus` are as large as it is to be; `None` leaves it as it is.
    ///
    /// # Errors
    /// When the VM does not run, or can never have as much.
    pub fn of(vm: &Sandbox, memory_mib: Option<u32>, vcpus: Option<u8>) -> Result<Self, Error> {
        let control = vm.control()?;
        let before = control
            .status()
            .map_err(failed("ask the VM for its size"))?;
        let size = VmSize {
            // What it was started with stays.
            memory_mib: memory_mib.map_or(before.memory_mib, |mib| mib.max(before.min_memory_mib)),
            vcpus: vcpus.unwrap_or(before.vcpus),
        };
        let most = VmSize {
            memory_mib: before.max_memory_mib,
            vcpus: before.max_vcpus,
        };
        if size.memory_mib > most.memory_mib || size.vcpus > most.vcpus {
            return Err(Error::NoRoom { wanted: size, most });
        }
        Ok(Self {
            control,
            before,
            size,
        })
    }

    /// The larger of the two sizes.
    pub fn largest(&self) -> VmSize {
        VmSize {
            memory_mib: self.size.memory_mib.max(self.before.memory_mib),
            vcpus: self.size.vcpus.max(self.before.vcpus),
        }
    }

    /// Gives the guest what it lacks, and returns when it has it.
    ///
    /// # Errors
    /// When it does not take it. It then has what it had.
    pub async fn grow(&self, agent: &Agent) -> Result<(), Error> {
        let (before, size) = (&self.before, self.size);
        if size.memory_mib > before.memory_mib {
            let got = self.resize_memory(size.memory_mib, GROW_TIMEOUT_MS)?;
            if got < size.memory_mib {
                self.resize_memory(before.memory_mib, 0)?;
                return Err(Error::NotTaken {
                    wanted: size.memory_mib,
                    got,
                });
            }
        }
        if size.vcpus > before.vcpus {
            self.resize_vcpus(size.vcpus)?;
            if let Err(error) = agent.use_cpus(size.vcpus).await {
                self.resize_vcpus(before.vcpus)?;
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// Takes from the guest what it has too much, as far as it can spare it, and answers how large it is.
    ///
    /// # Errors
    /// When the VM has ended, or its agent fails.
    pub async fn shrink(&self, agent: &Agent) -> Result<VmSize, Error> {
        let size = self.size;
        if size.vcpus < self.before.vcpus {
            agent.use_cpus(size.vcpus).await?;
            self.resize_vcpus(size.vcpus)?;
        }
        let mut memory_mib = size.memory_mib.max(self.before.memory_mib);
        if size.memory_mib < memory_mib {
            memory_mib = self.resize_memory(size.memory_mib, SHRINK_TIMEOUT_MS)?;
        }
        Ok(VmSize {
            memory_mib,
            vcpus: size.vcpus,
        })
    }

    fn resize_vcpus(&self, vcpus: u8) -> Result<(), Error> {
        let resized = self.control.resize_vcpus(vcpus);
        resized.map_err(failed("change the number of the VM's CPUs"))
    }

    /// How much memory there is when there is as much as that, or the time is over.
    fn resize_memory(&self, mib: u32, timeout_ms: u16) -> Result<u32, Error> {
        let (wait, done) = pipe2(OFlag::O_CLOEXEC)
            .map_err(io::Error::from)
            .map_err(Error::system("create a pipe"))?;
        let resized = self.control.resize_memory(mib, Some(done.as_fd()));
        resized.map_err(failed("change the VM's memory"))?;
        drop(done);
        // Nothing is written to it: it is over when the VM process has let go of it.
        let mut fds = [PollFd::new(wait.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::from(timeout_ms))
            .map_err(io::Error::from)
            .map_err(Error::system("wait for the guest's memory"))?;
        let status = self.control.status();
        let status = status.map_err(failed("ask the VM for its size"))?;
        Ok(status.memory_mib)
    }
}

fn failed(what: &'static str) -> impl FnOnce(ControlError) -> Error {
    move |source| Error::Control { what, source }
}
