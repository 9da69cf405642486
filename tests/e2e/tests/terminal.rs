//! `-t`: terminals.

use crate::host::{Host, busybox, fail, succeed};
use crate::pty::Terminal;

#[test]
fn a_shell_with_a_terminal_is_interactive() {
    let host = Host::new();
    let image = busybox();
    let mut terminal = Terminal::start(host.command(["run", "--rm", "-it", &image, "sh"]), 91, 33);
    terminal.expect("# ");
    terminal.type_("tty; stty size; echo TERM=$TERM\r");
    terminal.expect("/dev/pts/0\r\n33 91\r\nTERM=xterm\r\n");
    assert!(!terminal.is_cooked(), "the person's terminal must be raw");

    terminal.resize(120, 40);
    terminal.type_("while test \"$(stty size)\" != '40 120'; do sleep 0.1; done; echo re''sized\r");
    terminal.expect("resized\r\n");

    // Until the command runs, the shell's line editor has the terminal in raw mode, where an interrupt is a character.
    // What says so is what is to be interrupted: it has the terminal by then.
    terminal.type_("sh -c \"echo sle''eping; exec sleep 1000\"\r");
    terminal.expect("sleeping\r\n");
    terminal.type_("\x03");
    terminal.expect("# ");
    terminal.type_("echo interrupted with $?; exit 5\r");
    terminal.expect("interrupted with 130\r\n");
    assert_eq!(terminal.child.wait().unwrap().code(), Some(5));
    assert!(
        terminal.is_cooked(),
        "the person's terminal must be what it was"
    );
}

#[test]
fn exec_gives_a_terminal_too() {
    let host = Host::new();
    let id = host.detached(&[], &["sleep", "1000"]);
    let mut terminal = Terminal::start(host.command(["exec", "-it", &id, "sh"]), 80, 24);
    terminal.expect("# ");
    terminal.type_("stty size; tty\r");
    terminal.expect("24 80\r\n/dev/pts/0\r\n");
    // At the prompt, where the end of the input is the line editor's to see.
    terminal.expect("# ");
    terminal.type_("\x04");
    assert_eq!(terminal.child.wait().unwrap().code(), Some(0));
    assert!(terminal.is_cooked());
    succeed(&host.cloison(["rm", "-f", &id]));
}

#[test]
fn a_terminal_without_a_person_still_is_one() {
    let host = Host::new();
    assert_eq!(
        host.shell(&["-t"], "test -t 0 && test -t 1 && echo yes"),
        "yes\r\n"
    );
    let id = host.detached(&["-t"], &["sh", "-c", "test -t 1 && echo yes >&2"]);
    succeed(&host.cloison(["wait", &id]));
    assert_eq!(succeed(&host.cloison(["logs", &id])), "yes\r\n");
    succeed(&host.cloison(["rm", &id]));
    fail(&host.run(&["-it"], &["true"]), 125, &["not a terminal"]);
}
