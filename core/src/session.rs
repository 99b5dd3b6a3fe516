//! Sessions: one heartbeat keeps all leases of a worker alive.
//!
//! Every worker that holds or waits for locks is a member of one shared record and beats in it. Its leases live for
//! their TTL after its last beat, however many they are; so a worker that crashed loses them without anybody having
//! to be told. The record also says where a member is woken, how much it holds, and which member keeps house.

use serde::{Deserialize, Serialize};

use crate::id::SessionId;
use crate::time::{Duration, Time};

/// How often a member beats. A third of the shortest TTL that a lease of a session may have is still longer.
pub const BEAT: Duration = Duration::from_millis(250);

/// A member that has not beaten for this long is taken for dead: what it waited for is given up, and another may
/// keep house. What it *holds* lives on until its TTL.
pub const DEAD_AFTER: Duration = Duration::from_millis(1500);

/// What a member holds and waits for, as of its last beat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
pub struct Load {
    /// Locks held, those implied by a hierarchy included.
    pub locks: u32,
    /// Requests that wait.
    pub waiters: u32,
}

/// One member.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Member {
    /// Who it is.
    pub id: SessionId,
    /// Its last heartbeat.
    pub beat: Time,
    /// Where it is woken; means something to the backend only.
    pub mailbox: u32,
    /// Its load at that beat.
    pub load: Load,
}

impl Member {
    /// Whether it counts as alive.
    pub fn is_alive(&self, now: Time) -> bool {
        now < self.beat + DEAD_AFTER
    }
}

/// The record that all members share.
#[derive(Clone, Debug, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
pub struct Sessions {
    last: u32,
    members: Vec<Member>,
    house: Option<House>,
    longest_ttl: Duration,
    doubted: Time,
    born: Option<Time>,
    detached: u32,
}

/// Who keeps house, and whether it serves no requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct House {
    keeper: SessionId,
    idle: bool,
}

impl Sessions {
    /// Adds a member and gives it an identity that no member had before.
    pub fn join(&mut self, mailbox: u32, now: Time) -> SessionId {
        // Wrapping cannot happen in a process's life; skipping NONE keeps even that harmless.
        self.last = self.last.wrapping_add(1).max(1);
        let id = SessionId(self.last);
        self.be_born(now);
        self.members.push(Member { id, beat: now, mailbox, load: Load::default() });
        id
    }

    /// A member's heartbeat. False where the record no longer knows the member: it has to join anew, and what it
    /// held has ended.
    #[must_use]
    pub fn beat(&mut self, id: SessionId, mailbox: u32, load: Load, now: Time) -> bool {
        match self.members.iter_mut().find(|member| member.id == id) {
            Some(member) => {
                member.beat = member.beat.max(now);
                member.mailbox = mailbox;
                member.load = load;
                true
            }
            None if bug!(DeadSessionRevived) => {
                self.members.push(Member { id, beat: now, mailbox, load });
                true
            }
            None => false,
        }
    }

    /// Notes when the table came into being, unless that is known.
    pub fn be_born(&mut self, now: Time) {
        self.born.get_or_insert(now);
    }

    /// How much is left of a grace period of this length, which begins with the table. All of it as long as the table has
    /// not come into being.
    pub fn grace_left(&self, grace: Duration, now: Time) -> Duration {
        self.born.map_or(grace, |born| (born + grace).since(now))
    }

    /// Notes how many locks leases hold that hang on no session, as of a sweep.
    pub fn count_detached(&mut self, locks: u32) {
        self.detached = locks;
    }

    /// How many locks leases hold that hang on no session, as of the last sweep.
    pub fn detached(&self) -> u32 {
        self.detached
    }

    /// Notes the longest TTL that somebody's rules allow. Members under several rules share the record.
    pub fn allow_ttl(&mut self, ttl: Duration) {
        self.longest_ttl = self.longest_ttl.max(ttl);
    }

    /// Drops members whose last lease must have ended: dead for longer than the longest TTL. True if any was.
    pub fn forget(&mut self, now: Time) -> bool {
        let before = self.members.len();
        let longest = if bug!(SessionForgottenEarly) { DEAD_AFTER } else { DEAD_AFTER.max(self.longest_ttl) };
        self.members.retain(|member| now < member.beat + longest);
        self.members.len() < before
    }

    /// Notes that searches for cycles may have missed edges up to now: because a member beats again after it was silent for so
    /// long that entries of its looked ended, or because edges were drawn under an upgrade that is given up.
    pub fn doubt_searches(&mut self, now: Time) {
        self.doubted = self.doubted.max(now);
    }

    /// Searches up to this moment may have missed edges.
    pub fn doubted(&self) -> Time {
        self.doubted
    }

    /// Decides whether `candidate` keeps house from now on. A keeper stays as long as it beats, unless it is busy with
    /// requests and an `idle` member asks: the member that serves none is the one that a bad request cannot kill.
    pub fn keep_house(&mut self, candidate: SessionId, idle: bool, now: Time) -> bool {
        let rival = self.house.filter(|house| house.keeper != candidate);
        let rival_lives =
            rival.is_some_and(|house| self.member(house.keeper).is_some_and(|keeper| keeper.is_alive(now)));
        let rival_is_idle = rival.is_some_and(|house| house.idle);
        if rival_lives && (rival_is_idle || !idle) {
            return false;
        }
        self.house = Some(House { keeper: candidate, idle });
        true
    }

    /// The member of that identity.
    pub fn member(&self, id: SessionId) -> Option<&Member> {
        self.members.iter().find(|member| member.id == id)
    }

    /// All members.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The load of everybody but `me`.
    pub fn load_of_others(&self, me: SessionId, now: Time) -> Load {
        let others = self.members.iter().filter(|member| member.id != me && member.is_alive(now));
        others.fold(Load::default(), |sum, member| Load {
            locks: sum.locks.saturating_add(member.load.locks),
            waiters: sum.waiters.saturating_add(member.load.waiters),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    const fn at(millis: u64) -> Time {
        Time::from_micros(millis * 1000)
    }

    #[test]
    fn identities_are_never_given_twice() {
        let mut sessions = Sessions::default();
        let a = sessions.join(1, at(0));
        sessions.allow_ttl(Duration::from_secs(1));
        assert!(sessions.forget(at(10_000)));
        let b = sessions.join(1, at(10_000));
        assert_ne!(a, b);
        assert!(!sessions.beat(a, 1, Load::default(), at(10_001)), "a forgotten member must learn of it");
    }

    #[test]
    fn one_member_keeps_house_until_it_is_dead_or_busy() {
        let mut sessions = Sessions::default();
        let busy = sessions.join(1, at(0));
        let idle = sessions.join(2, at(0));
        let other = sessions.join(3, at(0));
        assert!(sessions.keep_house(busy, false, at(0)), "better a busy one than none");
        assert!(sessions.keep_house(idle, true, at(0)));
        assert!(!sessions.keep_house(busy, false, at(1)));
        assert!(!sessions.keep_house(other, true, at(1)), "two idle ones do not fight over it");
        assert!(sessions.keep_house(busy, false, at(1500)), "the keeper has not beaten for too long");
    }

    #[test]
    fn load_counts_the_living() {
        let mut sessions = Sessions::default();
        let a = sessions.join(1, at(0));
        let b = sessions.join(2, at(0));
        assert!(sessions.beat(a, 1, Load { locks: 3, waiters: 1 }, at(5000)));
        assert!(sessions.beat(b, 2, Load { locks: 10, waiters: 10 }, at(1)));
        assert_eq!(sessions.load_of_others(b, at(5001)), Load { locks: 3, waiters: 1 });
        assert_eq!(sessions.load_of_others(a, at(5001)), Load::default());
    }
}
