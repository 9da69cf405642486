//! Which devices a container may use: the rules of its spec as a program for its cgroup, which is how cgroup v2 knows
//! them (Linux, include/uapi/linux/bpf.h). A later rule goes before an earlier one, and each kind of access that is asked
//! for (read, write, mknod) must be allowed by some rule before another denies it. What no rule speaks of is denied.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use libcontainer::oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::error::{Error, Result};
use crate::sys;

/// bpf_cgroup_dev_ctx.access_type: the kind of device in the lower half, the access in the upper one.
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MKNOD | READ | WRITE;

/// One rule. What is `None` is not looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

/// What every container may do, whatever its rules: make any node, and use those that its /dev is given
/// (OCI runtime specification, "Default Devices"), its terminals and tun.
const DEFAULTS: [Rule; 12] = [
    mknod(CHARACTER),
    mknod(BLOCK),
    usable(1, Some(3)),
    usable(1, Some(5)),
    usable(1, Some(7)),
    usable(1, Some(8)),
    usable(1, Some(9)),
    usable(5, Some(0)),
    usable(5, Some(1)),
    usable(5, Some(2)),
    usable(136, None),
    usable(10, Some(200)),
];

const fn mknod(kind: i32) -> Rule {
    Rule {
        allow: true,
        kind: Some(kind),
        major: None,
        minor: None,
        access: MKNOD,
    }
}

const fn usable(major: i32, minor: Option<i32>) -> Rule {
    Rule {
        allow: true,
        kind: Some(CHARACTER),
        major: Some(major),
        minor,
        access: ALL,
    }
}

/// Reads the rules of a spec.
pub fn rules(devices: &[LinuxDeviceCgroup]) -> Result<Vec<Rule>> {
    devices.iter().map(rule).collect()
}

fn rule(device: &LinuxDeviceCgroup) -> Result<Rule> {
    let invalid = |why: String| Error::Invalid {
        what: "rule for devices",
        why,
    };
    let kind = match device.typ().unwrap_or_default() {
        LinuxDeviceType::A => None,
        LinuxDeviceType::B => Some(BLOCK),
        LinuxDeviceType::C | LinuxDeviceType::U => Some(CHARACTER),
        LinuxDeviceType::P => return Err(invalid("cgroups know no FIFOs".into())),
    };
    // -1 means any, as a missing number does.
    let number = |number: Option<i64>| match number {
        None | Some(-1) => Ok(None),
        Some(given) => match u32::try_from(given) {
            Ok(number) => Ok(Some(number.cast_signed())),
            Err(_) => Err(invalid(format!("{given} is no device number"))),
        },
    };
    let mut access = 0;
    for letter in device.access().as_deref().unwrap_or_default().chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            other => return Err(invalid(format!("there is no access {other:?}"))),
        };
    }
    if device.access().is_none() && kind.is_none() {
        access = ALL;
    }
    Ok(Rule {
        allow: device.allow(),
        kind,
        major: number(device.major())?,
        minor: number(device.minor())?,
        access,
    })
}

/// Registers (Linux, Documentation/bpf/standardization/instruction-set.rst): the verdict, the context, and what the
/// program keeps. `ACCESS` holds what was asked for and has not been allowed yet.
const VERDICT: u64 = 0;
const CONTEXT: u64 = 1;
const KIND: u64 = 2;
const ACCESS: u64 = 3;
const MAJOR: u64 = 4;
const MINOR: u64 = 5;

/// Operations on 32 bits, with a constant where nothing else is said.
const LOAD_WORD: u64 = 0x61;
const MOVE: u64 = 0xb4;
const MOVE_REGISTER: u64 = 0xbc;
const AND: u64 = 0x54;
const SHIFT_RIGHT: u64 = 0x74;
const JUMP: u64 = 0x05;
const JUMP_UNEQUAL: u64 = 0x56;
const JUMP_ANY_BIT: u64 = 0x46;
const EXIT: u64 = 0x95;

/// One instruction: operation, registers, distance of a load or jump, constant.
const fn instruction(operation: u64, to: u64, from: u64, distance: usize, constant: i32) -> u64 {
    operation | to << 8 | from << 12 | (distance as u64) << 16 | (constant as u32 as u64) << 32
}

const fn constant(operation: u64, to: u64, constant: i32) -> u64 {
    instruction(operation, to, 0, 0, constant)
}

/// `distance` counts the instructions that are passed over.
const fn jump(operation: u64, on: u64, value: i32, distance: usize) -> u64 {
    instruction(operation, on, 0, distance, value)
}

const fn verdict(allow: bool) -> [u64; 2] {
    [constant(MOVE, VERDICT, allow as i32), constant(EXIT, 0, 0)]
}

/// The programs that the guest's containers have, of which the last one loaded is at hand for the next: mostly it is the same.
#[derive(Default)]
pub struct Filters(Mutex<Option<(Vec<u64>, Arc<OwnedFd>)>>);

impl Filters {
    /// The program of these rules, in the kernel.
    ///
    /// # Errors
    /// When the kernel does not take it: there is no memory, or it is longer than 4,096 instructions.
    pub fn load(&self, rules: &[Rule]) -> io::Result<Arc<OwnedFd>> {
        let wanted = program(rules);
        // Nothing panics with the lock held.
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((program, loaded)) = &*last
            && *program == wanted
        {
            return Ok(Arc::clone(loaded));
        }
        let loaded = Arc::new(sys::load_device_program(&wanted)?);
        *last = Some((wanted, Arc::clone(&loaded)));
        Ok(loaded)
    }
}

/// The rules that decide anything, those of every container's included: none that a later one leaves nothing to, and no denial with
/// nothing allowed before it.
fn deciding(rules: &[Rule]) -> Vec<Rule> {
    let mut deciding: Vec<Rule> = Vec::new();
    for rule in rules.iter().chain(&DEFAULTS).rev() {
        if deciding.iter().all(|later| !later.covers(rule)) {
            deciding.push(*rule);
        }
    }
    while deciding.last().is_some_and(|rule| !rule.allow) {
        deciding.pop();
    }
    deciding
}

/// The program of these rules.
pub fn program(rules: &[Rule]) -> Vec<u64> {
    let mut program = vec![
        instruction(LOAD_WORD, KIND, CONTEXT, 0, 0),
        instruction(MOVE_REGISTER, ACCESS, KIND, 0, 0),
        constant(AND, KIND, 0xffff),
        constant(SHIFT_RIGHT, ACCESS, 16),
        instruction(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        instruction(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in deciding(rules) {
        rule.append(&mut program);
        if rule.is_last() {
            // The kernel refuses instructions that are never reached.
            return program;
        }
    }
    program.extend(verdict(false));
    program
}

impl Rule {
    /// Decides on all that the other one speaks of.
    fn covers(&self, other: &Self) -> bool {
        let any_or_same = |mine: Option<i32>, other| mine.is_none() || mine == other;
        any_or_same(self.kind, other.kind)
            && any_or_same(self.major, other.major)
            && any_or_same(self.minor, other.minor)
            && self.access & other.access == other.access
    }

    /// Nothing gets past it.
    fn is_last(&self) -> bool {
        let speaks_of = [self.kind, self.major, self.minor];
        speaks_of == [None; 3] && self.access == ALL
    }

    fn append(&self, program: &mut Vec<u64>) {
        let decision = verdict(self.allow);
        let past = decision.len();
        let mut body = match (self.access, self.allow) {
            (0, _) => return,
            (ALL, _) => Vec::new(),
            (access, true) => vec![
                constant(AND, ACCESS, ALL & !access),
                jump(JUMP_UNEQUAL, ACCESS, 0, past),
            ],
            (access, false) => vec![
                jump(JUMP_ANY_BIT, ACCESS, access, 1),
                jump(JUMP, 0, 0, past),
            ],
        };
        body.extend(decision);
        let looks = [(KIND, self.kind), (MAJOR, self.major), (MINOR, self.minor)];
        let looks: Vec<(u64, i32)> = looks
            .into_iter()
            .filter_map(|(register, value)| Some((register, value?)))
            .collect();
        for (index, (register, value)) in looks.iter().enumerate() {
            let rest = looks.len() - index - 1 + body.len();
            program.push(jump(JUMP_UNEQUAL, *register, *value, rest));
        }
        program.append(&mut body);
    }
}

#[cfg(test)]
#[path = "devices/tests.rs"]
mod tests;
