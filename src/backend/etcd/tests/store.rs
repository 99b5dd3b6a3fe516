//! An etcd that fits into a test: keys with revisions, leases and watches, all in one step, as etcd's API has it. What must not
//! live here: what a test expects.

use std::collections::BTreeMap;

use prost::Message;

use crate::backend::etcd::proto::{
    AuthenticateResponse, Compare, CompareResult, CompareTarget, CompareWith, Event, EventType, KeyValue,
    LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveResponse, LeaseRequest, Op, RangeResponse, ResponseHeader,
    ResponseOp, TxnRequest, TxnResponse, WatchCreateRequest, WatchRequest, WatchResponse,
};

/// A failed call: the status, and etcd's words.
pub(super) type Failure = (u32, &'static str);

#[derive(Debug)]
struct Watch {
    id: i64,
    key: Vec<u8>,
    range_end: Vec<u8>,
    /// The first revision that was not told.
    from: i64,
}

#[derive(Debug, Default)]
pub(super) struct Store {
    revision: i64,
    keys: BTreeMap<Vec<u8>, KeyValue>,
    /// The leases that live, with their TTL in seconds.
    leases: BTreeMap<i64, i64>,
    history: Vec<(i64, Event)>,
    /// What was before it is forgotten.
    compacted: i64,
    watches: Vec<Watch>,
}

impl Store {
    /// Does what a call asks.
    pub(super) fn call(&mut self, method: &str, message: &[u8]) -> Result<Vec<u8>, Failure> {
        match method {
            "Txn" => self.txn(&TxnRequest::decode(message).unwrap()).map(|response| response.encode_to_vec()),
            "LeaseGrant" => {
                let LeaseGrantRequest { ttl, id } = LeaseGrantRequest::decode(message).unwrap();
                self.leases.insert(id, ttl);
                Ok(LeaseGrantResponse { id, ttl }.encode_to_vec())
            }
            "LeaseRevoke" => {
                self.end_lease(LeaseRequest::decode(message).unwrap().id);
                Ok(Vec::new())
            }
            "Authenticate" => Ok(AuthenticateResponse { token: "badge".into() }.encode_to_vec()),
            other => panic!("no method of etcd's: {other}"),
        }
    }

    /// The answer to a sign of life.
    pub(super) fn keep_alive(&self, message: &[u8]) -> Vec<u8> {
        let id = LeaseRequest::decode(message).unwrap().id;
        LeaseKeepAliveResponse { id, ttl: self.leases.get(&id).copied().unwrap_or(0) }.encode_to_vec()
    }

    /// A lease ends, and its keys with it.
    pub(super) fn end_lease(&mut self, id: i64) {
        self.leases.remove(&id);
        let gone: Vec<_> = self.keys.values().filter(|kv| kv.lease == id).map(|kv| kv.key.clone()).collect();
        self.revision += i64::from(!gone.is_empty());
        for key in gone {
            self.delete(&key);
        }
    }

    /// All leases.
    pub(super) fn leases(&self) -> Vec<i64> {
        self.leases.keys().copied().collect()
    }

    /// Forgets everything that is over.
    pub(super) fn compact(&mut self) {
        self.compacted = self.revision;
        self.history.clear();
    }

    /// Writes a key as somebody else does.
    pub(super) fn put(&mut self, key: &str, value: &str) {
        self.revision += 1;
        self.write(key.as_bytes().to_vec(), value.as_bytes().to_vec(), 0);
    }

    /// The keys that begin so, without the identities in them.
    pub(super) fn names(&self, prefix: &str) -> Vec<String> {
        let text = self.keys.keys().map(|key| String::from_utf8(key.clone()).unwrap());
        let named = text.filter(|key| key.starts_with(prefix));
        named.map(|key| key.split('!').next().unwrap().to_owned()).collect()
    }

    /// A watch stream is gone.
    pub(super) fn unwatch(&mut self) {
        self.watches.clear();
    }

    /// A message to the watch stream; what it is answered with.
    pub(super) fn watch(&mut self, message: &[u8]) -> WatchResponse {
        let WatchRequest { create, cancel } = WatchRequest::decode(message).unwrap();
        if let Some(cancel) = cancel {
            self.watches.retain(|watch| watch.id != cancel.watch_id);
            return WatchResponse { watch_id: cancel.watch_id, canceled: true, ..WatchResponse::default() };
        }
        let WatchCreateRequest { key, range_end, start_revision: from, watch_id: id } = create.unwrap();
        if from <= self.compacted {
            let (compact_revision, cancel_reason) = (self.compacted + 1, "compacted".into());
            let end =
                WatchResponse { watch_id: id, canceled: true, compact_revision, cancel_reason, ..Default::default() };
            return end;
        }
        assert!(self.watches.iter().all(|watch| watch.id != id), "watch {id} is there already");
        self.watches.push(Watch { id, key, range_end, from });
        WatchResponse { watch_id: id, created: true, ..WatchResponse::default() }
    }

    /// What the watches have to tell.
    pub(super) fn news(&mut self) -> Vec<WatchResponse> {
        let (next, mut news) = (self.revision + 1, Vec::new());
        for watch in &mut self.watches {
            let seen = |event: &Event| {
                let key = &event.kv.as_ref().unwrap().key;
                *key >= watch.key && *key < watch.range_end
            };
            let fresh = self.history.iter().filter(|(at, event)| *at >= watch.from && seen(event));
            let events: Vec<_> = fresh.map(|(_, event)| event.clone()).collect();
            watch.from = next;
            if !events.is_empty() {
                news.push(WatchResponse { watch_id: watch.id, events, ..WatchResponse::default() });
            }
        }
        news
    }

    fn txn(&mut self, txn: &TxnRequest) -> Result<TxnResponse, Failure> {
        let succeeded = txn.compare.iter().all(|compare| self.holds(compare));
        let steps = if succeeded { &txn.success } else { &txn.failure };
        let puts = || steps.iter().filter_map(|step| if let Some(Op::Put(put)) = &step.op { Some(put) } else { None });
        if puts().any(|put| put.lease != 0 && !self.leases.contains_key(&put.lease)) {
            return Err((5, "etcdserver: requested lease not found"));
        }
        let writes = steps.iter().any(|step| match step.op.as_ref().unwrap() {
            Op::Range(_) => false,
            Op::Put(_) => true,
            Op::Delete(delete) => self.keys.contains_key(&delete.key),
        });
        self.revision += i64::from(writes);
        let mut responses = Vec::new();
        for step in steps {
            let range = match step.op.clone().unwrap() {
                Op::Range(range) => {
                    let kvs = self.within(&range.key, &range.range_end).cloned().collect();
                    Some(RangeResponse { kvs, ..RangeResponse::default() })
                }
                Op::Put(put) => {
                    self.write(put.key, put.value, put.lease);
                    None
                }
                Op::Delete(delete) => {
                    self.delete(&delete.key);
                    None
                }
            };
            responses.push(ResponseOp { range });
        }
        Ok(TxnResponse { header: Some(ResponseHeader { revision: self.revision }), succeeded, responses })
    }

    fn within<'a>(&'a self, key: &'a [u8], end: &'a [u8]) -> impl Iterator<Item = &'a KeyValue> {
        self.keys.values().filter(move |kv| kv.key == key || (kv.key.as_slice() >= key && kv.key.as_slice() < end))
    }

    fn holds(&self, compare: &Compare) -> bool {
        let of = |kv: Option<&KeyValue>| {
            let (is, with) = match (CompareTarget::try_from(compare.target).unwrap(), compare.with.unwrap()) {
                (CompareTarget::Create, CompareWith::Create(with)) => (kv.map_or(0, |kv| kv.create_revision), with),
                (CompareTarget::Mod, CompareWith::Mod(with)) => (kv.map_or(0, |kv| kv.mod_revision), with),
                other => panic!("{other:?}"),
            };
            match CompareResult::try_from(compare.result).unwrap() {
                CompareResult::Equal => is == with,
                CompareResult::Greater => is > with,
                CompareResult::Less => is < with,
            }
        };
        let mut all = self.within(&compare.key, &compare.range_end).peekable();
        if all.peek().is_none() { of(None) } else { all.all(|kv| of(Some(kv))) }
    }

    fn write(&mut self, key: Vec<u8>, value: Vec<u8>, lease: i64) {
        let create_revision = self.keys.get(&key).map_or(self.revision, |kv| kv.create_revision);
        let kv = KeyValue { key: key.clone(), create_revision, mod_revision: self.revision, value, lease };
        self.history.push((self.revision, Event { kind: EventType::Put.into(), kv: Some(kv.clone()) }));
        self.keys.insert(key, kv);
    }

    fn delete(&mut self, key: &[u8]) {
        if self.keys.remove(key).is_some() {
            let kv = KeyValue { key: key.to_vec(), mod_revision: self.revision, ..KeyValue::default() };
            self.history.push((self.revision, Event { kind: EventType::Delete.into(), kv: Some(kv) }));
        }
    }
}
