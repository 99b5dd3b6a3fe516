//! Guards: which requests may pass only with a lock that is held, and how that is seen. What is done about one that does
//! not hold it must not live here.

use interlock_core::LockName;

use super::parse::{ON_UNAVAILABLE, enforcement_of};
use super::parse_rules::{conditions, template};
use super::reader::{PolicyError, Reader, hint, quote};
use super::rules::{Chosen, Conditions};
use super::template::{FillError, Template};
use super::{Enforcement, Lookup, Match, OnUnavailable, Policy, Rules};

/// How a guard sees that the owner of a request holds the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// The request carries a signed fence, and none of a later grant was seen here.
    Fence,
    /// The backend says that it holds the lock now.
    Owner,
}

/// A guard: requests that pass only with a lock.
#[derive(Clone, Debug)]
pub struct Guard {
    /// Which one it is, for logs: `guard[0]`.
    pub name: String,
    /// The lock.
    pub lock: Template,
    /// How it is checked.
    pub check: Check,
    /// Whether it acts, for whom, only watches, or neither: its own word, else the policy's.
    pub enforcement: Enforcement,
    /// What becomes of a request when nobody can say: its own word, else the policy's.
    pub on_backend_unavailable: OnUnavailable,
    when: Conditions,
}

impl Chosen for Guard {
    const LIST: &'static str = "guard";
    const WORD: &'static str = "guard";

    fn conditions(&self) -> &Conditions {
        &self.when
    }

    fn templates(&self) -> impl Iterator<Item = &Template> {
        std::iter::once(&self.lock)
    }

    fn place(&self, _: usize) -> String {
        self.name.clone()
    }
}

impl Match<'_, Guard> {
    /// The lock that the request must hold.
    ///
    /// # Errors
    /// The request does not fill the name.
    pub fn lock(&self, lookup: &Lookup<'_>) -> Result<LockName, FillError> {
        self.rule.lock.fill(&self.captures, lookup)
    }
}

/// Reads the guards of a policy of which all else is known.
pub(super) fn guards(at: &Reader<'_>, policy: &Policy) -> Result<Rules<Guard>, PolicyError> {
    let numbered = at.items()?.into_iter().enumerate();
    let guards = numbered.map(|(index, item)| guard(format!("{}[{index}]", Guard::LIST), &item, policy));
    Rules::build(guards.collect::<Result<_, _>>()?)
}

fn guard(name: String, at: &Reader<'_>, policy: &Policy) -> Result<Guard, PolicyError> {
    let object = at.object(&["match", "lock", "check", "enforcement", "on_backend_unavailable"])?;
    let when = conditions(&object.require("match")?)?;
    let place = object.require("lock")?;
    let lock = template(&place, &when)?;
    let classes: Vec<&str> = policy.classes.names().collect();
    // Locks of a class that nobody declares may be taken. A guard for a class that was misspelt would let nobody pass.
    if !classes.is_empty() && !classes.contains(&lock.class()) {
        let class = quote(lock.class());
        let hint = hint(lock.class(), classes, || "; declare it in classes".into());
        return Err(place.error(format!("is of class {class}, and classes has no such{hint}")));
    }
    let place = object.require("check")?;
    let check = place.word("a check", &[("fence", Check::Fence), ("owner", Check::Owner)])?;
    if check == Check::Owner && matches!(policy.backend, super::Backend::Etcd(_)) {
        return Err(place.error("\"owner\" cannot be checked where the locks are in etcd; write \"fence\""));
    }
    if check == Check::Fence {
        if policy.keys.is_empty() {
            let problem = "\"fence\" needs signed fences, and there are no keys; add keys, or use \"owner\"";
            return Err(place.error(problem));
        }
        if policy.classes.get(lock.class()).permits > 1 {
            let class = quote(lock.class());
            let problem = format!(
                "\"fence\" tells a late holder by a later one, and class {class} has several at a time; use \"owner\""
            );
            return Err(place.error(problem));
        }
    }
    let away = "an answer to a backend that is away";
    let enforcement = object.read("enforcement", enforcement_of)?;
    let on_backend_unavailable = object.read("on_backend_unavailable", |at| at.word(away, &ON_UNAVAILABLE))?;
    Ok(Guard {
        name,
        lock,
        check,
        enforcement: enforcement.unwrap_or(policy.enforcement),
        on_backend_unavailable: on_backend_unavailable.unwrap_or(policy.on_backend_unavailable),
        when,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn parse(guard: &Value) -> Result<Policy, String> {
        let policy = json!({
            "classes": [{ "name": "order" }, { "name": "printer", "permits": 3 }], "guard": guard,
            "keys": [{ "id": "k", "secret": { "base64": "MDEyMzQ1Njc4OWFiY2RlZg==" } }],
        });
        Policy::parse(policy.to_string().as_bytes(), &|_| None).map_err(|error| error.to_string())
    }

    fn guard(fields: Value) -> Value {
        let mut guard = json!({ "match": { "path": "/o/{id}" }, "lock": "order/{id}", "check": "fence" });
        guard.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        guard
    }

    #[test]
    fn a_guard_has_its_own_words_or_the_policys() {
        let said = guard(json!({ "check": "owner", "enforcement": "audit", "on_backend_unavailable": "allow" }));
        let unsaid = guard(json!({ "match": { "methods": ["PUT"], "path": "/o/{id}/x" } }));
        let policy = parse(&json!([said, unsaid])).unwrap();
        let [said, unsaid] = policy.guards.iter().collect::<Vec<_>>()[..] else { panic!("{policy:?}") };
        assert_eq!((said.check, said.enforcement), (Check::Owner, Enforcement::Audit));
        assert_eq!(said.on_backend_unavailable, OnUnavailable::Allow);
        assert_eq!((unsaid.check, unsaid.enforcement), (Check::Fence, Enforcement::Enforce));
        assert_eq!((unsaid.on_backend_unavailable, unsaid.name.as_str()), (OnUnavailable::Reject, "guard[1]"));
    }

    #[test]
    fn the_most_exact_guard_is_the_one_that_counts() {
        let guards = [("/o/{*rest}", "order/all"), ("/o/{id}", "order/{id}"), ("/o/special", "order/special")];
        let guards = guards.map(|(path, lock)| guard(json!({ "match": { "path": path }, "lock": lock })));
        let policy = parse(&json!(guards)).unwrap_err();
        assert!(policy.contains("guard[1].match.path: is ambiguous beside that of guard[0]"), "{policy}");
        let policy = parse(&json!([guards[1], guards[2]])).unwrap();
        let lock = |path: &str| {
            let nothing = || None;
            let lookup = Lookup {
                method: b"PUT",
                path: path.as_bytes(),
                header: &|_| None,
                route: &nothing,
                principal: &nothing,
            };
            policy.guards.find(&lookup).map(|matched| matched.lock(&lookup).unwrap().to_string())
        };
        assert_eq!(lock("/o/4%32?x=1").as_deref(), Some("order/42"));
        assert_eq!(lock("/o/special").as_deref(), Some("order/special"));
        assert_eq!(lock("/p/42"), None);
    }

    #[test]
    fn what_guards_nothing_is_refused() {
        let one = |fields| json!([guard(fields)]);
        let fields = "the fields here are match, lock, check, enforcement, on_backend_unavailable";
        for (wrong, line) in [
            (json!({}), "guard: is an object; write a list"),
            (json!([{}]), "guard[0].match: is missing; it has no default"),
            (one(json!({ "match": {} })), "guard[0].match: is empty; name methods, a path, headers or a route"),
            (one(json!({ "name": "g" })), &format!("guard[0].name: there is no such field; {fields}")),
            (one(json!({ "locks": [] })), "guard[0].locks: there is no such field; did you mean \"lock\"?"),
            (
                one(json!({ "match": { "path": "o" } })),
                "guard[0].match.path: \"o\" does not begin with \"/\"; write the whole path",
            ),
            (
                one(json!({ "lock": "order/{no}" })),
                "guard[0].lock: \"order/{no}\" names \"no\", which the rule's path does not capture; use id, method, principal, \
                 header:NAME or query:NAME",
            ),
            (
                one(json!({ "lock": "ordr/{id}" })),
                "guard[0].lock: is of class \"ordr\", and classes has no such; did you mean \"order\"?",
            ),
            (
                one(json!({ "lock": "stock/{id}" })),
                "guard[0].lock: is of class \"stock\", and classes has no such; declare it in classes",
            ),
            (one(json!({ "check": "fense" })), "guard[0].check: \"fense\" is not a check; did you mean \"fence\"?"),
            (
                one(json!({ "lock": "printer/{id}" })),
                "guard[0].check: \"fence\" tells a late holder by a later one, and class \"printer\" has several at a time; use \
                 \"owner\"",
            ),
            (
                json!([guard(json!({})), guard(json!({ "check": "owner" }))]),
                "guard[1].match: no request reaches this guard, because guard[0] takes all that it matches; put it before that \
                 guard, or take it out",
            ),
        ] {
            assert_eq!(parse(&wrong).unwrap_err(), line);
        }
        let keyless = json!({ "guard": one(json!({})) });
        assert_eq!(
            Policy::parse(keyless.to_string().as_bytes(), &|_| None).unwrap_err().to_string(),
            "guard[0].check: \"fence\" needs signed fences, and there are no keys; add keys, or use \"owner\""
        );
        let by_owner = json!({ "guard": one(json!({ "check": "owner", "lock": "any/{id}" })) });
        assert!(Policy::parse(by_owner.to_string().as_bytes(), &|_| None).is_ok(), "no classes, no keys");
    }
}
