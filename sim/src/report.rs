//! What happened over a run. Zero violations must not come of zero work: a run in which something never happened fails.

macro_rules! counts {
    ($($field:ident: $what:literal, $kind:ident;)*) => {
        /// How often what happened.
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        pub struct Counts {
            $(#[doc = $what] pub $field: u64,)*
        }

        impl Counts {
            /// Adds what happened elsewhere.
            pub fn add(&mut self, other: &Counts) {
                $(self.$field += other.$field;)*
            }

            /// All of them: what, how often, and in which part of the simulator it has to happen.
            pub fn all(&self) -> Vec<(&'static str, u64, Part)> {
                vec![$(($what, self.$field, Part::$kind),)*]
            }
        }
    };
}

/// The parts of the simulator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Whatever is simulated.
    All,
    /// The lease protocol.
    Protocol,
    /// The lock table of one proxy.
    Table,
    /// The lock table without encoding: what the backend does not offer.
    Bare,
}

counts! {
    schedules: "schedules", All;
    steps: "steps", All;
    operations: "operations", All;
    calls: "host calls", All;
    preemptions: "preemptions in the middle of an operation", All;
    writes: "records written", All;
    conflicts: "lost races for a record", All;
    spurious_conflicts: "conflicts that were none", All;
    store_failures: "failed store calls", All;
    requests: "requests", All;
    waits: "requests that waited", Table;
    marks: "waits marked as one of several", Table;
    grants: "grants", All;
    hand_overs: "hand-overs to a waiter", All;
    re_entries: "re-entries", Table;
    upgrades: "upgrades", Table;
    releases: "leases given back", All;
    cancels: "waiters cancelled", All;
    deadlocks: "cycles refused", All;
    order_violations: "order violations", All;
    held_refusals: "refused as held", Table;
    timeouts: "timeouts", All;
    limits: "limits met", Table;
    backend_refusals: "refused for the store's sake", Table;
    lost_while_waiting: "refused for a lease lost while waiting", Table;
    leases_lost: "leases found lost", All;
    hold_limits: "hold limits met", All;
    expiries: "grants that ended by their time", Table;
    waiters_reaped: "waiters that ended by their time", Table;
    glass_broken: "grants ended by breaking the glass", Bare;
    wakes: "wake-ups", All;
    lost_wakes: "wake-ups lost", Table;
    late_wakes: "wake-ups late", Table;
    doubled_wakes: "wake-ups doubled", Table;
    reordered_wakes: "wake-ups reordered", Table;
    beats: "heartbeats", Table;
    beats_failed: "heartbeats failed", All;
    doubts: "heartbeats after which leases were in doubt", Table;
    revivals: "workers that came back from the dead", Table;
    joins: "workers joined", Table;
    adoptions: "entries that went over to another session of their worker", Table;
    deaths: "VMs died", All;
    mid_deaths: "VMs died in the middle of something", All;
    reloads: "VMs started anew", All;
    stalls: "VMs stalled", Table;
    clock_steps: "steps of the wall clock", All;
    sweeps: "sweeps of the whole table", All;
    messages: "messages", Protocol;
    dropped: "messages lost", Protocol;
    doubled: "messages doubled", Protocol;
    reordered: "messages reordered", Protocol;
    broken: "connections broken", Protocol;
    calls_unanswered: "calls that were given up", Protocol;
    crashes: "proxies crashed", Protocol;
    pauses: "proxies paused", Protocol;
    restarts: "restarts of the authority without its memory", Protocol;
    restored: "grants restored from a receipt", Protocol;
    leases_granted: "leases granted", Protocol;
    leases_repeated: "leases granted again to who asked again", Protocol;
    leases_believed: "leases taken in by a proxy", Protocol;
    beliefs: "leases that were believed in when looked at", Protocol;
    uses: "uses of a resource that checks fences", Protocol;
    overs: "requests whose lease was over before", Protocol;
    refusals: "requests refused by the authority", Protocol;
    unanswered: "requests refused for want of an answer", Protocol;
    rests: "moments of rest, checked as a whole", Table;
}

impl Counts {
    /// What never happened, though it has to in a run of these parts.
    pub fn missing(&self, parts: &[Part]) -> Vec<&'static str> {
        let counts = self.all().into_iter().filter(|(_, _, part)| parts.contains(part));
        counts.filter(|(_, count, _)| *count == 0).map(|(what, ..)| what).collect()
    }

    /// What happened, of these parts.
    pub fn of(&self, parts: &[Part]) -> Vec<(&'static str, u64)> {
        let counts = self.all().into_iter().filter(|(_, _, part)| parts.contains(part));
        counts.map(|(what, count, _)| (what, count)).collect()
    }
}
