//! Classes of locks and the global order: rank, permits, hierarchy, and how locks of one class stand to each other.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use crate::id::Rank;
use crate::name::LockName;

/// Whether locks of one class have an order among themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Within {
    /// They are taken in rising name.
    #[default]
    Ordered,
    /// Any order; the deadlock rule alone watches over them.
    Unordered,
}

/// What a policy says of one class of locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Class {
    /// Its place in the global order; without one the class is left to the deadlock rule.
    pub rank: Option<Rank>,
    /// How many leases may hold one lock at once. Above 1 modes do not matter: every lease takes one permit.
    pub permits: u32,
    /// Order among the locks of the class. Means nothing without a rank.
    pub within: Within,
    /// Whether a lock is taken with intents on its ancestors.
    pub hierarchy: bool,
}

impl Default for Class {
    fn default() -> Self {
        Class { rank: None, permits: 1, within: Within::Ordered, hierarchy: false }
    }
}

/// All classes of a policy. A class that is not in it has [`Class::default`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Classes(BTreeMap<String, Class>);

impl Classes {
    /// The class of that name.
    pub fn get(&self, class: &str) -> Class {
        self.0.get(class).copied().unwrap_or_default()
    }

    /// The class that `name` is of.
    pub fn of(&self, name: &LockName) -> Class {
        self.get(name.class())
    }

    /// Whether the policy names this class.
    pub fn declares(&self, class: &str) -> bool {
        self.0.contains_key(class)
    }

    /// The names of the classes that the policy declares.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// The global order: rising rank, then name. Classes without a rank come last; for them it only serves to take
    /// the locks of one request in one order.
    pub fn order(&self, a: &LockName, b: &LockName) -> Ordering {
        let rank = |name| self.of(name).rank.filter(|_| !bug!(OrderIgnoresRank)).map_or((1, Rank(0)), |rank| (0, rank));
        rank(a).cmp(&rank(b)).then_with(|| a.cmp(b))
    }

    /// Whether taking `wanted` while holding `held` goes against the declared order.
    pub fn violates(&self, held: &LockName, wanted: &LockName) -> bool {
        let class = self.of(wanted);
        let declared = class.rank.is_some() && self.of(held).rank.is_some();
        let unordered = class.within == Within::Unordered && held.class() == wanted.class();
        declared && !unordered && held != wanted && self.order(held, wanted) != Ordering::Less
    }

    /// Declares a class; gives back the earlier one of that name, if there was one.
    pub fn insert(&mut self, name: String, class: Class) -> Option<Class> {
        self.0.insert(name, class)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn the_order_is_rank_then_name() {
        let mut classes = Classes::default();
        let ranked = |rank| Class { rank: Some(Rank(rank)), ..Class::default() };
        classes.insert("a".into(), ranked(20));
        classes.insert("b".into(), ranked(10));
        classes.insert("u".into(), Class { within: Within::Unordered, ..ranked(30) });
        let name = |text| LockName::parse(text).unwrap();
        assert!(classes.violates(&name("a/1"), &name("b/9")), "a ranks above b");
        assert!(!classes.violates(&name("b/9"), &name("a/1")));
        assert!(classes.violates(&name("a/2"), &name("a/1")));
        assert!(!classes.violates(&name("a/1"), &name("a/1")), "the same lock is no matter of order");
        assert!(!classes.violates(&name("u/2"), &name("u/1")), "unordered within");
        assert!(classes.violates(&name("u/2"), &name("a/1")), "but not towards others");
        assert!(!classes.violates(&name("x/2"), &name("a/1")) && !classes.violates(&name("a/2"), &name("x/1")));
    }
}
