//! What the VMs of an instance have at authorities, for the gauges: each writes its own share into one record of shared data, and
//! whoever looks adds them up. A share that is not kept up is that of a VM that has died, and counts no more.

use std::collections::BTreeMap;

use interlock_core::{Duration, StoreError, Tally, Time};
use serde::{Deserialize, Serialize};

use crate::host::{Expected, Host, Stored};

/// The first byte of the record, and part of its key.
const FORMAT: u8 = 1;

/// How often a share is written anew though nothing has changed.
const KEEP: Duration = Duration::from_secs(1);

/// After how long a share that is not written anew counts no more.
const DEAD: Duration = Duration::from_secs(4);

/// How often the record is written anew before it is left for the next time.
const TRIES: usize = 4;

/// Held and waiting, by class.
type Tallies = BTreeMap<String, Tally>;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Share {
    vm: u128,
    seen: Time,
    /// Class, held, waiting.
    tallies: Vec<(String, u64, u64)>,
}

/// The share of one VM.
#[derive(Debug)]
pub struct Shares {
    key: String,
    vm: u128,
}

impl Shares {
    /// That of a VM that no other has this number of. Nothing is written yet.
    pub fn new(instance: &str, vm: u128) -> Self {
        Shares { key: format!("interlock/far/{FORMAT}/{instance}"), vm }
    }

    /// Says what this VM has, if that is news, and gives back what all have.
    ///
    /// # Errors
    /// Those of the host; and where others are always faster.
    pub fn exchange(&self, host: &dyn Host, mine: &Tallies) -> Result<Tallies, StoreError> {
        for _ in 0..TRIES {
            let stored = host.shared_get(&self.key).map_err(|error| StoreError::Failed(error.to_string()))?;
            let expected = stored.as_ref().map_or(Expected::Absent, |(_, cas)| Expected::Version(*cas));
            // A record that cannot be read is another format's, or nobody's.
            let known = stored.and_then(|(bytes, _)| read(&bytes)).unwrap_or_default();
            let next = self.next(&known, mine, host.now());
            let all = sum(&next);
            if next == known {
                return Ok(all);
            }
            let bytes =
                postcard::to_extend(&next, vec![FORMAT]).map_err(|error| StoreError::Failed(error.to_string()))?;
            let written = host.shared_set(&self.key, &bytes, expected);
            if written.map_err(|error| StoreError::Failed(error.to_string()))? == Stored::Yes {
                return Ok(all);
            }
        }
        Err(StoreError::Failed(String::from("the shares of the gauges are always being written")))
    }

    fn next(&self, known: &[Share], mine: &Tallies, now: Time) -> Vec<Share> {
        let tallies: Vec<_> = mine.iter().map(|(class, tally)| (class.clone(), tally.held, tally.waiting)).collect();
        let before = known.iter().find(|share| share.vm == self.vm);
        let kept = before.filter(|share| share.tallies == tallies && now < share.seen + KEEP);
        let others = known.iter().filter(|share| share.vm != self.vm && now < share.seen + DEAD);
        let mut next: Vec<Share> = others.cloned().collect();
        if !tallies.is_empty() {
            next.push(kept.cloned().unwrap_or(Share { vm: self.vm, seen: now, tallies }));
        }
        // Always in one order, so that nothing is written where nothing has changed.
        next.sort_by_key(|share| share.vm);
        next
    }
}

fn read(bytes: &[u8]) -> Option<Vec<Share>> {
    let (format, record) = bytes.split_first()?;
    if *format == FORMAT { postcard::from_bytes(record).ok() } else { None }
}

fn sum(shares: &[Share]) -> Tallies {
    let mut all = Tallies::new();
    for (class, held, waiting) in shares.iter().flat_map(|share| &share.tallies) {
        let tally = all.entry(class.clone()).or_default();
        tally.held = tally.held.saturating_add(*held);
        tally.waiting = tally.waiting.saturating_add(*waiting);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::fake::FakeProxy;

    fn tallies(held: u64, waiting: u64) -> Tallies {
        [(String::from("a"), Tally { held, waiting })].into()
    }

    #[test]
    fn shares_add_up_and_those_of_the_dead_do_not_count() {
        let proxy = FakeProxy::new();
        let (one, two) = (proxy.host(), proxy.host());
        let (first, second) = (Shares::new("t", 1), Shares::new("t", 2));
        assert_eq!(first.exchange(&one, &tallies(2, 1)).unwrap(), tallies(2, 1));
        assert_eq!(second.exchange(&two, &tallies(1, 0)).unwrap(), tallies(3, 1));
        assert_eq!(Shares::new("other", 3).exchange(&two, &Tallies::new()).unwrap(), Tallies::new());
        // Nothing new is not written.
        one.take_calls();
        assert_eq!(first.exchange(&one, &tallies(2, 1)).unwrap(), tallies(3, 1));
        let calls = one.take_calls();
        assert_eq!((calls.shared_reads, calls.shared_writes), (1, 0));
        // The first dies.
        proxy.advance(Duration::from_secs(3));
        assert_eq!(second.exchange(&two, &tallies(1, 0)).unwrap(), tallies(3, 1));
        proxy.advance(Duration::from_secs(1));
        assert_eq!(second.exchange(&two, &tallies(1, 0)).unwrap(), tallies(1, 0));
        assert_eq!(second.exchange(&two, &Tallies::new()).unwrap(), Tallies::new());
        // It was only asleep.
        assert_eq!(first.exchange(&one, &tallies(2, 0)).unwrap(), tallies(2, 0));
    }

    #[test]
    fn a_record_that_is_none_and_a_lost_race_do_no_harm() {
        let proxy = FakeProxy::new();
        let host = proxy.host();
        let shares = Shares::new("t", 1);
        host.conflict_next(2);
        assert_eq!(shares.exchange(&host, &tallies(1, 0)).unwrap(), tallies(1, 0));
        for bytes in [b"".as_slice(), b"\x07", b"\x01\xff\xff\xff\xff\xff"] {
            proxy.overwrite("interlock/far/1/t", bytes);
            assert_eq!(shares.exchange(&host, &tallies(1, 2)).unwrap(), tallies(1, 2));
        }
        host.conflict_next(100);
        assert!(shares.exchange(&host, &tallies(5, 0)).is_err());
    }
}
