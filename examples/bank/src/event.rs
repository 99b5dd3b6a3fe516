//! What the services tell whoever watches them: `bank` prints it, the demo counts it.

use std::fmt;
use std::sync::Arc;

/// Something that happened inside a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A transfer found an account locked by another one and waits, inside the service.
    Blocked {
        /// The account.
        account: String,
        /// The transfer that waits.
        transfer: String,
        /// The transfer that has it, unless it was just giving it back.
        holder: Option<String>,
    },
    /// A transfer has been completed.
    Settled {
        /// The transfer.
        transfer: String,
    },
    /// The credit was refused, and the debit has been undone.
    Undone {
        /// The transfer.
        transfer: String,
    },
    /// Nobody said whether the credit happened: the amount stays set aside until the transfer is asked for again.
    InDoubt {
        /// The transfer.
        transfer: String,
    },
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Event::Blocked { account, transfer, holder: Some(holder) } => {
                write!(f, "{transfer} waits for account {account}, which {holder} has")
            }
            Event::Blocked { account, transfer, holder: None } => write!(f, "{transfer} waits for account {account}"),
            Event::Settled { transfer } => write!(f, "{transfer} is settled"),
            Event::Undone { transfer } => write!(f, "{transfer} is undone: its credit was refused"),
            Event::InDoubt { transfer } => write!(f, "{transfer} is in doubt: its credit was not answered"),
        }
    }
}

/// Who is told. Called from within requests: it must be quick.
pub type Observer = Arc<dyn Fn(Event) + Send + Sync>;

/// Nobody is.
pub fn unobserved() -> Observer {
    Arc::new(|_| {})
}
