//! The headers that Interlock sets: `lock-status`, `lock-fence`, `server-timing`; and `lock-fence` as it comes in.

use std::time::Duration;

use interlock_core::{Fence, LockName, Mode};
use sfv::{
    BareItemFromInput, Decimal, Integer, KeyRef, ListSerializer, RefBareItem, StringRef, TokenRef, key_ref, token_ref,
};

use crate::annotation::list;

const OUTCOME: &KeyRef = key_ref("outcome");
const REASON: &KeyRef = key_ref("reason");
const LOCK: &KeyRef = key_ref("lock");
const WAIT: &KeyRef = key_ref("wait");
const FENCE: &KeyRef = key_ref("fence");
const MODE: &KeyRef = key_ref("mode");
const SIG: &KeyRef = key_ref("sig");

/// What a filter did about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome<'a> {
    /// It has its locks.
    Acquired {
        /// How long it waited for them.
        wait: Duration,
    },
    /// It had its locks, and lost one while it was upstream; the rule let it go on.
    Lost {
        /// The lock that it lost.
        lock: &'a LockName,
    },
    /// The backend failed, and the rule let it go on without locks.
    Unlocked,
    /// It was refused.
    Refused {
        /// The slug of the cause.
        reason: &'a str,
        /// The lock that it failed on.
        lock: Option<&'a LockName>,
    },
    /// It was let through; enforced, it would have got its locks or, with a reason, would have been refused.
    Audit {
        /// The slug of the cause.
        reason: Option<&'a str>,
        /// The lock that it would have failed on.
        lock: Option<&'a LockName>,
        /// How long it would have waited.
        wait: Option<Duration>,
    },
}

/// One member of `lock-status`, to be appended to what earlier hops wrote.
pub fn lock_status(instance: &str, outcome: &Outcome<'_>) -> String {
    let (word, reason, lock, wait) = match *outcome {
        Outcome::Acquired { wait } => ("acquired", None, None, Some(wait)),
        Outcome::Refused { reason, lock } => ("refused", Some(reason), lock, None),
        Outcome::Lost { lock } => ("lost", Some("lease-lost"), Some(lock), None),
        Outcome::Unlocked => ("unlocked", Some("backend-unavailable"), None, None),
        Outcome::Audit { reason, lock, wait } => ("audit", reason, lock, wait),
    };
    let mut list = ListSerializer::new();
    let mut member = list.bare_item(word_item(instance)).parameter(OUTCOME, word_item(word));
    if let Some(reason) = reason {
        member = member.parameter(REASON, word_item(reason));
    }
    if let Some(lock) = lock {
        member = member.parameter(LOCK, text_item(lock.as_str()));
    }
    if let Some(wait) = wait {
        member = member.parameter(WAIT, seconds_item(wait));
    }
    let _ = member.finish();
    list.finish().unwrap_or_default()
}

/// One member of `lock-fence`: a lock that is held for this request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FenceMember {
    /// The lock.
    pub name: LockName,
    /// Its fence.
    pub fence: Fence,
    /// The mode in which it is held.
    pub mode: Mode,
    /// The signature over name, fence, mode, owner and expiry, where the policy has keys.
    pub sig: Option<Vec<u8>>,
}

/// The value of `lock-fence`. Nothing without members: an empty List is not sent (RFC 9651, section 4.1).
pub fn lock_fence(members: &[FenceMember]) -> Option<String> {
    let mut list = ListSerializer::new();
    for FenceMember { name, fence, mode, sig } in members {
        // No fence outgrows an Integer before the year 2286.
        let fence = Integer::try_from(fence.0).unwrap_or(Integer::MAX);
        let mut member = list.bare_item(word_item(name.as_str()));
        member = member.parameter(FENCE, fence).parameter(MODE, word_item(mode.as_str()));
        if let Some(sig) = sig {
            member = member.parameter(SIG, sig.as_slice());
        }
        let _ = member.finish();
    }
    list.finish()
}

/// Reads inbound `lock-fence` fields. Nothing where they are malformed, in any of their members: half a header that somebody
/// broke is not to be trusted. An absent header has no members.
pub fn parse_lock_fence<'a>(fields: impl IntoIterator<Item = &'a [u8]>) -> Option<Vec<FenceMember>> {
    let text = list::join(fields);
    let members = match list::parse(&text, &["fence", "mode", "sig"]) {
        Ok(members) => members,
        Err(list::ListError::Empty) => return Some(Vec::new()),
        Err(_) => return None,
    };
    let read = |member: &list::Member<'_>| {
        let fence = match member.parameter("fence")? {
            BareItemFromInput::Integer(fence) => u64::try_from(i64::from(*fence)).ok()?,
            _ => return None,
        };
        let sig = match member.parameter("sig") {
            None => None,
            Some(BareItemFromInput::ByteSequence(sig)) => Some(sig.clone()),
            Some(_) => return None,
        };
        let mode = list::text(member.parameter("mode")?)?.parse().ok()?;
        Some(FenceMember { name: LockName::parse(&member.value).ok()?, fence: Fence(fence), mode, sig })
    };
    members.iter().map(read).collect()
}

/// The value of `server-timing` for a wait: milliseconds, to the microsecond.
pub fn server_timing(wait: Duration) -> String {
    format!("lock;dur={}", thousandths(wait.as_micros()))
}

/// Seconds to the millisecond, as people read them.
pub(super) fn decimal_seconds(duration: Duration) -> String {
    thousandths(duration.as_millis())
}

/// A number of thousandths as a decimal without needless zeros.
fn thousandths(number: u128) -> String {
    let text = format!("{}.{:03}", number / 1000, number % 1000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A Token where the text can be one, else a String.
fn word_item(text: &str) -> RefBareItem<'_> {
    TokenRef::from_str(text).map_or_else(|_| text_item(text), RefBareItem::from)
}

/// A String. Instances, slugs and lock names are printable ASCII, so that it can always be one.
fn text_item(text: &str) -> RefBareItem<'_> {
    StringRef::from_str(text).map_or(RefBareItem::Token(token_ref("unprintable")), RefBareItem::from)
}

fn seconds_item(duration: Duration) -> RefBareItem<'static> {
    let millis = Integer::try_from(duration.as_millis()).unwrap_or(Integer::MAX);
    RefBareItem::Decimal(Decimal::from_integer_scaled_1000(millis))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> LockName {
        LockName::parse(text).unwrap()
    }

    fn member(lock: &str, fence: u64, mode: Mode, sig: Option<&[u8]>) -> FenceMember {
        FenceMember { name: name(lock), fence: Fence(fence), mode, sig: sig.map(<[u8]>::to_vec) }
    }

    #[test]
    fn the_status_lines_of_the_contract() {
        let wait = Duration::from_micros(132_900);
        assert_eq!(lock_status("orders", &Outcome::Acquired { wait }), "orders;outcome=acquired;wait=0.132");
        let lock = name("stock/7");
        assert_eq!(
            lock_status("orders", &Outcome::Refused { reason: "deadlock", lock: Some(&lock) }),
            "orders;outcome=refused;reason=deadlock;lock=\"stock/7\""
        );
        let audit = Outcome::Audit { reason: Some("wait-timeout"), lock: Some(&lock), wait: None };
        assert_eq!(lock_status("orders", &audit), "orders;outcome=audit;reason=wait-timeout;lock=\"stock/7\"");
        let audit = Outcome::Audit { reason: None, lock: None, wait: Some(Duration::ZERO) };
        assert_eq!(lock_status("orders", &audit), "orders;outcome=audit;wait=0.0");
        let refused = Outcome::Refused { reason: "malformed-annotation", lock: None };
        assert_eq!(lock_status("o.r-d_1", &refused), "o.r-d_1;outcome=refused;reason=malformed-annotation");
        let for_ever = Outcome::Acquired { wait: Duration::MAX };
        assert_eq!(lock_status("a", &for_ever), "a;outcome=acquired;wait=999999999999.999");
    }

    #[test]
    fn the_fences_of_the_contract() {
        let members = [
            member("order/42", 176_000_000_012_345, Mode::Exclusive, None),
            member("stock/7", 176_000_000_012_346, Mode::Shared, None),
        ];
        let header = "order/42;fence=176000000012345;mode=exclusive, stock/7;fence=176000000012346;mode=shared";
        assert_eq!(lock_fence(&members).as_deref(), Some(header));
        assert_eq!(parse_lock_fence([header.as_bytes()]), Some(members.to_vec()));
        assert_eq!(lock_fence(&[]), None);
        assert_eq!(parse_lock_fence([]), Some(Vec::new()));
    }

    #[test]
    fn names_that_are_no_tokens_are_strings() {
        for lock in ["a@b/c", "1/2", ".x", "a/%2F"] {
            let members = [member(lock, 1, Mode::SharedIntentExclusive, Some(&[0, 255, 7]))];
            let header = lock_fence(&members).unwrap();
            assert_eq!(header.starts_with('"'), lock != "a/%2F", "{header}");
            assert!(header.ends_with(";sig=:AP8H:"), "{header}");
            assert_eq!(parse_lock_fence([header.as_bytes()]), Some(members.to_vec()));
        }
        assert!(lock_fence(&[member("a", u64::MAX, Mode::Shared, None)]).unwrap().contains("fence=999999999999999;"));
    }

    #[test]
    fn a_malformed_fence_drops_all() {
        for bad in [
            "a;mode=shared",
            "a;fence=1",
            "a;fence=-1;mode=shared",
            "a;fence=1.5;mode=shared",
            "a;fence=x;mode=shared",
            "a;fence=1;mode=x",
            "a;fence=1;mode=1",
            "a;fence=1;mode=shared;sig=x",
            "a//b;fence=1;mode=shared",
            "(a);fence=1;mode=shared",
            "1",
            "\u{fc}",
            "a;fence=1;mode=shared,",
        ] {
            assert_eq!(parse_lock_fence([&b"good;fence=1;mode=shared"[..], bad.as_bytes()]), None, "{bad}");
        }
        assert_eq!(parse_lock_fence([&b"a;fence=1;mode=shared;new=1"[..]]).map(|members| members.len()), Some(1));
    }

    #[test]
    fn timings_are_milliseconds() {
        for (micros, value) in [
            (132_000, "lock;dur=132"),
            (0, "lock;dur=0"),
            (400, "lock;dur=0.4"),
            (1_500_250, "lock;dur=1500.25"),
            (100_000, "lock;dur=100"),
        ] {
            assert_eq!(server_timing(Duration::from_micros(micros)), value);
        }
    }
}
