//! The books: balances in whole cents, and for each account the transfers that touched it. No I/O, no clock, no locks
//! between accounts: each call is one step on one account, and who may take which steps together is not decided here.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

/// Money, in whole cents.
pub type Cents = u64;

/// Whether this may name an account: such a name is a segment of a path as it stands.
pub fn is_account_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
}

/// Why the books refuse a step.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// There is no such account.
    #[error("there is no account {0:?}")]
    UnknownAccount(String),
    /// The balance does not cover the debit.
    #[error("account {account:?} has {balance} cents, {amount} are asked for")]
    InsufficientFunds {
        /// The account that should pay.
        account: String,
        /// What it has.
        balance: Cents,
        /// What it should pay.
        amount: Cents,
    },
    /// The transfer id was used before, for something else.
    #[error("transfer {0:?} was booked before with other particulars")]
    IdReused(String),
    /// The balance would not fit a number.
    #[error("account {0:?} cannot hold that much")]
    Overflow(String),
}

/// What [`Ledger::reserve`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reserved {
    /// The money has been set aside by this very call: nobody has asked for the credit yet.
    Fresh,
    /// It had been set aside before, and whether the credit happened is not known here.
    InDoubt,
    /// The whole transfer had been completed before.
    Settled,
}

/// One account as its readers see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balance {
    /// The account.
    pub id: String,
    /// What it can spend.
    pub balance: Cents,
    /// What is set aside for transfers that have not been settled.
    pub pending: Cents,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Debit {
    amount: Cents,
    to: String,
    settled: bool,
}

#[derive(Debug, Default)]
struct Account {
    balance: Cents,
    debits: HashMap<String, Debit>,
    credits: HashMap<String, Cents>,
}

/// The accounts of a bank. Every step names its transfer and may be repeated: the second time moves no money.
#[derive(Debug, Default)]
pub struct Ledger(BTreeMap<String, Account>);

impl Ledger {
    /// Opens accounts with these balances.
    pub fn new(opening: impl IntoIterator<Item = (String, Cents)>) -> Self {
        let open = |(id, balance)| (id, Account { balance, ..Account::default() });
        Ledger(opening.into_iter().map(open).collect())
    }

    /// First step of a debit: sets the amount aside.
    pub fn reserve(&mut self, from: &str, transfer: &str, amount: Cents, to: &str) -> Result<Reserved, LedgerError> {
        let account = self.account(from)?;
        if let Some(debit) = account.debits.get(transfer) {
            return match debit {
                Debit { amount: a, to: t, .. } if *a != amount || t != to => {
                    Err(LedgerError::IdReused(transfer.to_owned()))
                }
                Debit { settled: true, .. } => Ok(Reserved::Settled),
                Debit { settled: false, .. } => Ok(Reserved::InDoubt),
            };
        }
        account.balance = account.balance.checked_sub(amount).ok_or_else(|| LedgerError::InsufficientFunds {
            account: from.to_owned(),
            balance: account.balance,
            amount,
        })?;
        account.debits.insert(transfer.to_owned(), Debit { amount, to: to.to_owned(), settled: false });
        Ok(Reserved::Fresh)
    }

    /// Last step of a debit: the credit is known to have happened.
    pub fn settle(&mut self, from: &str, transfer: &str) -> Result<(), LedgerError> {
        if let Some(debit) = self.account(from)?.debits.get_mut(transfer) {
            debit.settled = true;
        }
        Ok(())
    }

    /// Undoes a debit whose credit is known not to have happened. A settled debit stays.
    pub fn undo(&mut self, from: &str, transfer: &str) -> Result<(), LedgerError> {
        let account = self.account(from)?;
        if account.debits.get(transfer).is_some_and(|debit| !debit.settled)
            && let Some(debit) = account.debits.remove(transfer)
        {
            // Cannot overflow unless credits came in between; then the money stays set aside, and is not lost.
            match account.balance.checked_add(debit.amount) {
                Some(balance) => account.balance = balance,
                None => {
                    account.debits.insert(transfer.to_owned(), debit);
                    return Err(LedgerError::Overflow(from.to_owned()));
                }
            }
        }
        Ok(())
    }

    /// Books money onto an account.
    pub fn credit(&mut self, to: &str, transfer: &str, amount: Cents) -> Result<(), LedgerError> {
        let account = self.account(to)?;
        match account.credits.get(transfer) {
            Some(booked) if *booked == amount => return Ok(()),
            Some(_) => return Err(LedgerError::IdReused(transfer.to_owned())),
            None => {}
        }
        account.balance = account.balance.checked_add(amount).ok_or_else(|| LedgerError::Overflow(to.to_owned()))?;
        account.credits.insert(transfer.to_owned(), amount);
        Ok(())
    }

    /// One account.
    pub fn balance(&self, id: &str) -> Result<Balance, LedgerError> {
        let account = self.0.get(id).ok_or_else(|| LedgerError::UnknownAccount(id.to_owned()))?;
        Ok(account.read(id))
    }

    /// All accounts.
    pub fn balances(&self) -> Vec<Balance> {
        self.0.iter().map(|(id, account)| account.read(id)).collect()
    }

    fn account(&mut self, id: &str) -> Result<&mut Account, LedgerError> {
        self.0.get_mut(id).ok_or_else(|| LedgerError::UnknownAccount(id.to_owned()))
    }
}

impl Account {
    fn read(&self, id: &str) -> Balance {
        let pending = self.debits.values().filter(|debit| !debit.settled).map(|debit| debit.amount).sum();
        Balance { id: id.to_owned(), balance: self.balance, pending }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger() -> Ledger {
        Ledger::new([("ann".to_owned(), 100), ("bob".to_owned(), 50)])
    }

    fn read(ledger: &Ledger, id: &str) -> (Cents, Cents) {
        let balance = ledger.balance(id).unwrap();
        (balance.balance, balance.pending)
    }

    #[test]
    fn a_transfer_moves_its_amount_once_however_often_its_steps_are_repeated() {
        let mut ledger = ledger();
        assert_eq!(ledger.reserve("ann", "t1", 30, "bob"), Ok(Reserved::Fresh));
        assert_eq!(read(&ledger, "ann"), (70, 30));
        for _ in 0..2 {
            ledger.credit("bob", "t1", 30).unwrap();
            ledger.settle("ann", "t1").unwrap();
        }
        assert_eq!(ledger.reserve("ann", "t1", 30, "bob"), Ok(Reserved::Settled));
        assert_eq!((read(&ledger, "ann"), read(&ledger, "bob")), ((70, 0), (80, 0)));
    }

    #[test]
    fn an_undone_debit_gives_the_money_back_and_may_be_tried_again() {
        let mut ledger = ledger();
        ledger.reserve("ann", "t1", 30, "bob").unwrap();
        for _ in 0..2 {
            ledger.undo("ann", "t1").unwrap();
            assert_eq!(read(&ledger, "ann"), (100, 0));
        }
        assert_eq!(ledger.reserve("ann", "t1", 30, "bob"), Ok(Reserved::Fresh));
    }

    #[test]
    fn a_debit_found_unsettled_is_in_doubt_and_a_settled_one_is_not_undone() {
        let mut ledger = ledger();
        ledger.reserve("ann", "t1", 30, "bob").unwrap();
        assert_eq!(ledger.reserve("ann", "t1", 30, "bob"), Ok(Reserved::InDoubt));
        assert_eq!(read(&ledger, "ann"), (70, 30));
        ledger.settle("ann", "t1").unwrap();
        ledger.undo("ann", "t1").unwrap();
        assert_eq!(read(&ledger, "ann"), (70, 0));
    }

    #[test]
    fn what_cannot_be_booked_is_refused_and_changes_nothing() {
        let mut ledger = ledger();
        assert!(matches!(ledger.reserve("ann", "t1", 101, "bob"), Err(LedgerError::InsufficientFunds { .. })));
        assert!(matches!(ledger.reserve("eve", "t1", 1, "bob"), Err(LedgerError::UnknownAccount(_))));
        assert!(matches!(ledger.credit("bob", "t1", Cents::MAX), Err(LedgerError::Overflow(_))));
        ledger.reserve("ann", "t2", 1, "bob").unwrap();
        assert!(matches!(ledger.reserve("ann", "t2", 2, "bob"), Err(LedgerError::IdReused(_))));
        ledger.credit("bob", "t2", 1).unwrap();
        assert!(matches!(ledger.credit("bob", "t2", 2), Err(LedgerError::IdReused(_))));
        assert_eq!((read(&ledger, "ann"), read(&ledger, "bob")), ((99, 1), (51, 0)));
    }
}
