//! Mutual exclusion and fences, judged from both ends: the upstream says when a request was inside, the caller says how
//! the request ended. Neither is enough alone, since an upstream learns late, or never, that a request it still works for
//! has lost its locks.
//!
//! The judgement is sound: it is passed only on the time for which a lock *must* have been held. That time begins when
//! the request reaches the upstream and ends
//!
//! - with its stay, where the answer came from the upstream (or the upstream itself broke it off): the proxy had not
//!   ended the stream before;
//! - at the moment until which the lock was held at least, where the proxy or the caller ended it: a caller that left
//!   held on until it left, one that lost its lease to the hold limit had had it for that long.
//!
//! What lies behind that moment is the lag of the upstream, and is counted as [`Tally::excused`] where it overlaps.
//!
//! Pure: moments come in from outside. No HTTP here, and nothing of the plugin's own code.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// For how long what a caller said is kept for a request that has not reached the upstream, and may still be on its way.
const MEMORY: Duration = Duration::from_secs(30);

/// One lock that a request holds according to the `lock-fence` that the upstream got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// The lock.
    pub lock: String,
    /// Its fence.
    pub fence: u64,
    /// Its mode.
    pub mode: Mode,
}

/// The modes of locks, written out here so that they can't share a mistake with the core's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Exclusive,
    Shared,
    IntentShared,
    IntentExclusive,
    SharedIntentExclusive,
}

use Mode::{Exclusive, IntentExclusive, IntentShared, Shared, SharedIntentExclusive};

impl Mode {
    /// The mode of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "exclusive" => Exclusive,
            "shared" => Shared,
            "intent-shared" => IntentShared,
            "intent-exclusive" => IntentExclusive,
            "shared-intent-exclusive" => SharedIntentExclusive,
            _ => return None,
        })
    }

    /// Gray's matrix, cell by cell.
    pub fn compatible(self, other: Mode) -> bool {
        match self {
            IntentShared => matches!(other, IntentShared | IntentExclusive | Shared | SharedIntentExclusive),
            IntentExclusive => matches!(other, IntentShared | IntentExclusive),
            Shared => matches!(other, IntentShared | Shared),
            SharedIntentExclusive => matches!(other, IntentShared),
            Exclusive => false,
        }
    }

    /// What a lock in this mode needs on its ancestors.
    fn intent(self) -> Mode {
        match self {
            IntentShared | Shared => IntentShared,
            _ => IntentExclusive,
        }
    }
}

/// How a request ended, as its caller knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The upstream ended it, by an answer or by breaking off.
    Upstream,
    /// It was ended on the way. Its locks were held until this moment at least.
    Cut(Instant),
    /// It was refused before it was let through, and must never have reached the upstream.
    Refused,
}

/// What there was to judge.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    /// Requests with locks that were inside the upstream.
    pub sections: u64,
    /// Those of which the whole stay was judged.
    pub whole: u64,
    /// Those that were ended on the way: judged up to the moment until which they must have held their locks.
    pub cut: u64,
    /// Conflicting requests seen inside together, of which one was known to be cut by then.
    pub excused: u64,
    /// Pairs of conflicting requests that were found to be one after the other, as they should.
    pub ordered: u64,
}

/// What went wrong: how often, and the first in words.
#[derive(Debug, Default)]
pub struct Violations {
    pub count: u64,
    pub first: Vec<String>,
}

impl Violations {
    /// One more.
    pub fn push(&mut self, what: String) {
        self.count += 1;
        // When everything is wrong, the rest says nothing new.
        if self.first.len() < 100 {
            self.first.push(what);
        }
    }
}

/// The book of all requests.
#[derive(Debug, Default)]
pub struct Ledger {
    permits: HashMap<String, usize>,
    hierarchies: Vec<String>,
    requests: HashMap<u64, Request>,
    locks: HashMap<String, Lock>,
    violations: Violations,
    tally: Tally,
    swept: Option<Instant>,
}

#[derive(Debug, Default)]
struct Request {
    owner: String,
    about: String,
    verdict: Option<(Verdict, Instant)>,
    stay: Option<Stay>,
}

#[derive(Debug)]
struct Stay {
    grants: Vec<Grant>,
    entered: Instant,
    /// When it ended, and whether the upstream ended it.
    left: Option<(Instant, bool)>,
}

/// The past and the present of one lock.
#[derive(Debug, Default)]
struct Lock {
    /// Those inside of whom it is not known yet how long they held: when they entered.
    open: HashMap<u64, Instant>,
    /// Those judged that may still overlap with one that is open.
    done: Vec<Section>,
    /// The highest fences among those judged and forgotten: of any, and of exclusive ones.
    highest: Option<(u64, String)>,
    highest_exclusive: Option<(u64, String)>,
}

/// A time for which a lock was held for certain.
#[derive(Debug, Clone)]
struct Section {
    request: u64,
    owner: String,
    about: String,
    mode: Mode,
    /// None for an intent that the header does not list.
    fence: Option<u64>,
    from: Instant,
    held_to: Instant,
    /// When the upstream noticed the end: never before `held_to`.
    seen_to: Instant,
}

impl Ledger {
    /// A lock of this class may be held so many times at once.
    pub fn permits(mut self, class: &str, permits: usize) -> Self {
        self.permits.insert(class.to_owned(), permits);
        self
    }

    /// Locks of this class hold intents on their ancestors.
    pub fn hierarchy(mut self, class: &str) -> Self {
        self.hierarchies.push(class.to_owned());
        self
    }

    /// A request of `owner` is about to be sent; `about` names it in a violation.
    pub fn sent(&mut self, id: u64, owner: &str, about: &str) {
        let request = Request { owner: owner.to_owned(), about: about.to_owned(), ..Request::default() };
        self.requests.insert(id, request);
    }

    /// It reached the upstream with these grants.
    pub fn entered(&mut self, id: u64, mut grants: Vec<Grant>, now: Instant) {
        self.imply_intents(&mut grants);
        let Some(request) = self.requests.get_mut(&id) else {
            // Its caller left long ago; there is nothing to hold against it.
            return;
        };
        if let Some((Verdict::Refused, _)) = request.verdict {
            self.violations.push(format!("{}: refused, and yet it reached the upstream", request.about));
        }
        if request.stay.is_some() {
            self.violations.push(format!("{}: reached the upstream twice", request.about));
            return;
        }
        self.tally.sections += u64::from(!grants.is_empty());
        for grant in &grants {
            self.locks.entry(grant.lock.clone()).or_default().open.insert(id, now);
        }
        request.stay = Some(Stay { grants, entered: now, left: None });
    }

    /// Its stay at the upstream is over; `by_upstream`: because the upstream was done with it, else because the other side
    /// went away.
    pub fn left(&mut self, id: u64, by_upstream: bool, now: Instant) {
        if let Some(stay) = self.requests.get_mut(&id).and_then(|request| request.stay.as_mut()) {
            stay.left.get_or_insert((now, by_upstream));
            self.judge(id);
        }
    }

    /// Its caller knows how it ended.
    pub fn ended(&mut self, id: u64, verdict: Verdict, now: Instant) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        if verdict == Verdict::Refused && request.stay.is_some() {
            self.violations.push(format!("{}: refused, and yet it reached the upstream", request.about));
        }
        request.verdict.get_or_insert((verdict, now));
        self.judge(id);
        self.forget(now);
    }

    /// Something is wrong that was found elsewhere.
    pub fn violation(&mut self, what: String) {
        self.violations.push(what);
    }

    /// What went wrong so far.
    pub fn violations(&self) -> &Violations {
        &self.violations
    }

    /// What there was to judge so far.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Requests of which one end has not been heard yet, though they were inside.
    pub fn undecided(&self) -> usize {
        self.requests.values().filter(|r| r.stay.is_some() && (r.verdict.is_none() || r.still_inside())).count()
    }

    fn imply_intents(&self, grants: &mut Vec<Grant>) {
        let mut implied: Vec<Grant> = Vec::new();
        for grant in grants.iter() {
            let class = grant.lock.split('/').next().unwrap_or_default();
            if !self.hierarchies.iter().any(|c| c == class) {
                continue;
            }
            for (end, _) in grant.lock.match_indices('/') {
                let lock = grant.lock[..end].to_owned();
                implied.push(Grant { lock, fence: 0, mode: grant.mode.intent() });
            }
        }
        for intent in implied {
            let known = grants.iter_mut().find(|grant| grant.lock == intent.lock);
            match known {
                // An unlisted intent that is implied twice counts with the stronger mode.
                Some(grant) if grant.fence == 0 && intent.mode == IntentExclusive => grant.mode = IntentExclusive,
                Some(_) => {}
                None => grants.push(intent),
            }
        }
    }

    /// Judges a request of which both ends have been heard.
    fn judge(&mut self, id: u64) {
        let Some(request) = self.requests.get(&id) else { return };
        let (Some((verdict, _)), Some(stay)) = (request.verdict, &request.stay) else { return };
        let Some((left, by_upstream)) = stay.left else { return };
        let Some(request) = self.requests.remove(&id) else { return };
        let Some(stay) = request.stay else { return };
        let held_to = match verdict {
            Verdict::Upstream if by_upstream => left,
            // The upstream saw the stream die, and then nothing is certain.
            Verdict::Upstream | Verdict::Refused => stay.entered,
            Verdict::Cut(at_least) => at_least.min(left).max(stay.entered),
        };
        if !stay.grants.is_empty() {
            match verdict {
                Verdict::Upstream if by_upstream => self.tally.whole += 1,
                _ => self.tally.cut += 1,
            }
        }
        for grant in &stay.grants {
            let section = Section {
                request: id,
                owner: request.owner.clone(),
                about: request.about.clone(),
                mode: grant.mode,
                fence: (grant.fence > 0).then_some(grant.fence),
                from: stay.entered,
                held_to,
                seen_to: left,
            };
            let class = grant.lock.split('/').next().unwrap_or_default();
            let permits = self.permits.get(class).copied().unwrap_or(1);
            let lock = self.locks.entry(grant.lock.clone()).or_default();
            lock.open.remove(&id);
            if permits > 1 {
                lock.count(&grant.lock, &section, permits, &mut self.violations);
            } else {
                lock.compare(&grant.lock, &section, &mut self.violations, &mut self.tally);
            }
            lock.done.push(section);
            lock.prune();
        }
    }

    /// Forgets what callers said of requests that never came.
    fn forget(&mut self, now: Instant) {
        if self.swept.is_some_and(|swept| now < swept + MEMORY / 2) {
            return;
        }
        self.swept = Some(now);
        self.requests.retain(|_, request| {
            request.stay.is_some() || request.verdict.is_none_or(|(_, since)| now < since + MEMORY)
        });
    }
}

impl Request {
    fn still_inside(&self) -> bool {
        self.stay.as_ref().is_some_and(|stay| stay.left.is_none())
    }
}

impl Lock {
    /// Mutual exclusion and rising fences, between one section and all that are remembered.
    fn compare(&self, name: &str, new: &Section, violations: &mut Violations, tally: &mut Tally) {
        for old in &self.done {
            if let (Some(a), Some(b)) = (old.fence, new.fence)
                && a == b
                && old.owner != new.owner
            {
                violations.push(format!("{name}: one fence for two owners\n    {}\n    {}", old.show(), new.show()));
            }
            if old.owner == new.owner || old.mode.compatible(new.mode) {
                continue;
            }
            let (first, second) = if old.from <= new.from { (old, new) } else { (new, old) };
            if first.held_to > second.from && second.held_to > second.from {
                let what = "two that exclude each other were inside together";
                violations.push(format!("{name}: {what}\n    {}\n    {}", first.show(), second.show()));
            } else if first.seen_to > second.from {
                tally.excused += 1;
            } else {
                tally.ordered += 1;
            }
            // Both held it when they came in, so the one that came first was granted it first.
            let certain = first.held_to > first.from && second.held_to > second.from;
            if let (Some(a), Some(b)) = (first.fence, second.fence)
                && certain
                && a >= b
            {
                violations.push(format!("{name}: the fence did not rise\n    {}\n    {}", first.show(), second.show()));
            }
        }
        // Those forgotten had ended before this one came.
        let before = if new.mode == Exclusive { &self.highest } else { &self.highest_exclusive };
        if let (Some((highest, owner)), Some(fence)) = (before, new.fence)
            && *owner != new.owner
            && new.held_to > new.from
            && fence <= *highest
        {
            violations.push(format!("{name}: the fence did not rise over {highest} of {owner}\n    {}", new.show()));
        }
    }

    /// No more at once than there are permits, counted whenever one comes in.
    fn count(&self, name: &str, new: &Section, permits: usize, violations: &mut Violations) {
        let inside = |at: Instant| self.done.iter().chain([new]).filter(move |s| s.from <= at && at < s.held_to);
        for moment in self.done.iter().chain([new]).map(|s| s.from).filter(|at| new.from <= *at && *at < new.held_to) {
            let together = inside(moment).map(|s| format!("\n    {}", s.show())).collect::<Vec<_>>();
            if together.len() > permits {
                violations.push(format!(
                    "{name}: {} at once, of {permits} permits{}",
                    together.len(),
                    together.concat()
                ));
                return;
            }
        }
    }

    /// Forgets what ended before everything that is still open came in: nothing to come can overlap with it.
    fn prune(&mut self) {
        let Some(last) = self.done.last().map(|s| s.seen_to) else { return };
        let horizon = self.open.values().min().copied().unwrap_or(last);
        let gone = self.done.extract_if(.., |section| section.seen_to < horizon);
        for section in gone {
            let Some(fence) = section.fence.filter(|_| section.held_to > section.from) else { continue };
            let raise = |highest: &mut Option<(u64, String)>| {
                if highest.as_ref().is_none_or(|(old, _)| *old < fence) {
                    *highest = Some((fence, section.owner.clone()));
                }
            };
            raise(&mut self.highest);
            if section.mode == Exclusive {
                raise(&mut self.highest_exclusive);
            }
        }
    }
}

impl Section {
    fn show(&self) -> String {
        let span = |to: Instant| to.saturating_duration_since(self.from).as_micros();
        format!(
            "{:?} by {} under fence {}, held for {} us at least, seen for {} us: request {}, {}",
            self.mode,
            self.owner,
            self.fence.map_or_else(|| "none".to_owned(), |fence| fence.to_string()),
            span(self.held_to),
            span(self.seen_to),
            self.request,
            self.about,
        )
    }
}

#[cfg(test)]
mod tests;
