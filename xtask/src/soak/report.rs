//! What the soak counted, what it must have counted at least, and the table at its end.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;

use super::ledger::Tally;

/// What the callers counted.
#[derive(Debug)]
pub struct Numbers {
    /// Requests sent, by kind.
    pub kinds: BTreeMap<&'static str, u64>,
    /// Granted, and among them those that had waited.
    pub grants: u64,
    pub hand_overs: u64,
    /// Refusals by slug.
    pub refusals: BTreeMap<String, u64>,
    /// Passed untouched.
    pub unannotated: u64,
    /// Callers that left before and after their request had reached the upstream.
    pub left_parked: u64,
    pub left_upstream: u64,
    /// Requests that reached the upstream when their caller had gone.
    pub ghosts: u64,
    /// Upstreams that broke off before and after the head.
    pub broken_before: u64,
    pub broken_after: u64,
    /// Given up by their route.
    pub route_timeouts: u64,
    /// Leases lost to the hold limit before and after the answer had begun.
    pub lost_before: u64,
    pub lost_after: u64,
    /// Leases that nobody renewed in time.
    pub expired: u64,
    /// Requests whose lease may have lapsed, since the machine was late.
    pub unsure: u64,
    /// Waits of grants, and of refusals because of a wait that ran out; in microseconds.
    waits: Histogram<u64>,
}

impl Default for Numbers {
    fn default() -> Self {
        // One minute at three digits is well within what it takes; not a value but memory is at stake.
        let waits = Histogram::new_with_max(60_000_000, 3).unwrap_or_else(|e| unreachable!("{e}"));
        Numbers {
            kinds: BTreeMap::new(),
            grants: 0,
            hand_overs: 0,
            refusals: BTreeMap::new(),
            unannotated: 0,
            left_parked: 0,
            left_upstream: 0,
            ghosts: 0,
            broken_before: 0,
            broken_after: 0,
            route_timeouts: 0,
            lost_before: 0,
            lost_after: 0,
            expired: 0,
            unsure: 0,
            waits,
        }
    }
}

impl Numbers {
    pub fn request(&mut self, kind: &'static str) {
        *self.kinds.entry(kind).or_default() += 1;
    }

    pub fn granted(&mut self, waited: Duration) {
        self.grants += 1;
        // lock-status tells milliseconds.
        self.hand_overs += u64::from(waited >= Duration::from_millis(1));
        self.wait(waited);
    }

    pub fn refused(&mut self, slug: &str, took: Duration) {
        *self.refusals.entry(slug.to_owned()).or_default() += 1;
        if slug == "wait-timeout" {
            self.wait(took);
        }
    }

    fn wait(&mut self, waited: Duration) {
        self.waits.saturating_record(u64::try_from(waited.as_micros()).unwrap_or(u64::MAX));
    }

    pub fn requests(&self) -> u64 {
        self.kinds.values().sum()
    }

    /// What is wrong with the plugin's own counters, given what callers saw. Those who had left saw less than there was.
    pub fn against(&self, counter: impl Fn(&str) -> u64) -> Vec<String> {
        let unseen = self.left_parked + self.left_upstream + self.ghosts;
        let lost = self.lost_before + self.lost_after + self.expired;
        let bounds = [
            ("interlock_deadlock_total", self.refused_as("deadlock"), unseen),
            ("interlock_order_violation_total", self.refused_as("order-violation"), unseen),
            ("interlock_lease_lost_total", lost, unseen),
        ];
        let wrong = |(name, seen, unseen): (&str, u64, u64)| {
            let counted = counter(name);
            let right = (seen..=seen + unseen).contains(&counted);
            (!right).then(|| {
                format!("{name} is {counted}, and callers saw {seen} (and {unseen} did not see what became of them)")
            })
        };
        bounds.into_iter().filter_map(wrong).collect()
    }

    fn refused_as(&self, slug: &str) -> u64 {
        self.refusals.get(slug).copied().unwrap_or(0)
    }

    /// Kinds of events that this load cannot fail to bring about in `length`, and did not. Nothing went wrong, but nothing was
    /// shown either.
    pub fn missing(&self, tally: &Tally, length: Duration) -> Vec<String> {
        // A tenth of what two busy cores do.
        let per_minute = |count: u64| (count * length.as_secs()).div_ceil(60);
        let least = [
            ("granted", self.grants, per_minute(2000)),
            ("granted after a wait", self.hand_overs, per_minute(400)),
            ("judged whole at the upstream", tally.whole, per_minute(1000)),
            ("one after the other on a lock", tally.ordered, per_minute(400)),
            ("refused as deadlock", self.refused_as("deadlock"), per_minute(20)),
            ("refused as order-violation", self.refused_as("order-violation"), per_minute(20)),
            ("refused as wait-timeout", self.refused_as("wait-timeout"), per_minute(10)),
            ("refused as lock-held", self.refused_as("lock-held"), per_minute(10)),
            ("refused as malformed-annotation", self.refused_as("malformed-annotation"), per_minute(20)),
            ("refused as too-many-locks", self.refused_as("too-many-locks"), per_minute(4)),
            ("leases lost before the answer", self.lost_before, per_minute(2)),
            ("leases lost within the answer", self.lost_after, per_minute(2)),
            ("callers left parked", self.left_parked, per_minute(10)),
            ("callers left upstream", self.left_upstream, per_minute(10)),
            ("upstreams broken off before the head", self.broken_before, per_minute(4)),
            ("upstreams broken off after the head", self.broken_after, per_minute(4)),
            ("route timeouts", self.route_timeouts, per_minute(2)),
            ("unannotated", self.unannotated, per_minute(100)),
        ];
        let missed = least.into_iter().filter(|(_, count, least)| count < least);
        missed.map(|(what, count, least)| format!("{what}: {count}, and {least} at least were expected")).collect()
    }

    /// The table.
    pub fn print(&self, tally: &Tally, length: Duration) {
        let row = |name: &str, value: String| println!("  {name:<44} {value:>12}");
        let count = |name: &str, value: u64| row(name, value.to_string());
        let per_second = self.requests() as f64 / length.as_secs_f64();
        println!("\nThe soak");
        count("requests", self.requests());
        row("requests a second", format!("{per_second:.0}"));
        count("granted", self.grants);
        count("granted after a wait (handed over)", self.hand_overs);
        count("passed without locks", self.unannotated);
        for (slug, refused) in &self.refusals {
            count(&format!("refused: {slug}"), *refused);
        }
        count("caller left, parked", self.left_parked);
        count("caller left, upstream", self.left_upstream);
        count("reached the upstream after its caller left", self.ghosts);
        count("lease lost to hold, answered 409", self.lost_before);
        count("lease lost to hold, answer cut", self.lost_after);
        count("lease not renewed in time", self.expired);
        count("upstream broke off before its head", self.broken_before);
        count("upstream broke off after its head", self.broken_after);
        count("route timeout", self.route_timeouts);
        let millis = |micros: u64| format!("{:.1} ms", micros as f64 / 1000.0);
        row("wait p50", millis(self.waits.value_at_quantile(0.5)));
        row("wait p99", millis(self.waits.value_at_quantile(0.99)));
        row("wait max", millis(self.waits.max()));
        println!("At the upstream");
        count("requests with locks", tally.sections);
        count("judged whole", tally.whole);
        count("judged up to the moment they were cut", tally.cut);
        count("of these on a machine too late to be sure", self.unsure);
        count("conflicting pairs, one after the other", tally.ordered);
        count("overlaps with one that had been cut (allowed)", tally.excused);
        println!("Requests by kind");
        for (kind, sent) in &self.kinds {
            count(kind, *sent);
        }
    }
}
