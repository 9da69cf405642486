use serde_json::{Value, json};

use super::*;

/// What the kernel would decide: runs the program, instruction by instruction.
fn decide(program: &[u64], kind: i32, major: i32, minor: i32, access: i32) -> bool {
    let context = [kind | access << 16, major, minor];
    let mut registers = [0; 6];
    let mut next = 0;
    loop {
        let instruction = program[next];
        next += 1;
        let to = (instruction >> 8 & 0xf) as usize;
        let from = (instruction >> 12 & 0xf) as usize;
        let distance = (instruction >> 16 & 0xffff) as usize;
        let constant = (instruction >> 32) as u32 as i32;
        let jumps = match instruction & 0xff {
            LOAD_WORD => {
                registers[to] = context[distance / 4];
                false
            }
            MOVE => {
                registers[to] = constant;
                false
            }
            MOVE_REGISTER => {
                registers[to] = registers[from];
                false
            }
            AND => {
                registers[to] &= constant;
                false
            }
            SHIFT_RIGHT => {
                registers[to] = (registers[to].cast_unsigned() >> constant).cast_signed();
                false
            }
            JUMP => true,
            JUMP_UNEQUAL => registers[to] != constant,
            JUMP_ANY_BIT => registers[to] & constant != 0,
            EXIT => return registers[0] != 0,
            other => panic!("operation {other:#x}"),
        };
        if jumps {
            next += distance;
        }
    }
}

fn given(devices: Value) -> Result<Vec<u64>> {
    let devices: Vec<LinuxDeviceCgroup> = serde_json::from_value(devices).unwrap();
    Ok(program(&rules(&devices)?))
}

#[test]
fn without_rules_only_the_usual_devices_can_be_used() {
    let program = given(json!([])).unwrap();
    for (major, minor) in [(1, 3), (1, 5), (1, 9), (5, 0), (5, 2), (136, 7), (10, 200)] {
        assert!(decide(&program, CHARACTER, major, minor, READ | WRITE));
    }
    for (kind, major, minor) in [(CHARACTER, 1, 1), (CHARACTER, 10, 229), (BLOCK, 1, 3)] {
        assert!(!decide(&program, kind, major, minor, READ));
        assert!(decide(&program, kind, major, minor, MKNOD));
        assert!(!decide(&program, kind, major, minor, MKNOD | WRITE));
    }
}

#[test]
fn later_rules_go_before_earlier_ones() {
    let fuse = json!({"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm"});
    let nothing = json!({"allow": false, "access": "rwm"});
    let program = given(json!([nothing, fuse])).unwrap();
    assert!(decide(&program, CHARACTER, 10, 229, READ | WRITE));
    assert!(!decide(&program, CHARACTER, 10, 228, READ));
    assert!(!decide(&program, BLOCK, 10, 229, READ));
    let program = given(json!([fuse, nothing])).unwrap();
    assert!(!decide(&program, CHARACTER, 10, 229, READ));
    let everything = json!({"allow": true});
    let program = given(json!([nothing, everything])).unwrap();
    assert!(decide(&program, BLOCK, 253, 1, READ | WRITE | MKNOD));
}

#[test]
fn a_device_that_is_denied_for_writing_cannot_be_opened_for_both() {
    let disk = |allow, access| json!({"allow": allow, "type": "b", "major": 8, "access": access});
    let program = given(json!([disk(true, "rwm"), disk(false, "w")])).unwrap();
    assert!(decide(&program, BLOCK, 8, 0, READ));
    assert!(!decide(&program, BLOCK, 8, 0, WRITE));
    assert!(!decide(&program, BLOCK, 8, 0, READ | WRITE));
}

#[test]
fn rules_that_each_allow_a_part_allow_the_whole() {
    let disk =
        |access| json!({"allow": true, "type": "b", "major": 8, "minor": 1, "access": access});
    let program = given(json!([disk("r"), disk("w")])).unwrap();
    assert!(decide(&program, BLOCK, 8, 1, READ | WRITE | MKNOD));
    let program = given(json!([disk("r")])).unwrap();
    assert!(!decide(&program, BLOCK, 8, 1, READ | WRITE));
}

#[test]
fn minus_one_means_any_number_and_no_access_means_nothing() {
    let any = json!({"allow": true, "type": "c", "major": 10, "minor": -1, "access": "r"});
    let program = given(json!([any])).unwrap();
    assert!(decide(&program, CHARACTER, 10, 99, READ));
    assert!(!decide(&program, CHARACTER, 11, 99, READ));
    let program = given(json!([{"allow": true, "type": "c", "major": 10}])).unwrap();
    assert!(!decide(&program, CHARACTER, 10, 99, READ));
}

#[test]
fn rules_that_make_no_sense_are_refused() {
    for rule in [
        json!({"allow": true, "type": "p", "access": "r"}),
        json!({"allow": true, "type": "c", "major": -2, "access": "r"}),
        json!({"allow": true, "type": "c", "major": 4_294_967_296_i64, "access": "r"}),
        json!({"allow": true, "type": "c", "access": "rx"}),
    ] {
        assert!(matches!(given(json!([rule])), Err(Error::Invalid { .. })));
    }
}

/// What the rules say, one after the other as they are written: of what is asked for, nothing is allowed until a rule allows it.
fn read_one_by_one(rules: &[Rule], kind: i32, major: i32, minor: i32, access: i32) -> bool {
    let mut allowed = 0;
    for rule in rules.iter().chain(&DEFAULTS) {
        let speaks_of = |mine: Option<i32>, asked| mine.is_none_or(|mine| mine == asked);
        if speaks_of(rule.kind, kind)
            && speaks_of(rule.major, major)
            && speaks_of(rule.minor, minor)
        {
            match rule.allow {
                true => allowed |= rule.access,
                false => allowed &= !rule.access,
            }
        }
    }
    access & !allowed == 0
}

#[test]
fn what_is_left_out_of_a_program_decides_nothing() {
    let mut known = Vec::new();
    for allow in [true, false] {
        for (kind, major, minor) in [
            (None, None, None),
            (Some(CHARACTER), None, None),
            (Some(BLOCK), Some(8), None),
            (Some(BLOCK), Some(8), Some(1)),
            (Some(CHARACTER), Some(1), Some(3)),
        ] {
            for access in [ALL, READ | WRITE, MKNOD] {
                known.push(Rule {
                    allow,
                    kind,
                    major,
                    minor,
                    access,
                });
            }
        }
    }
    for first in &known {
        for second in &known {
            for third in &known {
                let rules = [*first, *second, *third];
                let program = program(&rules);
                for (kind, major, minor) in [
                    (BLOCK, 8, 1),
                    (BLOCK, 8, 2),
                    (CHARACTER, 1, 3),
                    (CHARACTER, 9, 9),
                ] {
                    for access in [READ, WRITE | MKNOD, ALL] {
                        assert_eq!(
                            decide(&program, kind, major, minor, access),
                            read_one_by_one(&rules, kind, major, minor, access),
                            "{rules:?} on {kind} {major}:{minor} for {access}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn the_rules_that_callers_usually_give_make_the_program_of_no_rules() {
    let device = |major, minor| json!({"allow": true, "type": "c", "major": major, "minor": minor, "access": "rwm"});
    let mut usual = vec![json!({"allow": false, "access": "rwm"})];
    for (major, minor) in [(1, 5), (1, 3), (1, 9), (1, 8), (5, 0), (5, 1)] {
        usual.push(device(major, minor));
    }
    usual.push(json!({"allow": false, "type": "c", "major": 10, "minor": 229, "access": "rwm"}));
    assert_eq!(given(json!(usual)).unwrap(), program(&[]));
    usual.push(device(10, 229));
    assert_ne!(given(json!(usual)).unwrap(), program(&[]));
}
