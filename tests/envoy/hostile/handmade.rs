//! What no generator hits upon: sequences, and requests that meet each other.

use interlock_testkit::DEADLINE;
use interlock_testkit::client::traceparent;

use super::STAGE;
use super::h2::{self, RawH2};
use super::shot::{Field, field};
use crate::common::run;

fn post(owner: u128, path: &str, lock: &str) -> Vec<Field> {
    vec![
        field(":method", "POST"),
        field(":scheme", "http"),
        field(":authority", "test"),
        field(":path", path),
        field("traceparent", traceparent(owner)),
        field("lock", lock),
    ]
}

/// Trailers are cleaned when they come, also where they came while the request was parked.
#[test]
fn trailers_of_a_parked_request() {
    run(async {
        let lane = STAGE.lane("parked").await;
        let holder = lane.hold(1, "/holder", "order/1").await;
        let mut parked = RawH2::connect(lane.address()).await.unwrap();
        parked.headers(&post(2, "/parked", "order/1;wait=20"), false).await.unwrap();
        parked.data(b"hello", false).await.unwrap();
        let forged = "order/1;fence=666666666666666;mode=exclusive";
        let trailers =
            ["lock-fence", "lock_fence", "lock-status", "lock_status", "lock"].map(|name| field(name, forged));
        let trailers = [&trailers[..], &[field("x-checksum", "1")]].concat();
        parked.headers(&trailers, true).await.unwrap();
        lane.wait_waiting(1).await;
        assert_eq!(holder.release().await.status, 200);
        assert_eq!(parked.answer(DEADLINE).await.status, Some(200));
        let seen = lane.upstream().requests_to("/parked").remove(0);
        let names: Vec<&str> = seen.trailers.keys().map(hyper::header::HeaderName::as_str).collect();
        assert_eq!(names, ["x-checksum"]);
        assert_eq!(&seen.body[..], b"hello");
        lane.quiet().await;
    });
}

/// Streams that are opened to wait for a lock and taken back at once, as fast as a connection takes them.
#[test]
fn streams_that_are_reset_as_fast_as_they_are_opened() {
    run(async {
        let lane = STAGE.lane("rapid").await;
        let holder = lane.hold(1, "/rapid-holder", "rapid/2").await;
        for owner in 0..8 {
            let mut client = RawH2::connect(lane.address()).await.unwrap();
            for stream in 0..400_u32 {
                let number = 2 * stream + 1;
                let headers = h2::block(&post(10 + owner, "/rapid", "rapid/2;wait=20, pool/1;wait=20"));
                let open = h2::frame(1, 4 | 1, number, &headers);
                let reset = h2::frame(3, 0, number, &8_u32.to_be_bytes());
                // Envoy closes a connection that does nothing else.
                if client.send(&[open, reset].concat()).await.is_err() {
                    break;
                }
            }
        }
        assert!(lane.upstream().requests_to("/rapid").is_empty());
        let cancelled = [("class", "rapid"), ("outcome", "cancelled")];
        lane.envoy().wait_metric("interlock_acquire_total", &cancelled, |count| count >= 100.0, DEADLINE).await;
        // They are gone: the next in line is the next to ask.
        lane.wait_waiting(0).await;
        let next = lane.ask(2, "/rapid-next").header("lock", "rapid/2;wait=20").spawn();
        lane.wait_waiting(1).await;
        assert_eq!(holder.release().await.status, 200);
        assert_eq!(next.answer().await.unwrap().status, 200);
        lane.quiet().await;
    });
}

/// Requests behind each other on one connection, the first of them parked: each gets its own answer, in order, and the refusal
/// of a HEAD has no body that could be taken for the next answer. (Behind an answer of its own Envoy closes such a connection.)
#[test]
fn a_pipeline_behind_a_parked_request() {
    run(async {
        let lane = STAGE.lane("pipeline").await;
        let holder = lane.hold(1, "/pipe-holder", "order/3").await;
        let other = lane.hold(4, "/pipe-other", "order/5").await;
        let request = |method: &str, owner: u128, path: &str, lock: &str| {
            let trace = traceparent(owner);
            format!("{method} {path} HTTP/1.1\r\nhost: test\r\ntraceparent: {trace}\r\nlock: {lock}\r\n\r\n")
        };
        let mut bytes = request("GET", 2, "/pipe-first", "order/3;wait=20");
        for number in 0..60 {
            bytes += &request("GET", 3, &format!("/pipe-{number}"), &format!("order/x{number};wait=1"));
        }
        bytes += &request("HEAD", 3, "/pipe-refused", "order/5;wait=0");
        let mut client = lane.raw().await;
        client.send(bytes.as_bytes()).await.unwrap();
        lane.wait_waiting(1).await;
        assert!(lane.upstream().requests_to("/pipe-0").is_empty(), "it overtakes a parked one");
        assert_eq!(holder.release().await.status, 200);
        let locks = (0..60).map(|number| format!("order/x{number};fence="));
        for lock in std::iter::once("order/3;fence=".to_owned()).chain(locks) {
            let served = client.response().await.unwrap();
            assert_eq!(served.status, 200, "{}", served.text());
            assert!(served.header("lock-fence").unwrap().starts_with(&lock), "{lock}");
        }
        let head = client.response_to_head().await.unwrap();
        assert_eq!((head.status, head.header("lock-fence")), (423, None));
        client.half_close().await.unwrap();
        assert_eq!(client.read_to_end().await.unwrap(), b"", "behind the refusal of a HEAD");
        assert!(lane.upstream().requests_to("/pipe-refused").is_empty());
        assert_eq!(other.release().await.status, 200);
        lane.quiet().await;
    });
}
