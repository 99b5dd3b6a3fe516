//! The fake keeps to what Envoy does.

use interlock_core::Duration;

use super::{CallAnswer, Calls, FakeProxy};
use crate::host::{Call, Cas, Expected, Headers, Host, QueueId, Status, Stored};

#[test]
fn versions_are_checked_as_envoy_does() {
    let proxy = FakeProxy::new();
    let (a, b) = (proxy.host(), proxy.host());
    proxy.set_next_cas(u32::MAX - 1);
    assert_eq!(a.shared_get("k"), Ok(None));
    assert_eq!(a.shared_set("k", b"1", Expected::Absent), Ok(Stored::Yes));
    assert_eq!(b.shared_set("k", b"2", Expected::Absent), Ok(Stored::Conflict));
    assert_eq!(b.shared_get("k"), Ok(Some((b"1".to_vec(), Cas(u32::MAX - 1)))));
    assert_eq!(b.shared_set("k", b"2", Expected::Version(Cas(u32::MAX - 1))), Ok(Stored::Yes));
    assert_eq!(a.shared_set("k", b"3", Expected::Version(Cas(u32::MAX - 1))), Ok(Stored::Conflict));
    assert_eq!(a.shared_set("k", b"3", Expected::Version(Cas(u32::MAX))), Ok(Stored::Yes));
    assert_eq!(a.shared_get("k"), Ok(Some((b"3".to_vec(), Cas(1)))), "0 is skipped");
    assert_eq!(a.shared_set("new", b"", Expected::Version(Cas(77))), Ok(Stored::Yes), "ignored when absent");
    assert_eq!(a.take_calls(), Calls { shared_reads: 2, shared_writes: 4, ..Calls::default() });
}

#[test]
fn messages_go_to_the_last_registrant() {
    let proxy = FakeProxy::new();
    let (a, b) = (proxy.host(), proxy.host());
    let queue = a.register_queue("q").unwrap();
    assert_eq!(b.register_queue("q"), Ok(queue));
    a.lose_next(1);
    for message in [b"lost", b"came"] {
        a.enqueue(queue, message).unwrap();
    }
    assert_eq!(a.notices(), []);
    assert_eq!(b.notices(), [queue]);
    assert_eq!(b.dequeue(queue), Ok(Some(b"came".to_vec())));
    assert_eq!(b.dequeue(queue), Ok(None));
    assert_eq!(a.enqueue(QueueId(9), b"").map_err(|e| e.status), Err(Status::NotFound));
}

#[test]
fn headers_are_there_in_their_phase_and_of_the_effective_stream() {
    let host = FakeProxy::new().host();
    let one = host.open(3, &[("lock", "a/1"), ("Lock", "a/2"), ("x", "")]);
    assert_eq!(host.header(Headers::Request, "lock"), Ok(Some(b"a/1".to_vec())));
    assert_eq!(host.header_list(Headers::Request, "lock"), Ok(Some(b"a/1,a/2".to_vec())));
    assert_eq!(host.header(Headers::Request, "x"), Ok(Some(Vec::new())));
    assert_eq!(host.header(Headers::Request, "y"), Ok(None));
    host.run(None);
    assert!(host.header(Headers::Request, "x").is_err());
    let dynamic: &dyn Host = &host;
    let resumed = dynamic.within(one, |host| {
        host.set_header(Headers::Request, "lock-fence", b"a/1;fence=1")?;
        host.remove_header(Headers::Request, "lock")?;
        host.resume()
    });
    assert_eq!(resumed, Ok(Ok(())));
    assert_eq!(host.stream(one).request_values("lock"), Vec::<&[u8]>::new());
    assert_eq!(host.stream(one).request_values("lock-fence"), [b"a/1;fence=1"]);
    assert!(host.header(Headers::Request, "x").is_err(), "left again");
    host.close(one);
    assert_eq!(dynamic.within(one, |_| ()).map_err(|e| e.status), Err(Status::BadArgument));
}

#[test]
fn clocks_are_independent_and_calls_fail_on_demand() {
    let proxy = FakeProxy::new();
    let host = proxy.host();
    let (now, unix) = (host.now(), host.unix_micros());
    proxy.advance(Duration::from_secs(1));
    proxy.step_wall_clock(-5_000_000);
    assert_eq!(host.now().since(now), Duration::from_secs(1));
    assert_eq!(host.unix_micros(), unix - 4_000_000);
    host.fail_next("shared_get", 1, Status::InternalFailure);
    assert!(host.shared_get("k").is_err() && host.shared_get("k").is_ok());
    host.conflict_next(1);
    assert_eq!(host.shared_set("k", b"", Expected::Absent), Ok(Stored::Conflict));
    assert_eq!(host.shared_set("k", b"", Expected::Absent), Ok(Stored::Yes));
}

#[test]
fn answers_go_to_whoever_called_and_to_nobody_else() {
    let host = FakeProxy::new().host();
    let call = Call {
        cluster: "c",
        headers: &[(":method", "PUT"), (":path", "/"), (":authority", "c")],
        body: b"ask",
        timeout: Duration::from_secs(1),
    };
    let of_root = host.call(&call).unwrap();
    let stream = host.open(3, &[]);
    let of_stream = host.call(&call).unwrap();
    let late = host.call(&call).unwrap();
    assert_eq!(
        host.open_calls().iter().map(|call| call.stream).collect::<Vec<_>>(),
        [None, Some(stream), Some(stream)]
    );
    assert!(host.answer_header(":status").is_err(), "there is no answer yet");
    let told = host.answer_call(of_stream, CallAnswer::new(201, b"0123456789").with("x", "y")).unwrap();
    assert_eq!((told.token, told.target()), (of_stream, ("PUT", "/")));
    assert_eq!(host.answer_header(":status"), Ok(Some(b"201".to_vec())));
    assert_eq!(host.answer_header("retry-after"), Ok(None));
    assert_eq!(host.answer_body(4), Ok(b"0123".to_vec()));
    host.answered_call();
    assert_eq!(host.answer_body(4), Ok(Vec::new()));
    assert_eq!(host.answer_call(of_stream, CallAnswer::new(200, b"")), None, "answered before");
    assert!(host.answer_call(of_root, CallAnswer::default()).is_some());
    assert!(host.answer_header(":status").is_err(), "an answer that was cut");
    host.answered_call();
    host.close(stream);
    assert_eq!(host.answer_call(late, CallAnswer::new(200, b"")), None, "the stream has gone");
    assert_eq!(host.open_calls(), []);
    host.fail_next("call", 1, Status::InternalFailure);
    assert!(host.call(&call).is_err());
}
