//! What a proxy is told by its authority: whatever the answer is, no more is believed than was asked for.
//!
//! Input: a byte that says which answer it is, two of the status (the lower first), and the body. What was asked for is always the
//! same: [`ID`], [`OWNER`], [`LOCKS`].

use interlock::answer::Reject;
use interlock::api::told::{self, Asked, MAX_ANSWER, Question, Told, Unusable};
use interlock_core::{Cause, Duration, Fence, LockName, Mode, OwnerId};
use serde_json::{Value, json};

/// Under which id is asked.
pub const ID: &str = "0123456789abcdef0123456789abcdef";

/// For whom.
pub const OWNER: &str = "one";

/// Which locks, in which modes, and the least fence of each: as many as it takes to mix them up.
pub const LOCKS: [(&str, Mode, u64); 3] =
    [("a/1", Mode::Exclusive, 1000), ("a/2", Mode::Shared, 0), ("t/x/y", Mode::IntentExclusive, 7)];

/// With which TTL.
pub const TTL: Duration = Duration::from_secs(5);

/// The kinds of answers, in the order of an input's first byte.
pub const KINDS: [&str; 5] = ["granted", "problem", "renewed", "deleted", "held"];

/// No answer is worth more than so many characters for people.
const MOST_DETAIL: usize = 1000;

/// An input.
pub fn input(kind: &str, status: u16, body: &[u8]) -> Vec<u8> {
    let kind = KINDS.iter().position(|known| *known == kind).and_then(|at| u8::try_from(at).ok()).expect("a kind");
    [&[kind][..], &status.to_le_bytes(), body].concat()
}

/// See the module.
pub fn run(data: &[u8]) {
    let Some(([kind, low, high], body)) = data.split_first_chunk::<3>() else { return };
    let status = u32::from(u16::from_le_bytes([*low, *high]));
    let owner = OwnerId::new(OWNER).expect("an owner");
    let locks = LOCKS.map(|(name, mode, floor)| Asked { name: lock(name), mode, floor: Fence(floor) });
    let question = Question { id: ID, owner: &owner, locks: &locks, ttl: TTL };
    let usable = match KINDS[usize::from(*kind) % KINDS.len()] {
        "granted" => granted(body, &question),
        "problem" => problem(status, body, &question),
        "renewed" => renewed(body),
        "deleted" => told::deleted(body).err(),
        _ => held(body, &locks[0].name),
    };
    if body.len() > MAX_ANSWER {
        assert_eq!(usable, Some(Unusable::Malformed), "it is not even read");
    }
    if let Some(error) = usable {
        crate::check::one_line(&error.to_string(), 400);
        assert!(["malformed", "mismatch", "fence"].contains(&error.reason()));
    }
}

fn lock(name: &str) -> LockName {
    LockName::parse(name).expect("a lock name")
}

fn granted(body: &[u8], question: &Question<'_>) -> Option<Unusable> {
    let lease = match told::granted(body, question) {
        Ok(lease) => lease,
        Err(error) => return Some(error),
    };
    assert_eq!(lease.locks.len(), question.locks.len());
    for ((name, mode, fence), asked) in lease.locks.iter().zip(question.locks) {
        assert!(*name == asked.name && mode.covers(asked.mode), "{name} {mode}");
        assert!(*fence >= asked.floor && *fence > Fence(0) && *fence <= Fence::MAX, "{name} under {fence}");
    }
    assert!(!lease.ttl.is_zero() && lease.ttl <= question.ttl, "{:?}", lease.ttl);
    // It goes out again with every renewal, so it must fit.
    assert!(lease.receipt.as_ref().is_none_or(|receipt| receipt.len() < 8 * 1024));
    // What is believed is what there is to be believed: told once more it is the same.
    let locks: Vec<Value> = lease
        .locks
        .iter()
        .map(|(name, mode, fence)| json!({ "name": name.as_str(), "mode": mode.to_string(), "fence": fence.0 }))
        .collect();
    let text = |span: Duration| format!("{}us", span.as_micros());
    let again = json!({
        "id": ID, "owner": OWNER, "locks": locks, "ttl": text(lease.ttl), "waited": text(lease.waited),
        "receipt": lease.receipt,
    });
    assert_eq!(told::granted(again.to_string().as_bytes(), question), Ok(lease));
    None
}

fn problem(status: u32, body: &[u8], question: &Question<'_>) -> Option<Unusable> {
    let waited = Duration::from_millis(3);
    let told = match told::problem(status, body, question, waited) {
        Ok(told) => told,
        Err(error) => return Some(error),
    };
    match told {
        Told::Over => assert_eq!(status, 409),
        Told::Away { .. } => assert_eq!(status, 503),
        Told::Refused(reject) => {
            assert_eq!(u32::from(reject.http_status()), status);
            assert!(reject.problem_json().len() <= 256 * 1024, "it is passed on to the caller");
            match *reject {
                Reject::Core(refusal) => {
                    assert_eq!(refusal.owner, *question.owner);
                    let ours = |asked: &Asked| {
                        asked.name == refusal.lock || asked.name.ancestors().any(|above| above == refusal.lock)
                    };
                    assert!(question.locks.iter().any(ours), "{}", refusal.lock);
                    match refusal.cause {
                        Cause::Deadlock { cycle } => {
                            let ends = (cycle.first().map(|e| &e.owner), cycle.last().map(|e| &e.held_by));
                            assert_eq!(ends, (Some(question.owner), Some(question.owner)));
                            assert!(cycle.windows(2).all(|pair| pair[0].held_by == pair[1].owner));
                        }
                        Cause::Held { holders, .. } | Cause::WaitTimeout { holders, .. } => {
                            assert!(holders.len() <= 64, "{}", holders.len());
                        }
                        Cause::Backend { .. } | Cause::Grace { .. } | Cause::LeaseLost { .. } => {
                            panic!("no authority refuses for that")
                        }
                        Cause::OrderViolation { .. } | Cause::Limit { .. } => {}
                    }
                }
                Reject::Malformed { detail } => assert!(detail.chars().count() <= MOST_DETAIL),
                Reject::Forbidden { detail, owner, .. } => {
                    assert!(detail.chars().count() <= MOST_DETAIL);
                    assert_eq!(owner.as_ref(), Some(question.owner));
                }
                other => panic!("no authority refuses as {}", other.slug()),
            }
        }
    }
    None
}

fn renewed(body: &[u8]) -> Option<Unusable> {
    let known = |id: &str| (id == ID).then_some(TTL);
    match told::renewed(body, known) {
        Ok(answers) => {
            for (id, left) in answers {
                assert_eq!(id, ID, "nobody asked for it");
                assert!(left.is_none_or(|left| left <= TTL), "{left:?}");
            }
            None
        }
        Err(error) => Some(error),
    }
}

fn held(body: &[u8], lock: &LockName) -> Option<Unusable> {
    match told::held(body, lock) {
        Ok(held) => {
            let written: Value = serde_json::from_slice(body).expect("it was read");
            assert_eq!(written["name"], lock.as_str());
            assert_eq!(written["holders"].as_array().map(Vec::len), Some(held.holders.len()));
            None
        }
        Err(error) => Some(error),
    }
}
