//! The messages of etcd's API that this backend sends and reads: `etcdserverpb` and `mvccpb` of etcd 3.4, of which later
//! versions keep every number. Fields that nobody here uses are left out: to read, they are skipped.

use prost::{Enumeration, Message, Oneof};

/// A key as it is stored.
#[derive(Clone, PartialEq, Message)]
pub struct KeyValue {
    /// The key.
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
    /// The revision at which it came to be.
    #[prost(int64, tag = "2")]
    pub create_revision: i64,
    /// The revision at which it was last written.
    #[prost(int64, tag = "3")]
    pub mod_revision: i64,
    /// Its value.
    #[prost(bytes = "vec", tag = "5")]
    pub value: Vec<u8>,
    /// The lease that it hangs on.
    #[prost(int64, tag = "6")]
    pub lease: i64,
}

/// What happened to a key.
#[derive(Clone, PartialEq, Message)]
pub struct Event {
    /// 0: it was written; 1: it was deleted.
    #[prost(enumeration = "EventType", tag = "1")]
    pub kind: i32,
    /// The key; of a deleted one its name and the revision only.
    #[prost(message, optional, tag = "2")]
    pub kv: Option<KeyValue>,
}

/// Kinds of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Enumeration)]
#[repr(i32)]
pub enum EventType {
    /// Written.
    Put = 0,
    /// Deleted, or ended with its lease.
    Delete = 1,
}

/// What goes with every answer.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct ResponseHeader {
    /// The revision of the store.
    #[prost(int64, tag = "3")]
    pub revision: i64,
}

/// Reads keys.
#[derive(Clone, PartialEq, Message)]
pub struct RangeRequest {
    /// The first.
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
    /// The one behind the last.
    #[prost(bytes = "vec", tag = "2")]
    pub range_end: Vec<u8>,
    /// So many at most; 0: all.
    #[prost(int64, tag = "3")]
    pub limit: i64,
}

/// The keys that were read.
#[derive(Clone, PartialEq, Message)]
pub struct RangeResponse {
    /// See [`ResponseHeader`].
    #[prost(message, optional, tag = "1")]
    pub header: Option<ResponseHeader>,
    /// In the order of their names.
    #[prost(message, repeated, tag = "2")]
    pub kvs: Vec<KeyValue>,
    /// Whether there are more.
    #[prost(bool, tag = "3")]
    pub more: bool,
}

/// Writes a key.
#[derive(Clone, PartialEq, Message)]
pub struct PutRequest {
    /// Which.
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
    /// What.
    #[prost(bytes = "vec", tag = "2")]
    pub value: Vec<u8>,
    /// The lease that it is to hang on.
    #[prost(int64, tag = "3")]
    pub lease: i64,
}

/// Deletes keys.
#[derive(Clone, PartialEq, Message)]
pub struct DeleteRangeRequest {
    /// The first.
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
    /// The one behind the last; empty: the first alone.
    #[prost(bytes = "vec", tag = "2")]
    pub range_end: Vec<u8>,
}

/// One step of a transaction.
#[derive(Clone, PartialEq, Message)]
pub struct RequestOp {
    /// Which.
    #[prost(oneof = "Op", tags = "1, 2, 3")]
    pub op: Option<Op>,
}

/// The steps of transactions.
#[derive(Clone, PartialEq, Oneof)]
pub enum Op {
    /// See [`RangeRequest`].
    #[prost(message, tag = "1")]
    Range(RangeRequest),
    /// See [`PutRequest`].
    #[prost(message, tag = "2")]
    Put(PutRequest),
    /// See [`DeleteRangeRequest`].
    #[prost(message, tag = "3")]
    Delete(DeleteRangeRequest),
}

/// What came of one step. Of writes nothing is read.
#[derive(Clone, PartialEq, Message)]
pub struct ResponseOp {
    /// Of a [`RangeRequest`].
    #[prost(message, optional, tag = "1")]
    pub range: Option<RangeResponse>,
}

/// A condition on one key, or on each key of a range; what is not there has revision 0.
#[derive(Clone, PartialEq, Message)]
pub struct Compare {
    /// How.
    #[prost(enumeration = "CompareResult", tag = "1")]
    pub result: i32,
    /// What of the key.
    #[prost(enumeration = "CompareTarget", tag = "2")]
    pub target: i32,
    /// The first key.
    #[prost(bytes = "vec", tag = "3")]
    pub key: Vec<u8>,
    /// With what.
    #[prost(oneof = "CompareWith", tags = "5, 6")]
    pub with: Option<CompareWith>,
    /// The one behind the last key; empty: the first alone.
    #[prost(bytes = "vec", tag = "64")]
    pub range_end: Vec<u8>,
}

/// How a condition compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Enumeration)]
#[repr(i32)]
pub enum CompareResult {
    /// It is the same.
    Equal = 0,
    /// It is greater.
    Greater = 1,
    /// It is less.
    Less = 2,
}

/// What a condition looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Enumeration)]
#[repr(i32)]
pub enum CompareTarget {
    /// How often the key was written.
    Version = 0,
    /// When it came to be.
    Create = 1,
    /// When it was last written.
    Mod = 2,
}

/// What a condition compares with.
#[derive(Clone, Copy, PartialEq, Oneof)]
pub enum CompareWith {
    /// With [`CompareTarget::Create`].
    #[prost(int64, tag = "5")]
    Create(i64),
    /// With [`CompareTarget::Mod`].
    #[prost(int64, tag = "6")]
    Mod(i64),
}

/// Several steps at once, depending on conditions.
#[derive(Clone, PartialEq, Message)]
pub struct TxnRequest {
    /// The conditions.
    #[prost(message, repeated, tag = "1")]
    pub compare: Vec<Compare>,
    /// The steps where all of them hold.
    #[prost(message, repeated, tag = "2")]
    pub success: Vec<RequestOp>,
    /// The steps where one of them does not.
    #[prost(message, repeated, tag = "3")]
    pub failure: Vec<RequestOp>,
}

/// What came of them.
#[derive(Clone, PartialEq, Message)]
pub struct TxnResponse {
    /// With the revision at which they were done.
    #[prost(message, optional, tag = "1")]
    pub header: Option<ResponseHeader>,
    /// Whether the conditions held.
    #[prost(bool, tag = "2")]
    pub succeeded: bool,
    /// One for each step that was done.
    #[prost(message, repeated, tag = "3")]
    pub responses: Vec<ResponseOp>,
}

/// Makes a lease.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct LeaseGrantRequest {
    /// In seconds.
    #[prost(int64, tag = "1")]
    pub ttl: i64,
    /// Its number.
    #[prost(int64, tag = "2")]
    pub id: i64,
}

/// A lease that was made.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct LeaseGrantResponse {
    /// Its number.
    #[prost(int64, tag = "2")]
    pub id: i64,
    /// In seconds: what etcd makes of it.
    #[prost(int64, tag = "3")]
    pub ttl: i64,
}

/// Names a lease: to end it, or to keep it.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct LeaseRequest {
    /// Its number.
    #[prost(int64, tag = "1")]
    pub id: i64,
}

/// A lease was kept.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct LeaseKeepAliveResponse {
    /// Its number.
    #[prost(int64, tag = "2")]
    pub id: i64,
    /// In seconds; 0: it has ended.
    #[prost(int64, tag = "3")]
    pub ttl: i64,
}

/// A message to a watch stream.
#[derive(Clone, PartialEq, Message)]
pub struct WatchRequest {
    /// Begin to watch a range.
    #[prost(message, optional, tag = "1")]
    pub create: Option<WatchCreateRequest>,
    /// Watch it no more.
    #[prost(message, optional, tag = "2")]
    pub cancel: Option<WatchCancelRequest>,
}

/// Begins to watch a range.
#[derive(Clone, PartialEq, Message)]
pub struct WatchCreateRequest {
    /// The first key.
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
    /// The one behind the last.
    #[prost(bytes = "vec", tag = "2")]
    pub range_end: Vec<u8>,
    /// From which revision on.
    #[prost(int64, tag = "3")]
    pub start_revision: i64,
    /// The number of the watch on its stream.
    #[prost(int64, tag = "7")]
    pub watch_id: i64,
}

/// Ends a watch.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct WatchCancelRequest {
    /// Which.
    #[prost(int64, tag = "1")]
    pub watch_id: i64,
}

/// What a watch has seen.
#[derive(Clone, PartialEq, Message)]
pub struct WatchResponse {
    /// Which watch.
    #[prost(int64, tag = "2")]
    pub watch_id: i64,
    /// Whether it has begun.
    #[prost(bool, tag = "3")]
    pub created: bool,
    /// Whether it has ended.
    #[prost(bool, tag = "4")]
    pub canceled: bool,
    /// The oldest revision that is left, where what was to be watched is not.
    #[prost(int64, tag = "5")]
    pub compact_revision: i64,
    /// Why it has ended.
    #[prost(string, tag = "6")]
    pub cancel_reason: String,
    /// What happened, in order.
    #[prost(message, repeated, tag = "11")]
    pub events: Vec<Event>,
}

/// Asks for a token.
#[derive(Clone, PartialEq, Message)]
pub struct AuthenticateRequest {
    /// The user.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its password.
    #[prost(string, tag = "2")]
    pub password: String,
}

/// A token.
#[derive(Clone, PartialEq, Message)]
pub struct AuthenticateResponse {
    /// To be shown with every call.
    #[prost(string, tag = "2")]
    pub token: String,
}
