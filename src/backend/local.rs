//! The local backend: the lock table in the proxy's shared data, shared by all workers of one Envoy.
//!
//! What lives here: how records are kept under keys, how a worker takes part in the table (its session, its heartbeat,
//! its mailbox) and how waiters on other workers are woken. Who gets a lock is decided in the core.
//!
//! Shared data is keyed by the `vm_id` alone, cannot forget a key and cannot list its keys. So there is a fixed number
//! of keys, all under a prefix that carries the format and the instance. It lives as long as the process, which is why
//! moments on the process's monotonic clock may be stored in it.

mod leases;

use core::hash::Hasher;

use interlock_core::bug;
use interlock_core::lease::authority;
use interlock_core::session::BEAT;
use interlock_core::store::{Kind, Record, Version};
use interlock_core::{
    Census, Duration, Effects, Fence, Grant, Lease, LeaseId, LockName, Loss, Outcome, OwnerId, Pending, Request, Rules,
    Scene, SessionId, Store, StoreError, Table, Time,
};
use siphasher::sip::SipHasher13;

use super::Purpose;
use crate::host::{Cas, Expected, Host, HostError, QueueId, Status, Stored};

/// How many buckets locks are spread over, and owners. Each costs one key of shared data once it was used. With the
/// default limit of 100,000 locks a bucket holds about a hundred at the most.
const BUCKETS: u32 = 1024;

/// The first byte of every record, and part of every key: a plugin with another format is another table.
const FORMAT: u8 = 3;

/// How many buckets are swept at a time; all of them are swept about once a second.
const SWEEP_STEP: u32 = BUCKETS / 4;

/// The keys of one table.
pub(super) struct Space {
    prefix: String,
    hash: SipHasher13,
}

impl Space {
    /// Opens the table. The first to do so chooses the secret by which names are spread over buckets, so that no client
    /// can choose names that all fall into one.
    pub(super) fn open(host: &dyn Host, instance: &str, purpose: Purpose) -> Result<Self, HostError> {
        let purpose = match purpose {
            Purpose::Enforce => "enforce",
            Purpose::Audit => "audit",
        };
        let prefix = format!("interlock/{FORMAT}/{instance}/{purpose}");
        let key = format!("{prefix}/seed");
        let seed = match host.shared_get(&key)? {
            Some((seed, _)) => seed,
            None => {
                let seed = host.random()?.to_le_bytes().to_vec();
                match host.shared_set(&key, &seed, Expected::Absent)? {
                    Stored::Yes => seed,
                    Stored::Conflict if bug!(OwnSeedKept) => seed,
                    Stored::Conflict => {
                        let theirs = host.shared_get(&key)?.map(|(theirs, _)| theirs);
                        // A secret of its own would make this VM's table another one.
                        theirs.ok_or(HostError { call: "shared_get", status: Status::NotFound })?
                    }
                }
            }
        };
        let seed = <[u8; 16]>::try_from(seed).unwrap_or_default();
        Ok(Space { prefix, hash: SipHasher13::new_with_key(&seed) })
    }

    fn key(&self, kind: Kind, index: u32) -> String {
        let of_kind = match kind {
            Kind::Locks => "/l/",
            Kind::Owners => "/o/",
            Kind::Leases => "/a/",
            Kind::Sessions => return [self.prefix.as_str(), "/s"].concat(),
            Kind::Seen => "/f/",
        };
        [self.prefix.as_str(), of_kind, itoa::Buffer::new().format(index)].concat()
    }
}

/// The records of a table, in shared data.
pub(super) struct SharedStore<'a> {
    pub(super) host: &'a dyn Host,
    pub(super) space: &'a Space,
}

impl Store for SharedStore<'_> {
    fn buckets(&self) -> u32 {
        BUCKETS
    }

    fn bucket(&self, name: &str) -> u32 {
        let mut hash = self.space.hash;
        hash.write(name.as_bytes());
        u32::try_from(hash.finish() % u64::from(BUCKETS)).unwrap_or(0)
    }

    fn read<R: Record>(&self, index: u32) -> Result<(R, Version), StoreError> {
        match self.host.shared_get(&self.space.key(R::KIND, index)).map_err(failed)? {
            None => Ok((R::default(), Version::ABSENT)),
            Some((bytes, cas)) => Ok((decode(&bytes)?, Version(cas.0))),
        }
    }

    fn write<R: Record>(&self, index: u32, record: &R, version: Version) -> Result<bool, StoreError> {
        let bytes = encode(record)?;
        let absent = version == Version::ABSENT && !bug!(CasOnAbsentKey);
        let expected = if absent { Expected::Absent } else { Expected::Version(Cas(version.0)) };
        let stored = self.host.shared_set(&self.space.key(R::KIND, index), &bytes, expected).map_err(failed)?;
        Ok(stored == Stored::Yes)
    }
}

fn failed(error: HostError) -> StoreError {
    StoreError::Failed(error.to_string())
}

/// A record as it is stored: the format, then the record as postcard writes it. Public for those who test the format.
///
/// # Errors
/// [`StoreError::Failed`] where it cannot be written, which no record is known for.
#[doc(hidden)]
pub fn encode<R: Record>(record: &R) -> Result<Vec<u8>, StoreError> {
    // Room for what most records are, so that they do not grow byte by byte.
    let mut bytes = Vec::with_capacity(256);
    bytes.push(FORMAT);
    postcard::to_extend(record, bytes).map_err(|error| StoreError::Failed(error.to_string()))
}

/// A record from the bytes that are stored. Public for those who test the format.
///
/// # Errors
/// [`StoreError::Unreadable`] for anything that [`encode`] did not write, to the last byte.
#[doc(hidden)]
pub fn decode<R: Record>(bytes: &[u8]) -> Result<R, StoreError> {
    let unreadable = |why: &dyn core::fmt::Display| StoreError::Unreadable(why.to_string());
    let (format, record) = bytes.split_first().ok_or_else(|| unreadable(&"it is empty"))?;
    if *format != FORMAT {
        return Err(unreadable(&format_args!("its format is {format}, not {FORMAT}")));
    }
    let (record, rest) = postcard::take_from_bytes(record).map_err(|error| unreadable(&error))?;
    if rest.is_empty() { Ok(record) } else { Err(unreadable(&"there is more behind it")) }
}

/// A VM's part in one table of an instance.
pub struct Local {
    space: Space,
    table: Table,
    mailbox_name: String,
    mailbox: Option<QueueId>,
    /// The last heartbeat that went through.
    beaten: Time,
    /// The last that was tried.
    tried: Time,
    leases: u64,
    swept: u32,
    census: Census,
    /// Why some bucket of this round could not be swept.
    unswept: Option<StoreError>,
}

impl Local {
    /// Opens an instance's table. Nothing of it is changed yet: the VM joins with its first [`Local::beat`] or request,
    /// since a VM that only tries a configuration must leave no trace.
    ///
    /// # Errors
    /// Those of the host.
    pub fn open(host: &dyn Host, instance: &str, purpose: Purpose) -> Result<Self, HostError> {
        let space = Space::open(host, instance, purpose)?;
        let mailbox_name = format!("{}/vm/{:032x}", space.prefix, host.random()?);
        Ok(Local {
            space,
            table: Table::new(),
            mailbox_name,
            mailbox: None,
            beaten: Time::ZERO,
            tried: Time::ZERO,
            leases: 0,
            swept: 0,
            census: Census::default(),
            unswept: None,
        })
    }

    /// Makes the root whose callback runs the one that wake-ups are delivered to.
    ///
    /// # Errors
    /// Those of the host.
    pub fn listen(&mut self, host: &dyn Host) -> Result<(), HostError> {
        self.mailbox = Some(host.register_queue(&self.mailbox_name)?);
        Ok(())
    }

    /// The queue that wake-ups come by.
    pub fn mailbox(&self) -> Option<QueueId> {
        self.mailbox
    }

    /// How long the VM may go without a heartbeat: a third of the shortest TTL that hangs on it.
    fn beat_every(&self) -> Duration {
        if bug!(ShortTtlIgnored) {
            return BEAT;
        }
        BEAT.min(self.table.shortest_ttl() / 3)
    }

    /// When the next heartbeat is due.
    pub fn next_beat(&self) -> Time {
        if self.tried == Time::ZERO { Time::ZERO } else { self.tried + self.beat_every() }
    }

    /// Whether a lease of this TTL may have ended by now, because no heartbeat went through for as long.
    pub fn may_have_lapsed(&self, now: Time, ttl: Duration) -> bool {
        now.since(self.beaten) >= ttl
    }

    /// Beats if it is time to; joins the table with the first beat. True if leases may have ended meanwhile, because the
    /// VM was silent for longer than a TTL: they have to be looked at with [`Local::check`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn beat(&mut self, host: &dyn Host, rules: &Rules) -> Result<bool, StoreError> {
        let now = host.now();
        if now < self.next_beat() {
            return Ok(false);
        }
        self.tried = now;
        let mailbox = match self.mailbox {
            Some(mailbox) => mailbox,
            None => {
                self.listen(host).map_err(failed)?;
                self.mailbox.unwrap_or(QueueId(0))
            }
        };
        let had_session = self.table.session() != SessionId::NONE;
        let joined = with_scene(host, &self.space, rules, |scene| self.table.beat(scene, mailbox.0))?;
        // By the clock after the write: up to then others saw the last heartbeat, however early this one was begun.
        let lapsed = self.may_have_lapsed(host.now(), self.table.shortest_ttl());
        self.beaten = now;
        Ok(had_session && (joined.is_some() || lapsed))
    }

    /// An identity for a new lease: sessions are never given twice, and neither is a number within one.
    ///
    /// # Errors
    /// Where the VM has not joined the table, because no heartbeat went through yet.
    pub fn new_lease(&mut self) -> Result<LeaseId, StoreError> {
        if self.table.session() == SessionId::NONE {
            return Err(StoreError::Failed(String::from("this worker could not join the table")));
        }
        self.leases += 1;
        let session = if bug!(LeaseIdsRepeat) { SessionId::NONE } else { self.table.session() };
        Ok(LeaseId(u128::from(session.0) << 64 | u128::from(self.leases)))
    }

    /// See [`Table::acquire`].
    pub fn acquire(&mut self, host: &dyn Host, rules: &Rules, request: Request) -> Outcome {
        with_scene(host, &self.space, rules, |scene| self.table.acquire(scene, request))
    }

    /// See [`Table::poll`].
    pub fn poll(&mut self, host: &dyn Host, rules: &Rules, pending: Pending) -> Outcome {
        with_scene(host, &self.space, rules, |scene| self.table.poll(scene, pending))
    }

    /// See [`Table::poll_at`].
    pub fn poll_at(&self, pending: &Pending) -> Time {
        self.table.poll_at(pending)
    }

    /// See [`Table::cancel`].
    pub fn cancel(&mut self, host: &dyn Host, rules: &Rules, pending: Pending) {
        with_scene(host, &self.space, rules, |scene| self.table.cancel(scene, pending));
    }

    /// See [`Table::release`].
    pub fn release(&mut self, host: &dyn Host, rules: &Rules, lease: Lease) -> Vec<Grant> {
        with_scene(host, &self.space, rules, |scene| self.table.release(scene, lease))
    }

    /// See [`Table::renew`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn check(
        &mut self,
        host: &dyn Host,
        rules: &Rules,
        lease: &Lease,
    ) -> Result<Option<(LockName, Loss)>, StoreError> {
        with_scene(host, &self.space, rules, |scene| self.table.renew(scene, lease))
    }

    /// See [`Table::holder_of`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn holder_of(
        &mut self,
        host: &dyn Host,
        rules: &Rules,
        lock: &LockName,
        fence: Fence,
    ) -> Result<Option<OwnerId>, StoreError> {
        with_scene(host, &self.space, rules, |scene| self.table.holder_of(scene, lock, fence))
    }

    /// See [`Table::held_by`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn held_by(
        &mut self,
        host: &dyn Host,
        rules: &Rules,
        lock: &LockName,
        is: impl Fn(&OwnerId) -> bool,
    ) -> Result<Option<Fence>, StoreError> {
        with_scene(host, &self.space, rules, |scene| self.table.held_by(scene, lock, is))
    }

    /// Keeps house, if that falls to this VM: sweeps the next part of the table. Gives the count of a sweep that has been
    /// all round. Also tries again what failed earlier. `idle`: the VM serves no requests.
    ///
    /// # Errors
    /// Those of the store; of the buckets of a round only one, when it has been all round.
    pub fn keep_house(&mut self, host: &dyn Host, rules: &Rules, idle: bool) -> Result<Option<Census>, StoreError> {
        with_scene(host, &self.space, rules, |scene| {
            self.table.settle_debts(scene);
            if !self.table.keep_house(scene, idle)? {
                (self.swept, self.census, self.unswept) = (0, Census::default(), None);
                return Ok(None);
            }
            let end = BUCKETS.min(self.swept + SWEEP_STEP);
            for bucket in self.swept..end {
                // One bucket that cannot be read must not keep the others from being swept.
                // Only where leases come by message is there anything to remember of them.
                let swept =
                    if rules.grace.is_zero() { Ok(()) } else { authority::sweep(&mut self.table, scene, bucket) };
                if let Err(error) = swept.and_then(|()| self.table.sweep(scene, bucket, &mut self.census)) {
                    self.unswept = Some(error);
                }
            }
            self.swept = end;
            if self.swept < BUCKETS {
                return Ok(None);
            }
            self.swept = 0;
            let census = core::mem::take(&mut self.census);
            if let Some(error) = self.unswept.take() {
                return Err(error);
            }
            self.table.publish_census(scene, &census)?;
            Ok(Some(census))
        })
    }

    /// Wakes whoever was granted a lock, and gives back everything that happened since this was last called.
    pub fn deliver(&mut self, host: &dyn Host) -> Effects {
        let effects = self.table.take_effects();
        for wake in &effects.wakes {
            let member = self.table.sessions().member(wake.session);
            let mailbox = member.map(|member| QueueId(member.mailbox));
            // A wake-up is a hint. One that cannot be delivered is made up for by the waiter's next look.
            let lost = bug!(OthersNotWoken) && wake.session != self.table.session();
            if let Some(mailbox) = mailbox.filter(|_| !lost) {
                let _ = host.enqueue(mailbox, &wake.lease.0.to_le_bytes());
            }
        }
        effects
    }

    /// The leases that were woken since the mailbox was last emptied.
    pub fn woken(&self, host: &dyn Host) -> Vec<LeaseId> {
        let mut woken = Vec::new();
        if let Some(mailbox) = self.mailbox {
            while let Ok(Some(message)) = host.dequeue(mailbox) {
                woken.extend(<[u8; 16]>::try_from(message).map(|lease| LeaseId(u128::from_le_bytes(lease))));
            }
        }
        woken
    }
}

fn with_scene<T>(
    host: &dyn Host,
    space: &Space,
    rules: &Rules,
    act: impl FnOnce(&Scene<'_, SharedStore<'_>>) -> T,
) -> T {
    let store = SharedStore { host, space };
    act(&Scene { store: &store, rules, now: host.now(), unix_micros: host.unix_micros() })
}
