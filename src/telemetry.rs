//! What operators see of the plugin: metrics and one structured log line for each refusal, lost lease and expiry.
//!
//! Metric names carry their labels (`interlock_acquire_total.class.order.outcome.acquired`); the `stats_tags` of the
//! shipped bootstraps turn them into labels. What must not live here: decisions. A metric that the host refuses is not
//! counted and stops nothing.

use std::cell::RefCell;
use std::collections::BTreeMap;

use interlock_core::{Classes, Duration, Edge, Holder, Loss};
use serde::Serialize;

use crate::host::{Host, Level, MetricId, MetricKind};

/// The class under which everything is counted that the policy does not declare, so that names which clients choose
/// cannot make the host keep ever more metrics.
const OTHER: &str = "other";

/// Holders that a log line lists. It says how many there were besides.
const HOLDERS_LOGGED: usize = 32;

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

/// A metric, apart from its class or instance: family, outcome, reason. Empty labels are left out.
type Key = (Family, &'static str, &'static str);

/// The metrics of one configuration. Outcomes and reasons are constants of the program, classes those of the policy, so
/// their number is bounded.
#[derive(Debug)]
pub struct Telemetry {
    classes: Classes,
    instance: String,
    /// Ids by key, then by class (or instance, or nothing). None: the host refused the metric, and is not asked again.
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
    /// The metrics of a configuration with these classes and that `instance`.
    pub fn new(classes: Classes, instance: &str) -> Self {
        Telemetry { classes, instance: instance.to_owned(), ids: RefCell::default() }
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

    /// What enforcement would have done to a lock of that class; `reason` is empty where it would have been granted.
    pub fn audit(&self, host: &dyn Host, class: &str, outcome: &'static str, reason: &'static str) {
        self.count(host, Family::Audit, class, outcome, reason);
    }

    /// That many more (or fewer) locks of that class are held. Whoever frees the locks of a VM that died takes them off.
    pub fn held(&self, host: &dyn Host, class: &str, by: i64) {
        self.add(host, (Family::Held, "", ""), self.label(class), by);
    }

    /// That many more (or fewer) requests wait for a lock of that class.
    pub fn waiting(&self, host: &dyn Host, class: &str, by: i64) {
        self.add(host, (Family::Waiting, "", ""), self.label(class), by);
    }

    /// A lock of that class was given back after it was held for that long.
    pub fn hold(&self, host: &dyn Host, class: &str, held: Duration) {
        self.record(host, Family::Hold, self.label(class), held);
    }

    /// A lease on a lock of that class ended while its request was upstream.
    pub fn lease_lost(&self, host: &dyn Host, class: &str, loss: Loss) {
        let reason = match loss {
            Loss::HoldLimit => "hold-limit",
            Loss::Expired => "expired",
        };
        self.count(host, Family::LeaseLost, class, "", reason);
    }

    /// A lease on a lock of that class was found unrenewed past its TTL, and ended.
    pub fn lease_expired(&self, host: &dyn Host, class: &str) {
        self.count(host, Family::LeaseExpired, class, "", "");
    }

    /// The lease backend took that long for one operation.
    pub fn backend(&self, host: &dyn Host, took: Duration) {
        self.record(host, Family::Backend, "", took);
    }

    /// The lease backend failed; `reason` says how, in one word.
    pub fn backend_error(&self, host: &dyn Host, reason: &'static str) {
        self.add(host, (Family::BackendError, "", reason), "", 1);
    }

    /// Housekeeping counted the table: so many locks with holders or waiters, and so many owners.
    ///
    /// Gauges belong to the process and can only be added to, so the difference to what they show is added. If two VMs
    /// count at once the sum is off until the next count.
    pub fn table(&self, host: &dyn Host, locks: u64, owners: u64) {
        for (family, count) in [(Family::TableLocks, locks), (Family::TableOwners, owners)] {
            let Some(gauge) = self.id(host, (family, "", ""), &self.instance) else { continue };
            // A gauge that fell below 0 reads as its two's complement.
            if let Ok(shown) = host.read_metric(gauge) {
                let _uncounted = host.add_metric(gauge, count.cast_signed().wrapping_sub(shown.cast_signed()));
            }
        }
    }

    /// Housekeeping has gone through the table.
    pub fn swept(&self, host: &dyn Host) {
        self.add(host, (Family::Sweep, "", ""), "", 1);
    }

    /// The class as a label.
    fn label<'a>(&self, class: &'a str) -> &'a str {
        if self.classes.declares(class) { class } else { OTHER }
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
        let label_name = match family {
            Family::TableLocks | Family::TableOwners => "instance",
            _ => "class",
        };
        for (label_name, value) in [(label_name, label), ("outcome", outcome), ("reason", reason)] {
            if !value.is_empty() {
                name.extend([".", label_name, ".", &sanitized(value)]);
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

/// What a log line is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// A request did not get its locks.
    Refused,
    /// A lease ended while its request was upstream.
    LeaseLost,
    /// A lease was not renewed, and ended.
    LeaseExpired,
}

impl Event {
    /// A refusal is the lock manager at work; the other two need someone to look.
    const fn level(self) -> Level {
        match self {
            Event::Refused => Level::Info,
            Event::LeaseLost | Event::LeaseExpired => Level::Warn,
        }
    }
}

/// One event, for the log. Fields that are none or empty are left out.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// What happened.
    pub event: Event,
    /// The filter's instance.
    pub instance: &'a str,
    /// Whose request or lease.
    pub owner: Option<&'a str>,
    /// Which lock; none where the annotation named none.
    pub lock: Option<&'a str>,
    /// In which mode.
    pub mode: Option<&'a str>,
    /// Why: the slug of the refusal, or how the lease ended.
    pub reason: &'a str,
    /// For people: what the slug does not say.
    pub detail: &'a str,
    /// Who held the lock.
    pub holders: &'a [Holder],
    /// The cycle that waiting would have closed.
    pub cycle: &'a [Edge],
    /// How long the request waited.
    pub waited: Duration,
    /// The route that the request took, or would have taken.
    pub route: &'a str,
}

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    event: Event,
    instance: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    owner: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lock: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mode: Option<&'a str>,
    reason: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    detail: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    holders: Vec<LineHolder<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    holders_not_listed: Option<usize>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cycle: Vec<LineEdge<'a>>,
    waited_ms: u64,
    #[serde(skip_serializing_if = "str::is_empty")]
    route: &'a str,
}

#[derive(Serialize)]
struct LineHolder<'a> {
    owner: &'a str,
    mode: &'static str,
    fence: u64,
    held_ms: u64,
    #[serde(skip_serializing_if = "str::is_empty")]
    asked_by: &'a str,
}

#[derive(Serialize)]
struct LineEdge<'a> {
    owner: &'a str,
    waits_for: &'a str,
    held_by: &'a str,
}

/// Whether the host would write a line about that: what goes into one need not be gathered otherwise.
pub fn enabled(host: &dyn Host, event: Event) -> bool {
    event.level() >= host.log_level()
}

/// Writes one line of JSON about an event, unless the host filters it.
pub fn log(host: &dyn Host, record: &Record<'_>) {
    if !enabled(host, record.event) {
        return;
    }
    let listed = record.holders.iter().take(HOLDERS_LOGGED).map(|holder| LineHolder {
        owner: holder.owner.as_str(),
        mode: holder.mode.as_str(),
        fence: holder.fence.0,
        held_ms: millis(holder.held_for),
        asked_by: &holder.asked_by,
    });
    let cycle = record.cycle.iter().map(|edge| LineEdge {
        owner: edge.owner.as_str(),
        waits_for: edge.waits_for.as_str(),
        held_by: edge.held_by.as_str(),
    });
    let line = Line {
        time: rfc3339(host.unix_micros()),
        event: record.event,
        instance: record.instance,
        owner: record.owner,
        lock: record.lock,
        mode: record.mode,
        reason: record.reason,
        detail: record.detail,
        holders: listed.collect(),
        holders_not_listed: record.holders.len().checked_sub(HOLDERS_LOGGED).filter(|more| *more > 0),
        cycle: cycle.collect(),
        waited_ms: millis(record.waited),
        route: record.route,
    };
    match serde_json::to_string(&line) {
        Ok(line) => host.log(record.event.level(), &line),
        Err(error) => host.log(Level::Error, &format!("an event cannot be written as JSON: {error}")),
    }
}

/// A moment as RFC 3339 writes it, in UTC with microseconds. `unix_micros` is microseconds since 1970.
///
/// The date is Howard Hinnant's `civil_from_days` ("chrono-Compatible Low-Level Date Algorithms"), for days from 1970 on:
/// the year begins in March, so that the leap day is its last, and 400 years are one period of 146,097 days.
pub fn rfc3339(unix_micros: u64) -> String {
    let (seconds, micros) = (unix_micros / 1_000_000, unix_micros % 1_000_000);
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
}

#[cfg(test)]
mod tests {
    use interlock_core::{Class, Fence, LockName, Mode, OwnerId};
    use serde_json::{Value, json};

    use super::*;
    use crate::host::Status;
    use crate::host::fake::{FakeHost, FakeProxy};

    fn telemetry() -> (FakeHost, Telemetry) {
        let mut classes = Classes::default();
        classes.insert("order".to_owned(), Class::default());
        classes.insert("a.b".to_owned(), Class::default());
        (FakeProxy::new().host(), Telemetry::new(classes, "shop.eu"))
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
        telemetry.lease_expired(&host, "order");
        telemetry.backend_error(&host, "conflict");
        telemetry.backend(&host, Duration::from_millis(3));
        telemetry.hold(&host, "order", Duration::from_millis(7));
        telemetry.swept(&host);
        let expected = [
            "interlock_acquire_total.class.a_b.outcome.refused.reason.order-violation",
            "interlock_acquire_total.class.order.outcome.acquired",
            "interlock_acquire_total.class.order.outcome.refused.reason.deadlock",
            "interlock_acquire_total.class.order.outcome.refused.reason.wait-timeout",
            "interlock_audit_total.class.order.outcome.refused.reason.lock-held",
            "interlock_backend_error_total.reason.conflict",
            "interlock_deadlock_total.class.order",
            "interlock_lease_expired_total.class.order",
            "interlock_lease_lost_total.class.order.reason.hold-limit",
            "interlock_order_violation_total.class.a_b",
            "interlock_sweep_total",
        ];
        assert_eq!(host.proxy().metrics(), expected.map(|name| (name.to_owned(), 1)).into());
        assert_eq!(host.proxy().histogram("interlock_wait_ms.class.order"), [132, 1000]);
        assert_eq!(host.proxy().histogram("interlock_hold_ms.class.order"), [7]);
        assert_eq!(host.proxy().histogram("interlock_backend_ms"), [3]);
    }

    #[test]
    fn classes_that_no_policy_names_share_one_metric() {
        let (host, telemetry) = telemetry();
        for n in 0..1000 {
            telemetry.held(&host, &format!("class-{n}"), 1);
        }
        assert_eq!(host.proxy().metric("interlock_held.class.other"), 1000);
        let calls = host.take_calls();
        assert_eq!((calls.metric_definitions, calls.metric_updates), (1, 1000));
        telemetry.held(&host, "class-0", -1000);
        assert!(host.proxy().gauges().is_empty());
    }

    #[test]
    fn the_table_is_counted_whoever_counts_it() {
        let (host, telemetry) = telemetry();
        let other = (host.proxy().host(), Telemetry::new(Classes::default(), "shop.eu"));
        telemetry.table(&host, 5, 3);
        other.1.table(&other.0, 2, 0);
        assert_eq!(host.proxy().metric("interlock_table_locks.instance.shop_eu"), 2);
        assert_eq!(host.proxy().metric("interlock_table_owners.instance.shop_eu"), 0);
        other.1.add(&other.0, (Family::TableLocks, "", ""), "shop.eu", -7);
        telemetry.table(&host, 4, 1);
        assert_eq!(host.proxy().metric("interlock_table_locks.instance.shop_eu"), 4);
    }

    #[test]
    fn a_metric_that_the_host_refuses_is_asked_for_once() {
        let (host, telemetry) = telemetry();
        host.fail_next("define_metric", 1, Status::InternalFailure);
        telemetry.waiting(&host, "order", 1);
        telemetry.waiting(&host, "order", -1);
        assert_eq!(host.take_calls().metric_definitions, 1);
        assert_eq!(host.take_lines().len(), 1);
    }

    #[test]
    fn a_line_is_json_with_everything_in_it() {
        let (host, _) = telemetry();
        let owner = |name: &str| OwnerId::new(name).unwrap();
        let holder = |n: u64| Holder {
            owner: owner("b"),
            mode: Mode::Shared,
            fence: Fence(n),
            held_for: Duration::from_millis(40),
            asked_by: "pay".to_owned(),
        };
        let edge = |from: &str, to: &str| Edge {
            owner: owner(from),
            waits_for: LockName::parse("order/1").unwrap(),
            held_by: owner(to),
        };
        let holders: Vec<Holder> = (0..40).map(holder).collect();
        let record = Record {
            event: Event::Refused,
            instance: "shop",
            owner: Some("a\"\n\u{7f}"),
            lock: Some("order/1"),
            mode: Some("exclusive"),
            reason: "deadlock",
            detail: "",
            holders: &holders,
            cycle: &[edge("a", "b"), edge("b", "a")],
            waited: Duration::from_millis(9),
            route: "capture",
        };
        log(&host, &record);
        let lines = host.take_lines();
        let [(Level::Info, line)] = lines.as_slice() else { panic!("{lines:?}") };
        assert!(!line.contains('\n'));
        let mut line: Value = serde_json::from_str(line).unwrap();
        let listed = line.as_object_mut().unwrap().remove("holders").unwrap();
        assert_eq!(listed.as_array().unwrap().len(), 32);
        assert_eq!(listed[31], json!({"owner": "b", "mode": "shared", "fence": 31, "held_ms": 40, "asked_by": "pay"}));
        let expected = json!({
            "time": "2026-09-21T14:13:20.000000Z", "event": "refused", "instance": "shop", "owner": "a\"\n\u{7f}",
            "lock": "order/1", "mode": "exclusive", "reason": "deadlock", "holders_not_listed": 8,
            "cycle": [{"owner": "a", "waits_for": "order/1", "held_by": "b"},
                      {"owner": "b", "waits_for": "order/1", "held_by": "a"}],
            "waited_ms": 9, "route": "capture",
        });
        assert_eq!(line, expected);
    }

    #[test]
    fn a_filtered_line_is_not_even_made() {
        let (host, _) = telemetry();
        host.set_log_level(Level::Warn);
        let record = Record {
            event: Event::Refused,
            instance: "shop",
            owner: None,
            lock: None,
            mode: None,
            reason: "malformed-annotation",
            detail: "",
            holders: &[],
            cycle: &[],
            waited: Duration::ZERO,
            route: "",
        };
        host.take_calls();
        log(&host, &record);
        assert_eq!(host.take_calls(), crate::host::fake::Calls::default());
        log(&host, &Record { event: Event::LeaseLost, ..record });
        assert_eq!(host.take_lines().len(), 1);
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00"),
            (951_782_400, "2000-02-29T00:00:00"),
            (951_868_799, "2000-02-29T23:59:59"),
            (951_868_800, "2000-03-01T00:00:00"),
            (1_767_225_599, "2025-12-31T23:59:59"),
            (1_709_164_800, "2024-02-29T00:00:00"),
            (4_107_542_400, "2100-03-01T00:00:00"),
            (253_402_300_799, "9999-12-31T23:59:59"),
        ] {
            assert_eq!(rfc3339(seconds * 1_000_000 + 42), format!("{expected}.000042Z"));
        }
        assert!(rfc3339(u64::MAX).ends_with('Z'));
    }
}
