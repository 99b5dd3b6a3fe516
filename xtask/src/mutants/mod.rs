//! `cargo xtask mutants`: shows that the tests notice bugs: those of `core/src/bugs.rs`, one after the other, or what
//! cargo-mutants makes of the core's lines.

#[path = "../../../core/src/bugs.rs"]
#[allow(dead_code, reason = "whether a bug is on is asked in the core only")]
mod bugs;
mod generated;
mod program;
mod seeded;

use anyhow::{Result, bail};
use clap::Args;

use bugs::Bug;

#[derive(Debug, Default, Args)]
pub struct MutantsArgs {
    /// Try only these seeded bugs
    #[arg(value_name = "BUG", conflicts_with = "cargo_mutants")]
    bugs: Vec<String>,
    /// Only say what the seeded bugs do
    #[arg(long)]
    list: bool,
    /// Run only this round of tests, to see what it alone notices; may be given several times
    #[arg(long, value_name = "ROUND")]
    round: Vec<String>,
    /// Have cargo-mutants change the core line by line instead, which takes hours
    #[arg(long)]
    cargo_mutants: bool,
    /// With --cargo-mutants: change only this file, from the repository's root; may be given several times
    #[arg(long, value_name = "FILE", requires = "cargo_mutants")]
    file: Vec<String>,
}

pub fn run(args: &MutantsArgs) -> Result<()> {
    if args.cargo_mutants {
        return generated::run(&args.file);
    }
    let bugs = chosen(&args.bugs)?;
    if args.list {
        bugs.iter().for_each(|bug| println!("{:<24}{}", format!("{bug:?}"), bug.about().trim()));
        return Ok(());
    }
    seeded::run(&bugs, &program::rounds(&args.round)?)
}

/// The bugs of these names; all where none is named.
fn chosen(names: &[String]) -> Result<Vec<Bug>> {
    if names.is_empty() {
        return Ok(Bug::ALL.to_vec());
    }
    let find = |name: &String| match Bug::ALL.iter().find(|bug| format!("{bug:?}") == *name) {
        Some(bug) => Ok(*bug),
        None => bail!("there is no bug {name}; cargo xtask mutants --list names them"),
    };
    names.iter().map(find).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bugs_are_chosen_by_name() {
        assert!(chosen(&[]).unwrap().len() >= 25);
        assert_eq!(chosen(&["Lifo".into()]).unwrap(), [Bug::Lifo]);
        assert!(chosen(&["Lilo".into()]).is_err());
        assert!(Bug::ALL.iter().all(|bug| bug.about().trim().ends_with('.')));
    }

    #[test]
    fn every_bug_is_in_the_documentation() {
        let page = std::fs::read_to_string(interlock_testkit::tools::root().join("docs/testing-mutants.md")).unwrap();
        let (page, _) = page.split_once("## Generated changes").unwrap();
        for bug in Bug::ALL {
            let row = format!("| `{bug:?}` | {} | ", bug.about().trim());
            assert!(page.contains(&row), "{row}");
        }
        assert_eq!(page.lines().filter(|line| line.starts_with("| `")).count(), Bug::ALL.len(), "a bug that is gone");
    }
}
