//! From JSON to rules.

use std::collections::{BTreeMap, BTreeSet};

use interlock_core::Mode;

use super::parse::{ON_UNAVAILABLE, enforcement_of, hold_below_ttl, ttl, wait};
use super::path::Pattern;
use super::reader::{Object, PolicyError, Reader, quote};
use super::rules::{Condition, Conditions, RuleLock, RuleTerms};
use super::template::Template;
use super::{OnLeaseLost, Policy, Rule, Rules, header_name};
use crate::annotation::mode_fits;

/// The words for [`Mode`].
pub(super) const MODES: [(&str, Mode); 5] = [
    (Mode::Exclusive.as_str(), Mode::Exclusive),
    (Mode::Shared.as_str(), Mode::Shared),
    (Mode::IntentShared.as_str(), Mode::IntentShared),
    (Mode::IntentExclusive.as_str(), Mode::IntentExclusive),
    (Mode::SharedIntentExclusive.as_str(), Mode::SharedIntentExclusive),
];

/// Reads the rules of a policy of which all else is known.
pub(super) fn rules(at: &Reader<'_>, policy: &Policy) -> Result<Rules, PolicyError> {
    let mut rules = Vec::new();
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    for (index, item) in at.items()?.iter().enumerate() {
        let object = item.object(&[
            "name",
            "match",
            "locks",
            "wait",
            "ttl",
            "hold",
            "enforcement",
            "on_lease_lost",
            "on_backend_unavailable",
        ])?;
        let place = object.require("name")?;
        let name = place.identifier()?;
        if let Some(earlier) = places.insert(name.to_owned(), index) {
            return Err(
                place.error(format!("{name:?} is the name of rules[{earlier}] already; give each rule its own"))
            );
        }
        rules.push(rule(name, &object, policy)?);
    }
    Rules::build(rules)
}

fn rule(name: &str, object: &Object<'_>, policy: &Policy) -> Result<Rule, PolicyError> {
    let lost = [("abort", OnLeaseLost::Abort), ("continue", OnLeaseLost::Continue)];
    let enforcement = object.read("enforcement", enforcement_of)?;
    let on_lease_lost = object.read("on_lease_lost", |at| at.word("an answer to a lost lease", &lost))?;
    let away = "an answer to a backend that is away";
    let on_backend_unavailable = object.read("on_backend_unavailable", |at| at.word(away, &ON_UNAVAILABLE))?;
    let mut rule = Rule {
        name: name.to_owned(),
        locks: Vec::new(),
        enforcement: enforcement.unwrap_or(policy.enforcement),
        on_lease_lost: on_lease_lost.unwrap_or(OnLeaseLost::Abort),
        on_backend_unavailable: on_backend_unavailable.unwrap_or(policy.on_backend_unavailable),
        when: conditions(&object.require("match")?)?,
    };
    let whole = terms(object, RuleTerms::default(), policy)?;
    let place = object.require("locks")?;
    for item in place.items()? {
        let lock = lock(&item, &rule, whole, policy)?;
        if rule.locks.iter().any(|earlier| earlier.name == lock.name) {
            return Err(item.error(format!("locks {} twice; leave one of them out", quote(lock.name.as_str()))));
        }
        rule.locks.push(lock);
    }
    if rule.locks.is_empty() {
        return Err(place.error("is empty; name one lock at least"));
    }
    let most = policy.limits.locks_per_request;
    if u32::try_from(rule.locks.len()).is_ok_and(|count| count <= most) {
        return Ok(rule);
    }
    let count = rule.locks.len();
    Err(place
        .error(format!("has {count} locks, over limits.locks_per_request, {most}; lock fewer, or raise the limit")))
}

/// Reads which requests something is for.
pub(super) fn conditions(at: &Reader<'_>) -> Result<Conditions, PolicyError> {
    let object = at.object(&["methods", "path", "headers", "route"])?;
    if object.is_empty() {
        return Err(object.error("is empty; name methods, a path, headers or a route"));
    }
    Ok(Conditions {
        methods: object.read("methods", |at| methods(&at))?,
        path: object.read("path", |at| {
            let text = at.text()?;
            Pattern::parse(text).map_err(|problem| at.error(format!("{} {problem}", quote(text))))
        })?,
        headers: object.read("headers", |at| headers(&at))?.unwrap_or_default(),
        route: object.read("route", |at| match at.text()? {
            "" => Err(at.error("is empty; write the name of a route of Envoy's")),
            name => Ok(name.to_owned()),
        })?,
    })
}

/// Reads a lock name that is made of what a request looks like.
pub(super) fn template(at: &Reader<'_>, when: &Conditions) -> Result<Template, PolicyError> {
    let text = at.text()?;
    let captures = when.path.as_ref().map(|pattern| pattern.captures.as_slice()).unwrap_or_default();
    Template::parse(text, captures).map_err(|problem| at.error(format!("{} {problem}", quote(text))))
}

fn methods(at: &Reader<'_>) -> Result<BTreeSet<String>, PolicyError> {
    let mut methods = BTreeSet::new();
    for item in at.items()? {
        let method = item.text()?;
        if method.is_empty() || method.len() > 64 || header_name(method).is_none() || method.starts_with(':') {
            return Err(item.error(format!("{} is not a method", quote(method))));
        }
        let upper = method.to_ascii_uppercase();
        let standard = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];
        if method != upper && standard.contains(&upper.as_str()) {
            return Err(item.error(format!("{} is not a method; did you mean {upper:?}?", quote(method))));
        }
        if !methods.insert(method.to_owned()) {
            return Err(item.error(format!("{} is there twice; leave one of them out", quote(method))));
        }
    }
    if methods.is_empty() {
        return Err(at.error("is empty; name a method, or leave the field out for any"));
    }
    Ok(methods)
}

fn headers(at: &Reader<'_>) -> Result<BTreeMap<String, Condition>, PolicyError> {
    let mut conditions = BTreeMap::new();
    for (name, place) in at.entries()? {
        let lower = header_name(name).ok_or_else(|| place.error(format!("{} is no header's name", quote(name))))?;
        let condition = match place.text()? {
            "*" => Condition::Present,
            value => Condition::Is(value.to_owned()),
        };
        if conditions.insert(lower, condition).is_some() {
            return Err(place.error("is there twice, in another case; leave one of them out"));
        }
    }
    if conditions.is_empty() {
        return Err(at.error("is empty; name a header, or leave the field out"));
    }
    Ok(conditions)
}

fn lock(at: &Reader<'_>, rule: &Rule, whole: RuleTerms, policy: &Policy) -> Result<RuleLock, PolicyError> {
    let object = at.object(&["name", "mode", "wait", "ttl", "hold"])?;
    let name = template(&object.require("name")?, &rule.when)?;
    let mut terms = terms(&object, whole, policy)?;
    if let Some(place) = object.get("mode") {
        let mode = place.word("a mode", &MODES)?;
        if !mode_fits(&policy.classes, name.class(), mode) {
            let class = quote(name.class());
            let problem = format!(
                "{:?} needs a hierarchy, and the class {class} has none; give it one, or use exclusive or shared",
                mode.as_str()
            );
            return Err(place.error(problem));
        }
        terms.mode = Some(mode);
    }
    Ok(RuleLock { name, terms })
}

/// The times that an object says, on top of those said around it.
fn terms(object: &Object<'_>, around: RuleTerms, policy: &Policy) -> Result<RuleTerms, PolicyError> {
    let terms = RuleTerms {
        mode: around.mode,
        wait: object.read("wait", |at| wait(&at, policy.limits.max_wait))?.or(around.wait),
        ttl: object.read("ttl", |at| ttl(&at, policy.limits.max_ttl))?.or(around.ttl),
        hold: object.read("hold", |at| at.duration())?.or(around.hold),
    };
    let in_force = (terms.hold.unwrap_or(policy.defaults.hold), terms.ttl.unwrap_or(policy.defaults.ttl));
    // What is at odds is said where somebody wrote it.
    let said = ["hold", "ttl"].into_iter().find(|field| object.get(field).is_some());
    match (in_force, said) {
        ((hold, ttl), Some("ttl")) if hold < ttl => Err(object.error_at(
            "ttl",
            format!(
                "{} is over the hold limit, {}; lower it, or raise hold",
                super::duration::spell(ttl),
                super::duration::spell(hold)
            ),
        )),
        ((hold, ttl), Some(field)) if hold < ttl => Err(object.error_at(field, hold_below_ttl(hold, ttl))),
        _ => Ok(terms),
    }
}
