//! One line of JSON for each refusal, lost lease and expiry: for a person who looks for one request, or a program that
//! looks through all of them. Envoy puts its own prefix before each.

use interlock_core::{Duration, Edge, Holder};
use serde::Serialize;

use super::millis;
use crate::host::{Host, Level};

/// Holders that a log line lists. It says how many there were besides.
const HOLDERS_LOGGED: usize = 32;

/// What a log line is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Incident {
    /// A request did not get its locks.
    Refused,
    /// A request under audit would not have got its locks.
    WouldRefuse,
    /// A request went on without its locks, because the backend failed.
    Unlocked,
    /// A lease ended while its request was upstream.
    LeaseLost,
    /// A lease was not renewed, and ended.
    LeaseExpired,
}

impl Incident {
    /// A refusal is the lock manager at work; the others need someone to look.
    const fn level(self) -> Level {
        match self {
            Incident::Refused | Incident::WouldRefuse => Level::Info,
            Incident::Unlocked | Incident::LeaseLost | Incident::LeaseExpired => Level::Warn,
        }
    }
}

/// One event, for the log. Fields that are none or empty are left out.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// What happened.
    pub event: Incident,
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
    /// What asked for the lock: a rule, a kind of annotation.
    pub asked_by: &'a str,
    /// The route that the request took, or would have taken.
    pub route: &'a str,
}

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    event: Incident,
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
    #[serde(skip_serializing_if = "<[Edge]>::is_empty")]
    cycle: &'a [Edge],
    waited_ms: u64,
    #[serde(skip_serializing_if = "str::is_empty")]
    asked_by: &'a str,
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

/// Whether the host would write a line about that: what goes into one need not be gathered otherwise.
pub fn enabled(host: &dyn Host, event: Incident) -> bool {
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
        cycle: record.cycle,
        waited_ms: millis(record.waited),
        asked_by: record.asked_by,
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
    use interlock_core::{Fence, LockName, Mode, OwnerId};
    use serde_json::{Value, json};

    use super::*;
    use crate::host::fake::{Calls, FakeProxy};

    #[test]
    fn a_line_is_json_with_everything_in_it() {
        let host = FakeProxy::new().host();
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
            event: Incident::Refused,
            instance: "shop",
            owner: Some("a\"\n\u{7f}"),
            lock: Some("order/1"),
            mode: Some("exclusive"),
            reason: "deadlock",
            detail: "",
            holders: &holders,
            cycle: &[edge("a", "b"), edge("b", "a")],
            waited: Duration::from_millis(9),
            asked_by: "pay",
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
            "waited_ms": 9, "asked_by": "pay", "route": "capture",
        });
        assert_eq!(line, expected);
    }

    #[test]
    fn a_filtered_line_is_not_even_made() {
        let host = FakeProxy::new().host();
        host.set_log_level(Level::Warn);
        let record = Record {
            event: Incident::Refused,
            instance: "shop",
            owner: None,
            lock: None,
            mode: None,
            reason: "malformed-annotation",
            detail: "",
            holders: &[],
            cycle: &[],
            waited: Duration::ZERO,
            asked_by: "",
            route: "",
        };
        host.take_calls();
        log(&host, &record);
        assert_eq!(host.take_calls(), Calls::default());
        log(&host, &Record { event: Incident::LeaseLost, ..record });
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
