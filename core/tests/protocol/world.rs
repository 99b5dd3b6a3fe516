//! A world: an authority, two proxies, what is under way between them, and what has been seen of it all.
//!
//! What must not be here: what happens in it (see [`super::step`]) and what may not (see [`super::watch`]).

use std::any::Any;
use std::cell::RefCell;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use interlock_core::lease::{CallId, Client, LeaseBucket, Parked, PutAnswer, Receipt};
use interlock_core::store::{LockBucket, OwnerBucket, Record, Version};
use interlock_core::{
    Classes, Duration, Fence, LeaseId, Limits, LockName, Mode, OwnerId, Rules, Sessions, Store, StoreError, Table, Time,
};

use super::canon::{Origin, Tokens};

/// What time passes by.
pub const TICK: Duration = Duration::from_secs(1);
/// The furthest that the wall clock steps back.
pub const MOST_BACK: Duration = Duration::from_secs(2);
/// How far the wall clock steps ahead: past the hold limit of every lease.
pub const STEP_AHEAD: Duration = Duration::from_secs(6);

pub const PROXIES: usize = 2;
pub const LOCKS: usize = 2;

/// What one request of a proxy asks for: the number of a lock, and how.
pub type Script = &'static [(usize, Mode)];

/// What may go wrong yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Faults {
    /// Messages that get lost, and connections that break.
    pub lost: u8,
    /// Messages that come twice.
    pub doubled: u8,
    /// Ticks at the end of which something is still under way.
    pub late: u8,
    /// Restarts of the authority, which then knows nothing.
    pub crashes: u8,
    /// Steps of the authority's wall clock.
    pub steps: u8,
    /// Restarts of a proxy.
    pub deaths: u8,
}

/// What a grant tells.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Told {
    pub fences: Vec<Fence>,
    pub receipt: Arc<Receipt>,
}

pub type Why = &'static str;
pub type Reply = PutAnswer<Told, Why>;

/// What is under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    Put {
        lease: LeaseId,
        request: usize,
        wait: Duration,
    },
    Renew {
        leases: Vec<(LeaseId, Arc<Receipt>)>,
    },
    Delete {
        lease: LeaseId,
    },
    Answer(Box<Reply>),
    /// The authority is not able to say, and asks to be left alone for so long.
    Unable(Duration),
    Renewed(Vec<(LeaseId, Option<Duration>)>),
    Deleted,
}

/// One message, of a proxy or to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub proxy: usize,
    /// Which life of the proxy the call is of.
    pub life: u8,
    pub call: CallId,
    pub body: Arc<Body>,
}

/// How a request of a proxy stands, as its caller knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Progress {
    Unasked,
    Asked { lease: LeaseId, told_by: Time },
    Held { lease: LeaseId },
    Over,
}

/// A proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proxy {
    pub client: Arc<Client<Told, Why>>,
    /// How long it may have something to do for a request that is over.
    pub rest: Duration,
    pub life: u8,
    /// How many identities it has given to leases.
    pub names: u8,
    /// When its calls time out.
    pub timers: Vec<(CallId, Time)>,
    pub requests: Vec<Progress>,
    /// When it must have nothing left to do, if no request is under way.
    pub idle_by: Time,
}

/// A call that the authority has not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    pub proxy: usize,
    pub life: u8,
    pub call: CallId,
    pub parked: Parked,
    pub woken: bool,
}

/// The records, a bucket for each lock and each proxy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Shelf {
    pub locks: [Arc<LockBucket>; LOCKS],
    pub owners: [Arc<OwnerBucket>; PROXIES],
    pub leases: [Arc<LeaseBucket>; PROXIES],
    pub sessions: Arc<Sessions>,
}

/// The records while they are worked on.
pub struct Desk(pub RefCell<Shelf>);

/// The authority: one worker, and its records.
#[derive(Clone, Debug)]
pub struct Authority {
    pub shelf: Shelf,
    pub table: Arc<Table>,
    pub streams: Vec<Stream>,
}

/// What somebody who sees everything remembers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Memory {
    /// The highest fence that each lock was ever granted under.
    pub highest: [Fence; LOCKS],
    /// Leases that the authority was told to end, and when.
    pub ended: Vec<(LeaseId, Time)>,
    /// Whether the wall clock has stepped back.
    pub stepped_back: bool,
    /// What has gone wrong on the way here.
    pub fault: Option<&'static str>,
}

#[derive(Clone, Debug)]
pub struct World {
    pub now: Time,
    /// The authority's wall clock, in microseconds since 1970.
    pub wall: u64,
    pub authority: Authority,
    pub proxies: [Proxy; PROXIES],
    pub net: Vec<Message>,
    pub left: Faults,
    pub memory: Memory,
}

/// How long things take, in ticks.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// How long a lease outlives its last renewal, and an authority's grace.
    pub ttl: u32,
    /// For how long a lease is renewed.
    pub hold: u32,
    /// How long a request waits.
    pub wait: u32,
    /// For how many ticks, and most of another one, a proxy waits for an answer.
    pub timeout: u32,
    /// Whether callers go, or give something back, while they wait for an answer.
    pub impatient: bool,
}

/// Names and rules, made once.
pub struct Laws {
    pub rules: Rules,
    pub owners: [OwnerId; PROXIES],
    pub names: [LockName; LOCKS],
    pub scripts: [Vec<Script>; PROXIES],
    pub ttl: Duration,
    pub hold: Duration,
    pub wait: Duration,
    pub timeout: Duration,
    pub impatient: bool,
}

impl Laws {
    pub fn new(scripts: [&[Script]; PROXIES], terms: Terms) -> Self {
        let ttl = TICK * terms.ttl;
        let limits =
            Limits { locks_per_owner: None, waiters_per_lock: 100, locks: 100, waiters: 100, longest_ttl: ttl };
        Laws {
            rules: Rules { classes: Classes::default(), limits, grace: ttl },
            owners: ["a", "b"].map(|name| OwnerId::new(name).unwrap()),
            names: ["l", "m"].map(|name| LockName::parse(name).unwrap()),
            scripts: scripts.map(<[Script]>::to_vec),
            ttl,
            hold: TICK * terms.hold,
            wait: TICK * terms.wait,
            timeout: TICK * terms.timeout + Duration::from_millis(900),
            impatient: terms.impatient,
        }
    }

    /// How far the wall clock steps back: less than a grace. Fences would fall if it were more than that and the time that
    /// the authority was down, since all that an authority has to go by is then the clock.
    pub fn step_back(&self) -> Duration {
        (self.ttl - TICK).min(MOST_BACK)
    }

    /// How long a proxy has something to do for a request that is over.
    pub fn rest(&self) -> Duration {
        self.wait + self.timeout + self.ttl
    }
}

/// The identity that a proxy gives to its next lease.
pub fn name(proxy: usize, names: u8) -> LeaseId {
    LeaseId(u128::from(names) * PROXIES as u128 + proxy as u128 + 16)
}

/// Whose lease it is.
pub fn proxy_of(lease: LeaseId) -> usize {
    (lease.0 % PROXIES as u128) as usize
}

impl Store for Desk {
    fn buckets(&self) -> u32 {
        LOCKS as u32
    }

    fn bucket(&self, name: &str) -> u32 {
        match name {
            "l" | "a" => 0,
            "m" | "b" => 1,
            lease => proxy_of(LeaseId(u128::from_str_radix(lease, 16).unwrap())) as u32,
        }
    }

    fn read<R: Record>(&self, index: u32) -> Result<(R, Version), StoreError> {
        let (shelf, at) = (self.0.borrow(), index as usize);
        let all: [&dyn Any; 4] = [&*shelf.locks[at], &*shelf.owners[at], &*shelf.leases[at], &*shelf.sessions];
        let record = all.into_iter().find_map(|record| record.downcast_ref::<R>()).unwrap();
        Ok((record.clone(), Version(1)))
    }

    fn write<R: Record>(&self, index: u32, record: &R, _: Version) -> Result<bool, StoreError> {
        let (mut shelf, at) = (self.0.borrow_mut(), index as usize);
        let record: &dyn Any = record;
        if let Some(locks) = record.downcast_ref::<LockBucket>() {
            shelf.locks[at] = Arc::new(locks.clone());
        } else if let Some(owners) = record.downcast_ref::<OwnerBucket>() {
            shelf.owners[at] = Arc::new(owners.clone());
        } else if let Some(leases) = record.downcast_ref::<LeaseBucket>() {
            shelf.leases[at] = Arc::new(leases.clone());
        } else if let Some(sessions) = record.downcast_ref::<Sessions>() {
            shelf.sessions = Arc::new(sessions.clone());
        }
        Ok(true)
    }
}

impl Hash for Body {
    fn hash<H: Hasher>(&self, state: &mut H) {
        core::mem::discriminant(self).hash(state);
        match self {
            Body::Put { lease, request, wait } => (lease, request, wait).hash(state),
            Body::Renew { leases } => leases.hash(state),
            Body::Delete { lease } => lease.hash(state),
            Body::Unable(left) => left.hash(state),
            Body::Renewed(answers) => answers.hash(state),
            Body::Deleted => {}
            Body::Answer(reply) => match &**reply {
                PutAnswer::Granted { ttl, waited, grant } => (0_u8, ttl, waited, grant).hash(state),
                PutAnswer::Refused(why) => (1_u8, why).hash(state),
                PutAnswer::Over { why, .. } => (2_u8, why).hash(state),
            },
        }
    }
}

impl World {
    fn tokens(&self) -> Tokens {
        let mut tokens = Tokens::new();
        let into = &mut tokens;
        (self.left, &self.memory, &self.authority.shelf).hash(into);
        let table = &self.authority.table;
        (table.session(), table.load(), table.sessions()).hash(into);
        for stream in &self.authority.streams {
            into.scope(stream.proxy as u8);
            (stream.life, stream.call, &stream.parked, stream.woken).hash(into);
        }
        for message in &self.net {
            into.scope(message.proxy as u8);
            (message.life, message.call, &message.body).hash(into);
        }
        for (at, proxy) in self.proxies.iter().enumerate() {
            into.scope(at as u8);
            let start = into.len();
            proxy.client.hash(into);
            // Behind the two numbers of its timeout, the client says how many calls it has made in its life.
            into.drop_at(start + 2);
            (proxy.life, proxy.names, &proxy.timers, &proxy.requests, proxy.idle_by).hash(into);
        }
        tokens
    }
}

impl Hash for World {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let step = if self.left.steps > 0 { MOST_BACK } else { Duration::ZERO };
        self.tokens().pour(&Origin { now: self.now, wall: self.wall, step }, state);
    }
}

impl PartialEq for World {
    fn eq(&self, other: &Self) -> bool {
        (self.now, self.wall, &self.proxies, &self.net) == (other.now, other.wall, &other.proxies, &other.net)
            && (&self.authority.shelf, &self.authority.streams) == (&other.authority.shelf, &other.authority.streams)
            && (self.left, &self.memory) == (other.left, &other.memory)
    }
}
