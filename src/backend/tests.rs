//! The local backend over the fake proxy: which keys it writes, and what it makes of records that are not its own.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use interlock_core::{
    Classes, Duration, LeaseId, Limits, LockName, Mode, Outcome, OwnerId, Request, Rules, StoreError, Time, Want,
};

use super::Purpose;
use super::local::Local;
use crate::host::fake::{FakeHost, FakeProxy};
use crate::host::{Expected, Host, Stored};

fn rules() -> Rules {
    let limits = Limits {
        locks_per_owner: Some(64),
        waiters_per_lock: 8,
        locks: 100_000,
        waiters: 100,
        longest_ttl: Duration::from_secs(60),
    };
    Rules { classes: Classes::default(), limits, grace: Duration::ZERO }
}

fn request(lease: LeaseId, owner: &str, lock: &str, now: Time, wait: Duration) -> Request {
    let (ttl, hold) = (Duration::from_secs(1), Duration::from_secs(60));
    let want = Want { name: LockName::parse(lock).unwrap(), mode: Mode::Exclusive, wait, ttl, hold };
    Request::new(lease, OwnerId::new(owner).unwrap(), now, vec![want], &Classes::default())
}

fn open(host: &FakeHost) -> Local {
    Local::open(host, "t", Purpose::Enforce).unwrap()
}

fn joined(host: &FakeHost) -> Local {
    let mut local = open(host);
    assert_eq!(local.beat(host, &rules()), Ok(false));
    local
}

fn ask(local: &mut Local, host: &FakeHost, owner: &str, lock: &str) -> Result<Outcome, StoreError> {
    let lease = local.new_lease()?;
    Ok(local.acquire(host, &rules(), request(lease, owner, lock, host.now(), Duration::ZERO)))
}

#[test]
fn a_vm_that_only_tries_a_configuration_leaves_no_trace() {
    let proxy = FakeProxy::new();
    let host = proxy.host();
    let local = open(&host);
    assert_eq!(proxy.shared().into_keys().collect::<Vec<_>>(), ["interlock/3/t/enforce/seed"]);
    assert_eq!(local.mailbox(), None);
    drop(local);
    let seed = proxy.shared();
    open(&proxy.host());
    assert_eq!(proxy.shared(), seed, "the seed is chosen once");
}

#[test]
fn who_opens_a_table_at_the_same_time_uses_the_same_seed() {
    for at in 0..2 {
        let proxy = FakeProxy::new();
        let (host, other) = (proxy.host(), Rc::new(proxy.host()));
        let there = Rc::clone(&other);
        host.meanwhile(at, move || drop(open(&there)));
        let mut here = open(&host);
        assert!(!host.forget_meanwhile());
        let mut there = open(&other);
        here.beat(&host, &rules()).unwrap();
        there.beat(&*other, &rules()).unwrap();
        for n in 0..50 {
            let lock = format!("a/{n}");
            let held = ask(&mut here, &host, "one", &lock).unwrap();
            assert!(matches!(held, Outcome::Granted(_)));
            assert!(matches!(ask(&mut there, &other, "two", &lock).unwrap(), Outcome::Refused(_)), "{lock}");
        }
    }
}

#[test]
fn tables_of_instances_and_purposes_share_no_key() {
    let proxy = FakeProxy::new();
    let host = proxy.host();
    let mut keys = BTreeSet::new();
    for (instance, purpose) in [("t", Purpose::Enforce), ("t", Purpose::Audit), ("u", Purpose::Enforce)] {
        let before: BTreeSet<_> = proxy.shared().into_keys().collect();
        let mut local = Local::open(&host, instance, purpose).unwrap();
        local.beat(&host, &rules()).unwrap();
        assert!(matches!(ask(&mut local, &host, "one", "a/1").unwrap(), Outcome::Granted(_)));
        let after: BTreeSet<_> = proxy.shared().into_keys().collect();
        let new: Vec<_> = after.difference(&before).cloned().collect();
        assert_eq!(new.len(), 4, "seed, sessions, a lock's bucket and an owner's: {new:?}");
        keys.extend(new);
    }
    assert_eq!(keys.len(), 12);
}

/// Over an upgrade in a running Envoy both versions are at work for a while, in one shared data.
#[test]
fn a_table_of_another_format_is_neither_read_nor_written() {
    let proxy = FakeProxy::new();
    let host = proxy.host();
    let mut local = joined(&host);
    assert!(matches!(ask(&mut local, &host, "one", "a/1").unwrap(), Outcome::Granted(_)));
    let ours = proxy.shared();

    let proxy = FakeProxy::new();
    let host = proxy.host();
    for (key, record) in &ours {
        let (key, record) = (key.replacen("/3/", "/2/", 1), [&[2], &record[1..]].concat());
        assert_eq!(host.shared_set(&key, &record, Expected::Absent), Ok(Stored::Yes));
    }
    let theirs = proxy.shared();
    let mut local = joined(&host);
    let Outcome::Granted(lease) = ask(&mut local, &host, "two", "a/1").unwrap() else {
        panic!("what the other version has granted is not known here")
    };
    assert_eq!(local.release(&host, &rules(), lease), []);
    let now = proxy.shared();
    assert!(theirs.iter().all(|(key, record)| now.get(key) == Some(record)));

    // Under our own keys another format is an error, and stays what it was.
    for (key, record) in proxy.shared().iter().filter(|(key, _)| key.starts_with("interlock/3/")) {
        if !key.ends_with("/seed") {
            proxy.overwrite(key, &[&[2], &record[1..]].concat());
        }
    }
    let before = proxy.shared();
    let answer = ask(&mut open(&host), &host, "three", "a/1");
    assert!(!matches!(answer, Ok(Outcome::Granted(_))), "{answer:?}");
    assert_eq!(proxy.shared(), before);
}

/// Shared data forgets no key: however many locks there are, there must be no more than so many.
#[test]
fn keys_are_bounded_and_names_are_spread_evenly() {
    let proxy = FakeProxy::new();
    let host = proxy.host();
    let mut local = joined(&host);
    let mut leases = Vec::new();
    for n in 0..5000 {
        match ask(&mut local, &host, &format!("owner-{n}"), &format!("order/{n}")).unwrap() {
            Outcome::Granted(lease) => leases.push(lease),
            other => panic!("{other:?}"),
        }
    }
    let shared = proxy.shared();
    assert!(shared.len() <= 2 * 1024 + 2, "{} keys", shared.len());
    let largest = shared.values().map(Vec::len).max().unwrap();
    let average = shared.values().map(Vec::len).sum::<usize>() / shared.len();
    assert!(largest < 6 * average, "{largest} bytes in one bucket, {average} on the average");
    for lease in leases {
        assert_eq!(local.release(&host, &rules(), lease), []);
    }
    let most =
        proxy.shared().into_iter().filter(|(key, _)| !key.ends_with("/seed")).map(|(_, value)| value.len()).max();
    assert!(most.unwrap() < 40, "what is free costs next to nothing");
}

#[test]
fn leases_are_named_once_over_all_vms_and_sessions() {
    let proxy = FakeProxy::new();
    let (a, b) = (proxy.host(), proxy.host());
    let (mut first, mut second) = (joined(&a), joined(&b));
    let mut seen = BTreeSet::new();
    for _ in 0..100 {
        assert!(seen.insert(first.new_lease().unwrap()) && seen.insert(second.new_lease().unwrap()));
    }
    // The first is silent for so long that it is forgotten, and comes back.
    for _ in 0..10 {
        proxy.advance(Duration::from_secs(10));
        second.beat(&b, &rules()).unwrap();
        second.keep_house(&b, &rules(), true).unwrap();
    }
    assert_eq!(first.beat(&a, &rules()), Ok(true), "what it held is in doubt");
    for _ in 0..100 {
        assert!(seen.insert(first.new_lease().unwrap()));
    }
    assert!(open(&a).new_lease().is_err(), "without a session there is no name");
}

#[test]
fn a_heartbeat_is_due_a_third_of_the_shortest_ttl_after_the_last() {
    let proxy = FakeProxy::new();
    let host = proxy.host();
    let mut local = joined(&host);
    assert_eq!(local.next_beat().since(proxy.now()), Duration::from_millis(250));
    let lease = local.new_lease().unwrap();
    let mut wants = request(lease, "one", "a/1", host.now(), Duration::ZERO).wants().to_vec();
    wants[0].ttl = Duration::from_millis(150);
    let short = Request::new(lease, OwnerId::new("one").unwrap(), host.now(), wants, &Classes::default());
    let Outcome::Granted(lease) = local.acquire(&host, &rules(), short) else { panic!("refused") };
    assert_eq!(local.next_beat().since(proxy.now()), Duration::from_millis(50));
    proxy.advance(Duration::from_millis(50));
    assert_eq!(local.beat(&host, &rules()), Ok(false));
    proxy.advance(Duration::from_millis(150));
    assert_eq!(local.beat(&host, &rules()), Ok(true), "silent for a whole TTL");
    assert_eq!(local.check(&host, &rules(), &lease), Ok(None), "but nobody has taken it");
    local.release(&host, &rules(), lease);
    proxy.advance(Duration::from_millis(250));
    local.beat(&host, &rules()).unwrap();
    assert_eq!(local.next_beat().since(proxy.now()), Duration::from_millis(250), "nothing hangs on it any more");
}

/// Whatever a record has become, it is read or it is an error: no panic, no endless loop, no memory without bound.
#[test]
fn a_record_that_was_tampered_with_is_refused_or_read() {
    let proxy = FakeProxy::new();
    let host = proxy.host();
    let mut local = joined(&host);
    let Outcome::Granted(_held) = ask(&mut local, &host, "one", "a/1").unwrap() else { panic!("refused") };
    let records: BTreeMap<_, _> = proxy.shared().into_iter().filter(|(key, _)| !key.ends_with("/seed")).collect();
    assert_eq!(records.len(), 3);
    let mut refused = 0;
    for (key, record) in &records {
        let cut = (0..record.len()).map(|at| record[..at].to_vec());
        let longer = [0, 1, 255].map(|byte| [record.as_slice(), &[byte]].concat());
        let flipped = (0..record.len()).flat_map(|at| {
            [1, 2, 0x40, 0x80, 0xff].map(|mask| {
                let mut bytes = record.clone();
                bytes[at] ^= mask;
                bytes
            })
        });
        for bytes in cut.chain(longer).chain(flipped) {
            proxy.overwrite(key, &bytes);
            let mut fresh = open(&host);
            let answers = fresh.beat(&host, &rules()).is_ok();
            let outcome = ask(&mut fresh, &host, "one", "a/1");
            let kept = fresh.keep_house(&host, &rules(), true);
            let granted = matches!(outcome, Ok(Outcome::Granted(_)));
            refused += u32::from(!answers || !granted || kept.is_err());
            for (key, record) in &records {
                proxy.overwrite(key, record);
            }
        }
    }
    assert!(refused > 100, "{refused}");
}
