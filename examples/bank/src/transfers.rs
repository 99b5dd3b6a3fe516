//! The transfers service: takes a transfer in, has the paying account debited, and answers when all of it is done.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};

use crate::accounts::Debit;
use crate::hop::{Effect, Problem, Proxy};
use crate::ledger::{Cents, is_account_name};

/// The header that names a transfer: whoever repeats a request repeats its key, and the money moves once.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// Body of a transfer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Transfer {
    /// The account that pays.
    pub from: String,
    /// The account that is paid.
    pub to: String,
    /// How much, in cents.
    pub amount: Cents,
}

/// A transfer that has been completed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// Its id: the idempotency key.
    pub id: String,
    /// What was transferred.
    #[serde(flatten)]
    pub transfer: Transfer,
}

/// The service.
pub fn router(proxy: Proxy) -> Router {
    Router::new().route("/transfers", post(transfer)).with_state(Arc::new(proxy))
}

async fn transfer(
    State(proxy): State<Arc<Proxy>>,
    headers: HeaderMap,
    Json(transfer): Json<Transfer>,
) -> Result<Response, Problem> {
    let id = headers
        .get(IDEMPOTENCY_KEY)
        .and_then(|value| value.to_str().ok())
        .filter(|id| !id.is_empty())
        .ok_or_else(|| Problem::invalid("a transfer needs an idempotency-key header"))?
        .to_owned();
    if transfer.amount == 0 {
        return Err(Problem::invalid("a transfer of nothing"));
    }
    if transfer.from == transfer.to {
        return Err(Problem::invalid("a transfer from an account to itself"));
    }
    for account in [&transfer.from, &transfer.to] {
        if !is_account_name(account) {
            return Err(Problem::invalid(format!("{account:?} is not the name of an account")));
        }
    }

    let debit = Debit { transfer: id.clone(), amount: transfer.amount, to: transfer.to.clone() };
    let answer = proxy.post(&format!("/accounts/{}/debit", transfer.from), &headers, &debit).await;
    match answer.effect() {
        Effect::Done => Ok((StatusCode::CREATED, answer.into_report(), Json(Receipt { id, transfer })).into_response()),
        Effect::Refused | Effect::Unknown => Ok(answer.into_response()),
    }
}
