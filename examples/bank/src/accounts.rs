//! The accounts service: balances, debits and credits. A debit is not over before its credit is, and keeps its account
//! locked until then: so the money is never in neither place, and so opposite transfers block each other.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};

use crate::event::{Event, Observer};
use crate::hop::{Effect, Problem, Proxy};
use crate::ledger::{Balance, Cents, Ledger, Reserved, is_account_name};
use crate::locks::AccountLocks;

/// How the service is set up.
pub struct Config {
    /// Accounts and what they have.
    pub opening: Vec<(String, Cents)>,
    /// How long a write to the books takes.
    pub write_time: Duration,
    /// Where the other services are.
    pub proxy: Proxy,
    /// Who is told what happens.
    pub observer: Observer,
}

/// Body of a debit.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Debit {
    /// The transfer that it is part of.
    pub transfer: String,
    /// How much.
    pub amount: Cents,
    /// Who is paid.
    pub to: String,
}

/// Body of a credit.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Credit {
    /// The transfer that it is part of.
    pub transfer: String,
    /// How much.
    pub amount: Cents,
}

struct Accounts {
    ledger: Mutex<Ledger>,
    locks: AccountLocks,
    write_time: Duration,
    proxy: Proxy,
    observer: Observer,
}

/// The service.
pub fn router(config: Config) -> Router {
    let accounts = Accounts {
        ledger: Mutex::new(Ledger::new(config.opening)),
        locks: AccountLocks::new(Arc::clone(&config.observer)),
        write_time: config.write_time,
        proxy: config.proxy,
        observer: config.observer,
    };
    Router::new()
        .route("/accounts", get(list))
        .route("/accounts/{id}", get(read))
        .route("/accounts/{id}/debit", post(debit))
        .route("/accounts/{id}/credit", post(credit))
        .with_state(Arc::new(accounts))
}

impl Accounts {
    /// The books. Never across an await.
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn list(State(accounts): State<Arc<Accounts>>) -> Json<Vec<Balance>> {
    Json(accounts.ledger().balances())
}

async fn read(State(accounts): State<Arc<Accounts>>, Path(id): Path<String>) -> Result<Json<Balance>, Problem> {
    Ok(Json(accounts.ledger().balance(&id)?))
}

async fn credit(
    State(accounts): State<Arc<Accounts>>,
    Path(id): Path<String>,
    Json(credit): Json<Credit>,
) -> Result<Json<Balance>, Problem> {
    let _guard = accounts.locks.lock(&id, &credit.transfer).await;
    tokio::time::sleep(accounts.write_time).await;
    let mut ledger = accounts.ledger();
    ledger.credit(&id, &credit.transfer, credit.amount)?;
    Ok(Json(ledger.balance(&id)?))
}

async fn debit(
    State(accounts): State<Arc<Accounts>>,
    Path(id): Path<String>,
    headers: HeaderMap,
    Json(debit): Json<Debit>,
) -> Result<Response, Problem> {
    let Debit { transfer, amount, to } = &debit;
    if !is_account_name(to) {
        return Err(Problem::invalid(format!("{to:?} is not the name of an account")));
    }
    let _guard = accounts.locks.lock(&id, transfer).await;
    let reserved = accounts.ledger().reserve(&id, transfer, *amount, to)?;
    if reserved == Reserved::Settled {
        return Ok(Json(accounts.ledger().balance(&id)?).into_response());
    }
    tokio::time::sleep(accounts.write_time).await;

    let body = Credit { transfer: transfer.clone(), amount: *amount };
    let answer = accounts.proxy.post(&format!("/accounts/{to}/credit"), &headers, &body).await;
    match (answer.effect(), reserved) {
        (Effect::Done, _) => {
            accounts.ledger().settle(&id, transfer)?;
            (accounts.observer)(Event::Settled { transfer: transfer.clone() });
            let balance = accounts.ledger().balance(&id)?;
            Ok((answer.into_report(), Json(balance)).into_response())
        }
        // Only a first attempt knows from a refusal that no credit happened.
        (Effect::Refused, Reserved::Fresh) => {
            accounts.ledger().undo(&id, transfer)?;
            (accounts.observer)(Event::Undone { transfer: transfer.clone() });
            Ok(answer.into_response())
        }
        _ => {
            (accounts.observer)(Event::InDoubt { transfer: transfer.clone() });
            Ok(answer.into_response())
        }
    }
}
