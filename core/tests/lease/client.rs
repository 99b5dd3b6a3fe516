//! The client alone: what it believes of its leases, and what it sends.

use interlock_core::lease::{Ask, CallId, Client, Do, PutAnswer, Ticket};
use interlock_core::{Duration, LeaseId, Loss, Mode, OwnerId, Time};

use super::*;
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

/// Grants are numbers, and so are reasons.
type Doing = Do<u32, u32>;

struct Proxy {
    now: Time,
    client: Client<u32, u32>,
}

const TICKET: Ticket = Ticket(1);
const LEASE: LeaseId = LeaseId(77);

impl Proxy {
    fn new() -> Self {
        Proxy { now: Time::from_micros(9_000_000), client: Client::new(ms(250)) }
    }

    fn ask(&mut self, wait: Duration, ttl: Duration, hold: Duration) -> CallId {
        let ask = Ask {
            owner: OwnerId::new("a").unwrap(),
            locks: vec![(lock("l"), Mode::Exclusive)],
            deadline: self.now + wait,
            ttl,
            hold,
        };
        self.client.ask(self.now, TICKET, LEASE, ask);
        match self.take().as_slice() {
            [Do::Put { call, lease: LEASE, wait: told, timeout, .. }] => {
                assert_eq!((*told, *timeout), (wait, wait + ms(250)));
                *call
            }
            other => panic!("{other:?}"),
        }
    }

    /// One that holds its lease, granted at once.
    fn holding(ttl: Duration, hold: Duration) -> Self {
        let mut proxy = Self::new();
        let call = proxy.ask(ms(2000), ttl, hold);
        proxy.answer(call, ttl, ms(0));
        assert_eq!(proxy.take(), [Do::Granted { ticket: TICKET, lease: LEASE, grant: 5 }]);
        proxy
    }

    fn answer(&mut self, call: CallId, ttl: Duration, waited: Duration) {
        self.client.answered(self.now, call, PutAnswer::Granted { ttl, waited, grant: 5 });
    }

    /// Time passes, and whatever comes due on the way is done.
    fn advance(&mut self, span: Duration) {
        let end = self.now + span;
        while self.client.due() <= end {
            self.now = self.now.max(self.client.due());
            self.client.tick(self.now);
            assert!(self.client.due() > self.now, "what was due is not done: {:?}", self.client);
        }
        self.now = end;
    }

    fn take(&mut self) -> Vec<Doing> {
        self.client.take()
    }

    fn holds(&self) -> bool {
        self.client.holds(LEASE, self.now)
    }

    #[track_caller]
    fn renewal(&mut self) -> CallId {
        match self.take().as_slice() {
            [Do::Renew { call, leases, .. }] => {
                assert_eq!(leases, &[(LEASE, 5)]);
                *call
            }
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn delete(&mut self) -> CallId {
        match self.take().as_slice() {
            [Do::Delete { call, lease: LEASE, .. }] => *call,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn validity_counts_from_the_sending_and_what_the_authority_waited() {
    let mut proxy = Proxy::new();
    let call = proxy.ask(ms(2000), ms(1000), ms(60_000));
    proxy.advance(ms(700));
    proxy.answer(call, ms(1000), ms(500));
    assert_eq!(proxy.take(), [Do::Granted { ticket: TICKET, lease: LEASE, grant: 5 }]);
    // 500 ms after the sending at the earliest: 1000 ms from there.
    proxy.now = proxy.now + ms(799);
    assert!(proxy.holds());
    proxy.now = proxy.now + ms(1);
    assert!(!proxy.holds());
}

#[test]
fn a_lease_is_renewed_in_time_and_counted_from_the_renewal() {
    let mut proxy = Proxy::holding(ms(3000), ms(60_000));
    proxy.advance(ms(1000));
    let call = proxy.renewal();
    proxy.advance(ms(400));
    proxy.client.renewed(proxy.now, call, &[(LEASE, Some(ms(3000)))]);
    proxy.now = proxy.now + ms(2599);
    assert!(proxy.holds());
    proxy.now = proxy.now + ms(1);
    assert!(!proxy.holds(), "3 s after the renewal was sent");
}

#[test]
fn a_renewal_that_is_answered_after_the_lease_ended_does_not_bring_it_back() {
    let mut proxy = Proxy::holding(ms(3000), ms(60_000));
    proxy.advance(ms(1000));
    let call = proxy.renewal();
    // It was paused, and the answer is the first that it hears.
    proxy.now = proxy.now + ms(2000);
    proxy.client.renewed(proxy.now, call, &[(LEASE, Some(ms(3000)))]);
    assert!(!proxy.holds());
    proxy.client.tick(proxy.now);
    assert!(proxy.take().contains(&Do::Lost { ticket: TICKET, loss: Loss::Expired }));
}

#[test]
fn one_call_renews_all_that_are_due() {
    let mut proxy = Proxy::holding(ms(3000), ms(60_000));
    proxy.advance(ms(100));
    let ask = Ask {
        owner: OwnerId::new("b").unwrap(),
        locks: vec![(lock("m"), Mode::Exclusive)],
        deadline: proxy.now,
        ttl: ms(3000),
        hold: ms(60_000),
    };
    proxy.client.ask(proxy.now, Ticket(2), LeaseId(78), ask);
    let Some(Do::Put { call, .. }) = proxy.take().pop() else { panic!() };
    proxy.answer(call, ms(3000), ms(0));
    drop(proxy.take());
    proxy.advance(ms(900));
    let [Do::Renew { leases, .. }] = &proxy.take()[..] else { panic!() };
    assert_eq!(leases.len(), 2);
}

#[test]
fn a_lease_that_nobody_renews_is_lost_by_the_own_clock_and_given_back() {
    let mut proxy = Proxy::holding(ms(3000), ms(60_000));
    proxy.advance(ms(3000));
    let told = proxy.take();
    assert!(told.contains(&Do::Lost { ticket: TICKET, loss: Loss::Expired }), "{told:?}");
    assert!(matches!(told.last(), Some(Do::Delete { lease: LEASE, .. })));
    assert!(!proxy.holds());
}

#[test]
fn failing_renewals_are_tried_again_until_the_lease_has_ended() {
    let mut proxy = Proxy::holding(ms(3000), ms(60_000));
    proxy.advance(ms(1000));
    let mut call = proxy.renewal();
    for pause in [50, 100, 200] {
        proxy.client.failed(proxy.now, call, 9, None);
        assert_eq!(proxy.take(), []);
        proxy.advance(ms(pause));
        call = proxy.renewal();
    }
    let told = [(LEASE, Some(ms(3000)))];
    proxy.client.renewed(proxy.now, call, &told);
    proxy.client.renewed(proxy.now, call, &[(LEASE, None)]);
    assert!(proxy.holds(), "a call is answered once");
}

#[test]
fn the_authority_can_say_that_a_lease_is_lost() {
    let mut proxy = Proxy::holding(ms(3000), ms(60_000));
    proxy.advance(ms(1000));
    let call = proxy.renewal();
    proxy.client.renewed(proxy.now, call, &[(LEASE, None)]);
    assert_eq!(proxy.take(), [Do::Lost { ticket: TICKET, loss: Loss::Expired }]);
    assert!(proxy.client.is_idle(), "there is nothing to give back");
}

#[test]
fn a_lease_ends_at_its_hold_limit_however_it_is_renewed() {
    let mut proxy = Proxy::holding(ms(3000), ms(4000));
    proxy.advance(ms(1000));
    let call = proxy.renewal();
    proxy.client.renewed(proxy.now, call, &[(LEASE, Some(ms(3000)))]);
    proxy.advance(ms(2999));
    assert!(proxy.holds());
    assert_eq!(proxy.take(), [], "what renewing cannot prolong is not renewed");
    proxy.advance(ms(1));
    assert!(proxy.take().contains(&Do::Lost { ticket: TICKET, loss: Loss::HoldLimit }));
}

#[test]
fn an_unanswered_request_is_asked_again_by_the_same_name_until_its_deadline() {
    let mut proxy = Proxy::new();
    let mut call = proxy.ask(ms(500), ms(3000), ms(60_000));
    for pause in [50, 100, 200] {
        proxy.client.failed(proxy.now, call, 9, None);
        proxy.advance(ms(pause));
        let [Do::Put { call: next, lease: LEASE, .. }] = proxy.take()[..] else { panic!() };
        // Too late: nobody could say from when to count.
        proxy.answer(call, ms(3000), ms(0));
        assert_eq!(proxy.take(), []);
        call = next;
    }
    proxy.client.failed(proxy.now, call, 9, None);
    let [Do::Refused { ticket: TICKET, why: 9 }, Do::Delete { call, .. }] = proxy.take()[..] else { panic!() };
    proxy.client.deleted(call);
    assert!(proxy.client.is_idle());
}

#[test]
fn a_request_waits_for_an_authority_only_if_that_can_help() {
    let mut proxy = Proxy::new();
    let call = proxy.ask(ms(500), ms(3000), ms(60_000));
    proxy.client.failed(proxy.now, call, 9, Some(ms(60_000)));
    assert!(matches!(proxy.take()[..], [Do::Refused { why: 9, .. }, Do::Delete { .. }]));
}

#[test]
fn what_is_over_is_asked_for_by_another_name() {
    let mut proxy = Proxy::new();
    let call = proxy.ask(ms(500), ms(3000), ms(60_000));
    proxy.advance(ms(100));
    let over = |fresh| PutAnswer::Over { fresh: LeaseId(fresh), why: 9 };
    proxy.client.answered(proxy.now, call, over(90));
    let Some(Do::Put { call, lease: LeaseId(90), wait, .. }) = proxy.take().pop() else { panic!() };
    assert_eq!(wait, ms(400));
    proxy.advance(ms(400));
    proxy.client.answered(proxy.now, call, over(91));
    assert_eq!(proxy.take(), [Do::Refused { ticket: TICKET, why: 9 }]);
    assert!(proxy.client.is_idle());
}

#[test]
fn a_refusal_is_final() {
    let mut proxy = Proxy::new();
    let call = proxy.ask(ms(500), ms(3000), ms(60_000));
    proxy.client.answered(proxy.now, call, PutAnswer::Refused(9));
    assert_eq!(proxy.take(), [Do::Refused { ticket: TICKET, why: 9 }]);
    assert!(proxy.client.is_idle());
}

#[test]
fn a_release_is_repeated_until_it_is_heard_or_the_lease_has_ended() {
    let mut proxy = Proxy::holding(ms(3000), ms(60_000));
    proxy.client.release(proxy.now, LEASE);
    let call = proxy.delete();
    assert!(!proxy.holds());
    proxy.client.failed(proxy.now, call, 9, None);
    proxy.advance(ms(50));
    let call = proxy.delete();
    proxy.client.deleted(call);
    assert!(proxy.client.is_idle());

    let mut proxy = Proxy::holding(ms(3000), ms(60_000));
    proxy.client.release(proxy.now, LEASE);
    let _ = proxy.delete();
    proxy.advance(ms(3000));
    assert!(proxy.client.is_idle(), "it must have ended by itself");
}

#[test]
fn a_grant_that_comes_after_the_caller_has_gone_is_given_back() {
    let mut proxy = Proxy::new();
    let call = proxy.ask(ms(500), ms(3000), ms(60_000));
    proxy.client.release(proxy.now, LEASE);
    let delete = proxy.delete();
    proxy.answer(call, ms(3000), ms(0));
    assert_eq!(proxy.take(), [], "its cancellation is under way");

    let mut other = Proxy::new();
    let call = other.ask(ms(500), ms(3000), ms(60_000));
    other.client.release(other.now, LEASE);
    let delete_first = other.delete();
    other.client.deleted(delete_first);
    other.answer(call, ms(3000), ms(0));
    let _ = other.delete();
    proxy.client.deleted(delete);
    assert!(proxy.client.is_idle());
}

#[test]
fn an_answer_that_is_older_than_the_lease_is_not_believed() {
    let mut proxy = Proxy::new();
    let call = proxy.ask(ms(2000), ms(300), ms(60_000));
    proxy.now = proxy.now + ms(1000);
    proxy.answer(call, ms(300), ms(0));
    assert!(!proxy.holds());
    let Some(Do::Put { call, lease: LEASE, wait, .. }) = proxy.take().pop() else { panic!("asks again") };
    assert_eq!(wait, ms(1000));
    proxy.now = proxy.now + ms(1200);
    proxy.answer(call, ms(300), ms(0));
    assert!(matches!(proxy.take()[..], [Do::Lost { ticket: TICKET, .. }, Do::Delete { .. }]));
}

#[test]
fn a_hold_that_is_shorter_than_its_ttl_ends_first() {
    let mut proxy = Proxy::holding(ms(3000), ms(1000));
    proxy.advance(ms(999));
    assert!(proxy.holds());
    proxy.advance(ms(1));
    assert!(!proxy.holds());
    assert!(proxy.take().contains(&Do::Lost { ticket: TICKET, loss: Loss::HoldLimit }));
}

/// Each pause is twice the one before, up to a second; nothing is sent before it is over.
const PAUSES: [u64; 8] = [50, 100, 200, 400, 800, 1000, 1000, 1000];

#[test]
fn renewals_that_fail_pause_twice_as_long_each_time_up_to_a_second() {
    let mut proxy = Proxy::holding(ms(30_000), ms(60_000));
    proxy.advance(ms(10_000));
    let mut call = proxy.renewal();
    for (at, pause) in PAUSES.into_iter().enumerate() {
        // An answer that says nothing of the lease is as good as none.
        if at % 2 == 0 {
            proxy.client.failed(proxy.now, call, 9, None);
        } else {
            proxy.client.renewed(proxy.now, call, &[]);
        }
        proxy.advance(ms(pause - 1));
        assert_eq!(proxy.take(), [], "after failure {at}");
        proxy.advance(ms(1));
        call = proxy.renewal();
    }
    // One that succeeds starts over: at a third of its life, and with the shortest pause.
    proxy.client.renewed(proxy.now, call, &[(LEASE, Some(ms(3000)))]);
    proxy.advance(ms(999));
    assert_eq!(proxy.take(), []);
    proxy.advance(ms(1));
    let call = proxy.renewal();
    proxy.client.failed(proxy.now, call, 9, None);
    proxy.advance(ms(50));
    let _ = proxy.renewal();
}

#[test]
fn releases_that_fail_pause_twice_as_long_each_time_up_to_a_second() {
    let mut proxy = Proxy::holding(ms(30_000), ms(60_000));
    proxy.client.release(proxy.now, LEASE);
    for pause in PAUSES {
        let call = proxy.delete();
        assert!(!proxy.client.is_idle(), "it is yet to be given back");
        proxy.client.failed(proxy.now, call, 9, None);
        proxy.advance(ms(pause - 1));
        assert_eq!(proxy.take(), []);
        proxy.advance(ms(1));
    }
}

#[test]
fn requests_that_fail_pause_twice_as_long_each_time_up_to_a_second_or_as_long_as_they_are_told() {
    let mut proxy = Proxy::new();
    let mut call = proxy.ask(ms(30_000), ms(3000), ms(60_000));
    assert!(!proxy.client.is_idle());
    for (pause, told) in
        PAUSES.into_iter().map(|pause| (pause, None)).chain([(1500, Some(ms(1500))), (1000, Some(ms(1)))])
    {
        proxy.client.failed(proxy.now, call, 9, told);
        proxy.advance(ms(pause - 1));
        assert_eq!(proxy.take(), []);
        proxy.advance(ms(1));
        let [Do::Put { call: next, lease: LEASE, .. }] = proxy.take()[..] else { panic!() };
        // What is said of a call that was given up means nothing.
        proxy.client.failed(proxy.now, call, 9, None);
        proxy.client.failed(proxy.now, CallId(999), 9, None);
        assert_eq!(proxy.take(), []);
        call = next;
    }
    proxy.answer(call, ms(3000), ms(0));
    assert_eq!(proxy.take(), [Do::Granted { ticket: TICKET, lease: LEASE, grant: 5 }]);
}

#[test]
fn a_pause_that_ends_at_the_deadline_is_too_long() {
    let mut proxy = Proxy::new();
    let call = proxy.ask(ms(500), ms(3000), ms(60_000));
    proxy.client.failed(proxy.now, call, 9, Some(ms(500)));
    assert!(matches!(proxy.take()[..], [Do::Refused { why: 9, .. }, Do::Delete { .. }]));
}

#[test]
fn a_lease_that_ends_as_it_is_told_of_is_asked_for_again_before_the_deadline_and_lost_at_it() {
    for (deadline, again) in [(1001, true), (1000, false)] {
        let mut proxy = Proxy::new();
        let call = proxy.ask(ms(deadline), ms(1000), ms(60_000));
        proxy.now = proxy.now + ms(1000);
        proxy.answer(call, ms(1000), ms(0));
        let told = proxy.take();
        assert_eq!(matches!(told[..], [Do::Put { .. }]), again, "{told:?}");
        assert_eq!(matches!(told[..], [Do::Lost { .. }, Do::Delete { .. }]), !again, "{told:?}");
    }
}

#[test]
fn a_request_goes_by_five_names_at_the_most() {
    let mut proxy = Proxy::new();
    let mut call = proxy.ask(ms(500), ms(3000), ms(60_000));
    for fresh in 90..94 {
        proxy.client.answered(proxy.now, call, PutAnswer::Over { fresh: LeaseId(fresh), why: 9 });
        let Some(Do::Put { call: next, lease, .. }) = proxy.take().pop() else { panic!() };
        assert_eq!(lease, LeaseId(fresh));
        call = next;
    }
    proxy.client.answered(proxy.now, call, PutAnswer::Over { fresh: LeaseId(94), why: 9 });
    assert_eq!(proxy.take(), [Do::Refused { ticket: TICKET, why: 9 }]);
}

#[test]
fn what_is_under_way_is_not_sent_again_by_a_tick_that_comes_early() {
    let mut proxy = Proxy::holding(ms(3000), ms(60_000));
    proxy.client.tick(proxy.now);
    assert_eq!(proxy.take(), [], "nothing is due");
    proxy.client.release(proxy.now, LEASE);
    let call = proxy.delete();
    proxy.client.tick(proxy.now);
    assert_eq!(proxy.take(), [], "it is under way");
    proxy.client.failed(proxy.now, call, 9, None);
    proxy.now = proxy.now + ms(49);
    proxy.client.tick(proxy.now);
    assert_eq!(proxy.take(), [], "it pauses");
}

#[test]
fn what_was_asked_for_and_given_up_is_given_back_for_as_long_as_it_may_be_granted() {
    let mut proxy = Proxy::new();
    let _ = proxy.ask(ms(500), ms(3000), ms(60_000));
    proxy.client.release(proxy.now, LEASE);
    let _ = proxy.delete();
    // The call that asks can come to the authority until its timeout, and what it is granted lives for its TTL from there.
    proxy.advance(ms(500 + 250 + 3000 - 1));
    assert!(!proxy.client.is_idle());
    proxy.advance(ms(1));
    assert!(proxy.client.is_idle());
}
