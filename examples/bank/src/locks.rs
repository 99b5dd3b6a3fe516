//! Locks inside one process, one an account: what a careful team writes when it has nothing else. They keep an account
//! from being debited twice at once, and they are why opposite transfers block each other: none of them knows that
//! whoever holds the other account waits for this one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OwnedMutexGuard;

use crate::event::{Event, Observer};

/// The locks of all accounts.
pub struct AccountLocks {
    locks: Mutex<HashMap<String, Arc<Entry>>>,
    observer: Observer,
}

#[derive(Default)]
struct Entry {
    lock: Arc<tokio::sync::Mutex<()>>,
    /// Who has it, for people to read.
    holder: Mutex<Option<String>>,
}

/// Holds one account until dropped.
pub struct AccountGuard {
    entry: Arc<Entry>,
    _held: OwnedMutexGuard<()>,
}

impl AccountLocks {
    /// No account is locked.
    pub fn new(observer: Observer) -> Self {
        AccountLocks { locks: Mutex::default(), observer }
    }

    /// Locks an account for a transfer; waits for as long as the caller lets it.
    pub async fn lock(&self, account: &str, transfer: &str) -> AccountGuard {
        let entry = Arc::clone(
            self.locks.lock().unwrap_or_else(PoisonError::into_inner).entry(account.to_owned()).or_default(),
        );
        let held = match Arc::clone(&entry.lock).try_lock_owned() {
            Ok(held) => held,
            Err(_) => {
                let holder = entry.holder.lock().unwrap_or_else(PoisonError::into_inner).clone();
                (self.observer)(Event::Blocked { account: account.to_owned(), transfer: transfer.to_owned(), holder });
                Arc::clone(&entry.lock).lock_owned().await
            }
        };
        *entry.holder.lock().unwrap_or_else(PoisonError::into_inner) = Some(transfer.to_owned());
        AccountGuard { entry, _held: held }
    }
}

impl Drop for AccountGuard {
    fn drop(&mut self) {
        *self.entry.holder.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
