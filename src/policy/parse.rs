//! From JSON to a policy: all but the rules.

use std::collections::BTreeMap;
use std::time::Duration;

use interlock_core::{Class, Classes, LockName, Mode, Rank, Within};

use super::duration::{LONGEST, spell};
use super::reader::{Object, PolicyError, Reader, quote};
use super::share::{self, Percentage};
use super::{
    Annotations, Api, Backend, Defaults, Enforcement, HeaderAnnotations, Keys, Limits, MIN_TTL, OnUnavailable, Policy,
    Reentrancy, RouteAnnotations, backend, guard, parse_rules, wire,
};
use crate::annotation::owner::OwnerSource;

/// The words for [`OnUnavailable`].
pub(super) const ON_UNAVAILABLE: [(&str, OnUnavailable); 2] =
    [("reject", OnUnavailable::Reject), ("allow", OnUnavailable::Allow)];

const FIELDS: [&str; 14] = [
    "instance",
    "enforcement",
    "owner",
    "reentrancy",
    "backend",
    "on_backend_unavailable",
    "defaults",
    "limits",
    "classes",
    "annotations",
    "rules",
    "api",
    "guard",
    "keys",
];

pub(super) fn policy(configuration: &[u8], env: &dyn Fn(&str) -> Option<String>) -> Result<Policy, PolicyError> {
    let value = wire::value(configuration)?;
    let object = Reader::root(&value).object(&FIELDS)?;
    let instance = object.read("instance", |at| at.identifier().map(str::to_owned))?;
    let enforcement = object.read("enforcement", enforcement_of)?;
    let owner_from = object.read("owner", owner)?;
    let backend = object.read("backend", |at| backend::backend(&at, env))?.unwrap_or(Backend::Local);
    let on_backend_unavailable =
        object.read("on_backend_unavailable", |at| at.word("an answer to a backend that is away", &ON_UNAVAILABLE))?;
    let limits = limits(object.get("limits"))?;
    let defaults = defaults(object.get("defaults"), &limits)?;
    let (classes, principals) = object.read("classes", classes)?.unwrap_or_default();
    let annotations = annotations(object.get("annotations"))?;
    let keys = object.read("keys", |at| Keys::read(&at, env))?.unwrap_or_default();
    let reentrancy = reentrancy(&object, &keys)?;
    backend::check_reentrancy(&object, &backend, reentrancy)?;
    let api = object.read("api", |at| Api::read(&at, env))?;
    if api.is_some() && backend != Backend::Local {
        let problem = match backend {
            Backend::Etcd(_) => "serves the table in this Envoy, and the locks are in etcd; leave out api, or backend",
            _ => "serves the table in this Envoy, and the locks are at an authority; leave out api, or backend",
        };
        return Err(object.error_at("api", problem));
    }

    let mut policy = Policy {
        instance: instance.unwrap_or_else(|| "interlock".into()),
        enforcement: enforcement.unwrap_or(Enforcement::Enforce),
        owner_from: owner_from.unwrap_or_else(|| vec![OwnerSource::Traceparent, OwnerSource::RequestId]),
        reentrancy,
        backend,
        on_backend_unavailable: on_backend_unavailable.unwrap_or(OnUnavailable::Reject),
        defaults,
        limits,
        classes,
        annotations,
        rules: super::Rules::default(),
        guards: super::Rules::default(),
        keys,
        api,
        principals,
    };
    if let Some(rules) = object.read("rules", |at| parse_rules::rules(&at, &policy))? {
        policy.rules = rules;
    }
    if let Some(guards) = object.read("guard", |at| guard::guards(&at, &policy))? {
        policy.guards = guards;
    }
    Ok(policy)
}

/// A word, or the share of owners that is enforced while all others are audited: `{ enforce: 10% }`.
pub(super) fn enforcement_of(at: Reader<'_>) -> Result<Enforcement, PolicyError> {
    const WORDS: [(&str, Enforcement); 3] =
        [("enforce", Enforcement::Enforce), ("audit", Enforcement::Audit), ("off", Enforcement::Off)];
    // Envoy and Kubernetes read YAML 1.1, where a bare `off` is false. A kill switch must not be refused for that.
    if at.is_false() {
        return Ok(Enforcement::Off);
    }
    if !at.is_object() {
        let text = at.text()?;
        if text.contains('%') {
            let problem = "is not an enforcement; write the share of owners as { enforce: 10% }";
            return Err(at.error(format!("{} {problem}", quote(text))));
        }
        return at.word("an enforcement", &WORDS);
    }
    let place = at.object(&["enforce"])?.require("enforce")?;
    let text = place.text_like("a percentage, such as \"10%\"")?;
    match share::parse(text).map_err(|problem| place.error(format!("{} {problem}", quote(text))))? {
        Percentage::All => Ok(Enforcement::Enforce),
        Percentage::Some(share) => Ok(Enforcement::Partly(share)),
        Percentage::None => Ok(Enforcement::Audit),
    }
}

fn owner(at: Reader<'_>) -> Result<Vec<OwnerSource>, PolicyError> {
    let object = at.object(&["from"])?;
    let from = object.require("from")?;
    let mut sources = Vec::new();
    for item in from.items()? {
        let source = item.word("a source of owners", &OwnerSource::ALL)?;
        if sources.contains(&source) {
            return Err(item.error(format!("{:?} is there twice; leave one of them out", source.header())));
        }
        sources.push(source);
    }
    if sources.is_empty() {
        return Err(from.error("is empty; name one source at least, such as traceparent"));
    }
    Ok(sources)
}

fn reentrancy(object: &Object<'_>, keys: &Keys) -> Result<Reentrancy, PolicyError> {
    let words = [("owner", Reentrancy::Owner), ("lease", Reentrancy::Lease), ("none", Reentrancy::None)];
    let reentrancy = object.read("reentrancy", |at| at.word("a kind of re-entrancy", &words))?;
    if reentrancy == Some(Reentrancy::Lease) && keys.is_empty() {
        let problem = "\"lease\" needs signed fences, and there are no keys; add keys, or use \"owner\"";
        return Err(object.error_at("reentrancy", problem));
    }
    Ok(reentrancy.unwrap_or(Reentrancy::Owner))
}

fn limits(at: Option<Reader<'_>>) -> Result<Limits, PolicyError> {
    let mut limits = Limits {
        locks_per_request: 16,
        locks_per_owner: Some(64),
        waiters_per_lock: 1024,
        max_wait: Duration::from_secs(30),
        max_ttl: Duration::from_secs(60),
        locks: 100_000,
        waiters: 100_000,
    };
    let Some(at) = at else { return Ok(limits) };
    let object = at.object(&[
        "locks_per_request",
        "locks_per_owner",
        "waiters_per_lock",
        "max_wait",
        "max_ttl",
        "locks",
        "waiters",
    ])?;
    let number = |field, most, default| Ok(object.read(field, |at| at.integer(1, most))?.unwrap_or(default));
    limits.locks_per_request = number("locks_per_request", 1000, limits.locks_per_request)?;
    limits.waiters_per_lock = number("waiters_per_lock", 1_000_000, limits.waiters_per_lock)?;
    limits.locks = number("locks", 10_000_000, limits.locks)?;
    limits.waiters = number("waiters", 10_000_000, limits.waiters)?;
    if let Some(place) = object.get("locks_per_owner") {
        // Null says that they are not counted; leaving the field out says 64.
        limits.locks_per_owner = if place.is_null() { None } else { Some(place.integer(1, 1_000_000)?) };
    }
    if let Some(wait) = object.read("max_wait", |at| at.duration())? {
        limits.max_wait = wait;
    }
    if let Some(place) = object.get("max_ttl") {
        limits.max_ttl = ttl(&place, LONGEST)?;
    }
    Ok(limits)
}

/// A TTL in the range that this policy has.
pub(super) fn ttl(at: &Reader<'_>, most: Duration) -> Result<Duration, PolicyError> {
    let ttl = at.duration()?;
    if ttl < MIN_TTL {
        return Err(at.error(format!("{} is below the least, {}; raise it", spell(ttl), spell(MIN_TTL))));
    }
    if ttl > most {
        let (ttl, most) = (spell(ttl), spell(most));
        return Err(at.error(format!("{ttl} is over limits.max_ttl, {most}; lower it, or raise the limit")));
    }
    Ok(ttl)
}

/// A wait in the range that this policy has.
pub(super) fn wait(at: &Reader<'_>, most: Duration) -> Result<Duration, PolicyError> {
    let wait = at.duration()?;
    if wait > most {
        let (wait, most) = (spell(wait), spell(most));
        return Err(at.error(format!("{wait} is over limits.max_wait, {most}; lower it, or raise the limit")));
    }
    Ok(wait)
}

/// The complaint about a hold limit that ends before the TTL does.
pub(super) fn hold_below_ttl(hold: Duration, ttl: Duration) -> String {
    format!("{} is below the ttl, {}; raise it, or lower the ttl", spell(hold), spell(ttl))
}

fn defaults(at: Option<Reader<'_>>, limits: &Limits) -> Result<Defaults, PolicyError> {
    // What nobody wrote must not be at odds with a limit that somebody did.
    let mut defaults = Defaults {
        mode: Mode::Exclusive,
        wait: Duration::from_secs(2).min(limits.max_wait),
        ttl: Duration::from_secs(5).min(limits.max_ttl),
        hold: Duration::from_secs(60),
    };
    let Some(at) = at else { return Ok(defaults) };
    let object = at.object(&["mode", "wait", "ttl", "hold"])?;
    if let Some(place) = object.get("mode") {
        defaults.mode = place.word("a mode", &parse_rules::MODES)?;
        if defaults.mode.is_intent() {
            let problem =
                format!("{:?} fits hierarchical classes only; use exclusive or shared", defaults.mode.as_str());
            return Err(place.error(problem));
        }
    }
    if let Some(place) = object.get("wait") {
        defaults.wait = wait(&place, limits.max_wait)?;
    }
    if let Some(place) = object.get("ttl") {
        defaults.ttl = ttl(&place, limits.max_ttl)?;
        defaults.hold = defaults.hold.max(defaults.ttl);
    }
    if let Some(place) = object.get("hold") {
        defaults.hold = place.duration()?;
        if defaults.hold < defaults.ttl {
            return Err(place.error(hold_below_ttl(defaults.hold, defaults.ttl)));
        }
    }
    Ok(defaults)
}

type Principals = BTreeMap<String, Vec<String>>;

fn classes(at: Reader<'_>) -> Result<(Classes, Principals), PolicyError> {
    let (mut classes, mut principals) = (Classes::default(), Principals::new());
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    for (index, item) in at.items()?.into_iter().enumerate() {
        let object = item.object(&["name", "rank", "permits", "within", "hierarchy", "principals"])?;
        let place = object.require("name")?;
        let text = place.text()?;
        let no_class = |problem: String| place.error(format!("{} cannot name a class: {problem}", quote(text)));
        let name = LockName::parse(text).map_err(|error| no_class(error.to_string()))?;
        if name.as_str().contains('/') {
            return Err(no_class("it has a \"/\"; a class is the first segment of a lock name".into()));
        }
        let name = name.as_str().to_owned();
        if let Some(earlier) = places.insert(name.clone(), index) {
            let problem = format!("{name:?} is the name of classes[{earlier}] already; make one class of the two");
            return Err(place.error(problem));
        }
        let within = [("ordered", Within::Ordered), ("unordered", Within::Unordered)];
        let class = Class {
            rank: object.read("rank", |at| at.integer(0, u32::MAX))?.map(Rank),
            permits: object.read("permits", |at| at.integer(1, 1_000_000))?.unwrap_or(1),
            within: object.read("within", |at| at.word("an order within a class", &within))?.unwrap_or_default(),
            hierarchy: object.read("hierarchy", |at| at.flag())?.unwrap_or(false),
        };
        if class.hierarchy && class.permits > 1 {
            let problem = "a hierarchical class has one permit a lock; leave permits out, or hierarchy";
            return Err(object.error_at("permits", problem));
        }
        if let Some(place) = object.get("principals") {
            principals.insert(name.clone(), patterns(&place)?);
        }
        classes.insert(name, class);
    }
    Ok((classes, principals))
}

pub(super) fn patterns(at: &Reader<'_>) -> Result<Vec<String>, PolicyError> {
    let mut patterns = Vec::new();
    for item in at.items()? {
        let pattern = item.text()?;
        if pattern.is_empty() || pattern.len() > 2048 {
            return Err(item.error("is no pattern of SPIFFE IDs; write 1 to 2048 bytes, with * for any text"));
        }
        patterns.push(pattern.to_owned());
    }
    if patterns.is_empty() {
        return Err(at.error("is empty; name a pattern, or leave the field out"));
    }
    Ok(patterns)
}

fn annotations(at: Option<Reader<'_>>) -> Result<Annotations, PolicyError> {
    let mut annotations = Annotations { header: HeaderAnnotations::Accept, route: RouteAnnotations::Accept };
    let Some(at) = at else { return Ok(annotations) };
    let object = at.object(&["header", "route"])?;
    let header = [
        ("accept", HeaderAnnotations::Accept),
        ("pass", HeaderAnnotations::Pass),
        ("strip", HeaderAnnotations::Strip),
        ("reject", HeaderAnnotations::Reject),
    ];
    let route = [("accept", RouteAnnotations::Accept), ("ignore", RouteAnnotations::Ignore)];
    if let Some(place) = object.get("header") {
        annotations.header = place.word("a way to treat the header", &header)?;
    }
    if let Some(place) = object.get("route") {
        annotations.route = place.word("a way to treat route metadata", &route)?;
    }
    Ok(annotations)
}
