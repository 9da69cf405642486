//! The seccomp filter of a container's process: the profile as a program, and before it a part that profiles cannot express: a system
//! call that is newer than all that the profile names does not exist (ENOSYS) instead of being forbidden. C libraries try a new system
//! call first and fall back to an old one only if the new one does not exist.

mod program;

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Seek};

use libcontainer::oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompFilterFlag, LinuxSeccompOperator,
    LinuxSyscall,
};
use libseccomp::error::SeccompError;
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::sys;

/// AUDIT_ARCH_X86_64 and AUDIT_ARCH_I386 (linux/audit.h).
const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;
/// Set in the numbers of system calls of the x32 ABI, whose architecture is that of x86-64 (asm/unistd.h).
const X32_BIT: u32 = 1 << 30;

/// Offsets in seccomp_data (linux/seccomp.h).
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

const NO_SUCH_CALL: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

/// Why a profile could not become a filter.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    #[error("the profile's architecture {0:?}")]
    Architecture(Arch, #[source] SeccompError),
    #[error("the profile's rule for {0}")]
    Rule(String, #[source] SeccompError),
    #[error("the profile's errno {0} is too large for a tracer")]
    Trace(u32),
    #[error("compiling the profile")]
    Compile(#[from] SeccompError),
    #[error("reading the compiled profile")]
    Read(#[source] io::Error),
    #[error("the kernel refuses the filter")]
    Load(#[source] io::Error),
}

/// Has a profile decide on all system calls of this process from here on. It needs CAP_SYS_ADMIN or no_new_privs.
pub fn load(profile: &LinuxSeccomp) -> Result<(), FilterError> {
    let mut program = before(&newest(profile));
    program.extend(match program::compile(profile) {
        Some(filter) => filter,
        None => by_libseccomp(profile)?,
    });
    let mut flags = 0;
    for flag in profile.flags().iter().flatten() {
        flags |= match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW
            }
            // It is about listeners, and there is none.
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
        };
    }
    sys::load_filter(&program, flags).map_err(FilterError::Load)
}

/// The profile as libseccomp understands it.
fn by_libseccomp(profile: &LinuxSeccomp) -> Result<Vec<libc::sock_filter>, FilterError> {
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let mut filter = ScmpFilterContext::new(default)?;
    for &arch in profile.architectures().iter().flatten() {
        let added = filter.add_arch(architecture(arch));
        added.map_err(|source| FilterError::Architecture(arch, source))?;
    }
    for rule in profile.syscalls().iter().flatten() {
        let action = action(rule.action(), rule.errno_ret())?;
        // libseccomp refuses what says nothing.
        if action != default {
            for name in rule.names() {
                add(&mut filter, name, action, rule)
                    .map_err(|source| FilterError::Rule(name.clone(), source))?;
            }
        }
    }
    let mut file = File::from(
        memfd_create("filter", MFdFlags::MFD_CLOEXEC).map_err(|e| FilterError::Read(e.into()))?,
    );
    filter.export_bpf(&file)?;
    let mut bytes = Vec::new();
    file.rewind()
        .and_then(|()| file.read_to_end(&mut bytes))
        .map_err(FilterError::Read)?;
    let instruction = |bytes: &[u8; 8]| {
        let [a, b, jt, jf, c, d, e, f] = *bytes;
        libc::sock_filter {
            code: u16::from_ne_bytes([a, b]),
            jt,
            jf,
            k: u32::from_ne_bytes([c, d, e, f]),
        }
    };
    Ok(bytes.as_chunks().0.iter().map(instruction).collect())
}

fn add(
    filter: &mut ScmpFilterContext,
    name: &str,
    action: ScmpAction,
    rule: &LinuxSyscall,
) -> Result<(), SeccompError> {
    // Profiles name system calls of all kernels and architectures.
    let Ok(call) = ScmpSyscall::from_name(name) else {
        return Ok(());
    };
    let compare = rule.args().iter().flatten().map(|arg| {
        let (value, second) = (arg.value(), arg.value_two().unwrap_or(0));
        let (operator, value) = match arg.op() {
            LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, value),
            LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, value),
            LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, value),
            LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, value),
            LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, value),
            LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, value),
            // The mask comes first in a profile.
            LinuxSeccompOperator::ScmpCmpMaskedEq => (ScmpCompareOp::MaskedEqual(value), second),
        };
        let index = u32::try_from(arg.index()).unwrap_or(u32::MAX);
        (index, ScmpArgCompare::new(index, operator, value))
    });
    let compare: Vec<_> = compare.collect();
    let indices: HashSet<u32> = compare.iter().map(|(index, _)| *index).collect();
    let all: Vec<_> = compare.iter().map(|(_, compare)| *compare).collect();
    if indices.len() == all.len() {
        return filter.add_rule_conditional(action, call, &all).map(drop);
    }
    // Several about one argument cannot be one rule; runc takes each for a rule of its own.
    for one in all.chunks(1) {
        filter.add_rule_conditional(action, call, one)?;
    }
    Ok(())
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction, FilterError> {
    let errno = errno.unwrap_or(libc::EPERM.cast_unsigned());
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno.cast_signed()),
        LinuxSeccompAction::ScmpActTrace => {
            ScmpAction::Trace(u16::try_from(errno).map_err(|_| FilterError::Trace(errno))?)
        }
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActNotify => ScmpAction::Notify,
    })
}

fn architecture(arch: Arch) -> ScmpArch {
    match arch {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        Arch::ScmpArchMips => ScmpArch::Mips,
        Arch::ScmpArchMips64 => ScmpArch::Mips64,
        Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
        Arch::ScmpArchMipsel => ScmpArch::Mipsel,
        Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        Arch::ScmpArchPpc => ScmpArch::Ppc,
        Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
        Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        Arch::ScmpArchS390 => ScmpArch::S390,
        Arch::ScmpArchS390x => ScmpArch::S390X,
        Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
        Arch::ScmpArchParisc => ScmpArch::Parisc,
        Arch::ScmpArchParisc64 => ScmpArch::Parisc64,
        Arch::ScmpArchLoongarch64 => ScmpArch::Loongarch64,
        Arch::ScmpArchM68k => ScmpArch::M68k,
        Arch::ScmpArchSh => ScmpArch::Sh,
        Arch::ScmpArchSheb => ScmpArch::Sheb,
    }
}

/// The largest number of a system call that a profile names, whatever for, by the ABI that it is called with. An ABI without one is
/// left to the profile.
#[derive(Debug, Default, PartialEq, Eq)]
struct Newest {
    x86_64: Option<u32>,
    x32: Option<u32>,
    i386: Option<u32>,
}

/// Where runc does the same: not in a profile that lets most through, nor in one that says ENOSYS itself.
fn newest(profile: &LinuxSeccomp) -> Newest {
    let lenient = matches!(
        profile.default_action(),
        LinuxSeccompAction::ScmpActAllow
            | LinuxSeccompAction::ScmpActLog
            | LinuxSeccompAction::ScmpActTrace
    );
    if lenient || profile.default_errno_ret() == Some(libc::ENOSYS.cast_unsigned()) {
        return Newest::default();
    }
    let largest = |arch| {
        let rules = profile.syscalls().iter().flatten();
        let names = rules.flat_map(LinuxSyscall::names);
        let numbers = names.filter_map(|name| {
            let call = ScmpSyscall::from_name_by_arch(name, arch).ok()?;
            // Negative for one that only other architectures have.
            u32::try_from(i32::from(call)).ok()
        });
        numbers.max()
    };
    let named = |arch| {
        let mut all = profile.architectures().iter().flatten();
        all.any(|named| *named == arch).then_some(())
    };
    Newest {
        // The filter is for this one even if the profile does not say so.
        x86_64: largest(ScmpArch::X8664),
        x32: named(Arch::ScmpArchX32).and_then(|()| largest(ScmpArch::X32)),
        i386: named(Arch::ScmpArchX86).and_then(|()| largest(ScmpArch::X86)),
    }
}

/// What goes before a filter, which is what follows.
fn before(newest: &Newest) -> Vec<libc::sock_filter> {
    use libc::{BPF_ABS, BPF_JEQ, BPF_JGT, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET, BPF_W};
    let instruction = |code: u32, k, jt, jf| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let load = |offset| instruction(BPF_LD | BPF_W | BPF_ABS, offset, 0, 0);
    let jump = |test, k, yes, no| instruction(BPF_JMP | test | BPF_K, k, yes, no);
    let mut program = Vec::new();
    // One section of six for each: those that are not of its ABI go past it.
    for (architecture, bit, newest) in [
        (X86_64, 0, newest.x86_64),
        (X86_64, X32_BIT, newest.x32),
        (I386, 0, newest.i386),
    ] {
        let Some(newest) = newest else { continue };
        let (if_set, if_clear) = if bit == 0 { (2, 0) } else { (0, 2) };
        // i386 has no such bit, and none of its numbers reaches it.
        let (if_set, if_clear) = match architecture {
            I386 => (0, 0),
            _ => (if_set, if_clear),
        };
        program.extend([
            load(ARCHITECTURE),
            jump(BPF_JEQ, architecture, 0, 4),
            load(NUMBER),
            jump(BPF_JSET, X32_BIT, if_set, if_clear),
            jump(BPF_JGT, newest, 0, 1),
            instruction(BPF_RET | BPF_K, NO_SUCH_CALL, 0, 0),
        ]);
    }
    program
}

#[cfg(test)]
mod testing {
    use super::*;

    pub fn profile(json: serde_json::Value) -> LinuxSeccomp {
        serde_json::from_value(json).unwrap()
    }

    /// A system call as a filter sees it.
    #[derive(Debug, Default)]
    pub struct Call {
        pub architecture: u32,
        pub number: u32,
        pub arguments: [u64; 6],
    }

    impl Call {
        fn word(&self, offset: u32) -> u32 {
            let argument = |offset: u32| self.arguments[(offset - 16) as usize / 8];
            match offset {
                NUMBER => self.number,
                ARCHITECTURE => self.architecture,
                lower if lower % 8 == 0 => argument(lower) as u32,
                upper => (argument(upper) >> 32) as u32,
            }
        }
    }

    /// Runs a filter, or a part of one, on one system call: what it returns, or `None` where it leaves that to what follows.
    pub fn run(program: &[libc::sock_filter], call: &Call) -> Option<u32> {
        let (mut at, mut loaded) = (0, 0);
        while let Some(step) = program.get(at) {
            at += 1;
            let taken = match u32::from(step.code) {
                0x20 => {
                    loaded = call.word(step.k);
                    continue;
                }
                0x54 => {
                    loaded &= step.k;
                    continue;
                }
                0x05 => {
                    at += step.k as usize;
                    continue;
                }
                0x15 => loaded == step.k,
                0x25 => loaded > step.k,
                0x35 => loaded >= step.k,
                0x45 => loaded & step.k != 0,
                0x06 => return Some(step.k),
                other => panic!("{other:#x}"),
            };
            at += usize::from(if taken { step.jt } else { step.jf });
        }
        assert_eq!(at, program.len(), "a jump beyond the end");
        None
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::testing::{Call, profile};
    use super::*;

    fn run(program: &[libc::sock_filter], architecture: u32, number: u32) -> Option<u32> {
        let call = Call {
            architecture,
            number,
            ..Call::default()
        };
        testing::run(program, &call)
    }

    fn strict(architectures: &[&str]) -> LinuxSeccomp {
        profile(json!({
            "defaultAction": "SCMP_ACT_ERRNO", "architectures": architectures,
            "syscalls": [
                { "names": ["read", "statx", "nonsense"], "action": "SCMP_ACT_ALLOW" },
                // The newest one is forbidden, and known.
                { "names": ["clone3"], "action": "SCMP_ACT_ERRNO" },
            ],
        }))
    }

    #[test]
    fn what_is_newer_than_all_that_is_named_does_not_exist() {
        let all = strict(&["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]);
        let program = before(&newest(&all));
        // clone3 is 435 everywhere.
        for (architecture, number) in [(X86_64, 0), (X86_64, X32_BIT), (I386, 0)] {
            for known in [0, 1, 39, 434, 435] {
                assert_eq!(run(&program, architecture, number | known), None, "{known}");
            }
            for unknown in [436, 1000, X32_BIT - 1] {
                let said = run(&program, architecture, number | unknown);
                assert_eq!(said, Some(NO_SUCH_CALL), "{unknown}");
            }
        }
        // ARM's filter is the profile's, and so is what no kernel says.
        assert_eq!(run(&program, 0x4000_0028, 1000), None);
    }

    #[test]
    fn only_what_a_profile_is_for_is_looked_at() {
        let native = Newest {
            x86_64: Some(435),
            ..Newest::default()
        };
        for architectures in [&[][..], &["SCMP_ARCH_X86_64"], &["SCMP_ARCH_AARCH64"]] {
            assert_eq!(newest(&strict(architectures)), native);
        }
        let program = before(&native);
        assert_eq!(run(&program, X86_64, 1000), Some(NO_SUCH_CALL));
        assert_eq!(run(&program, X86_64, X32_BIT | 1000), None);
        assert_eq!(run(&program, I386, 1000), None);
    }

    #[test]
    fn a_profile_that_lets_through_or_says_so_itself_or_names_nothing_is_left_alone() {
        for (default, errno) in [
            ("SCMP_ACT_ALLOW", Value::Null),
            ("SCMP_ACT_LOG", Value::Null),
            ("SCMP_ACT_TRACE", Value::Null),
            ("SCMP_ACT_ERRNO", 38.into()),
        ] {
            let profile = profile(json!({
                "defaultAction": default, "defaultErrnoRet": errno,
                "syscalls": [{ "names": ["read"], "action": "SCMP_ACT_KILL" }],
            }));
            assert_eq!(newest(&profile), Newest::default(), "{default}");
            assert!(before(&newest(&profile)).is_empty());
        }
        let nothing = json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [{ "names": ["nonsense"], "action": "SCMP_ACT_ALLOW" }],
        });
        assert_eq!(newest(&profile(nothing)), Newest::default());
        for action in ["SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_TRAP"] {
            let one = json!({
                "defaultAction": action, "defaultErrnoRet": 5,
                "syscalls": [{ "names": ["write"], "action": "SCMP_ACT_ALLOW" }],
            });
            assert_eq!(newest(&profile(one)).x86_64, Some(1), "{action}");
        }
    }

    #[test]
    fn a_profile_becomes_a_program_and_one_that_makes_no_sense_an_error() {
        let args = json!([
            { "index": 0, "value": 1, "op": "SCMP_CMP_EQ" },
            { "index": 0, "value": 2, "op": "SCMP_CMP_EQ" },
            { "index": 1, "value": 15, "valueTwo": 3, "op": "SCMP_CMP_MASKED_EQ" },
        ]);
        let with = |rule: Value| {
            by_libseccomp(&profile(json!({
                "defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
                "syscalls": [rule],
            })))
        };
        let good = with(
            json!({ "names": ["read", "nonsense"], "action": "SCMP_ACT_ALLOW", "args": args }),
        );
        assert!(good.unwrap().len() > 4);
        let redundant = with(json!({ "names": ["read"], "action": "SCMP_ACT_ERRNO" }));
        assert!(!redundant.unwrap().is_empty());
        let far = json!([{ "index": 6, "value": 1, "op": "SCMP_CMP_EQ" }]);
        let error = with(json!({ "names": ["read"], "action": "SCMP_ACT_ALLOW", "args": far }));
        assert!(error.unwrap_err().to_string().contains("rule for read"));
        let large = json!({ "names": ["read"], "action": "SCMP_ACT_TRACE", "errnoRet": 70000 });
        assert!(matches!(with(large), Err(FilterError::Trace(70000))));
    }
}
