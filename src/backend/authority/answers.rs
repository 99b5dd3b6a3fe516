//! The answers to calls, and what it means where none comes.

use std::collections::HashMap;
use std::rc::Rc;

use interlock_core::lease::{CallId, PutAnswer};
use interlock_core::{Cause, Duration, LeaseId, Loss, Refusal, Time, bug};

use super::wire::{self, Reply};
use super::{Authority, Renewal, WARM, What};
use crate::answer::Reject;
use crate::api::told::{self, Question, Told, Unusable};
use crate::host::{CallToken, ContextId, Host};

impl Authority {
    /// The answer to a call has come: it is read from the host. `headers`: how many it has.
    pub fn answered(&mut self, host: &dyn Host, token: CallToken, headers: usize) {
        let Some(sent) = self.drop_sent(token) else { return };
        let reply = wire::reply(host, headers);
        let now = host.now();
        self.warm_at = now + WARM;
        match sent.what {
            What::Put { call, stream, lease } => self.put_answered(host, sent.at, call, stream, lease, &reply),
            What::Renew { call, leases } => {
                let answers = self.renew_answered(&leases, &reply);
                if answers.is_some() {
                    self.notes.took.push(now.since(sent.at));
                }
                self.part_renewed(now, call, answers);
            }
            What::Delete { call } => {
                let done = match &reply {
                    Reply::Whole { status: 200, body, .. } => told::deleted(body).map_err(|error| error.reason()),
                    other => Err(failure(other)),
                };
                match done {
                    Ok(()) => {
                        self.notes.took.push(now.since(sent.at));
                        self.client.deleted(call);
                    }
                    Err(reason) => {
                        self.notes.failures.push(reason);
                        self.fail(now, call, None, "");
                    }
                }
            }
            What::Warm => {}
        }
        self.note();
    }

    fn put_answered(
        &mut self,
        host: &dyn Host,
        at: Time,
        call: CallId,
        stream: ContextId,
        lease: LeaseId,
        reply: &Reply,
    ) {
        let now = host.now();
        let Some(entry) = self.entries.get_mut(&stream).filter(|entry| entry.lease == lease) else {
            // Nobody waits for it any more. What it grants is given back.
            if matches!(reply, Reply::Whole { status: 200 | 201, .. }) {
                let (ttl, waited, grant) = (Duration::ZERO, Duration::ZERO, Rc::default());
                self.client.answered(now, call, PutAnswer::Granted { ttl, waited, grant });
            } else {
                self.fail(now, call, None, "");
            }
            return;
        };
        entry.own = None;
        let id = wire::spell(lease);
        let question = Question { id: &id, owner: &entry.wish.owner, locks: &entry.locks, ttl: entry.wish.ttl() };
        let refused = match reply {
            Reply::Whole { status: 200 | 201, body, .. } => match told::granted(body, &question) {
                Ok(granted) => {
                    // It cannot have been granted later than now, whatever it says.
                    let elapsed = now.since(at);
                    let waited = granted.waited.min(elapsed);
                    self.notes.took.push(elapsed.saturating_sub(waited));
                    for (lock, _, fence) in &granted.locks {
                        self.floors.saw(lock, *fence);
                    }
                    entry.failing = None;
                    let ttl = granted.ttl;
                    self.client_due = self.client_due.min(at + waited + ttl / 3);
                    let grant = Rc::new(granted);
                    return self.client.answered(now, call, PutAnswer::Granted { ttl, waited, grant });
                }
                Err(error) => Err(error),
            },
            Reply::Whole { status, problem: true, body } => {
                let waited = now.since(entry.wish.arrived);
                told::problem(*status, body, &question, waited)
            }
            other => {
                let reason = failure(other);
                // What cannot be told from an answer that was lost is asked again; what will be answered so again is not.
                let hopeless = matches!(other, Reply::Whole { .. }) || bug!(SilenceIsRefusal);
                self.notes.failures.push(reason);
                return self.put_failed(now, stream, call, hopeless, None, false, spell_failure(other));
            }
        };
        match refused {
            Ok(Told::Refused(reject)) => {
                let reject = in_vain(*reject, entry.wish.wait(), now.since(entry.wish.arrived));
                self.client.answered(now, call, PutAnswer::Refused(Box::new(reject)));
            }
            Ok(Told::Over) => {
                let waiting = entry.wish.waiting(self.number, stream);
                let why = Box::new(waiting.refusal(Cause::LeaseLost { loss: Loss::Expired }));
                match host.random() {
                    Ok(fresh) => {
                        let fresh = LeaseId(fresh);
                        entry.lease = fresh;
                        self.client.answered(now, call, PutAnswer::Over { fresh, why });
                    }
                    Err(_) => self.client.answered(now, call, PutAnswer::Refused(why)),
                }
            }
            Ok(Told::Away { retry_after, grace }) => {
                self.notes.failures.push("unavailable");
                let detail = "the lock authority cannot grant now";
                self.put_failed(now, stream, call, false, retry_after, grace, detail);
            }
            Err(error) => {
                self.notes.failures.push(error.reason());
                // An answer that was cut can come whole the next time; one that lies is not asked again.
                let hopeless = !matches!(error, Unusable::Malformed);
                self.put_failed(now, stream, call, hopeless, None, false, &error.to_string());
            }
        }
    }

    /// A request for a lease came to nothing that says anything of the lease. It is asked for again, for as long as an
    /// authority has to answer, unless that is hopeless.
    #[allow(clippy::too_many_arguments, reason = "all of it is about one failure")]
    pub(super) fn put_failed(
        &mut self,
        now: Time,
        stream: ContextId,
        call: CallId,
        hopeless: bool,
        retry_after: Option<Duration>,
        grace: bool,
        detail: &str,
    ) {
        let Some(entry) = self.entries.get_mut(&stream) else { return self.fail(now, call, None, detail) };
        let since = *entry.failing.get_or_insert(now);
        let enough = hopeless || now.since(since) >= self.at.timeout;
        let waiting = entry.wish.waiting(self.number, stream);
        let why = match retry_after.filter(|_| grace) {
            Some(left) => waiting.refusal(Cause::Grace { left }),
            None => waiting.unavailable(detail),
        };
        let retry_after = if enough { Some(Duration::MAX) } else { retry_after };
        self.client.failed(now, call, Box::new(why), retry_after);
        self.client_due = self.client.due();
    }

    /// What a renewal says of these leases; none where it says nothing.
    fn renew_answered(&mut self, leases: &[LeaseId], reply: &Reply) -> Option<Vec<(LeaseId, Option<Duration>)>> {
        let ttls: HashMap<String, Duration> = self
            .entries
            .values()
            .filter(|entry| leases.contains(&entry.lease))
            .map(|entry| (wire::spell(entry.lease), entry.wish.ttl()))
            .collect();
        let read = match reply {
            Reply::Whole { status: 200, body, .. } => {
                // Those that were given back meanwhile may be in it too.
                let known = |id: &str| {
                    let asked = wire::lease_of(id).is_some_and(|lease| leases.contains(&lease));
                    asked.then(|| ttls.get(id).copied().unwrap_or(Duration::MAX))
                };
                told::renewed(body, known).map_err(|error| error.reason())
            }
            other => Err(failure(other)),
        };
        match read {
            Ok(answers) => {
                Some(answers.into_iter().filter_map(|(id, left)| Some((wire::lease_of(&id)?, left))).collect())
            }
            Err(reason) => {
                self.notes.failures.push(reason);
                None
            }
        }
    }

    /// One message of a renewal has been answered, or will not be.
    pub(super) fn part_renewed(&mut self, now: Time, call: CallId, answers: Option<Vec<(LeaseId, Option<Duration>)>>) {
        let Some(renewal) = self.renewals.get_mut(&call) else { return };
        renewal.open = renewal.open.saturating_sub(1);
        renewal.answers.extend(answers.unwrap_or_default());
        if renewal.open > 0 {
            return;
        }
        let Renewal { answers, .. } = self.renewals.remove(&call).unwrap_or_default();
        if answers.is_empty() {
            return self.fail(now, call, None, "");
        }
        self.client.renewed(now, call, &answers);
        self.client_due = self.client.due();
    }

    /// A call failed of which no request is told.
    pub(super) fn fail(&mut self, now: Time, call: CallId, retry_after: Option<Duration>, detail: &str) {
        let why = Reject::Malformed { detail: detail.to_owned() };
        self.client.failed(now, call, Box::new(why), retry_after);
        self.client_due = self.client.due();
    }

    /// Nobody will be told of the answer to a call.
    pub(super) fn give_up(&mut self, now: Time, token: CallToken) {
        let Some(sent) = self.drop_sent(token) else { return };
        match sent.what {
            What::Put { call, stream, lease } => {
                let current = self.entries.get(&stream).is_some_and(|entry| entry.lease == lease);
                if current {
                    let detail = "the lock authority did not answer";
                    self.put_failed(now, stream, call, false, None, false, detail);
                } else {
                    self.fail(now, call, None, "");
                }
            }
            What::Renew { call, .. } => self.part_renewed(now, call, None),
            What::Delete { call } => self.fail(now, call, None, ""),
            What::Warm => {}
        }
    }
}

/// A try for which no time was left does not wait, and is told that the lock is held. Its caller had time, and has waited in vain.
fn in_vain(reject: Reject, wait: Duration, waited: Duration) -> Reject {
    match reject {
        Reject::Core(Refusal { cause: Cause::Held { holders, retry_after }, lock, mode, owner }) if !wait.is_zero() => {
            let cause = Cause::WaitTimeout { holders, waited, retry_after };
            Reject::Core(Refusal { lock, mode, owner, cause })
        }
        other => other,
    }
}

/// How a call failed, in one word for metrics.
fn failure(reply: &Reply) -> &'static str {
    match reply {
        Reply::Whole { .. } => "status",
        Reply::Timeout => "timeout",
        Reply::None => "unreachable",
    }
}

fn spell_failure(reply: &Reply) -> &'static str {
    match reply {
        Reply::Whole { .. } => "the lock authority gave an answer that is none of the lease API's",
        Reply::Timeout => "the lock authority did not answer in time",
        Reply::None => "the lock authority cannot be reached",
    }
}
