//! Classes of locks and the global order: rank, permits, hierarchy, and how locks of one class stand to each other.

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

    /// Declares a class; gives back the earlier one of that name, if there was one.
    pub fn insert(&mut self, name: String, class: Class) -> Option<Class> {
        self.0.insert(name, class)
    }
}
