//! Mutual exclusion as an upstream sees it: of every request that says in `lock-fence` which locks protect it, whether
//! it overlaps one that it must not overlap, and whether fences rise.
//!
//! What the upstream sees lags behind what the lock manager did: a request whose client left has already given its lock
//! back while its bytes are still on their way here. That is what fences are for, and no violation. So a suspicion only
//! becomes a violation when every request that it names has run to its own end without being abandoned.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use hyper::header::HeaderMap;
use sfv::{BareItem, ListEntry, Parser};

/// How long a suspected request that wants to end waits for the news that it had been abandoned.
const NEWS: Duration = Duration::from_millis(50);

/// Watches the requests of one or more upstreams. A clone is the same checker.
#[derive(Debug, Clone, Default)]
pub struct Checker(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    permits: HashMap<String, usize>,
    locks: HashMap<String, Lock>,
    suspicions: Vec<Suspicion>,
    malformed: Vec<String>,
    next: u64,
    sections: u64,
}

#[derive(Debug, Default)]
struct Lock {
    inside: Vec<Member>,
    /// The highest fence seen of any grant, and of an exclusive one.
    highest: Option<Grant>,
    highest_exclusive: Option<Grant>,
}

#[derive(Debug, Clone)]
struct Grant {
    fence: i64,
    owner: String,
}

#[derive(Debug, Clone)]
struct Member {
    section: u64,
    mode: String,
    grant: Grant,
}

#[derive(Debug)]
struct Suspicion {
    what: String,
    /// The sections that must end by themselves for this to be a violation; none left: it is one.
    open: Vec<u64>,
}

/// A request inside the upstream. Dropping it says that it was abandoned.
#[derive(Debug)]
pub struct Section {
    checker: Checker,
    id: u64,
    locks: Vec<String>,
    over: bool,
}

impl Checker {
    /// A checker that knows that so many leases of this class may be held at once.
    pub fn permits(self, class: &str, permits: usize) -> Self {
        self.lock().permits.insert(class.to_owned(), permits);
        self
    }

    /// A request enters, with these headers; `about` names it in a violation.
    pub fn enter(&self, headers: &HeaderMap, about: &str) -> Section {
        let owner = owner(headers);
        let mut state = self.lock();
        let id = state.next;
        state.next += 1;
        let members = match members(headers) {
            Ok(members) => members,
            Err(why) => {
                state.malformed.push(format!("{about}: lock-fence is malformed: {why}"));
                Vec::new()
            }
        };
        if !members.is_empty() {
            state.sections += 1;
        }
        let mut locks = Vec::new();
        for (name, fence, mode) in members {
            let grant = Grant { fence, owner: owner.clone() };
            state.admit(&name, Member { section: id, mode, grant }, about);
            locks.push(name);
        }
        Section { checker: self.clone(), id, locks, over: false }
    }

    /// What went wrong so far. Complete once no request is inside.
    pub fn violations(&self) -> Vec<String> {
        let state = self.lock();
        let proven = state.suspicions.iter().filter(|s| s.open.is_empty()).map(|s| s.what.clone());
        state.malformed.iter().cloned().chain(proven).collect()
    }

    /// How many requests with a `lock-fence` have entered.
    pub fn sections(&self) -> u64 {
        self.lock().sections
    }

    /// # Panics
    /// When something went wrong.
    pub fn assert_clean(&self) {
        let violations = self.violations();
        assert!(violations.is_empty(), "mutual exclusion was broken:\n{}", violations.join("\n"));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl State {
    fn admit(&mut self, name: &str, new: Member, about: &str) {
        let class = name.split('/').next().unwrap_or_default();
        let permits = self.permits.get(class).copied().unwrap_or(1);
        let lock = self.locks.entry(name.to_owned()).or_default();
        let id = new.section;
        if permits > 1 {
            // With permits every lease takes one, re-entry too; the fences of those inside say nothing of each other.
            lock.inside.push(new);
            if lock.inside.len() > permits {
                let open = lock.inside.iter().map(|m| m.section).collect();
                let what = format!("{about}: {} leases on {name} at once, of {permits} permits", lock.inside.len());
                self.suspicions.push(Suspicion { what, open });
            }
            return;
        }
        for other in &lock.inside {
            if other.grant.owner != new.grant.owner && !compatible(&other.mode, &new.mode) {
                let what = format!("{about}: on {name}, {} entered while {} was inside", show(&new), show(other));
                self.suspicions.push(Suspicion { what, open: vec![id, other.section] });
            }
        }
        // Those that were granted together may arrive in any order; what excludes others may not be overtaken.
        let before = if exclusive(&new.mode) { &lock.highest } else { &lock.highest_exclusive };
        // So may one owner's requests that are inside together, which re-entry lets in at once.
        let again = lock.inside.iter().any(|other| other.grant.owner == new.grant.owner);
        let re_entry = |old: &Grant| old.owner == new.grant.owner && (again || old.fence == new.grant.fence);
        if let Some(old) = before.as_ref().filter(|old| old.fence >= new.grant.fence && !re_entry(old)) {
            let what = format!("{about}: on {name}, {} came after fence {} of {}", show(&new), old.fence, old.owner);
            self.suspicions.push(Suspicion { what, open: vec![id] });
        }
        let raise = |highest: &mut Option<Grant>| {
            if highest.as_ref().is_none_or(|old| old.fence < new.grant.fence) {
                *highest = Some(new.grant.clone());
            }
        };
        raise(&mut lock.highest);
        if exclusive(&new.mode) {
            raise(&mut lock.highest_exclusive);
        }
        lock.inside.push(new);
    }

    fn remove(&mut self, section: &Section) {
        for name in &section.locks {
            if let Some(lock) = self.locks.get_mut(name) {
                lock.inside.retain(|member| member.section != section.id);
            }
        }
    }
}

impl Section {
    /// The request is about to be answered: from here on the next one may enter.
    pub async fn leave(mut self) {
        let suspected = self.checker.lock().suspicions.iter().any(|s| s.open.contains(&self.id));
        if suspected {
            // If it had been abandoned, this future is dropped here once the connection says so.
            tokio::time::sleep(NEWS).await;
        }
        let mut state = self.checker.lock();
        state.remove(&self);
        for suspicion in &mut state.suspicions {
            suspicion.open.retain(|id| *id != self.id);
        }
        drop(state);
        self.over = true;
    }
}

impl Drop for Section {
    fn drop(&mut self) {
        if !self.over {
            let mut state = self.checker.lock();
            state.remove(self);
            state.suspicions.retain(|suspicion| !suspicion.open.contains(&self.id));
        }
    }
}

fn show(member: &Member) -> String {
    format!("{} of {} (fence {})", member.mode, member.grant.owner, member.grant.fence)
}

fn exclusive(mode: &str) -> bool {
    mode == "exclusive"
}

/// The compatibility of lock modes, written out on its own so that it can't share a mistake with the core's.
fn compatible(a: &str, b: &str) -> bool {
    let allows: &[&str] = match a {
        "intent-shared" => &["intent-shared", "intent-exclusive", "shared", "shared-intent-exclusive"],
        "intent-exclusive" => &["intent-shared", "intent-exclusive"],
        "shared" => &["intent-shared", "shared"],
        "shared-intent-exclusive" => &["intent-shared"],
        _ => &[],
    };
    allows.contains(&b)
}

/// Who a request belongs to, by the default owner sources.
fn owner(headers: &HeaderMap) -> String {
    let text = |name| headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let trace = text("traceparent").and_then(|parent| parent.split('-').nth(1).map(str::to_owned));
    trace.or_else(|| text("x-request-id")).unwrap_or_else(|| "no one".to_owned())
}

fn members(headers: &HeaderMap) -> Result<Vec<(String, i64, String)>, String> {
    let lines = headers.get_all("lock-fence").iter().map(|v| v.to_str().map_err(|e| e.to_string()));
    let text = lines.collect::<Result<Vec<_>, _>>()?.join(", ");
    let list = Parser::new(&text).parse::<sfv::List>().map_err(|e| e.to_string())?;
    list.iter().map(|entry| member(entry).ok_or_else(|| text.clone())).collect()
}

fn member(entry: &ListEntry) -> Option<(String, i64, String)> {
    let ListEntry::Item(item) = entry else { return None };
    let name = match &item.bare_item {
        BareItem::Token(token) => token.as_str(),
        BareItem::String(string) => string.as_str(),
        _ => return None,
    };
    let fence = item.params.get("fence")?.as_integer()?;
    let mode = item.params.get("mode")?.as_token()?;
    Some((name.to_owned(), i64::from(fence), mode.as_str().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(checker: &Checker, owner: &str, fence: &str) -> Section {
        let mut headers = HeaderMap::new();
        headers.insert("x-request-id", owner.parse().unwrap());
        headers.insert("lock-fence", fence.parse().unwrap());
        checker.enter(&headers, owner)
    }

    #[tokio::test]
    async fn one_after_the_other_with_rising_fences_is_clean() {
        let checker = Checker::default();
        enter(&checker, "a", "order/1;fence=1;mode=exclusive").leave().await;
        enter(&checker, "b", "order/1;fence=2;mode=exclusive, \"7/x\";fence=1;mode=shared").leave().await;
        checker.assert_clean();
        assert_eq!(checker.sections(), 2);
    }

    #[tokio::test]
    async fn an_overlap_is_a_violation_once_both_have_ended_by_themselves() {
        let checker = Checker::default();
        let a = enter(&checker, "a", "order/1;fence=1;mode=exclusive");
        let b = enter(&checker, "b", "order/1;fence=2;mode=shared");
        a.leave().await;
        checker.assert_clean();
        b.leave().await;
        assert_eq!(checker.violations().len(), 1);
    }

    #[tokio::test]
    async fn an_overlap_with_an_abandoned_request_is_none() {
        let checker = Checker::default();
        let gone = enter(&checker, "a", "order/1;fence=1;mode=exclusive");
        let b = enter(&checker, "b", "order/1;fence=2;mode=exclusive");
        drop(gone);
        b.leave().await;
        checker.assert_clean();
    }

    #[tokio::test]
    async fn what_may_be_together_may() {
        let checker = Checker::default().permits("pool", 2);
        let fences = [
            ("a", "order/1;fence=2;mode=shared, pool;fence=1;mode=exclusive"),
            ("b", "order/1;fence=1;mode=shared, pool;fence=2;mode=exclusive"),
            ("a", "order/1;fence=2;mode=shared"),
            ("c", "stock;fence=1;mode=intent-exclusive"),
            ("d", "stock;fence=2;mode=intent-exclusive"),
        ];
        for section in fences.map(|(owner, fence)| enter(&checker, owner, fence)) {
            section.leave().await;
        }
        checker.assert_clean();
    }

    #[tokio::test]
    async fn too_many_at_once_falling_fences_and_no_list_are_violations() {
        let checker = Checker::default().permits("pool", 2);
        let all = ["1", "2", "3"].map(|n| enter(&checker, n, &format!("pool;fence={n};mode=exclusive")));
        for section in all {
            section.leave().await;
        }
        assert_eq!(checker.violations().len(), 1);
        enter(&checker, "a", "order/1;fence=2;mode=exclusive").leave().await;
        enter(&checker, "b", "order/1;fence=2;mode=exclusive").leave().await;
        enter(&checker, "c", "order/1;fence=1;mode=shared").leave().await;
        assert_eq!(checker.violations().len(), 3);
        enter(&checker, "d", "order/1;fence=high").leave().await;
        assert_eq!(checker.violations().len(), 4);
    }
}
