//! The seeded bugs against the tests: each must make a test fail.

use std::fmt;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::bugs::Bug;
use super::program::{Programs, Round, Verdict};

/// What became of a bug.
struct Fate {
    bug: Bug,
    end: End,
    took: Duration,
}

/// How the search for a test that notices it ended.
enum End {
    /// These tests of the round failed, the first one first.
    Caught(&'static str, Vec<String>),
    /// No test noticed.
    Survived,
    /// A round neither passed nor failed, which proves nothing.
    Unclear(&'static str, String),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Caught(round, tests) => {
                write!(f, "{round}: {}", tests.first().map_or("", String::as_str))?;
                if tests.len() > 1 { write!(f, " (and {} more)", tests.len() - 1) } else { Ok(()) }
            }
            End::Survived => f.write_str("SURVIVED"),
            End::Unclear(round, why) => write!(f, "UNCLEAR: {round}: {why}"),
        }
    }
}

/// Builds the tests, makes sure that they pass, and tries the bugs.
pub fn run(bugs: &[Bug], rounds: &[Round]) -> Result<()> {
    let start = Instant::now();
    let programs = Programs::build(rounds)?;
    println!("built in {:.0} s; all must pass without a bug", start.elapsed().as_secs_f64());
    let sound = side_by_side(rounds, |round| (round.name, programs.run(round, None)));
    for (round, verdict) in sound {
        match verdict? {
            Verdict::Passed => {}
            other => bail!("without any bug, {round}: {other:?}"),
        }
    }
    println!("{:<24} {:>7}  caught by", "bug", "seconds");
    let fates = side_by_side(bugs, |bug| {
        let fate = fate(&programs, rounds, *bug);
        if let Ok(Fate { bug, end, took }) = &fate {
            println!("{:<24} {:>7.1}  {end}", format!("{bug:?}"), took.as_secs_f64());
        }
        fate
    });
    let fates = fates.into_iter().collect::<Result<Vec<Fate>>>()?;
    println!("\n{} bugs in {:.0} s; caught by", fates.len(), start.elapsed().as_secs_f64());
    for Round { name, .. } in rounds {
        let caught = fates.iter().filter(|fate| matches!(&fate.end, End::Caught(round, _) if round == name)).count();
        println!("{name:<16} {caught:>4}");
    }
    let free: Vec<&Fate> = fates.iter().filter(|fate| !matches!(fate.end, End::Caught(..))).collect();
    for Fate { bug, end, .. } in &free {
        println!("{bug:?}: {end}: {}", bug.about().trim());
    }
    if free.is_empty() { Ok(()) } else { bail!("{} of {} bugs are not caught", free.len(), fates.len()) }
}

/// Runs round after round until one notices the bug.
fn fate(programs: &Programs, rounds: &[Round], bug: Bug) -> Result<Fate> {
    let start = Instant::now();
    let mut end = End::Survived;
    for round in rounds {
        end = match programs.run(round, Some(bug))? {
            Verdict::Passed => continue,
            Verdict::Failed(tests) => End::Caught(round.name, tests),
            Verdict::Hangs => End::Unclear(round.name, String::from("it does not end")),
            Verdict::Broke(how) => End::Unclear(round.name, how),
        };
        break;
    }
    Ok(Fate { bug, end, took: start.elapsed() })
}

/// Does it to all, as many at a time as there are cores. In their order.
fn side_by_side<T: Sync, R: Send>(all: &[T], act: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let cores = thread::available_parallelism().map_or(2, usize::from);
    let queue = Mutex::new(all.iter().enumerate());
    let take = || queue.lock().ok().and_then(|mut queue| queue.next());
    let worker = || {
        let mut done = Vec::new();
        while let Some((at, it)) = take() {
            done.push((at, act(it)));
        }
        done
    };
    let mut done: Vec<(usize, R)> = thread::scope(|scope| {
        let workers: Vec<_> = (0..cores).map(|_| scope.spawn(worker)).collect();
        workers
            .into_iter()
            .flat_map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn side_by_side_keeps_the_order() {
        let all: Vec<u32> = (0..100).collect();
        assert_eq!(side_by_side(&all, |n| n * 2), all.iter().map(|n| n * 2).collect::<Vec<_>>());
    }

    #[test]
    fn a_table_names_the_first_test() {
        let caught = End::Caught("scenarios", vec!["a".into(), "b".into()]);
        assert_eq!(caught.to_string(), "scenarios: a (and 1 more)");
    }
}
