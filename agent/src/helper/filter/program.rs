//! Profiles as programs of classic BPF, for those of which no two rules for a system call contradict each other, which is nearly all:
//! then the order of the rules is of no matter. libseccomp takes ten milliseconds for what takes less than one here, and its programs look
//! through all system calls where these search for one. What a rule means is libseccomp's to say: tests compare the two, but for conditions
//! that exclude each other and lead to different actions, where its answer depends on their order.
//!
//! (libseccomp(3), seccomp_rule_add(3); Linux, Documentation/userspace-api/seccomp_filter.rst.)

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JMP, BPF_K, BPF_LD, BPF_RET,
    BPF_W, sock_filter,
};
use libcontainer::oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompOperator, LinuxSyscall,
};
use libseccomp::{ScmpAction, ScmpArch, ScmpSyscall};

use super::{ARCHITECTURE, I386, NUMBER, X32_BIT, X86_64};

/// Where the arguments are in seccomp_data (linux/seccomp.h): 64 bits each, the lower half first.
const ARGUMENTS: u32 = 16;
const MAX_ARGUMENTS: u32 = 6;

/// Most instructions of a program: the kernel takes 4,096 (BPF_MAXINSNS), and some go before these.
const MAX_INSTRUCTIONS: usize = 4000;

/// i386's system calls for sockets and System V IPC, which are many in one: the first argument says which.
const SOCKETCALL: u32 = 102;
const IPC: u32 = 117;

/// libseccomp's numbers for those that go through one of these, and the number of their own that Linux 4.3 and 5.1 gave to some.
const MULTIPLEXED: [(i32, Option<u32>); 32] = [
    (-101, Some(359)),
    (-102, Some(361)),
    (-103, Some(362)),
    (-104, Some(363)),
    (-105, None),
    (-106, Some(367)),
    (-107, Some(368)),
    (-108, Some(360)),
    (-109, None),
    (-110, None),
    (-111, Some(369)),
    (-112, Some(371)),
    (-113, Some(373)),
    (-114, Some(366)),
    (-115, Some(365)),
    (-116, Some(370)),
    (-117, Some(372)),
    (-118, Some(364)),
    (-119, Some(337)),
    (-120, Some(345)),
    (-201, None),
    (-202, Some(393)),
    (-203, Some(394)),
    (-204, None),
    (-211, Some(400)),
    (-212, Some(401)),
    (-213, Some(399)),
    (-214, Some(402)),
    (-221, Some(397)),
    (-222, Some(398)),
    (-223, Some(395)),
    (-224, Some(396)),
];

/// What is asked of an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Condition {
    index: u32,
    test: Test,
    mask: u64,
    value: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Test {
    Equal,
    NotEqual,
    Greater,
    GreaterOrEqual,
    Less,
    LessOrEqual,
}

/// What becomes of a system call.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Always(u32),
    /// What goes with the list that holds, and what happens by default if none does.
    If(Vec<(u32, Conditions)>),
}

/// All of these hold.
type Conditions = Vec<Condition>;

/// System calls of one ABI by their numbers.
type Calls = BTreeMap<u32, Verdict>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Abi {
    X86_64,
    X32,
    I386,
}

/// The program of a profile; `None` for one that is libseccomp's to compile, or to refuse.
pub fn compile(profile: &LinuxSeccomp) -> Option<Vec<sock_filter>> {
    let default = verdict(profile.default_action(), profile.default_errno_ret())?;
    let mut abis = vec![Abi::X86_64];
    for architecture in profile.architectures().iter().flatten() {
        let abi = match architecture {
            Arch::ScmpArchNative | Arch::ScmpArchX86_64 => Abi::X86_64,
            Arch::ScmpArchX86 => Abi::I386,
            Arch::ScmpArchX32 => Abi::X32,
            _ => return None,
        };
        if !abis.contains(&abi) {
            abis.push(abi);
        }
    }
    // What an ABI that is not among them meets, as libseccomp has it.
    let unknown = || vec![statement(BPF_RET | BPF_K, libc::SECCOMP_RET_KILL_THREAD)];
    let section = |abi: Abi| match abis.contains(&abi) {
        true => Some(search(&calls(profile, abi, default)?, abi, default)),
        // A tracer has a system call left out by giving it the number -1.
        false if abi == Abi::X32 => {
            let left_out = vec![statement(BPF_RET | BPF_K, default)];
            Some(either(BPF_JEQ, u32::MAX, left_out, unknown()))
        }
        false => Some(unknown()),
    };
    let (x86_64, x32, i386) = (
        section(Abi::X86_64)?,
        section(Abi::X32)?,
        section(Abi::I386)?,
    );
    let load_number = statement(BPF_LD | BPF_W | BPF_ABS, NUMBER);
    let mut both = vec![load_number];
    both.extend(either(BPF_JGE, X32_BIT, x32, x86_64));
    let mut others = vec![load_number];
    others.extend(i386);
    let others = either(BPF_JEQ, I386, others, unknown());
    let mut program = vec![statement(BPF_LD | BPF_W | BPF_ABS, ARCHITECTURE)];
    program.extend(either(BPF_JEQ, X86_64, both, others));
    // What many system calls ask of their arguments is here as often as there are such; libseccomp has it once.
    (program.len() <= MAX_INSTRUCTIONS).then_some(program)
}

/// What a filter returns for an action.
fn verdict(action: LinuxSeccompAction, errno: Option<u32>) -> Option<u32> {
    Some(match super::action(action, errno).ok()? {
        ScmpAction::KillThread => libc::SECCOMP_RET_KILL_THREAD,
        ScmpAction::KillProcess => libc::SECCOMP_RET_KILL_PROCESS,
        ScmpAction::Trap => libc::SECCOMP_RET_TRAP,
        ScmpAction::Errno(errno) => libc::SECCOMP_RET_ERRNO | u32::from(u16::try_from(errno).ok()?),
        ScmpAction::Trace(message) => libc::SECCOMP_RET_TRACE | u32::from(message),
        ScmpAction::Allow => libc::SECCOMP_RET_ALLOW,
        ScmpAction::Log => libc::SECCOMP_RET_LOG,
        _ => return None,
    })
}

/// The system calls of an ABI that are not the default's. `None` where rules contradict each other.
fn calls(profile: &LinuxSeccomp, abi: Abi, default: u32) -> Option<Calls> {
    let mut calls = Calls::new();
    for rule in profile.syscalls().iter().flatten() {
        let action = verdict(rule.action(), rule.errno_ret())?;
        if action == default {
            continue;
        }
        let lists = conditions(rule, abi)?;
        for name in rule.names() {
            for (number, first) in numbers(name, abi) {
                for list in &lists {
                    let others = list.iter().filter(|c| first.is_none() || c.index != 0);
                    let list = first.into_iter().chain(others.copied()).collect();
                    add(&mut calls, number, action, list)?;
                }
            }
        }
    }
    let clear = |verdict: &Verdict| match verdict {
        Verdict::Always(_) => true,
        Verdict::If(lists) => lists.iter().enumerate().all(|(at, (action, list))| {
            let mut others = lists[..at].iter();
            others.all(|(other, others)| action == other || exclude(list, others))
        }),
    };
    calls.values().all(clear).then_some(calls)
}

/// One more rule for a system call. One that asks for nothing goes before all that ask for something.
fn add(calls: &mut Calls, number: u32, action: u32, list: Conditions) -> Option<()> {
    let verdict = match list.is_empty() {
        true => Verdict::Always(action),
        false => Verdict::If(vec![(action, list)]),
    };
    match calls.entry(number) {
        Entry::Vacant(entry) => {
            entry.insert(verdict);
        }
        Entry::Occupied(mut entry) => match (entry.get_mut(), verdict) {
            (Verdict::Always(known), Verdict::Always(action)) if *known != action => return None,
            (Verdict::Always(_), _) => {}
            (known @ Verdict::If(_), always @ Verdict::Always(_)) => *known = always,
            (Verdict::If(known), Verdict::If(lists)) => known.extend(lists),
        },
    }
    Some(())
}

/// Whether it can be seen that these never hold at the same time.
fn exclude(one: &[Condition], other: &[Condition]) -> bool {
    one.iter().any(|one| {
        other.iter().any(|other| {
            let alike = one.index == other.index && one.mask == other.mask;
            alike
                && match (one.test, other.test) {
                    (Test::Equal, Test::Equal) => one.value != other.value,
                    (Test::Equal, Test::NotEqual) | (Test::NotEqual, Test::Equal) => {
                        one.value == other.value
                    }
                    _ => false,
                }
        })
    })
}

/// The numbers of a system call, and what the first argument must be for it to be that one.
fn numbers(name: &str, abi: Abi) -> Vec<(u32, Option<Condition>)> {
    let architecture = match abi {
        Abi::X86_64 => ScmpArch::X8664,
        Abi::X32 => ScmpArch::X32,
        Abi::I386 => ScmpArch::X86,
    };
    // Profiles name system calls of all kernels and architectures.
    let Ok(call) = ScmpSyscall::from_name_by_arch(name, architecture) else {
        return Vec::new();
    };
    let call = i32::from(call);
    if let Ok(number) = u32::try_from(call) {
        return vec![(number, None)];
    }
    let known = MULTIPLEXED.iter().find(|(number, _)| *number == call);
    let (Abi::I386, Some((_, own))) = (abi, known) else {
        return Vec::new();
    };
    let (shared, which) = match -call {
        call if call > 200 => (IPC, call - 200),
        call => (SOCKETCALL, call - 100),
    };
    let first = Condition {
        index: 0,
        test: Test::Equal,
        mask: u64::MAX,
        value: u64::from(which.cast_unsigned()),
    };
    let own = own.map(|own| (own, None));
    [(shared, Some(first))].into_iter().chain(own).collect()
}

/// What a rule asks of the arguments: several about one argument are rules of their own, as runc has it.
fn conditions(rule: &LinuxSyscall, abi: Abi) -> Option<Vec<Conditions>> {
    let arguments = rule.args().iter().flatten();
    let all: Vec<_> = arguments
        .map(|argument| condition(argument, abi))
        .collect::<Option<_>>()?;
    let twice = all
        .iter()
        .enumerate()
        .any(|(at, one)| all[..at].iter().any(|other| other.index == one.index));
    Some(match twice {
        true => all.into_iter().map(|one| vec![one]).collect(),
        false => vec![all],
    })
}

fn condition(argument: &LinuxSeccompArg, abi: Abi) -> Option<Condition> {
    let index = u32::try_from(argument.index()).ok()?;
    if index >= MAX_ARGUMENTS {
        return None;
    }
    let (mut mask, mut value) = (u64::MAX, argument.value());
    let test = match argument.op() {
        LinuxSeccompOperator::ScmpCmpNe => Test::NotEqual,
        LinuxSeccompOperator::ScmpCmpLt => Test::Less,
        LinuxSeccompOperator::ScmpCmpLe => Test::LessOrEqual,
        LinuxSeccompOperator::ScmpCmpEq => Test::Equal,
        LinuxSeccompOperator::ScmpCmpGe => Test::GreaterOrEqual,
        LinuxSeccompOperator::ScmpCmpGt => Test::Greater,
        // The mask comes first in a profile.
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            (mask, value) = (value, argument.value_two().unwrap_or(0));
            Test::Equal
        }
    };
    if abi != Abi::X86_64 {
        // The arguments of the others have 32 bits.
        mask &= u64::from(u32::MAX);
        value &= u64::from(u32::MAX);
    }
    Some(Condition {
        index,
        test,
        mask,
        value: value & mask,
    })
}

const fn statement(code: u32, k: u32) -> sock_filter {
    jump(code, k, 0, 0)
}

const fn jump(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    }
}

/// `yes` if the test holds, and `no` otherwise; both return.
fn either(test: u32, k: u32, yes: Vec<sock_filter>, no: Vec<sock_filter>) -> Vec<sock_filter> {
    let mut program = match u8::try_from(no.len()) {
        Ok(length) => vec![jump(BPF_JMP | test | BPF_K, k, length, 0)],
        Err(_) => vec![
            jump(BPF_JMP | test | BPF_K, k, 0, 1),
            // A program has at most 4,096 instructions.
            statement(BPF_JMP | BPF_JA, no.len() as u32),
        ],
    };
    program.extend(no);
    program.extend(yes);
    program
}

/// A program that returns the verdict on the number that is loaded.
fn search(calls: &Calls, abi: Abi, default: u32) -> Vec<sock_filter> {
    // The first number of each run of them with one verdict.
    let mut runs = vec![(0, Verdict::Always(default))];
    for (number, verdict) in calls {
        begin(&mut runs, *number, verdict.clone());
        begin(
            &mut runs,
            number.saturating_add(1),
            Verdict::Always(default),
        );
    }
    branch(&runs, abi, default)
}

fn begin(runs: &mut Vec<(u32, Verdict)>, number: u32, verdict: Verdict) {
    runs.pop_if(|(first, _)| *first == number);
    if runs.last().is_none_or(|(_, last)| *last != verdict) {
        runs.push((number, verdict));
    }
}

fn branch(runs: &[(u32, Verdict)], abi: Abi, default: u32) -> Vec<sock_filter> {
    match runs {
        [] => Vec::new(),
        [(_, Verdict::Always(verdict))] => vec![statement(BPF_RET | BPF_K, *verdict)],
        [(_, Verdict::If(lists))] => {
            let mut program: Vec<_> = lists
                .iter()
                .flat_map(|(verdict, list)| all_of(list, abi, *verdict))
                .collect();
            program.push(statement(BPF_RET | BPF_K, default));
            program
        }
        _ => {
            let (below, above) = runs.split_at(runs.len() / 2);
            let first = above[0].0;
            let (below, above) = (branch(below, abi, default), branch(above, abi, default));
            either(BPF_JGE, first, above, below)
        }
    }
}

/// Returns `verdict` if all of these hold, and goes on behind itself otherwise.
fn all_of(list: &[Condition], abi: Abi, verdict: u32) -> Vec<sock_filter> {
    let mut program = vec![statement(BPF_RET | BPF_K, verdict)];
    for condition in list.iter().rev() {
        // At most six, of seven instructions each.
        let past = program.len() as u8;
        let mut test = condition.test(abi, past);
        test.append(&mut program);
        program = test;
    }
    program
}

/// Where a comparison leads.
#[derive(Clone, Copy, PartialEq, Eq)]
enum To {
    /// On to the next one of the condition, or behind it.
    Next,
    Holds,
    Fails,
}

impl Condition {
    /// Goes on behind itself if it holds, and `past` instructions further otherwise.
    fn test(&self, abi: Abi, past: u8) -> Vec<sock_filter> {
        use To::{Fails, Holds, Next};
        let upper = |value: u64| (value >> 32) as u32;
        let lower = |value: u64| value as u32;
        // Comparisons of the upper half, after which the lower one decides, and of the lower half.
        let (first, last): (&[_], _) = match self.test {
            Test::Equal => (&[(BPF_JEQ, Next, Fails)], (BPF_JEQ, Next, Fails)),
            Test::NotEqual => (&[(BPF_JEQ, Next, Holds)], (BPF_JEQ, Fails, Next)),
            Test::Greater => (
                &[(BPF_JGT, Holds, Next), (BPF_JEQ, Next, Fails)],
                (BPF_JGT, Next, Fails),
            ),
            Test::GreaterOrEqual => (
                &[(BPF_JGT, Holds, Next), (BPF_JEQ, Next, Fails)],
                (BPF_JGE, Next, Fails),
            ),
            Test::Less => (
                &[(BPF_JGT, Fails, Next), (BPF_JEQ, Next, Holds)],
                (BPF_JGE, Fails, Next),
            ),
            Test::LessOrEqual => (
                &[(BPF_JGT, Fails, Next), (BPF_JEQ, Next, Holds)],
                (BPF_JGT, Fails, Next),
            ),
        };
        let at = ARGUMENTS + self.index * 8;
        let half = |offset, mask| {
            let masked = (mask != u32::MAX).then(|| statement(BPF_ALU | BPF_AND | BPF_K, mask));
            let load = statement(BPF_LD | BPF_W | BPF_ABS, offset);
            [load].into_iter().chain(masked)
        };
        let mut steps: Vec<(sock_filter, To, To)> = Vec::new();
        // An upper half that nothing is asked of decides nothing.
        if abi == Abi::X86_64 && upper(self.mask) != 0 {
            steps.extend(half(at + 4, upper(self.mask)).map(|step| (step, Next, Next)));
            steps.extend(first.iter().map(|(test, yes, no)| {
                let step = statement(BPF_JMP | test | BPF_K, upper(self.value));
                (step, *yes, *no)
            }));
        }
        steps.extend(half(at, lower(self.mask)).map(|step| (step, Next, Next)));
        let (test, yes, no) = last;
        let step = statement(BPF_JMP | test | BPF_K, lower(self.value));
        steps.push((step, yes, no));
        let count = steps.len();
        let steps = steps.into_iter().enumerate();
        let resolved = steps.map(|(index, (step, yes, no))| {
            let rest = (count - index - 1) as u8;
            let distance = |to| match to {
                Next => 0,
                Holds => rest,
                Fails => rest + past,
            };
            sock_filter {
                jt: distance(yes),
                jf: distance(no),
                ..step
            }
        });
        resolved.collect()
    }
}

#[cfg(test)]
mod tests;
