//! Seeded bugs: faults that locks have had elsewhere, or could easily have, each switched on by its name.
//!
//! What lives here: their list, and which one is on. They are the proof that the tests would notice: `cargo xtask mutants`
//! runs the tests against each and fails if any survives. The module exists under `--cfg interlock_bugs` only, which no
//! feature turns on and nothing that ships is built with; without it `bug!` is the constant `false`. What a bug
//! does stands where it bites, in one line that asks for it. The list is read by `xtask` as well, so it may name nothing
//! of the core.

/// The variable that names the bug to switch on; without it there is none.
pub const VARIABLE: &str = "INTERLOCK_BUG";

macro_rules! bugs {
    ($($(#[doc = $about:literal])+ $name:ident,)+) => {
        /// A seeded bug.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Bug {
            $($(#[doc = $about])+ $name,)+
        }

        impl Bug {
            /// All there are.
            pub const ALL: &[Bug] = &[$(Bug::$name,)+];

            /// What it does, in a line.
            pub const fn about(self) -> &'static str {
                match self {
                    $(Bug::$name => concat!($($about,)+),)+
                }
            }
        }
    };
}

bugs! {
    // The queue of one lock.

    /// Readers go past a writer that came before them.
    ReaderBarging,
    /// A waiter waits for holders only, as far as the deadlock rule knows, not for those before it.
    NoQueueEdges,
    /// A waiter waits for one of those in its way, as far as the deadlock rule knows.
    OneEdgeOfMany,
    /// The last to come is the first to be served.
    Lifo,
    /// An upgrade waits behind plain waiters.
    UpgradeBehindWaiters,
    /// Of two waiters whose turn it is one is granted the lock.
    OneGrantedOfTwo,
    /// Whatever is not exclusive goes together, a reader with who announces writes below as well.
    IntentsIgnored,
    /// An owner enters again even where its policy says that it must not.
    ReentryWhereForbidden,
    /// A re-entry gets a fence of its own, which the rest of its section is then refused for.
    ReentryNewFence,
    /// One lease more than there are permits.
    PermitsOffByOne,
    /// A release takes away whoever holds the lock.
    ForeignRelease,
    /// A lease ends a tick before its time.
    ExpiryTickEarly,
    /// A lease ends a tick after its time.
    ExpiryTickLate,
    /// A lease is renewed for ever.
    HoldLimitIgnored,
    /// A heartbeat renews no lease.
    HeartbeatRenewsNothing,
    /// Those who wait at a worker that died stand in the queue until their deadline.
    DeadWaiterKept,
    /// After a restart that forgot them, fences begin at 1.
    FenceResetOnRestart,

    // The search for cycles.

    /// The search looks at two owners.
    SearchDepthTwo,
    /// The wait can be seen by others only after the search.
    SearchBeforePublish,
    /// A cycle that is found is not read a second time.
    PhantomRefused,
    /// A chain that is too long to be searched counts as none.
    LongChainPasses,
    /// An upgrade that is granted ahead of waiters is not searched for the cycles that it closes behind it.
    UpgradeEdgesNotSearched,
    /// Who begins a second wait does not mark the first one, so that a search that comes to that knows of no other.
    FirstWaitUnmarked,
    /// Who begins a second wait does not mark it.
    SecondWaitUnmarked,
    /// The waits of an owner that has several are marked only after the search.
    MarkedAfterSearch,
    /// Who marks another wait of its owner does not look for the cycles that run through that one.
    MarkerSearchesItself,
    /// Who was taken for dead and comes back is not searched for again.
    RevivalNotNoted,

    // Sessions.

    /// A session that was forgotten is revived by its next heartbeat.
    DeadSessionRevived,
    /// A session is forgotten while its leases live.
    SessionForgottenEarly,
    /// Leases are ended by heartbeats that were read long ago.
    StaleHeartbeatsTrusted,

    // The records.

    /// A write that lost against another counts as written.
    LostWriteIgnored,
    /// A lock that nobody holds takes the highest fence with it.
    FenceForgottenWithLock,

    // The order of locks.

    /// Locks are ordered by name alone.
    OrderIgnoresRank,
    /// Entering a lock again is a matter of order.
    OrderIgnoresReentry,
    /// What the index names counts as held.
    OrderTrustsIndex,
    /// A request takes its locks as they are written.
    WrittenOrder,
    /// A lock in a hierarchy announces itself nowhere.
    IntentForgotten,

    // The table.

    /// A refusal for deadlock leaves everything in place.
    GhostAfterRefusal,
    /// Whoever cancels still stands in the queue, and is granted the lock.
    GrantToCancelled,
    /// When a waiter leaves, nobody behind it closes up.
    NoGrantOnCancel,
    /// When a holder leaves, nobody is let in as long as another stays.
    NoGrantOnDowngrade,
    /// Of two that were granted the lock one is told.
    OneWokenOfTwo,
    /// Of many locks the first is not given back.
    PartialGrantKept,
    /// A release counts twice.
    ReleaseTwice,
    /// What is over stays in the index by owner.
    IndexItemLeft,
    /// What could not be given back is forgotten.
    FailedReleaseForgotten,
    /// A wait goes on after its deadline.
    DeadlineIgnored,
    /// A waiter looks for itself at its deadline only, not when a lease in its way ends.
    NoTimerForLeaseEnd,
    /// A waiter whom heartbeats spare its look does not look again either where searches may have missed edges.
    DoubtPutOff,
    /// A lock that was lost while its request waited for the next is handed out all the same.
    EarlierLossIgnored,
    /// A lease that has ended is renewed as long as nobody took its lock.
    DeadLeaseRenewed,
    /// A lease that has ended counts as its lock's holder.
    StaleLeaseAccepted,
    /// The sweep removes what has ended and grants nothing.
    SweepGrantsNothing,
    /// Breaking the glass leaves the fence as it is.
    GlassKeepsFence,
    /// One waiter more than the limit allows.
    WaitersOffByOne,

    // The memory of fences.

    /// A fence that is below a later one passes.
    StaleFencePasses,
    /// A fence that is higher than what was seen before is not remembered.
    SeenFenceNotRaised,
    /// A re-entry, which has the fence of its section, is taken for late.
    EqualFenceStale,
    /// Of readers that hold side by side the one with the lower fence is taken for late.
    ReadersStale,
    /// A fence is forgotten while a lower one can still be shown.
    SeenForgottenEarly,
    /// What a full memory forgets may come back with any fence.
    ForgottenWithoutFloor,

    // The lease protocol: the authority.

    /// A release that overtakes its request is not remembered.
    TombstoneForgotten,
    /// What is over is remembered for ever.
    TombstoneKept,
    /// A request for a lease that is being cancelled keeps what it was granted meanwhile.
    LateGrantKept,
    /// Whoever cancels a lease that waits leaves its entry in the queue.
    DeleteLeavesWaiter,
    /// Whoever ends a lease does not note what there is to be taken away, and dies before it has done so.
    RemainsForgotten,
    /// Who gives a lease back again after it ended has it remembered no longer for that.
    EndNotRefreshed,
    /// A worker that could not note what became of a lease that it drove does not try again.
    DriverForgets,
    /// The worker where a cancelled lease waits is not told.
    DriverNotWoken,
    /// What waits at a worker that died is ended by nobody.
    DeadDriverKept,
    /// Who only watches a lease cancels it by going.
    WatcherCancels,
    /// A request that is repeated gets the lease's time and does not renew it.
    RepeatRenewsNothing,
    /// Whoever knows an identity gets its lease, whatever was asked for.
    IdentityOfAnother,
    /// Locks that were granted before the last one are not renewed with it.
    EarlierGrantNotRenewed,
    /// A grant is renewed by the heartbeat of the worker that it was asked of.
    DetachedHangsOnSession,
    /// A table that may have lost its memory grants at once.
    GraceSkipped,
    /// A receipt brings a lease back after others have been granted its locks.
    ReceiptAfterGrace,
    /// A lease that was released comes back when its renewal does.
    ReleasedLeaseRevived,
    /// Of two receipts for one lock the one that comes last is the true one.
    LowerFenceWins,
    /// A lease comes back beside a rival, whoever was granted the lock later.
    RestoredBesideRival,
    /// A receipt gives a whole hold again.
    ReceiptRestartsHold,
    /// A fence that came back by a receipt is not above the next.
    RestoredFenceForgotten,

    // The lease protocol: the client.

    /// A grant counts from its answer.
    ValidFromAnswer,
    /// A renewal counts from its answer.
    RenewedFromAnswer,
    /// An answer to a call that was given up counts from the next one.
    LateAnswerBelieved,
    /// A lease is believed in past its hold limit.
    ClientIgnoresHold,
    /// A renewal that failed is not tried again.
    FailedRenewalStops,
    /// A release that was not heard is not sent again.
    ReleaseSentOnce,
    /// A grant that comes after its request was forgotten is not given back.
    LateGrantLeaked,

    // The local backend.

    /// The first write of a record goes through whoever was faster.
    CasOnAbsentKey,
    /// Of two workers that open a table at once each spreads names by its own secret.
    OwnSeedKept,
    /// Two workers give out the same identities.
    LeaseIdsRepeat,
    /// Waiters of other workers are not woken.
    OthersNotWoken,
    /// A heartbeat comes too late for a short TTL.
    ShortTtlIgnored,

    // The authority backend.

    /// A grant is believed that names another owner than the one it was asked for.
    GrantOfAnotherBelieved,
    /// A grant in a weaker mode than was asked for is believed.
    WeakerModeBelieved,
    /// An exclusive grant is believed though its fence is below one that was seen before.
    FallenFenceBelieved,
    /// A refusal is believed whatever status it comes with.
    AnotherStatusBelieved,
    /// A stream that goes gives nothing back at the authority.
    LeaverKeepsLease,
    /// A request whose answer did not come is refused at once, though it may have been granted.
    SilenceIsRefusal,
    /// Audit asks the authority for locks of the real table.
    AuditAsksInEarnest,
    /// What a stream leaves to send waits for the next tick of its root.
    RootNotCalled,

    // The filter.

    /// A request is forwarded while it waits.
    ForwardsBeforeGrant,
    /// The fence header of a caller reaches the upstream.
    FencesNotStripped,
    /// Fences are passed on without a look at their signature.
    UnsignedFencePassed,
    /// The locks are given back when the response begins.
    ReleasedAtResponse,
    /// A caller that goes leaves its request in the queue.
    DisconnectForgotten,
    /// An answer passes that was made without the lock.
    LostLeasePasses,
    /// A request goes on without its lock when the backend fails.
    FailsOpen,

    // The guard.

    /// A guarded request passes with a fence of any lock.
    FenceOfAnotherLock,
    /// A guarded request passes if anybody holds the lock.
    AnyHolderPasses,
    /// A guarded request passes after its lease has ended, as long as nobody took the lock.
    EndedHolderPasses,
}

/// Whether this is the bug that is switched on.
///
/// # Panics
/// Where the variable names no bug: a run that tests nothing must not look like one that finds nothing.
#[allow(clippy::panic, reason = "nothing that ships is built with this module")]
pub fn is_on(bug: Bug) -> bool {
    static ON: std::sync::OnceLock<Option<Bug>> = std::sync::OnceLock::new();
    let on = ON.get_or_init(|| {
        let name = std::env::var(VARIABLE).ok()?;
        let known = Bug::ALL.iter().copied().find(|bug| format!("{bug:?}") == name);
        Some(known.unwrap_or_else(|| panic!("{VARIABLE}: there is no bug {name}")))
    });
    *on == Some(bug)
}
