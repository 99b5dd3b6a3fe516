//! What operators see of the plugin: metrics and one structured log line for each refusal, lost lease and expiry.
//!
//! Metric names carry their labels (`interlock_acquire_total.class.order.outcome.acquired`); the `stats_tags` of the
//! shipped bootstraps turn them into labels. What must not live here: decisions. A metric that the host refuses is not
//! counted and stops nothing.
//!
//! Counters and histograms count what happens; gauges show what a sweep found in the table. So nothing makes them drift:
//! no VM that died, no change of policy while locks are held.

mod line;

use std::cell::RefCell;
use std::collections::BTreeMap;

use interlock_core::{Census, Duration, Event, Loss, Tally};

use crate::host::{Host, Level, MetricId, MetricKind};
pub use line::{Incident, Record, enabled, log, rfc3339};

/// The class under which everything is counted that the policy does not declare, so that names which clients choose
/// cannot make the host keep ever more metrics.
const OTHER: &str = "other";

/// Metrics by name, labels aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Family {
    Acquire,
    Wait,
    Hold,
    Held,
    Waiting,
    Deadlock,
    OrderViolation,
    LeaseLost,
    LeaseExpired,
    Backend,
    BackendError,
    Audit,
    Guard,
    TableLocks,
    TableOwners,
    Sweep,
}

impl Family {
    const fn name(self) -> &'static str {
        match self {
            Family::Acquire => "interlock_acquire_total",
            Family::Wait => "interlock_wait_ms",
            Family::Hold => "interlock_hold_ms",
            Family::Held => "interlock_held",
            Family::Waiting => "interlock_waiting",
            Family::Deadlock => "interlock_deadlock_total",
            Family::OrderViolation => "interlock_order_violation_total",
            Family::LeaseLost => "interlock_lease_lost_total",
            Family::LeaseExpired => "interlock_lease_expired_total",
            Family::Backend => "interlock_backend_ms",
            Family::BackendError => "interlock_backend_error_total",
            Family::Audit => "interlock_audit_total",
            Family::Guard => "interlock_guard_total",
            Family::TableLocks => "interlock_table_locks",
            Family::TableOwners => "interlock_table_owners",
            Family::Sweep => "interlock_sweep_total",
        }
    }

    const fn kind(self) -> MetricKind {
        match self {
            Family::Wait | Family::Hold | Family::Backend => MetricKind::Histogram,
            Family::Held | Family::Waiting | Family::TableLocks | Family::TableOwners => MetricKind::Gauge,
            _ => MetricKind::Counter,
        }
    }
}

/// A metric, apart from its class: family, outcome, reason. Empty labels are left out.
type Key = (Family, &'static str, &'static str);

/// The metrics of one configuration. Outcomes and reasons are constants of the program, classes those of the policy, so
/// their number is bounded.
#[derive(Debug)]
pub struct Telemetry {
    /// The label of each declared class. Two classes may share one.
    classes: BTreeMap<String, String>,
    /// As a label.
    instance: String,
    /// Ids by key, then by the class's label. None: the host refused the metric, and is not asked again.
    ids: RefCell<BTreeMap<Key, BTreeMap<String, Option<MetricId>>>>,
}

/// A label as it may stand in a metric's name: dots part labels there, and other characters upset scrapers.
fn sanitized(label: &str) -> String {
    label.chars().map(|c| if c.is_ascii_alphanumeric() || matches!(c, '_' | '-') { c } else { '_' }).collect()
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

impl Telemetry {
    /// The metrics of a configuration that declares these `classes` and has that `instance`. Instances of one process must
    /// differ also as labels (in more than `.` against `_`), or their gauges show now the one, now the other.
    pub fn new(classes: impl IntoIterator<Item = String>, instance: &str) -> Self {
        let labelled = classes.into_iter().map(|class| {
            let label = sanitized(&class);
            (class, label)
        });
        Telemetry { classes: labelled.collect(), instance: sanitized(instance), ids: RefCell::default() }
    }

    /// A lock of that class was granted after that wait.
    pub fn acquired(&self, host: &dyn Host, class: &str, wait: Duration) {
        self.count(host, Family::Acquire, class, "acquired", "");
        self.record(host, Family::Wait, self.label(class), wait);
    }

    /// A request was refused over a lock of that class; `reason` is the slug of the refusal. Waits that came to nothing
    /// count as waits; refusals without one do not.
    pub fn refused(&self, host: &dyn Host, class: &str, reason: &'static str, waited: Duration) {
        self.count(host, Family::Acquire, class, "refused", reason);
        match reason {
            "deadlock" => self.count(host, Family::Deadlock, class, "", ""),
            "order-violation" => self.count(host, Family::OrderViolation, class, "", ""),
            _ => {}
        }
        if !waited.is_zero() {
            self.record(host, Family::Wait, self.label(class), waited);
        }
    }

    /// A request went on without its lock of that class; `reason` says why.
    pub fn unlocked(&self, host: &dyn Host, class: &str, reason: &'static str) {
        self.count(host, Family::Acquire, class, "unlocked", reason);
    }

    /// Whoever waited for a lock of that class has gone after that wait.
    pub fn cancelled(&self, host: &dyn Host, class: &str, waited: Duration) {
        self.count(host, Family::Acquire, class, "cancelled", "");
        self.record(host, Family::Wait, self.label(class), waited);
    }

    /// What enforcement would have done to a lock of that class; `reason` is empty where it would have been granted.
    pub fn audit(&self, host: &dyn Host, class: &str, outcome: &'static str, reason: &'static str) {
        self.count(host, Family::Audit, class, outcome, reason);
    }

    /// A request came by a guard for a lock of that class; `reason` is the slug of a refusal.
    pub fn guarded(&self, host: &dyn Host, class: &str, outcome: &'static str, reason: &'static str) {
        self.count(host, Family::Guard, class, outcome, reason);
    }

    /// What an operation on the table brought about: for how long locks were held, and which leases expired. Events say
    /// also what gauges would need, but those are taken from the table itself.
    pub fn observe(&self, host: &dyn Host, events: &[Event]) {
        for event in events {
            match event {
                Event::Queued { .. } | Event::Left { .. } | Event::Granted { .. } => {}
                Event::Released { lock, held_for } => {
                    self.record(host, Family::Hold, self.label(lock.class()), *held_for);
                }
                Event::Expired { lock, held_for, .. } => {
                    self.record(host, Family::Hold, self.label(lock.class()), *held_for);
                    self.count(host, Family::LeaseExpired, lock.class(), "", "");
                }
            }
        }
    }

    /// A lock of that class was held for that long.
    pub fn held(&self, host: &dyn Host, class: &str, held_for: Duration) {
        self.record(host, Family::Hold, self.label(class), held_for);
    }

    /// A lease on a lock of that class ended while its request was upstream.
    pub fn lease_lost(&self, host: &dyn Host, class: &str, loss: Loss) {
        self.count(host, Family::LeaseLost, class, "", loss.as_str());
    }

    /// The lease backend took that long for one operation.
    pub fn backend(&self, host: &dyn Host, took: Duration) {
        self.record(host, Family::Backend, "", took);
    }

    /// The lease backend failed; `reason` says how, in one word.
    pub fn backend_error(&self, host: &dyn Host, reason: &'static str) {
        self.add(host, (Family::BackendError, "", reason), "", 1);
    }

    /// Housekeeping has gone through the whole table, and this is what it found: all gauges show it from now on.
    ///
    /// Gauges belong to the process and can only be added to, so the difference to what they show is added. If two VMs
    /// do so at once the sum is off until the next time. Metrics of a class that a new policy no longer declares are
    /// brought to 0 by [`Telemetry::retire`].
    pub fn swept(&self, host: &dyn Host, census: &Census) {
        self.add(host, (Family::Sweep, "", ""), "", 1);
        self.show(host, census);
    }

    /// This configuration makes place for another, or ends: its gauges show nothing any more. A successor's next sweep
    /// shows what is still held.
    pub fn retire(&self, host: &dyn Host) {
        self.show(host, &Census::default());
    }

    fn show(&self, host: &dyn Host, census: &Census) {
        self.set_gauge(host, Family::TableLocks, "", census.locks);
        self.set_gauge(host, Family::TableOwners, "", census.owners);
        self.counted(host, &census.classes);
    }

    /// So many are held and wait, by class: the gauges show it from now on. They are set as [`Telemetry::swept`] sets them.
    pub fn counted(&self, host: &dyn Host, classes: &BTreeMap<String, Tally>) {
        // Classes that nobody holds or waits for any more must be shown too: with 0.
        let mut shown: BTreeMap<&str, Tally> =
            self.classes.values().map(|label| (label.as_str(), Tally::default())).collect();
        shown.insert(OTHER, Tally::default());
        for (class, tally) in classes {
            let sum = shown.entry(self.label(class)).or_default();
            sum.held = sum.held.saturating_add(tally.held);
            sum.waiting = sum.waiting.saturating_add(tally.waiting);
        }
        for (label, tally) in shown {
            self.set_gauge(host, Family::Held, label, tally.held);
            self.set_gauge(host, Family::Waiting, label, tally.waiting);
        }
    }

    fn set_gauge(&self, host: &dyn Host, family: Family, label: &str, value: u64) {
        let Some(gauge) = self.id(host, (family, "", ""), label) else { return };
        // A gauge that fell below 0 reads as its two's complement, so wrapping gives the right difference.
        if let Ok(shown) = host.read_metric(gauge) {
            let _uncounted = host.add_metric(gauge, value.wrapping_sub(shown).cast_signed());
        }
    }

    /// The class, if the policy declares it; else the one name under which all others are counted.
    pub fn known<'c>(&self, class: &'c str) -> &'c str {
        if self.classes.contains_key(class) { class } else { OTHER }
    }

    /// The class as a label.
    fn label(&self, class: &str) -> &str {
        self.classes.get(class).map_or(OTHER, String::as_str)
    }

    fn count(&self, host: &dyn Host, family: Family, class: &str, outcome: &'static str, reason: &'static str) {
        self.add(host, (family, outcome, reason), self.label(class), 1);
    }

    fn add(&self, host: &dyn Host, key: Key, label: &str, by: i64) {
        if let Some(metric) = self.id(host, key, label) {
            let _uncounted = host.add_metric(metric, by);
        }
    }

    fn record(&self, host: &dyn Host, family: Family, label: &str, span: Duration) {
        if let Some(metric) = self.id(host, (family, "", ""), label) {
            let _uncounted = host.record_metric(metric, millis(span));
        }
    }

    fn id(&self, host: &dyn Host, key: Key, label: &str) -> Option<MetricId> {
        if let Some(known) = self.ids.borrow().get(&key).and_then(|labels| labels.get(label)) {
            return *known;
        }
        let (family, outcome, reason) = key;
        let mut name = family.name().to_owned();
        // Only gauges tell instances apart: each is set by the housekeeping of one, where counters of several add up.
        let instance = if family.kind() == MetricKind::Gauge { self.instance.as_str() } else { "" };
        for (name_of, value) in [("class", label), ("instance", instance), ("outcome", outcome), ("reason", reason)] {
            if !value.is_empty() {
                name.extend([".", name_of, ".", value]);
            }
        }
        let id = match host.define_metric(family.kind(), &name) {
            Ok(id) => Some(id),
            Err(error) => {
                host.log(Level::Warn, &format!("{name} is not counted: {error}"));
                None
            }
        };
        self.ids.borrow_mut().entry(key).or_default().insert(label.to_owned(), id);
        id
    }
}

#[cfg(test)]
mod tests {
    use interlock_core::LockName;

    use super::*;
    use crate::host::Status;
    use crate::host::fake::{FakeHost, FakeProxy};

    fn telemetry() -> (FakeHost, Telemetry) {
        (FakeProxy::new().host(), Telemetry::new(["order", "a.b", "a_b"].map(str::to_owned), "shop.eu"))
    }

    #[test]
    fn names_carry_their_labels() {
        let (host, telemetry) = telemetry();
        let wait = Duration::from_micros(132_900);
        telemetry.acquired(&host, "order", wait);
        telemetry.refused(&host, "order", "deadlock", Duration::ZERO);
        telemetry.refused(&host, "a.b", "order-violation", Duration::ZERO);
        telemetry.refused(&host, "order", "wait-timeout", Duration::from_secs(1));
        telemetry.audit(&host, "order", "refused", "lock-held");
        telemetry.lease_lost(&host, "order", Loss::HoldLimit);
        telemetry.backend_error(&host, "conflict");
        telemetry.backend(&host, Duration::from_millis(3));
        let lock = LockName::parse("order/1").unwrap();
        telemetry.observe(
            &host,
            &[Event::Queued { lock: lock.clone() }, Event::Released { lock, held_for: Duration::from_millis(7) }],
        );
        telemetry.swept(&host, &Census::default());
        let expected = [
            "interlock_acquire_total.class.a_b.outcome.refused.reason.order-violation",
            "interlock_acquire_total.class.order.outcome.acquired",
            "interlock_acquire_total.class.order.outcome.refused.reason.deadlock",
            "interlock_acquire_total.class.order.outcome.refused.reason.wait-timeout",
            "interlock_audit_total.class.order.outcome.refused.reason.lock-held",
            "interlock_backend_error_total.reason.conflict",
            "interlock_deadlock_total.class.order",
            "interlock_lease_lost_total.class.order.reason.hold-limit",
            "interlock_order_violation_total.class.a_b",
            "interlock_sweep_total",
        ];
        assert_eq!(host.proxy().metrics(), expected.map(|name| (name.to_owned(), 1)).into());
        assert_eq!(host.proxy().histogram("interlock_wait_ms.class.order"), [132, 1000]);
        assert_eq!(host.proxy().histogram("interlock_hold_ms.class.order"), [7]);
        assert_eq!(host.proxy().histogram("interlock_backend_ms"), [3]);
    }

    fn census(classes: &[(&str, u64, u64)]) -> Census {
        let tallies = classes.iter().map(|(class, held, waiting)| {
            let tally = Tally { held: *held, waiting: *waiting };
            ((*class).to_owned(), tally)
        });
        Census { locks: 5, detached: 0, owners: 3, classes: tallies.collect() }
    }

    #[test]
    fn gauges_show_the_table_whoever_sweeps_it() {
        let (host, telemetry) = telemetry();
        telemetry.swept(&host, &census(&[("order", 2, 1), ("x", 1, 0), ("y", 4, 0), ("a.b", 1, 0), ("a_b", 2, 0)]));
        let shown = |gauges: &[(&str, i64)]| gauges.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        let table = [("interlock_table_locks.instance.shop_eu", 5), ("interlock_table_owners.instance.shop_eu", 3)];
        let held = [
            ("interlock_held.class.a_b.instance.shop_eu", 3),
            ("interlock_held.class.order.instance.shop_eu", 2),
            ("interlock_held.class.other.instance.shop_eu", 5),
            ("interlock_waiting.class.order.instance.shop_eu", 1),
        ];
        assert_eq!(host.proxy().gauges(), shown(&[table.as_slice(), held.as_slice()].concat()));

        // Another VM takes over, under a policy that has lost a class; a neighbour has its own gauges.
        telemetry.retire(&host);
        assert!(host.proxy().gauges().is_empty());
        let other = host.proxy().host();
        let successor = Telemetry::new([], "shop.eu");
        let neighbour = Telemetry::new([], "neighbour");
        neighbour.swept(&other, &Census::default());
        for _ in 0..2 {
            successor.swept(&other, &census(&[("order", 1, 0)]));
            let held = [("interlock_held.class.other.instance.shop_eu", 1)];
            assert_eq!(host.proxy().gauges(), shown(&[table.as_slice(), held.as_slice()].concat()));
        }
        // Even a gauge that somebody made fall below 0 is set right.
        successor.add(&other, (Family::TableLocks, "", ""), "", -7);
        successor.swept(&other, &Census::default());
        assert!(host.proxy().gauges().is_empty());
    }

    #[test]
    fn classes_that_no_policy_names_share_one_metric() {
        let (host, telemetry) = telemetry();
        for n in 0..1000 {
            telemetry.refused(&host, &format!("class-{n}"), "lock-held", Duration::ZERO);
        }
        let name = "interlock_acquire_total.class.other.outcome.refused.reason.lock-held";
        assert_eq!(host.proxy().metrics(), BTreeMap::from([(name.to_owned(), 1000)]));
        let calls = host.take_calls();
        assert_eq!((calls.metric_definitions, calls.metric_updates), (1, 1000));
    }

    #[test]
    fn a_metric_that_the_host_refuses_is_asked_for_once() {
        let (host, telemetry) = telemetry();
        host.fail_next("define_metric", 1, Status::InternalFailure);
        telemetry.backend_error(&host, "conflict");
        telemetry.backend_error(&host, "conflict");
        assert_eq!(host.take_calls().metric_definitions, 1);
        assert_eq!(host.take_lines().len(), 1);
    }
}
