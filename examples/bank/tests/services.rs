//! The two services behind a stand-in for the proxy, which forwards and, where a test says so, answers in their place.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use tokio::net::TcpListener;
use tokio::sync::{Barrier, mpsc};

use bank::client::{Client, Outcome, Retry, trace_id};
use bank::event::Event;
use bank::hop::Proxy;
use bank::transfers::Transfer;
use bank::{accounts, transfers};

const DEADLOCK: &str = r#"{"type":"urn:interlock:problem:deadlock","status":409,"detail":"a cycle","lock":"account/bob",
    "cycle":[{"owner":"t1","waits_for":"account/bob","held_by":"t2"},{"owner":"t2","waits_for":"account/ann","held_by":"t1"}]}"#;
const OPENING: u64 = 1000;

/// What the stand-in does with the next credit.
enum Script {
    /// Answers in the service's place.
    Answer(StatusCode, &'static str),
    /// Forwards it, and answers 504 all the same.
    Lose,
}

struct Front {
    http: reqwest::Client,
    accounts: String,
    transfers: String,
    script: Mutex<VecDeque<Script>>,
    /// Credits are forwarded when so many have come together.
    credits_meet: Barrier,
    traces: Mutex<Vec<(String, String)>>,
}

async fn forward(State(front): State<Arc<Front>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path().to_owned();
    let header = |name: &str| parts.headers.get(name).map(|v| v.to_str().unwrap().to_owned()).unwrap_or_default();
    front.traces.lock().unwrap().push((path.clone(), header("traceparent")));
    let is_credit = path.ends_with("/credit");
    let mut lose = false;
    if is_credit {
        front.credits_meet.wait().await;
        match front.script.lock().unwrap().pop_front() {
            Some(Script::Answer(status, body)) => {
                let headers = [("content-type", "application/problem+json"), ("lock-status", "bank;outcome=refused")];
                return (status, headers, body).into_response();
            }
            Some(Script::Lose) => lose = true,
            None => {}
        }
    }
    let base = if path.starts_with("/transfers") { &front.transfers } else { &front.accounts };
    let body: Bytes = to_bytes(body, usize::MAX).await.unwrap();
    let answer = front.http.request(parts.method, format!("{base}{path}")).headers(parts.headers).body(body);
    let answer = answer.send().await.unwrap();
    if lose {
        return (StatusCode::GATEWAY_TIMEOUT, "upstream request timeout").into_response();
    }
    let mut response = Response::builder().status(answer.status());
    *response.headers_mut().unwrap() = answer.headers().clone();
    response.body(Body::from(answer.bytes().await.unwrap())).unwrap()
}

struct Bank {
    client: Client,
    front: Arc<Front>,
    events: mpsc::UnboundedReceiver<Event>,
}

async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    (listener, url)
}

fn serve(listener: TcpListener, router: Router) {
    tokio::spawn(async move { axum::serve(listener, router).await });
}

async fn bank(credits_meet: usize, script: impl IntoIterator<Item = Script>) -> Bank {
    let (front_listener, front_url) = listen().await;
    let (accounts_listener, accounts) = listen().await;
    let (transfers_listener, transfers) = listen().await;
    let (sender, events) = mpsc::unbounded_channel();
    let proxy = Proxy::new(&front_url).unwrap();
    let config = accounts::Config {
        opening: ["ann", "bob"].map(|name| (name.to_owned(), OPENING)).into(),
        write_time: Duration::ZERO,
        proxy: proxy.clone(),
        observer: Arc::new(move |event| {
            let _ = sender.send(event);
        }),
    };
    serve(accounts_listener, accounts::router(config));
    serve(transfers_listener, transfers::router(proxy));
    let front = Arc::new(Front {
        http: reqwest::Client::new(),
        accounts,
        transfers,
        script: Mutex::new(script.into_iter().collect()),
        credits_meet: Barrier::new(credits_meet),
        traces: Mutex::default(),
    });
    serve(front_listener, Router::new().fallback(forward).with_state(Arc::clone(&front)));
    Bank { client: Client::new(&front_url, Duration::from_secs(20)).unwrap(), front, events }
}

impl Bank {
    /// (balance, pending) of ann and bob.
    async fn books(&self) -> [(u64, u64); 2] {
        let balances = self.client.balances().await.unwrap();
        [0, 1].map(|i: usize| (balances[i].balance, balances[i].pending))
    }
}

fn transfer(from: &str, to: &str, amount: u64) -> Transfer {
    Transfer { from: from.to_owned(), to: to.to_owned(), amount }
}

#[tokio::test]
async fn a_transfer_moves_the_money_once_and_all_its_calls_are_one_trace() {
    let bank = bank(1, []).await;
    let trace = trace_id();
    for _ in 0..2 {
        let attempt = bank.client.attempt("t1", &trace, &transfer("ann", "bob", 30)).await;
        assert_eq!(attempt.outcome, Outcome::Completed);
        assert_eq!(bank.books().await, [(970, 0), (1030, 0)]);
    }
    let traces = bank.front.traces.lock().unwrap();
    let posts: Vec<_> = traces.iter().filter(|(path, _)| path != "/accounts").collect();
    let paths: Vec<_> = posts.iter().map(|(path, _)| path.as_str()).collect();
    // The second time the debit is found settled.
    assert_eq!(
        paths,
        ["/transfers", "/accounts/ann/debit", "/accounts/bob/credit", "/transfers", "/accounts/ann/debit"]
    );
    assert!(posts.iter().all(|(_, traceparent)| traceparent.contains(&trace)), "{posts:?}");
}

#[tokio::test]
async fn opposite_transfers_block_each_other_until_somebody_gives_up() {
    let mut bank = bank(2, []).await;
    let start = |id: &'static str, from: &'static str, to: &'static str| {
        let client = bank.client.clone();
        tokio::spawn(async move { client.attempt(id, &trace_id(), &transfer(from, to, 30)).await })
    };
    let (one, two) = (start("t1", "ann", "bob"), start("t2", "bob", "ann"));
    let mut blocked = Vec::new();
    while blocked.len() < 2 {
        if let Event::Blocked { account, transfer, holder } = bank.events.recv().await.unwrap() {
            blocked.push((transfer, account, holder.unwrap()));
        }
    }
    blocked.sort();
    let blocked: Vec<_> = blocked.iter().map(|(a, b, c)| (a.as_str(), b.as_str(), c.as_str())).collect();
    assert_eq!(blocked, [("t1", "bob", "t2"), ("t2", "ann", "t1")]);
    assert!(!one.is_finished() && !two.is_finished());
    assert_eq!(bank.books().await, [(970, 30), (970, 30)]);
    one.abort();
    two.abort();
}

#[tokio::test]
async fn a_refused_credit_undoes_the_debit_and_its_answer_is_passed_on() {
    let bank = bank(1, [Script::Answer(StatusCode::CONFLICT, DEADLOCK)]).await;
    let attempt = bank.client.attempt("t1", &trace_id(), &transfer("ann", "bob", 30)).await;
    let Outcome::Refused { status: 409, problem, body } = attempt.outcome else { panic!("{attempt:?}") };
    assert_eq!((problem.slug(), problem.cycle.len(), body.as_str()), ("deadlock", 2, DEADLOCK));
    assert_eq!(attempt.lock_status, ["bank;outcome=refused"]);
    assert_eq!(bank.books().await, [(OPENING, 0), (OPENING, 0)]);
}

#[tokio::test]
async fn a_client_tries_a_refused_transfer_again_until_it_completes() {
    let refused = || Script::Answer(StatusCode::CONFLICT, DEADLOCK);
    let bank = bank(1, [refused(), refused()]).await;
    let retry = Retry { attempts: 5, pause: Duration::from_millis(1), max_pause: Duration::from_millis(2) };
    let mut tries = Vec::new();
    let last = bank
        .client
        .transfer("t1", &trace_id(), &transfer("ann", "bob", 30), retry, |n, attempt| {
            tries.push((n, attempt.outcome == Outcome::Completed));
        })
        .await;
    assert_eq!(last.outcome, Outcome::Completed);
    assert_eq!(tries, [(1, false), (2, false), (3, true)]);
    assert_eq!(bank.books().await, [(970, 0), (1030, 0)]);
}

#[tokio::test]
async fn a_credit_whose_answer_was_lost_stays_in_doubt_even_if_then_refused_and_is_never_booked_twice() {
    let bank = bank(1, [Script::Lose, Script::Answer(StatusCode::CONFLICT, DEADLOCK)]).await;
    let attempt = async || bank.client.attempt("t1", &trace_id(), &transfer("ann", "bob", 30)).await.outcome;
    assert_eq!(attempt().await, Outcome::TimedOut);
    assert_eq!(bank.books().await, [(970, 30), (1030, 0)]);
    assert!(matches!(attempt().await, Outcome::Refused { status: 409, .. }));
    assert_eq!(bank.books().await, [(970, 30), (1030, 0)]);
    assert_eq!(attempt().await, Outcome::Completed);
    assert_eq!(bank.books().await, [(970, 0), (1030, 0)]);
}

#[tokio::test]
async fn what_the_bank_itself_refuses_is_a_problem_and_moves_nothing() {
    let bank = bank(1, []).await;
    for (wrong, expected) in [
        (transfer("ann", "bob", 0), (422, "invalid")),
        (transfer("ann", "ann", 1), (422, "invalid")),
        (transfer("ann/../bob", "bob", 1), (422, "invalid")),
        (transfer("ann", "bob", OPENING + 1), (422, "insufficient-funds")),
        (transfer("eve", "bob", 1), (404, "unknown-account")),
        (transfer("ann", "eve", 1), (404, "unknown-account")),
    ] {
        let attempt = bank.client.attempt(&trace_id(), &trace_id(), &wrong).await;
        let Outcome::Refused { status, problem, .. } = attempt.outcome else { panic!("{wrong:?}: {attempt:?}") };
        assert_eq!((status, problem.slug()), expected, "{wrong:?}");
        assert_eq!(bank.books().await, [(OPENING, 0), (OPENING, 0)]);
    }
}
