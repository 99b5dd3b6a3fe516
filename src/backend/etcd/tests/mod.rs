//! What becomes of requests, over an etcd that answers at once, late, wrongly or not at all.

mod stand;
mod store;

use interlock_core::{Duration, Loss};

use crate::backend::remote::Remote;
use crate::host::Status;
use crate::policy::Access;
use stand::Stand;

const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

#[test]
fn an_uncontended_lock_is_one_call_and_its_end_another_that_nobody_waits_for() {
    let mut stand = Stand::warm();
    let waiting = stand.ask("one", "a/1", 5);
    let sent = stand.host.open_methods();
    assert_eq!(sent.len(), 1);
    assert_eq!(sent[0].stream, Some(waiting.stream), "sent from the stream itself");
    stand.deliver();
    assert_eq!(stand.called, ["Txn"]);
    let lease = stand.granted(waiting);
    assert_eq!(lease.grants()[0].name.as_str(), "a/1");
    assert_eq!(stand.store.names("/t/q/"), ["/t/q/a/1"]);
    stand.called.clear();
    stand.release(lease);
    assert!(stand.called.is_empty() && stand.etcd.entries.is_empty(), "the stream has gone already");
    stand.deliver();
    assert_eq!(stand.called, ["Txn"]);
    assert_eq!(stand.store.names("/t/"), Vec::<String>::new());
    assert!(stand.etcd.is_idle());
}

#[test]
fn who_waits_is_woken_by_the_watch_without_time_passing() {
    let (mut stand, first, second) = Stand::contended(5);
    let second = stand.waits(second);
    let (fence, before) = (first.grants()[0].fence, stand.host.proxy().now());
    stand.called.clear();
    stand.release(first);
    stand.deliver();
    let second = stand.granted(second);
    assert!(second.grants()[0].fence > fence);
    assert_eq!((stand.called.as_slice(), stand.host.proxy().now()), (["Txn".into(), "Txn".into()].as_slice(), before));
    stand.release(second);
    stand.run(millis(100));
    assert_eq!(stand.store.names("/t/"), Vec::<String>::new());
    assert_eq!(stand.failures, Vec::<&str>::new());
}

/// A release wakes who is next and nobody else.
#[test]
fn a_line_is_handed_down_one_step_at_a_time() {
    let mut stand = Stand::warm();
    let first = stand.ask("0", "a/1", 60);
    stand.deliver();
    let mut holder = stand.granted(first);
    let mut line: Vec<_> = (1..=5).map(|n| stand.ask(&n.to_string(), "a/1", 60)).collect();
    stand.run(millis(100));
    while !line.is_empty() {
        stand.called.clear();
        let fence = holder.grants()[0].fence;
        stand.release(holder);
        stand.deliver();
        assert_eq!(stand.called.len(), 2, "the release and one step up: {:?}", stand.called);
        holder = stand.granted(line.remove(0));
        assert!(holder.grants()[0].fence > fence);
        line = line.into_iter().map(|waiting| stand.waits(waiting)).collect();
    }
}

#[test]
fn a_lock_whose_answer_was_lost_is_taken_again_and_the_first_one_given_back() {
    let mut stand = Stand::warm();
    stand.loses = 1;
    let waiting = stand.ask("one", "a/1", 5);
    stand.deliver();
    assert_eq!(stand.called, ["Txn", "Txn"], "it was done all the same, and undone");
    let waiting = stand.waits(waiting);
    stand.run(secs(1));
    let lease = stand.granted(waiting);
    assert_eq!(stand.store.names("/t/q/"), ["/t/q/a/1"]);
    stand.release(lease);
    stand.run(secs(8));
    assert_eq!(stand.store.names("/t/"), Vec::<String>::new());
    assert!(stand.etcd.is_idle() && stand.failures.contains(&"unreachable"), "{:?}", stand.failures);
}

#[test]
fn a_step_up_whose_answer_was_lost_is_seen_in_the_line() {
    let (mut stand, first, second) = Stand::contended(5);
    stand.release(first);
    // The deletion, and the step up that it lets happen.
    stand.loses = 2;
    stand.deliver();
    assert_eq!(stand.loses, 0);
    stand.run(secs(1));
    let second = stand.granted(second);
    stand.release(second);
    stand.run(secs(8));
    assert_eq!(stand.store.names("/t/"), Vec::<String>::new());
    assert!(stand.etcd.is_idle());
}

#[test]
fn who_leaves_before_the_answer_leaves_nothing() {
    let mut stand = Stand::warm();
    let waiting = stand.ask("one", "a/1", 5);
    stand.cancel(waiting);
    // Its own call arrives behind the deletion.
    let late = stand.host.open_methods().remove(0);
    stand.deliver();
    stand.store.call(&late.method.1, &late.message).unwrap();
    stand.run(secs(6));
    assert_eq!(stand.store.names("/t/"), Vec::<String>::new());
    assert!(stand.etcd.is_idle());
}

#[test]
fn a_session_that_etcd_ends_takes_what_is_held_and_who_waits_begins_anew() {
    let (mut stand, held, waiting) = Stand::contended(30);
    let waiting = stand.waits(waiting);
    for lease in stand.store.leases() {
        stand.store.end_lease(lease);
    }
    // The next sign of life tells.
    stand.run(secs(3));
    assert_eq!(stand.etcd.loss(&stand.host, &held), Some(Loss::Expired));
    assert!(stand.etcd.woken().contains(&held.stream));
    let waiting = stand.granted(waiting);
    assert_eq!(stand.store.leases().len(), 1, "another session");
    assert_eq!(stand.store.names("/t/q/"), ["/t/q/a/1"]);
    assert_eq!(stand.etcd.loss(&stand.host, &waiting), None);
    stand.host.run(Some(held.stream));
    assert_eq!(stand.etcd.release(&stand.host, held).len(), 1, "it had ended before");
}

#[test]
fn an_etcd_that_falls_silent_takes_what_is_held_when_the_session_must_have_ended() {
    let (mut stand, held, waiting) = Stand::contended(30);
    stand.silent = true;
    stand.run(secs(3));
    assert_eq!(stand.etcd.loss(&stand.host, &held), None, "it lives for six seconds after its last sign of life");
    stand.run(secs(4));
    assert_eq!(stand.etcd.loss(&stand.host, &held), Some(Loss::Expired));
    stand.run(secs(10));
    let why = stand.refused(waiting);
    assert!(why.contains("nothing was heard of the call of etcd"), "{why}");
    assert!(stand.failures.contains(&"session-lost"), "{:?}", stand.failures);
}

#[test]
fn a_watch_that_breaks_goes_on_where_it_was_and_a_compacted_one_reads_anew() {
    for compacts in [false, true] {
        let (mut stand, first, second) = Stand::contended(30);
        stand.break_streams();
        // Nobody watches now, and the deletion is over before anybody does.
        stand.release(first);
        stand.deliver();
        let second = stand.waits(second);
        if compacts {
            stand.store.compact();
        }
        stand.run(millis(400));
        stand.granted(second);
        assert_eq!(stand.failures.contains(&"compacted"), compacts, "{:?}", stand.failures);
    }
}

#[test]
fn streams_are_opened_anew_by_the_root_that_is_left() {
    let (mut stand, first, second) = Stand::contended(60);
    assert_eq!(stand.host.open_streams().len(), 2, "one that watches, one for signs of life");
    stand.change_root();
    assert_eq!(stand.host.open_streams(), []);
    stand.run(secs(3));
    let roots: Vec<_> = stand.host.open_streams().iter().map(|stream| stream.root).collect();
    assert_eq!(roots, [stand::ROOT + 1; 2]);
    let before = stand.host.proxy().now();
    stand.release(first);
    stand.deliver();
    stand.granted(second);
    assert_eq!(stand.host.proxy().now(), before, "told by the watch");
    assert_eq!(stand.failures, Vec::<&str>::new(), "nothing is wrong with etcd");
}

/// The fake host lets nobody open a stream where Envoy would turn for ever: behind another call of the same callback.
#[test]
fn streams_that_cannot_be_opened_are_tried_one_a_callback() {
    let (mut stand, first, second) = Stand::contended(60);
    stand.break_streams();
    stand.host.fail_next("grpc_open", 6, Status::InternalFailure);
    stand.host.fail_next("grpc_call", 4, Status::InternalFailure);
    stand.release(first);
    stand.run(secs(2));
    stand.granted(second);
    assert_eq!(stand.host.open_streams().len(), 2);
}

#[test]
fn a_message_that_cannot_be_read_costs_the_stream_and_not_the_waiter() {
    let (mut stand, first, second) = Stand::contended(60);
    let watch = stand.host.open_streams().into_iter().find(|stream| stream.method.1 == "Watch").unwrap();
    stand.store.unwatch();
    // As a message is read in another root than its own.
    assert!(stand.host.deliver(watch.token, crate::host::fake::GrpcAnswer::Message(Vec::new())));
    stand.etcd.message(&stand.host, watch.token);
    stand.host.delivered();
    assert!(stand.host.open_streams().iter().all(|stream| stream.token != watch.token), "it is given up");
    stand.release(first);
    stand.run(millis(400));
    stand.granted(second);
    assert_eq!(stand.failures, ["malformed"]);
}

#[test]
fn what_is_wrong_with_etcd_is_told_at_once_where_it_lasts_and_after_a_while_otherwise() {
    let lasting = [
        ((8, "etcdserver: mvcc: database space exceeded"), "no-space", "etcd's database is full (NOSPACE)"),
        ((7, "etcdserver: permission denied"), "permission", "the etcd user may not read and write under the prefix"),
        ((3, "etcdserver: user name is empty"), "auth", "etcd refuses the user name and password, or asks for them"),
        ((15, "etcdserver: corrupt cluster"), "corrupt", "etcd says that its data is corrupt"),
        ((12, "unknown service"), "not-etcd", "the cluster of backend.etcd serves no etcd"),
    ];
    for warm in [false, true] {
        for (failure, reason, words) in lasting {
            let mut stand = if warm { Stand::warm() } else { Stand::new() };
            stand.refuses = Some(failure);
            let waiting = stand.ask("one", "a/1", 30);
            stand.deliver();
            let why = stand.refused(waiting);
            assert!(why.contains(words), "{why}");
            assert!(stand.failures.contains(&reason), "{:?}", stand.failures);
        }
    }
    for (failure, reason, words) in [
        ((14, "etcdserver: no leader"), "no-leader", "etcd has no leader"),
        ((14, "etcdserver: request timed out"), "no-quorum", "etcd did not reach a quorum of its members in time"),
        ((8, "etcdserver: too many requests"), "overloaded", "etcd has too many requests"),
        ((4, ""), "timeout", "etcd did not answer in time"),
        ((2, "what?"), "status", "etcd answered with the gRPC status 2"),
    ] {
        let mut stand = Stand::warm();
        stand.refuses = Some(failure);
        let waiting = stand.ask("one", "a/1", 3);
        stand.run(secs(2));
        let waiting = stand.waits(waiting);
        stand.run(secs(2));
        let why = stand.refused(waiting);
        assert!(why.contains(words), "{why}");
        assert!(stand.failures.contains(&reason), "{:?}", stand.failures);
        // Once etcd is well again, so is everything else.
        stand.refuses = None;
        let waiting = stand.ask("one", "a/1", 3);
        stand.run(secs(1));
        stand.granted(waiting);
    }
}

#[test]
fn a_cluster_that_envoy_does_not_know_is_told_after_a_while() {
    let mut stand = Stand::new();
    stand.host.fail_next("grpc_call", u32::MAX, Status::InternalFailure);
    let waiting = stand.ask("one", "a/1", 0);
    stand.run(secs(2));
    let why = stand.refused(waiting);
    assert!(why.contains("etcd cannot be reached"), "{why}");
    assert!(stand.etcd.is_idle());
}

#[test]
fn a_user_logs_in_before_anything_else_and_again_when_the_token_is_refused() {
    let mut stand = Stand::with(Access::User { name: "locks".into(), password: "secret".into() });
    let first = stand.ask("one", "a/1", 5);
    stand.deliver();
    assert_eq!(stand.called, ["Authenticate", "LeaseGrant", "Txn"]);
    let first = stand.granted(first);
    stand.refuses = Some((16, "etcdserver: invalid auth token"));
    let second = stand.ask("two", "b/1", 5);
    stand.deliver();
    stand.refuses = None;
    stand.called.clear();
    stand.run(secs(1));
    assert_eq!(stand.called.first().map(String::as_str), Some("Authenticate"));
    stand.granted(second);
    assert_eq!(stand.etcd.loss(&stand.host, &first), None, "its session lives on");
}

#[test]
fn a_foreign_key_in_a_line_refuses_who_stands_there() {
    let (mut stand, _, second) = Stand::contended(60);
    stand.store.put("/t/q/a/1!mine", "{}");
    stand.deliver();
    let why = stand.refused(second);
    assert!(why.contains("a key under the prefix in etcd is another program's"), "{why}");
}
