//! The authority's side: what each message does to the table and to what is remembered of its lease.
//!
//! Functions over a worker's [`Table`], which any worker may run for any lease. One worker alone drives a lease that waits,
//! the one that reserved its identity; others that are asked for the same lease watch what becomes of it. Whatever ends a
//! lease says so in its record first, and the driver looks there after each of its steps, so that a lease that was ended
//! by somebody else while its driver was at work leaves nothing behind.

pub use super::asking::{leave, poll, put};
use super::record::{End, LINGER, LeaseBucket, Standing};
use super::restore::restore;
use super::{Granted, Receipt};
use crate::id::{LeaseId, SessionId};
use crate::refusal::Refusal;
use crate::request::Claim;
use crate::store::{self, Save, Store, StoreError};
use crate::table::{Scene, Table, Wake};
use crate::time::{Duration, Time};

/// The answer to a request for a lease.
#[derive(Debug)]
pub enum Answer {
    /// It is granted.
    Granted {
        /// What.
        granted: Box<Granted>,
        /// Whether by this request, or it was before.
        new: bool,
    },
    /// Not yet.
    Parked(Parked),
    /// It gets nothing.
    Refused(Box<Refusal>),
    /// The lease is over already: it was given back or cancelled, perhaps before it was asked for; or it has ended.
    Over(End),
    /// The identity belongs to a lease of another owner, or of other locks.
    Taken,
}

/// A request that waits at this worker. A worker polls it or leaves it once; a copy is for a search that goes back and tries
/// another step.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[must_use = "what is parked must be polled or left"]
pub struct Parked {
    pub(super) lease: LeaseId,
    /// Whether its worker moves the lease on, or only watches what becomes of it.
    pub(super) drives: bool,
    pub(super) arrived: Time,
    pub(super) poll_at: Time,
    pub(super) deadline: Time,
}

impl Parked {
    /// The lease that it waits for.
    pub fn lease(&self) -> LeaseId {
        self.lease
    }

    /// Whether it is this one that is woken when something becomes of the lease.
    pub fn drives(&self) -> bool {
        self.drives
    }

    /// When to poll it at the latest, even if nothing wakes it.
    pub fn poll_at(&self) -> Time {
        self.poll_at
    }

    /// When its wait ends.
    pub fn deadline(&self) -> Time {
        self.deadline
    }
}

/// The answer to a renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewed {
    /// It lives on.
    Renewed {
        /// For this long, unless it is renewed again.
        expires_in: Duration,
    },
    /// It has ended.
    Lost,
}

/// The answer to a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deleted {
    /// It was held and is not any more.
    Released,
    /// It waited and does not any more.
    Cancelled,
    /// It had ended before by itself.
    Expired,
    /// Nothing is known of it. Should it be asked for yet, it will not be granted.
    Unknown,
}

/// Renews a lease; from now on with another TTL where one is given. A lease that the authority has lost its memory of comes
/// back by its receipt, as long as the authority grants nothing else.
///
/// # Errors
/// Those of the store. The lease may have been renewed then.
pub fn renew<S: Store>(
    table: &mut Table,
    scene: &Scene<'_, S>,
    lease: LeaseId,
    ttl: Option<Duration>,
    receipt: Option<&Receipt>,
) -> Result<Renewed, StoreError> {
    let claim = match read(scene, lease)? {
        Some(Standing::Held { claim, .. }) => claim,
        Some(Standing::Waiting { .. } | Standing::Over { .. } | Standing::Ending { .. })
            if !bug!(ReleasedLeaseRevived) =>
        {
            return Ok(Renewed::Lost);
        }
        _ => match receipt {
            Some(receipt) if receipt.lease() == lease => match bring_back(table, scene, receipt)? {
                Some(claim) => claim,
                None => return Ok(Renewed::Lost),
            },
            _ => return Ok(Renewed::Lost),
        },
    };
    if table.renew_claim(scene, &claim, ttl)?.is_some() {
        expire(table, scene, &claim)?;
        return Ok(Renewed::Lost);
    }
    if let Some(ttl) = ttl {
        store::update(scene.store, LeaseBucket::index(scene.store, lease), |leases: &mut LeaseBucket| {
            let Some(Standing::Held { claim, .. }) = leases.get(lease) else { return Ok(((), Save::No)) };
            let mut claim = claim.clone();
            claim.grants.iter_mut().for_each(|grant| grant.ttl = ttl);
            leases.set(lease, Standing::Held { claim, seen: scene.now }, scene.now);
            Ok(((), Save::Yes))
        })?;
    }
    let ttl = ttl.unwrap_or_else(|| claim.ttl());
    Ok(Renewed::Renewed { expires_in: ttl.min(claim.until().since(scene.now)) })
}

/// Ends a lease: gives it back, or cancels the request for it; also one that is yet to come.
///
/// # Errors
/// Those of the store. The lease may have ended then.
pub fn delete<S: Store>(table: &mut Table, scene: &Scene<'_, S>, lease: LeaseId) -> Result<Deleted, StoreError> {
    match read(scene, lease)? {
        // The locks first: should this worker die in between, whoever asks again finds the lease and goes on.
        Some(Standing::Held { claim, .. }) => {
            let whole = table.uproot(scene, &claim.request) == claim.request.wants.len();
            let (end, deleted) =
                if whole { (End::Released, Deleted::Released) } else { (End::Expired, Deleted::Expired) };
            mark(table, scene, &claim, end)?;
            Ok(deleted)
        }
        Some(Standing::Over { end, .. } | Standing::Ending { end, .. }) => {
            remember(scene, lease)?;
            Ok(match end {
                End::Released => Deleted::Released,
                End::Expired => Deleted::Expired,
                End::Cancelled => Deleted::Cancelled,
                End::Refused => Deleted::Unknown,
            })
        }
        found => {
            drop(found);
            Ok(match end(table, scene, lease, End::Cancelled)? {
                Some(Standing::Held { .. }) => Deleted::Released,
                Some(_) => Deleted::Cancelled,
                None => Deleted::Unknown,
            })
        }
    }
}

/// The lease as granted; none where it is not, or not any more.
///
/// # Errors
/// Those of the store.
pub fn get<S: Store>(table: &mut Table, scene: &Scene<'_, S>, lease: LeaseId) -> Result<Option<Granted>, StoreError> {
    match read(scene, lease)? {
        Some(Standing::Held { claim, .. }) if table.still_holds(scene, &claim)? => {
            Ok(Some(granted(scene, &claim, claim.request.arrived)))
        }
        _ => Ok(None),
    }
}

/// Ends the leases of a bucket that nobody will: those whose driver died, and those that ended by themselves.
///
/// # Errors
/// Those of the store.
pub fn sweep<S: Store>(table: &mut Table, scene: &Scene<'_, S>, bucket: u32) -> Result<(), StoreError> {
    let (mut leases, _) = scene.store.read::<LeaseBucket>(bucket)?;
    for (lease, standing) in leases.leases() {
        match standing {
            Standing::Waiting { driver, deadline, .. } => {
                let dead = table.is_dead(scene, *driver)? && !bug!(DeadDriverKept);
                if *deadline + LINGER <= scene.now || dead {
                    abandon(table, scene, *lease, *driver)?;
                }
            }
            // Looking costs a read for each of its locks: once in the longest TTL is enough for what is only a record.
            Standing::Held { claim, seen } => {
                if claim.until() <= scene.now || *seen + scene.rules.limits.longest_ttl <= scene.now {
                    if table.still_holds(scene, claim)? {
                        let held = Standing::Held { claim: claim.clone(), seen: scene.now };
                        change(scene, *lease, |known| matches!(known, Some(Standing::Held { .. })).then_some(held))?;
                    } else {
                        expire(table, scene, claim)?;
                    }
                }
            }
            Standing::Ending { claim, .. } => clear(table, scene, claim)?,
            Standing::Over { .. } => {}
        }
    }
    if !leases.prune(scene.now) {
        return Ok(());
    }
    store::update(scene.store, bucket, |leases: &mut LeaseBucket| Ok(((), Save::from(leases.prune(scene.now)))))
}

/// Restores a lease from its receipt, if this is the time for that. None where the lease has ended.
pub(super) fn bring_back<S: Store>(
    table: &mut Table,
    scene: &Scene<'_, S>,
    receipt: &Receipt,
) -> Result<Option<Box<Claim>>, StoreError> {
    if table.grace_left(scene)?.is_zero() && !bug!(ReceiptAfterGrace) {
        return Ok(None);
    }
    let Some(claim) = restore(table, scene, receipt)? else { return Ok(None) };
    let next = Standing::Held { claim: Box::new(claim.clone()), seen: scene.now };
    let open =
        |known: Option<&Standing>| matches!(known, None | Some(Standing::Held { .. })) || bug!(ReleasedLeaseRevived);
    match change(scene, receipt.lease(), |known| open(known).then_some(next.clone())) {
        Ok(None) => Ok(Some(Box::new(claim))),
        Ok(Some(_)) => {
            table.uproot(scene, &claim.request);
            Ok(None)
        }
        Err(error) => {
            table.uproot(scene, &claim.request);
            Err(error)
        }
    }
}

/// Ends a lease: says so first, then removes what it has. Whoever drives it is woken to find out. Gives back how it stood.
/// Should this worker die in between, the driver or a sweep goes on.
pub(super) fn end<S: Store>(
    table: &mut Table,
    scene: &Scene<'_, S>,
    lease: LeaseId,
    end: End,
) -> Result<Option<Standing>, StoreError> {
    let before = store::update(scene.store, LeaseBucket::index(scene.store, lease), |leases: &mut LeaseBucket| {
        let before = leases.get(lease).cloned();
        let left = match &before {
            Some(Standing::Waiting { .. }) if bug!(DeleteLeavesWaiter) => None,
            Some(Standing::Waiting { claim, .. } | Standing::Held { claim, .. }) => Some(claim.clone()),
            Some(Standing::Over { .. } | Standing::Ending { .. }) | None => None,
        };
        let ended = before.as_ref().is_some_and(|standing| standing.ended().is_some());
        let forgets = bug!(TombstoneForgotten) && before.is_none();
        if !ended && !forgets {
            leases.set(lease, over(end, left, scene.now), scene.now);
        }
        Ok((before, Save::from(!ended)))
    })?;
    match &before {
        Some(Standing::Waiting { claim, driver, .. }) => {
            if !bug!(DriverNotWoken) {
                table.wake(Wake { session: *driver, lease });
            }
            if !bug!(DeleteLeavesWaiter) {
                clear(table, scene, claim)?;
            }
        }
        Some(Standing::Held { claim, .. }) => clear(table, scene, claim)?,
        Some(Standing::Over { .. } | Standing::Ending { .. }) | None => {}
    }
    Ok(before)
}

/// Remembers for another while that a lease is over: whoever gives it back again wants it to stay so, whatever is still under way.
fn remember<S: Store>(scene: &Scene<'_, S>, lease: LeaseId) -> Result<(), StoreError> {
    store::update(scene.store, LeaseBucket::index(scene.store, lease), |leases: &mut LeaseBucket| {
        let Some(mut standing) = leases.get(lease).cloned() else { return Ok(((), Save::No)) };
        match &mut standing {
            Standing::Over { since, .. } | Standing::Ending { since, .. }
                if *since < scene.now && !bug!(EndNotRefreshed) =>
            {
                *since = scene.now;
            }
            _ => return Ok(((), Save::No)),
        }
        leases.set(lease, standing, scene.now);
        Ok(((), Save::Yes))
    })
}

/// A lease that is over, of which this may be left.
fn over(end: End, left: Option<Box<Claim>>, since: Time) -> Standing {
    match left {
        Some(claim) if !bug!(RemainsForgotten) => Standing::Ending { end, since, claim },
        _ => Standing::Over { end, since },
    }
}

/// Takes away what is left of a lease that is over. What could not be taken away now is left for the next sweep.
pub(super) fn clear<S: Store>(table: &mut Table, scene: &Scene<'_, S>, claim: &Claim) -> Result<(), StoreError> {
    let lease = claim.request.lease;
    table.uproot(scene, &claim.request);
    if table.owes(lease) {
        return Ok(());
    }
    store::update(scene.store, LeaseBucket::index(scene.store, lease), |leases: &mut LeaseBucket| {
        let Some(Standing::Ending { end, since, .. }) = leases.get(lease) else { return Ok(((), Save::No)) };
        let over = Standing::Over { end: *end, since: *since };
        leases.set(lease, over, scene.now);
        Ok(((), Save::Yes))
    })
}

/// Ends a lease that waits for a driver that is not heard of any more. False where it does so no longer: the driver was
/// only late, and what it was granted meanwhile is its own.
pub(crate) fn abandon<S: Store>(
    table: &mut Table,
    scene: &Scene<'_, S>,
    lease: LeaseId,
    driver: SessionId,
) -> Result<bool, StoreError> {
    let claim = store::update(scene.store, LeaseBucket::index(scene.store, lease), |leases: &mut LeaseBucket| {
        let claim = match leases.get(lease) {
            Some(Standing::Waiting { driver: known, claim, .. }) if *known == driver => claim.clone(),
            _ => return Ok((None, Save::No)),
        };
        leases.set(lease, over(End::Cancelled, Some(claim.clone()), scene.now), scene.now);
        Ok((Some(claim), Save::Yes))
    })?;
    let Some(claim) = claim else { return Ok(false) };
    table.wake(Wake { session: driver, lease });
    clear(table, scene, &claim)?;
    Ok(true)
}

/// A granted lease has lost something: takes the rest of it away as well. The locks and the index first: should this worker
/// die in between, the next one that looks finds the lease and goes on.
pub(super) fn expire<S: Store>(table: &mut Table, scene: &Scene<'_, S>, claim: &Claim) -> Result<(), StoreError> {
    table.uproot(scene, &claim.request);
    mark(table, scene, claim, End::Expired)
}

/// Says that a lease is over, and whether something of it could not be taken away.
fn mark<S: Store>(table: &Table, scene: &Scene<'_, S>, claim: &Claim, end: End) -> Result<(), StoreError> {
    let lease = claim.request.lease;
    let over = over(end, table.owes(lease).then(|| Box::new(claim.clone())), scene.now);
    let open = |known: Option<&Standing>| known.is_none_or(|standing| standing.ended().is_none());
    change(scene, lease, |known| open(known).then_some(over)).map(drop)
}

/// Changes how a lease stands to what `next` makes of it. Where it makes nothing of it, says how the lease has ended.
pub(super) fn change<S: Store>(
    scene: &Scene<'_, S>,
    lease: LeaseId,
    next: impl FnOnce(Option<&Standing>) -> Option<Standing> + Clone,
) -> Result<Option<End>, StoreError> {
    store::update(scene.store, LeaseBucket::index(scene.store, lease), |leases: &mut LeaseBucket| {
        let known = leases.get(lease);
        let end = known.and_then(Standing::ended).unwrap_or(End::Cancelled);
        match next.clone()(known) {
            Some(standing) => {
                leases.set(lease, standing, scene.now);
                Ok((None, Save::Yes))
            }
            None => Ok((Some(end), Save::No)),
        }
    })
}

pub(super) fn read<S: Store>(scene: &Scene<'_, S>, lease: LeaseId) -> Result<Option<Standing>, StoreError> {
    let (leases, _) = scene.store.read::<LeaseBucket>(LeaseBucket::index(scene.store, lease))?;
    Ok(leases.get(lease).cloned())
}

/// What the holder is told of a lease that was granted or renewed now, in answer to a message that came at `arrived`.
pub(super) fn granted<S: Store>(scene: &Scene<'_, S>, claim: &Claim, arrived: Time) -> Granted {
    Granted {
        lease: claim.request.lease,
        owner: claim.request.owner.clone(),
        grants: claim.grants.clone(),
        ttl: claim.ttl().min(claim.until().since(scene.now)),
        waited: scene.now.since(arrived),
        receipt: Receipt::of(claim, scene.now, scene.unix_micros),
    }
}
