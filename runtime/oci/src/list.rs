//! `list`: every container below the state directory.

use anyhow::Result;
use cloison_sandbox::Home;

use crate::args::List;
use crate::container::Container;
use crate::print;
use crate::state::Shown;

/// Prints the containers.
pub fn list(home: &Home, args: &List) -> Result<()> {
    let all = Container::all(home)?;
    if args.quiet {
        all.iter().for_each(|container| print(container.id()));
        return Ok(());
    }
    // One that is being made or removed at this moment may have no record.
    let shown: Vec<Shown> = all.iter().filter_map(|c| Shown::of(c).ok()).collect();
    if args.format == "json" {
        print(serde_json::to_string(&shown)?);
        return Ok(());
    }
    let row = |cells: [&str; 6]| {
        let [id, pid, status, bundle, created, owner] = cells;
        print(format_args!(
            "{id:<20} {pid:<10} {status:<10} {bundle:<30} {created:<30} {owner}"
        ));
    };
    row(["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]);
    for one in &shown {
        let bundle = one.bundle.display().to_string();
        let pid = one.pid.to_string();
        let status = one.status.word();
        row([&one.id, &pid, status, &bundle, &one.created, one.owner]);
    }
    Ok(())
}
