//! Guarded requests whose authority is asked who holds the lock: parked until the answer comes, or under audit upstream already.
//!
//! The call is the stream's own, since an answer that comes to nobody is no loss. What never gets an answer is given up by
//! its time.

use std::rc::Rc;
use std::sync::Arc;

use interlock_core::{Cause, Time};

use super::guard::{Claim, Passage, conclude};
use super::intake::Intake;
use super::respond::Answer;
use super::stream::{Case, Ended, State, Stream};
use super::{Flow, Runtime, report};
use crate::answer::Reject;
use crate::answer::headers::FenceMember;
use crate::api::told::Held;
use crate::backend::authority::look::{self, Unknown};
use crate::host::{CallToken, ContextId, Host};
use crate::policy::Authority;

/// A question that was sent, and when it is given up.
pub type Sent = (CallToken, Time);

/// A guarded request that an answer is needed for.
#[derive(Debug)]
pub struct Question {
    /// The request, as its guard sees it.
    pub case: Case,
    claim: Claim,
    sent: Sent,
    /// What it asks for once it has passed, and the fences that it brings along; none where it has gone on already.
    parked: Option<(Intake, Vec<FenceMember>)>,
}

impl Question {
    /// A question about that claim.
    pub fn new(case: Case, claim: Claim, sent: Sent) -> Self {
        Question { case, claim, sent, parked: None }
    }
}

/// Asks who holds the lock of a claim, from the callback of its stream.
///
/// # Errors
/// The refusal of the request, where the host does not send it.
pub fn ask(host: &dyn Host, at: &Arc<Authority>, claim: &Claim) -> Result<Sent, Reject> {
    match look::ask(host, at, &claim.lock) {
        Ok(token) => Ok((token, host.now() + look::patience(at))),
        Err(_) => Err(claim.refused(Cause::Backend { detail: Unknown::UNSENT.detail.into() })),
    }
}

impl Runtime {
    /// Keeps a question until its answer comes. `parked`: what the request waits with, if it does.
    pub(super) fn keep_question(
        &mut self,
        host: &dyn Host,
        id: ContextId,
        mut question: Question,
        parked: Option<(Intake, Vec<FenceMember>)>,
    ) {
        let (token, due) = question.sent;
        question.parked = parked;
        self.asked.insert(token, id);
        self.timers.insert((due, id));
        self.questions.insert(id, question);
        self.hurry(host);
    }

    /// Takes out the question about a stream.
    pub(super) fn take_question(&mut self, id: ContextId) -> Option<Question> {
        let question = self.questions.remove(&id)?;
        let (token, due) = question.sent;
        self.asked.remove(&token);
        self.timers.remove(&(due, id));
        Some(question)
    }

    /// Whether the answer to the question about a stream should have come by now.
    pub(super) fn is_question_due(&self, id: ContextId, now: Time) -> bool {
        self.questions.get(&id).is_some_and(|question| question.sent.1 <= now)
    }

    /// Whether a stream is parked before its guard.
    pub(super) fn is_questioned(&self, id: ContextId) -> bool {
        self.questions.get(&id).is_some_and(|question| question.parked.is_some())
    }

    /// The answer to a call has come, from a callback of a root. False where it is not to a question of a guard.
    pub(super) fn question_answered(&mut self, host: &dyn Host, token: CallToken, headers: usize) -> bool {
        let Some(id) = self.asked.get(&token).copied() else { return false };
        if let Some(question) = self.take_question(id) {
            let told = look::answer(host, headers, &question.claim.lock);
            self.told(host, id, question, told);
        }
        true
    }

    /// A question has had no answer for so long that none will come. Only from callbacks of a root.
    pub(super) fn give_up_question(&mut self, host: &dyn Host, id: ContextId) {
        if let Some(question) = self.take_question(id) {
            self.told(host, id, question, Err(Unknown::UNANSWERED));
        }
    }

    /// Refuses a request that is parked before its guard, from a callback of its own stream.
    pub(super) fn abandon_question(&mut self, host: &dyn Host, id: ContextId, detail: &str) {
        let Some(Question { mut case, claim, .. }) = self.take_question(id) else { return };
        case.name_route(host);
        let reject = claim.refused(Cause::Backend { detail: detail.into() });
        report::turned_away(host, &case, &reject);
        let sent = Answer::refusal(&case, &reject, host.now().since(case.arrived)).send(host);
        self.put(host, id, Stream { case, state: State::Over(Ended::Answered), timer: None });
        if sent.is_err() {
            self.end(host, id);
        }
    }

    fn told(&mut self, host: &dyn Host, id: ContextId, question: Question, told: Result<Held, Unknown>) {
        let Question { case, claim, parked, .. } = question;
        report::took(host, &case.active, host.now().since(case.arrived));
        let judged = match told {
            Ok(Held { holders, grace }) => {
                let own = holders.into_iter().filter(|(holder, _)| *holder == claim.owner).map(|(_, fence)| fence);
                claim.judge(own.min(), grace.unwrap_or_default())
            }
            Err(unknown) => {
                report::call_failed(host, &case.active, unknown.reason);
                Err(claim.refused(Cause::Backend { detail: unknown.detail.into() }))
            }
        };
        let active = Rc::clone(&case.active);
        let done = host.within(id, |host| {
            let passage = conclude(host, case, claim.lock.class(), judged);
            let Some((intake, carried)) = parked else {
                self.note_late(host, id, passage);
                return Ok(());
            };
            match self.pass(host, id, &active, passage, intake, carried) {
                Flow::Continue => host.resume(),
                Flow::Stop => Ok(()),
            }
        });
        // The host has no such stream any more, and will say nothing of its end.
        if !matches!(done, Ok(Ok(()))) {
            self.end(host, id);
        }
    }

    /// Has the response of a request that is upstream say what its guard had against it.
    fn note_late(&mut self, host: &dyn Host, id: ContextId, passage: Passage) {
        let Passage::Noted(case, ended) = passage else { return };
        match self.streams.get_mut(&id) {
            Some(stream) => stream.case.guarded = Some(ended),
            None => self.put(host, id, Stream { case, state: State::Over(ended), timer: None }),
        }
    }
}
