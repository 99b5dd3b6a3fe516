//! What a request asks for: rules, route metadata and headers become one request for locks, or a rejection.
//!
//! All headers come in one call of the host, since every call costs. Nothing is locked, answered or removed here.

use std::cell::OnceCell;

use interlock_core::{Cause, Duration, Limit, LockName, OwnerId, Refusal, Want};

use crate::annotation::{self, Wanted, owner, timeout};
use crate::answer::Reject;
use crate::backend::Purpose;
use crate::host::{Fields, Host};
use crate::policy::{Enforcement, HeaderAnnotations, Lookup, OnLeaseLost, OnUnavailable, Policy, RouteAnnotations};

/// Where Envoy keeps what a route says to this filter.
const ROUTE_LOCKS: [&str; 5] = ["xds", "route_metadata", "filter_metadata", "interlock", "locks"];

/// What the filter is to do for a request, beside asking for its locks.
#[derive(Clone, Debug)]
pub struct Terms {
    /// Whether decisions count, or are only watched.
    pub purpose: Purpose,
    /// What becomes of it when its lease is lost.
    pub on_lease_lost: OnLeaseLost,
    /// What becomes of it when the backend fails.
    pub on_backend_unavailable: OnUnavailable,
    /// Who asks, for people to read: the rule, or the kind of annotation.
    pub asked_by: String,
    /// Whether the caller speaks gRPC.
    pub grpc: bool,
}

/// A request for locks.
#[derive(Clone, Debug)]
pub struct Asked {
    /// What else is to be done for it.
    pub terms: Terms,
    /// Its owner, as the request names it.
    pub owner: OwnerId,
    /// The locks.
    pub wants: Vec<Want>,
}

/// What rules, guards and fences all look at in a request: read once.
pub struct Facts<'a> {
    host: &'a dyn Host,
    policy: &'a Policy,
    fields: OnceCell<Fields>,
    owner: OnceCell<Option<OwnerId>>,
}

impl<'a> Facts<'a> {
    /// Of the effective stream's request.
    pub fn of(host: &'a dyn Host, policy: &'a Policy) -> Self {
        Facts { host, policy, fields: OnceCell::new(), owner: OnceCell::new() }
    }

    /// Its headers.
    pub fn fields(&self) -> &Fields {
        // They are always there in their callback.
        self.fields.get_or_init(|| self.host.request_headers().unwrap_or_default())
    }

    /// Whose request it is.
    pub fn owner(&self) -> Option<&OwnerId> {
        self.owner.get_or_init(|| owner(self.fields(), self.policy)).as_ref()
    }

    /// Which decisions count for it, where this is said of requests like it; none where nothing is to be decided.
    pub fn purpose(&self, enforcement: Enforcement) -> Option<Purpose> {
        match enforcement {
            Enforcement::Off => None,
            Enforcement::Enforce => Some(Purpose::Enforce),
            Enforcement::Audit => Some(Purpose::Audit),
            // Who names no owner is in no share. That is refused by itself, so it must not begin before all are enforced.
            Enforcement::Partly(share) if self.owner().is_some_and(|owner| share.has(owner)) => Some(Purpose::Enforce),
            Enforcement::Partly(_) => Some(Purpose::Audit),
        }
    }

    /// Does something with a view of the request as rules and guards have it.
    pub fn looked_up<T>(&self, act: impl FnOnce(&Lookup<'_>) -> T) -> T {
        let (host, fields) = (self.host, self.fields());
        act(&Lookup {
            method: fields.first(":method").unwrap_or_default(),
            path: fields.first(":path").unwrap_or_default(),
            header: &|name| fields.first(name).map(<[u8]>::to_vec),
            route: &|| host.property(&["xds", "route_name"]),
            principal: &|| principal(host),
        })
    }

    /// Whether the caller speaks gRPC.
    pub fn is_grpc(&self) -> bool {
        self.fields().first("content-type").is_some_and(is_grpc)
    }
}

/// What a request turned out to be.
#[derive(Debug)]
pub enum Intake {
    /// It asks for nothing.
    Nothing,
    /// It asks for locks.
    Locks(Asked),
    /// What it asks for cannot be given.
    Reject(Terms, Reject),
}

/// Whether a policy lets every request pass untouched.
pub fn is_off(policy: &Policy) -> bool {
    policy.enforcement == Enforcement::Off
        && policy.rules.iter().all(|rule| rule.enforcement == Enforcement::Off)
        && policy.guards.iter().all(|guard| guard.enforcement == Enforcement::Off)
}

/// Finds out what the effective stream's request asks for.
pub fn read(facts: &Facts<'_>) -> Intake {
    facts.looked_up(|lookup| read_by(facts, lookup))
}

fn read_by(facts: &Facts<'_>, lookup: &Lookup<'_>) -> Intake {
    let Facts { host, policy, .. } = *facts;
    let annotation = match policy.annotations.header {
        HeaderAnnotations::Accept | HeaderAnnotations::Reject => facts.fields().joined("lock"),
        HeaderAnnotations::Pass | HeaderAnnotations::Strip => None,
    };
    let matched = if policy.rules.is_empty() { None } else { policy.rules.find(lookup) };
    let on_route = match policy.annotations.route {
        RouteAnnotations::Accept => host.property(&ROUTE_LOCKS).filter(|locks| !locks.is_empty()),
        RouteAnnotations::Ignore => None,
    };
    if matched.is_none() && on_route.is_none() && annotation.is_none() {
        return Intake::Nothing;
    }
    let rule = matched.as_ref().map(|matched| matched.rule);
    let Some(purpose) = facts.purpose(rule.map_or(policy.enforcement, |rule| rule.enforcement)) else {
        return Intake::Nothing;
    };
    let asked_by = match (rule, &on_route) {
        (Some(rule), _) => rule.name.clone(),
        (None, Some(_)) => String::from("route metadata"),
        (None, None) => String::from("lock header"),
    };
    let terms = Terms {
        purpose,
        on_lease_lost: rule.map_or(OnLeaseLost::Abort, |rule| rule.on_lease_lost),
        on_backend_unavailable: rule.map_or(policy.on_backend_unavailable, |rule| rule.on_backend_unavailable),
        asked_by,
        grpc: facts.is_grpc(),
    };
    if annotation.is_some() && policy.annotations.header == HeaderAnnotations::Reject {
        let detail = String::from("this gateway takes no lock header from callers");
        return Intake::Reject(terms, Reject::Forbidden { detail, lock: None, owner: None });
    }
    let mut wanted = Vec::new();
    if let Some(matched) = &matched {
        match matched.locks(lookup) {
            Ok(locks) => wanted.extend(locks),
            Err(error) => return malformed(terms, format!("rule {}: {error}", matched.rule.name)),
        }
    }
    for (place, value) in [("route metadata", on_route), ("lock header", annotation)] {
        let Some(value) = value else { continue };
        match annotation::parse_lock_header([value.as_slice()]) {
            Ok(locks) => wanted.extend(locks),
            Err(error) => return malformed(terms, format!("{place}: {error}")),
        }
    }
    let Some(owner) = facts.owner().cloned() else {
        return Intake::Reject(terms, Reject::OwnerMissing { sources: policy.owner_from.clone() });
    };
    match wants(policy, wanted, deadline(terms.grpc, lookup.header), &owner, lookup.principal) {
        Ok(wants) => Intake::Locks(Asked { terms, owner, wants }),
        Err(reject) => Intake::Reject(terms, *reject),
    }
}

/// Who the effective stream's caller is: the SPIFFE ID of its certificate, over mTLS.
pub fn principal(host: &dyn Host) -> Option<Vec<u8>> {
    host.property(&["connection", "uri_san_peer_certificate"]).filter(|id| !id.is_empty())
}

/// Whose a request is.
pub fn owner(fields: &Fields, policy: &Policy) -> Option<OwnerId> {
    // Baggage is a list and may come in several fields; of the others a second field would be somebody's mistake.
    owner::find(&policy.owner_from, |name| match name {
        "baggage" => fields.joined(name),
        _ => fields.first(name).map(<[u8]>::to_vec),
    })
}

fn is_grpc(content_type: &[u8]) -> bool {
    // application/grpc, application/grpc+proto, application/grpc;charset=…; but grpc-web is HTTP to its caller.
    content_type.strip_prefix(b"application/grpc").is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// How long the caller itself waits, where it says so.
fn deadline(grpc: bool, header: impl Fn(&str) -> Option<Vec<u8>>) -> Duration {
    let of_grpc = if grpc { header("grpc-timeout").and_then(|value| timeout::grpc_timeout(&value)) } else { None };
    let of_envoy = header("x-envoy-expected-rq-timeout-ms").and_then(|value| timeout::envoy_timeout_ms(&value));
    of_grpc.into_iter().chain(of_envoy).min().unwrap_or(Duration::MAX)
}

fn malformed(terms: Terms, detail: String) -> Intake {
    Intake::Reject(terms, Reject::Malformed { detail })
}

/// Turns what is wanted into what is asked of the table, within the policy's limits.
pub fn wants(
    policy: &Policy,
    wanted: Vec<Wanted>,
    patience: Duration,
    owner: &OwnerId,
    principal: impl Fn() -> Option<Vec<u8>>,
) -> Result<Vec<Want>, Box<Reject>> {
    annotation::check_modes(&policy.classes, &wanted).map_err(|error| Box::new(error.into()))?;
    let wanted = annotation::merge(wanted, policy.defaults.mode);
    let most = policy.limits.locks_per_request;
    if let Some(first) = wanted.first()
        && wanted.len() > usize::try_from(most).unwrap_or(usize::MAX)
    {
        let cause = Cause::Limit { limit: Limit::LocksPerRequest, value: u64::from(most) };
        let mode = first.mode.unwrap_or(policy.defaults.mode);
        let refusal = Refusal { lock: first.name.clone(), mode, owner: owner.clone(), cause };
        return Err(Box::new(Reject::Core(refusal)));
    }
    for want in &wanted {
        if !policy.may_lock(want.name.class(), &principal) {
            return Err(Box::new(forbidden(&want.name, owner, principal())));
        }
    }
    let ask = |wanted| {
        let want = policy.ask(wanted);
        Want { wait: want.wait.min(patience), ..want }
    };
    Ok(wanted.into_iter().map(ask).collect())
}

fn forbidden(lock: &LockName, owner: &OwnerId, principal: Option<Vec<u8>>) -> Reject {
    let caller = principal.map_or_else(
        || String::from("a caller without a SPIFFE ID"),
        |id| String::from_utf8_lossy(&id).escape_default().to_string(),
    );
    let detail = format!("{caller} may not lock class {}", lock.class());
    Reject::Forbidden { detail, lock: Some(lock.clone()), owner: Some(owner.clone()) }
}
