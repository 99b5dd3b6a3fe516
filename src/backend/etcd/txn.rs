//! What is asked of etcd in one step: the transactions, and what they answer.

use interlock_core::keyed::{Key, Listed, Stand};
use interlock_core::{LeaseId, LockName, OwnerId, Request};
use prost::Message;

use super::keys::{self, Names, Range, Unreadable};
use super::proto::{
    Compare, CompareResult, CompareTarget, CompareWith, DeleteRangeRequest, Op, PutRequest, RangeRequest,
    RangeResponse, RequestOp, TxnRequest, TxnResponse,
};

/// So many locks at most are taken in one step: etcd takes 128 operations in one (`--max-txn-ops`).
pub const MOST: usize = 60;

/// A request as its keys tell of it.
pub struct Writer<'a> {
    /// How keys are named.
    pub names: &'a Names,
    /// The etcd lease that they hang on.
    pub session: i64,
    /// The request.
    pub request: &'a Request,
    /// How many of its locks it holds.
    pub held: usize,
    /// Whether the index says what it holds, and not only what it waits for.
    pub listed: bool,
    /// Microseconds since 1970.
    pub unix_micros: u64,
}

impl Writer<'_> {
    /// The key of the request in the line of a lock.
    pub fn key(&self, at: usize, stand: Stand) -> Option<Key> {
        let want = self.request.wants().get(at)?;
        Some(Key {
            lease: self.request.lease(),
            owner: self.request.owner().clone(),
            mode: want.mode,
            reentrant: self.request.is_reentrant(),
            asked_by: self.request.asker().to_owned(),
            since: self.unix_micros,
            stand,
            created: 0,
            written: 0,
        })
    }

    fn place(&self, at: usize, stand: Stand) -> Option<RequestOp> {
        let (want, key) = (self.request.wants().get(at)?, self.key(at, stand)?);
        Some(put(self.names.place(&want.name, key.lease), keys::place(&key), self.session))
    }

    fn item(&self, held: usize, waits: bool) -> RequestOp {
        let locks = self.request.wants().iter().map(|want| &want.name);
        put(self.names.item(self.request.owner(), self.request.lease()), keys::item(locks, held, waits), self.session)
    }

    /// Takes the next locks if their lines are empty. Else it stands in the line of the first of them, if it may wait, and
    /// reads that.
    pub fn attempt(&self) -> TxnRequest {
        let next = || self.request.wants().iter().enumerate().skip(self.held).take(MOST);
        let compare = next().map(|(_, want)| empty(self.names.line(&want.name))).collect();
        let mut success: Vec<_> = next().filter_map(|(at, _)| self.place(at, Stand::Holds(None))).collect();
        let mut failure = Vec::new();
        if self.listed {
            success.push(self.item(self.held + next().count(), false));
        }
        if let Some((at, want)) = next().next() {
            if !want.wait.is_zero() {
                failure.extend(self.place(at, Stand::Waits));
                failure.push(self.item(self.held, true));
            }
            failure.push(read(self.names.line(&want.name)));
        }
        if self.listed {
            success.push(read(self.names.items(self.request.owner())));
            failure.push(read(self.names.items(self.request.owner())));
        }
        TxnRequest { compare, success, failure }
    }

    /// Moves up in the line of the next lock, as it was read at a revision; else reads the line.
    pub fn move_up(&self, lock: &LockName, step: &Step) -> TxnRequest {
        let line = self.names.line(lock);
        let since = i64::try_from(step.read).unwrap_or(i64::MAX).saturating_add(1);
        let mut compare = vec![unwritten((self.names.overtaken(lock), Vec::new()), since)];
        compare.extend(step.leans_on.iter().map(|(lease, created)| stands(self.names.place(lock, *lease), *created)));
        match step.created {
            Some(created) => compare.push(stands(self.names.place(lock, self.request.lease()), created)),
            None => compare.push(unwritten(line.clone(), since)),
        }
        if step.overtakes {
            compare.push(unwritten(line.clone(), since));
        }
        let held = self.held + usize::from(matches!(step.stand, Stand::Holds(_)));
        let mut success: Vec<_> = self.place(self.held, step.stand).into_iter().collect();
        // Who waits is in the index in any case.
        if self.listed || step.created.is_some() {
            success.push(self.item(held, held == self.held));
        }
        if step.overtakes || step.stand == Stand::Upgrades {
            success.push(put(self.names.overtaken(lock), Vec::new(), self.session));
        }
        TxnRequest { compare, success, failure: vec![read(line)] }
    }
}

/// A step up in the line of a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What it is to do there.
    pub stand: Stand,
    /// The revision at which the line was read.
    pub read: u64,
    /// Since when it stands there, if it does.
    pub created: Option<u64>,
    /// What must still be there, and since when it is.
    pub leans_on: Vec<(LeaseId, u64)>,
    /// Whether it goes ahead of others.
    pub overtakes: bool,
}

/// Gives back all that a request may have.
pub fn give_back(names: &Names, request: &Request) -> Vec<TxnRequest> {
    let places = request.wants().iter().map(|want| delete(names.place(&want.name, request.lease())));
    let all: Vec<RequestOp> = places.chain([delete(names.item(request.owner(), request.lease()))]).collect();
    let step = |success: &[RequestOp]| TxnRequest { success: success.to_vec(), ..TxnRequest::default() };
    all.chunks(MOST).map(step).collect()
}

/// Reads what the index says of owners, and the lines of locks, all at one moment.
pub fn look(names: &Names, owners: &[OwnerId], locks: &[LockName]) -> TxnRequest {
    let owners = owners.iter().map(|owner| names.items(owner));
    let ranges = owners.chain(locks.iter().map(|lock| names.line(lock)));
    TxnRequest { success: ranges.map(read).collect(), ..TxnRequest::default() }
}

/// The answer to a transaction.
#[derive(Debug)]
pub struct Told {
    /// At which revision it was done.
    pub revision: u64,
    /// Whether its conditions held.
    pub succeeded: bool,
    ranges: std::vec::IntoIter<RangeResponse>,
}

impl Told {
    /// Reads it; none where it is no such answer.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let told = TxnResponse::decode(bytes).ok()?;
        let ranges: Vec<_> = told.responses.into_iter().filter_map(|response| response.range).collect();
        // What is cut short says nothing.
        if ranges.iter().any(|range| range.more) {
            return None;
        }
        let revision = u64::try_from(told.header?.revision).ok()?;
        Some(Told { revision, succeeded: told.succeeded, ranges: ranges.into_iter() })
    }

    /// The next range, as the line of a lock.
    ///
    /// # Errors
    /// Somebody else's key is in it.
    pub fn line(&mut self) -> Result<Vec<Key>, Unreadable> {
        self.ranges.next().unwrap_or_default().kvs.iter().map(keys::read_place).collect()
    }

    /// The next range, as what the index says of an owner.
    ///
    /// # Errors
    /// Somebody else's key is in it.
    pub fn items(&mut self) -> Result<Vec<Listed>, Unreadable> {
        self.ranges.next().unwrap_or_default().kvs.iter().map(keys::read_item).collect()
    }
}

fn put(key: Vec<u8>, value: Vec<u8>, lease: i64) -> RequestOp {
    RequestOp { op: Some(Op::Put(PutRequest { key, value, lease })) }
}

fn read((key, range_end): Range) -> RequestOp {
    RequestOp { op: Some(Op::Range(RangeRequest { key, range_end, limit: 0 })) }
}

fn delete(key: Vec<u8>) -> RequestOp {
    RequestOp { op: Some(Op::Delete(DeleteRangeRequest { key, range_end: Vec::new() })) }
}

/// No key is in the range.
fn empty((key, range_end): Range) -> Compare {
    compare(CompareResult::Equal, CompareTarget::Create, CompareWith::Create(0), key, range_end)
}

/// The key is there, and has been since then.
fn stands(key: Vec<u8>, created: u64) -> Compare {
    let created = i64::try_from(created).unwrap_or(i64::MAX);
    compare(CompareResult::Equal, CompareTarget::Create, CompareWith::Create(created), key, Vec::new())
}

/// No key of the range was written at that revision or later.
fn unwritten((key, range_end): Range, since: i64) -> Compare {
    compare(CompareResult::Less, CompareTarget::Mod, CompareWith::Mod(since), key, range_end)
}

fn compare(
    result: CompareResult,
    target: CompareTarget,
    with: CompareWith,
    key: Vec<u8>,
    range_end: Vec<u8>,
) -> Compare {
    Compare { result: result.into(), target: target.into(), key, with: Some(with), range_end }
}
