//! What the audience sees. Plain lines that read well without colour; colour where a terminal has it.

use std::io::IsTerminal;
use std::time::Duration;

use bank::client::{Attempt, Edge, Outcome, Problem};
use bank::event::Event;
use bank::ledger::Balance;

use super::bank::What;
use super::cast::Job;
use super::tally::Tally;

const WIDTH: usize = 108;
const BOLD: &str = "1";
const DIM: &str = "2";
pub const RED: &str = "31";
pub const GREEN: &str = "32";
pub const YELLOW: &str = "33";
const CYAN: &str = "36";

/// Standard output.
pub struct Screen {
    colour: bool,
}

impl Screen {
    /// Standard output, in colour where it is a terminal that wants it (`NO_COLOR` is heeded).
    pub fn new() -> Self {
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Screen { colour: std::io::stdout().is_terminal() && !refused }
    }

    /// An act begins.
    pub fn act(&self, title: &str, about: &[&str]) {
        println!(
            "\n{}",
            self.paint(BOLD, &format!("━━ {title} {}", "━".repeat(WIDTH.saturating_sub(title.len() + 4))))
        );
        for line in about {
            println!("   {}", self.paint(DIM, line));
        }
        println!();
    }

    /// Something happened. `before` is what had been counted until then.
    pub fn news(&self, at: Duration, what: &What, jobs: &[Job], before: &Tally) {
        match what {
            What::Service(Event::Blocked { account, transfer, holder }) => {
                let Some(job) = jobs.iter().find(|job| job.id == *transfer) else { return };
                let has =
                    if job.transfer.from == *account { String::new() } else { format!("has {}, ", job.transfer.from) };
                let holder = holder.as_deref().map(|h| format!(", which {h} has")).unwrap_or_default();
                self.line(at, job, YELLOW, "blocked", &format!("{has}waits for {account}{holder}"));
            }
            What::Service(_) => {}
            What::Tried(index, n, attempt) => {
                if let Some(job) = jobs.get(*index) {
                    self.tried(at, job, *n, attempt, jobs, before);
                }
            }
            What::Over(..) => {}
        }
    }

    fn tried(&self, at: Duration, job: &Job, n: u32, attempt: &Attempt, jobs: &[Job], before: &Tally) {
        let took = show(attempt.took);
        match &attempt.outcome {
            Outcome::Completed => {
                let tries = if n == 1 { String::new() } else { format!(", at try {n}") };
                let waited = show(attempt.waited);
                self.line(at, job, GREEN, "completed", &format!("in {took}{tries}; {waited} of it in queues"));
            }
            Outcome::TimedOut => self.line(at, job, RED, "timed out", &format!("after {took}")),
            Outcome::Failed { what } => self.line(at, job, RED, "failed", what),
            Outcome::Refused { status, problem, body } => {
                let slug = problem.slug();
                let text = format!("{status} {slug}, after {took}: {}", story(problem, jobs));
                self.line(at, job, RED, "refused", &text);
                // Once in full, as the client got it.
                if before.refusals(slug) == 0 {
                    self.body(attempt, body, problem, jobs);
                }
            }
        }
    }

    fn body(&self, attempt: &Attempt, body: &str, problem: &Problem, jobs: &[Job]) {
        let indent = " ".repeat(12);
        for status in &attempt.lock_status {
            println!("{indent}{}", self.paint(DIM, &format!("lock-status: {status}")));
        }
        for line in pretty(body).as_deref().unwrap_or(body).lines() {
            println!("{indent}{}", self.paint(CYAN, line));
        }
        let who = |owner: &String| name(owner, jobs).map(|id| format!("{id} is {owner}"));
        let legend: Vec<_> = problem.cycle.iter().map(|edge| &edge.owner).filter_map(who).collect();
        for line in legend {
            println!("{indent}{}", self.paint(DIM, &line));
        }
    }

    fn line(&self, at: Duration, job: &Job, colour: &str, verb: &str, text: &str) {
        let at = self.paint(DIM, &format!("{:>8.3}s", at.as_secs_f64()));
        let verb = self.paint(colour, &format!("{verb:<9}"));
        println!("{at}  {} {}→{}  {verb}  {text}", job.id, job.transfer.from, job.transfer.to);
    }

    /// Somebody did something, or something was done to it.
    pub fn event(&self, at: Duration, who: &str, colour: &str, verb: &str, text: &str) {
        let at = self.paint(DIM, &format!("{:>8.3}s", at.as_secs_f64()));
        println!("{at}  {who:<10} {}  {text}", self.paint(colour, &format!("{verb:<9}")));
    }

    /// A body as it came, on many lines where it is JSON.
    pub fn whole(&self, body: &str) {
        for line in pretty(body).as_deref().unwrap_or(body).lines() {
            println!("{}{}", " ".repeat(12), self.paint(CYAN, line));
        }
    }

    /// The books after an act.
    pub fn balances(&self, balances: &[Balance], pending: &str) {
        let one = |b: &Balance| format!("{} {}", b.id, money(b.balance));
        let all: Vec<_> = balances.iter().map(one).collect();
        let (sum, aside) = (balances.iter().map(|b| b.balance).sum(), balances.iter().map(|b| b.pending).sum());
        println!("\n   the books: {} = {}; {} {pending}", all.join(" + "), money(sum), money(aside));
    }

    /// How an act went.
    pub fn verdict(&self, failures: &[String]) {
        if failures.is_empty() {
            println!("   {}", self.paint(GREEN, "as it must be"));
        }
        for failure in failures {
            println!("   {}", self.paint(RED, &format!("NOT as it must be: {failure}")));
        }
    }

    /// The end: a line for each act.
    pub fn table<'a>(&self, acts: impl Iterator<Item = (&'a str, &'a Tally, bool)>) {
        let head = ["", "transfers", "requests", "completed", "timed out", "refused", "time", "wait p50", "wait p99"];
        let mut rows = vec![head.map(str::to_owned)];
        let mut passed = vec![true];
        for (title, tally, ok) in acts {
            let refused: Vec<_> = tally.refused.iter().map(|(slug, n)| format!("{n} {slug}")).collect();
            let wait = |percentile| tally.wait(percentile).map_or_else(|| "-".to_owned(), show);
            rows.push([
                title.to_owned(),
                tally.requests.to_string(),
                tally.tries.to_string(),
                tally.completed.to_string(),
                tally.timed_out.to_string(),
                if refused.is_empty() { "0".to_owned() } else { refused.join(", ") },
                show(tally.time),
                wait(50.0),
                wait(99.0),
            ]);
            passed.push(ok);
        }
        let widths: Vec<_> =
            (0..head.len()).map(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0)).collect();
        println!();
        for (row, ok) in rows.iter().zip(passed) {
            let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| match column {
                0 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            });
            let line = format!("  {}", cells.collect::<Vec<_>>().join("  "));
            let colour = if row[0].is_empty() {
                BOLD
            } else if ok {
                GREEN
            } else {
                RED
            };
            println!("{}", self.paint(colour, &line));
        }
        println!();
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// A refusal in a few words: the cycle where there is one, drawn as `a ─lock→ b`, else what the server says.
fn story(problem: &Problem, jobs: &[Job]) -> String {
    let Some(first) = problem.cycle.first() else {
        return jobs.iter().fold(problem.detail.clone(), |text, job| text.replace(&job.trace, &job.id));
    };
    let who = |owner: &str| name(owner, jobs).map_or_else(|| owner.to_owned(), str::to_owned);
    let step = |edge: &Edge| format!(" ─{}→ {}", edge.waits_for, who(&edge.held_by));
    who(&first.owner) + &problem.cycle.iter().map(step).collect::<String>()
}

/// JSON on many lines, its members in the order in which they came.
fn pretty(json: &str) -> Option<String> {
    let mut out = Vec::new();
    let mut reader = serde_json::Deserializer::from_str(json);
    serde_transcode::transcode(&mut reader, &mut serde_json::Serializer::pretty(&mut out)).ok()?;
    String::from_utf8(out).ok()
}

/// The job that an owner stands for.
fn name<'a>(owner: &str, jobs: &'a [Job]) -> Option<&'a str> {
    jobs.iter().find(|job| owner.contains(&job.trace)).map(|job| job.id.as_str())
}

fn show(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds >= 1.0 { format!("{seconds:.1} s") } else { format!("{:.0} ms", seconds * 1000.0) }
}

fn money(cents: u64) -> String {
    format!("{}.{:02}", cents / 100, cents % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cycle_is_drawn_with_the_names_of_the_cast() {
        let jobs = super::super::cast::load(1);
        let edge = |owner: &Job, lock: &str, held_by: &Job| Edge {
            owner: owner.trace.clone(),
            waits_for: lock.to_owned(),
            held_by: held_by.trace.clone(),
        };
        let cycle = vec![edge(&jobs[0], "account/bob", &jobs[1]), edge(&jobs[1], "account/ann", &jobs[0])];
        let problem = Problem { cycle, ..Problem::default() };
        assert_eq!(story(&problem, &jobs), "t01 ─account/bob→ t02 ─account/ann→ t01");
        let detail = format!("{} holds it", jobs[2].trace);
        assert_eq!(story(&Problem { detail, ..Problem::default() }, &jobs), "t03 holds it");
    }

    #[test]
    fn a_body_is_shown_in_its_own_order() {
        assert_eq!(pretty(r#"{"b":1,"a":[]}"#).unwrap(), "{\n  \"b\": 1,\n  \"a\": []\n}");
        assert_eq!(pretty("no json"), None);
    }
}
