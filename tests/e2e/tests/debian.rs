//! A whole Debian as an image.

use crate::host::{Host, emulated, image, succeed};
use crate::pty::Terminal;

#[test]
fn debian_runs_its_programs_and_a_shell_with_a_terminal() {
    // The lab's machine has no room for a Debian.
    if emulated() {
        return;
    }
    let host = Host::new();
    let debian = image("debian");
    let run =
        |command: &[&str]| succeed(&host.cloison(["run", "--rm", &debian].iter().chain(command)));
    assert!(run(&["apt-get", "--version"]).starts_with("apt 2."));
    assert_eq!(run(&["perl", "-e", "print 6 * 7"]), "42");
    assert_eq!(
        run(&[
            "sh",
            "-c",
            "find / -xdev -type f | wc -l | awk '{ print ($1 > 5000) }'"
        ]),
        "1\n"
    );
    let mut terminal = Terminal::start(host.command(["run", "--rm", "-it", &debian]), 80, 24);
    terminal.expect("# ");
    terminal.type_("tput cols; dpkg -l | grep -c '^ii  base-files'\r");
    terminal.expect("80\r\n1\r\n");
    terminal.type_("exit 3\r");
    assert_eq!(terminal.child.wait().unwrap().code(), Some(3));
}
