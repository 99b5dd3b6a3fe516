//! Asking for a lease: from the message that asks, over the wait, to the grant.

use super::Receipt;
use super::authority::{Answer, Parked, abandon, bring_back, change, clear, end, expire, granted, read};
use super::record::{End, LeaseBucket, Standing};
use crate::id::LeaseId;
use crate::mode::Mode;
use crate::refusal::{Cause, Refusal};
use crate::request::{Claim, Pending, Request, Watch};
use crate::session::BEAT;
use crate::store::{self, Save, Store, StoreError};
use crate::table::{Outcome, Scene, Table};
use crate::time::{Duration, Time};

/// What a request finds under its identity.
enum Found {
    Nothing,
    Mine,
    Waiting { deadline: Time },
    Held(Box<Claim>),
    Over(End),
    Taken,
}

/// Takes a request for a lease in. With a receipt it re-asserts a lease that was granted before.
///
/// # Errors
/// Those of the store. The lease may have been granted then: to know, ask again.
pub fn put<S: Store>(
    table: &mut Table,
    scene: &Scene<'_, S>,
    request: Request,
    receipt: Option<&Receipt>,
) -> Result<Answer, StoreError> {
    let request = request.detached();
    let lease = request.lease;
    let deadline = deadline_of(&request);
    let in_grace = !table.grace_left(scene)?.is_zero() && !bug!(GraceSkipped);
    let found = store::update(scene.store, LeaseBucket::index(scene.store, lease), |leases: &mut LeaseBucket| {
        Ok(match leases.get(lease) {
            Some(Standing::Over { end, .. } | Standing::Ending { end, .. }) => (Found::Over(*end), Save::No),
            Some(Standing::Held { claim, .. } | Standing::Waiting { claim, .. })
                if !is_same(&claim.request, &request) =>
            {
                (Found::Taken, Save::No)
            }
            Some(Standing::Held { claim, .. }) => (Found::Held(claim.clone()), Save::No),
            Some(Standing::Waiting { deadline, .. }) => (Found::Waiting { deadline: *deadline }, Save::No),
            // Nothing is reserved for what is refused at once or comes back whole.
            None if in_grace || receipt.is_some() => (Found::Nothing, Save::No),
            None => {
                let claim = Box::new(Claim::new(request.clone()));
                leases.set(lease, Standing::Waiting { driver: table.session(), claim, deadline }, scene.now);
                (Found::Mine, Save::Yes)
            }
        })
    })?;
    match found {
        Found::Mine => {
            let arrived = request.arrived;
            let outcome = table.acquire(scene, request);
            settle(table, scene, lease, arrived, outcome)
        }
        Found::Nothing => match receipt {
            Some(receipt) => reassert(table, scene, &request, receipt),
            None => Ok(refused_in_grace(table, scene, request)?),
        },
        Found::Waiting { deadline } => Ok(watch(scene, lease, request.arrived, deadline)),
        Found::Held(claim) => again(table, scene, &claim, request.arrived),
        Found::Over(end) => Ok(Answer::Over(end)),
        Found::Taken => Ok(Answer::Taken),
    }
}

/// Looks after a request that waits: because it was woken, or because it is time to.
///
/// # Errors
/// Those of the store, and it waits no more: it is as if its stream had gone.
pub fn poll<S: Store>(table: &mut Table, scene: &Scene<'_, S>, parked: Parked) -> Result<Answer, StoreError> {
    let lease = parked.lease;
    let standing = match read(scene, lease) {
        Ok(standing) => standing,
        Err(error) => {
            leave(table, scene, parked);
            return Err(error);
        }
    };
    match standing {
        Some(Standing::Waiting { claim, deadline, .. }) if parked.drives => {
            let pending = Pending { claim: *claim, watch: Watch::until(parked.poll_at), looked: scene.now, deadline };
            let outcome = table.poll(scene, pending);
            settle(table, scene, lease, parked.arrived, outcome)
        }
        Some(Standing::Waiting { driver, deadline, .. }) => {
            // Nobody moves it on: its driver is dead, or has forgotten it.
            let forgotten = deadline + BEAT <= scene.now || table.is_dead(scene, driver)?;
            if forgotten && abandon(table, scene, lease, driver)? {
                return Ok(Answer::Over(End::Cancelled));
            }
            Ok(watch(scene, lease, parked.arrived, deadline))
        }
        Some(Standing::Held { claim, .. }) => {
            unpark(table, &parked);
            again(table, scene, &claim, parked.arrived)
        }
        Some(Standing::Over { end, .. }) => {
            unpark(table, &parked);
            Ok(Answer::Over(end))
        }
        Some(Standing::Ending { end, claim, .. }) => {
            unpark(table, &parked);
            clear(table, scene, &claim)?;
            Ok(Answer::Over(end))
        }
        None => {
            unpark(table, &parked);
            Ok(Answer::Over(End::Cancelled))
        }
    }
}

/// The stream of a request that waits has gone: if it drives the lease, that is cancelled.
pub fn leave<S: Store>(table: &mut Table, scene: &Scene<'_, S>, parked: Parked) {
    if parked.drives || bug!(WatcherCancels) {
        unpark(table, &parked);
        if end(table, scene, parked.lease, End::Cancelled).is_err() {
            table.owe_end(parked.lease);
        }
    }
}

/// Notes what became of a request that this worker drives. Where that cannot be noted it holds nothing, and is said to be
/// over as soon as that can be: who asks again must not wait for a driver that it has no more.
fn settle<S: Store>(
    table: &mut Table,
    scene: &Scene<'_, S>,
    lease: LeaseId,
    arrived: Time,
    outcome: Outcome,
) -> Result<Answer, StoreError> {
    let settled = note(table, scene, lease, arrived, outcome);
    if settled.is_err() && !bug!(DriverForgets) {
        table.owe_end(lease);
    }
    settled
}

fn note<S: Store>(
    table: &mut Table,
    scene: &Scene<'_, S>,
    lease: LeaseId,
    arrived: Time,
    outcome: Outcome,
) -> Result<Answer, StoreError> {
    let is_waiting = |known: Option<&Standing>| matches!(known, Some(Standing::Waiting { .. }));
    match outcome {
        Outcome::Granted(held) => {
            // The holder counts its TTL from when it is told of the grant, as nearly as it can know; what was granted before
            // counts from then as well.
            if granted_before_now(scene, &held.claim)
                && !bug!(EarlierGrantNotRenewed)
                && let Some((lock, loss)) = table.renew_claim(scene, &held.claim, None)?
            {
                let want = held.claim.request.wants.iter().find(|want| want.name == lock);
                let mode = want.map_or(Mode::Exclusive, |want| want.mode);
                let refusal = Refusal { lock, mode, owner: held.owner().clone(), cause: Cause::LeaseLost { loss } };
                table.release(scene, held);
                return note(table, scene, lease, arrived, Outcome::Refused(refusal));
            }
            let claim = Box::new(held.claim.clone());
            let next = Standing::Held { claim, seen: scene.now };
            match change(scene, lease, |known| is_waiting(known).then_some(next.clone())) {
                Ok(None) => Ok(Answer::Granted { granted: Box::new(granted(scene, &held.claim, arrived)), new: true }),
                Ok(Some(end)) => {
                    if !bug!(LateGrantKept) {
                        table.release(scene, held);
                    }
                    Ok(Answer::Over(end))
                }
                Err(error) => {
                    table.release(scene, held);
                    Err(error)
                }
            }
        }
        Outcome::Waiting(pending) => {
            let (poll_at, deadline) = (pending.poll_at(), pending.deadline());
            let driver = table.session();
            let next = Standing::Waiting { driver, claim: Box::new(pending.claim.clone()), deadline };
            match change(scene, lease, |known| is_waiting(known).then_some(next.clone())) {
                Ok(None) => Ok(Answer::Parked(Parked { lease, drives: true, arrived, poll_at, deadline })),
                Ok(Some(end)) => {
                    table.cancel(scene, pending);
                    Ok(Answer::Over(end))
                }
                Err(error) => {
                    table.cancel(scene, pending);
                    Err(error)
                }
            }
        }
        Outcome::Refused(refusal) => {
            let over = Standing::Over { end: End::Refused, since: scene.now };
            change(scene, lease, |known| is_waiting(known).then_some(over))?;
            Ok(Answer::Refused(Box::new(refusal)))
        }
    }
}

/// A request for a lease that is held already. It renews it: who asks is there.
fn again<S: Store>(
    table: &mut Table,
    scene: &Scene<'_, S>,
    claim: &Claim,
    arrived: Time,
) -> Result<Answer, StoreError> {
    if !bug!(RepeatRenewsNothing) && table.renew_claim(scene, claim, None)?.is_some() {
        expire(table, scene, claim)?;
        return Ok(Answer::Over(End::Expired));
    }
    Ok(Answer::Granted { granted: Box::new(granted(scene, claim, arrived)), new: false })
}

/// A request for a lease that an earlier table knew.
fn reassert<S: Store>(
    table: &mut Table,
    scene: &Scene<'_, S>,
    request: &Request,
    receipt: &Receipt,
) -> Result<Answer, StoreError> {
    if receipt.lease() != request.lease || !is_same(&receipt.request, request) {
        return Ok(Answer::Taken);
    }
    Ok(match bring_back(table, scene, receipt)? {
        Some(claim) => Answer::Granted { granted: Box::new(granted(scene, &claim, request.arrived)), new: false },
        None => Answer::Over(End::Expired),
    })
}

fn refused_in_grace<S: Store>(table: &mut Table, scene: &Scene<'_, S>, request: Request) -> Result<Answer, StoreError> {
    // The grace may just have ended: then it is refused for a moment that is over, and asks again.
    let left = table.grace_left(scene)?.max(Duration::from_millis(1));
    let Some(want) = request.wants.first() else { return Ok(Answer::Over(End::Refused)) };
    let (lock, mode) = (want.name.clone(), want.mode);
    let refusal = Refusal { lock, mode, owner: request.owner, cause: Cause::Grace { left } };
    Ok(Answer::Refused(Box::new(refusal)))
}

/// Waits for what becomes of a lease that another drives. Nothing wakes it. Past the deadline its driver will say so soon,
/// or is found to be gone.
fn watch<S: Store>(scene: &Scene<'_, S>, lease: LeaseId, arrived: Time, deadline: Time) -> Answer {
    let poll_at = if scene.now < deadline { deadline.min(scene.now + BEAT) } else { scene.now + BEAT / 8 };
    Answer::Parked(Parked { lease, drives: false, arrived, poll_at, deadline })
}

/// Whether some lock was granted before this moment: to a waiter that had yet to find out.
fn granted_before_now<S: Store>(scene: &Scene<'_, S>, claim: &Claim) -> bool {
    let mut moments = claim.grants.iter().zip(&claim.request.wants).map(|(grant, want)| grant.until - want.hold);
    moments.any(|granted| granted < scene.now)
}

/// Whether two requests are for the same: one of them may be a repetition of the other.
fn is_same(one: &Request, other: &Request) -> bool {
    let locks =
        |request: &Request| -> Vec<_> { request.wants.iter().map(|want| (want.name.clone(), want.mode)).collect() };
    (one.owner == other.owner && locks(one) == locks(other)) || bug!(IdentityOfAnother)
}

fn deadline_of(request: &Request) -> Time {
    let wait = request.wants.iter().map(|want| want.wait).max().unwrap_or_default();
    request.arrived + wait
}

fn unpark(table: &mut Table, parked: &Parked) {
    if parked.drives {
        table.forget_waiter();
    }
}
