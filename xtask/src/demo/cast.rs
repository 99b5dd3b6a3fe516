//! Who plays: the accounts and the transfers between them.

use std::collections::BTreeMap;

use bank::client::trace_id;
use bank::transfers::Transfer;

/// The accounts.
pub const ACCOUNTS: [&str; 3] = ["ann", "bob", "cat"];

/// A transfer with the names that it goes by.
#[derive(Clone, Debug)]
pub struct Job {
    /// Its idempotency key.
    pub id: String,
    /// Its trace: what makes its requests one owner.
    pub trace: String,
    /// What it transfers.
    pub transfer: Transfer,
}

fn job(number: usize, from: &str, to: &str) -> Job {
    // Different amounts that do not cancel out, so that a transfer that was lost or booked twice shows in the sums.
    let amount = 1000 + (number * number) as u64;
    let transfer = Transfer { from: from.to_owned(), to: to.to_owned(), amount };
    Job { id: format!("t{number:02}"), trace: trace_id(), transfer }
}

/// Every account pays every other one, `rounds` times.
pub fn load(rounds: usize) -> Vec<Job> {
    let pairs = [(0, 1), (1, 0), (1, 2), (2, 1), (2, 0), (0, 2)].map(|(a, b)| (ACCOUNTS[a], ACCOUNTS[b]));
    let all = std::iter::repeat_n(pairs, rounds).flatten();
    all.enumerate().map(|(n, (from, to))| job(n + 1, from, to)).collect()
}

/// A transfer in the order of the accounts' names, and one against it.
pub fn both_ways() -> [Job; 2] {
    [job(1, ACCOUNTS[0], ACCOUNTS[1]), job(2, ACCOUNTS[1], ACCOUNTS[0])]
}

/// What every account must have when each transfer has happened once.
pub fn expected(jobs: &[Job], opening: u64) -> BTreeMap<String, u64> {
    let mut balances: BTreeMap<_, _> = ACCOUNTS.iter().map(|name| ((*name).to_owned(), opening)).collect();
    for Job { transfer: Transfer { from, to, amount }, .. } in jobs {
        balances.entry(from.clone()).and_modify(|balance| *balance -= amount);
        balances.entry(to.clone()).and_modify(|balance| *balance += amount);
    }
    balances
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_load_runs_against_itself_and_keeps_the_sum() {
        let jobs = load(2);
        assert_eq!(jobs.len(), 12);
        let opposite =
            |a: &Job| jobs.iter().any(|b| a.transfer.from == b.transfer.to && a.transfer.to == b.transfer.from);
        assert!(jobs.iter().all(opposite));
        let expected = expected(&jobs, 50_000);
        assert_eq!(expected.values().sum::<u64>(), 150_000);
        assert!(expected.values().all(|balance| *balance != 50_000), "{expected:?}");
    }
}
