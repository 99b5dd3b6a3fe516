//! How keys are named and what is in them. People read them too: names are text, values are JSON.
//!
//! | key, behind the prefix | what | value |
//! | --- | --- | --- |
//! | `/q/LOCK!LEASE` | a place in the line of a lock | [`Place`] |
//! | `/u/LOCK` | written by whoever overtakes in that line | nothing |
//! | `/o/OWNER!LEASE` | the index by owner | [`Item`] |
//!
//! LEASE is 32 hexadecimal digits. No lock has a `!` in its name, and in an owner it is written `%21`, so that all keys of a
//! lock or an owner are one range, which those of no other are in.

use std::borrow::Cow;

use interlock_core::keyed::{Key, Listed, Stand};
use interlock_core::{Fence, LeaseId, LockName, Mode, OwnerId};
use serde::{Deserialize, Serialize};

use super::proto::KeyValue;

/// A range of keys: the first, and the one behind the last.
pub type Range = (Vec<u8>, Vec<u8>);

/// The names of the keys under a prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    prefix: String,
}

impl Names {
    /// Those under this prefix.
    pub fn new(prefix: String) -> Self {
        Names { prefix }
    }

    /// The place of a request in the line of a lock.
    pub fn place(&self, lock: &LockName, lease: LeaseId) -> Vec<u8> {
        format!("{}/q/{lock}!{:032x}", self.prefix, lease.0).into_bytes()
    }

    /// The line of a lock.
    pub fn line(&self, lock: &LockName) -> Range {
        range(format!("{}/q/{lock}", self.prefix))
    }

    /// What tells that somebody overtook in the line of a lock.
    pub fn overtaken(&self, lock: &LockName) -> Vec<u8> {
        format!("{}/u/{lock}", self.prefix).into_bytes()
    }

    /// What the index says of a request.
    pub fn item(&self, owner: &OwnerId, lease: LeaseId) -> Vec<u8> {
        format!("{}/o/{}!{:032x}", self.prefix, escaped(owner), lease.0).into_bytes()
    }

    /// All that the index says of an owner.
    pub fn items(&self, owner: &OwnerId) -> Range {
        range(format!("{}/o/{}", self.prefix, escaped(owner)))
    }
}

/// Everything that begins with this and a `!`.
fn range(stem: String) -> Range {
    // `"` is the next character after `!`.
    (format!("{stem}!").into_bytes(), format!("{stem}\"").into_bytes())
}

/// An owner as part of a key.
fn escaped(owner: &OwnerId) -> String {
    let mut text = String::with_capacity(owner.as_str().len());
    for byte in owner.as_str().bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b':' | b'@' => text.push(byte.into()),
            _ => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

/// The lease that a key is of.
pub fn lease_of(key: &[u8]) -> Option<LeaseId> {
    let text = std::str::from_utf8(key).ok()?;
    let (_, lease) = text.rsplit_once('!')?;
    if lease.len() != 32 {
        return None;
    }
    u128::from_str_radix(lease, 16).ok().map(LeaseId)
}

/// The value of a place.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Place<'a> {
    #[serde(borrow)]
    owner: Cow<'a, str>,
    #[serde(borrow)]
    mode: Cow<'a, str>,
    #[serde(borrow)]
    asked_by: Cow<'a, str>,
    /// Microseconds since 1970.
    since: u64,
    /// `waits`, `upgrades` or `holds`.
    #[serde(borrow)]
    stand: Cow<'a, str>,
    /// The fence of the grant that is re-entered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    fence: Option<u64>,
    /// Whether nobody re-enters it, nor does it re-enter.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    apart: bool,
}

/// What a request writes into its place.
pub fn place(key: &Key) -> Vec<u8> {
    let (stand, fence) = match key.stand {
        Stand::Waits => ("waits", None),
        Stand::Upgrades => ("upgrades", None),
        Stand::Holds(fence) => ("holds", fence.map(|fence| fence.0)),
    };
    json(&Place {
        owner: key.owner.as_str().into(),
        mode: key.mode.as_str().into(),
        asked_by: key.asked_by.as_str().into(),
        since: key.since,
        stand: stand.into(),
        fence,
        apart: !key.reentrant,
    })
}

/// A key under the prefix that is none of Interlock's, or of a version that this one does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a key under the prefix cannot be read: it is another program's, or a newer version's")]
pub struct Unreadable;

/// Reads a place.
///
/// # Errors
/// It is none. Nobody can tell then who holds the lock.
pub fn read_place(kv: &KeyValue) -> Result<Key, Unreadable> {
    let lease = lease_of(&kv.key).ok_or(Unreadable)?;
    let place: Place<'_> = serde_json::from_slice(&kv.value).map_err(|_| Unreadable)?;
    let stand = match (&*place.stand, place.fence) {
        ("waits", None) => Stand::Waits,
        ("upgrades", None) => Stand::Upgrades,
        ("holds", fence) => Stand::Holds(fence.map(Fence)),
        _ => return Err(Unreadable),
    };
    Ok(Key {
        lease,
        owner: OwnerId::new(&place.owner).ok_or(Unreadable)?,
        mode: place.mode.parse::<Mode>().map_err(|_| Unreadable)?,
        reentrant: !place.apart,
        asked_by: place.asked_by.into_owned(),
        since: place.since,
        stand,
        created: u64::try_from(kv.create_revision).map_err(|_| Unreadable)?,
        written: u64::try_from(kv.mod_revision).map_err(|_| Unreadable)?,
    })
}

/// The value of an item of the index.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Item<'a> {
    #[serde(borrow)]
    locks: Vec<Cow<'a, str>>,
    held: usize,
    waits: bool,
}

/// What a request writes into the index.
pub fn item<'a>(locks: impl Iterator<Item = &'a LockName>, held: usize, waits: bool) -> Vec<u8> {
    json(&Item { locks: locks.map(|lock| lock.as_str().into()).collect(), held, waits })
}

/// Reads an item of the index.
///
/// # Errors
/// It is none.
pub fn read_item(kv: &KeyValue) -> Result<Listed, Unreadable> {
    let lease = lease_of(&kv.key).ok_or(Unreadable)?;
    let item: Item<'_> = serde_json::from_slice(&kv.value).map_err(|_| Unreadable)?;
    let locks = item.locks.iter().map(|lock| LockName::parse(lock).map_err(|_| Unreadable));
    Ok(Listed { lease, locks: locks.collect::<Result<_, _>>()?, held: item.held, waits: item.waits })
}

/// Of what has nothing but text and numbers in it, which always succeeds.
fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_hold_what_is_theirs_and_nothing_else() {
        let names = Names::new("/locks".into());
        let lock = |name: &str| LockName::parse(name).unwrap();
        let (first, end) = names.line(&lock("a/1"));
        for (name, inside) in [("a/1", true), ("a", false), ("a/1/b", false), ("a/10", false), ("a/1-", false)] {
            let key = names.place(&lock(name), LeaseId(u128::MAX));
            assert_eq!(first <= key && key < end, inside, "{name}");
            assert_eq!(lease_of(&key), Some(LeaseId(u128::MAX)));
        }
        let owner = |text: &str| OwnerId::new(text).unwrap();
        let (first, end) = names.items(&owner("x!y%/\u{e9}\""));
        assert_eq!(first, b"/locks/o/x%21y%25%2F%C3%A9%22!");
        let key = names.item(&owner("x!y%/\u{e9}\""), LeaseId(1));
        assert!(first <= key && key < end);
        assert!(!(first <= names.item(&owner("x"), LeaseId(1)) && names.item(&owner("x"), LeaseId(1)) < end));
    }

    #[test]
    fn values_round_trip_and_what_is_none_is_refused() {
        let name = Names::new(String::new()).place(&LockName::parse("a/1").unwrap(), LeaseId(7));
        for stand in [Stand::Waits, Stand::Upgrades, Stand::Holds(None), Stand::Holds(Some(Fence(5)))] {
            for reentrant in [true, false] {
                let key = Key {
                    lease: LeaseId(7),
                    owner: OwnerId::new("o \"quoted\" \u{e9}").unwrap(),
                    mode: Mode::SharedIntentExclusive,
                    reentrant,
                    asked_by: "a\nrule".into(),
                    since: 1_700_000_000_000_000,
                    stand,
                    created: 3,
                    written: 4,
                };
                let value = place(&key);
                let kv = KeyValue { key: name.clone(), value, create_revision: 3, mod_revision: 4, lease: 9 };
                assert_eq!(read_place(&kv), Ok(key));
                assert_eq!(read_place(&KeyValue { key: b"/q/a/1".to_vec(), ..kv.clone() }), Err(Unreadable));
                assert_eq!(read_place(&KeyValue { value: b"{}".to_vec(), ..kv }), Err(Unreadable));
            }
        }
        let locks = [LockName::parse("a/1").unwrap(), LockName::parse("b").unwrap()];
        let value = item(locks.iter(), 1, true);
        assert_eq!(value, br#"{"locks":["a/1","b"],"held":1,"waits":true}"#);
        let kv = KeyValue { key: name, value, ..KeyValue::default() };
        let listed = Listed { lease: LeaseId(7), locks: locks.to_vec(), held: 1, waits: true };
        assert_eq!(read_item(&kv), Ok(listed));
        assert_eq!(
            read_item(&KeyValue { value: br#"{"locks":["!"],"held":1,"waits":true}"#.to_vec(), ..kv }),
            Err(Unreadable)
        );
    }
}
