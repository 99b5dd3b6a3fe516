//! The `lock-fence` header as it comes in: which fences of earlier hops are believed, and what is passed on.
//!
//! Input: [`Fields`] of a request with `lock-fence`, and the headers that can name an owner.
//! `%flip` is two bytes: which byte of a good signature to change, and how.

use std::sync::LazyLock;

use hmac::{Hmac, KeyInit, Mac};
use interlock::annotation::list::{self, MAX_MEMBERS};
use interlock::answer::headers::{FenceMember, lock_fence, parse_lock_fence};
use interlock::filter::fences;
use interlock::filter::intake::Facts;
use interlock::policy::{Policy, Signed};
use interlock_core::{Fence, Mode, OwnerId};
use sfv::{List, Parser};
use sha2::Sha256;

use crate::fields::Fields;
use crate::host::{Bench, UNIX_MS};

/// The keys of the policy under which inputs are verified: the first signs.
pub const KEYS: [(&str, &str); 2] = [("new", "0123456789abcdef"), ("old", "fedcba9876543210")];

/// When the signatures made here expire, in milliseconds since 1970.
pub const EXPIRY: u64 = UNIX_MS + 60_000;

static POLICY: LazyLock<Policy> = LazyLock::new(|| {
    let keys = KEYS.map(|(id, _)| serde_json::json!({ "id": id, "secret": { "env": id } }));
    let from = ["traceparent", "x-request-id", "lock-owner", "baggage"];
    let policy = serde_json::json!({ "keys": keys, "owner": { "from": from } });
    let env = |name: &str| KEYS.iter().find(|(id, _)| *id == name).map(|(_, secret)| (*secret).to_owned());
    Policy::parse(policy.to_string().as_bytes(), &env).expect("a policy")
});

/// See the module.
pub fn run(data: &[u8]) {
    let fields = Fields::parse(data);
    let inbound = fields.all("lock-fence");
    let host = Bench::with_request(Fields::parse(data));
    let facts = Facts::of(&host, &POLICY);
    let owner = facts.owner().cloned();
    let parsed = parse_lock_fence(inbound.iter().copied());
    let joined = list::join(inbound.iter().copied());
    assert_eq!(parsed, parse_lock_fence([joined.as_slice()]), "several fields are one List");

    let inbound = fences::inbound(&host, &POLICY, &facts);
    assert_eq!(inbound.malformed, parsed.is_none());
    let verified = inbound.verified;
    let members = parsed.unwrap_or_default();
    assert!(members.len() <= MAX_MEMBERS);
    let is_believed = |member: &&FenceMember| owner.as_ref().is_some_and(|owner| is_good(member, owner));
    let (believed, others): (Vec<_>, Vec<_>) = members.iter().partition(is_believed);
    assert_eq!(verified, believed.into_iter().cloned().collect::<Vec<_>>());
    assert_eq!(inbound.unverified, others.into_iter().map(|member| member.name.clone()).collect::<Vec<_>>());
    if members.is_empty() {
        return;
    }
    assert_eq!(Parser::new(&joined).parse::<List>().expect("what is read is a List").len(), members.len());
    round_trip(&members);
    passed_on(&host, &verified, &members);
    if let Some(owner) = owner {
        signed(&members, &owner, fields.first("%flip").unwrap_or_default());
    }
}

/// What is printed is read back as it was.
fn round_trip(members: &[FenceMember]) {
    let printed = lock_fence(members).expect("there are members");
    assert!(printed.bytes().all(|byte| (0x20..0x7F).contains(&byte)), "{printed:?}");
    assert_eq!(parse_lock_fence([printed.as_bytes()]).as_deref(), Some(members), "{printed}");
}

/// Whether a signature is good, from the documented layout: version, key id, expiry, HMAC.
fn is_good(member: &FenceMember, owner: &OwnerId) -> bool {
    let Some([2, length, rest @ ..]) = member.sig.as_deref() else { return false };
    let Some((id, rest)) = rest.split_at_checked(usize::from(*length)) else { return false };
    let Some((expiry, mac)) = rest.split_first_chunk::<8>() else { return false };
    let key = KEYS.iter().find(|(known, _)| known.as_bytes() == id);
    let expiry = u64::from_be_bytes(*expiry);
    key.is_some_and(|key| mac == hmac(key.1, member, owner, expiry)) && expiry > UNIX_MS
}

fn hmac(secret: &str, member: &FenceMember, owner: &OwnerId, expiry: u64) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("any length will do");
    mac.update(b"interlock-fence\x02");
    let (name, fence) = (member.name.as_str().as_bytes(), member.fence.0.to_be_bytes());
    let (mode, owner) = (member.mode.as_str().as_bytes(), owner.as_str().as_bytes());
    for part in [name, &fence, mode, owner, &expiry.to_be_bytes()] {
        mac.update(&u32::try_from(part.len()).expect("short").to_be_bytes());
        mac.update(part);
    }
    mac.finalize().into_bytes().to_vec()
}

/// A good signature of a grant, by the key of that number.
pub fn sign(member: &FenceMember, owner: &OwnerId, key: usize, expiry: u64) -> Vec<u8> {
    let (id, secret) = KEYS[key];
    let head = [&[2, u8::try_from(id.len()).expect("short")], id.as_bytes(), &expiry.to_be_bytes()].concat();
    [head, hmac(secret, member, owner, expiry)].concat()
}

fn says<'a>(member: &'a FenceMember, owner: &'a OwnerId) -> Signed<'a> {
    Signed { name: &member.name, fence: member.fence, mode: member.mode, owner }
}

/// The same members with signatures that are good, then with ones that are almost.
fn signed(members: &[FenceMember], owner: &OwnerId, flip: &[u8]) {
    let verify = |member: &FenceMember, sig: &[u8], now| POLICY.keys.verify(&says(member, owner), sig, now);
    for member in members {
        let shipped = POLICY.keys.sign(&says(member, owner), EXPIRY).expect("there are keys");
        assert_eq!(shipped, sign(member, owner, 0, EXPIRY));
        for key in 0..KEYS.len() {
            let good = sign(member, owner, key, EXPIRY);
            assert_eq!(verify(member, &good, UNIX_MS), Ok(EXPIRY));
            assert!(verify(member, &good, EXPIRY).is_err(), "it has expired");
            if let [at, change, ..] = flip
                && *change != 0
            {
                let mut changed = good.clone();
                let at = usize::from(*at) % good.len();
                changed[at] ^= change;
                assert!(verify(member, &changed, UNIX_MS).is_err(), "byte {at} was changed");
                assert!(verify(member, &good[..at], UNIX_MS).is_err(), "cut to {at} bytes");
            }
            let other = FenceMember { fence: Fence(member.fence.0 ^ 1), ..member.clone() };
            assert!(verify(&other, &good, UNIX_MS).is_err(), "it is of another fence");
            let mode = if member.mode == Mode::Shared { Mode::Exclusive } else { Mode::Shared };
            let other = FenceMember { mode, ..member.clone() };
            assert!(verify(&other, &good, UNIX_MS).is_err(), "it is of another mode");
        }
    }
}

/// The upstream gets the filter's own fences, then the verified ones of other locks.
fn passed_on(host: &Bench<'_>, verified: &[FenceMember], members: &[FenceMember]) {
    let own: Vec<FenceMember> =
        members.iter().take(1).map(|member| FenceMember { mode: Mode::Shared, sig: None, ..member.clone() }).collect();
    fences::forward(host, verified, &own);
    let header = host.set("lock-fence").expect("an own fence is always told");
    let sent = parse_lock_fence([header.as_slice()]).expect("what is set can be read");
    assert_eq!(sent.first(), own.first());
    let carried: Vec<_> = verified.iter().filter(|member| member.name != own[0].name).cloned().collect();
    assert_eq!(sent[1..], carried);
}
