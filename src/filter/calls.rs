//! Requests to the lease API: collects their bodies, parks those that wait, answers them all.
//!
//! What a request means is read in [`crate::api`]; what it does to the table is decided in the core. A request whose body
//! is needed can only be read where the filter is configured to let bodies come while headers wait
//! (`allow_on_headers_stop_iteration`).

use std::rc::Rc;

use interlock_core::lease::{Answer as Given, End, Granted, Parked};
use interlock_core::{Cause, Duration, LockName, Refusal, Request, StoreError, Time};

use super::respond::Answer;
use super::{Active, Flow, Runtime, fences, intake, report};
use crate::answer::{Reject, headers};
use crate::api::body::{self, Conflict};
use crate::api::call::{LeaseName, Put, Renew};
use crate::api::{ApiError, MAX_BODY, Target, receipt};
use crate::backend::Purpose;
use crate::backend::local::Local;
use crate::host::{ContextId, Fields, Headers, Host};
use crate::policy::{Api, MIN_TTL, Reentrancy};

/// How long the body of a request may take to come.
const PATIENCE: Duration = Duration::from_secs(10);

/// The most edges that a graph is drawn with.
const MOST_EDGES: usize = 10_000;

const JSON: &str = "application/json";
const PROBLEM: &str = "application/problem+json";

/// A request to the API under way.
pub(super) struct Call {
    /// The configuration that it came in under.
    active: Rc<Active>,
    /// The table that it is about.
    purpose: Purpose,
    state: State,
    /// When it has to be looked at, if nothing happens before.
    timer: Option<Time>,
}

enum State {
    /// Its body has not all come.
    Body(Target),
    /// It waits for a lease.
    Parked { name: LeaseName, parked: Parked, asked_by: String },
    /// It has its answer.
    Answered,
}

impl Runtime {
    /// The headers of a request, if it is one to the API; none for any other.
    pub(super) fn call(
        &mut self,
        host: &dyn Host,
        id: ContextId,
        active: &Rc<Active>,
        api: &Api,
        fields: &Fields,
        end: bool,
    ) -> Option<Flow> {
        let rest = api.rest(fields.first(":path").unwrap_or_default())?;
        // The same calls on the shadow table are for proxies under audit.
        let (purpose, rest) = match rest.strip_prefix(b"audit/") {
            Some(rest) => (Purpose::Audit, rest),
            None => (Purpose::Enforce, rest),
        };
        let answer = match Target::read(fields.first(":method").unwrap_or_default(), rest) {
            Ok(target) if target.has_body() && !end => {
                let due = Some(host.now() + PATIENCE);
                self.keep(id, Call { active: Rc::clone(active), purpose, state: State::Body(target), timer: due });
                return Some(Flow::Stop);
            }
            Ok(target) => self.serve(host, id, (active, purpose), target, &[]),
            Err(error) => Some(problem(&error)),
        };
        self.reply(host, id, (active, purpose), answer);
        Some(Flow::Stop)
    }

    /// A part of the body of a request to the API.
    pub(super) fn call_body(&mut self, host: &dyn Host, id: ContextId, size: usize, end: bool) -> Flow {
        let Some(call) = self.drop_call(id) else { return Flow::Stop };
        let Call { active, purpose, state: State::Body(target), timer } = call else {
            self.keep(id, call);
            return Flow::Stop;
        };
        let answer = if size > MAX_BODY {
            Some(problem(&ApiError::TooLarge))
        } else if !end {
            self.keep(id, Call { active, purpose, state: State::Body(target), timer });
            return Flow::Stop;
        } else {
            // One byte more than is allowed tells what is too long from what just fits.
            match host.request_body(MAX_BODY + 1) {
                Ok(bytes) => self.serve(host, id, (&active, purpose), target, &bytes),
                Err(error) => Some(problem(&ApiError::Malformed(format!("the body cannot be read: {error}")))),
            }
        };
        self.reply(host, id, (&active, purpose), answer);
        Flow::Stop
    }

    /// Looks after a request to the API: one that may have been granted, or whose time is up. From a callback of a root.
    pub(super) fn look_after_call(&mut self, host: &dyn Host, id: ContextId) {
        let Some(Call { active, purpose, state, .. }) = self.drop_call(id) else { return };
        let answer = match state {
            State::Parked { name, parked, asked_by } => {
                let table = self.table(host, &active, purpose);
                let given = table.and_then(|local| local.poll_parked(host, &active.rules, parked));
                self.deliver(host, purpose);
                self.given(host, id, (&active, purpose), name, asked_by, given)
            }
            State::Body(_) => Some(late()),
            State::Answered => None,
        };
        let Some(answer) = answer else { return };
        self.keep(id, Call { active: Rc::clone(&active), purpose, state: State::Answered, timer: None });
        let sent = host.within(id, |host| answer.send(host));
        // The host has no such stream any more, and will say nothing of its end.
        if !matches!(sent, Ok(Ok(()))) {
            self.call_ended(host, id);
        }
    }

    /// The stream of a request to the API has ended.
    pub(super) fn call_ended(&mut self, host: &dyn Host, id: ContextId) {
        let Some(call) = self.drop_call(id) else { return };
        let Call { active, purpose, state: State::Parked { parked, .. }, .. } = call else { return };
        if let Ok(local) = self.table(host, &active, purpose) {
            local.leave(host, &active.rules, parked);
        }
        self.deliver(host, purpose);
    }

    /// The table that a call is about. That of audits is opened by the first call for it.
    fn table(&mut self, host: &dyn Host, active: &Active, purpose: Purpose) -> Result<&mut Local, StoreError> {
        let local = self.backends.open_local(host, &active.policy.instance, purpose);
        local.map_err(|error| StoreError::Failed(error.to_string()))
    }

    /// Remembers a refusal that people will want to look at, where they can.
    pub(super) fn remember(&mut self, host: &dyn Host, refusal: &Refusal, asked_by: &str) {
        if self.active.policy.api.is_none() {
            return;
        }
        let (cycle, held) = match &refusal.cause {
            Cause::Deadlock { cycle } => (cycle.as_slice(), None),
            Cause::OrderViolation { held } => (&[][..], Some(held.to_string())),
            _ => return,
        };
        let conflict = Conflict {
            at_unix_ms: host.unix_micros() / 1000,
            reason: refusal.cause.slug().to_owned(),
            owner: refusal.owner.to_string(),
            lock: refusal.lock.to_string(),
            asked_by: asked_by.to_owned(),
            cycle: cycle.to_vec(),
            held,
        };
        if let Some(local) = self.backends.local(Purpose::Enforce) {
            local.remember(host, &conflict);
        }
    }

    /// Answers a request from a callback of its own stream, if there is an answer yet.
    fn reply(
        &mut self,
        host: &dyn Host,
        id: ContextId,
        (active, purpose): (&Rc<Active>, Purpose),
        answer: Option<Answer>,
    ) {
        if let Some(answer) = answer {
            self.keep(id, Call { active: Rc::clone(active), purpose, state: State::Answered, timer: None });
            if let Err(error) = answer.send(host) {
                report::trouble(host, active, &error);
            }
        }
        self.hurry(host);
    }

    /// Does what a request asks for. None where that has to wait.
    fn serve(
        &mut self,
        host: &dyn Host,
        id: ContextId,
        (active, purpose): (&Rc<Active>, Purpose),
        target: Target,
        bytes: &[u8],
    ) -> Option<Answer> {
        let api = active.policy.api.as_ref()?;
        if target.is_admin() {
            let authorization = host.header(Headers::Request, "authorization").ok().flatten();
            if !api.is_admin(intake::principal(host).as_deref(), authorization.as_deref()) {
                let detail = "this takes an administrator: by SPIFFE ID, or by token";
                let body = problem_body(403, "forbidden", "The caller may not do this", detail);
                return Some(Answer::api(403, PROBLEM, body, None));
            }
        }
        if let Err(error) = self.table(host, active, purpose) {
            return Some(unavailable(host, active, &error));
        }
        self.beat(host, purpose);
        let answer = match target {
            Target::Acquire(name) => match Put::read(bytes) {
                Ok(put) => return self.acquire(host, id, (active, purpose), name, put),
                Err(error) => Ok(problem(&error)),
            },
            Target::Renew => match Renew::read(bytes) {
                Ok(renew) => self.renew(host, active, purpose, &renew),
                Err(error) => Ok(problem(&error)),
            },
            other => self.simple(host, active, purpose, other),
        };
        self.deliver(host, purpose);
        Some(answer.unwrap_or_else(|error| unavailable(host, active, &error)))
    }

    /// Asks for a lease.
    fn acquire(
        &mut self,
        host: &dyn Host,
        id: ContextId,
        (active, purpose): (&Rc<Active>, Purpose),
        name: LeaseName,
        put: Put,
    ) -> Option<Answer> {
        let Put { owner, wanted, asked_by, receipt } = put;
        let policy = &active.policy;
        let caller = intake::principal(host);
        let asked_by = match (caller.as_deref().map(String::from_utf8_lossy), asked_by) {
            (Some(caller), Some(asked_by)) => format!("{caller} for {asked_by}"),
            (Some(caller), None) => caller.into_owned(),
            (None, Some(asked_by)) => asked_by,
            (None, None) => String::from("lease api"),
        };
        let wants = match intake::wants(policy, wanted, Duration::MAX, &owner, || caller.clone()) {
            Ok(wants) => wants,
            Err(reject) => return Some(refused(host, (active, purpose), &reject, &asked_by)),
        };
        let opened = match receipt {
            None => None,
            Some(text) => match receipt::open(&policy.keys, &text) {
                Some(receipt) => Some(receipt),
                None => {
                    return Some(problem(&ApiError::Malformed(String::from(
                        "receipt: is not one that this authority wrote",
                    ))));
                }
            },
        };
        let request = Request::new(name.id(), owner, host.now(), wants, &active.rules.classes)
            .reentrant(active.policy.reentrancy != Reentrancy::None)
            .asked_by(asked_by.clone());
        let table = self.table(host, active, purpose);
        let given = table.and_then(|local| local.put(host, &active.rules, request, opened.as_ref()));
        self.deliver(host, purpose);
        self.given(host, id, (active, purpose), name, asked_by, given)
    }

    /// The answer to a request for a lease, as the table gives it. None where it waits.
    fn given(
        &mut self,
        host: &dyn Host,
        id: ContextId,
        (active, purpose): (&Rc<Active>, Purpose),
        name: LeaseName,
        asked_by: String,
        given: Result<Given, StoreError>,
    ) -> Option<Answer> {
        let telemetry = &active.telemetry;
        Some(match given {
            Ok(Given::Granted { granted, new }) => {
                if new {
                    for grant in granted.grants.iter().filter(|grant| grant.asked) {
                        match purpose {
                            Purpose::Enforce => telemetry.acquired(host, grant.name.class(), granted.waited),
                            Purpose::Audit => telemetry.audit(host, grant.name.class(), "acquired", ""),
                        }
                    }
                }
                told(active, &name, &granted, if new { 201 } else { 200 })
            }
            Ok(Given::Parked(parked)) => {
                let due = self.next_look(parked.poll_at(), host.now());
                let state = State::Parked { name, parked, asked_by };
                self.keep(id, Call { active: Rc::clone(active), purpose, state, timer: Some(due) });
                return None;
            }
            Ok(Given::Refused(refusal)) => {
                if purpose == Purpose::Enforce {
                    self.remember(host, &refusal, &asked_by);
                }
                refused(host, (active, purpose), &Reject::Core(*refusal), &asked_by)
            }
            Ok(Given::Over(end)) => conflict("lease-lost", "The lease is over", over(end)),
            Ok(Given::Taken) => conflict(
                "lease-id-taken",
                "The lease id is taken",
                "it belongs to a lease of another owner, or of other locks",
            ),
            Err(error) => unavailable(host, active, &error),
        })
    }

    /// Renews leases, each for itself.
    fn renew(
        &mut self,
        host: &dyn Host,
        active: &Active,
        purpose: Purpose,
        renew: &Renew,
    ) -> Result<Answer, StoreError> {
        let policy = &active.policy;
        let ttl = renew.ttl.map(|ttl| ttl.clamp(MIN_TTL, policy.limits.max_ttl.max(MIN_TTL)));
        let mut results = Vec::with_capacity(renew.leases.len());
        for (name, receipt) in &renew.leases {
            // One that cannot be opened is as good as none.
            let receipt = receipt.as_deref().and_then(|text| receipt::open(&policy.keys, text));
            let table = self.table(host, active, purpose)?;
            let renewed = table.renew(host, &active.rules, name.id(), ttl, receipt.as_ref())?;
            results.push(body::RenewResult::new(name, renewed));
        }
        Ok(Answer::api(200, JSON, body::json(&body::Results { results }), None))
    }

    /// Serves what is answered at once and has no body.
    fn simple(
        &mut self,
        host: &dyn Host,
        active: &Active,
        purpose: Purpose,
        target: Target,
    ) -> Result<Answer, StoreError> {
        let (rules, local) = (&active.rules, self.table(host, active, purpose)?);
        let ok = |bytes: Vec<u8>| Answer::api(200, JSON, bytes, None);
        Ok(match target {
            Target::Release(name) => ok(body::json(&body::Status::from(local.delete(host, rules, name.id())?))),
            Target::Lease(name) => match local.get(host, rules, name.id())? {
                Some(granted) => {
                    let fences = fences::signed(host, &active.policy.keys, Some(&granted.owner), &granted.grants);
                    let receipt = receipt::seal(&active.policy.keys, &granted.receipt);
                    let lease = body::Lease::new(&name, &granted, receipt);
                    ok(body::json(&lease.with_fences(headers::lock_fence(&fences))))
                }
                None => problem(&ApiError::NotFound(String::from("there is no such lease, or it is over"))),
            },
            Target::Locks { from, limit } => {
                let (queues, next) = local.locks(host, rules, from, limit)?;
                let view = |queue| body::LockView::new(queue, local.sessions(), host.now());
                ok(body::json(&body::Locks { locks: queues.iter().map(view).collect(), next }))
            }
            Target::Lock(name) => {
                let queue = local.lock(host, rules, &name)?;
                let left = local.grace_left(host, rules)?;
                ok(body::json(&body::LockView::new(&queue, local.sessions(), host.now()).in_grace(left)))
            }
            Target::Break(name) => {
                let ended = local.break_glass(host, rules, &name)?;
                report::broken(host, active, &name, &ended);
                ok(body::json(&body::Broken { ended: ended.iter().map(body::BrokenGrant::from).collect() }))
            }
            Target::Graph => {
                let (edges, truncated) = local.edges(host, rules, MOST_EDGES)?;
                let graph = body::Graph { edges, truncated };
                let accept = host.header_list(Headers::Request, "accept").ok().flatten().unwrap_or_default();
                if String::from_utf8_lossy(&accept).contains("text/vnd.graphviz") {
                    Answer::api(200, "text/vnd.graphviz; charset=utf-8", graph.dot().into_bytes(), None)
                } else {
                    ok(body::json(&graph))
                }
            }
            Target::Deadlocks => ok(body::json(&body::Conflicts { deadlocks: local.remembered(host)? })),
            Target::Health => {
                let left = local.grace_left(host, rules)?;
                if left.is_zero() {
                    ok(body::json(&body::Health { status: "ok", instance: &active.policy.instance }))
                } else {
                    let detail = format!(
                        "it has just started and grants nothing for another {}, so that leases from before can be renewed",
                        body::millis(left)
                    );
                    let bytes = problem_body(503, "backend-unavailable", "The lock table has just started", &detail);
                    Answer::api(503, PROBLEM, bytes, Some(left.as_secs() + 1))
                }
            }
            // Those with a body are served elsewhere.
            Target::Acquire(_) | Target::Renew => problem(&ApiError::Malformed(String::from("the body is missing"))),
        })
    }

    fn keep(&mut self, id: ContextId, call: Call) {
        if let State::Parked { parked, .. } = &call.state
            && parked.drives()
        {
            self.leases.insert((call.purpose, parked.lease()), id);
        }
        self.timers.extend(call.timer.map(|timer| (timer, id)));
        self.calls.insert(id, call);
    }

    fn drop_call(&mut self, id: ContextId) -> Option<Call> {
        let call = self.calls.remove(&id)?;
        if let Some(timer) = call.timer {
            self.timers.remove(&(timer, id));
        }
        if let State::Parked { parked, .. } = &call.state
            && parked.drives()
        {
            self.leases.remove(&(call.purpose, parked.lease()));
        }
        Some(call)
    }
}

/// A lease, told to its holder.
fn told(active: &Active, name: &LeaseName, granted: &Granted, status: u16) -> Answer {
    let receipt = receipt::seal(&active.policy.keys, &granted.receipt);
    Answer::api(status, JSON, body::json(&body::Lease::new(name, granted, receipt)), None)
}

/// The answer to what the lock manager, or the policy, refuses: counted, and told to the log.
fn refused(host: &dyn Host, (active, purpose): (&Active, Purpose), reject: &Reject, asked_by: &str) -> Answer {
    match purpose {
        Purpose::Enforce => report::refused_lease(host, active, reject, asked_by),
        Purpose::Audit => {
            let class = reject.lock().map_or("", LockName::class);
            active.telemetry.audit(host, class, "refused", reject.slug());
        }
    }
    Answer::api(reject.http_status(), PROBLEM, reject.problem_json(), reject.retry_after_seconds())
}

/// The answer to what is wrong with the request itself.
fn problem(error: &ApiError) -> Answer {
    let title = match error {
        ApiError::NotFound(_) => "There is no such thing",
        ApiError::Method { .. } => "It cannot be called so",
        ApiError::TooLarge => "The body is too long",
        ApiError::Malformed(_) => "The request is wrong",
    };
    let body = problem_body(error.status(), error.slug(), title, &error.to_string());
    let answer = Answer::api(error.status(), PROBLEM, body, None);
    match error {
        ApiError::Method { allow } => answer.and("allow", allow),
        _ => answer,
    }
}

fn conflict(slug: &str, title: &'static str, detail: &str) -> Answer {
    Answer::api(409, PROBLEM, problem_body(409, slug, title, detail), None)
}

fn late() -> Answer {
    let detail = "the body did not come; the filter reads bodies only with allow_on_headers_stop_iteration: true";
    Answer::api(408, PROBLEM, problem_body(408, "body-missing", "The body did not come", detail), None)
}

fn unavailable(host: &dyn Host, active: &Active, error: &StoreError) -> Answer {
    report::backend(host, active, error);
    let body = problem_body(503, "backend-unavailable", "The lock table did not answer", &error.to_string());
    Answer::api(503, PROBLEM, body, Some(1))
}

fn problem_body(status: u16, slug: &str, title: &'static str, detail: &str) -> Vec<u8> {
    body::json(&body::Problem { kind: format!("urn:interlock:problem:{slug}"), title, status, detail })
}

/// How a lease ended, to one who asks for it.
fn over(end: End) -> &'static str {
    match end {
        End::Refused => "it was refused before; a lease is asked for once",
        End::Cancelled => "it was cancelled, perhaps before it was asked for, or who waited for it has gone",
        End::Released => "it was given back",
        End::Expired => "it ended by its ttl or its hold limit, or was taken away",
    }
}
