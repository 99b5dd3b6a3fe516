//! What the filter tells operators: metrics and log lines. Nothing is decided here.

use interlock_core::{Cause, Duration, Entry, Event, LockName, Loss, Mode, OwnerId, Refusal, State, StoreError};

use super::Active;
use super::stream::{Case, Held};
use crate::answer::Reject;
use crate::backend::remote::Notes;
use crate::backend::{Lease, Waiting};
use crate::host::{Host, HostError, Level};
use crate::policy::Backend;
use crate::telemetry::{self, Incident, Record};

/// All locks of a request were granted.
pub fn acquired(host: &dyn Host, case: &Case, lease: &Lease, waited: Duration) {
    let telemetry = &case.active.telemetry;
    for grant in lease.grants().iter().filter(|grant| grant.asked) {
        let class = grant.name.class();
        if case.is_enforced() {
            telemetry.acquired(host, class, waited);
        } else {
            telemetry.audit(host, class, "acquired", "");
        }
    }
}

/// A request was refused, or would have been under audit.
pub fn refused(host: &dyn Host, case: &Case, reject: &Reject, waited: Duration) {
    let class = reject.lock().map_or("", LockName::class);
    failed(host, case, reject);
    if case.is_enforced() {
        case.active.telemetry.refused(host, class, reject.slug(), waited);
        log(host, case, Incident::Refused, reject, waited);
    } else {
        case.active.telemetry.audit(host, class, "refused", reject.slug());
        log(host, case, Incident::WouldRefuse, reject, waited);
    }
}

/// The backend failed, and the rule let the request go on without its locks.
pub fn unlocked(host: &dyn Host, case: &Case, reject: &Reject, waited: Duration) {
    let class = reject.lock().map_or("", LockName::class);
    failed(host, case, reject);
    if case.is_enforced() {
        case.active.telemetry.unlocked(host, class, reject.slug());
    } else {
        case.active.telemetry.audit(host, class, "unlocked", reject.slug());
    }
    log(host, case, Incident::Unlocked, reject, waited);
}

/// A guard has nothing against a request.
pub fn guarded(host: &dyn Host, case: &Case, class: &str) {
    let telemetry = &case.active.telemetry;
    if case.is_enforced() {
        telemetry.guarded(host, class, "passed", "");
    } else {
        telemetry.audit(host, class, "passed", "");
    }
}

/// A call of an authority has failed.
pub fn call_failed(host: &dyn Host, active: &Active, reason: &'static str) {
    active.telemetry.backend_error(host, reason);
}

/// An authority took so long to answer, its waiting aside.
pub fn took(host: &dyn Host, active: &Active, took: Duration) {
    active.telemetry.backend(host, took);
}

/// A guard turned a request away, or would have under audit.
pub fn turned_away(host: &dyn Host, case: &Case, reject: &Reject) {
    let incident = if case.is_enforced() { Incident::Refused } else { Incident::WouldRefuse };
    at_guard(host, case, incident, reject, "refused");
}

/// A guard could not find out, and let a request pass as it is told to.
pub fn passed_unguarded(host: &dyn Host, case: &Case, reject: &Reject) {
    at_guard(host, case, Incident::Unlocked, reject, "unlocked");
}

fn at_guard(host: &dyn Host, case: &Case, incident: Incident, reject: &Reject, outcome: &'static str) {
    let class = reject.lock().map_or("", LockName::class);
    failed(host, case, reject);
    if case.is_enforced() {
        case.active.telemetry.guarded(host, class, outcome, reject.slug());
    } else {
        case.active.telemetry.audit(host, class, outcome, reject.slug());
    }
    log(host, case, incident, reject, host.now().since(case.arrived));
}

/// A lease that was asked for by message was refused.
pub fn refused_lease(host: &dyn Host, active: &Active, reject: &Reject, asked_by: &str) {
    let class = reject.lock().map_or("", LockName::class);
    let waited = match reject {
        Reject::Core(Refusal { cause: Cause::WaitTimeout { waited, .. }, .. }) => *waited,
        _ => Duration::ZERO,
    };
    active.telemetry.refused(host, class, reject.slug(), waited);
    if telemetry::enabled(host, Incident::Refused) {
        let detail = reject.detail();
        let record = Record { waited, ..record(Incident::Refused, active, reject, &detail, asked_by) };
        telemetry::log(host, &record);
    }
}

/// A lock was taken away from its holders.
pub fn broken(host: &dyn Host, active: &Active, lock: &LockName, ended: &[Entry]) {
    for entry in ended {
        let record = Record {
            event: Incident::LeaseLost,
            instance: &active.policy.instance,
            owner: Some(entry.owner.as_str()),
            lock: Some(lock.as_str()),
            mode: Some(entry.mode.as_str()),
            reason: "break-glass",
            detail: "",
            holders: &[],
            cycle: &[],
            waited: Duration::ZERO,
            asked_by: &entry.asked_by,
            route: "",
        };
        telemetry::log(host, &record);
    }
}

/// What there is to say of a request that did not get its locks, whoever it came from.
fn record<'a>(
    event: Incident,
    active: &'a Active,
    reject: &'a Reject,
    detail: &'a str,
    asked_by: &'a str,
) -> Record<'a> {
    let refusal = match reject {
        Reject::Core(refusal) => Some(refusal),
        _ => None,
    };
    let (holders, cycle) = match refusal.map(|refusal| &refusal.cause) {
        Some(Cause::Held { holders, .. } | Cause::WaitTimeout { holders, .. }) => (holders.as_slice(), &[][..]),
        Some(Cause::Deadlock { cycle }) => (&[][..], cycle.as_slice()),
        _ => (&[][..], &[][..]),
    };
    Record {
        event,
        instance: &active.policy.instance,
        owner: reject.owner().map(OwnerId::as_str),
        lock: reject.lock().map(LockName::as_str),
        mode: refusal.map(|refusal| refusal.mode.as_str()),
        reason: reject.slug(),
        detail,
        holders,
        cycle,
        waited: Duration::ZERO,
        asked_by,
        route: "",
    }
}

/// Counts a failure of the backend, if that is what it was. Those of an authority are counted call by call.
fn failed(host: &dyn Host, case: &Case, reject: &Reject) {
    if let Reject::Core(refusal) = reject
        && let Cause::Backend { .. } = refusal.cause
        && case.active.policy.backend == Backend::Local
    {
        case.active.telemetry.backend_error(host, "store");
    }
}

/// Writes the line about a request that did not get its locks.
fn log(host: &dyn Host, case: &Case, event: Incident, reject: &Reject, waited: Duration) {
    if !telemetry::enabled(host, event) {
        return;
    }
    let detail = reject.detail();
    let record = Record {
        owner: case.owner.as_ref().map(|owner| owner.as_str()),
        waited,
        route: &case.route,
        ..record(event, &case.active, reject, &detail, &case.terms.asked_by)
    };
    telemetry::log(host, &record);
}

/// Whoever asked has gone before the locks were granted.
pub fn cancelled(host: &dyn Host, case: &Case, waiting: &Waiting) {
    if let (true, Some((lock, _))) = (case.is_enforced(), waiting.waits_for()) {
        case.active.telemetry.cancelled(host, lock.class(), host.now().since(case.arrived));
    }
}

/// A lease ended before its request did.
pub fn lost(host: &dyn Host, case: &Case, lock: &LockName, mode: Option<Mode>, loss: Loss) {
    if !case.is_enforced() {
        return case.active.telemetry.audit(host, lock.class(), "lost", "lease-lost");
    }
    case.active.telemetry.lease_lost(host, lock.class(), loss);
    let record = Record {
        event: Incident::LeaseLost,
        instance: &case.active.policy.instance,
        owner: case.owner.as_ref().map(|owner| owner.as_str()),
        lock: Some(lock.as_str()),
        mode: mode.map(Mode::as_str),
        reason: loss.as_str(),
        detail: "",
        holders: &[],
        cycle: &[],
        waited: host.now().since(case.arrived),
        asked_by: &case.terms.asked_by,
        route: &case.route,
    };
    telemetry::log(host, &record);
}

/// A lease at an authority or in etcd was given back, or lost. Of those in its own table the table tells.
pub fn released(host: &dyn Host, case: &Case, held: &Held) {
    if let (true, Lease::Authority(_) | Lease::Etcd(_)) = (case.is_enforced(), &held.lease) {
        let held_for = host.now().since(held.since);
        for grant in held.lease.grants() {
            case.active.telemetry.held(host, grant.name.class(), held_for);
        }
    }
}

/// What calls of an authority brought about.
pub fn called(host: &dyn Host, active: &Active, notes: &Notes) {
    notes.took.iter().for_each(|span| took(host, active, *span));
    notes.failures.iter().for_each(|reason| call_failed(host, active, reason));
}

/// What an operation on the table brought about.
pub fn observe(host: &dyn Host, active: &Active, events: &[Event]) {
    active.telemetry.observe(host, events);
    for event in events {
        let Event::Expired { lock, entry, held_for } = event else { continue };
        let loss = match entry.state {
            State::Held { until, .. } if until <= host.now() => Loss::HoldLimit,
            State::Held { .. } | State::Waiting { .. } => Loss::Expired,
        };
        let record = Record {
            event: Incident::LeaseExpired,
            instance: &active.policy.instance,
            owner: Some(entry.owner.as_str()),
            lock: Some(lock.as_str()),
            mode: Some(entry.mode.as_str()),
            reason: loss.as_str(),
            detail: "",
            holders: &[],
            cycle: &[],
            waited: *held_for,
            asked_by: &entry.asked_by,
            route: "",
        };
        telemetry::log(host, &record);
    }
}

/// The table could not be reached for something that no request is waiting for.
pub fn backend(host: &dyn Host, active: &Active, error: &StoreError) {
    active.telemetry.backend_error(host, "store");
    host.log(Level::Error, &format!("interlock: instance {}: {error}", active.policy.instance));
}

/// The host did not do what it was asked.
pub fn trouble(host: &dyn Host, active: &Active, error: &HostError) {
    host.log(Level::Error, &format!("interlock: instance {}: {error}", active.policy.instance));
}
