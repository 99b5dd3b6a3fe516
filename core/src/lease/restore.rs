//! Bringing a lease back into a table that has lost its memory, from its receipt.

use super::Receipt;
use crate::fence::Fence;
use crate::queue::{Entry, State};
use crate::request::{Claim, Request};
use crate::store::{self, LockBucket, OwnerBucket, Save, Store, StoreError};
use crate::table::{Scene, Table, items_of};
use crate::time::{Duration, Time};

/// Puts a lease back at all its locks. None where it cannot be one that still lives: its hold limit has passed, or a lock
/// is held under a higher fence, which was granted after this one had ended.
///
/// A holder with a *lower* fence goes: it can only have come back by a receipt that was not worth it any more, since this
/// lease was granted after that one had ended.
pub(super) fn restore<S: Store>(
    table: &mut Table,
    scene: &Scene<'_, S>,
    receipt: &Receipt,
) -> Result<Option<Claim>, StoreError> {
    let left = Duration::from_micros(receipt.until_unix_micros.saturating_sub(scene.unix_micros));
    let wants = &receipt.request.wants;
    let longest = wants.iter().map(|want| want.hold).max().unwrap_or_default();
    // The wall clock may have stepped back: no lease gets more than it was given to begin with.
    let until = scene.now + if bug!(ReceiptRestartsHold) { longest } else { left.min(longest) };
    if until <= scene.now || receipt.fences.len() != wants.len() {
        return Ok(None);
    }
    let mut claim = Claim::new(Request { arrived: scene.now, ..receipt.request.clone() });
    let back = put_all_back(table, scene, &mut claim, receipt, until);
    if !matches!(back, Ok(true)) {
        // Of a lease that is not whole nothing may stay, in the index neither.
        table.uproot(scene, &claim.request);
    }
    back.map(|back| back.then_some(claim))
}

/// Lists the lease, and puts it back at each of its locks. False where one of them is somebody else's by now.
fn put_all_back<S: Store>(
    table: &mut Table,
    scene: &Scene<'_, S>,
    claim: &mut Claim,
    receipt: &Receipt,
    until: Time,
) -> Result<bool, StoreError> {
    relist(table, scene, claim)?;
    for fence in &receipt.fences {
        if !put_back(table, scene, claim, *fence, until)? {
            return Ok(false);
        }
        claim.push(*fence, until);
    }
    Ok(true)
}

/// Lets the index by owner name the lease.
fn relist<S: Store>(table: &Table, scene: &Scene<'_, S>, claim: &mut Claim) -> Result<(), StoreError> {
    let request = &claim.request;
    let bucket = scene.store.bucket(request.owner.as_str());
    store::update(scene.store, bucket, |owners: &mut OwnerBucket| {
        owners.with_items(&request.owner, |items| {
            items.retain(|item| item.lease != request.lease);
            items.extend(items_of(request, table.session(), None, scene.now));
            Ok(((), Save::Yes))
        })
    })?;
    claim.indexed = true;
    Ok(())
}

/// Puts the lease back at the next of its locks.
fn put_back<S: Store>(
    table: &mut Table,
    scene: &Scene<'_, S>,
    claim: &Claim,
    fence: Fence,
    until: Time,
) -> Result<bool, StoreError> {
    let Some(want) = claim.next() else { return Ok(false) };
    let state = State::Held { fence, since: scene.now, renewed: scene.now, until };
    let entry = Entry { state, ..table.entry(scene, claim, want) };
    let permits = scene.rules.classes.of(&want.name).permits;
    store::update(scene.store, scene.store.bucket(want.name.as_str()), |locks: &mut LockBucket| {
        locks.with_queue(&want.name, |queue, highest| {
            queue.reap(table.sessions(), scene.now);
            let back = queue.restore(entry.clone(), permits);
            if back && !bug!(RestoredFenceForgotten) {
                *highest = fence.max(*highest);
            }
            Ok((back, Save::Yes))
        })
    })
}
