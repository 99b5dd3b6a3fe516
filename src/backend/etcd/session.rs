//! The VM's session: the etcd lease that all its keys hang on, the signs of life that keep it, and the token that lets it in.
//!
//! It is opened by the first request that needs it, and closed when nothing has needed it for a while. It is believed in only
//! as long as etcd must believe in it: etcd counts from some moment after a sign of life was sent, so here it counts from the
//! sending.

use std::collections::VecDeque;

use interlock_core::{Duration, Time};
use prost::Message;

use super::proto::{AuthenticateRequest, AuthenticateResponse, LeaseGrantRequest, LeaseGrantResponse, LeaseRequest};
use super::trouble::Trouble;
use super::wire::{Opened, What};
use super::{Etcd, PAUSE};
use crate::host::Host;
use crate::policy::{Access, Etcd as At};

/// How long a session is kept that nothing hangs on.
const KEPT: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, Debug)]
enum State {
    /// None, and none is asked for before then.
    Closed { again_at: Time },
    /// A token, or a lease, is asked for.
    Opening,
    /// It lives, until then if nothing more is heard of it.
    Open { id: i64, ttl: Duration, until: Time },
}

/// See the module.
#[derive(Debug)]
pub struct Session {
    state: State,
    token: Option<String>,
    /// Whether a token is asked for.
    logging_in: bool,
    /// Why it could not be opened, the last time.
    pub(super) trouble: Option<Trouble>,
    /// What signs of life go over.
    pub(super) stream: Option<Opened>,
    /// When the signs were sent that are not answered.
    signs: VecDeque<Time>,
    next_sign: Time,
    /// Since when nothing hangs on it.
    idle_since: Option<Time>,
}

impl Default for Session {
    fn default() -> Self {
        Session {
            state: State::Closed { again_at: Time::ZERO },
            token: None,
            logging_in: false,
            trouble: None,
            stream: None,
            signs: VecDeque::new(),
            next_sign: Time::NEVER,
            idle_since: None,
        }
    }
}

impl Session {
    /// The etcd lease, if it can be relied on now.
    pub fn id(&self, now: Time) -> Option<i64> {
        match self.state {
            State::Open { id, until, .. } if now < until => Some(id),
            _ => None,
        }
    }

    /// The etcd lease, whether or not it can be relied on.
    pub fn any(&self) -> Option<i64> {
        match self.state {
            State::Open { id, .. } => Some(id),
            State::Closed { .. } | State::Opening => None,
        }
    }

    /// The token to show.
    pub fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    /// The token is no longer good.
    pub fn forget_token(&mut self) {
        self.token = None;
    }

    /// When something has to be done about it.
    pub fn due(&self, at: &At) -> Time {
        match self.state {
            State::Open { until, .. } => {
                let silent = self.signs.front().map_or(Time::NEVER, |sign| *sign + at.timeout);
                let idle = self.idle_since.map_or(Time::NEVER, |since| since + KEPT);
                until.min(self.next_sign).min(silent).min(idle)
            }
            State::Closed { .. } | State::Opening => Time::NEVER,
        }
    }

    /// The etcd lease, if it is time for a sign of life.
    pub fn keeps(&self, now: Time, at: &At) -> Option<i64> {
        // Where etcd asks for a token there is one first.
        let known = self.token.is_some() || !matches!(at.access, Access::User { .. });
        self.id(now).filter(|_| known && self.next_sign <= now)
    }

    /// A sign of life was sent.
    pub fn kept(&mut self, now: Time) {
        let State::Open { ttl, .. } = self.state else { return };
        self.signs.push_back(now);
        self.next_sign = now + ttl / 3;
    }

    /// The stream of signs has gone.
    pub fn stream_lost(&mut self, now: Time) {
        self.stream = None;
        self.signs.clear();
        self.next_sign = now + PAUSE * 4;
    }

    /// The stream of signs has gone with its root: nothing is wrong with etcd.
    pub fn stream_gone(&mut self, now: Time) {
        self.stream_lost(now);
        self.next_sign = now;
    }

    /// A sign of life was answered. True if etcd says that the lease has ended.
    pub fn answered(&mut self, answered: i64, seconds: i64) -> bool {
        let State::Open { id, ttl, until } = self.state else { return false };
        if answered != id {
            return false;
        }
        let Some(sent) = self.signs.pop_front() else { return false };
        let Some(lives) = u64::try_from(seconds).ok().filter(|lives| *lives > 0) else { return true };
        self.state = State::Open { id, ttl, until: until.max(sent + Duration::from_secs(lives)) };
        false
    }
}

impl Etcd {
    /// Whether requests can go on; does what is needed for it otherwise.
    pub(super) fn is_ready(&mut self, host: &dyn Host, now: Time) -> bool {
        self.session.idle_since = None;
        let user = match &self.at.access {
            Access::User { name, password } if self.session.token.is_none() => {
                Some((name.clone(), password.to_string()))
            }
            _ => None,
        };
        if user.is_none() && self.session.id(now).is_some() {
            return true;
        }
        match (self.session.state, user) {
            (State::Opening, _) => {}
            (State::Closed { again_at }, _) if now < again_at => {}
            // A session that lives goes on living meanwhile.
            (State::Open { .. } | State::Closed { .. }, Some(_)) if self.session.logging_in => {}
            (State::Open { .. } | State::Closed { .. }, Some((name, password))) => {
                self.session.logging_in = true;
                self.send(host, now, &AuthenticateRequest { name, password }, What::Login, None);
            }
            (State::Open { .. } | State::Closed { .. }, None) => self.open_session(host, now),
        }
        false
    }

    fn open_session(&mut self, host: &dyn Host, now: Time) {
        let Ok(random) = host.random() else { return self.not_opened(now, Trouble::Dispatch) };
        // Any positive number that nobody else has.
        let id = i64::try_from(random & 0x7fff_ffff_ffff_ffff).unwrap_or(1).max(1);
        let ttl = i64::try_from(self.at.session_ttl.as_secs()).unwrap_or(i64::MAX);
        self.session.state = State::Opening;
        self.send(host, now, &LeaseGrantRequest { ttl, id }, What::Open { id }, None);
    }

    /// etcd has given a token.
    pub(super) fn logged_in(&mut self, host: &dyn Host, now: Time, bytes: &[u8]) {
        self.session.logging_in = false;
        match AuthenticateResponse::decode(bytes) {
            Ok(response) if !response.token.is_empty() => {
                self.session.token = Some(response.token);
                if self.session.id(now).is_some() {
                    self.begin_all(host, now);
                } else {
                    self.open_session(host, now);
                }
            }
            _ => self.not_opened(now, Trouble::Malformed),
        }
    }

    /// etcd has made the lease that it was asked for at the first of these moments.
    pub(super) fn opened(&mut self, host: &dyn Host, (asked, now): (Time, Time), id: i64, bytes: &[u8]) {
        let granted = LeaseGrantResponse::decode(bytes).ok().filter(|granted| granted.id == id);
        let Some(ttl) = granted.and_then(|granted| u64::try_from(granted.ttl).ok()).filter(|ttl| *ttl > 0) else {
            return self.not_opened(now, Trouble::Malformed);
        };
        let ttl = Duration::from_secs(ttl);
        self.session.state = State::Open { id, ttl, until: asked + ttl };
        self.session.trouble = None;
        self.session.next_sign = asked + ttl / 3;
        self.session.signs.clear();
        self.begin_all(host, now);
    }

    /// There is no session yet.
    pub(super) fn not_opened(&mut self, now: Time, trouble: Trouble) {
        self.session.trouble = Some(trouble);
        self.session.logging_in = false;
        if !matches!(self.session.state, State::Open { .. }) {
            self.session.state = State::Closed { again_at: now + PAUSE };
        }
        self.hold_all(now, trouble);
    }

    /// The lease has ended, or cannot be relied on: so has all that hangs on it.
    pub(super) fn session_lost(&mut self, host: &dyn Host, now: Time) {
        let State::Open { id, .. } = self.session.state else { return };
        self.session.state = State::Closed { again_at: now };
        self.session.signs.clear();
        // Should it live after all, nobody is to wait for what hangs on it.
        self.send(host, now, &LeaseRequest { id }, What::Close, None);
        self.debts.clear();
        self.all_lost(host, now);
    }

    /// Keeps the session, ends it, or finds that it has ended.
    pub(super) fn keep_session(&mut self, host: &dyn Host, now: Time) {
        let State::Open { id, until, .. } = self.session.state else { return };
        if until <= now {
            self.notes.failures.push("session-lost");
            return self.session_lost(host, now);
        }
        if self.session.signs.front().is_some_and(|sign| *sign + self.at.timeout <= now) {
            self.note(Trouble::NoAnswer);
            self.drop_silent(host);
            self.session.stream_gone(now);
        }
        if !self.is_idle() {
            // Where the token is gone, signs of life wait for another.
            self.is_ready(host, now);
            return;
        }
        let since = *self.session.idle_since.get_or_insert(now);
        if now >= since + KEPT {
            self.close_streams(host);
            let token = self.session.token.take();
            self.session = Session { token, ..Session::default() };
            self.send(host, now, &LeaseRequest { id }, What::Close, None);
        }
    }
}
