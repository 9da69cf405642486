use libseccomp::ScmpSyscall;
use serde_json::{Value, json};

use super::super::testing::{Call, profile, run};
use super::super::{by_libseccomp, program};
use super::*;

/// Numbers without order, the same in every run (Knuth's MMIX).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % sides
    }

    fn one_of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.roll(all.len())]
    }
}

/// System calls of all three ABIs, and some of none.
fn names() -> Vec<String> {
    let known = (0..470).filter_map(|number| ScmpSyscall::from(number).get_name().ok());
    let others = [
        "socketcall",
        "ipc",
        "recv",
        "send",
        "_llseek",
        "chown32",
        "clock_gettime64",
        "nonsense",
    ];
    known.chain(others.map(String::from)).collect()
}

const OPERATORS: [&str; 7] = ["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"];
const VALUES: [u64; 12] = [
    0,
    1,
    2,
    8,
    0x20000,
    0x20008,
    0x7e02_0000,
    u32::MAX as u64,
    1 << 32,
    (1 << 32) + 8,
    (1 << 63) + 1,
    u64::MAX,
];

fn arguments(dice: &mut Dice) -> Value {
    let count = *dice.one_of(&[0, 0, 0, 1, 1, 2, 3]);
    let one = |_| {
        json!({
            "index": dice.roll(6), "op": format!("SCMP_CMP_{}", dice.one_of(&OPERATORS)),
            "value": dice.one_of(&VALUES), "valueTwo": dice.one_of(&VALUES),
        })
    };
    (0..count).map(one).collect()
}

/// A profile like those that there are: a default, and rules of which hardly any contradict each other.
fn any_profile(dice: &mut Dice, names: &[String]) -> LinuxSeccomp {
    let actions = [
        "ALLOW",
        "ERRNO",
        "KILL",
        "KILL_PROCESS",
        "TRAP",
        "LOG",
        "TRACE",
    ];
    let mut left = names.to_vec();
    let mut rules = Vec::new();
    for _ in 0..2 + dice.roll(12) {
        let most = left.len().min(200);
        if most < 2 {
            break;
        }
        let count = 1 + dice.roll(most);
        let names: Vec<_> = (0..count)
            .map(|_| left.swap_remove(dice.roll(left.len())))
            .collect();
        rules.push(json!({
            "names": names, "action": format!("SCMP_ACT_{}", dice.one_of(&actions)), "errnoRet": dice.roll(100),
            "args": arguments(dice),
        }));
    }
    // The same system calls once more, asking for something else, and at times for something else to be done.
    let again = rules[0].clone();
    let other = &rules[dice.roll(rules.len())];
    rules.push(json!({ "args": arguments(dice), "names": again["names"], "action": other["action"], "errnoRet": other["errnoRet"] }));
    let all = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"];
    let architectures = &all[..dice.roll(4)];
    profile(json!({
        "defaultAction": format!("SCMP_ACT_{}", dice.one_of(&actions)), "architectures": architectures, "syscalls": rules,
    }))
}

#[track_caller]
fn same(profile: &LinuxSeccomp, dice: &mut Dice) {
    let (ours, theirs) = (
        program::compile(profile).unwrap(),
        by_libseccomp(profile).unwrap(),
    );
    let usual = 0..500;
    let numbers = usual
        .clone()
        .chain(usual.map(|number| number | X32_BIT))
        .chain([
            X32_BIT + 512,
            X32_BIT + 547,
            1_000_000,
            u32::MAX - 1,
            u32::MAX,
        ]);
    for number in numbers {
        for architecture in [X86_64, I386, 0x4000_0028] {
            for _ in 0..4 {
                let arguments = [(); 6].map(|()| {
                    let near = [0, 1, u64::MAX, 1 << 32];
                    dice.one_of(&VALUES).wrapping_add(*dice.one_of(&near))
                });
                let call = Call {
                    number,
                    architecture,
                    arguments,
                };
                assert_eq!(
                    run(&ours, &call),
                    run(&theirs, &call),
                    "{call:x?} {profile:?}"
                );
            }
        }
    }
}

#[test]
fn a_program_does_what_libseccomps_does() {
    let names = names();
    let mut dice = Dice(1);
    let mut compiled = 0;
    for _ in 0..60 {
        let profile = any_profile(&mut dice, &names);
        if program::compile(&profile).is_some() {
            compiled += 1;
            same(&profile, &mut dice);
        }
    }
    assert!(compiled > 30, "{compiled}");
}

#[test]
fn rules_that_exclude_each_other_may_have_different_actions() {
    let argument = |index: usize, op: &str, value: u64| json!({ "index": index, "op": format!("SCMP_CMP_{op}"), "value": value });
    let rule = |action: &str, errno: u32, arguments: Value| {
        let names = ["socket", "personality"];
        json!({ "names": names, "action": format!("SCMP_ACT_{action}"), "errnoRet": errno, "args": arguments })
    };
    let netlink = json!([argument(0, "EQ", 16), argument(2, "EQ", 9)]);
    let mut rules = vec![
        rule("ERRNO", 22, netlink),
        rule("ALLOW", 0, json!([argument(2, "NE", 9)])),
        rule("ALLOW", 0, json!([argument(0, "NE", 16)])),
        json!({ "names": ["socketcall"], "action": "SCMP_ACT_ALLOW" }),
    ];
    // libseccomp answers differently for different orders; these rules mean one thing.
    for _ in 0..rules.len() {
        rules.rotate_left(1);
        let profile = profile(json!({
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38, "syscalls": rules,
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        }));
        let program = program::compile(&profile).unwrap();
        for first in [0, 16, 17, 1 << 32 | 16] {
            for third in [0, 9, 1 << 32 | 9] {
                let call = |architecture, number| Call {
                    architecture,
                    number,
                    arguments: [first, 0, third, 0, 0, 0],
                };
                let refused = first == 16 && third == 9;
                let said = run(&program, &call(X86_64, 41)).unwrap();
                assert_eq!(said == libc::SECCOMP_RET_ERRNO | 22, refused);
                assert_eq!(said == libc::SECCOMP_RET_ALLOW, !refused);
                let low = first as u32 == 16 && third as u32 == 9;
                let said = run(&program, &call(I386, 359)).unwrap();
                assert_eq!(said == libc::SECCOMP_RET_ERRNO | 22, low);
                let said = run(&program, &call(I386, SOCKETCALL)).unwrap();
                assert_eq!(said, libc::SECCOMP_RET_ALLOW);
            }
        }
    }
}

#[test]
fn calls_that_are_many_in_one_are_told_apart() {
    let mut dice = Dice(2);
    for (action, default) in [("ALLOW", "ERRNO"), ("ERRNO", "ALLOW")] {
        for argument in [
            json!([]),
            json!([{ "index": 0, "op": "SCMP_CMP_NE", "value": 40 }]),
        ] {
            let all = ScmpArch::X86;
            let many = (-224..-100)
                .filter_map(|number| ScmpSyscall::from(number).get_name_by_arch(all).ok());
            let profile = profile(json!({
                "defaultAction": format!("SCMP_ACT_{default}"), "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "syscalls": [{ "names": many.collect::<Vec<_>>(), "action": format!("SCMP_ACT_{action}"), "args": argument }],
            }));
            same(&profile, &mut dice);
        }
    }
}

#[test]
fn what_is_libseccomps_to_decide_or_to_refuse_is_left_to_it() {
    let with = |architecture: &str, rules: Value| {
        compile(&profile(json!({
            "defaultAction": "SCMP_ACT_ERRNO", "architectures": [architecture], "syscalls": rules,
        })))
    };
    let rule = |action: &str, argument: Value| json!({ "names": ["read"], "action": action, "args": argument });
    let first = |value: u64| json!([{ "index": 0, "value": value, "op": "SCMP_CMP_EQ" }]);
    let native = "SCMP_ARCH_X86_64";
    assert!(with(native, json!([rule("SCMP_ACT_ALLOW", first(1))])).is_some());
    let second = json!([{ "index": 1, "value": 2, "op": "SCMP_CMP_EQ" }]);
    let contradiction = json!([
        rule("SCMP_ACT_ALLOW", first(1)),
        rule("SCMP_ACT_KILL", second)
    ]);
    assert!(with(native, contradiction).is_none());
    let always = json!([
        rule("SCMP_ACT_ALLOW", json!([])),
        rule("SCMP_ACT_KILL", json!([]))
    ]);
    assert!(with(native, always).is_none());
    let far = json!([{ "index": 6, "value": 1, "op": "SCMP_CMP_EQ" }]);
    assert!(with(native, json!([rule("SCMP_ACT_ALLOW", far)])).is_none());
    assert!(with("SCMP_ARCH_S390X", json!([])).is_none());
    let large = json!([{ "names": ["read"], "action": "SCMP_ACT_TRACE", "errnoRet": 70000 }]);
    assert!(with(native, large).is_none());
}
