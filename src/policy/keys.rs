//! Signatures of fences: what lets a filter two hops on believe a `lock-fence` that it did not set.
//!
//! A signature is the `sig` parameter of a `lock-fence` member. Its bytes, numbers big-endian:
//!
//! | bytes | what |
//! | --- | --- |
//! | 1 | version, 2 |
//! | 1 | length of the key's id, 1 to 64 |
//! | that many | the key's id |
//! | 8 | expiry, milliseconds since 1970 |
//! | 32 | HMAC-SHA256 under that key |
//!
//! What the HMAC is over: the words `interlock-fence`, the version, then name, fence (8 bytes), mode (its word), owner and
//! expiry (8 bytes), each with its length (4 bytes) in front, so that no two different grants have the same input.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use interlock_core::{Fence, LockName, Mode, OwnerId};
use sha2::Sha256;

use super::reader::{PolicyError, Reader};

const VERSION: u8 = 2;
const MAC: usize = 32;

/// The shortest secret, in bytes.
pub(super) const MIN_SECRET: usize = 16;

/// The keys of a policy. The first signs, all verify. There may be none.
#[derive(Clone, Default)]
pub struct Keys(Vec<Key>);

#[derive(Clone)]
struct Key {
    id: String,
    /// The HMAC with the secret in it, ready to be fed.
    mac: Hmac<Sha256>,
}

impl std::fmt::Debug for Keys {
    /// The ids only: secrets never reach a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|key| &key.id)).finish()
    }
}

/// What a signature vouches for: that this owner was granted this lock, in this mode, under this fence.
#[derive(Clone, Copy, Debug)]
pub struct Signed<'a> {
    /// The lock.
    pub name: &'a LockName,
    /// The fence of the grant.
    pub fence: Fence,
    /// The mode of the grant: a guard judges by it which fences are in each other's way.
    pub mode: Mode,
    /// Whom it was granted to.
    pub owner: &'a OwnerId,
}

/// Why a signature is worth nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadSignature {
    /// Its bytes are not laid out as a signature's.
    #[error("not a signature")]
    Malformed,
    /// Signed under a key that this policy does not have.
    #[error("signed with an unknown key")]
    UnknownKey,
    /// The HMAC is not that of these words under that key.
    #[error("the signature does not fit")]
    Mismatch,
    /// It was good once.
    #[error("the signature has expired")]
    Expired,
}

impl Keys {
    /// Whether there are none, so that nothing can be signed or verified.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Signs what a grant says until `expiry_unix_ms`, with the first key. Nothing where there is none.
    pub fn sign(&self, signed: &Signed<'_>, expiry_unix_ms: u64) -> Option<Vec<u8>> {
        let key = self.0.first()?;
        let length = u8::try_from(key.id.len()).ok()?;
        let mut signature = vec![VERSION, length];
        signature.extend_from_slice(key.id.as_bytes());
        signature.extend_from_slice(&expiry_unix_ms.to_be_bytes());
        signature.extend_from_slice(&key.feed(signed, expiry_unix_ms).finalize().into_bytes());
        Some(signature)
    }

    /// Checks a signature at this wall-clock moment, and gives back when it expires (milliseconds since 1970). The HMAC is
    /// compared in constant time.
    ///
    /// # Errors
    /// The signature says nothing about this grant, or no longer.
    pub fn verify(&self, signed: &Signed<'_>, signature: &[u8], now_unix_ms: u64) -> Result<u64, BadSignature> {
        let [VERSION, length, rest @ ..] = signature else {
            return Err(BadSignature::Malformed);
        };
        let (id, rest) = rest.split_at_checked(usize::from(*length)).ok_or(BadSignature::Malformed)?;
        let (expiry, mac) = rest.split_first_chunk::<8>().ok_or(BadSignature::Malformed)?;
        if id.is_empty() || mac.len() != MAC {
            return Err(BadSignature::Malformed);
        }
        let expiry = u64::from_be_bytes(*expiry);
        let key = self.0.iter().find(|key| key.id.as_bytes() == id).ok_or(BadSignature::UnknownKey)?;
        key.feed(signed, expiry).verify_slice(mac).map_err(|_| BadSignature::Mismatch)?;
        if expiry <= now_unix_ms { Err(BadSignature::Expired) } else { Ok(expiry) }
    }

    /// Seals bytes with the first key, for this purpose: the length of the key's id (1 byte), the id, HMAC-SHA256 over
    /// purpose and bytes, each with its length (4 bytes) in front, and the bytes. Nothing where there is no key.
    pub fn seal(&self, purpose: &[u8], payload: &[u8]) -> Option<Vec<u8>> {
        let key = self.0.first()?;
        let mut sealed = vec![u8::try_from(key.id.len()).ok()?];
        sealed.extend_from_slice(key.id.as_bytes());
        sealed.extend_from_slice(&key.over(purpose, payload).finalize().into_bytes());
        sealed.extend_from_slice(payload);
        Some(sealed)
    }

    /// What [`Keys::seal`] sealed for this purpose under any of the keys. The HMAC is compared in constant time.
    pub fn open<'a>(&self, purpose: &[u8], sealed: &'a [u8]) -> Option<&'a [u8]> {
        let (length, rest) = sealed.split_first()?;
        let (id, rest) = rest.split_at_checked(usize::from(*length))?;
        let (mac, payload) = rest.split_first_chunk::<MAC>()?;
        let key = self.0.iter().find(|key| key.id.as_bytes() == id)?;
        key.over(purpose, payload).verify_slice(mac).ok()?;
        Some(payload)
    }

    /// Reads `keys`. Secrets are looked up by `env` or written in base64; none is ever repeated in a complaint.
    pub(super) fn read(at: &Reader<'_>, env: &dyn Fn(&str) -> Option<String>) -> Result<Keys, PolicyError> {
        let mut keys = Keys::default();
        let mut places: BTreeMap<String, usize> = BTreeMap::new();
        for (index, item) in at.items()?.iter().enumerate() {
            let object = item.object(&["id", "secret"])?;
            let id = object.require("id")?;
            let word = id.text()?;
            let fits = (1..=64).contains(&word.len())
                && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
            if !fits {
                return Err(id.error("is no key id; use 1 to 64 of A-Z a-z 0-9 . _ -"));
            }
            if let Some(earlier) = places.insert(word.to_owned(), index) {
                return Err(id.error(format!("{word:?} is the id of keys[{earlier}] already; give each key its own")));
            }
            let (place, secret) = secret(&object.require("secret")?, env)?;
            if secret.len() < MIN_SECRET {
                let problem = format!(
                    "has {} bytes, a secret has at least {MIN_SECRET}; make one with `openssl rand -base64 32`",
                    secret.len()
                );
                return Err(place.error(problem));
            }
            let mac = Hmac::new_from_slice(&secret).map_err(|_| place.error("cannot be a key of HMAC-SHA256"))?;
            keys.0.push(Key { id: word.to_owned(), mac });
        }
        Ok(keys)
    }
}

pub(super) fn secret<'a>(
    at: &Reader<'a>,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<(Reader<'a>, Vec<u8>), PolicyError> {
    let object = at.object(&["env", "base64"])?;
    match (object.get("env"), object.get("base64")) {
        (Some(place), None) => {
            let name = place.text()?;
            let missing = || {
                place.error(format!(
                    "the environment has no variable {}; set it, and pass it to the VM (Envoy: vm_config.environment_variables)",
                    super::reader::quote(name)
                ))
            };
            let value = env(name).ok_or_else(missing)?;
            Ok((place, value.into_bytes()))
        }
        (None, Some(place)) => {
            let bytes = STANDARD.decode(place.text()?);
            let bytes = bytes.map_err(|_| place.error("is not base64; write standard base64 with its padding"))?;
            Ok((place, bytes))
        }
        (Some(_), Some(_)) => Err(at.error("has both env and base64; leave one of them out")),
        (None, None) => Err(at.error("names no secret; write { env: NAME } or { base64: … }")),
    }
}

impl Key {
    fn over(&self, purpose: &[u8], payload: &[u8]) -> Hmac<Sha256> {
        let mut mac = self.mac.clone();
        for field in [purpose, payload] {
            mac.update(&u32::try_from(field.len()).unwrap_or(u32::MAX).to_be_bytes());
            mac.update(field);
        }
        mac
    }

    fn feed(&self, signed: &Signed<'_>, expiry: u64) -> Hmac<Sha256> {
        let Signed { name, fence, mode, owner } = signed;
        let mut mac = self.mac.clone();
        mac.update(b"interlock-fence");
        mac.update(&[VERSION]);
        for field in [
            name.as_str().as_bytes(),
            &fence.0.to_be_bytes(),
            mode.as_str().as_bytes(),
            owner.as_str().as_bytes(),
            &expiry.to_be_bytes(),
        ] {
            // Names and owners have at most 256 bytes.
            mac.update(&u32::try_from(field.len()).unwrap_or(u32::MAX).to_be_bytes());
            mac.update(field);
        }
        mac
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(keys: &Value) -> Result<Keys, String> {
        let env = |name: &str| (name == "SECRET").then(|| "an environment's secret".to_owned());
        let policy = json!({ "keys": keys });
        let object = Reader::root(&policy).object(&["keys"]).unwrap();
        Keys::read(&object.get("keys").unwrap(), &env).map_err(|error| error.to_string())
    }

    fn old_and_new() -> (Keys, Keys) {
        let old = json!({ "id": "2026-10", "secret": { "base64": "MDEyMzQ1Njc4OWFiY2RlZg==" } });
        let new = json!({ "id": "2026-11", "secret": { "env": "SECRET" } });
        (read(&json!([old])).unwrap(), read(&json!([new, old])).unwrap())
    }

    fn grant() -> (LockName, OwnerId) {
        (LockName::parse("order/42").unwrap(), OwnerId::new("t-1").unwrap())
    }

    fn signed((name, owner): &(LockName, OwnerId)) -> Signed<'_> {
        Signed { name, fence: Fence(176), mode: Mode::Exclusive, owner }
    }

    #[test]
    fn the_first_signs_and_all_verify() {
        let (old, new) = old_and_new();
        let grant = grant();
        let grant = signed(&grant);
        let by_old = old.sign(&grant, 1000).unwrap();
        let by_new = new.sign(&grant, 1000).unwrap();
        assert_eq!(new.verify(&grant, &by_old, 999), Ok(1000));
        assert_eq!(new.verify(&grant, &by_new, 999), Ok(1000));
        assert_eq!(old.verify(&grant, &by_new, 999), Err(BadSignature::UnknownKey));
        assert_eq!(new.verify(&grant, &by_new, 1000), Err(BadSignature::Expired));
        assert_eq!(Keys::default().sign(&grant, 1), None);
    }

    #[test]
    fn a_signature_fits_one_grant_only() {
        let (_, keys) = old_and_new();
        let grant = grant();
        let grant = signed(&grant);
        let signature = keys.sign(&grant, 1000).unwrap();
        let other_name = LockName::parse("order/4").unwrap();
        let other_owner = OwnerId::new("t-2").unwrap();
        for other in [
            Signed { name: &other_name, ..grant },
            Signed { fence: Fence(177), ..grant },
            Signed { mode: Mode::Shared, ..grant },
            Signed { owner: &other_owner, ..grant },
        ] {
            assert_eq!(keys.verify(&other, &signature, 0), Err(BadSignature::Mismatch), "{other:?}");
        }
    }

    #[test]
    fn no_changed_or_shortened_signature_passes() {
        let (_, keys) = old_and_new();
        let grant = grant();
        let grant = signed(&grant);
        let signature = keys.sign(&grant, 1000).unwrap();
        for at in 0..signature.len() {
            let mut changed = signature.clone();
            changed[at] ^= 1;
            assert!(keys.verify(&grant, &changed, 0).is_err(), "byte {at}");
            assert!(keys.verify(&grant, &signature[..at], 0).is_err(), "{at} bytes");
        }
        let mut longer = signature;
        longer.push(0);
        assert_eq!(keys.verify(&grant, &longer, 0), Err(BadSignature::Malformed));
    }

    #[test]
    fn the_layout_is_the_documented_one() {
        let (old, _) = old_and_new();
        let grant = grant();
        let grant = signed(&grant);
        let signature = old.sign(&grant, 0x0102).unwrap();
        assert_eq!(&signature[..17], b"\x02\x072026-10\0\0\0\0\0\0\x01\x02");
        let mut mac = Hmac::<Sha256>::new_from_slice(b"0123456789abcdef").unwrap();
        mac.update(b"interlock-fence\x02\0\0\0\x08order/42\0\0\0\x08\0\0\0\0\0\0\0\xB0\0\0\0\x09exclusive");
        mac.update(b"\0\0\0\x03t-1\0\0\0\x08\0\0\0\0\0\0\x01\x02");
        assert_eq!(&signature[17..], mac.finalize().into_bytes().as_slice());
    }

    #[test]
    fn bad_keys_are_refused_without_their_secrets() {
        let good = json!({ "env": "SECRET" });
        for (keys, line) in [
            (json!({}), "keys: is an object; write a list"),
            (json!([{ "secret": good }]), "keys[0].id: is missing; it has no default"),
            (json!([{ "id": "a" }]), "keys[0].secret: is missing; it has no default"),
            (json!([{ "id": "a b", "secret": good }]), "keys[0].id: is no key id; use 1 to 64 of A-Z a-z 0-9 . _ -"),
            (
                json!([{ "id": "a", "secret": good }, { "id": "a", "secret": good }]),
                "keys[1].id: \"a\" is the id of keys[0] already; give each key its own",
            ),
            (
                json!([{ "id": "a", "secret": { "env": "NO" } }]),
                "keys[0].secret.env: the environment has no variable \"NO\"; set it, and pass it to the VM (Envoy: vm_config.environment_variables)",
            ),
            (
                json!([{ "id": "a", "secret": { "base64": "c2hvcnQ=" } }]),
                "keys[0].secret.base64: has 5 bytes, a secret has at least 16; make one with `openssl rand -base64 32`",
            ),
            (
                json!([{ "id": "a", "secret": { "base64": "!!" } }]),
                "keys[0].secret.base64: is not base64; write standard base64 with its padding",
            ),
            (
                json!([{ "id": "a", "secret": {} }]),
                "keys[0].secret: names no secret; write { env: NAME } or { base64: … }",
            ),
            (
                json!([{ "id": "a", "secret": { "env": "SECRET", "base64": "" } }]),
                "keys[0].secret: has both env and base64; leave one of them out",
            ),
        ] {
            assert_eq!(read(&keys).unwrap_err(), line);
        }
        assert_eq!(format!("{:?}", old_and_new().1), r#"["2026-11", "2026-10"]"#);
    }
}
