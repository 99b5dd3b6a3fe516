//! Clients that break off in the middle, close half of their connection, stall, or send a byte at a time. Whatever they
//! had is given back, and whoever waits for it gets it.

use std::time::{Duration, Instant};

use interlock_testkit::client::traceparent;
use interlock_testkit::{DEADLINE, wait_for};
use tokio::task::JoinSet;

use super::STAGE;
use super::dice::{Dice, seed};
use super::h2::RawH2;
use super::shot::field;
use crate::common::{Lane, run};

/// So many clients leave; a third each of three kinds.
const LEAVERS: usize = 240;

/// So many clients send a byte at a time.
const SLOW: usize = 40;

/// How a client leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leave {
    /// The connection is closed.
    Close,
    /// The connection is reset.
    Reset,
    /// One half of the connection is closed, and what comes back is read to its end.
    Half,
}

fn head(owner: u128, lock: &str, length: usize) -> Vec<u8> {
    let trace = traceparent(owner);
    format!("POST /work?delay=5 HTTP/1.1\r\nhost: test\r\ntraceparent: {trace}\r\nlock: {lock}\r\ncontent-length: {length}\r\n\r\n")
        .into_bytes()
}

/// All of them want the same few locks, and leave in the middle of having or wanting them.
fn lock(dice: &mut Dice) -> String {
    format!("order/{}, pool/{};wait=0.2;ttl=1", dice.below(3), dice.below(2))
}

/// A request over HTTP/1.1 that is cut off at any byte: in its head, at its end, in its body.
async fn cut(lane: &Lane, dice: &mut Dice, number: usize) {
    let mut bytes = head(1000 + u128::try_from(number).unwrap(), &lock(dice), 400);
    bytes.extend([b'x'; 400]);
    let whole = bytes.len();
    bytes.truncate(dice.within(1, whole));
    let how = [Leave::Close, Leave::Reset, Leave::Half][dice.below(3)];
    let mut client = lane.raw().await;
    client.send(&bytes).await.unwrap();
    match how {
        Leave::Close => {}
        Leave::Reset => client.reset().unwrap(),
        Leave::Half => {
            client.half_close().await.unwrap();
            // However it ends, it does.
            let ended = tokio::time::timeout(DEADLINE, client.read_to_end()).await;
            assert!(ended.is_ok(), "cut at byte {} of {whole}, the connection stays open", bytes.len());
        }
    }
}

/// A stream of HTTP/2 that ends in the middle: by a reset, by a frame that breaks the connection, by its close.
async fn broken_stream(lane: &Lane, dice: &mut Dice, number: usize) {
    let mut client = RawH2::connect(lane.address()).await.unwrap();
    let owner = 2000 + u128::try_from(number).unwrap();
    let fields = [
        field(":method", "POST"),
        field(":scheme", "http"),
        field(":authority", "test"),
        field(":path", "/work?delay=5"),
        field("traceparent", traceparent(owner)),
        field("lock", lock(dice)),
    ];
    client.headers(&fields, false).await.unwrap();
    for _ in 0..dice.below(3) {
        client.data(b"hello", false).await.unwrap();
    }
    match dice.below(6) {
        0 => client.reset().await.unwrap(),
        // Window updates of nothing and past the largest window; settings, data and headers that make no sense.
        1 => client.frame(8, 0, 1, &[0, 0, 0, 0]).await.unwrap(),
        2 => client.frame(8, 0, 0, &[0x7F, 0xFF, 0xFF, 0xFF]).await.unwrap(),
        3 => client.frame(4, 0, 0, &[0, 4, 0xFF, 0xFF, 0xFF, 0xFF]).await.unwrap(),
        4 => client.frame(0, 0, 3, b"for no stream").await.unwrap(),
        _ => client.half_close().await.unwrap(),
    }
    // Envoy resets the stream or closes the connection, or the client is gone before.
    if dice.chance(50) {
        client.answer(Duration::from_millis(300)).await;
    }
}

/// A whole request, whose client is gone before the answer.
async fn gone(lane: &Lane, dice: &mut Dice, number: usize) {
    let mut client = lane.raw().await;
    client.send(&head(3000 + u128::try_from(number).unwrap(), &lock(dice), 0)).await.unwrap();
    if dice.chance(50) {
        client.reset().unwrap();
    }
}

#[test]
fn clients_that_break_off() {
    run(async {
        let lane = std::sync::Arc::new(STAGE.lane("leavers").await);
        let mut clients = JoinSet::new();
        for first in 0..12 {
            let lane = std::sync::Arc::clone(&lane);
            clients.spawn(async move {
                for number in (first..LEAVERS).step_by(12) {
                    let mut dice = Dice::new(seed(), number);
                    match number % 3 {
                        0 => cut(&lane, &mut dice, number).await,
                        1 => broken_stream(&lane, &mut dice, number).await,
                        _ => gone(&lane, &mut dice, number).await,
                    }
                }
            });
        }
        while let Some(done) = clients.join_next().await {
            done.unwrap();
        }
        lane.upstream().wait_idle().await;
        // Nobody who left is in the way of one who asks now. Those who are parked notice at the latest when their wait ends.
        for lock in ["order/0", "order/1", "order/2", "pool/0", "pool/1"] {
            let answer = lane.ask(9, "/after").header("lock", format!("{lock};wait=0.3")).send().await.unwrap();
            assert_eq!(answer.status, 200, "{lock}: {}", answer.text());
        }
        assert!(
            lane.upstream().requests_to("/work").len() > LEAVERS / 10,
            "hardly any has come as far as the upstream"
        );
        lane.empty().await;
    });
}

/// Heads that come a byte at a time reach no filter; bodies that do hold their locks only as long as the policy allows. Neither
/// is in the way of anybody else.
#[test]
fn clients_that_send_a_byte_at_a_time() {
    run(async {
        let lane = std::sync::Arc::new(STAGE.lane("leavers").await);
        let mut slow = JoinSet::new();
        for number in 0..SLOW {
            let lane = std::sync::Arc::clone(&lane);
            slow.spawn(async move {
                let in_body = number % 2 == 0;
                let lock = format!("slow/{number};hold=1;ttl=1");
                let head = head(5000 + u128::try_from(number).unwrap(), &lock, 1_000_000);
                let (at_once, rest) = if in_body { head.split_at(head.len()) } else { head.split_at(30) };
                let mut client = lane.raw().await;
                client.send(at_once).await.unwrap();
                let (mut sent, mut answer) = (0, None);
                let start = Instant::now();
                // For longer than it may hold the lock; who held one is told that it is lost, the others have sent no head yet.
                while answer.is_none() && (in_body || start.elapsed() < Duration::from_secs(2)) {
                    let byte = rest.get(sent).copied().unwrap_or(b'x');
                    if client.send(&[byte]).await.is_err() {
                        // Too slow even to read the answer before its connection was closed.
                        return false;
                    }
                    sent += 1;
                    answer = client.response_within(Duration::from_millis(30)).await.ok();
                    assert!(start.elapsed() < DEADLINE, "no answer after {sent} bytes");
                }
                assert_eq!(answer.map(|answer| answer.status), in_body.then_some(409), "after {sent} bytes");
                in_body
            });
        }
        let all_there = || lane.upstream().requests_to("/work").iter().filter(|seen| is_slow(seen)).count() == SLOW / 2;
        wait_for("the slow bodies at the upstream", DEADLINE, all_there).await;
        let (mut took, mut told) = (Vec::new(), 0);
        while !slow.is_empty() {
            let start = Instant::now();
            let answer = lane.ask(9, "/quick").header("lock", "quick/1;wait=0").send().await.unwrap();
            assert_eq!(answer.status, 200, "{}", answer.text());
            took.push(start.elapsed());
            while let Some(done) = slow.try_join_next() {
                told += usize::from(done.unwrap());
            }
        }
        assert!(told > SLOW / 4, "only {told} were told that their lock is lost");
        took.sort_unstable();
        let median = took[took.len() / 2];
        assert!(took.len() > 2 && median < Duration::from_secs(1), "{} held up for {median:?}", took.len());
        lane.empty().await;
    });
}

fn is_slow(seen: &interlock_testkit::Recorded) -> bool {
    seen.header("lock-fence").is_some_and(|fence| fence.starts_with("slow/"))
}
