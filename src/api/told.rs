//! What an authority answers, as a proxy that asks it reads it.
//!
//! Pure, and believes nothing: an answer that is too long, no JSON, or about something else than was asked is [`Unusable`],
//! and no part of it is used. Unknown fields are ignored, so that an authority may be newer than its proxies.
//!
//! Read field by field from a [`Value`]: derived readers of all these shapes would make the plugin larger by a tenth.

use interlock_core::{Cause, Duration, Edge, Fence, Holder, Limit, LockName, Mode, OwnerId, Refusal, bug};
use serde_json::{Map, Value};

use crate::answer::Reject;
use crate::policy::{LONGEST, parse_duration};

/// The longest answer that is read, in bytes.
pub const MAX_ANSWER: usize = 64 * 1024;

/// The longest text for people that is passed on, in characters.
const MOST_DETAIL: usize = 1000;

/// The most holders that are told of.
const MOST_HOLDERS: usize = 64;

/// What a receipt may have beside the names that are in it, and how much longer it may be than they are.
const RECEIPT_ROOM: usize = 2048;

/// Why an answer is of no use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// It is longer than [`MAX_ANSWER`], cut, or not of the form that it has to have.
    #[error("the lock authority's answer cannot be read")]
    Malformed,
    /// It is about something else than was asked.
    #[error("the lock authority answered something else than it was asked ({0})")]
    Mismatch(&'static str),
    /// A lock was granted under a fence below one that was granted before it was asked for.
    #[error("the lock authority granted {0} under a fence that has fallen")]
    Fence(LockName),
}

impl Unusable {
    /// The failure in metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Unusable::Malformed => "malformed",
            Unusable::Mismatch(_) => "mismatch",
            Unusable::Fence(_) => "fence",
        }
    }
}

/// One lock that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Which.
    pub name: LockName,
    /// In which mode.
    pub mode: Mode,
    /// The least fence that it can be granted under.
    pub floor: Fence,
}

/// What was asked, for an answer to be held against.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// Under which id.
    pub id: &'a str,
    /// For whom.
    pub owner: &'a OwnerId,
    /// Which locks.
    pub locks: &'a [Asked],
    /// With which TTL.
    pub ttl: Duration,
}

/// A lease that was granted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Granted {
    /// What it holds, as it was asked for.
    pub locks: Vec<(LockName, Mode, Fence)>,
    /// How long it lives from its grant on if it is not renewed.
    pub ttl: Duration,
    /// How long after the request came in it was granted.
    pub waited: Duration,
    /// What brings it back should the authority lose its memory.
    pub receipt: Option<String>,
}

/// An answer that grants nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// The request is refused, for good.
    Refused(Box<Reject>),
    /// What was asked for under this id is over, or the id is another's.
    Over,
    /// The authority cannot grant now.
    Away {
        /// For how long it wants to be left alone.
        retry_after: Option<Duration>,
        /// Whether that is because it has just started.
        grace: bool,
    },
}

/// Who holds a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Its holders, each with its fence.
    pub holders: Vec<(OwnerId, Fence)>,
    /// For how long yet there may be holders that the authority does not know, because it has lost its memory.
    pub grace: Option<Duration>,
}

/// Reads the body of an answer that tells of one lock.
///
/// # Errors
/// That it is of no use.
pub fn held(body: &[u8], lock: &LockName) -> Result<Held, Unusable> {
    let view = Object::read(body)?;
    if view.text("name")? != lock.as_str() {
        return Err(Unusable::Mismatch("another lock"));
    }
    let grace = view.optional_text("grace")?.map(duration).transpose()?;
    let holder = |holder: Object<'_>| Ok((owner(holder.text("owner")?)?, Fence(holder.number("fence")?)));
    let holders = view.objects("holders")?.into_iter().map(holder).collect::<Result<_, _>>()?;
    Ok(Held { holders, grace })
}

/// Reads the body of an answer that grants a lease.
///
/// # Errors
/// That it is of no use.
pub fn granted(body: &[u8], question: &Question<'_>) -> Result<Granted, Unusable> {
    let lease = Object::read(body)?;
    let (owner, locks) = (lease.text("owner")?, lease.objects("locks")?);
    if lease.text("id")? != question.id {
        return Err(Unusable::Mismatch("another lease"));
    }
    if owner != question.owner.as_str() && !bug!(GrantOfAnotherBelieved) {
        return Err(Unusable::Mismatch("another owner"));
    }
    if locks.len() != question.locks.len() {
        return Err(Unusable::Mismatch("other locks"));
    }
    let (ttl, waited) = (duration(lease.text("ttl")?)?, duration(lease.text("waited")?)?);
    if ttl.is_zero() || ttl > question.ttl {
        return Err(Unusable::Mismatch("another ttl"));
    }
    let mut held = Vec::with_capacity(locks.len());
    for Asked { name, mode, floor } in question.locks {
        let mut same = locks.iter().filter(|lock| lock.text("name") == Ok(name.as_str()));
        let (Some(lock), None) = (same.next(), same.next()) else {
            return Err(Unusable::Mismatch("other locks"));
        };
        let granted = mode_of(lock.text("mode")?)?;
        if !granted.covers(*mode) && !bug!(WeakerModeBelieved) {
            return Err(Unusable::Mismatch("another mode"));
        }
        let fence = Fence(lock.number("fence")?);
        if fence == Fence(0) || fence > Fence::MAX {
            return Err(Unusable::Mismatch("no fence"));
        }
        if fence < *floor && !bug!(FallenFenceBelieved) {
            return Err(Unusable::Fence(name.clone()));
        }
        held.push((name.clone(), granted, fence));
    }
    let names: usize = question.locks.iter().map(|lock| lock.name.as_str().len() + 64).sum();
    let receipt = lease.optional_text("receipt")?.map(str::to_owned);
    if receipt.as_ref().is_some_and(|receipt| receipt.len() > RECEIPT_ROOM + 8 * (owner.len() + names)) {
        return Err(Unusable::Mismatch("no receipt"));
    }
    Ok(Granted { locks: held, ttl, waited, receipt })
}

/// Reads the body of an answer that grants nothing. `waited`: how long its caller has waited.
///
/// # Errors
/// That it is of no use: none of Interlock's own problems, or not in the status that it has.
pub fn problem(status: u32, body: &[u8], question: &Question<'_>, waited: Duration) -> Result<Told, Unusable> {
    let problem = Object::read(body)?;
    let slug = problem.text("type")?.strip_prefix("urn:interlock:problem:").ok_or(Unusable::Malformed)?;
    let told = match slug {
        "lease-lost" | "lease-id-taken" => Told::Over,
        "backend-unavailable" => Told::Away { retry_after: retry_after(&problem)?, grace: problem.is_true("grace") },
        "malformed-annotation" => Told::Refused(Box::new(Reject::Malformed { detail: detail(&problem)? })),
        "forbidden" => Told::Refused(Box::new(Reject::Forbidden {
            detail: detail(&problem)?,
            lock: problem.optional_text("lock")?.map(|lock| asked(lock, question)).transpose()?,
            owner: Some(question.owner.clone()),
        })),
        _ => Told::Refused(Box::new(Reject::Core(refusal(&problem, slug, question, waited)?))),
    };
    let expected = match &told {
        Told::Refused(reject) => u32::from(reject.http_status()),
        Told::Over => 409,
        Told::Away { .. } => 503,
    };
    if status == expected || bug!(AnotherStatusBelieved) { Ok(told) } else { Err(Unusable::Mismatch("another status")) }
}

fn detail(problem: &Object<'_>) -> Result<String, Unusable> {
    Ok(problem.optional_text("detail")?.unwrap_or_default().chars().take(MOST_DETAIL).collect())
}

fn retry_after(problem: &Object<'_>) -> Result<Option<Duration>, Unusable> {
    Ok(problem.optional_number("retry_after_ms")?.map(|millis| Duration::from_millis(millis).min(LONGEST)))
}

fn refusal(problem: &Object<'_>, slug: &str, question: &Question<'_>, waited: Duration) -> Result<Refusal, Unusable> {
    if problem.text("owner")? != question.owner.as_str() {
        return Err(Unusable::Mismatch("another owner"));
    }
    let lock = asked(problem.text("lock")?, question)?;
    let mode = mode_of(problem.text("mode")?)?;
    let retry_after = retry_after(problem)?.unwrap_or_default();
    let cause = match slug {
        "deadlock" => Cause::Deadlock { cycle: cycle(problem, question)? },
        "order-violation" => Cause::OrderViolation { held: lock_name(problem.text("held")?)? },
        "lock-held" => Cause::Held { holders: holders(problem)?, retry_after },
        "wait-timeout" => Cause::WaitTimeout { holders: holders(problem)?, waited, retry_after },
        "too-many-waiters" | "too-many-locks" => {
            let met = problem.object("limit")?;
            let name = met.text("name")?;
            let limit = Limit::ALL.into_iter().find(|limit| limit.as_str() == name).ok_or(Unusable::Malformed)?;
            Cause::Limit { limit, value: met.number("value")? }
        }
        _ => return Err(Unusable::Malformed),
    };
    if cause.slug() != slug {
        return Err(Unusable::Mismatch("another limit"));
    }
    Ok(Refusal { lock, mode, owner: question.owner.clone(), cause })
}

/// The cycle: from the owner who asks, each step from where the one before has led, and back.
fn cycle(problem: &Object<'_>, question: &Question<'_>) -> Result<Vec<Edge>, Unusable> {
    let edges = problem.objects("cycle")?;
    let mut from = question.owner.clone();
    let mut cycle = Vec::with_capacity(edges.len());
    for edge in edges {
        let (owner, held_by) = (owner(edge.text("owner")?)?, owner(edge.text("held_by")?)?);
        if owner != from {
            return Err(Unusable::Mismatch("no cycle"));
        }
        from = held_by.clone();
        cycle.push(Edge { owner, waits_for: lock_name(edge.text("waits_for")?)?, held_by });
    }
    if cycle.is_empty() || from != *question.owner {
        return Err(Unusable::Mismatch("no cycle"));
    }
    Ok(cycle)
}

fn holders(problem: &Object<'_>) -> Result<Vec<Holder>, Unusable> {
    let holder = |holder: &Object<'_>| {
        Ok(Holder {
            owner: owner(holder.text("owner")?)?,
            mode: mode_of(holder.text("mode")?)?,
            // That is nobody's business but the holder's.
            fence: Fence(0),
            held_for: Duration::from_millis(holder.number("held_for_ms")?),
            asked_by: holder.optional_text("asked_by")?.unwrap_or_default().chars().take(MOST_DETAIL).collect(),
        })
    };
    // Without any, earlier requests stand in the way.
    problem.optional_objects("holders")?.iter().take(MOST_HOLDERS).map(holder).collect()
}

/// Reads the answer to a renewal: for each lease how long it lives on, or that it has ended. `ttl` says which TTL a lease was
/// granted with, and none of those that were not to be renewed.
///
/// # Errors
/// That it is of no use.
pub fn renewed(
    body: &[u8],
    ttl: impl Fn(&str) -> Option<Duration>,
) -> Result<Vec<(String, Option<Duration>)>, Unusable> {
    let answer = Object::read(body)?;
    let result = |result: &Object<'_>| {
        let id = result.text("id")?;
        let ttl = ttl(id).ok_or(Unusable::Mismatch("another lease"))?;
        match result.text("status")? {
            "lost" => Ok((id.to_owned(), None)),
            "renewed" => {
                let expires_in = duration(result.text("expires_in")?)?;
                if expires_in > ttl {
                    return Err(Unusable::Mismatch("another ttl"));
                }
                Ok((id.to_owned(), Some(expires_in)))
            }
            _ => Err(Unusable::Malformed),
        }
    };
    answer.objects("results")?.iter().map(result).collect()
}

/// Reads the answer to a release: whatever it says of the lease, it is over.
///
/// # Errors
/// That it is of no use.
pub fn deleted(body: &[u8]) -> Result<(), Unusable> {
    let answer = Object::read(body)?;
    let known = ["released", "cancelled", "expired", "unknown"].contains(&answer.text("status")?);
    if known { Ok(()) } else { Err(Unusable::Malformed) }
}

/// A JSON object, whose fields have the types that are asked of them.
struct Object<'a>(Fields<'a>);

enum Fields<'a> {
    Owned(Map<String, Value>),
    Borrowed(&'a Map<String, Value>),
}

impl Object<'_> {
    fn read(body: &[u8]) -> Result<Object<'static>, Unusable> {
        if body.len() > MAX_ANSWER {
            return Err(Unusable::Malformed);
        }
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Object(Fields::Owned(fields))),
            _ => Err(Unusable::Malformed),
        }
    }

    /// A field that is there, and not null.
    fn get(&self, name: &str) -> Option<&Value> {
        let fields = match &self.0 {
            Fields::Owned(fields) => fields,
            Fields::Borrowed(fields) => fields,
        };
        fields.get(name).filter(|value| !value.is_null())
    }

    fn optional_text(&self, name: &str) -> Result<Option<&str>, Unusable> {
        self.get(name).map(|value| value.as_str().ok_or(Unusable::Malformed)).transpose()
    }

    fn text(&self, name: &str) -> Result<&str, Unusable> {
        self.optional_text(name)?.ok_or(Unusable::Malformed)
    }

    fn optional_number(&self, name: &str) -> Result<Option<u64>, Unusable> {
        self.get(name).map(|value| value.as_u64().ok_or(Unusable::Malformed)).transpose()
    }

    fn number(&self, name: &str) -> Result<u64, Unusable> {
        self.optional_number(name)?.ok_or(Unusable::Malformed)
    }

    fn is_true(&self, name: &str) -> bool {
        self.get(name) == Some(&Value::Bool(true))
    }

    fn object(&self, name: &str) -> Result<Object<'_>, Unusable> {
        self.get(name).and_then(object).ok_or(Unusable::Malformed)
    }

    fn objects(&self, name: &str) -> Result<Vec<Object<'_>>, Unusable> {
        let items = self.get(name).and_then(Value::as_array).ok_or(Unusable::Malformed)?;
        items.iter().map(|item| object(item).ok_or(Unusable::Malformed)).collect()
    }

    fn optional_objects(&self, name: &str) -> Result<Vec<Object<'_>>, Unusable> {
        if self.get(name).is_none() { Ok(Vec::new()) } else { self.objects(name) }
    }
}

fn object(value: &Value) -> Option<Object<'_>> {
    value.as_object().map(|fields| Object(Fields::Borrowed(fields)))
}

fn duration(text: &str) -> Result<Duration, Unusable> {
    parse_duration(text).map_err(|_| Unusable::Malformed)
}

fn owner(text: &str) -> Result<OwnerId, Unusable> {
    OwnerId::new(text).ok_or(Unusable::Malformed)
}

fn lock_name(text: &str) -> Result<LockName, Unusable> {
    LockName::parse(text).map_err(|_| Unusable::Malformed)
}

fn mode_of(text: &str) -> Result<Mode, Unusable> {
    text.parse().map_err(|_| Unusable::Malformed)
}

/// A lock that was asked for, or one above such a lock in its hierarchy.
fn asked(text: &str, question: &Question<'_>) -> Result<LockName, Unusable> {
    let name = lock_name(text)?;
    let implied = |lock: &Asked| lock.name == name || lock.name.ancestors().any(|above| above == name);
    if question.locks.iter().any(implied) { Ok(name) } else { Err(Unusable::Mismatch("another lock")) }
}
