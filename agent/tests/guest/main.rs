//! The agent as PID 1 of a real guest, called through its real protocol, with real containers. Only the way to the host
//! differs: Unix sockets within the guest take the place of vsock. `agent/tests/run` boots this as /init; it prints
//! one line per test and ends the VM.

#![allow(clippy::unwrap_used)]

mod agent;
mod execs;
mod interfaces;
mod limits;
mod lives;
mod preserved;
mod security;
mod streams;

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use agent::Guest;
use cloison_agent::{boot, chain, helper};

/// Longest any test may take; a hang is a failure that says which test it was.
const PATIENCE: Duration = Duration::from_secs(120);

type Test = (
    &'static str,
    fn(Guest) -> Pin<Box<dyn Future<Output = ()> + Send>>,
);

/// Names tests by their functions.
#[macro_export]
macro_rules! tests {
    ($($module:ident :: $name:ident),* $(,)?) => {
        &[$((concat!(stringify!($module), "::", stringify!($name)), |guest| Box::pin($module::$name(guest)))),*]
    };
}

const TESTS: &[Test] = tests![
    lives::hello_agrees_on_the_protocol_and_sets_the_clock,
    lives::cost_of_a_container,
    lives::a_container_runs_and_says_how_it_ended,
    lives::a_container_killed_by_a_signal_says_so,
    lives::every_verb_is_refused_in_the_wrong_state,
    lives::unknown_names_are_not_found,
    lives::a_broken_spec_is_refused_and_leaves_nothing,
    lives::a_program_that_is_not_there_is_not_found,
    lives::a_file_that_cannot_be_executed_is_permission_denied,
    lives::deleting_leaves_nothing_in_the_guest,
    lives::orphans_are_reaped,
    lives::containers_are_created_side_by_side,
    lives::a_lost_connection_changes_nothing,
    lives::a_paused_container_stands_still_and_can_be_killed,
    streams::standard_streams_are_separate,
    streams::megabytes_pass_through_a_container_unchanged,
    streams::stdout_can_be_opened_again_by_any_user,
    streams::a_writer_nobody_reads_gets_sigpipe,
    streams::a_terminal_has_its_size_and_follows_a_resize,
    streams::a_terminal_belongs_to_the_user_and_passes_ctrl_c,
    streams::a_terminal_that_is_hung_up_ends_its_shell,
    preserved::a_process_has_what_is_preserved_and_nothing_else,
    preserved::many_preserved_descriptors_are_in_nobodys_way,
    preserved::what_cannot_be_preserved_is_refused_and_leaves_nothing,
    execs::an_exec_has_its_own_user_directory_and_environment,
    execs::an_exec_may_come_before_the_start,
    execs::an_exec_says_how_it_ended,
    execs::an_exec_of_a_missing_program_is_told_apart,
    execs::a_background_child_does_not_hold_up_a_wait,
    execs::an_exec_can_have_a_terminal,
    execs::an_exec_is_limited_and_filtered_like_its_container,
    execs::exec_ids_are_unique_while_they_run,
    security::capabilities_are_those_of_the_spec,
    security::a_filter_holds_for_a_user_without_no_new_privs,
    security::no_new_privs_is_set_only_when_asked,
    security::paths_are_masked_and_read_only,
    security::a_read_only_root_is_read_only,
    security::devices_are_denied_by_default,
    security::a_container_sees_only_itself,
    security::namespaces_hostname_and_sysctls_are_its_own,
    security::a_user_namespace_maps_its_root,
    security::identity_home_and_directory_are_the_users,
    interfaces::an_interface_is_made_what_the_host_says_and_follows_it,
    interfaces::an_interface_that_cannot_be_is_refused_with_the_reason,
    limits::memory_beyond_the_limit_is_an_oom_kill,
    limits::processes_beyond_the_limit_are_refused,
    limits::rlimits_are_those_of_the_spec,
    limits::limits_can_be_changed_while_it_runs,
    limits::stats_and_processes_are_reported,
    limits::what_cannot_be_given_is_an_error,
    streams::throughput_of_a_stream,
    // The last: afterwards nothing runs.
    lives::shutdown_kills_everything,
];

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some(helper::ARGUMENT) {
        return helper::main();
    }
    if std::process::id() != 1 {
        eprintln!("this is the init of a guest: run agent/tests/run");
        return ExitCode::FAILURE;
    }
    let begun = Instant::now();
    if let Err(error) = boot::prepare() {
        println!("boot: {}", chain(&error));
        return ExitCode::FAILURE;
    }
    println!(
        "cost of setting the guest up: {} us",
        begun.elapsed().as_micros()
    );
    agent::make_root();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let failed = runtime.block_on(run());
    println!(
        "guest tests: {} passed, {failed} failed",
        TESTS.len() - failed
    );
    let Err(errno) = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_AUTOBOOT);
    panic!("reboot: {errno}");
}

async fn run() -> usize {
    let (guest, _server) = Guest::start().await;
    let mut failed = 0;
    for (name, test) in TESTS {
        let begun = Instant::now();
        let task = tokio::spawn(tokio::time::timeout(
            PATIENCE,
            AssertUnwindSafe(test(guest.clone())),
        ));
        let verdict = match task.await {
            Ok(Ok(())) => "ok",
            Ok(Err(_)) => "FAILED (took too long)",
            Err(_) => "FAILED",
        };
        failed += usize::from(verdict != "ok");
        println!(
            "test {name} ... {verdict} ({} ms)",
            begun.elapsed().as_millis()
        );
    }
    failed
}
